"""Writes tests/pytorch: small files by torch.save, and their twins in safetensors.

    make_pytorch_files.py [--out tests/pytorch]

Needs torch and safetensors. `tensors/` holds files of every kind of tensor and form, each
`<name>.pt` with `<name>.safetensors`: what the one holds, the other does, bit for bit. `refused/` holds files that
must not be read, and why is in tests/pytorch.rs. Every other folder is a tiny random model, as its authors
publish theirs: `torch/` has the PyTorch form, `safetensors/` the other.
"""

import argparse
import collections
import json
import math
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

WORDS = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def random(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def twin(path, tensors):
    """Safetensors have neither views nor ties: every tensor is a copy of its own."""
    save_file({name: t.detach().clone().contiguous() for name, t in tensors.items()}, path)


# --- tensors ---


def every_dtype():
    whole = torch.arange(12).reshape(3, 4)
    tensors = {WORDS[d]: (whole % 2 if d == torch.bool else whole).to(d) for d in WORDS}
    tensors |= {"scalar": torch.tensor(1.5), "count": torch.tensor(7), "empty": torch.zeros(0, 3)}
    return tensors


def views():
    base = random(6, 8)
    tied = random(4, 5, dtype=torch.bfloat16)
    return {
        "whole": base, "rows": base[2:4], "columns": base[:, 3:5], "transposed": base.t(), "steps": base[::2, 1::3],
        "turned": base.reshape(2, 3, 8).permute(2, 0, 1), "repeated": base[0, :1].expand(5), "one": base[4, 6],
        "tied.a": tied, "tied.b": tied, "tied.part": tied[1:],
    }


def parameters():
    """Parameters, with attributes and without, as a module's state_dict keeps them on request."""
    module = torch.nn.Linear(3, 2)
    module.bias._no_weight_decay = True
    module.register_buffer("steps", torch.tensor(3))
    module.steps.kind = "counter"
    return collections.OrderedDict(module.state_dict(keep_vars=True))




def checkpoint(tensors):
    """What trainers write around the weights."""
    import numpy
    from datetime import datetime
    return {
        "model": collections.OrderedDict(tensors),
        "optimizer": {"state": {0: {"exp_avg": random(2)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]},
        "epoch": 3,
        "best": numpy.float64(0.5),
        "random": numpy.arange(3),
        "args": argparse.Namespace(lr=1e-3, when=datetime(2024, 1, 2), tags={"a", "b"}, device=torch.device("cpu")),
        "size": torch.Size([2, 3]), "dtype": torch.bfloat16, "long": 1 << 80, "flag": True, "nothing": None,
        "counts": collections.defaultdict(list, {"a": [1]}), "bytes": b"abc", "more": bytearray(b"abc"), "j": 1j,
    }


def tensor_files(folder):
    def both(name, tensors, saved=None, **options):
        torch.save(tensors if saved is None else saved, folder / f"{name}.pt", **options)
        twin(folder / f"{name}.safetensors", tensors)

    legacy = {"_use_new_zipfile_serialization": False}
    for name, tensors in [("dtypes", every_dtype()), ("views", views()), ("parameters", parameters())]:
        both(f"{name}-zip", tensors)
        both(f"{name}-legacy", tensors, **legacy)
    plain = {"a.weight": random(3, 4), "b": random(2, dtype=torch.float16)}
    for protocol in range(2, 6):
        both(f"protocol-{protocol}", plain, pickle_protocol=protocol)
    both("checkpoint-zip", plain, checkpoint(plain))
    both("checkpoint-legacy", plain, checkpoint(plain), pickle_protocol=4, **legacy)
    both("state-dict", plain, {"state_dict": plain, "hyper_parameters": {"a": 1}, "global_step": 5})
    both("two-deep", plain, {"payload": {"model_state_dict": plain}, "step": 3})


def refused_files(folder):
    torch.save(random(3), folder / "one-tensor.pt")
    torch.save({"a": random(3), "q": torch.quantize_per_tensor(random(4), 0.1, 0, torch.qint8)}, folder / "quantised.pt")
    torch.save({"a": random(3), "s": torch.eye(3).to_sparse()}, folder / "sparse.pt")
    torch.save({"a": random(3), "m": torch.empty(3, device="meta")}, folder / "meta.pt")
    torch.save({"a": torch.complex(random(2), random(2)).conj()}, folder / "conjugated.pt")
    torch.save(torch.nn.Linear(2, 2), folder / "module.pt")
    torch.save({"left": {"a": random(2)}, "right": {"a": random(2)}}, folder / "two.pt")
    torch.save({"step": 3, "name": "x"}, folder / "no-tensors.pt")
    torch.save({"a": random(2), "run": Run()}, folder / "system.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "script.pt")


class Run:
    def __reduce__(self):
        return os.system, ("echo this must not be seen",)


# --- models ---


def mamba1_mixer(p, d, inner, state, conv, rank):
    return {
        f"{p}in_proj.weight": random(2 * inner, d) / math.sqrt(d), f"{p}conv1d.weight": random(inner, 1, conv) / 2,
        f"{p}conv1d.bias": random(inner) / 4, f"{p}x_proj.weight": random(rank + 2 * state, inner) / math.sqrt(inner),
        f"{p}dt_proj.weight": random(inner, rank), f"{p}dt_proj.bias": random(inner) - 2,
        f"{p}A_log": torch.arange(1, state + 1).float().log().repeat(inner, 1), f"{p}D": 1 + random(inner) / 4,
        f"{p}out_proj.weight": random(d, inner) / math.sqrt(inner),
    }


def mamba2_mixer(p, d, heads, width, groups, state, conv):
    inner, mixed = heads * width, heads * width + 2 * groups * state
    return {
        f"{p}in_proj.weight": random(inner + mixed + heads, d) / math.sqrt(d),
        f"{p}conv1d.weight": random(mixed, 1, conv) / 2, f"{p}conv1d.bias": random(mixed) / 4,
        f"{p}dt_bias": random(heads) - 2, f"{p}A_log": random(heads) / 2, f"{p}D": 1 + random(heads) / 4,
        f"{p}norm.weight": 1 + random(inner) / 4, f"{p}out_proj.weight": random(d, inner) / math.sqrt(inner),
    }


def mamba_ssm():
    """state-spaces/mamba-130m: a tied matrix that is stored once and named twice."""
    config = {
        "d_model": 8, "n_layer": 2, "vocab_size": 29, "ssm_cfg": {"d_state": 4}, "rms_norm": True,
        "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    }
    tensors = {"backbone.embedding.weight": random(32, 8)}
    for i in range(2):
        tensors |= mamba1_mixer(f"backbone.layers.{i}.mixer.", 8, 16, 4, 4, 1)
        tensors[f"backbone.layers.{i}.norm.weight"] = 1 + random(8) / 4
    tensors["backbone.norm_f.weight"] = 1 + random(8) / 4
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    return config, tensors


def black_mamba():
    config = {
        "num_layers": 3, "hidden_size": 8, "state_size": 4, "vocab_size": 32, "expansion_factor": 2, "conv_dimension": 4,
        "ffn_hidden_size": 12, "mamba_moe_layers": ["r", "4", "r"], "add_bias_linear": False, "swiglu": True,
        "max_sequence_length": 256,
    }
    tensors = {"embedding.word_embeddings.weight": random(32, 8)}
    for i in (0, 2):
        tensors |= mamba1_mixer(f"decoder.layers.{i}.mixer.", 8, 16, 4, 4, 1)
    tensors |= {"decoder.layers.1.mixer.router.weight": random(4, 8), "decoder.layers.1.mixer.router.bias": random(4)}
    for e in range(4):
        p = f"decoder.layers.1.mixer.local_experts.{e}.linear_fc"
        tensors |= {f"{p}1.weight": random(24, 8) / 3, f"{p}2.weight": random(8, 12) / 3}
    tensors |= {f"decoder.layers.{i}.norm.weight": 1 + random(8) / 4 for i in range(3)}
    tensors |= {"decoder.final_layernorm.weight": 1 + random(8) / 4, "decoder.final_layernorm.bias": random(8) / 4}
    return config, tensors




# --- writing ---


def sharded(folder, tensors):
    """As transformers' save_pretrained(safe_serialization=False) wrote it."""
    names = list(tensors)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    index = {}
    for n, half in enumerate(halves, 1):
        file = f"pytorch_model-{n:05}-of-{len(halves):05}.bin"
        torch.save({name: tensors[name].clone() for name in half}, folder / file)
        index |= {name: file for name in half}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2, sort_keys=True)
    (folder / "pytorch_model.bin.index.json").write_text(text + "\n")


def model(out, name, config, tensors, save, config_name="config.json"):
    for form in ("torch", "safetensors"):
        folder = out / name / form
        folder.mkdir(parents=True, exist_ok=True)
        (folder / config_name).write_text(json.dumps(config, indent=2) + "\n")
    save(out / name / "torch", tensors)
    twin(out / name / "safetensors" / "model.safetensors", tensors)


def whole(file, wrap=lambda t: t, **options):
    return lambda folder, tensors: torch.save(wrap(tensors), folder / file, **options)


def models(out):
    legacy = {"_use_new_zipfile_serialization": False}
    config, tensors = mamba_ssm()
    model(out, "mamba-ssm", config, tensors, whole("pytorch_model.bin"))
    half = {name: t.to(torch.bfloat16) for name, t in mamba_ssm()[1].items()}
    half["lm_head.weight"] = half["backbone.embedding.weight"]
    model(out, "mamba-ssm-legacy", config, half, whole("pytorch_model.bin", **legacy))
    del tensors["lm_head.weight"]
    model(out, "shards", config, tensors, sharded)
    config, tensors = black_mamba()
    model(out, "black-mamba", config, tensors, whole("pytorch_model.bin", lambda t: {"model": t}))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "pytorch")
    out = parser.parse_args().out
    torch.manual_seed(4001)
    for name, write in [("tensors", tensor_files), ("refused", refused_files)]:
        (out / name).mkdir(parents=True, exist_ok=True)
        write(out / name)
    models(out)


if __name__ == "__main__":
    main()
