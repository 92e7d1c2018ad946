"""Writes tests/golden of the families whose reference is their authors' own code.

    make_golden_remote.py --source DIR [NAME...] [--out tests/golden]    write the named variants, or all
    make_golden_remote.py --source DIR [NAME...] --check                 only compare with the reference

DIR holds checkouts of SOURCES, each in a folder of the repository's name. The authors' modules are
imported from there; what they need of a GPU (scans, convolutions, flash attention) is replaced at run
time by plain PyTorch of the same documented meaning. Where the modelling code is published with the
weights only, the forward is written here from its formulas; tests/golden/README.md says which.
Needs torch, transformers and einops. The weights are drawn, and the goldens proven, as make_golden.py does.
"""

import argparse
import json
import math
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

import make_golden as base
import remote_kernels
from remote_families import FAMILIES, MAMBA_KEYS, SHARED_KEYS, Reference

# The folder under --source, and where its commit comes from.
SOURCES = {
    "ArchScale": ("https://github.com/microsoft/ArchScale", "c2ec1d6903d248842cd1568cc76577e77c96feaa"),
    "MambaInLlama": ("https://github.com/jxiw/MambaInLlama", "60d64dc66a9e72cf70167329ed4a4eaee1504d02"),
    "phi-mamba": ("https://github.com/goombalab/phi-mamba", "b2e405f74d1e2a56ffc4623cf3f4be68f7d6d79e"),
    "Fast-LLM": ("https://github.com/ServiceNow/Fast-LLM", "7d61a1ba2047814955f8acc1cde7bc10a68fa198"),
    "hybrid-model-factory": (
        "https://github.com/awslabs/hybrid-model-factory", "04b6242b8a87e4496e4ade65eb2ec6a8b23b262a",
    ),
    # A copy of the modelling file that Hymba's weights are published with.
    "hackathon_mlops": ("https://github.com/BharadwajYR/hackathon_mlops", "6d3b76ffaa106d124f1701cd96d27a5d1025b7fd"),
    "mamba": ("https://github.com/state-spaces/mamba", "e9594ce1c732d97440f0332fdc43170a2294dbfa"),
    "edge": ("https://github.com/cartesia-ai/edge", "6788a080938a20a8c84969246eea75a20a93dbbb"),
}


# --- variants ---


@dataclass
class Variant:
    keys: dict
    dtype: torch.dtype
    seed: int
    tokens: int
    sequences: int = 2
    # What a checkpoint holds as one tensor and the reference as several: (end of its name, ends of theirs).
    join: tuple = ()
    x_proj_std: float = 2.0
    # Config values a runtime could wrongly assume; each has to be visible.
    wrong_keys: tuple = ()
    # Keys to leave out of config.json, as the reference's class has them by default.
    drop_keys: tuple = ()
    dt_bias_scale: float = 1.0
    # No family here routes tokens.
    router_margin = 0.0


PLAMO = {
    "architectures": ["Plamo2ForCausalLM"], "model_type": "plamo2", "vocab_size": 128, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_size_per_head": 8, "mamba_num_heads": 5, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_step": 2,
    "mamba_enabled": True, "mamba_chunk_size": 256, "max_position_embeddings": 10485760,
    "attention_window_size": 7, "full_attention_idx": [3], "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "eos_token_id": 2, "tokenizer_class": "Plamo2Tokenizer", "use_cache": True,
}

# What the authors' inference code, and later checkpoints, hold as one.
M1_PARTS = ("in_proj_z.weight", "in_proj_x.weight", "B_proj.weight", "C_proj.weight", "dt_proj_down.weight")

VARIANTS = {
    "plamo2/window": Variant(
        PLAMO, torch.bfloat16, seed=501, tokens=47,
        wrong_keys=(("attention_window_size", 6), ("attention_window_size", 8), ("full_attention_idx", [])),
    ),
    "plamo2/step4-untied": Variant(
        PLAMO | {
            "num_hidden_layers": 5, "mamba_step": 4, "tie_word_embeddings": False, "full_attention_idx": [],
            "num_key_value_heads": 1, "mamba_d_conv": 3, "rms_norm_eps": 1e-5, "vocab_size": 99,
        },
        torch.float32, seed=502, tokens=43,
    ),
    "phi4flash/memory": Variant(
        {
            "architectures": ["Phi4FlashForCausalLM"], "model_type": "phi4flash", "vocab_size": 120,
            "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 12, "num_attention_heads": 8,
            "num_key_value_heads": 4, "sliding_window": 9, "mb_per_layer": 2, "layer_norm_eps": 1e-5,
            "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias": True,
            "mamba_proj_bias": False, "mamba_dt_rank": "auto", "hidden_act": "silu", "mlp_bias": False,
            "lm_head_bias": False, "tie_word_embeddings": True, "max_position_embeddings": 262144,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0, "eos_token_id": 2,
        },
        torch.bfloat16, seed=511, tokens=49, wrong_keys=(("sliding_window", 8), ("layer_norm_eps", 1e-4)),
        drop_keys=(
            "mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_dt_rank", "mamba_conv_bias", "mamba_proj_bias",
        ),
    ),
    "mamba-in-llama/split": Variant(
        {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 120, "hidden_size": 32,
            "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False,
            "max_position_embeddings": 8192, "eos_token_id": 2,
            "d_model": 32, "n_layer": 4, "attn_layers": [1, 3], "d_inner": 48, "d_xb": 16,
            "ssm_cfg": {"expand": 1, "d_state": 8},
        },
        torch.bfloat16, seed=521, tokens=51, dt_bias_scale=0.5,
    ),
    "mamba-in-llama/fused": Variant(
        {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 99, "hidden_size": 32,
            "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": True,
            "max_position_embeddings": 131072, "eos_token_id": 2,
            "rope_scaling": {
                "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 16, "rope_type": "llama3",
            },
            "d_model": 32, "n_layer": 4, "attn_layers": [2], "d_inner": 48, "d_xb": 12,
            "ssm_cfg": {"expand": 1, "d_state": 4, "repeat_kv_before_conv": False, "d_conv": 3, "dt_rank": 5},
        },
        torch.float32, seed=522, tokens=47, dt_bias_scale=0.5, join=(("in_proj.weight", M1_PARTS),),
    ),
    "mamba-in-llama/mamba2": Variant(
        {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 120, "hidden_size": 32,
            "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False,
            "max_position_embeddings": 8192, "eos_token_id": 2,
            "d_model": 32, "n_layer": 4, "attn_layers": [1], "d_inner": 32, "d_xb": 16,
            "ssm_cfg": {"expand": 1, "ngroups": 4, "d_state": 8},
        },
        torch.bfloat16, seed=523, tokens=45,
    ),
    "llamba/discrete": Variant(
        {
            "architectures": ["LlambaForCausalLM"], "model_type": "llamba", "vocab_size": 120, "d_model": 32,
            "n_layer": 4, "norm_epsilon": 1e-5, "tie_embeddings": True, "pad_vocab_size_multiple": 8,
            "lm_head_bias": False, "resid_dropout": 0.0, "eos_token_id": 2,
            "mlp_cfg": {"act_fn": "silu", "bias": False, "intermediate_size": 48},
            "ssm_cfg": {
                "activation": "identity", "bias": False, "chunk_size": 16, "d_state": 8, "expand": 1,
                "n_qk_heads": 4, "n_v_heads": 4,
            },
        },
        torch.bfloat16, seed=531, tokens=47,
    ),
    "llamba/untied-groups": Variant(
        {
            "architectures": ["LlambaForCausalLM"], "model_type": "llamba", "vocab_size": 96, "d_model": 24,
            "n_layer": 3, "norm_epsilon": 1e-6, "tie_embeddings": False, "pad_vocab_size_multiple": 8,
            "lm_head_bias": False, "resid_dropout": 0.0, "eos_token_id": 2,
            "mlp_cfg": {"act_fn": "silu", "bias": False, "intermediate_size": 40},
            "ssm_cfg": {
                "activation": "silu", "bias": False, "chunk_size": 16, "d_state": 6, "expand": 2, "d_conv": 3,
                "n_qk_heads": 2, "n_v_heads": 8,
            },
        },
        torch.float32, seed=532, tokens=43,
    ),
    "apriel-h1/dt-in-proj": Variant(
        {
            "architectures": ["AprielHybridSSMForCausalLM"], "model_type": "apriel_hybrid_ssm", "vocab_size": 120,
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "hybrid_block_layout": ["m2", "t", "m2", "m2"],
            "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None, "hidden_act": "silu",
            "tie_word_embeddings": False, "max_position_embeddings": 65536, "eos_token_id": 2,
            "ssm_cfg": {
                "activation": "silu", "bias": False, "chunk_size": 128, "conv_bias": True, "d_conv": 4,
                "d_inner": 48, "d_state": 8, "d_xb": 16, "dt_rank": "auto", "expand": 1,
                "n_qk_heads": 4, "n_v_heads": 4,
            },
        },
        torch.bfloat16, seed=541, tokens=47, dt_bias_scale=0.5,
    ),
    "apriel-h1/early": Variant(
        {
            "architectures": ["AprielHybridSSMForCausalLM"], "model_type": "apriel_hybrid_ssm", "vocab_size": 99,
            "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 1, "head_dim": 12, "hybrid_block_layout": ["t", "m2", "m2"],
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
            "max_position_embeddings": 65536, "eos_token_id": 2,
            "ssm_cfg": {
                "d_inner": 36, "d_state": 6, "d_xb": 12, "dt_rank": 3, "repeat_kv_before_conv": False, "d_conv": 3,
            },
        },
        torch.float32, seed=542, tokens=43, dt_bias_scale=0.5,
        join=((".in_proj.weight", (".in_proj.weight", ".dt_in_proj.weight")),),
    ),
    "hybrid-qwen3/mamba2": Variant(
        {
            "architectures": ["HybridQwen3ForCausalLM"], "model_type": "hybrid_qwen3", "vocab_size": 120,
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6,
            "num_key_value_heads": 2, "head_dim": 8, "hybrid_override_pattern": "*-M2-M2-*",
            "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
            "attention_bias": False, "hidden_act": "silu", "tie_word_embeddings": False,
            "use_sliding_window": False, "sliding_window": None, "max_position_embeddings": 131072,
            "eos_token_id": 2,
        },
        torch.bfloat16, seed=551, tokens=47,
    ),
    "hymba/memory-tokens": Variant(
        {
            "architectures": ["HymbaForCausalLM"], "model_type": "hymba", "vocab_size": 121, "hidden_size": 32,
            "intermediate_size": 40, "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 2,
            "attn_hidden_size": -1, "attn_implementation": "flex", "attn_implementation_new": "flex",
            "attention_dropout": 0.0, "global_attn_idx": [0, 6], "sliding_window": 8, "kq_head_dim": -1,
            "v_head_dim": 16, "kq_norm": "none", "kv_reuse_every_i_layer": -1, "kv_reuse_group": [[1, 2], [3, 4, 5]],
            "kv_weight_reuse": False, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_state": 8,
            "mamba_dt_rank": 4, "mamba_expand": 2, "mamba_inner_layernorms": True, "mamba_proj_bias": False,
            "memory_tokens_interspersed_every": 0, "num_memory_tokens": 6, "mlp_hidden_act": "silu",
            "hidden_act": "silu", "num_experts": 1, "num_experts_per_tok": 1, "num_mamba": 1, "rope": True,
            "rope_theta": 10000.0, "rope_type": "ntk", "max_position_embeddings": 8192,
            "orig_max_position_embeddings": 2048, "seq_length": 64, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
            "tie_word_embeddings": True, "use_cache": False, "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "use_mamba_kernels": True, "pad_token_id": 0, "eos_token_id": 2,
        },
        torch.bfloat16, seed=561, tokens=47,
        wrong_keys=(("sliding_window", 7), ("rope_type", "default")),
    ),
    "rene/window": Variant(
        {
            "architectures": ["ReneLMHeadModel"], "model_type": "rene", "vocab_size": 112, "d_model": 32,
            "n_layer": 6, "ssm_cfg": {"d_state": 8, "headdim": 8, "ngroups": 2, "norm_before_gate": False},
            "attn_layer_idx": [3], "attn_cfg": {"num_heads": 4, "num_heads_kv": 2, "sliding_window_length": 9},
            "mlp_layer_idx": [1, 5], "mlp_cfg": {"expand": 3}, "rms_norm": True, "residual_in_fp32": True,
            "pad_vocab_size_multiple": 16, "tie_word_embeddings": True, "eos_token_id": 2,
        },
        torch.bfloat16, seed=571, tokens=47,
    ),
}


# --- weights ---


def randomise(reference: Reference, variant: Variant, rng):
    """Weights under which mistakes show; see make_golden.py."""

    def normal(shape, std, mean=0.0):
        return mean + std * torch.randn(shape, generator=rng)

    def uniform(shape, low, high):
        return low + (high - low) * torch.rand(shape, generator=rng)

    for name, p in reference.tensors().items():
        last = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if "A_log" in name:
            if p.dim() == 2:
                w = torch.log(torch.arange(1, p.shape[1] + 1) / 2) + normal(p.shape, 0.4)
            else:
                w = uniform(p.shape, math.log(0.5), math.log(8))
        elif re.search(r"\.D(\.\d+)?$", name):
            w = normal(p.shape, 0.5, mean=0.5)
        elif "dt_proj" in name and name.endswith("bias") or last == "dt_bias":
            # A step for a whole head matters less than one for a channel.
            dt = torch.exp(uniform(p.shape, math.log(0.01 if last == "dt_bias" else 0.001), math.log(0.5)))
            w = (dt + torch.log(-torch.expm1(-dt))) * variant.dt_bias_scale
        elif "lambda_" in name:
            w = normal(p.shape, 0.4)
        elif name.endswith((".bias", "z_bias")):
            w = normal(p.shape, 0.3)
        elif last in ("q_weight", "k_weight"):
            w = uniform(p.shape, 0.8, 2.0)
        elif "norm" in name or last == "subln":
            # PLaMo's have an offset; after a branch they are its only scale.
            w = uniform(p.shape, *((-0.3, 0.3) if reference.offset_norms else (0.7, 1.3)))
            if reference.offset_norms and "post_" in name:
                w = w + 0.4
        elif "embed" in name or last == "memory_tokens":
            w = normal(p.shape, 2 / math.sqrt(p.shape[1]))
        else:
            gain = 1.0
            if last == "lm_head":
                gain = 2.0
            elif "x_proj" in name and p.shape[0] != p.shape[1]:
                gain = variant.x_proj_std
            elif "dt_proj" in name:
                gain = 0.5 if p.shape[0] > 8 else 1.0
            elif last in ("q_proj", "k_proj", "Wqkv"):
                gain = 1.5
            w = normal(p.shape, gain / math.sqrt(p.shape[-1]))
        if reference.forgets and last == "embedding":
            w[:, 0] += 2.0
        if reference.forgets and last == "in_proj":
            # The decay has no bias here: a direction common to all tokens makes it slow.
            w[-reference.forgets :, 0] -= 2.0
        p.data.copy_(w)


def balance(reference: Reference, token_ids, branch_std=0.7):
    """Scales the last projection of every branch, so that each adds as much to the residual stream."""
    last = ("out_proj", "o_proj", "down_proj", "fc2")

    def scale(module, _inputs, output):
        y = output["hidden_states"] if isinstance(output, dict) else output
        y = y[0] if isinstance(y, tuple) else y
        factor = branch_std / y.std()
        for name, p in module.named_parameters():
            if name.startswith(last):
                p.data.mul_(factor)
        y.mul_(factor)

    branches = (".mamba", ".self_attn", ".mlp", ".mixer", ".attn", ".moe")
    hooks = [
        m.register_forward_hook(scale)
        for name, m in reference.named_modules()
        if name.endswith(branches) and any(n.startswith(last) for n, _ in m.named_parameters())
    ]
    base.forward(reference, token_ids)
    for hook in hooks:
        hook.remove()


# --- files ---


def stored_names(variant: Variant, names) -> dict:
    """The checkpoint's tensors, each with those of the reference that it is made of, in order."""
    out = {}
    for name in names:
        for whole, parts in variant.join:
            part = next((p for p in parts if name.endswith(p)), None)
            if part:
                out.setdefault(name.removesuffix(part) + whole, {})[parts.index(part)] = name
                break
        else:
            out[name] = {0: name}
    return {stored: [of[i] for i in sorted(of)] for stored, of in out.items()}


def build(keys: dict, family: str) -> Reference:
    reference = FAMILIES[family](keys)
    reference.offset_norms = family == "plamo2"
    reference.forgets = keys["ssm_cfg"]["n_v_heads"] if family == "llamba" else 0
    return reference.eval().requires_grad_(False)


def load(variant: Variant, folder: Path, **changed) -> Reference:
    """The reference in f32 from the files."""
    keys = variant.keys | changed
    reference = build(keys, folder.parent.name)
    stored, tensors = load_file(folder / "model.safetensors"), reference.tensors()
    names = stored_names(variant, tensors)
    assert stored.keys() == names.keys(), f"{folder}: {stored.keys() ^ names.keys()}"
    for name, of in names.items():
        rows = stored[name].float().split([tensors[n].shape[0] for n in of])
        for n, part in zip(of, rows, strict=True):
            tensors[n].data.copy_(part)
    return reference


def write_model(variant: Variant, folder: Path):
    rng = torch.Generator().manual_seed(variant.seed)
    reference = build(variant.keys, folder.parent.name)
    randomise(reference, variant, rng)
    balance(reference, torch.randint(reference.config.vocab_size, (4, 64), generator=rng))
    folder.mkdir(parents=True)
    tensors = reference.tensors()
    names = stored_names(variant, tensors).items()
    stored = {k: torch.cat([tensors[n].data for n in of]).to(variant.dtype) for k, of in names}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})

    keys = {k: v for k, v in variant.keys.items() if k not in variant.drop_keys}
    if folder.parent.name == "mamba-in-llama":
        mamba = {k: keys[k] for k in MAMBA_KEYS if k in keys}
        keys = {k: v for k, v in keys.items() if k not in MAMBA_KEYS or k in SHARED_KEYS}
        (folder / "mamba_config.json").write_text(json.dumps(mamba, indent=2, sort_keys=True) + "\n")
    text = json.dumps(keys | {"torch_dtype": str(variant.dtype).removeprefix("torch.")}, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n")


def write_golden(variant: Variant, folder: Path):
    reference = load(variant, folder)
    rng = torch.Generator().manual_seed(variant.seed + 1000)
    token_ids = torch.randint(reference.config.vocab_size, (variant.sequences, variant.tokens), generator=rng)
    token_ids[:, 5] = 0
    logits = base.forward(reference, token_ids)
    std = logits.std().item()
    assert 1 <= std <= 4, f"{folder}: logits have a standard deviation of {std}"
    prompt, tokens, margin, _ = base.draw_greedy(reference, variant, rng, std)
    metadata = {
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "seed": str(variant.seed),
        "logits_std": f"{std:.4f}",
        "smallest_greedy_margin": f"{margin:.4f}",
    }
    golden = {"token_ids": token_ids, "logits": logits, "greedy_prompt": prompt, "greedy_tokens": tokens}
    path = folder / "golden.safetensors"
    save_file({k: v.contiguous() for k, v in golden.items()}, path, metadata)
    base.sort_header(path)


# --- checks ---


def check(variant: Variant, folder: Path):
    """What is written is what the reference computes; every tensor and trap is visible in it."""
    golden = load_file(folder / "golden.safetensors")
    token_ids = golden["token_ids"]
    reference = load(variant, folder)
    far = base.distance(base.forward(reference, token_ids), golden)
    assert far < base.TOLERANCE / 10, f"{folder}: logits differ by {far} standard deviations"
    prompt = golden["greedy_prompt"]
    ids = torch.cat([prompt, golden["greedy_tokens"]])[None]
    again = base.forward(reference, ids)[0, len(prompt) - 1 : -1].argmax(-1)
    assert torch.equal(again, golden["greedy_tokens"]), f"{folder}: greedy tokens differ"
    size = sum(f.stat().st_size for f in folder.iterdir())
    assert size < base.FOLDER_LIMIT, f"{folder}: {size} bytes"

    tensors, traps = {}, {}
    for name, p in reference.tensors().items():
        kept = p.data.clone()
        p.data.copy_(p.data.flatten().roll(1).view_as(p.data))
        tensors[name] = base.distance(base.forward(reference, token_ids), golden)
        p.data.copy_(kept)
    # Only the last quarter counts: the memory has to reach that far.
    late = token_ids.shape[1] * 3 // 4
    remote_kernels.forget_at = token_ids.shape[1] // 3
    lost = (base.forward(reference, token_ids) - golden["logits"])[:, late:].abs().max() / golden["logits"].std()
    remote_kernels.forget_at = None
    traps["state lost"] = lost.item()
    for key, value in variant.wrong_keys:
        wrong = load(variant, folder, **{key: value})
        traps[f"{key} {value}"] = base.distance(base.forward(wrong, token_ids), golden)
    for what, far_off in (tensors | traps).items():
        assert far_off > base.VISIBLE, f"{folder}: {what} moves the logits by only {far_off:.1e} standard deviations"
    weakest = min(tensors, key=tensors.get)
    print(f"{folder}: {size} bytes, logits within {far:.1e}")
    print(f"  {len(tensors)} tensors visible, weakest {weakest} {tensors[weakest]:.2g}")
    print("  " + ", ".join(f"{what} {far_off:.2g}" for what, far_off in traps.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--source", type=Path, required=True, help="a folder of checkouts")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "golden")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    for unknown in set(args.names) - set(VARIANTS):
        parser.error(f"no variant {unknown}")

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    remote_kernels.pretend_gpu(args.source)
    for name in args.names or VARIANTS:
        variant, folder = VARIANTS[name], args.out / name
        if not args.check:
            shutil.rmtree(folder, ignore_errors=True)
            write_model(variant, folder)
            write_golden(variant, folder)
        check(variant, folder)


if __name__ == "__main__":
    main()
