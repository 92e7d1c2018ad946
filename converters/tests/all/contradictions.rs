//! Configs that contradict themselves, or lack what their family cannot guess: each is refused with the
//! file, the key, what was found and what was expected.

use strata_converters::{Config, cards};

/// The printed plan of a config, by the card that it asks for; else what is said.
fn plan(text: &str) -> Result<String, String> {
    let config = Config::parse(text, "m/config.json").map_err(|f| f.to_string())?;
    let card = cards::find(&config).map_err(|e| e.to_string())?;
    let plan = card.plan(&config, "m").map_err(|f| f.to_string())?;
    Ok(plan.print())
}

#[test]
fn configs_that_contradict_themselves_are_refused() {
    let rows: &[(&str, &[&str])] = &[
        // The pattern, and the number of layers.
        (
            r#"{"model_type": "nemotron_h", "hybrid_override_pattern": "M*-",
 "num_hidden_layers": 4}"#,
            &[
                "model-cards/nemotron-h.yaml:",
                "this model cannot be run: `=num_hidden_layers is not defined or",
                "layer_list|length == num_hidden_layers` with",
                "num_hidden_layers = 4 (line 2 of config.json)",
            ],
        ),
        (
            r#"{"model_type": "nemotron_h", "hybrid_override_pattern": "M?-"}"#,
            &["\"?\" is no kind of block; there are M, mamba,"],
        ),
        (
            r#"{"model_type": "nemotron_h", "layers_block_type": ["mamba", "window"]}"#,
            &["\"window\" is no kind of block"],
        ),
        (
            r#"{"model_type": "granitemoehybrid", "layer_types": ["mamba"], "num_hidden_layers": 2}"#,
            &[
                "cannot be run: `=layer_list|length == num_hidden_layers`",
                "num_hidden_layers = 2 (line 1 of config.json)",
            ],
        ),
        (
            r#"{"model_type": "zamba2", "layers_block_type": ["mamba", "hybrid", "mamba"], "num_hidden_layers": 4}"#,
            &[
                "cannot be run: `=layers_block_type is none or",
                "num_hidden_layers = 4 (line 1 of config.json)",
            ],
        ),
        (
            r#"{"model_type": "zamba2", "hybrid_layer_ids": [6, 70]}"#,
            &["there is no block 70 among 54: `=hybrids`"],
        ),
        (
            r#"{"model_type": "bamba", "attn_layer_indices": [9, 40]}"#,
            &[
                "there is no block 40 among 32: `=attn_layer_indices or []` with attn_layer_indices = a list (line 1 of config.json)",
            ],
        ),
        // Widths and heads.
        (
            r#"{"model_type": "jamba", "num_attention_heads": 33, "num_key_value_heads": 33}"#,
            &[
                "cannot be run: `=hidden_size % num_attention_heads == 0` with hidden_size = 4096 (by default) and num_attention_heads = 33 (line 1 of config.json)",
            ],
        ),
        (
            r#"{"model_type": "mamba2", "num_heads": 100}"#,
            &[
                "cannot be run: `=num_heads * head_dim == expand * hidden_size` with",
                "num_heads = 100 (line 1 of config.json)",
            ],
        ),
        (
            r#"{"model_type": "bamba", "mamba_n_heads": 100}"#,
            &["cannot be run: `=mamba_n_heads * mamba_head_dim == mamba_width` with"],
        ),
        (
            r#"{"model_type": "falcon_h1", "mamba_d_ssm": 100, "mamba_n_heads": 24}"#,
            &["cannot be run: `=mamba_n_heads * mamba_head_dim == mamba_width` with"],
        ),
        (
            r#"{"model_type": "zamba2", "n_mamba_heads": 3}"#,
            &[
                "cannot be run: `=n_mamba_heads * mamba_head_dim ==",
                "n_mamba_heads = 3 (line 1 of config.json)",
            ],
        ),
        (
            r#"{"ssm_cfg": {"layer": "Mamba3"}, "d_model": 100}"#,
            &["cannot be run: `=d_inner % headdim == 0` with d_inner = 200 (by default)"],
        ),
        (
            r#"{"model_type": "nemotron_h", "num_key_value_heads": 5}"#,
            &[
                "`heads` is 32, no multiple of the 5 `kv_heads`: ",
                "num_key_value_heads = 5 (line 1 of config.json)",
            ],
        ),
        (
            r#"{"ssm_cfg": {"layer": "Mamba2"}, "d_model": 100, "n_layer": 2}"#,
            &["d_inner % headdim == 0` with d_inner = 200 (by default)"],
        ),
        (
            r#"{"ssm_cfg": {}, "d_model": 64, "n_layer": 2, "attn_layer_idx": [5], "attn_cfg": {"causal": true}}"#,
            &["there is no block 5 among 2: `=attn_layer_idx` with attn_layer_idx = a list"],
        ),
        // Groups.
        (
            r#"{"model_type": "mamba2", "n_groups": 3}"#,
            &[
                "`heads` is 128, no multiple of the 3 `groups`: `=n_groups` with n_groups = 3 (line 1 of config.json)",
            ],
        ),
        (
            r#"{"model_type": "nemotron_h", "hybrid_override_pattern": "E", "n_group": 3}"#,
            &["8 experts have no 3 equal groups"],
        ),
        (
            r#"{"model_type": "nemotron_h", "hybrid_override_pattern": "E", "n_group": 4, "num_experts_per_tok": 3}"#,
            &["`top_k` is 3, but 1 groups have 2 experts"],
        ),
        // Experts.
        (
            r#"{"model_type": "granitemoehybrid", "num_local_experts": 4, "num_experts_per_tok": 5}"#,
            &[
                "`top_k` is 5, but there are 4 experts: `=num_experts_per_tok` with num_experts_per_tok = 5 (line 1 of config.json)",
            ],
        ),
        (
            r#"{"model_type": "nemotron_h", "hybrid_override_pattern": "E", "num_experts_per_tok": 0}"#,
            &["`top_k` must be at least 1"],
        ),
        // Bounds of the step size.
        (
            r#"{"model_type": "mamba2", "time_step_limit": [0.0, NaN]}"#,
            &[
                "cannot be run: `=time_step_limit is none or",
                "time_step_limit = a list (line 1 of config.json)",
            ],
        ),
        (
            r#"{"model_type": "bamba", "time_step_limit": [0.0]}"#,
            &["cannot be run: `=time_step_limit is none or"],
        ),
        (
            r#"{"model_type": "mamba2", "time_step_limit": 5}"#,
            &[
                "`=time_step_limit is none or",
                "time_step_limit = 5 (line 1 of config.json)",
            ],
        ),
        (
            r#"{"model_type": "falcon_h1", "time_step_limit": [2.0, 1.0]}"#,
            &["step sizes from 2 to 1: `dt_min` must be from 0 to `dt_max`"],
        ),
        (
            r#"{"model_type": "granitemoehybrid", "time_step_limit": [Infinity, Infinity]}"#,
            &["expected a finite number: `=time_step_limit[0]` with time_step_limit = a list"],
        ),
        // Texts where numbers are meant, and nothing where something is.
        (
            r#"{"ssm_cfg": {"layer": "Mamba3", "d_state": "many"}}"#,
            &["d_state = \"many\""],
        ),
        (
            r#"{"model_type": "jamba", "mamba_dt_rank": "automatic"}"#,
            &[
                "found \"automatic\", expected a whole number",
                "mamba_dt_rank = \"automatic\" (line 1 of config.json)",
            ],
        ),
        (
            r#"{"model_type": "jamba", "vocab_size": null}"#,
            &[
                "a plan needs `vocab`: `=vocab_size` with vocab_size = nothing (line 1 of config.json)",
            ],
        ),
    ];
    let mut wrong = Vec::new();
    for (text, expected) in rows {
        match plan(text) {
            Ok(_) => wrong.push(format!("{text} makes a plan")),
            Err(message) => {
                let lacks = expected.iter().filter(|e| !message.contains(*e));
                wrong.extend(lacks.map(|e| format!("{text}: {e:?} is missing from\n{message}")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[test]
fn infinity_may_be_written_in_three_ways() {
    for family in ["mamba2", "bamba", "falcon_h1", "granitemoehybrid"] {
        let with = |limit: &str| {
            let more = format!(r#""model_type": "{family}", "time_step_limit": {limit}"#);
            plan(&format!("{{{more}}}")).unwrap_or_else(|e| panic!("{family}, {limit}: {e}"))
        };
        let plain = with("[0.001, Infinity]");
        assert!(plain.contains("dt_min: 0.001"), "{plain}");
        assert!(!plain.contains("dt_max"), "{plain}");
        for other in [
            r#"[0.001, "Infinity"]"#,
            r#"[0.001, {"__float__": "Infinity"}]"#,
            "[0.001, 1e999]",
        ] {
            assert_eq!(with(other), plain, "{family}, {other}");
        }
        assert!(with("[0.001, 0.5]").contains("dt_max: 0.5"));
    }
}
