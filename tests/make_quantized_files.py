"""Writes tests/quantized: small weights as quantised releases store them, and what torch makes of them.

    make_quantized_files.py [--out tests/quantized]

Needs torch and safetensors. Every folder has `config.json` with the release's `quantization_config` (or
`hf_quant_config.json`), `model.safetensors` in its layout, and `widened.safetensors`: each weight in BF16, that is
float32(number) * float32(scale), rounded once, and `<name>.f32` before it is rounded.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP4 = torch.cat([FP4, -FP4])


def fp8(*shape, dtype=torch.float8_e4m3fn):
    return (torch.randn(shape) * 40).to(dtype)


def scales(*shape):
    return torch.rand(shape) * 0.01 + 0.001


def blocked(scale, shape, block):
    """One scale for each element."""
    for d, (size, step) in enumerate(zip(shape, block)):
        scale = scale.repeat_interleave(step, d).narrow(d, 0, size)
    return scale


def pack_fp4(codes):
    return codes[..., ::2] | codes[..., 1::2] << 4


def pack_words(values, bits):
    """`values` from -2^(bits-1), offset, the first in the lowest bits of a word."""
    per = 32 // bits
    unsigned = values.to(torch.int64) + (1 << bits - 1)
    unsigned = torch.nn.functional.pad(unsigned, (0, -unsigned.shape[-1] % per))
    parts = unsigned.reshape(*unsigned.shape[:-1], -1, per)
    words = sum(parts[..., k] << (bits * k) for k in range(per))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


class Release:
    def __init__(self):
        self.stored, self.wide = {}, {}

    def add(self, name, value, **stored):
        self.wide[f"{name}.f32"] = value
        self.wide[name] = value.to(torch.bfloat16)
        self.stored |= {f"{name}{end}": t for end, t in stored.items()}

    def save(self, folder, **files):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
        plain = torch.randn(5).to(torch.bfloat16)
        self.stored["norm.weight"], self.wide["norm.weight"] = plain, plain
        save_file({n: t.contiguous() for n, t in self.stored.items()}, folder / "model.safetensors")
        save_file({n: t.contiguous() for n, t in self.wide.items()}, folder / "widened.safetensors")


def compressed_fp8(out):
    r = Release()
    w, s = fp8(6, 10), scales(1)
    r.add("tensor.weight", w.float() * s, **{"": w, "_scale": s})
    w, s = fp8(6, 10), scales(6, 1).to(torch.bfloat16)
    r.add("channel.weight", w.float() * s.float(), **{"": w, "_scale": s})
    w, s = fp8(20, 24), scales(3, 3)
    r.add("block.weight", w.float() * blocked(s, (20, 24), (8, 8)), **{"": w, "_scale": s})
    w, s = fp8(4, 6, dtype=torch.float8_e5m2), scales()
    r.add("other.weight", w.float() * s, **{"": w, "_scale": s})
    r.stored |= {"tensor.input_scale": scales(1), "attn.k_scale": scales(1), "attn.v_scale": scales(1)}
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "block_structure": [8, 8]}}
    config = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    r.save(out / "compressed-fp8", config={"quantization_config": config})


def compressed_int(out):
    r = Release()
    for bits, columns in [(4, 32), (8, 32), (4, 20)]:
        w = torch.randint(-(1 << bits - 1), 1 << bits - 1, (6, columns))
        s = scales(6, columns // 16 if columns == 32 else 1)
        value = w.float() * blocked(s, (6, columns), (1, 16 if columns == 32 else columns))
        r.add(f"int{bits}-{columns}.weight", value, _packed=pack_words(w, bits), _scale=s, _shape=torch.tensor([6, columns]))
    w, s = torch.randint(-128, 128, (6, 10)).to(torch.int8), scales(6, 1)
    r.add("int8.weight", w.float() * s, **{"": w, "_scale": s})
    # Experts in one tensor, a scale for every row of each.
    w, s = torch.randint(-128, 128, (3, 4, 10)).to(torch.int8), scales(3, 4, 1)
    r.add("experts.up.weight", w.float() * s, **{"": w, "_scale": s})
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 16}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    r.save(out / "compressed-int", config={"quantization_config": config})


def compressed_nvfp4(out):
    r = Release()
    codes = torch.randint(0, 16, (6, 48), dtype=torch.uint8)
    s, g = (torch.rand(6, 3) * 200).to(torch.float8_e4m3fn), torch.tensor([731.5])
    value = FP4[codes.long()] * blocked(s.float() / g, (6, 48), (1, 16))
    r.add("a.weight", value, _packed=pack_fp4(codes), _scale=s, _global_scale=g)
    r.stored["a.input_global_scale"] = torch.tensor([12.5])
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 16}}
    config = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {"g": group}}
    r.save(out / "compressed-nvfp4", config={"quantization_config": config})


def modelopt_fp8(out):
    r = Release()
    w, s = fp8(6, 10), scales()
    r.add("a.weight", w.float() * s, **{"": w, "_scale": s})
    # MXFP8: a power of two for every 32.
    w, s = fp8(4, 64), torch.randint(115, 125, (4, 2), dtype=torch.uint8)
    r.add("mx.weight", w.float() * blocked(2.0 ** (s.float() - 127), (4, 64), (1, 32)), **{"": w, "_scale": s})
    r.stored |= {"a.input_scale": scales(), "k_proj.k_scale": scales(), "v_proj.v_scale": scales()}
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    r.save(out / "modelopt-fp8", config={}, hf_quant_config={"producer": {"name": "modelopt"}, "quantization": quantization})


def modelopt_nvfp4(out):
    r = Release()
    codes = torch.randint(0, 16, (6, 48), dtype=torch.uint8)
    s, g = (torch.rand(6, 3) * 200).to(torch.float8_e4m3fn), torch.tensor(0.00137)
    value = FP4[codes.long()] * blocked(s.float() * g, (6, 48), (1, 16))
    r.add("a.weight", value, **{"": pack_fp4(codes), "_scale": s, "_scale_2": g})
    r.stored["a.input_scale"] = scales()
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "config_groups": {}}
    r.save(out / "modelopt-nvfp4", config={"quantization_config": config})


def fine_grained(out):
    r = Release()
    w, s = fp8(40, 50), scales(2, 2)
    r.add("a.weight", w.float() * blocked(s, (40, 50), (32, 32)), **{"": w, "_scale_inv": s})
    w, s = fp8(6, 10), scales(1, 1)
    r.add("small.weight", w.float() * s, **{"": w, "_scale_inv": s})
    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    r.save(out / "fine-grained", config={"quantization_config": config})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "quantized")
    out = parser.parse_args().out
    torch.manual_seed(4002)
    for write in [compressed_fp8, compressed_int, compressed_nvfp4, modelopt_fp8, modelopt_nvfp4, fine_grained]:
        write(out)


if __name__ == "__main__":
    main()
