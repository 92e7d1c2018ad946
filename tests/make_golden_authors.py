"""Writes goldens of models that transformers does not have, from their authors' own code.

    make_golden_authors.py --source DIR [NAME...] [--out tests/golden]    write the named variants, or all
    make_golden_authors.py --source DIR [NAME...] --check                 only compare what is written

DIR holds checkouts of the repositories in SOURCES, each in a folder of its own name. Needs torch, triton,
transformers and einops; runs on one CPU thread. See make_golden.py for what a golden is.

That code wants a GPU for its kernels. Here each kernel is replaced, while the program runs, by the plain
PyTorch function that its own repository has beside it or in its tests. `check_golden` compares the two that
there are of Mamba-3, the recurrence and the form in chunks, and the two of Mamba-2.
"""

import argparse
import contextlib
import copy
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from make_golden import (
    FOLDER_LIMIT, GREEDY_DISTINCT, GREEDY_MARGIN, GREEDY_STEPS, ROUTER_MARGIN, TOLERANCE, VISIBLE, distance,
    sort_header,
)

# Folder, repository and the commit that the goldens were made with.
SOURCES = {
    "mamba": ("https://github.com/state-spaces/mamba", "e9594ce1c732d97440f0332fdc43170a2294dbfa"),
    "flash-linear-attention": (
        "https://github.com/fla-org/flash-linear-attention", "bc3b101dcb713ddc5bd8924b66754eb68b5ccf89",
    ),
    "BlackMamba": ("https://github.com/Zyphra/BlackMamba", "5c8cddddb07890f1b97994ff913452d9626a71a9"),
}


@dataclass
class Variant:
    code: str  # of SOURCES
    config: dict  # config.json
    dtype: torch.dtype
    seed: int
    sequences: int
    tokens: int
    # Whether the file holds a tied output matrix too, as `pytorch_model.bin` does.
    head_twice: bool = False
    # Keys of the config, inner ones after a dot, and values that must not give the same logits.
    wrong_keys: tuple = ()
    # Whether transformers has this very model under other names.
    in_transformers: bool = False
    # Names of TRAPS.
    traps: tuple = ()


MAMBA_SSM = dict(
    d_model=32, n_layer=3, vocab_size=90, rms_norm=True, residual_in_fp32=True, fused_add_norm=True,
    pad_vocab_size_multiple=8,
)
MAMBA3 = MAMBA_SSM | dict(attn_layer_idx=[], attn_cfg={}, pad_vocab_size_multiple=16, tie_embeddings=True)
MAMBA3_FLA = dict(
    architectures=["Mamba3ForCausalLM"], model_type="mamba3", hidden_size=40, num_hidden_layers=4,
    vocab_size=107, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)

VARIANTS = {
    "mamba-ssm/mamba1": Variant(
        # As state-spaces/mamba-130m has it.
        "mamba", MAMBA_SSM | dict(d_model=40, ssm_cfg={}), torch.float32, seed=3001, sequences=2, tokens=57,
        head_twice=True, in_transformers=True,
    ),
    "mamba-ssm/mamba1-odd": Variant(
        "mamba",
        MAMBA_SSM | dict(
            n_layer=4, d_intermediate=100, pad_vocab_size_multiple=1, vocab_size=101, tie_embeddings=False,
            ssm_cfg=dict(layer="Mamba1", d_state=7, d_conv=3, expand=3, dt_rank=5, conv_bias=False, bias=True),
        ),
        torch.bfloat16, seed=3002, sequences=2, tokens=51,
    ),
    "mamba-ssm/bytes": Variant(
        "mamba", MAMBA_SSM | dict(d_model=24, vocab_size=256, rms_norm=False, ssm_cfg={}), torch.float32,
        seed=3003, sequences=2, tokens=45,
    ),
    "mamba-ssm/mamba2": Variant(
        # As state-spaces/mamba2-130m has it.
        "mamba",
        MAMBA_SSM | dict(
            d_model=64, d_intermediate=0, ssm_cfg=dict(layer="Mamba2"), attn_layer_idx=[], attn_cfg={},
            pad_vocab_size_multiple=16, tie_embeddings=True,
        ),
        torch.bfloat16, seed=3004, sequences=2, tokens=55, head_twice=True, in_transformers=True,
    ),
    "mamba-ssm/mamba2-attention": Variant(
        # As state-spaces/mamba2attn-2.7b has it.
        "mamba",
        MAMBA_SSM | dict(
            n_layer=4, d_intermediate=0, ssm_cfg=dict(layer="Mamba2", d_state=16, headdim=16), attn_layer_idx=[1, 3],
            attn_cfg=dict(
                causal=True, d_conv=4, head_dim=12, num_heads=3, out_proj_bias=False, qkv_proj_bias=False,
                rotary_emb_dim=6,
            ),
            pad_vocab_size_multiple=16, tie_embeddings=True,
        ),
        torch.float32, seed=3005, sequences=2, tokens=63,
        wrong_keys=(("attn_cfg.rotary_emb_interleaved", True), ("attn_cfg.rotary_emb_base", 1000.0)),
        traps=("convolution with SiLU", "rotation before the convolution"),
    ),
    "mamba-ssm/mamba2-odd": Variant(
        "mamba",
        MAMBA_SSM | dict(
            n_layer=4, d_intermediate=50, rms_norm=False,
            ssm_cfg=dict(
                layer="Mamba2", d_state=6, headdim=8, ngroups=2, d_conv=3, bias=True, conv_bias=False,
                norm_before_gate=True, dt_limit=[0.01, 0.5],
            ),
            attn_layer_idx=[2], attn_cfg=dict(causal=True, num_heads=4, num_heads_kv=2, softmax_scale=0.5),
            tie_embeddings=False,
        ),
        torch.bfloat16, seed=3006, sequences=2, tokens=47,
        wrong_keys=(
            ("ssm_cfg.norm_before_gate", False), ("ssm_cfg.dt_limit", [0.0, math.inf]),
            ("attn_cfg.softmax_scale", None),
        ),
    ),
    "mamba-ssm/mamba2-bare": Variant(
        "mamba",
        MAMBA_SSM | dict(
            ssm_cfg=dict(layer="Mamba2", d_state=16, headdim=8, rmsnorm=False), attn_layer_idx=[0],
            attn_cfg=dict(causal=True, num_heads=2, rotary_emb_dim=16, rotary_emb_interleaved=True),
        ),
        torch.float32, seed=3007, sequences=2, tokens=47,
        wrong_keys=(("attn_cfg.rotary_emb_interleaved", False),),
    ),
    "black-mamba/experts": Variant(
        "BlackMamba",
        dict(
            num_layers=6, hidden_size=40, state_size=8, vocab_size=96, expansion_factor=2, conv_dimension=4,
            ffn_hidden_size=28, mamba_moe_layers=["r", "8", "r", "4", "r", "8"], add_bias_linear=False, swiglu=True,
            max_sequence_length=2048,
        ),
        torch.bfloat16, seed=3301, sequences=2, tokens=49,
        traps=("gate of SiLU", "gate in the second half"),
    ),
    "mamba3/siso": Variant(
        "mamba",
        MAMBA3 | dict(d_intermediate=72, ssm_cfg=dict(layer="Mamba3", d_state=32, headdim=16, chunk_size=64)),
        torch.bfloat16, seed=3101, sequences=2, tokens=61, head_twice=True,
        traps=("softplus decay", "pairs of halves", "no trapezoid", "rotation before the bias"),
    ),
    "mamba3/mimo": Variant(
        "mamba",
        MAMBA3 | dict(
            d_intermediate=128,
            ssm_cfg=dict(
                layer="Mamba3", d_state=16, headdim=8, is_mimo=True, mimo_rank=4, chunk_size=16,
            ),
        ),
        torch.bfloat16, seed=3102, sequences=2, tokens=53,
        traps=("softplus decay", "pairs of neighbours", "no trapezoid"),
    ),
    "mamba3/mimo-norm": Variant(
        "mamba",
        MAMBA3 | dict(
            d_intermediate=0, tie_embeddings=False, n_layer=4,
            ssm_cfg=dict(
                layer="Mamba3", d_state=12, headdim=16, expand=3, ngroups=2, rope_fraction=1.0, A_floor=0.5,
                is_mimo=True, mimo_rank=3, is_outproj_norm=True, chunk_size=16,
            ),
        ),
        torch.float32, seed=3103, sequences=2, tokens=47,
        wrong_keys=(("ssm_cfg.A_floor", 1e-4),),
        traps=("softplus decay", "pairs of neighbours", "no trapezoid"),
    ),
    "mamba3/siso-norm": Variant(
        "mamba",
        MAMBA3 | dict(
            d_intermediate=0, d_model=36, pad_vocab_size_multiple=1,
            ssm_cfg=dict(
                layer="Mamba3", d_state=10, headdim=12, ngroups=3, is_outproj_norm=True, A_floor=0.4,
            ),
        ),
        torch.float32, seed=3104, sequences=2, tokens=49, wrong_keys=(("ssm_cfg.A_floor", 1e-4),),
        traps=("softplus decay", "no trapezoid"),
    ),
    "mamba3-fla/softplus": Variant(
        "flash-linear-attention",
        MAMBA3_FLA | dict(state_size=16, head_dim=16, use_bias=False, norm_eps=1e-5, tie_word_embeddings=False),
        torch.bfloat16, seed=3201, sequences=2, tokens=59,
        traps=("heavy-tailed decay", "pairs of halves", "no trapezoid"),
    ),
    "mamba3-fla/mimo": Variant(
        "flash-linear-attention",
        MAMBA3_FLA | dict(
            state_size=12, head_dim=20, n_groups=2, use_bias=True, norm_eps=1e-3, rope_fraction=1.0,
            A_floor=0.5, is_mimo=True, mimo_rank=2, is_outproj_norm=True,
        ),
        torch.float32, seed=3202, sequences=2, tokens=51,
        wrong_keys=(("A_floor", 1e-4), ("norm_eps", 1e-5)),
        traps=("heavy-tailed decay", "pairs of neighbours", "no trapezoid"),
    ),
}


# --- the authors' code ---


class Authors:
    """The modules of all repositories, with plain functions in the place of kernels."""

    def __init__(self, source: Path):
        self.source = source
        for name, (url, commit) in SOURCES.items():
            head = subprocess.run(["git", "-C", source / name, "rev-parse", "HEAD"], capture_output=True, text=True)
            if head.stdout.strip() != commit:
                print(f"{source / name} is not {url} at {commit}", file=sys.stderr)
        # Decorators of tests, which are not run.
        sys.modules.setdefault("pytest", mock.MagicMock())
        self.mamba_ssm()
        self.fla()
        self.black_mamba()

    def mamba_ssm(self):
        sys.path.insert(0, str(self.source / "mamba"))
        import mamba_ssm.models.mixer_seq_simple as models
        import mamba_ssm.modules.mamba3 as mamba3
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.ops.triton import layer_norm, layernorm_gated

        self.models, self.mamba3, self.MambaConfig = models, mamba3, MambaConfig
        self.siso = self.test("mamba", "tests/ops/triton/test_mamba3_siso.py")
        self.mimo = self.test("mamba", "tests/ops/tilelang/test_mamba3_mimo.py")

        def normed(norm, x, **_unused):
            return layer_norm.rms_norm_ref(x, norm.weight, None, eps=norm.eps)

        def gated(norm, x, z=None):
            return layernorm_gated.rms_norm_ref(
                x, norm.weight, None, z=z, eps=norm.eps, group_size=norm.group_size,
                norm_before_gate=norm.norm_before_gate,
            )

        from mamba_ssm.modules import mamba2, mamba_simple, mha
        from mamba_ssm.ops import selective_scan_interface
        from mamba_ssm.ops.triton import ssd_combined

        self.mamba2, self.mha, self.ssd = mamba2, mha, ssd_combined
        mamba_simple.selective_scan_fn = selective_scan_interface.selective_scan_ref
        selective_scan_interface.selective_scan_fn = selective_scan_interface.selective_scan_ref
        mamba2.mamba_chunk_scan_combined = lambda *inputs, **keys: ssd_steps(self, *inputs, **keys)
        mha.RotaryEmbedding = Rotary
        layer_norm.RMSNorm.forward = self.normed = normed
        layernorm_gated.RMSNorm.forward = self.gated = gated
        self.scans(mamba3)

    def fla(self):
        import triton

        sys.path.insert(0, str(self.source / "flash-linear-attention"))
        with mock.patch.object(triton, "autotune", lambda *_, **__: lambda f: f):
            with mock.patch.object(triton, "heuristics", lambda *_, **__: lambda f: f):
                from fla.layers import mamba3
                from fla.models.mamba3 import configuration_mamba3, modeling_mamba3
        self.fla_mamba3, self.fla_models = mamba3, modeling_mamba3
        self.FlaConfig = configuration_mamba3.Mamba3Config
        self.scans(mamba3)

        def plain(mixer, hidden_states, **_unused):
            return mixer.cuda_kernels_forward(hidden_states)[0], None, None

        def normed(norm, x, *_unused, **__unused):
            return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)

        mamba3.Mamba3.forward = plain
        mamba3.RMSNormGated.forward = self.gated
        modeling_mamba3.RMSNorm.forward = normed

    def black_mamba(self):
        # Modules with names like `ops` and `utils`, which are to hide nobody else's.
        folder = str(self.source / "BlackMamba")
        conv = types.ModuleType("causal_conv1d")
        conv.causal_conv1d_fn = conv.causal_conv1d_update = None
        sys.path.insert(0, folder)
        with mock.patch.dict(sys.modules, {"causal_conv1d": conv, "causal_conv1d_cuda": conv}):
            import mamba_block
            import mamba_config
            import mamba_model
        sys.path.remove(folder)
        self.black_models, self.BlackConfig = mamba_model, mamba_config.MambaConfig
        mamba_block.RMSNorm.forward = self.normed

    def scans(self, module):
        """Mamba-3's two kernels as recurrences, token by token."""
        module.mamba3_siso_combined = lambda **inputs: siso_steps(self, **inputs)
        module.mamba3_mimo_combined = lambda **inputs: mimo_steps(self, **inputs)

    def test(self, repository, path):
        """A file of tests as a module."""
        spec = importlib.util.spec_from_file_location(Path(path).stem, self.source / repository / path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def build(self, code, config):
        """A model of this config, and its number of tokens."""
        if code == "flash-linear-attention":
            keys = {k: v for k, v in config.items() if k != "architectures"}
            model = self.fla_models.Mamba3ForCausalLM(self.FlaConfig(**keys, fuse_norm=False, use_cache=False))
            return model, config["vocab_size"]
        if code == "BlackMamba":
            keys = {k: v for k, v in config.items() if k not in ("max_sequence_length", "swiglu")}
            keys |= {"bias": config["add_bias_linear"], "gated_linear_unit": config["swiglu"], "device": "cpu"}
            model = self.black_models.MambaModel(self.BlackConfig(**keys), config["max_sequence_length"])
            return model, config["vocab_size"]
        config = copy.deepcopy(config) | {"fused_add_norm": False}
        if config["ssm_cfg"].get("layer") == "Mamba2":
            # The other path is for kernels that do all in one.
            config["ssm_cfg"]["use_mem_eff_path"] = False
        model = self.models.MambaLMHeadModel(self.MambaConfig(**config))
        return model, model.lm_head.out_features


class Rotary(torch.nn.Module):
    """What the attention wants of flash-attn, for whole sequences."""

    def __init__(self, dim, base=10000.0, interleaved=False, **_unused):
        super().__init__()
        self.rates = base ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        self.interleaved = interleaved

    def turn(self, x):  # (S, T, H, D)
        angles = torch.arange(x.shape[1])[:, None, None] * self.rates
        first, rest = x.split([2 * len(self.rates), x.shape[-1] - 2 * len(self.rates)], dim=-1)
        if self.interleaved:
            a, b = first[..., 0::2], first[..., 1::2]
        else:
            a, b = first.chunk(2, dim=-1)
        a, b = a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()
        both = torch.stack([a, b], dim=-1).flatten(-2) if self.interleaved else torch.cat([a, b], dim=-1)
        return torch.cat([both, rest], dim=-1)

    def forward(self, q, kv, **_unused):  # kv: (S, T, 2, H, D)
        return self.turn(q), torch.stack([self.turn(kv[:, :, 0]), kv[:, :, 1]], dim=2)


def ssd_steps(authors, x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_softplus, dt_limit=(0.0, math.inf), **_unused):
    return authors.ssd.ssd_selective_scan(
        x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=tuple(dt_limit)
    )


def ssd_chunks(authors, x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_softplus, dt_limit=(0.0, math.inf), **_unused):
    """In chunks of eleven tokens; the last has fewer, which are filled up with ones that change nothing."""
    dt = F.softplus(dt.float() + dt_bias).clamp(*dt_limit)
    tokens, short = x.shape[1], -x.shape[1] % 11
    padded = [F.pad(t, (0, 0) * (t.dim() - 2) + (0, short)) for t in (x, dt, B, C)]
    x, dt, B, C = padded
    y = authors.ssd.ssd_chunk_scan_combined_ref(x, dt, A, B, C, 11, D=D)[:, :tokens]
    return y if z is None else y * F.silu(z)


class Switches:
    """What `TRAPS` turns on in the scans of Mamba-3."""

    other_pairs = False
    no_trapezoid = False
    bias_last = False


def interleaved(states):
    """Where elements (i, i + N / 2) go that are to be neighbours."""
    return torch.stack([torch.arange(states // 2), torch.arange(states // 2) + states // 2], -1).flatten()


def trapezoid(Trap):
    return Trap + 100.0 if Switches.no_trapezoid else Trap


def siso_steps(authors, Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D, Z, **_unused):
    if Switches.other_pairs:
        order = interleaved(Q.shape[-1])
        Q, K, Q_bias, K_bias = (t[..., order] for t in (Q, K, Q_bias, K_bias))
    if Switches.bias_last:
        Q, K, Q_bias, K_bias = Q + Q_bias.mean(), K + K_bias.mean(), 0 * Q_bias, 0 * K_bias
    return authors.siso.mamba3_siso_step_ref(Q, K, V, ADT, DT, trapezoid(Trap), Q_bias, K_bias, Angles, D, Z)[0]


def mimo_steps(
    authors, Q, K, V, ADT, DT, Trap, Q_bias, K_bias, MIMO_V, MIMO_Z, MIMO_Out, Angles, D, Z,
    fuse_pregate_headwise_rms_norm=False, outproj_norm_weight=None, outproj_norm_eps=1e-5, **_unused,
):
    """The step reference turns neighbours, the kernels (i, i + N / 2): the states are put in that order."""
    if not Switches.other_pairs:
        order = interleaved(Q.shape[-1])
        Q, K, Q_bias, K_bias = (t[..., order] for t in (Q, K, Q_bias, K_bias))
    heads, width = V.shape[2:]
    norm = outproj_norm_weight
    inputs = (Q, K, V, ADT, DT, trapezoid(Trap), Q_bias, K_bias, Angles, MIMO_V)
    if MIMO_Out is not None:
        return authors.mimo.mamba3_MIMO_step_ref(
            *inputs, MIMO_Out, D=D, Z=Z, MIMO_Z=MIMO_Z, fused_norm=fuse_pregate_headwise_rms_norm,
            outproj_norm_weight=None if norm is None else norm.view(heads, width),
            outproj_norm_eps=outproj_norm_eps,
        )[0]
    # Every rank by itself.
    ranks = []
    for r in range(MIMO_V.shape[1]):
        only = torch.zeros_like(MIMO_V)
        only[:, r] = 1.0
        ranks.append(authors.mimo.mamba3_MIMO_step_ref(*inputs, only, D=D)[0])
    return torch.stack(ranks, dim=2)  # (S, T, R, H, P)


def siso_chunks(authors, Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D, Z, **_unused):
    return authors.siso.mamba3_siso_fwd_ref(Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D, Z)[0]


def mimo_chunks(
    authors, Q, K, V, ADT, DT, Trap, Q_bias, K_bias, MIMO_V, MIMO_Z, MIMO_Out, Angles, D, Z,
    rotary_dim_divisor=4, fuse_pregate_headwise_rms_norm=False, outproj_norm_weight=None,
    outproj_norm_eps=1e-5, **_unused,
):
    """The whole sequence as one chunk, in the kernels' own order of states."""
    sums = ADT.cumsum(-1)
    angles = authors.mimo.apply_angle_dt_reference(Angles, DT.transpose(1, 2))
    return authors.mimo.mamba3_MIMO_chunk_ref(
        Q, K, V, Q_bias, K_bias, MIMO_V, MIMO_Out, Z, MIMO_Z, angles, sums, sums[..., -1:] - sums, DT, Trap, D,
        chunk_size=Q.shape[1], rotary_dim_divisor=rotary_dim_divisor, contract_mimo_out=MIMO_Out is not None,
        fused_norm=fuse_pregate_headwise_rms_norm, outproj_norm_weight=outproj_norm_weight,
        outproj_norm_eps=outproj_norm_eps,
    )[0]


@contextlib.contextmanager
def chunked(authors):
    """The scans in their other form."""
    modules = [authors.mamba3, authors.fla_mamba3]
    steps = authors.mamba2.mamba_chunk_scan_combined
    authors.mamba2.mamba_chunk_scan_combined = lambda *inputs, **keys: ssd_chunks(authors, *inputs, **keys)
    for module in modules:
        module.mamba3_siso_combined = lambda **inputs: siso_chunks(authors, **inputs)
        module.mamba3_mimo_combined = lambda **inputs: mimo_chunks(authors, **inputs)
    yield
    authors.mamba2.mamba_chunk_scan_combined = steps
    for module in modules:
        authors.scans(module)


@contextlib.contextmanager
def switched(**values):
    before = {key: getattr(Switches, key) for key in values}
    for key, value in values.items():
        setattr(Switches, key, value)
    yield
    for key, value in before.items():
        setattr(Switches, key, value)


@contextlib.contextmanager
def other_decay(authors, to):
    def compute(mixer, rate):
        return -to(rate.float()).clamp(min=mixer.A_floor)

    with mock.patch.object(authors.mamba3, "heavy_tail_activation", to):
        with mock.patch.object(authors.fla_mamba3.Mamba3, "_compute_a", compute):
            yield


@contextlib.contextmanager
def activated_attention(authors):
    """The convolution of q, k and v followed by SiLU, as that of a Mamba is."""
    conv = torch.nn.Conv1d.forward

    def forward(layer, x):
        y = conv(layer, x)
        return F.silu(y) if layer.in_channels == 108 else y

    with mock.patch.object(torch.nn.Conv1d, "forward", forward):
        yield


@contextlib.contextmanager
def early_rotation(authors):
    """Queries and keys turned first."""
    rotary, project = Rotary.forward, torch.nn.Linear.forward

    def turned(layer, x):
        y = project(layer, x)
        if layer.out_features != 108:
            return y
        q, kv = y.split([36, 72], dim=-1)
        q, kv = q.unflatten(-1, (3, 12)), kv.unflatten(-1, (2, 3, 12))
        q, kv = rotary(Rotary(6), q, kv)
        return torch.cat([q.flatten(-2), kv.flatten(-3)], dim=-1)

    with mock.patch.object(torch.nn.Linear, "forward", turned):
        with mock.patch.object(Rotary, "forward", lambda _, q, kv, **__: (q, kv)):
            yield


@contextlib.contextmanager
def other_gate(authors, gate):
    chunk = torch.chunk
    with mock.patch.object(torch, "chunk", lambda x, n, dim: gate(*chunk(x, n, dim=dim))):
        yield


TRAPS = {
    "convolution with SiLU": activated_attention,
    "rotation before the convolution": early_rotation,
    "gate of SiLU": lambda a: other_gate(a, lambda g, u: (g, F.silu(g) / F.gelu(g) * u)),
    "gate in the second half": lambda a: other_gate(a, lambda g, u: (u, g)),
    "softplus decay": lambda a: other_decay(a, F.softplus),
    "heavy-tailed decay": lambda a: other_decay(a, a.mamba3.heavy_tail_activation),
    "pairs of halves": lambda _: switched(other_pairs=True),
    "pairs of neighbours": lambda _: switched(other_pairs=True),
    "no trapezoid": lambda _: switched(no_trapezoid=True),
    "rotation before the bias": lambda _: switched(bias_last=True),
}


# --- a model ---


def published(name):
    """The name of a tensor in published files, where the authors' code renames it."""
    return name.replace("embedding.weight", "embedding.word_embeddings.weight") if name[0] == "e" else name


def set_key(config, path, value):
    """The config with one key changed."""
    config = copy.deepcopy(config)
    *outer, last = path.split(".")
    place = config
    for key in outer:
        place = place[key]
    place[last] = value
    return config


class Model:
    """An author's model in f32, and what the config says of it."""

    def __init__(self, authors, variant: Variant, config=None):
        torch.manual_seed(0)
        self.config = config or variant.config
        self.net, self.vocab = authors.build(variant.code, self.config)
        self.net = self.net.float().eval()
        self.top_k = 1

    @torch.no_grad()
    def __call__(self, token_ids):
        """(S, T) to (S, T, V)."""
        out = self.net(token_ids)
        return getattr(out, "logits", out)

    def clear(self, token_ids):
        """The logits, and how far the chosen experts are from the refused ones (infinite without any)."""
        gaps = []

        def measure(_module, _inputs, output):
            logits = output.flatten(0, -2).sort(descending=True).values
            gaps.append((logits[:, self.top_k - 1] - logits[:, self.top_k]).min().item())

        hooks = [m.register_forward_hook(measure) for name, m in self.net.named_modules() if name.endswith(".router")]
        logits = self(token_ids)
        for hook in hooks:
            hook.remove()
        return logits, min(gaps, default=math.inf)


def load(authors, variant: Variant, folder: Path, config=None) -> Model:
    """The model that the files hold."""
    model = Model(authors, variant, config or json.loads((folder / "config.json").read_text()))
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= load_file(path)
    own = {published(name): tensor for name, tensor in model.net.state_dict().items()}
    tied = [name for name in own if name not in found]
    assert not set(found) - set(own) and all("lm_head" in n or "output_layer" in n for n in tied), (set(found) ^ set(own))
    for name, tensor in found.items():
        own[name].copy_(tensor)
    return model


def randomise(model: Model, rng: torch.Generator):
    """Draws every parameter anew, so that no part of the model is close to doing nothing."""

    def normal(shape, std, mean=0.0):
        return mean + std * torch.randn(shape, generator=rng)

    def uniform(shape, low, high):
        return low + (high - low) * torch.rand(shape, generator=rng)

    for name, p in model.net.named_parameters():
        last = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if name.endswith("A_log"):  # (I, N) of Mamba-1, (h) of Mamba-2
            start = torch.arange(1, p.shape[-1] + 1) / 2 if p.dim() == 2 else uniform(p.shape, 0.3, 4.0)
            w = torch.log(start) + normal(p.shape, 0.4)
        elif name.endswith(("dt_bias", "dt_proj.bias")):
            # softplus of this runs from 0.002 to 0.5, evenly in the logarithm.
            dt = torch.exp(uniform(p.shape, math.log(0.002), math.log(0.5)))
            w = dt + torch.log(-torch.expm1(-dt))
        elif name.endswith(("B_bias", "C_bias")):
            w = normal(p.shape, 0.7, mean=0.3)
        elif last in ("mimo_x", "mimo_z", "mimo_o"):
            w = normal(p.shape, 0.6, mean=0.4)
        elif name.endswith(".D"):
            w = normal(p.shape, 0.5, mean=0.5)
        elif "norm" in name and name.endswith("weight"):
            w = uniform(p.shape, 0.7, 1.3)
        elif name.endswith(".bias"):
            w = normal(p.shape, 0.3)
        elif "embedding" in name:
            w = normal(p.shape, 2 / math.sqrt(p.shape[1]))
        else:
            gain = {"lm_head": 2.0, "router": 3.0, "x_proj": 2.0, "dt_proj": 0.5}.get(last, 1.0)
            w = normal(p.shape, gain / math.sqrt(p.shape[-1]))
        p.data.copy_(w)


def balance(model: Model, token_ids, branch_std=0.7):
    """Scales the last projection of every branch, so that each adds as much to the residual stream."""

    def scale(module, _inputs, output):
        first = output[0] if isinstance(output, tuple) else output
        factor = branch_std / first.std()
        for name, p in module.named_parameters():
            if any(part in name for part in ("out_proj", "fc2", "linear_fc2")):
                p.data.mul_(factor)
        return (first * factor, *output[1:]) if isinstance(output, tuple) else output * factor

    branches = (".mixer", ".mlp")
    hooks = [m.register_forward_hook(scale) for name, m in model.net.named_modules() if name.endswith(branches)]
    model(token_ids)
    for hook in hooks:
        hook.remove()


def write_model(authors, variant: Variant, folder: Path):
    """The folder as a published checkpoint, its weights in safetensors."""
    rng = torch.Generator().manual_seed(variant.seed)
    model = Model(authors, variant)
    randomise(model, rng)
    balance(model, torch.randint(model.vocab, (4, 64), generator=rng))
    names = {published(name): p for name, p in model.net.named_parameters()}
    if variant.head_twice:
        names["lm_head.weight"] = model.net.lm_head.weight
    tensors = {name: p.data.to(variant.dtype).clone() for name, p in names.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(variant.config, indent=2, sort_keys=True) + "\n")


# --- goldens ---


def draw_sequences(model: Model, variant: Variant, rng):
    """Random tokens without near-ties in the routers; token 0 is always among them."""
    rows = []
    while len(rows) < variant.sequences:
        row = torch.randint(model.vocab, (1, variant.tokens), generator=rng)
        row[0, 5] = 0
        if model.clear(row)[1] > ROUTER_MARGIN:
            rows.append(row)
    return torch.cat(rows)


def draw_greedy(model: Model, rng, logits_std):
    """A prompt whose greedy continuation has no near-tie, does not loop and never ends the text."""
    eos = model.config.get("eos_token_id")
    for _ in range(2000):
        prompt = torch.randint(1, model.vocab, (1, 7), generator=rng)
        ids, smallest, gap = prompt, math.inf, math.inf
        while ids.shape[1] < prompt.shape[1] + GREEDY_STEPS:
            logits, step_gap = model.clear(ids)
            best = logits[0, -1].topk(2)
            smallest = min(smallest, ((best.values[0] - best.values[1]) / logits_std).item())
            gap = min(gap, step_gap)
            if smallest < GREEDY_MARGIN or gap < ROUTER_MARGIN or best.indices[0].item() == eos:
                break
            ids = torch.cat([ids, best.indices[:1, None]], dim=1)
        else:
            tokens = ids[0, prompt.shape[1] :]
            if len(set(tokens.tolist())) >= GREEDY_DISTINCT:
                return prompt[0], tokens, smallest, gap
    raise RuntimeError("no prompt without near-ties found: choose another seed")


def write_golden(authors, variant: Variant, folder: Path):
    model = load(authors, variant, folder)
    rng = torch.Generator().manual_seed(variant.seed + 1000)
    token_ids = draw_sequences(model, variant, rng)
    logits, gap = model.clear(token_ids)
    std = logits.std().item()
    assert 1 <= std <= 4, f"{folder}: logits have a standard deviation of {std}"
    prompt, tokens, margin, greedy_gap = draw_greedy(model, rng, std)
    metadata = {
        "source": " at ".join(SOURCES[variant.code]),
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


@torch.no_grad()
def by_transformers(model: Model, token_ids):
    """The logits of transformers' own Mamba-1 or Mamba-2 with the same weights."""
    config, net = model.config, model.net
    size = dict(
        vocab_size=model.vocab, hidden_size=config["d_model"], num_hidden_layers=config["n_layer"],
        tie_word_embeddings=True,
    )
    if config["ssm_cfg"].get("layer") == "Mamba2":
        size |= dict(num_heads=config["d_model"] * 2 // 64, head_dim=64, state_size=128, n_groups=1, chunk_size=16)
        other = Mamba2ForCausalLM(Mamba2Config(**size)).eval()
    else:
        other = MambaForCausalLM(MambaConfig(**size)).eval()
    state = {name.replace("embedding.", "embeddings."): p for name, p in net.state_dict().items()}
    other.load_state_dict(state)
    return other(input_ids=token_ids, use_cache=False).logits


def check_golden(authors, variant: Variant, folder: Path):
    """What is written is what the reference computes, in both of its forms, and the folder is small."""
    golden = load_file(folder / "golden.safetensors")
    model = load(authors, variant, folder)
    far = distance(model(golden["token_ids"]), golden)
    assert far < TOLERANCE / 10, f"{folder}: logits differ by {far} standard deviations"
    with chunked(authors):
        other = distance(model(golden["token_ids"]), golden)
    assert other < TOLERANCE / 10, f"{folder}: the other form differs by {other} standard deviations"

    if variant.in_transformers:
        theirs = distance(by_transformers(model, golden["token_ids"]), golden)
        assert theirs < TOLERANCE / 10, f"{folder}: transformers differs by {theirs} standard deviations"
        print(f"  transformers {theirs:.1e}")

    prompt = golden["greedy_prompt"]
    ids = torch.cat([prompt, golden["greedy_tokens"]])[None]
    again = model(ids)[0, len(prompt) - 1 : -1].argmax(-1)
    assert torch.equal(again, golden["greedy_tokens"]), f"{folder}: greedy tokens differ"

    size = sum(f.stat().st_size for f in folder.iterdir())
    assert size < FOLDER_LIMIT, f"{folder}: {size} bytes"
    with safe_open(folder / "golden.safetensors", "pt") as f:
        shown = ("logits_std", "seed", "smallest_greedy_margin", "smallest_router_gap")
        facts = ", ".join(f"{k} {v}" for k, v in sorted(f.metadata().items()) if k in shown)
    print(f"{folder}: {size} bytes, logits within {far:.1e}, in the other form {other:.1e}; {facts}")


def check_traps(authors, variant: Variant, folder: Path):
    """Every tensor, the state's memory and the variant's own traps are visible in the logits."""
    golden = load_file(folder / "golden.safetensors")
    token_ids = golden["token_ids"]
    model = load(authors, variant, folder)
    tensors, traps = {}, {}
    for name, p in model.net.named_parameters():
        kept = p.data.clone()
        p.data.copy_(p.data.flatten().roll(1).view_as(p.data))
        tensors[name] = distance(model(token_ids), golden)
        p.data.copy_(kept)

    # The state is lost once; only the last quarter counts, and the memory has to reach that far.
    cut, late = token_ids.shape[1] // 3, token_ids.shape[1] * 3 // 4
    lost = (model(token_ids[:, cut:])[:, late - cut :] - golden["logits"][:, late:]).abs().max()
    traps["state lost"] = (lost / golden["logits"].std()).item()
    for name in variant.traps:
        with TRAPS[name](authors):
            traps[name] = distance(model(token_ids), golden)
    for path, value in variant.wrong_keys:
        wrong = load(authors, variant, folder, set_key(model.config, path, value))
        traps[f"{path} {value}"] = distance(wrong(token_ids), golden)

    for what, far in (tensors | traps).items():
        assert far > VISIBLE, f"{folder}: {what} moves the logits by only {far:.1e} standard deviations"
    weakest = min(tensors, key=tensors.get)
    print(f"  {len(tensors)} tensors visible, weakest {weakest} {tensors[weakest]:.2g}")
    print("  " + ", ".join(f"{what} {far:.2g}" for what, far in traps.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--source", type=Path, required=True, help="folder of the checkouts")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "golden")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    for unknown in set(args.names) - set(VARIANTS):
        parser.error(f"no variant {unknown}")

    torch.set_num_threads(1)
    authors = Authors(args.source)
    for name in args.names or VARIANTS:
        variant, folder = VARIANTS[name], args.out / name
        if not args.check:
            shutil.rmtree(folder, ignore_errors=True)
            write_model(authors, variant, folder)
            write_golden(authors, variant, folder)
        check_golden(authors, variant, folder)
        check_traps(authors, variant, folder)


if __name__ == "__main__":
    main()
