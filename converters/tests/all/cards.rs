//! Which card opens what, what the cards make of configs, and how they speak of faults.

use strata_converters::transforms::TRANSFORMS;
use strata_converters::{Card, Config, cards};
use strata_layers::plan::{StepKind, layer_kinds};
use strata_layers::{Graph, Plan};

fn config(text: &str) -> Config {
    Config::parse(text, "m/config.json").unwrap()
}

fn plan(family: &str, text: &str) -> Result<Plan, String> {
    let card = cards::named(family).unwrap();
    card.plan(&config(text), "m").map_err(|f| f.to_string())
}

#[test]
fn no_two_cards_claim_one_model() {
    let mut names: Vec<&String> = cards::all()
        .iter()
        .flat_map(|c| c.architectures().iter().chain(c.model_types()))
        .collect();
    names.sort();
    assert!(names.windows(2).all(|w| w[0] != w[1]), "{names:?}");
    assert!(cards::all().len() >= 3);
}

#[test]
fn architectures_count_before_model_types() {
    let family = |text: &str| {
        let found = cards::find(&config(text));
        found
            .map(|c| c.family().to_string())
            .map_err(|e| e.to_string())
    };
    // As in early repositories.
    let early = r#"{"model_type": "mamba", "architectures": ["FalconMambaForCausalLM"]}"#;
    assert_eq!(family(early).unwrap(), "falcon-mamba");
    assert_eq!(family(r#"{"model_type": "mamba"}"#).unwrap(), "mamba");
    let unknown = family(r#"{"architectures": ["GPT2LMHeadModel"]}"#).unwrap_err();
    let expected = "m/config.json: no model card is for GPT2LMHeadModel; there are cards for ";
    let known = unknown.strip_prefix(expected).unwrap();
    for card in cards::all() {
        let mut names = card.architectures().iter();
        assert!(names.all(|name| known.contains(name)), "{known}");
    }
    for nothing in ["{}", r#"{"architectures": null, "model_type": 7}"#] {
        let message = family(nothing).unwrap_err();
        assert!(message.contains("neither `architectures` nor"), "{message}");
    }
    // Configs without either are known by their keys; keys that are not there are no fault.
    let unnamed = r#"{"d_model": 8, "ssm_cfg": {"layer": "Mamba3"}}"#;
    assert_eq!(family(unnamed).unwrap(), "mamba3");
    let named = r#"{"model_type": "mamba", "ssm_cfg": {"layer": "Mamba3"}}"#;
    assert_eq!(family(named).unwrap(), "mamba");
}

#[test]
fn a_config_that_no_card_opens_is_told_what_it_is_like() {
    let refused = |text: &str| cards::find(&config(text)).unwrap_err().to_string();
    let check = |text: &str, expected: &[&str]| {
        let message = refused(text);
        for expected in expected {
            assert!(message.contains(expected), "{text}: {message}");
        }
        let help = "model-cards/README.md tells how to write; give it with --card FILE";
        assert!(message.contains(help), "{message}");
    };
    // By its name.
    check(
        r#"{"architectures": ["Mamba4ForCausalLM"], "model_type": "mamba4"}"#,
        &[
            "no model card is for Mamba4ForCausalLM; there are cards for ",
            "nearest: mamba (its name is like mamba); mamba2 (",
        ],
    );
    check(
        r#"{"model_type": "nemotron_h2"}"#,
        &["nearest: nemotron-h (its name is like nemotron_h)\n"],
    );
    // By its keys, whatever it is called; keys that all families have do not count.
    check(
        r#"{"architectures": ["OtherForCausalLM"], "model_type": "other", "hidden_size": 64, "vocab_size": 9,
 "mamba_d_state": 16, "attn_layer_period": 8, "attn_layer_offset": 4, "expert_layer_period": 2, "num_experts": 4}"#,
        &[
            "no model card is for OtherForCausalLM; there are cards for ",
            "nearest: jamba (it has the keys ",
            "expert_layer_period",
        ],
    );
    check(
        r#"{"model_type": "x", "ssm_multipliers": [1], "key_multiplier": 1}"#,
        &["nearest: falcon-h1 (it has the keys ", "key_multiplier"],
    );
    // Like none of them.
    for text in [
        "{}",
        r#"{"architectures": ["GPT2LMHeadModel"], "n_embd": 768}"#,
        r#"{"model_type": ""}"#,
        r#"{"model_type": "Ω"}"#,
    ] {
        check(text, &[]);
        assert!(!refused(text).contains("nearest"), "{}", refused(text));
    }
    let long = format!(r#"{{"model_type": "{}"}}"#, "mamba".repeat(100_000));
    assert!(!refused(&long).contains("nearest"));
}

#[test]
fn a_card_may_say_what_is_not_run() {
    let unused = |text: &str, config_text: &str| {
        let card = Card::parse(text, "small.yaml").map_err(|f| f.to_string())?;
        card.unused(&config(config_text)).map_err(|f| f.to_string())
    };
    let none = unused(SMALL, "{}").unwrap();
    assert_eq!((none.parameters, none.tensors), (0, 0));
    let with = |more: &str| format!("{SMALL}unused: {more}\n");
    // More than a size of a layer may be.
    let text = with("{parameters: =extra * width * 1000000000, tensors: =3 * extra}");
    let some = unused(&text, r#"{"extra": 2}"#).unwrap();
    assert_eq!((some.parameters, some.tensors), (16_000_000_000, 6));
    let choice = with("{if: =extra > 0, then: {parameters: 1, tensors: 1}}");
    assert_eq!(unused(&choice, r#"{"extra": 0}"#).unwrap(), none);
    for (text, expected) in [
        (text.as_str(), "config.json has no extra: `=extra * width"),
        (&with("{parameters: 1}"), "`unused` needs `tensors`"),
        (
            &with("{parameters: -1, tensors: =width / 3}"),
            "found -1, expected a count for `parameters`",
        ),
        (
            &with("{parameters: -1, tensors: =width / 3}"),
            "expected a count for `tensors`: `=width / 3` with width = 8 (by default)",
        ),
        (
            &with("{parameters: 1, tensors: 1, files: 1}"),
            "has no `files`",
        ),
        (&with("7"), "found 7, expected"),
    ] {
        let message = unused(text, "{}").unwrap_err();
        assert!(message.contains(expected), "{expected}: {message}");
    }
}

#[test]
fn a_card_says_how_it_is_found() {
    let head = "card: 1\nfamily: f\nstack: [b]\nblocks: {b: []}\ntensors: {}\n";
    for (way, expected) in [
        ("", "no model finds this card"),
        ("match: []", "no model finds this card"),
        ("match: [\"=a +\"]", "`=a +`: "),
        ("match: [a]", "\"a\" is no expression"),
    ] {
        let faults = Card::parse(&format!("{head}{way}\n"), "f.yaml").unwrap_err();
        assert!(faults.to_string().contains(expected), "{faults}");
    }
    let card = Card::parse(&format!("{head}match: [=a.b > 1, =a == 7]\n"), "f.yaml").unwrap();
    for (text, expected) in [
        (r#"{"a": {"b": 2}}"#, true),
        (r#"{"a": {"b": 1}}"#, false),
        (r#"{"a": 7}"#, true),
        ("{}", false),
    ] {
        assert_eq!(card.matches(&config(text)), expected, "{text}");
    }
}

#[test]
fn a_tiny_model_of_every_card_lowers() {
    for card in cards::all() {
        let plan = card.plan(card.tiny(), "tiny").unwrap();
        let graph = Graph::lower(&plan, card.file()).unwrap();
        assert!(graph.weights().len() > 10);
        assert_eq!(Plan::parse(&plan.print(), "again").unwrap(), plan);
        let card = card.bound(card.tiny()).unwrap();
        for weight in graph.weights() {
            let found = card.tensors().find(&weight.path);
            assert!(
                !found.sources.is_empty(),
                "{}: {}",
                card.file(),
                weight.path
            );
        }
    }
}

#[test]
fn configs_mean_what_the_reference_takes_them_for() {
    // What the classes say when a config says nothing.
    let all_defaults = plan("jamba", "{}").unwrap();
    let kinds: Vec<&str> = all_defaults
        .stack
        .iter()
        .map(|p| p.block.as_str())
        .collect();
    assert_eq!(kinds.len(), 32);
    assert_eq!(kinds[..2], ["mamba-mlp", "mamba-moe"]);
    let attention: Vec<usize> = (0..32).filter(|i| kinds[*i].starts_with("att")).collect();
    assert_eq!(attention, [4, 12, 20, 28]);
    assert_eq!((all_defaults.vocab, all_defaults.head.tie), (65536, false));
    assert!(plan("mamba", "{}").unwrap().head.tie);

    let check = |family: &str, text: &str, expected: &str| {
        let printed = plan(family, text).unwrap().print();
        assert!(
            printed.contains(expected),
            "{expected} is missing from\n{printed}"
        );
    };
    check(
        "jamba",
        r#"{"hidden_size": 2560, "num_attention_heads": 20, "num_key_value_heads": 1}"#,
        "dt_rank: 160",
    );
    check("jamba", r#"{"num_key_value_heads": null}"#, "kv_heads: 32");
    check("jamba", r#"{"num_local_experts": 8}"#, "experts: 8");
    check(
        "jamba",
        r#"{"num_local_experts": 8, "num_experts": 4}"#,
        "experts: 4",
    );
    check("mamba", r#"{"hidden_size": 65}"#, "dt_rank: 5");
    check(
        "mamba",
        r#"{"expand": 2.0, "hidden_size": 64}"#,
        "d_inner: 128",
    );
    check(
        "falcon-mamba",
        r#"{"expand": 16, "hidden_size": 4096, "intermediate_size": 8192}"#,
        "d_inner: 8192",
    );
    check(
        "falcon-mamba",
        r#"{"layer_norm_epsilon": 1e-5}"#,
        "inner_norm: {eps: 1.0e-6, weight: false}",
    );
    // With one expert there are no routers, whatever the period says.
    let dense = plan("jamba", r#"{"num_experts": 1}"#).unwrap();
    assert!(dense.blocks.iter().all(|b| !b.name.ends_with("moe")));
    let Some(residual) = dense.blocks[0].steps.first() else {
        panic!()
    };
    assert!(matches!(residual.kind, StepKind::Residual(_)));
}

#[test]
fn absurd_configs_are_faults_that_name_key_and_value() {
    let check = |family: &str, text: &str, expected: &[&str]| {
        let message = plan(family, text).expect_err(text);
        for expected in expected {
            assert!(message.contains(expected), "{text}: {message}");
        }
    };
    // All at once, each at the card's line.
    check(
        "jamba",
        "{\"hidden_size\": -64,\n \"mamba_d_state\": \"many\",\n \"num_experts_per_tok\": 99, \"vocab_size\": 0}",
        &[
            "-64 is outside 0 to 1073741824: `=hidden_size` with hidden_size = -64 (line 1 of config.json)",
            "`=mamba_expand * hidden_size` with hidden_size = -64 (line 1 of config.json) and mamba_expand = 2 (by default)",
            "found \"many\", expected a whole number: `=mamba_d_state` with mamba_d_state = \"many\" (line 2 of config.json)",
            "`top_k` is 99, but there are 16 experts: `=num_experts_per_tok` with num_experts_per_tok = 99 (line 3 of config.json)",
            "`vocab` must be at least 1: `=vocab_size` with vocab_size = 0",
            "model-cards/jamba.yaml:3",
        ],
    );
    check(
        "jamba",
        r#"{"mamba_d_state": null}"#,
        &["mamba1 needs `d_state`: `=mamba_d_state` with mamba_d_state = nothing"],
    );
    check(
        "jamba",
        r#"{"num_hidden_layers": 1e30}"#,
        &["expected a whole number: `=num_hidden_layers`"],
    );
    check(
        "jamba",
        r#"{"num_hidden_layers": 0}"#,
        &["0 blocks; there may be 1 to 10000: `=num_hidden_layers` with"],
    );
    check(
        "jamba",
        r#"{"num_hidden_layers": 99999999}"#,
        &["there may be 1 to 10000"],
    );
    check(
        "jamba",
        r#"{"attn_layer_period": 0}"#,
        &["a period must be at least 1: `=attn_layer_period`"],
    );
    check(
        "jamba",
        r#"{"attn_layer_offset": 8}"#,
        &["the offset 8 must be smaller than the period 8: `=attn_layer_offset`"],
    );
    check(
        "jamba",
        r#"{"num_attention_heads": 0}"#,
        &["hidden_size // num_attention_heads", "heads"],
    );
    check(
        "jamba",
        r#"{"num_key_value_heads": 5}"#,
        &["`heads` is 32, no multiple of the 5 `kv_heads`"],
    );
    check(
        "jamba",
        r#"{"hidden_act": "gelu"}"#,
        &[
            "this model cannot be run: `=hidden_act == 'silu'` with hidden_act = \"gelu\" (line 1 of config.json)",
        ],
    );
    check(
        "jamba",
        r#"{"rms_norm_eps": NaN}"#,
        &["expected a finite number"],
    );
    check(
        "jamba",
        r#"{"num_hidden_layers": 9999, "num_experts": 60000}"#,
        &["more than 1000000 weights"],
    );
    check(
        "mamba",
        r#"{"expand": 9000000000000000000, "hidden_size": 9000000000000000000}"#,
        &["is outside 0 to 1073741824"],
    );
    check(
        "mamba",
        r#"{"hidden_size": "64"}"#,
        &["found \"64\", expected a whole number"],
    );
    check(
        "mamba",
        r#"{"hidden_size": [64]}"#,
        &["found a list, expected a whole number"],
    );
    check(
        "mamba",
        r#"{"tie_word_embeddings": "yes"}"#,
        &["expected true or false: `=tie_word_embeddings`"],
    );
}

const SMALL: &str = "\
card: 1
family: small
architectures: [Small]
defaults: {width: 8}
vocab: =vocab
d_model: =width
context: 64
stack: {list: =kinds, map: {m: ff, s: once}}
shared:
  s0: [mlp: {d_ff: =width, act: relu}]
  s1: [mlp: {d_ff: 4, act: relu}]
blocks:
  ff: [residual: [norm: {eps: 1.0e-6}, mlp: {d_ff: \"=sizes[i]\", act: silu, bias: =bias}]]
  once: [residual: [use: \"='s' ~ (use % 2)\"]]
  never: [residual: [norm: {eps: =nowhere}]]
head: {norm: {eps: 1.0e-6}, tie: true}
tensors: {embed: e}
";

#[test]
fn blocks_may_differ_from_place_to_place() {
    let card = Card::parse(SMALL, "small.yaml").unwrap();
    let text = r#"{"vocab": 9, "kinds": ["m", "s", "m", "s", "m"], "sizes": [4, 0, 6, 0, 4], "bias": null}"#;
    let plan = card.plan(&config(text), "small").unwrap();
    let stack: Vec<String> = plan
        .stack
        .iter()
        .map(|p| format!("{}@{}", p.block, p.weights))
        .collect();
    assert_eq!(stack, ["ff@0", "once@1", "ff.2@2", "once.2@3", "ff@4"]);
    // A null drops its key, and a block that the stack does not use is not computed.
    let printed = plan.print();
    assert!(
        !printed.contains("bias") && !printed.contains("never"),
        "{printed}"
    );
}

#[test]
fn faults_of_a_card_come_at_once_with_their_lines() {
    let broken = SMALL
        .replace("card: 1", "card: 2")
        .replace("context", "contexts")
        .replace(
            "tensors: {embed: e}",
            "tensors: {\"embed.{i}\": \"sqrt(e)\", \"a b\": e, norm: \"e.{i}\"}\nignore: [7]",
        );
    let message = Card::parse(&broken, "small.yaml").unwrap_err().to_string();
    for expected in [
        "small.yaml:1:7: card version 2; this program reads version 1",
        "small.yaml:7:1: a card has no `contexts`; it takes card, family",
        "small.yaml:17:",
        "there is no transform `sqrt`; there are neg_exp",
        "\"a b\" is no name",
        "{i} does not occur in `norm`",
        "small.yaml:18:10: found 7, expected a name",
    ] {
        assert!(
            message.contains(expected),
            "{expected:?} is missing from\n{message}"
        );
    }
}

#[test]
fn keys_that_config_json_lacks_are_named() {
    let card = Card::parse(SMALL, "small.yaml").unwrap();
    let message = card.plan(&config("{}"), "small").unwrap_err().to_string();
    for expected in [
        "small.yaml:5:8: config.json has no vocab: `=vocab`",
        "small.yaml:8:15: config.json has no kinds: `=kinds`",
        "config.json has no sizes: `=sizes[i]` with i = 0 (of this block)",
        "config.json has no nowhere: `=nowhere`",
    ] {
        assert!(
            message.contains(expected),
            "{expected:?} is missing from\n{message}"
        );
    }
    let unknown = SMALL.replace("m: ff", "m: gg");
    let text = r#"{"vocab": 9, "kinds": ["m", "s"]}"#;
    let card = Card::parse(&unknown, "small.yaml").unwrap();
    let message = card.plan(&config(text), "small").unwrap_err().to_string();
    assert!(
        message.contains("there is no block `gg`; there are ff, once and never"),
        "{message}"
    );
    let card = Card::parse(SMALL, "small.yaml").unwrap();
    let text = r#"{"vocab": 9, "kinds": ["q"], "sizes": [4]}"#;
    let message = card.plan(&config(text), "small").unwrap_err().to_string();
    assert!(
        message.contains("\"q\" is no kind of block; there are m and s: `=kinds` with kinds"),
        "{message}"
    );
}

/// A card of a shared chain and of choices, with `{CHOICE}` to be put in.
const CHOOSING: &str = "\
card: 1
family: choosing
architectures: [Choosing]
defaults: {scale: 1, norms: true, far: [1, 3]}
vocab: 16
d_model: 8
context: 64
shared:
  s0: &chain [own: [linear: {name: mine}], linear: {name: ours}]
  s1: {if: =far|length > 1, then: *chain}
stack: {count: 4, at: =far, then: far, else: near}
blocks:
  near: [residual: [norm: {eps: 1.0e-6}, {CHOICE}, linear: {}]]
  far: [residual: [use: \"='s' ~ (use % 2)\"]]
head: {norm: {eps: 1.0e-6}, tie: true}
numbers: {s: \"=far[e]\", j: \"=places(far, i)[0]\", f: \"=far[j % 2]\"}
tensors:
  embed: e
  head.norm: last
  shared.s{e}.ours: l.{s}.ours
  blocks.{i}.mine: l.{f}.mine.{j}
  blocks.{i}.{x}: l.{i}.{x}
ignore: [spare.*]
";

#[test]
fn a_choice_stands_for_one_of_its_branches() {
    let check = |choice: &str, text: &str, expected: &str| {
        let card = CHOOSING.replace("{CHOICE}", choice);
        let card = Card::parse(&card, "choosing.yaml").unwrap();
        let found = match card.plan(&config(text), "m") {
            Ok(plan) => plan.print(),
            Err(faults) => faults.to_string(),
        };
        assert!(found.contains(expected), "{choice} {text}: {found}");
    };
    let scaled = "{if: =scale != 1, then: [scale: {by: =scale}, scale: {by: 2}]}";
    check(scaled, r#"{"scale": 3}"#, "scale:");
    check(scaled, "{}", "norm:");
    let other = "{if: =norms, then: [norm: {name: m, eps: 0.5}], else: [scale: {by: 7}]}";
    check(other, "{}", "0.5");
    check(other, r#"{"norms": false}"#, "by: 7");
    // The other branch may name what is not there.
    let missing = "{if: =norms, then: [], else: [scale: {by: =nothing}]}";
    check(missing, "{}", "linear:");
    check(missing, r#"{"norms": false}"#, "config.json has no nothing");
    let inside = "norm: {name: m, eps: {if: =norms, then: 0.25, else: 0.5}, weight: {if: =norms, else: false}}";
    check(inside, "{}", "0.25");
    check(inside, r#"{"norms": false}"#, "weight: false");
    let unclear = "{if: =scale, then: []}";
    check(
        unclear,
        "{}",
        "a condition must be true or false: `=scale` with scale = 1 (by default)",
    );
    check(
        "{if: =nothing, then: []}",
        "{}",
        "config.json has no nothing",
    );
    check("{if: true, than: []}", "{}", "a choice has no `than`");
    // A chain that is not chosen is not there.
    let two = "scale: {by: 1}";
    check(two, "{}", "s1:");
    let card = Card::parse(&CHOOSING.replace("{CHOICE}", two), "c.yaml").unwrap();
    let one = card.plan(&config(r#"{"far": [2]}"#), "m").unwrap();
    assert!(!one.print().contains("s1:"), "{}", one.print());
}

#[test]
fn numbers_of_names_are_computed_both_ways() {
    let card = Card::parse(&CHOOSING.replace("{CHOICE}", "scale: {by: 1}"), "c.yaml").unwrap();
    let name = |card: &Card, path: &str| {
        let sources = card.tensors().find(path).sources;
        sources.first().map(|s| s.tensor().to_string())
    };
    assert_eq!(name(&card, "shared.s0.ours"), None);
    let bound = card.bound(&config(r#"{"far": [1, 2, 3]}"#)).unwrap();
    let back = |tensor: &str| bound.tensors().weight_of(tensor).map(|(path, _)| path);
    for (ours, theirs) in [
        ("shared.s0.ours", "l.1.ours"),
        ("shared.s1.ours", "l.2.ours"),
        ("blocks.1.mine", "l.1.mine.0"),
        ("blocks.2.mine", "l.2.mine.1"),
        ("blocks.3.mine", "l.1.mine.2"),
        ("blocks.0.norm", "l.0.norm"),
    ] {
        assert_eq!(name(&bound, ours).as_deref(), Some(theirs), "{ours}");
        assert_eq!(back(theirs).as_deref(), Some(ours), "{theirs}");
    }
    // Block 0 uses no chain, and there is no fourth use.
    assert_eq!(name(&bound, "blocks.0.mine"), None);
    assert_eq!(back("l.1.mine.3"), None);
    assert_eq!(back("l.3.mine.2"), None);
    let ignored = ["spare.part.7", "spare."].map(|n| bound.tensors().ignores(n));
    assert_eq!(ignored, [true, true]);
    assert!(!bound.tensors().ignores("sparse.x"));

    let fault = |numbers: &str, expected: &str| {
        let text = CHOOSING.replace("{CHOICE}", "scale: {by: 1}");
        let text = text.replace("s: \"=far[e]\"", numbers);
        let found = Card::parse(&text, "c.yaml").and_then(|c| c.bound(&config("{}")));
        let message = found.unwrap_err().to_string();
        assert!(message.contains(expected), "{numbers}: {message}");
    };
    fault("s: \"=far[e + 9]\"", "far[e + 9]");
    fault("s: \"=i + e\"", "on {i} or on {e}, not on both");
    fault("s: \"='x'\"", "a name holds whole numbers");
    fault("s: 3", "found 3, expected an expression");
    fault("i: \"=3\"", "i and e have a meaning");
}

#[test]
fn the_page_about_cards_is_true() {
    let page = include_str!("../../../model-cards/README.md");
    let example = page.split("```yaml").nth(1).unwrap();
    let example = example.split("```").next().unwrap();
    let plan = Plan::parse(example, "README.md").unwrap_or_else(|f| panic!("{f}"));
    Graph::lower(&plan, "README.md").unwrap_or_else(|f| panic!("{f}"));
    let transforms = TRANSFORMS.iter().map(|t| format!("`{}(x", t.name));
    let layers = layer_kinds().map(|kind| format!("| `{kind}` |"));
    for row in transforms.chain(layers) {
        assert!(page.contains(&row), "{row} is missing");
    }
}
