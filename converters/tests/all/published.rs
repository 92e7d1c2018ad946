//! Published models by their configs alone: the weights that the cards ask for add up to the sizes that
//! the models are said to have.

use strata_converters::{Config, cards};
use strata_layers::Graph;

/// Elements of all weights.
fn parameters(text: &str) -> usize {
    let config = Config::parse(text, "config.json").unwrap();
    let card = cards::find(&config).unwrap();
    let plan = card.plan(&config, "m").unwrap_or_else(|f| panic!("{f}"));
    let graph = Graph::lower(&plan, card.file()).unwrap();
    let bound = card.bound(&config).unwrap();
    let named = |path: &str| !bound.tensors().find(path).sources.is_empty();
    let weights = graph.weights();
    if let Some(nameless) = weights.iter().find(|w| !named(&w.path)) {
        panic!("{} has no name for {}", card.file(), nameless.path);
    }
    weights.iter().map(|w| w.spec.elements()).sum()
}

#[track_caller]
fn check(billions: &str, text: &str) {
    let digits = billions.split('.').nth(1).map_or(0, str::len);
    let found = parameters(text) as f64 / 1e9;
    assert_eq!(format!("{found:.digits$}"), billions, "{text}");
}

#[test]
fn nemotron_h_and_nemotron_3() {
    let sizes = |text: &str| {
        format!(
            r#"{{"architectures": ["NemotronHForCausalLM"], "vocab_size": 131072, "head_dim": 128,
            "n_groups": 8, "conv_kernel": 4, "time_step_limit": [0.0, Infinity], {text}}}"#
        )
    };
    let old = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-";
    check(
        "4.49",
        &sizes(&format!(
            r#""hybrid_override_pattern": "{old}", "hidden_size": 3072, "mamba_num_heads": 112,
            "mamba_head_dim": 64, "num_attention_heads": 32, "intermediate_size": 12288"#
        )),
    );
    check(
        "8.10",
        &sizes(&format!(
            r#""hybrid_override_pattern": "{old}", "hidden_size": 4096, "intermediate_size": 21504"#
        )),
    );
    check(
        "8.89",
        &sizes(
            r#""hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
            "hidden_size": 4480, "mamba_head_dim": 80, "num_attention_heads": 40,
            "intermediate_size": 15680"#,
        ),
    );
    check(
        "31.58",
        &sizes(
            r#""hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            "hidden_size": 2688, "mamba_num_heads": 64, "num_key_value_heads": 2,
            "n_routed_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712, "routed_scaling_factor": 2.5"#,
        ),
    );
    check(
        "120.67",
        &sizes(
            r#""hybrid_override_pattern":
            "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
            "hidden_size": 4096, "num_key_value_heads": 2, "n_routed_experts": 512,
            "num_experts_per_tok": 22, "moe_intermediate_size": 2688, "moe_latent_size": 1024,
            "moe_shared_expert_intermediate_size": 5376, "routed_scaling_factor": 5.0"#,
        ),
    );
}

#[test]
fn every_block_of_puzzle_has_its_own_sizes() {
    let text = r#"{"model_type": "nemotron_h_puzzle", "hidden_size": 64, "vocab_size": 8, "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 24, "moe_latent_size": 16, "mamba_num_heads": 8,
        "ssm_state_size": 96, "layers_block_type": ["moe", "mamba", "moe"], "block_configs": [
        {"block_type": "moe", "moe_intermediate_size": 32, "num_experts_per_tok": 1},
        {"block_type": "mamba"},
        {"block_type": "moe", "moe_intermediate_size": 48, "num_experts_per_tok": 3}]}"#;
    parameters(text);
    let config = Config::parse(text, "config.json").unwrap();
    let plan = cards::find(&config).unwrap().plan(&config, "m").unwrap();
    let printed = plan.print();
    for expected in ["top_k: 1", "d_ff: 32", "top_k: 3", "d_ff: 48", "moe.2"] {
        assert!(printed.contains(expected), "{expected}: {printed}");
    }
}

#[test]
fn granite_4_hybrids() {
    let attention = |i: usize| {
        if i % 10 == 5 {
            "\"attention\""
        } else {
            "\"mamba\""
        }
    };
    let types: Vec<&str> = (0..40).map(attention).collect();
    let sizes = |text: &str| {
        format!(
            r#"{{"architectures": ["GraniteMoeHybridForCausalLM"], "vocab_size": 100352,
            "num_hidden_layers": 40, "layer_types": [{}], "mamba_d_state": 128,
            "position_embedding_type": "nope", "tie_word_embeddings": true, {text}}}"#,
            types.join(", ")
        )
    };
    check(
        "6.94",
        &sizes(
            r#""hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 4,
            "mamba_n_heads": 48, "num_local_experts": 64, "num_experts_per_tok": 6,
            "intermediate_size": 512, "shared_intermediate_size": 1024"#,
        ),
    );
    check(
        "32.2",
        &sizes(
            r#""hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
            "mamba_n_heads": 128, "num_local_experts": 72, "num_experts_per_tok": 10,
            "intermediate_size": 768, "shared_intermediate_size": 1536"#,
        ),
    );
}

#[test]
fn others_of_mamba_2() {
    check(
        "7.3",
        r#"{"model_type": "mamba2", "norm_before_gate": true, "time_step_limit": [0.0, Infinity]}"#,
    );
    check(
        "2.7",
        r#"{"model_type": "mamba2", "hidden_size": 2560, "num_heads": 80, "n_groups": 1,
        "vocab_size": 50288, "tie_word_embeddings": true, "time_step_limit": [0.0, "Infinity"]}"#,
    );
    check(
        "9.8",
        r#"{"model_type": "bamba", "vocab_size": 128256, "mamba_d_state": 128, "attn_rotary_emb": 64,
        "attn_layer_indices": [9, 18, 27]}"#,
    );
    check(
        "0.52",
        r#"{"model_type": "falcon_h1", "vocab_size": 32784, "hidden_size": 1024,
        "num_hidden_layers": 36, "intermediate_size": 2048, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "mamba_d_ssm": 1536, "mamba_n_heads": 24,
        "mamba_d_head": 64, "mamba_d_state": 128, "rope_theta": 100000000000.0}"#,
    );
}

#[test]
fn zambas() {
    check("7.2", r#"{"model_type": "zamba"}"#);
    let sizes = |layers: usize, hybrids: &[usize], text: &str| {
        let hybrid = |i| {
            if hybrids.contains(&i) {
                "\"g\""
            } else {
                "\"m\""
            }
        };
        let types: Vec<&str> = (0..layers).map(hybrid).collect();
        format!(
            r#"{{"model_type": "zamba2", "num_hidden_layers": {layers},
            "layers_block_type": [{}], {text}}}"#,
            types.join(", ")
        )
    };
    check(
        "1.2",
        &sizes(
            38,
            &[5, 11, 17, 23, 29, 35],
            r#""hidden_size": 2048, "n_mamba_heads": 64, "state_size": 128, "lora_rank": 128,
            "use_shared_attention_adapter": true, "use_mem_rope": true"#,
        ),
    );
    check(
        "2.7",
        &sizes(
            54,
            &[6, 12, 18, 24, 30, 36, 42, 47, 51],
            r#""n_mamba_heads": 80, "num_mem_blocks": 2"#,
        ),
    );
    check(
        "7.4",
        &sizes(
            81,
            &[6, 11, 17, 23, 29, 35, 41, 47, 53, 59, 65, 71, 77],
            r#""hidden_size": 3584, "n_mamba_heads": 112, "mamba_ngroups": 2, "num_mem_blocks": 2,
            "use_mem_rope": true"#,
        ),
    );
}
