"""The tiny models of tests/golden that make_golden.py writes: configs in which every number shows."""

import math
from dataclasses import dataclass, field

import torch
import transformers
from transformers import (
    BambaConfig, FalconH1Config, FalconMambaConfig, GraniteMoeHybridConfig, JambaConfig, Mamba2Config,
    MambaConfig, NemotronHConfig, Zamba2Config, ZambaConfig,
)

# Each routed token: what decides leads by this much, be it router logits or sigmoids of them.
ROUTER_MARGIN = 0.01


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
    # Keys of the config that block i has values of its own for.
    block_keys: dict = field(default_factory=dict)
    # Beginnings of tensor names to write in place of others.
    rename: dict = field(default_factory=dict)
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
    # As a file of transformers 4 has it.
    "granite-moe-hybrid/rope-llama3": Variant(
        GraniteMoeHybridConfig(
            vocab_size=108, hidden_size=36, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1,
            layer_types=["attention", "mamba", "attention"], position_embedding_type="rope",
            rope_parameters={
                "rope_type": "llama3", "rope_theta": 60.0, "factor": 5.0, "low_freq_factor": 1.5,
                "high_freq_factor": 3.0, "original_max_position_embeddings": 40,
            },
            num_local_experts=0, num_experts_per_tok=0, intermediate_size=11, shared_intermediate_size=40,
            mamba_n_heads=6, mamba_d_state=8, mamba_chunk_size=8, attention_multiplier=0.35, residual_multiplier=0.5,
            rms_norm_eps=1e-5, tie_word_embeddings=True,
        ),
        torch.float16, seed=504, sequences=2, tokens=46,
        set_keys={
            "rope_theta": 60.0,
            "rope_scaling": {
                "type": "llama3", "factor": 5.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0,
                "original_max_position_embeddings": 40,
            },
        },
        drop_keys=("rope_parameters",),
        wrong_keys=({"rope_parameters": {"rope_type": "default", "rope_theta": 60.0}},),
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
    # The reference has no class for Puzzle, which is Nemotron-H with sizes of each block.
    "nemotron-h/puzzle": Variant(
        NemotronHConfig(
            vocab_size=102, hidden_size=32, hybrid_override_pattern="EM*EME", num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, ssm_state_size=11, mamba_num_heads=6, mamba_head_dim=8, n_groups=3,
            chunk_size=8, time_step_min=0.05, n_routed_experts=5, moe_latent_size=14, num_experts_per_tok=2,
            moe_intermediate_size=18, moe_shared_expert_intermediate_size=26, routed_scaling_factor=3.0,
        ),
        torch.float16, seed=606, sequences=3, tokens=43, free_dt=True, router_margin=0.001,
        block_keys={
            0: {"moe_intermediate_size": 12, "num_experts_per_tok": 1},
            3: {"moe_intermediate_size": 30, "num_experts_per_tok": 3},
            5: {"moe_intermediate_size": 18, "num_experts_per_tok": 2},
        },
        rename={"backbone.": "model."},
        set_keys={
            "architectures": ["NemotronHPuzzleForCausalLM"], "model_type": "nemotron_h_puzzle",
            "block_configs": [
                {"block_type": "moe", "moe_intermediate_size": 12, "num_experts_per_tok": 1},
                {"block_type": "mamba"},
                {"block_type": "attention"},
                {"block_type": "moe", "moe_intermediate_size": 30, "num_experts_per_tok": 3},
                {"block_type": "mamba"},
                {"block_type": "moe", "moe_intermediate_size": 18, "num_experts_per_tok": 2},
            ],
            "layers_block_type": ["moe", "mamba", "attention", "moe", "mamba", "moe"],
        },
        drop_keys=("moe_intermediate_size", "num_experts_per_tok"),
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
    "bamba/rope-yarn": Variant(
        BambaConfig(
            vocab_size=105, hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1, head_dim=24, attn_layer_indices=[0, 2], mamba_n_heads=8, mamba_n_groups=2,
            mamba_d_state=6, mamba_chunk_size=8, tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 90.0, "factor": 6.0, "original_max_position_embeddings": 24,
                "beta_fast": 4.0, "beta_slow": 0.5, "partial_rotary_factor": 0.5,
            },
        ),
        torch.float16, seed=703, sequences=2, tokens=45,
        wrong_keys=(
            {"rope_parameters": {"rope_type": "default", "rope_theta": 90.0, "partial_rotary_factor": 0.5}},
            {"rope_parameters": {
                "rope_type": "yarn", "rope_theta": 90.0, "factor": 6.0, "original_max_position_embeddings": 24,
                "beta_fast": 4.0, "beta_slow": 0.5, "partial_rotary_factor": 0.5, "attention_factor": 1.0,
            }},
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
    "falcon-h1/rope-linear": Variant(
        FalconH1Config(
            vocab_size=102, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, mamba_d_ssm=48, mamba_n_heads=6, mamba_d_head=8, mamba_n_groups=1,
            mamba_d_state=8, mamba_chunk_size=8, key_multiplier=0.6, tie_word_embeddings=True,
            rope_parameters={"rope_type": "linear", "rope_theta": 300.0, "factor": 3.5},
        ),
        torch.float16, seed=804, sequences=2, tokens=44,
        wrong_keys=({"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},),
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
    "zamba2/rope-yarn": Variant(
        Zamba2Config(
            vocab_size=101, hidden_size=24, num_hidden_layers=4, num_attention_heads=3, num_key_value_heads=3,
            layers_block_type=["hybrid", "mamba", "hybrid", "mamba"], n_mamba_heads=4, mamba_d_state=8, chunk_size=8,
            num_mem_blocks=1, use_mem_rope=True, time_step_min=0.05, tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 70.0, "factor": 4.0, "original_max_position_embeddings": 20,
                "beta_fast": 3.0, "beta_slow": 0.4, "attention_factor": 1.3, "truncate": False,
            },
        ),
        torch.float16, seed=1004, sequences=2, tokens=43, free_dt=True,
        wrong_keys=(
            {"rope_parameters": {"rope_type": "default", "rope_theta": 70.0}},
            {"rope_parameters": {
                "rope_type": "yarn", "rope_theta": 70.0, "factor": 4.0, "original_max_position_embeddings": 20,
                "beta_fast": 3.0, "beta_slow": 0.4, "attention_factor": 1.0, "truncate": False,
            }},
        ),
    ),
}
