"""Writes tests/golden: the tiny random models of golden_variants.py, and what the reference computes for them.

    make_golden.py [NAME...] [--out tests/golden]    write the named variants, or all of them
    make_golden.py [NAME...] --check                 only compare what is written with the reference

NAME is `family/variant`, as the folders are called. Needs torch and transformers; runs on one CPU
thread in a few minutes. The same versions and seeds write the same bytes.

A default initialisation would let most mistakes pass: its norms are all one, its states forget at
once, its layers hardly move the residual stream. So the weights are drawn by hand (`randomise`), every
branch is scaled until it matters (`balance`), and `check_traps` proves of each written model that every
tensor, the long memory of the state and the variant's own traps do move the logits.
"""

import argparse
import contextlib
import copy
import json
import math
import shutil
import sys
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from golden_variants import ROUTER_MARGIN, VARIANTS, Variant  # the margin for make_golden_authors.py

# A variant's folder, weights and logits together, in bytes.
FOLDER_LIMIT = 500_000
# What a runtime may differ by, in units of the standard deviation of the logits. A change counts as
# visible when it moves some logit ten times as far.
TOLERANCE = 1e-3
VISIBLE = 10 * TOLERANCE
# Each greedy step: the best logit leads the second by this many standard deviations.
GREEDY_MARGIN = 0.03
GREEDY_STEPS = 32
# Fewer different tokens than this in a greedy continuation would be a loop, which proves little.
GREEDY_DISTINCT = 10
# The default experts (grouped matmul) refuse rows that are not a multiple of 16 bytes.
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}


# --- weights ---


def all_tensors(model):
    """The parameters, and the buffers that are stored with them."""
    stored = model.state_dict()
    return [*model.named_parameters(), *((name, b) for name, b in model.named_buffers() if name in stored)]


def randomise(model, variant: Variant, rng: torch.Generator):
    """Draws every parameter anew, so that no part of the model is close to doing nothing."""

    def normal(shape, std, mean=0.0):
        return mean + std * torch.randn(shape, generator=rng)

    def uniform(shape, low, high):
        return low + (high - low) * torch.rand(shape, generator=rng)

    config = model.config
    # What multiplies the rows of the embedding, and the logits.
    widened = getattr(config, "embedding_multiplier", 1.0)
    scaled = getattr(config, "lm_head_multiplier", 1.0) / getattr(config, "logits_scaling", 1.0)
    if config.tie_word_embeddings:
        widened = scaled
    for name, p in all_tensors(model):
        if name.endswith("A_log") and p.dim() == 1:  # (h)
            w = normal(p.shape, 0.8)
        elif name.endswith("A_log"):  # (I, N), or (heads, I / heads, N)
            # The published start, A = -1..-N, halved for a longer memory, and shaken.
            w = torch.log(torch.arange(1, p.shape[-1] + 1) / 2) + normal(p.shape, 0.4)
        elif name.endswith(".D"):
            w = normal(p.shape, 0.5, mean=0.5)
        elif name.endswith("e_score_correction_bias"):
            w = normal(p.shape, 0.2)
        elif name.endswith(("dt_proj.bias", "dt_proj_bias", "dt_bias")):
            # softplus of this runs from 0.001 to 0.5, evenly in the logarithm.
            dt = torch.exp(uniform(p.shape, math.log(0.001), math.log(0.5)))
            w = dt + torch.log(-torch.expm1(-dt))
        elif "norm" in name:
            w = uniform(p.shape, 0.7, 1.3)
        elif name.endswith(".bias"):
            w = normal(p.shape, 0.3)
        elif "embed" in name:
            w = normal(p.shape, variant.embedding_std or 2 / math.sqrt(p.shape[1]) / widened)
        else:
            gain = 1.0
            if name.endswith("lm_head.weight"):
                gain = 2.0 / scaled
            elif name.endswith("router.weight"):
                gain = 3.0
            elif name.endswith("mixer.gate.weight"):  # a router whose sigmoids should not be near 0 or 1
                gain = 1.5
            elif name.endswith(("x_proj.weight", "x_proj_weight")):
                gain = variant.x_proj_std
            elif name.endswith(("dt_proj.weight", "dt_proj_weight")):
                gain = 0.5
            elif name.endswith(("q_proj.weight", "k_proj.weight")):
                gain = 1.5
                if hasattr(config, "attention_hidden_size"):  # scores that are not divided by all of head_dim
                    gain = 1.2
            elif "adapter_list" in name:
                gain = 0.7
            w = normal(p.shape, gain / math.sqrt(p.shape[-1]))
        p.data.copy_(w)


# What a branch is called, and the config's key for what multiplies it behind its last projection.
BRANCHES = {
    ".mamba": "ssm_out_multiplier",
    ".self_attn": "attention_out_multiplier",
    ".feed_forward": None,
    ".mixer": None,
    ".block_sparse_moe": None,
    ".shared_mlp": None,
}


def balance(model, token_ids, branch_std=0.7):
    """Scales the last projection of every branch, so that each adds as much to the residual stream."""

    def scaling_to(std):
        def scale(module, _inputs, output):
            y = output[0] if isinstance(output, tuple) else output
            factor = std / y.std()
            for name, p in module.named_parameters():
                if any(part in name for part in ("out_proj", "o_proj", "down_proj", "output_linear")):
                    p.data.mul_(factor)
            return (y * factor, *output[1:]) if isinstance(output, tuple) else y * factor

        return scale

    hooks = []
    for name, module in model.named_modules():
        for branch, key in BRANCHES.items():
            if name.endswith(branch):
                multiplier = getattr(model.config, "residual_multiplier", 1.0)
                multiplier *= getattr(model.config, key, 1.0) if key else 1.0
                hooks.append(module.register_forward_hook(scaling_to(branch_std / multiplier)))
    forward(model, token_ids)
    for hook in hooks:
        hook.remove()


def write_model(variant: Variant, folder: Path):
    """The folder as a published checkpoint: config.json, generation_config.json, weights."""
    rng = torch.Generator().manual_seed(variant.seed)
    with blocks_of_their_own(variant):
        model = AutoModelForCausalLM.from_config(variant.config, dtype=torch.float32, **PLAIN).eval()
    if variant.free_dt:
        free_dt(model)
    randomise(model, variant, rng)
    model.tie_weights()
    balance(model, torch.randint(variant.config.vocab_size, (4, 64), generator=rng))
    model.to(variant.dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # in f32 in every published file
            buffer.data = buffer.data.float()
    model.save_pretrained(
        folder, max_shard_size=variant.shard_size, save_original_format=not variant.fused_experts
    )
    for path in folder.glob("model*.safetensors") if variant.rename else ():
        tensors = load_file(path)
        for old, new in variant.rename.items():
            tensors = {name.replace(old, new, 1) if name.startswith(old) else name: t for name, t in tensors.items()}
        save_file(tensors, path, {"format": "pt"})
    if variant.extra_tensors:
        add_tensors(folder, {n: torch.randn(s, generator=rng) for n, s in variant.extra_tensors.items()})
    path = folder / "config.json"
    keys = json.loads(path.read_text())
    for key in variant.drop_keys:
        del keys[key]
    path.write_text(json.dumps(keys | variant.set_keys, indent=2, sort_keys=True) + "\n")


def add_tensors(folder: Path, tensors):
    """Puts tensors that the model does not know into a shard of their own."""
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"] |= dict.fromkeys(tensors, "model-extra.safetensors")
    listed["metadata"]["total_size"] += sum(t.nbytes for t in tensors.values())
    index.write_text(json.dumps(listed, indent=2, sort_keys=True) + "\n")
    save_file(tensors, folder / "model-extra.safetensors", {"format": "pt"})


# --- the reference ---


def load(variant: Variant, folder: Path, clamped=False, **changed):
    """The reference in f32 throughout, whatever the files hold, with plain attention and experts. Its class
    is that of the variant's config, as published files may say another `model_type`."""
    config = type(variant.config).from_pretrained(folder, **changed)
    config.model_type = variant.config.model_type  # by which tensors get their names
    with blocks_of_their_own(variant):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True, **PLAIN
        )
    model.eval()
    assert not found["missing_keys"] | found["mismatched_keys"], f"{folder}: {found}"
    if variant.free_dt and not clamped:
        free_dt(model)
    return model


@contextlib.contextmanager
def blocks_of_their_own(variant: Variant):
    """Models are made with `block_keys`: the mixers of such a block see a config of their own."""
    module = sys.modules[AutoModelForCausalLM._model_mapping[type(variant.config)].__module__]
    types = getattr(module, "MIXER_TYPES", {})
    kept = dict(types)

    def own(mixer):
        def make(config, layer_idx):
            config = copy.deepcopy(config)
            for key, value in variant.block_keys.get(layer_idx, {}).items():
                setattr(config, key, value)
            return mixer(config, layer_idx=layer_idx)

        return make

    types.update({name: own(mixer) for name, mixer in kept.items()} if variant.block_keys else {})
    yield
    types.update(kept)


def free_dt(model):
    """Takes the bounds off dt."""
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, math.inf)


@torch.no_grad()
def forward(model, token_ids):
    """One forward of whole sequences. Never from a cache: the Mamba-1 families of the reference start
    the scan from a zero state whenever more than one token is given, even in the middle of a text."""
    return model(input_ids=token_ids, use_cache=False).logits  # (S, T, V)


def routers(model):
    """The modules that choose experts. They return logits, weights, choices."""
    named = model.named_modules()
    return [m for name, m in named if name.endswith(".router") or hasattr(m, "e_score_correction_bias")]


def router_gap(router, logits, top_k):
    """How far, for the closest token, what is chosen is from what is not: experts, and groups of them."""
    if not hasattr(router, "e_score_correction_bias"):
        chosen = logits.sort(descending=True).values  # (S * T, E)
        return (chosen[:, top_k - 1] - chosen[:, top_k]).min().item()
    scores = logits.sigmoid() + router.e_score_correction_bias
    groups, best = router.num_group, router.topk_group
    gap = math.inf
    if best < groups:
        of_groups = scores.unflatten(1, (groups, -1)).topk(2).values.sum(-1)
        order = of_groups.sort(descending=True)
        gap = (order.values[:, best - 1] - order.values[:, best]).min().item()
        refused = order.indices[:, best:]
        scores = scores.unflatten(1, (groups, -1)).clone()
        scores[torch.arange(len(scores))[:, None], refused] = -math.inf
        scores = scores.flatten(1)
    chosen = scores.sort(descending=True).values
    return min(gap, (chosen[:, top_k - 1] - chosen[:, top_k]).min().item())


@contextlib.contextmanager
def router_gaps(model, top_k):
    """Collects, for every routed token, how far the chosen experts are from the refused ones."""
    gaps = []

    def measure(router, _inputs, output):
        gaps.append(router_gap(router, output[0], getattr(router, "top_k", top_k)))

    hooks = [m.register_forward_hook(measure) for m in routers(model)]
    yield gaps
    for hook in hooks:
        hook.remove()


def clear_forward(model, token_ids):
    """The logits, and the smallest router gap (infinite where nothing is routed)."""
    with router_gaps(model, getattr(model.config, "num_experts_per_tok", None)) as gaps:
        logits = forward(model, token_ids)
    return logits, min(gaps, default=math.inf)


def draw_sequences(model, variant: Variant, rng):
    """Random tokens without near-ties in the routers. Token 0 is always among them: its embedding is a
    row like any other, though the configs call it padding."""
    rows = []
    while len(rows) < variant.sequences:
        row = torch.randint(model.config.vocab_size, (1, variant.tokens), generator=rng)
        row[0, 5] = 0
        if clear_forward(model, row)[1] > variant.router_margin:
            rows.append(row)
    return torch.cat(rows)


def draw_greedy(model, variant: Variant, rng, logits_std):
    """A prompt whose greedy continuation has no near-tie, does not loop and never ends the text."""
    eos = model.config.eos_token_id
    eos = set(eos if isinstance(eos, list) else [eos])
    for _ in range(2000):
        prompt = torch.randint(1, model.config.vocab_size, (1, 7), generator=rng)
        ids, smallest, gap = prompt, math.inf, math.inf
        while ids.shape[1] < prompt.shape[1] + GREEDY_STEPS:
            logits, step_gap = clear_forward(model, ids)
            best = logits[0, -1].topk(2)
            smallest = min(smallest, ((best.values[0] - best.values[1]) / logits_std).item())
            gap = min(gap, step_gap)
            if smallest < GREEDY_MARGIN or gap < variant.router_margin or best.indices[0].item() in eos:
                break
            ids = torch.cat([ids, best.indices[:1, None]], dim=1)
        else:
            tokens = ids[0, prompt.shape[1] :]
            if len(set(tokens.tolist())) >= GREEDY_DISTINCT:
                return prompt[0], tokens, smallest, gap
    raise RuntimeError("no prompt without near-ties found: choose another seed")


def sort_header(path: Path):
    """Metadata comes out in a different order each time; the same data should be the same bytes."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode().ljust(end - 8)
    assert len(text) == end - 8
    path.write_bytes(data[:8] + text + data[end:])


def write_golden(variant: Variant, folder: Path):
    model = load(variant, folder)
    rng = torch.Generator().manual_seed(variant.seed + 1000)
    token_ids = draw_sequences(model, variant, rng)
    logits, gap = clear_forward(model, token_ids)
    std = logits.std().item()
    assert 1 <= std <= 4, f"{folder}: logits have a standard deviation of {std}"
    prompt, tokens, margin, greedy_gap = draw_greedy(model, variant, rng, std)
    metadata = {
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "seed": str(variant.seed),
        "logits_std": f"{std:.4f}",
        "smallest_greedy_margin": f"{margin:.4f}",  # in standard deviations
    }
    if math.isfinite(gap):
        metadata["smallest_router_gap"] = f"{min(gap, greedy_gap):.4f}"
    golden = {"token_ids": token_ids, "logits": logits, "greedy_prompt": prompt, "greedy_tokens": tokens}
    path = folder / "golden.safetensors"
    save_file({k: v.contiguous() for k, v in golden.items()}, path, metadata)
    sort_header(path)


# --- checks ---


def distance(logits, golden):
    """The largest difference of any logit, in standard deviations."""
    return ((logits - golden["logits"]).abs().max() / golden["logits"].std()).item()


def check_golden(variant: Variant, folder: Path):
    """What is written is what the reference computes, and the folder is small."""
    golden = load_file(folder / "golden.safetensors")
    model = load(variant, folder)
    far = distance(forward(model, golden["token_ids"]), golden)
    assert far < TOLERANCE / 10, f"{folder}: logits differ by {far} standard deviations"

    prompt = golden["greedy_prompt"]
    ids = torch.cat([prompt, golden["greedy_tokens"]])[None]
    # Causal, so one forward shows what every step saw.
    again = forward(model, ids)[0, len(prompt) - 1 : -1].argmax(-1)
    assert torch.equal(again, golden["greedy_tokens"]), f"{folder}: greedy tokens differ"

    size = sum(f.stat().st_size for f in folder.iterdir())
    assert size < FOLDER_LIMIT, f"{folder}: {size} bytes"
    with safe_open(folder / "golden.safetensors", "pt") as f:
        facts = ", ".join(f"{k} {v}" for k, v in sorted(f.metadata().items()) if k not in ("torch", "transformers"))
    print(f"{folder}: {size} bytes, logits within {far:.1e}; {facts}")


@contextlib.contextmanager
def forgetful_scan(model, at):
    """The state is lost once, before token `at`, as if a prompt's second part began from zero."""
    module = sys.modules[type(model).__module__]
    cut = [slice(None, at), slice(at, None)]

    def forgetful1(x, dt, A, B, C, **kwargs):  # x, dt: (S, I, T); B, C: (S, N, T)
        z = kwargs.pop("z")
        parts = [scan(x[..., c], dt[..., c], A, B[..., c], C[..., c], z=z[..., c], **kwargs) for c in cut]
        return torch.cat(parts, dim=-1)

    def forgetful2(x, dt, A, B, C, **kwargs):  # x: (S, T, h, P); dt: (S, T, h); B, C: (S, T, g, N)
        parts = [scan(x[:, c], dt[:, c], A, B[:, c], C[:, c], **kwargs) for c in cut]
        return torch.cat(parts, dim=1)

    name = "mamba2_chunk_scan" if hasattr(module, "mamba2_chunk_scan") else "mamba_selective_scan"
    scan = getattr(module, name)
    setattr(module, name, forgetful2 if name == "mamba2_chunk_scan" else forgetful1)
    yield
    setattr(module, name, scan)


@contextlib.contextmanager
def other_router_sums(model):
    """The weights of the chosen made to sum to one where they do not, and left as they are where they do."""

    def renormalise(_module, _inputs, output):
        return output[0], output[1] / output[1].sum(-1, keepdim=True), output[2]

    def leave(_module, _inputs, output):
        return output[0], output[0].softmax(-1).gather(-1, output[2]), output[2]

    hooks = []
    for router in routers(model):
        sums = []
        probe = router.register_forward_hook(lambda _m, _i, output: sums.append(output[1].sum(-1)))
        forward(model, torch.zeros(1, 4, dtype=torch.long))
        probe.remove()
        to_one = torch.allclose(sums[0], torch.ones(4))
        hooks.append(router.register_forward_hook(leave if to_one else renormalise))
    yield
    for hook in hooks:
        hook.remove()


def gated_norms(model):
    return [m for m in model.modules() if type(m).__name__.endswith("RMSNormGated")]


@contextlib.contextmanager
def whole_norms(model):
    """The gated norm over the whole row instead of each group."""
    norms = gated_norms(model)
    kept = [(norm, key, getattr(norm, key)) for norm in norms for key in ("group_size", "n_groups") if hasattr(norm, key)]
    for norm, key, _ in kept:
        setattr(norm, key, norm.weight.numel() if key == "group_size" else 1)
    yield
    for norm, key, value in kept:
        setattr(norm, key, value)


@contextlib.contextmanager
def late_gates(model):
    """The gate behind the norm where it stands before it, and before it where it stands behind."""
    norms = gated_norms(model)

    def swapped(norm):
        def forward(x, gate):
            gate = torch.nn.functional.silu(gate)
            first = getattr(norm, "norm_before_gate", False)
            return type(norm).forward(norm, x * gate) if first else type(norm).forward(norm, x) * gate

        return forward

    for norm in norms:
        norm.forward = swapped(norm)
    yield
    for norm in norms:
        del norm.forward


def check_traps(variant: Variant, folder: Path):
    """Every tensor, the state's memory and the variant's own traps are visible in the logits."""
    golden = load_file(folder / "golden.safetensors")
    token_ids = golden["token_ids"]
    model = load(variant, folder)
    tensors, traps = {}, {}

    for name, p in all_tensors(model):
        experts = [slice(e, e + 1) for e in range(p.shape[0])] if p.dim() == 3 and "experts" in name else [slice(None)]
        for part in experts:
            kept = p.data.clone()
            p.data[part] = p.data[part].flatten().roll(1).view_as(p.data[part])
            key = f"{name}[{part.start}]" if len(experts) > 1 else name
            tensors[key] = distance(forward(model, token_ids), golden)
            p.data.copy_(kept)

    # Only the last quarter counts: the memory has to reach that far.
    late = token_ids.shape[1] * 3 // 4
    if any(name.endswith("A_log") for name, _ in model.named_parameters()):
        with forgetful_scan(model, token_ids.shape[1] // 3):
            lost = (forward(model, token_ids) - golden["logits"])[:, late:].abs().max() / golden["logits"].std()
        traps["state lost"] = lost.item()

    if routers(model):
        with other_router_sums(model):
            traps["other sum of router weights"] = distance(forward(model, token_ids), golden)
    if gated_norms(model):
        with late_gates(model):
            traps["gate on the other side of the norm"] = distance(forward(model, token_ids), golden)
        groups = ("n_groups", "mamba_n_groups", "mamba_ngroups")
        if max(getattr(model.config, key, 1) for key in groups) > 1:
            with whole_norms(model):
                traps["norm of the whole row"] = distance(forward(model, token_ids), golden)
    if variant.free_dt:
        traps["dt clamped"] = distance(forward(load(variant, folder, clamped=True), token_ids), golden)
    for changed in variant.wrong_keys:
        what = ", ".join(f"{key} {value}" for key, value in changed.items())
        traps[what] = distance(forward(load(variant, folder, **changed), token_ids), golden)

    for what, far in (tensors | traps).items():
        assert far > VISIBLE, f"{folder}: {what} moves the logits by only {far:.1e} standard deviations"
    weakest = min(tensors, key=tensors.get)
    print(f"  {len(tensors)} tensors visible, weakest {weakest} {tensors[weakest]:.2g}")
    print("  " + ", ".join(f"{what} {far:.2g}" for what, far in traps.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "golden")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    for unknown in set(args.names) - set(VARIANTS):
        parser.error(f"no variant {unknown}")

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in args.names or VARIANTS:
        variant, folder = VARIANTS[name], args.out / name
        if not args.check:
            shutil.rmtree(folder, ignore_errors=True)
            write_model(variant, folder)
            write_golden(variant, folder)
        check_golden(variant, folder)
        check_traps(variant, folder)


if __name__ == "__main__":
    main()
