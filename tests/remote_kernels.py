"""What make_golden_remote.py puts in the place of a GPU: plain PyTorch of the documented meaning of the
scans, convolutions and norms that the authors' modules call, and an importer that finds those modules in
a folder of checkouts.
"""

import contextlib
import importlib.abc
import importlib.machinery
import math
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# The token before which the scans lose their state; none usually.
forget_at = None


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None, **_):  # (S, C, T), (C, K)
    y = F.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[1])[..., : x.shape[-1]]
    return F.silu(y) if activation in ("silu", "swish") else y


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """u, delta, z: (S, I, T); A: (I, N); B, C: (S, N, T) or (S, G, N, T)."""
    size, inner, tokens = u.shape
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)

    def of_channels(m):  # (S, I, N, T)
        m = m[:, None] if m.dim() == 3 else m
        return m.repeat_interleave(inner // m.shape[1], dim=1)

    B, C = of_channels(B), of_channels(C)
    state, ys = torch.zeros(size, inner, A.shape[1]), []
    for t in range(tokens):
        if t == forget_at:
            state = torch.zeros_like(state)
        state = torch.exp(delta[..., t, None] * A) * state + (delta * u)[..., t, None] * B[..., t]
        ys.append((state * C[..., t]).sum(-1))
    y = torch.stack(ys, dim=-1)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z)
    return (y, state) if return_last_state else y


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, math.inf), **_
):
    """x, z: (S, T, H, P); dt: (S, T, H); A: (H); B, C: (S, T, G, N)."""
    size, tokens, heads, _ = x.shape
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(*dt_limit)
    B, C = (m.repeat_interleave(heads // m.shape[2], dim=2) for m in (B, C))
    state, ys = torch.zeros(size, heads, x.shape[3], B.shape[3]), []
    for t in range(tokens):
        if t == forget_at:
            state = torch.zeros_like(state)
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + torch.einsum("sh,shp,shn->shpn", dt[:, t], x[:, t], B[:, t])
        ys.append(torch.einsum("shpn,shn->shp", state, C[:, t]))
    y = torch.stack(ys, dim=1)
    if D is not None:
        y = y + (D[:, None] if D.dim() == 1 else D) * x
    return y if z is None else y * F.silu(z)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), **_):
    """q, k, v: (S, T, heads, width)."""
    assert causal
    return attention(q, k, v, window_size[0] + 1 if window_size[0] >= 0 else None, softmax_scale)


def attention(q, k, v, window=None, scale=None):
    """Causal; with a window, token t sees itself and the window - 1 before it."""
    k, v = (m.repeat_interleave(q.shape[2] // m.shape[2], dim=2) for m in (k, v))
    scores = torch.einsum("sqhd,skhd->shqk", q, k) * (scale or q.shape[-1] ** -0.5)
    t = torch.arange(q.shape[1])
    back = t[:, None] - t[None]
    seen = (back >= 0) & (back < (window or len(t)))
    return torch.einsum("shqk,skhd->sqhd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


def rms(x, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-5, **_):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden_size)), eps

    def forward(self, x):
        return rms(x, self.eps) * self.weight


class RMSNormGated(RMSNorm):
    def __init__(self, hidden_size, eps=1e-5, group_size=None, norm_before_gate=False, **_):
        super().__init__(hidden_size, eps)
        assert not norm_before_gate
        self.group_size = group_size or hidden_size

    def forward(self, x, z):
        x = (x * F.silu(z)).unflatten(-1, (-1, self.group_size))
        return rms(x, self.eps).flatten(-2) * self.weight


KERNELS = {
    "causal_conv1d": {"causal_conv1d_fn": causal_conv1d_fn},
    "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": selective_scan_fn},
    "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": mamba_chunk_scan_combined},
    "mamba_ssm.ops.triton.layer_norm": {"RMSNorm": RMSNorm},
    "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": RMSNormGated},
    "flash_attn.flash_attn_interface": {"flash_attn_func": flash_attn_func},
    "lit_gpt.selective_scan_interface": {"selective_scan_fn": selective_scan_fn},
}
# Packages that are not there; whatever is imported from them and is not in KERNELS is never called.
ABSENT = (
    "causal_conv1d", "deepspeed", "fla", "flash_attn", "mamba_ssm", "transformer_engine", "utils",
    "hmf.extras", "lit_gpt.selective_scan_interface", "lit_gpt.rmsnorm", "lit_gpt.triton_sequential_scan",
    "lit_gpt.ops", "modules.mixers.discrete_mamba2_ref", "hmf.model.hybrid_zoo.layers.bmojo_f",
    "hmf.model.hybrid_zoo.layers.gated_deltanet",
    "hmf.model.hybrid_zoo.layers.gated_kalmanet", "hmf.model.hybrid_zoo.layers.swa",
)


class AbsentAttributes(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return AbsentAttributes(name, (Absent,), {})


class Absent(metaclass=AbsentAttributes):
    """Stands for anything imported from a package that is not there."""

    def __init__(self, *_, **__):
        pass


class AbsentModule(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if f"{self.__name__}.{name}" in KERNELS:
            return importlib.import_module(f"{self.__name__}.{name}")
        return KERNELS.get(self.__name__, {}).get(name) or AbsentAttributes(name, (Absent,), {})


class PlainLoader(importlib.machinery.SourceFileLoader):
    """Loads a checkout's file without its assertions, which say that tensors are on a GPU."""

    def get_code(self, fullname):
        return compile(self.get_data(self.path), self.path, "exec", dont_inherit=True, optimize=1)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the checkouts' packages, and stands in for those that are not there."""

    def __init__(self, source: Path):
        # Where each package is. Their `__init__` would import everything: it is left out.
        self.roots = {
            "lit_gpt": source / "ArchScale/lit_gpt",
            "mamba": source / "MambaInLlama/mamba",
            "mamba2": source / "MambaInLlama/mamba2",
            "modules": source / "phi-mamba/modules",
            "fast_llm_external_models": source / "Fast-LLM/fast_llm_external_models",
            "hmf": source / "hybrid-model-factory/training/src/hmf",
            "hymba": source / "hackathon_mlops",
            "cartesia_pytorch": source / "edge/cartesia-pytorch/cartesia_pytorch",
        }
        # The one module that is wanted of a package which otherwise is not there.
        self.files = {"mamba_ssm.modules.mamba2": source / "mamba/mamba_ssm/modules/mamba2.py"}

    def find_spec(self, fullname, path=None, target=None):
        if fullname in self.files:
            file = str(self.files[fullname])
            return importlib.util.spec_from_file_location(fullname, file, loader=PlainLoader(fullname, file))
        if any(fullname == a or fullname.startswith(a + ".") for a in ABSENT):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        root, *rest = fullname.split(".")
        if root not in self.roots:
            return None
        place = self.roots[root].joinpath(*rest)
        if place.is_dir():
            spec = importlib.machinery.ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = [str(place)]
            return spec
        file = place.with_suffix(".py")
        if not file.is_file():
            return None
        return importlib.util.spec_from_file_location(fullname, file, loader=PlainLoader(fullname, str(file)))

    def create_module(self, spec):
        return AbsentModule(spec.name)

    def exec_module(self, module):
        pass


def jit_function(code):
    """The meaning of ArchScale's two forward kernels, which it writes in CUDA."""
    if "swiglu_fwd" in code:
        return lambda x, y: F.silu(x) * y
    return lambda x, y: torch.sigmoid(x) * y


def pretend_gpu(source: Path):
    """Makes the authors' modules importable, and runnable without a GPU."""
    sys.meta_path.insert(0, Finder(source))
    sys.dont_write_bytecode = True
    torch.cuda.get_device_capability = lambda *_: (8, 0)
    torch.cuda.device = lambda *_: contextlib.nullcontext()
    torch.cuda.jiterator._create_jit_fn = jit_function
    torch.cuda.jiterator._create_multi_output_jit_fn = lambda *_, **__: None
    torch.compile = lambda f=None, **_: f if f else lambda g: g
