"""Writes tests/golden/vision-mamba: tiny random Vision Mamba models, images, and the authors' logits of them.

    make_vision_golden.py --source DIR [--out tests/golden/vision-mamba]

DIR is a checkout of https://github.com/hustvl/Vim (commit dd0358a). Its VisionMamba and its Mamba mixer run as
they are, on the CPU and in f32; what they import for the GPU is replaced by the plain functions that it stands
for: the convolution and the scan by PyTorch operations, the scan by the authors' own `selective_scan_ref`.
Needs torch and einops.

A folder holds config.json (the arguments of VisionMamba), model.safetensors, images as PNG files, and
vision.safetensors: `pixels` (images, 3, size, size), normalised, and `logits` (images, classes). The images have
the size that the model sees, so that no resampling lies between the two.
"""

import argparse
import json
import math
import struct
import sys
import types
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# Arguments of VisionMamba, and which of them are left to the card's defaults.
VARIANTS = {
    "middle": dict(img_size=24, patch_size=8, stride=8, embed_dim=40, depth=3, num_classes=11),
    "first-overlap": dict(img_size=20, patch_size=8, stride=4, embed_dim=24, depth=4, d_state=5, num_classes=9,
                          use_middle_cls_token=False, norm_epsilon=1e-3),
}


def module(name, **members):
    made = types.ModuleType(name)
    made.__dict__.update(members)
    sys.modules[name] = made
    return made


def load_authors(source: Path):
    """The authors' modules, on a CPU."""

    class RMSNorm(torch.nn.Module):
        def __init__(self, width, eps=1e-5, **_):
            super().__init__()
            self.eps, self.weight, self.bias = eps, torch.nn.Parameter(torch.ones(width)), None

        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight

    unused = lambda *_, **__: None
    passed = lambda **kwargs: (lambda x: x)
    module("causal_conv1d", causal_conv1d_fn=None, causal_conv1d_update=None)
    module("causal_conv1d_cuda")
    module("selective_scan_cuda")
    for name in ("mamba_ssm", "mamba_ssm.modules", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.utils", "timm", "timm.models"):
        module(name, __path__=[str(source / "mamba-1p1p1" / name.replace(".", "/"))])
    module("mamba_ssm.ops.triton.layer_norm", RMSNorm=RMSNorm, layer_norm_fn=None, rms_norm_fn=None)
    module("mamba_ssm.ops.triton.selective_state_update", selective_state_update=None)
    module("mamba_ssm.utils.generation", GenerationMixin=object)
    module("mamba_ssm.utils.hf", load_config_hf=unused, load_state_dict_hf=unused)
    module("timm.models.vision_transformer", VisionTransformer=object, _cfg=unused, _load_weights=unused)
    module("timm.models.registry", register_model=lambda f: f)
    pair = lambda x: x if isinstance(x, tuple) else (x, x)
    module("timm.models.layers", trunc_normal_=torch.nn.init.trunc_normal_, lecun_normal_=unused, to_2tuple=pair,
           DropPath=lambda *_: torch.nn.Identity())
    sys.path.insert(0, str(source / "vim"))
    import mamba_ssm.modules.mamba_simple as mixer
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    def inner(xz, conv_w, conv_b, x_proj, dt_proj, A, B, C, D, delta_bias=None, delta_softplus=True):
        """What the fused kernel computes (mamba_inner_fn_no_out_proj); xz is (batch, 2I, tokens)."""
        x, z = xz.chunk(2, dim=1)
        taps, tokens = conv_w.shape[-1], x.shape[-1]
        x = F.silu(F.conv1d(x, conv_w, conv_b, padding=taps - 1, groups=x.shape[1])[..., :tokens])
        made = F.linear(x.transpose(1, 2), x_proj)
        low, B, C = made.split([dt_proj.shape[1], A.shape[1], A.shape[1]], dim=-1)
        dt = F.linear(low, dt_proj).transpose(1, 2)
        return selective_scan_ref(x, dt, A, B.transpose(1, 2), C.transpose(1, 2), D, z, delta_bias, delta_softplus)

    mixer.mamba_inner_fn_no_out_proj = inner
    mixer.causal_conv1d_fn = inner  # only asked whether it is there
    import models_mamba

    return models_mamba


def randomise(model, rng):
    """Draws every parameter so that it matters."""
    for name, p in model.named_parameters():
        draw = torch.randn(p.shape, generator=rng)
        if "A_" in name:  # A_log, A_b_log
            w = torch.log(torch.arange(1, p.shape[1] + 1) / 2) + 0.4 * draw
        elif name.endswith((".D", ".D_b")):
            w = 0.5 + 0.5 * draw
        elif "dt_proj" in name and name.endswith("bias"):
            dt = torch.exp(math.log(0.001) + math.log(500) * torch.rand(p.shape, generator=rng))
            w = dt + torch.log(-torch.expm1(-dt))
        elif "norm" in name:
            w = 1 + 0.2 * draw
        elif name.endswith("bias"):
            w = 0.3 * draw
        elif name in ("cls_token", "pos_embed"):
            w = 0.7 * draw
        else:
            gain = 2.0 if "x_proj" in name or name == "head.weight" else 1.0
            w = gain * draw / math.sqrt(p[0].numel())
        p.data.copy_(w)


def png(pixels):
    """An 8-bit RGB image (size, size, 3) as a PNG file."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = pixels.shape[0]
    rows = b"".join(b"\0" + bytes(row.flatten().tolist()) for row in pixels)
    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "golden" / "vision-mamba")
    options = parser.parse_args()
    torch.set_num_threads(1)
    authors = load_authors(options.source)
    for seed, (name, arguments) in enumerate(VARIANTS.items(), 900):
        rng = torch.Generator().manual_seed(seed)
        model = authors.VisionMamba(**arguments, rms_norm=True, residual_in_fp32=True, fused_add_norm=False,
                                    final_pool_type="mean", bimamba_type="v2").eval()
        randomise(model, rng)
        size = arguments["img_size"]
        images = torch.randint(256, (3, size, size, 3), generator=rng, dtype=torch.uint8)
        pixels = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        logits = model(pixels)
        # Every tensor shows in the logits; but what a first token forgets in the last layer, nobody sees.
        unseen = () if arguments.get("use_middle_cls_token", True) else (f"layers.{arguments['depth'] - 1}.mixer.A_log",)
        for path, p in model.named_parameters():
            if path in unseen:
                continue
            kept = p.data.clone()
            p.data.copy_(p.data.flatten().roll(1).view_as(p.data))
            far = ((model(pixels) - logits).abs().max() / logits.std()).item()
            assert far > 5e-3, f"{name}: {path} moves the logits by {far} standard deviations only"
            p.data.copy_(kept)
        folder = options.out / name
        folder.mkdir(parents=True, exist_ok=True)
        labels = {str(i): f"thing {i}" for i in range(arguments["num_classes"])}
        config = {"architectures": ["VisionMamba"], "crop_pct": 1.0, "id2label": labels, **arguments}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
        save_file({"pixels": pixels.contiguous(), "logits": logits}, folder / "vision.safetensors")
        for i, image in enumerate(images):
            (folder / f"{i}.png").write_bytes(png(image))
        print(name, sum(f.stat().st_size for f in folder.iterdir()), "bytes; logits", logits.std().item())


if __name__ == "__main__":
    main()
