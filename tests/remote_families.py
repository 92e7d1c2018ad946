"""The families of make_golden_remote.py: from a config to a module whose tensors have their published names.

Import after `pretend_gpu`: the authors' modules are imported when a family is built.
"""

import importlib
import json
import sys
import types
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from remote_kernels import RMSNorm, attention, causal_conv1d_fn, mamba_chunk_scan_combined, rms


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


def rene(keys: dict) -> Reference:
    from cartesia_pytorch.rene import MixerModel

    sizes = ("d_model", "n_layer", "ssm_cfg", "attn_layer_idx", "attn_cfg", "mlp_layer_idx", "mlp_cfg", "rms_norm")
    backbone = MixerModel(vocab_size=keys["vocab_size"], **{k: keys[k] for k in sizes})
    for layer in backbone.layers:
        # One kernel for what the module otherwise does in steps.
        layer.mixer.use_mem_eff_path = False
    return Reference(keys, Block(backbone=backbone), lambda ids: backbone(ids) @ backbone.embedding.weight.T)


FAMILIES = {
    "plamo2": plamo2,
    "phi4flash": phi4flash,
    "mamba-in-llama": mamba_in_llama,
    "llamba": llamba,
    "apriel-h1": apriel_h1,
    "hybrid-qwen3": hybrid_qwen3,
    "hymba": hymba,
    "rene": rene,
}
