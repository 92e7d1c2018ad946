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
import contextlib
import importlib.abc
import importlib.machinery
import json
import math
import re
import shutil
import sys
import types
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import make_golden as base

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
    "edge": ("https://github.com/cartesia-ai/edge", "6788a080938a20a8c84969246eea75a20a93dbbb"),
}


# --- plain PyTorch for what the authors call kernels for ---

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
    "hmf.extras", "lit_gpt.selective_scan_interface", "lit_gpt.rmsnorm", "lit_gpt.triton_sequential_scan", "lit_gpt.ops",
    "modules.mixers.discrete_mamba2_ref", "hmf.model.hybrid_zoo.layers.bmojo_f", "hmf.model.hybrid_zoo.layers.gated_deltanet",
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
        zoo = "hybrid-model-factory/training/src/hmf/model/hybrid_zoo"
        # Where each package is. Their `__init__` would import everything: it is left out.
        self.roots = {
            "lit_gpt": source / "ArchScale/lit_gpt",
            "mamba": source / "MambaInLlama/mamba",
            "mamba2": source / "MambaInLlama/mamba2",
            "modules": source / "phi-mamba/modules",
            "fast_llm_external_models": source / "Fast-LLM/fast_llm_external_models",
            "hmf": source / "hybrid-model-factory/training/src/hmf",
            "hybrid_zoo": source / zoo,
            "hymba": source / "hackathon_mlops",
            "cartesia_pytorch": source / "edge/cartesia-pytorch/cartesia_pytorch",
        }

    def find_spec(self, fullname, path=None, target=None):
        # One copy of the zoo, whichever name its files call it by.
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


# --- the families: from a config.json to a module whose tensors have their published names ---


class Reference(nn.Module):
    """A causal model; `tensors` and `forward` are all that is asked of it."""

    def __init__(self, keys: dict, model: nn.Module, run=None):
        super().__init__()
        self.inner = model
        self.run = run or (lambda ids: model(ids))
        eos = keys.get("eos_token_id", 2)
        self.config = SimpleNamespace(vocab_size=keys["vocab_size"], eos_token_id=eos)

    def tensors(self):
        """Each tensor once, under its published name."""
        return dict(self.inner.named_parameters())

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.run(input_ids).float())


class Block(nn.Module):
    """x + post(mixer(norm(x))), twice."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def swiglu(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x, theta):  # (S, T, heads, width)
    half = x.shape[-1] // 2
    turn = theta ** (-torch.arange(half) / half) * torch.arange(x.shape[1])[:, None]
    cos, sin = turn.cos()[:, None], turn.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class OffsetNorm(RMSNorm):
    def __init__(self, width, eps, offset):
        super().__init__(width, eps)
        self.offset = offset

    def forward(self, x):
        return rms(x, self.eps) * (self.weight + self.offset)


class PlamoAttention(nn.Module):
    def __init__(self, c, window):
        super().__init__()
        self.c, self.window = c, window
        width, (q, kv) = c.hidden_size_per_head, (c.num_attention_heads, c.num_key_value_heads)
        self.qkv_proj = nn.Linear(c.hidden_size, (q + 2 * kv) * width, bias=False)
        self.o_proj = nn.Linear(q * width, c.hidden_size, bias=False)
        self.q_weight = nn.Parameter(torch.ones(q, width))
        self.k_weight = nn.Parameter(torch.ones(kv, width))

    def forward(self, x):
        q, kv = self.c.num_attention_heads, self.c.num_key_value_heads
        q, k, v = self.qkv_proj(x).unflatten(-1, (q + 2 * kv, -1)).split([q, kv, kv], dim=2)
        q, k = rms(q, 1e-6) * self.q_weight, rms(k, 1e-6) * self.k_weight
        q, k = rotate(q, 10000.0), rotate(k, 10000.0)
        return self.o_proj(attention(q, k, v, self.window).flatten(2))


class PlamoMamba(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        inner, rank = c.mamba_num_heads * c.hidden_size_per_head, max(64, c.hidden_size // 16)
        self.in_proj = nn.Linear(c.hidden_size, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, c.mamba_d_conv, groups=inner, bias=False)
        self.bcdt_proj = nn.Linear(inner, rank + 2 * c.mamba_d_state, bias=False)
        self.dt_proj = nn.Linear(rank, c.mamba_num_heads, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(c.mamba_num_heads))
        self.A_log = nn.Parameter(torch.zeros(c.mamba_num_heads))
        self.D = nn.Parameter(torch.ones(c.mamba_num_heads))
        self.dt_norm_weight = nn.Parameter(torch.ones(rank))
        self.B_norm_weight = nn.Parameter(torch.ones(c.mamba_d_state))
        self.C_norm_weight = nn.Parameter(torch.ones(c.mamba_d_state))
        self.out_proj = nn.Linear(inner, c.hidden_size, bias=False)

    def forward(self, x):
        heads, states, eps = self.c.mamba_num_heads, self.c.mamba_d_state, self.c.rms_norm_eps
        z, x = self.in_proj(x).unflatten(-1, (heads, -1)).chunk(2, dim=-1)
        x = causal_conv1d_fn(x.flatten(2).mT, self.conv1d.weight[:, 0], activation="silu").mT
        rank = self.dt_norm_weight.shape[0]
        b, c, dt = self.bcdt_proj(x).split([states, states, rank], dim=-1)
        b, c = rms(b, eps) * self.B_norm_weight, rms(c, eps) * self.C_norm_weight
        dt = self.dt_proj(rms(dt, eps) * self.dt_norm_weight)
        y = mamba_chunk_scan_combined(
            x.unflatten(-1, (heads, -1)), dt, -self.A_log.exp(), b[:, :, None], c[:, :, None], 256,
            D=self.D, z=z, dt_bias=self.dt_bias, dt_softplus=True,
        )
        return self.out_proj(y.flatten(2))


class GatedMlp(nn.Module):
    """Gate and up in one matrix."""

    def __init__(self, fused, down, width, inner):
        super().__init__()
        self.names = fused, down
        self.add_module(fused, nn.Linear(width, 2 * inner, bias=False))
        self.add_module(down, nn.Linear(inner, width, bias=False))

    def forward(self, x):
        fused, down = self.names
        return self.get_submodule(down)(swiglu(self.get_submodule(fused)(x)))


def plamo2(keys: dict) -> Reference:
    c = SimpleNamespace(**keys)
    norm = partial(OffsetNorm, c.hidden_size, c.rms_norm_eps)
    layers = []
    for i in range(c.num_hidden_layers):
        # A window of W tokens is W before the token itself, in the authors' mask.
        window = None if i in c.full_attention_idx else c.attention_window_size + 1
        attends = i % c.mamba_step == c.mamba_step // 2
        layers.append(
            Block(
                pre_mixer_norm=norm(1.0),
                mixer=PlamoAttention(c, window) if attends else PlamoMamba(c),
                post_mixer_norm=norm(1.0 / 5),
                pre_mlp_norm=norm(1.0),
                mlp=GatedMlp("gate_up_proj", "down_proj", c.hidden_size, c.intermediate_size),
                post_mlp_norm=norm(1.0 / 5**1.5),
            )
        )
    embed = nn.Embedding(c.vocab_size, c.hidden_size)
    model = Block(model=Block(embed_tokens=embed, layers=Block(layers=nn.ModuleList(layers)), norm=norm(1.0)))
    if not c.tie_word_embeddings:
        model.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def run(ids):
        x = embed(ids)
        for layer in layers:
            x = x + layer.post_mixer_norm(layer.mixer(layer.pre_mixer_norm(x)))
            x = x + layer.post_mlp_norm(layer.mlp(layer.pre_mlp_norm(x)))
        head = embed.weight if c.tie_word_embeddings else model.lm_head.weight
        return model.model.norm(x) @ head.T

    return Reference(keys, model, run)


class DifferentialAttention(nn.Module):
    """The projections around the authors' module; `k` and `v` given: another layer's."""

    def __init__(self, c, i, cross):
        super().__init__()
        from lit_gpt.diff_attn import FlashDiffAttention

        self.heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads
        width = c.hidden_size // self.heads
        rows = self.heads + (0 if cross else 2 * self.kv_heads)
        self.Wqkv = nn.Linear(c.hidden_size, rows * width)
        self.out_proj = nn.Linear(c.hidden_size, c.hidden_size)
        local = i < c.num_hidden_layers // 2
        window = (c.sliding_window - 1, 0) if local else (-1, -1)
        self.inner_cross_attn = FlashDiffAttention(width, i, causal=True, window_size=window)

    def forward(self, x, kv=None):
        q, *own = self.Wqkv(x).unflatten(-1, (-1, x.shape[-1] // self.heads)).split_with_sizes(
            [self.heads] + ([] if kv else [self.kv_heads] * 2), dim=2
        )
        k, v = kv or own
        return self.out_proj(self.inner_cross_attn(q, k, v).flatten(2)), (k, v)


def phi4flash(keys: dict) -> Reference:
    from lit_gpt.gated_memory_unit import GMU
    from lit_gpt.mamba_simple import Mamba

    c = SimpleNamespace(**keys)
    half = c.num_hidden_layers // 2
    norm = partial(nn.LayerNorm, c.hidden_size, eps=c.layer_norm_eps)
    layers = []
    for i in range(c.num_hidden_layers):
        if i % c.mb_per_layer:
            mixer = DifferentialAttention(c, i, cross=i >= half + 2)
        elif i >= half + 2:
            mixer = GMU(c.hidden_size, c.mamba_expand * c.hidden_size)
        else:
            sizes = {"d_state": c.mamba_d_state, "d_conv": c.mamba_d_conv, "expand": c.mamba_expand}
            # `use_fast_path` is one kernel for what the module otherwise does in steps.
            mixer = Mamba(c.hidden_size, gmu_save=i == half, use_fast_path=False, jamba_norm=False, **sizes)
        mlp = GatedMlp("fc1", "fc2", c.hidden_size, c.intermediate_size)
        layers.append(Block(input_layernorm=norm(), attn=mixer, post_attention_layernorm=norm(), mlp=mlp))
    embed = nn.Embedding(c.vocab_size, c.hidden_size)
    model = Block(model=Block(embed_tokens=embed, layers=nn.ModuleList(layers), final_layernorm=norm()))

    def run(ids):
        x, memory, kv = embed(ids), None, None
        for i, layer in enumerate(layers):
            h = layer.input_layernorm(x)
            if i % c.mb_per_layer:
                y, kv = layer.attn(h, kv if i >= half + 2 else None)
            elif i >= half + 2:
                y = layer.attn(h, memory)
            else:
                y, memory = layer.attn(h)
            x = x + y
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return model.model.final_layernorm(x) @ embed.weight.T

    return Reference(keys, model, run)


def mamba_in_llama(keys: dict) -> Reference:
    """Both config files in `keys`; layers not in attn_layers become the authors' decoder layers."""
    kind = "mamba2" if "ngroups" in keys["ssm_cfg"] else "mamba"
    layer_module = importlib.import_module(f"{kind}.hybrid_model")
    config_class = importlib.import_module(f"{kind}.hybrid_mamba_config").MambaConfig
    mamba_config = config_class(**{k: keys[k] for k in MAMBA_KEYS if k in keys})

    class Layer(layer_module.MambaDecoderLayer):
        def forward(self, hidden_states, **_):
            return super().forward(hidden_states)[0]

    llama = transformers.LlamaConfig(**{k: v for k, v in keys.items() if k not in MAMBA_KEYS or k in SHARED_KEYS})
    model = transformers.AutoModelForCausalLM.from_config(llama, attn_implementation="eager")
    for i in range(llama.num_hidden_layers):
        if i not in keys["attn_layers"]:
            model.model.layers[i] = Layer(mamba_config, i)
    return Reference(keys, model, lambda ids: model(ids, use_cache=False).logits)


# The keys of mamba_config.json; the others are Llama's.
MAMBA_KEYS = (
    "d_model", "ssm_cfg", "d_inner", "d_xb", "intermediate_size", "hidden_act", "n_layer", "attn_layers",
    "rms_norm_eps",
)
# Of these, what config.json has too.
SHARED_KEYS = ("intermediate_size", "hidden_act", "rms_norm_eps")


class LlambaMlp(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def llamba(keys: dict) -> Reference:
    """The authors' mixer in the blocks of a Llama."""
    from modules.mixers.discrete_mamba2 import Mixer

    c = SimpleNamespace(**keys)
    layers = []
    for i in range(c.n_layer):
        layers.append(
            Block(
                # The blocks' norms have this epsilon whatever norm_epsilon says.
                input_layernorm=LlamaRMSNorm(c.d_model, eps=1e-5),
                mixer=Mixer(c.d_model, layer_idx=i, **c.ssm_cfg),
                post_attention_layernorm=LlamaRMSNorm(c.d_model, eps=1e-5),
                mlp=LlambaMlp(c.d_model, c.mlp_cfg["intermediate_size"]),
            )
        )
    embed, norm = nn.Embedding(c.vocab_size, c.d_model), LlamaRMSNorm(c.d_model, eps=c.norm_epsilon)
    model = Block(backbone=Block(embedding=embed, layers=nn.ModuleList(layers), final_layernorm=norm))
    if not c.tie_embeddings:
        model.lm_head = nn.Linear(c.d_model, c.vocab_size, bias=False)

    def run(ids):
        x = embed(ids)
        for layer in layers:
            x = x + layer.mixer(layer.input_layernorm(x))["hidden_states"]
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return norm(x) @ (embed.weight if c.tie_embeddings else model.lm_head.weight).T

    return Reference(keys, model, run)


def apriel_h1(keys: dict) -> Reference:
    package = "fast_llm_external_models.apriel_hybrid_ssm"
    configuration = importlib.import_module(f"{package}.configuration_apriel_hybrid_ssm")
    modeling = importlib.import_module(f"{package}.modeling_apriel_hybrid_ssm")
    modeling.AprielHybridSSMForCausalLM._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    config = configuration.AprielHybridSSMConfig(**json.loads(json.dumps(keys)))
    config._attn_implementation = "eager"
    model = modeling.AprielHybridSSMForCausalLM(config)
    # Without a cache there is none to get states from.
    for layer in model.model.layers:
        if hasattr(layer, "mixer"):
            layer.mixer._get_states_from_cache = lambda *_: (None, None)
    return Reference(keys, model, lambda ids: model(ids, use_cache=False).logits)


def hybrid_qwen3(keys: dict) -> Reference:
    # The class keeps the pattern as `layer_types`, which transformers allows its own words only.
    transformers.configuration_utils.ALLOWED_ATTN_LAYER_TYPES += ("*", "M2")
    zoo = "hmf.model.hybrid_zoo.models.hybrid_qwen3"
    configuration = importlib.import_module(f"{zoo}.configuration_hybrid_qwen3")
    modeling = importlib.import_module(f"{zoo}.modeling_hybrid_qwen3")
    # transformers 5.23 no longer takes this argument.
    causal = modeling.create_causal_mask
    modeling.create_causal_mask = lambda cache_position=None, **keys: causal(**keys)
    config = configuration.HybridQwen3Config(**json.loads(json.dumps(keys)), torch_dtype=torch.float32)
    config._attn_implementation = "eager"
    model = modeling.HybridQwen3ForCausalLM(config)
    return Reference(keys, model, lambda ids: model(ids, use_cache=False).logits)


def hymba(keys: dict) -> Reference:
    """The modelling file that the weights are published with."""
    # Names that transformers no longer has.
    transformers.pytorch_utils.is_torch_greater_or_equal_than_1_13 = True
    transformers.utils.import_utils.is_torch_fx_available = lambda: False
    configuration = types.ModuleType("hymba.configuration_hymba")
    configuration.HymbaConfig = type("HymbaConfig", (transformers.PretrainedConfig,), {"model_type": "hymba"})
    sys.modules["hymba.configuration_hymba"] = configuration
    modeling = importlib.import_module("hymba.modeling_hymba")
    flex = torch.nn.attention.flex_attention
    create = flex.create_block_mask
    flex.create_block_mask = lambda *args, _compile=False, **rest: create(*args, device="cpu", **rest)

    def init_rope(self):
        c = self.config
        self.rotary_emb = modeling.LlamaRotaryEmbedding(c, self.kq_head_dim, base=self.rope_theta, device="cpu")

    def implementation(self, asked, *_, **__):
        return asked

    modeling.HymbaPreTrainedModel._check_and_adjust_attn_implementation = implementation
    modeling.HymbaAttention._init_rope = init_rope
    modeling.HymbaBlock.mixer_forward = modeling.HymbaBlock.cuda_kernels_forward
    modeling.HymbaForCausalLM._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    config = configuration.HymbaConfig(**json.loads(json.dumps(keys)))
    # Otherwise the attention asks a projection that it does not have for the type to cast to.
    config._pre_quantization_dtype = torch.float32
    config.attn_implementation = keys["attn_implementation"]
    model = modeling.HymbaForCausalLM(config)
    flex.create_block_mask = create
    model.tie_weights()
    for layer in model.model.layers:
        # Masks are made for each length; torch no longer takes a longer one.
        layer.mamba.self_attn.block_mask = SimpleNamespace(shape=(0, 0))
    return Reference(keys, model, lambda ids: model(ids, use_cache=False, return_dict=True).logits)


FAMILIES = {
    "plamo2": plamo2,
    "phi4flash": phi4flash,
    "mamba-in-llama": mamba_in_llama,
    "llamba": llamba,
    "apriel-h1": apriel_h1,
    "hybrid-qwen3": hybrid_qwen3,
    "hymba": hymba,
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
        drop_keys=("mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_dt_rank", "mamba_conv_bias", "mamba_proj_bias"),
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
                "d_inner": 48, "d_state": 8, "d_xb": 16, "dt_rank": "auto", "expand": 1, "n_qk_heads": 4, "n_v_heads": 4,
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
            "ssm_cfg": {"d_inner": 36, "d_state": 6, "d_xb": 12, "dt_rank": 3, "repeat_kv_before_conv": False, "d_conv": 3},
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
            "tie_word_embeddings": True, "use_cache": False, "output_router_logits": False, "router_aux_loss_coef": 0.001,
            "use_mamba_kernels": True, "pad_token_id": 0, "eos_token_id": 2,
        },
        torch.bfloat16, seed=561, tokens=47,
        wrong_keys=(("sliding_window", 7), ("rope_type", "default")),
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
    prompt, tokens, margin, _ = base.draw_greedy(reference, rng, std)
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
    global forget_at
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
    forget_at = token_ids.shape[1] // 3
    lost = (base.forward(reference, token_ids) - golden["logits"])[:, late:].abs().max() / golden["logits"].std()
    forget_at = None
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
    pretend_gpu(args.source)
    for name in args.names or VARIANTS:
        variant, folder = VARIANTS[name], args.out / name
        if not args.check:
            shutil.rmtree(folder, ignore_errors=True)
            write_model(variant, folder)
            write_golden(variant, folder)
        check(variant, folder)


if __name__ == "__main__":
    main()
