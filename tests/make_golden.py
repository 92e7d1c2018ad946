"""Writes tests/golden: tiny random models, and what the reference computes for them.

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
import json
import math
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM, BambaConfig, FalconH1Config, FalconMambaConfig, GraniteMoeHybridConfig, JambaConfig,
    Mamba2Config, MambaConfig, NemotronHConfig, Zamba2Config, ZambaConfig,
)

# A variant's folder, weights and logits together, in bytes.
FOLDER_LIMIT = 500_000
# What a runtime may differ by, in units of the standard deviation of the logits. A change counts as
# visible when it moves some logit ten times as far.
TOLERANCE = 1e-3
VISIBLE = 10 * TOLERANCE
# Each greedy step: the best logit leads the second by this many standard deviations.
GREEDY_MARGIN = 0.03
# Each routed token: what decides leads by this much, be it router logits or sigmoids of them.
ROUTER_MARGIN = 0.01
GREEDY_STEPS = 32
# Fewer different tokens than this in a greedy continuation would be a loop, which proves little.
GREEDY_DISTINCT = 10
# The default experts (grouped matmul) refuse rows that are not a multiple of 16 bytes.
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}


@dataclass
class Variant:
    config: transformers.PreTrainedConfig
    dtype: torch.dtype
    seed: int
    sequences: int
    tokens: int
    shard_size: str = "50GB"
    # As the reference names tensors in memory: the experts of a layer in two tensors.
    fused_experts: bool = False
    # Keys to write over, or out of, the config.json that save_pretrained writes.
    set_keys: dict = field(default_factory=dict)
    drop_keys: tuple = ()
    # Standard deviations. Small ones make the epsilon of the norm that follows visible.
    embedding_std: float | None = None
    x_proj_std: float = 2.0
    # Config values a runtime could wrongly assume; each has to be visible. A dict is several at once.
    wrong_keys: tuple = ()
    # Each routed token: the last chosen expert leads the first refused one by this much.
    router_margin: float = ROUTER_MARGIN
    # The reference bounds dt from below by time_step_min, in prompts only, and the trained models do not:
    # here it is free.
    free_dt: bool = False
    # Tensors to add that a runtime has to leave alone: names and shapes.
    extra_tensors: dict = field(default_factory=dict)


# The keys of Jamba v0.1's published file that its architecture does not read, and of its 4.x writer.
JAMBA_DEAD_KEYS = {
    "attn_implementation": "eager",
    "auto_map": {
        "AutoConfig": "configuration_jamba.JambaConfig",
        "AutoModelForCausalLM": "modeling_jamba.JambaForCausalLM",
    },
    "calc_logits_for_entire_prompt": False,
    "mamba_inner_layernorms": True,
    "n_ctx": 262144,
    "num_logits_to_keep": 1,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_mamba_kernels": True,
}

# The keys that the published state-spaces `-hf` files carry beside those that are read.
MAMBA_DEAD_KEYS = {
    "d_inner": 80,
    "d_model": 40,
    "fused_add_norm": True,
    "n_layer": 4,
    "pad_vocab_size_multiple": 8,
    "rms_norm": True,
    "ssm_cfg": {},
    "time_step_init_scheme": "random",
    "torch_dtype": "float32",
    "transformers_version": "4.39.0.dev0",
}

# Keys that the published Nemotron-H files carry, and that say nothing of what is computed.
NEMOTRON_DEAD_KEYS = {
    "mamba_ssm_cache_dtype": "float32",
    "num_logits_to_keep": 1,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_mamba_kernels": True,
}

VARIANTS = {
    "jamba/moe-shards": Variant(
        JambaConfig(
            vocab_size=120, hidden_size=32, intermediate_size=40, num_hidden_layers=5,
            num_attention_heads=4, num_key_value_heads=2, attn_layer_period=4, attn_layer_offset=2,
            expert_layer_period=2, expert_layer_offset=1, num_experts=4, num_experts_per_tok=2,
            mamba_d_state=8, mamba_d_conv=4, mamba_expand=2, mamba_dt_rank=4, tie_word_embeddings=False,
        ),
        torch.float32, seed=101, sequences=2, tokens=47, shard_size="110KB",
    ),
    "jamba/dense-tied-bf16": Variant(
        JambaConfig(
            vocab_size=150, hidden_size=40, intermediate_size=96, num_hidden_layers=6,
            num_attention_heads=5, num_key_value_heads=1, attn_layer_period=5, attn_layer_offset=3,
            expert_layer_period=2, expert_layer_offset=1, num_experts=1, num_experts_per_tok=1,
            mamba_d_state=16, mamba_dt_rank="auto", tie_word_embeddings=True, eos_token_id=[2, 51],
        ),
        torch.bfloat16, seed=102, sequences=2, tokens=53, set_keys={"mamba_dt_rank": "auto"},
    ),
    "jamba/odd": Variant(
        JambaConfig(
            vocab_size=97, hidden_size=35, intermediate_size=77, num_hidden_layers=7,
            num_attention_heads=5, num_key_value_heads=1, attn_layer_period=3, attn_layer_offset=1,
            expert_layer_period=3, expert_layer_offset=1, num_experts=5, num_experts_per_tok=3,
            mamba_d_state=5, mamba_d_conv=3, mamba_expand=3, mamba_dt_rank=7, mamba_conv_bias=False,
            mamba_proj_bias=True, rms_norm_eps=1e-5, tie_word_embeddings=False,
        ),
        torch.float16, seed=103, sequences=2, tokens=41, x_proj_std=0.02,
        wrong_keys=({"rms_norm_eps": 1e-6},),
    ),
    "jamba/fused-experts": Variant(
        JambaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=24, num_hidden_layers=6,
            num_attention_heads=4, num_key_value_heads=2, attn_layer_period=4, attn_layer_offset=2,
            expert_layer_period=2, expert_layer_offset=0, num_experts=4, num_experts_per_tok=2,
            mamba_d_state=16, mamba_d_conv=4, mamba_expand=2, mamba_dt_rank="auto", tie_word_embeddings=True,
        ),
        torch.bfloat16, seed=104, sequences=3, tokens=45, fused_experts=True,
    ),
    "jamba/published-config": Variant(
        JambaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=16, num_hidden_layers=8,
            num_attention_heads=8, tie_word_embeddings=False,
        ),
        torch.bfloat16, seed=105, sequences=2, tokens=43, set_keys=JAMBA_DEAD_KEYS,
        drop_keys=(
            "attention_dropout", "attn_layer_offset", "attn_layer_period", "bos_token_id", "dtype",
            "expert_layer_offset", "expert_layer_period", "hidden_act", "initializer_range",
            "mamba_conv_bias", "mamba_d_conv", "mamba_d_state", "mamba_dt_rank", "mamba_expand",
            "mamba_proj_bias", "max_position_embeddings", "num_experts", "num_experts_per_tok",
            "num_key_value_heads", "output_router_logits", "pad_token_id", "rms_norm_eps",
            "router_aux_loss_coef", "tie_word_embeddings", "use_associative_scan", "use_cache", "use_mambapy",
        ),
    ),
    "mamba/tied": Variant(
        MambaConfig(
            vocab_size=131, hidden_size=40, state_size=16, num_hidden_layers=4, expand=2, conv_kernel=4,
            use_bias=False, use_conv_bias=True, time_step_rank="auto", tie_word_embeddings=True,
        ),
        torch.float32, seed=201, sequences=3, tokens=57, set_keys=MAMBA_DEAD_KEYS,
        drop_keys=("dtype", "tie_word_embeddings", "use_associative_scan", "use_mambapy"),
    ),
    "mamba/untied-bias": Variant(
        MambaConfig(
            vocab_size=113, hidden_size=44, state_size=7, num_hidden_layers=5, expand=3, conv_kernel=5,
            use_bias=True, use_conv_bias=False, time_step_rank=3, tie_word_embeddings=False,
        ),
        torch.bfloat16, seed=202, sequences=2, tokens=61, drop_keys=("intermediate_size",),
        embedding_std=0.01, wrong_keys=({"layer_norm_epsilon": 1e-6},),
    ),
    "falcon-mamba/wide-expand": Variant(
        FalconMambaConfig(
            vocab_size=127, hidden_size=32, intermediate_size=64, expand=16, state_size=16,
            num_hidden_layers=6, conv_kernel=4, use_bias=False, use_conv_bias=True, time_step_rank=4,
            bos_token_id=0, eos_token_id=11, pad_token_id=11, tie_word_embeddings=False,
        ),
        torch.bfloat16, seed=301, sequences=2, tokens=49, drop_keys=("mixer_rms_eps",), x_proj_std=0.02,
        wrong_keys=({"mixer_rms_eps": 1e-5},),
    ),
    "falcon-mamba/eps": Variant(
        FalconMambaConfig(
            vocab_size=109, hidden_size=36, state_size=8, num_hidden_layers=4, expand=2, conv_kernel=4,
            use_bias=False, use_conv_bias=True, time_step_rank="auto", layer_norm_epsilon=1e-6,
            mixer_rms_eps=1e-5, bos_token_id=0, eos_token_id=11, pad_token_id=0, tie_word_embeddings=True,
        ),
        torch.float32, seed=302, sequences=2, tokens=67, set_keys={"time_step_rank": "auto"}, x_proj_std=0.02,
        wrong_keys=({"mixer_rms_eps": 1e-6},),
    ),
    "mamba2/tied": Variant(
        Mamba2Config(
            vocab_size=131, hidden_size=40, state_size=16, num_hidden_layers=4, expand=2, num_heads=10,
            head_dim=8, n_groups=1, conv_kernel=4, use_conv_bias=True, use_bias=False, chunk_size=16,
            tie_word_embeddings=True,
        ),
        torch.float32, seed=401, sequences=2, tokens=57, drop_keys=("dtype", "time_step_limit"),
        set_keys={"rms_norm": True, "torch_dtype": "float32", "transformers_version": "4.43.0.dev0"},
    ),
    "mamba2/groups-infinity": Variant(
        Mamba2Config(
            vocab_size=113, hidden_size=33, state_size=7, num_hidden_layers=5, expand=3, num_heads=9, head_dim=11,
            n_groups=3, conv_kernel=3, use_conv_bias=False, use_bias=True, chunk_size=8, layer_norm_epsilon=1e-4,
            tie_word_embeddings=False,
        ),
        torch.bfloat16, seed=402, sequences=2, tokens=53, embedding_std=0.02,
        set_keys={"norm_before_gate": True, "rms_norm": True, "time_step_limit": [0.0, math.inf]},
        wrong_keys=({"layer_norm_epsilon": 1e-5},),
    ),
    "mamba2/dt-limits-shards": Variant(
        Mamba2Config(
            vocab_size=120, hidden_size=48, state_size=12, num_hidden_layers=4, expand=2, num_heads=6, head_dim=16,
            n_groups=2, conv_kernel=4, chunk_size=16, time_step_limit=(0.03, 0.2), tie_word_embeddings=False,
        ),
        torch.float16, seed=403, sequences=2, tokens=45, shard_size="50KB",
        wrong_keys=({"time_step_limit": (0.0, math.inf)},),
    ),
    "granite-moe-hybrid/dense-nope": Variant(
        GraniteMoeHybridConfig(
            vocab_size=125, hidden_size=40, num_hidden_layers=5, num_attention_heads=5, num_key_value_heads=1,
            layer_types=["mamba", "mamba", "attention", "mamba", "attention"], position_embedding_type="nope",
            num_local_experts=0, num_experts_per_tok=0, intermediate_size=56, shared_intermediate_size=72,
            mamba_n_heads=10, mamba_d_head="auto", mamba_n_groups=1, mamba_d_state=12, mamba_chunk_size=16,
            embedding_multiplier=1.3, attention_multiplier=0.17, residual_multiplier=0.61, logits_scaling=0.83,
            rms_norm_eps=1e-5, tie_word_embeddings=True,
        ),
        torch.float16, seed=501, sequences=2, tokens=49,
        set_keys={
            "layer_types": ["mamba", "mamba", "attention", "mamba", "attention"], "model_type": "granite",
            "mamba_d_head": "auto", "rope_theta": 10000, "rope_scaling": None, "torch_dtype": "float16",
            "normalization_function": "rmsnorm", "init_method": "mup", "router_aux_loss_coef": 0.01,
        },
        drop_keys=("dtype", "rope_parameters", "time_step_limit"),
        wrong_keys=(
            {"position_embedding_type": "rope"}, {"embedding_multiplier": 1.0}, {"attention_multiplier": 8**-0.5},
            {"residual_multiplier": 1.0}, {"logits_scaling": 1.0},
        ),
    ),
    "granite-moe-hybrid/moe-rope-shards": Variant(
        GraniteMoeHybridConfig(
            vocab_size=110, hidden_size=36, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2,
            layer_types=["mamba", "attention", "mamba", "mamba"], position_embedding_type="rope",
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            num_local_experts=6, num_experts_per_tok=3, intermediate_size=20, shared_intermediate_size=28,
            mamba_n_heads=6, mamba_d_head=12, mamba_n_groups=3, mamba_d_state=9, mamba_d_conv=3, mamba_chunk_size=8,
            mamba_conv_bias=False, mamba_proj_bias=True, attention_bias=True,
            embedding_multiplier=7.3, attention_multiplier=0.29, residual_multiplier=0.37, logits_scaling=3.1,
            rms_norm_eps=1e-5, tie_word_embeddings=False,
        ),
        torch.float32, seed=502, sequences=2, tokens=43, shard_size="150KB",
        wrong_keys=(
            {"position_embedding_type": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            {"embedding_multiplier": 1.0}, {"attention_multiplier": 6**-0.5}, {"residual_multiplier": 1.0},
            {"logits_scaling": 1.0},
        ),
    ),
    "granite-moe-hybrid/attention-only": Variant(
        GraniteMoeHybridConfig(
            vocab_size=115, hidden_size=42, num_hidden_layers=4, num_attention_heads=3, num_key_value_heads=3,
            layer_types=["attention"] * 4, position_embedding_type="rope",
            num_local_experts=0, num_experts_per_tok=0, intermediate_size=11, shared_intermediate_size=60,
            mamba_n_heads=4, mamba_d_state=8, residual_multiplier=0.22, attention_multiplier=0.4,
            rms_norm_eps=1e-4, tie_word_embeddings=True,
        ),
        torch.bfloat16, seed=503, sequences=2, tokens=40, embedding_std=0.2,
        set_keys={"layer_types": ["attention"] * 4, "rope_theta": 700.0},
        drop_keys=("embedding_multiplier", "logits_scaling", "num_key_value_heads", "rope_parameters"),
        wrong_keys=({"rms_norm_eps": 1e-6}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    ),
    "nemotron-h/dense": Variant(
        NemotronHConfig(
            vocab_size=118, hidden_size=40, hybrid_override_pattern="M-M*-MM-*M-", num_attention_heads=4,
            num_key_value_heads=2, head_dim=12, intermediate_size=56, ssm_state_size=8, mamba_num_heads=9,
            mamba_head_dim=8, n_groups=3, conv_kernel=4, expand=2, chunk_size=8, time_step_min=0.05,
            layer_norm_epsilon=1e-4, attention_bias=True, mlp_bias=True, use_bias=True,
        ),
        torch.bfloat16, seed=601, sequences=2, tokens=47, free_dt=True, embedding_std=0.04,
        set_keys=NEMOTRON_DEAD_KEYS | {
            "hybrid_override_pattern": "M-M*-MM-*M-", "num_hidden_layers": 11, "time_step_limit": [0.0, math.inf],
        },
        drop_keys=(
            "dtype", "layers_block_type", "moe_intermediate_size", "moe_latent_size", "moe_shared_expert_overlap",
            "moe_shared_expert_intermediate_size", "mtp_layers_block_type", "n_group", "n_routed_experts",
            "n_shared_experts", "norm_topk_prob", "num_experts_per_tok", "num_nextn_predict_layers",
            "routed_scaling_factor", "topk_group",
        ),
        wrong_keys=({"layer_norm_epsilon": 1e-5}, {"mlp_hidden_act": "silu"}),
    ),
    "nemotron-h/moe-groups-shards": Variant(
        NemotronHConfig(
            vocab_size=112, hidden_size=32, hybrid_override_pattern="MEM*EME", num_attention_heads=4,
            num_key_value_heads=1, head_dim=10, ssm_state_size=8, mamba_num_heads=8, mamba_head_dim=6, n_groups=2,
            chunk_size=16, time_step_min=0.05, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2,
            moe_intermediate_size=20, moe_shared_expert_intermediate_size=36, routed_scaling_factor=2.5,
            num_nextn_predict_layers=1, intermediate_size=1856,
        ),
        torch.float32, seed=602, sequences=2, tokens=41, shard_size="150KB", free_dt=True, router_margin=0.001,
        set_keys={
            "layers_block_type": ["mamba", "moe", "mamba", "attention", "moe", "mamba", "moe"],
            "mtp_layers_block_type": ["attention", "moe"], "torch_dtype": "float32",
        },
        drop_keys=("dtype",),
        extra_tensors={
            "mtp.layers.0.eh_proj.weight": (32, 64),
            "mtp.layers.0.enorm.weight": (32,),
            "mtp.layers.0.norm.weight": (32,),
            "mtp.layers.0.mixer.q_proj.weight": (40, 32),
            "mtp.layers.1.final_layernorm.weight": (32,),
            "mtp.layers.1.mixer.gate.e_score_correction_bias": (8,),
            "mtp.layers.1.mixer.experts.0.up_proj.weight": (20, 32),
        },
        wrong_keys=(
            {"n_group": 1, "topk_group": 1}, {"routed_scaling_factor": 1.0}, {"norm_topk_prob": False},
        ),
    ),
    "nemotron-h/latent-experts": Variant(
        NemotronHConfig(
            vocab_size=108, hidden_size=36, hybrid_override_pattern="MEM*E-ME", num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, ssm_state_size=10, mamba_num_heads=6, mamba_head_dim=10, n_groups=2,
            chunk_size=16, time_step_min=0.05, n_routed_experts=5, num_experts_per_tok=2, moe_latent_size=13,
            moe_intermediate_size=24, moe_shared_expert_intermediate_size=28, routed_scaling_factor=5.0,
            intermediate_size=44, norm_topk_prob=False, use_conv_bias=False,
        ),
        torch.bfloat16, seed=605, sequences=3, tokens=45, free_dt=True, router_margin=0.001,
        set_keys=NEMOTRON_DEAD_KEYS | {
            "hybrid_override_pattern": "MEM*E-ME", "mtp_hybrid_override_pattern": "*E", "num_hidden_layers": 8,
        },
        drop_keys=("dtype", "layers_block_type", "mtp_layers_block_type", "n_group", "topk_group"),
        wrong_keys=({"routed_scaling_factor": 1.0}, {"norm_topk_prob": True}),
    ),
    "bamba/half-rotary-shards": Variant(
        BambaConfig(
            vocab_size=122, hidden_size=32, intermediate_size=44, num_hidden_layers=5, num_attention_heads=4,
            num_key_value_heads=2, attn_layer_indices=[1, 4], mamba_n_heads=8, mamba_n_groups=1, mamba_d_state=10,
            mamba_chunk_size=16, rope_parameters={"rope_type": "default", "rope_theta": 800.0},
            tie_word_embeddings=False,
        ),
        torch.float32, seed=701, sequences=2, tokens=48, shard_size="120KB",
        set_keys={"attn_rotary_emb": 4, "mamba_d_head": "auto", "rope_theta": 800.0, "torch_dtype": "float32"},
        drop_keys=("dtype", "rope_parameters", "time_step_limit"),
        wrong_keys=({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},),
    ),
    "bamba/groups-biases": Variant(
        BambaConfig(
            vocab_size=116, hidden_size=35, intermediate_size=50, num_hidden_layers=6, num_attention_heads=3,
            num_key_value_heads=1, head_dim=12, attn_layer_indices=[0, 3], mamba_n_heads=6, mamba_n_groups=3,
            mamba_d_head=35, mamba_expand=6, mamba_d_state=6, mamba_d_conv=3, mamba_chunk_size=8,
            mamba_conv_bias=False, mamba_proj_bias=True, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-6,
            time_step_limit=(0.02, 0.3), tie_word_embeddings=True,
        ),
        torch.bfloat16, seed=702, sequences=2, tokens=44,
        wrong_keys=(
            {"time_step_limit": (0.0, math.inf)},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 0.5}},
        ),
    ),
    "falcon-h1/norm-groups-shards": Variant(
        FalconH1Config(
            vocab_size=114, hidden_size=32, intermediate_size=44, num_hidden_layers=4, num_attention_heads=3,
            num_key_value_heads=1, head_dim=16, mamba_d_ssm=48, mamba_n_heads=6, mamba_d_head=8, mamba_n_groups=2,
            mamba_d_state=10, mamba_expand=2, mamba_chunk_size=16, mamba_norm_before_gate=False,
            mamba_rms_norm=True, rope_parameters={"rope_type": "default", "rope_theta": 1e11},
            embedding_multiplier=5.656854249492381, lm_head_multiplier=0.0390625, attention_in_multiplier=0.83,
            attention_out_multiplier=0.9375, key_multiplier=0.390625, ssm_in_multiplier=1.25,
            ssm_out_multiplier=0.23570226039551587, ssm_multipliers=[0.35, 0.27, 0.41, 0.53, 0.73],
            mlp_multipliers=[0.8838834764831845, 0.5859375], tie_word_embeddings=False,
        ),
        torch.float32, seed=801, sequences=2, tokens=46, shard_size="130KB",
        set_keys={
            "rope_theta": 100000000000.0, "rope_scaling": None, "mamba_use_mlp": True, "num_logits_to_keep": 1,
            "attn_layer_indices": None, "torch_dtype": "float32",
        },
        drop_keys=("dtype", "rope_parameters", "time_step_limit"),
        wrong_keys=(
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {"embedding_multiplier": 1.0},
            {"lm_head_multiplier": 1.0}, {"attention_in_multiplier": 1.0}, {"attention_out_multiplier": 1.0},
            {"key_multiplier": 1.0}, {"ssm_in_multiplier": 1.0}, {"ssm_out_multiplier": 1.0},
            *({"ssm_multipliers": [1.0 if i == k else m for i, m in enumerate([0.35, 0.27, 0.41, 0.53, 0.73])]}
              for k in range(5)),
            {"mlp_multipliers": [1.0, 0.5859375]}, {"mlp_multipliers": [0.8838834764831845, 1.0]},
        ),
    ),
    "falcon-h1/plain-gate": Variant(
        FalconH1Config(
            vocab_size=106, hidden_size=40, intermediate_size=56, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, mamba_d_ssm=54, mamba_n_heads=6, mamba_d_head="auto", mamba_n_groups=3,
            mamba_d_state=7, mamba_d_conv=3, mamba_chunk_size=8, mamba_rms_norm=False, projectors_bias=True,
            mamba_proj_bias=True, mamba_conv_bias=False, attention_bias=True, mlp_bias=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e11}, key_multiplier=0.57,
            ssm_multipliers=[1.3, 0.9, 0.7, 1.7, 0.6], mlp_multipliers=[1.4, 0.7], tie_word_embeddings=False,
        ),
        torch.bfloat16, seed=802, sequences=2, tokens=50,
        wrong_keys=({"mlp_multipliers": [1.0, 0.7]},),
    ),
    "falcon-h1/norm-first": Variant(
        FalconH1Config(
            vocab_size=110, hidden_size=36, intermediate_size=52, num_hidden_layers=4, num_attention_heads=6,
            num_key_value_heads=3, mamba_d_ssm=40, mamba_n_heads=4, mamba_d_head=10, mamba_n_groups=2,
            mamba_d_state=12, mamba_chunk_size=16, mamba_rms_norm=True, mamba_norm_before_gate=True,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rms_norm_eps=1e-4,
            embedding_multiplier=1.7, lm_head_multiplier=1.3, attention_out_multiplier=0.7, ssm_in_multiplier=0.9,
            tie_word_embeddings=True,
        ),
        torch.float16, seed=803, sequences=2, tokens=45, embedding_std=0.2,
        drop_keys=("mamba_norm_before_gate", "mlp_multipliers", "ssm_multipliers", "attention_in_multiplier"),
        wrong_keys=({"rms_norm_eps": 1e-5}, {"mamba_norm_before_gate": False}),
    ),
    # With an output matrix of its own the reference would not share the transformer blocks either.
    "zamba/shared": Variant(
        ZambaConfig(
            vocab_size=104, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4,
            num_key_value_heads=2, n_mamba_heads=2, attn_layer_period=4, attn_layer_offset=2, mamba_d_state=8,
            tie_word_embeddings=True,
        ),
        torch.float32, seed=901, sequences=2, tokens=47,
        drop_keys=("layers_block_type", "attention_hidden_size", "attention_head_dim", "dtype"),
        set_keys={"mamba_dt_rank": "auto", "torch_dtype": "float32"},
    ),
    "zamba/list-shards": Variant(
        ZambaConfig(
            vocab_size=111, hidden_size=36, intermediate_size=60, num_hidden_layers=6, num_attention_heads=6,
            num_key_value_heads=6, n_mamba_heads=2, mamba_d_state=5, mamba_d_conv=3, mamba_expand=3, mamba_dt_rank=3,
            mamba_proj_bias=True, mamba_conv_bias=False, rms_norm_eps=1e-4,
            layers_block_type=["hybrid", "mamba", "hybrid", "mamba", "mamba", "hybrid"], tie_word_embeddings=True,
        ),
        torch.bfloat16, seed=902, sequences=2, tokens=42, embedding_std=0.2, shard_size="70KB",
        set_keys={"layers_block_type": ["hybrid", "mamba", "hybrid", "mamba", "mamba", "hybrid"]},
        wrong_keys=({"rms_norm_eps": 1e-5},),
    ),
    "zamba2/one-block-adapters": Variant(
        Zamba2Config(
            vocab_size=109, hidden_size=32, intermediate_size=40, num_hidden_layers=6, num_attention_heads=4,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid", "mamba", "hybrid"], n_mamba_heads=8,
            mamba_ngroups=1, mamba_d_state=9, chunk_size=16, num_mem_blocks=1, use_shared_attention_adapter=True,
            adapter_rank=5, use_mem_rope=True, rope_parameters={"rope_type": "default", "rope_theta": 900.0},
            time_step_min=0.05, tie_word_embeddings=True,
        ),
        torch.bfloat16, seed=1001, sequences=2, tokens=46, free_dt=True,
        set_keys={
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba", "hybrid"], "rope_theta": 900.0,
        },
        drop_keys=("rope_parameters",),
        wrong_keys=({"use_mem_rope": False},),
    ),
    "zamba2/two-blocks-shards": Variant(
        Zamba2Config(
            vocab_size=107, hidden_size=30, intermediate_size=36, num_hidden_layers=7, num_attention_heads=5,
            layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid"],
            n_mamba_heads=6, mamba_ngroups=2, mamba_d_state=8, mamba_d_conv=3, chunk_size=8, num_mem_blocks=2,
            use_shared_attention_adapter=False, adapter_rank=4, use_mem_rope=False, time_step_min=0.05,
            rms_norm_eps=1e-2, tie_word_embeddings=True,
        ),
        torch.bfloat16, seed=1002, sequences=2, tokens=43, shard_size="100KB", free_dt=True, embedding_std=0.2,
        drop_keys=("hybrid_layer_ids", "attention_hidden_size", "attention_head_dim", "kv_channels", "mamba_headdim"),
        wrong_keys=({"rms_norm_eps": 1e-5},),
    ),
    "zamba2/two-blocks-rope": Variant(
        Zamba2Config(
            vocab_size=103, hidden_size=24, num_hidden_layers=7, num_attention_heads=3, num_key_value_heads=3,
            layers_block_type=["hybrid", "mamba", "hybrid", "hybrid", "mamba", "hybrid", "hybrid"], n_mamba_heads=4,
            mamba_ngroups=2, mamba_d_state=8, chunk_size=16, num_mem_blocks=2, use_shared_attention_adapter=True,
            adapter_rank=3, use_mem_rope=True, time_step_min=0.05, tie_word_embeddings=True,
        ),
        torch.float16, seed=1003, sequences=2, tokens=44, free_dt=True,
        wrong_keys=({"use_mem_rope": False},),
    ),
}


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
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, **PLAIN).eval()
    if variant.free_dt and not clamped:
        free_dt(model)
    return model


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
        gaps.append(router_gap(router, output[0], top_k))

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
