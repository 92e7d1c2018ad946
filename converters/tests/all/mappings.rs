//! Plans and checkpoints that do not fit together.

use std::sync::Arc;

use crate::common::{Folder, golden, tensors};
use strata_converters::mapping::untie;
use strata_converters::{Card, Checkpoint, Config, Mapping, ModelFiles, Origin, cards};
use strata_layers::{Graph, Plan};

/// The names and shapes of a golden's tensors.
fn listed(files: &ModelFiles) -> Vec<(String, Vec<usize>)> {
    let checkpoint = Checkpoint::open(files).unwrap();
    let tensors = checkpoint.tensors();
    tensors
        .map(|(n, t)| (n.to_string(), t.shape.clone()))
        .collect()
}

fn written(list: &[(String, Vec<usize>)]) -> Arc<Checkpoint> {
    let folder = Folder::new();
    folder.write("model.safetensors", &tensors(list, 1.0));
    // The files stay mapped when their names are gone.
    Arc::new(Checkpoint::open(&folder.files()).unwrap())
}

fn card_and_plan(files: &ModelFiles) -> (&'static Card, Plan) {
    let config = Config::open(files).unwrap();
    let card = cards::find(&config).unwrap();
    let plan = card.plan(&config, "m").unwrap();
    (card, plan)
}

fn resolve(
    card: &Card,
    plan: &Plan,
    checkpoint: Arc<Checkpoint>,
    origin: Origin,
) -> Result<Mapping, String> {
    let graph = Graph::lower(plan, "plan.yaml").unwrap();
    Mapping::resolve(Some(card), &graph.weights(), checkpoint, origin).map_err(|f| f.to_string())
}

#[track_caller]
fn contains(text: &str, expected: &[&str]) {
    for expected in expected {
        assert!(
            text.contains(expected),
            "{expected:?} is missing from\n{text}"
        );
    }
}

#[test]
fn missing_misshapen_and_left_over_are_reported_together() {
    let files = golden("jamba/moe-shards");
    let (card, plan) = card_and_plan(&files);
    let mut list = listed(&files);
    let place = |list: &[(String, Vec<usize>)], end: &str| {
        list.iter().position(|(n, _)| n.ends_with(end)).unwrap()
    };
    let norm = place(&list, "layers.0.input_layernorm.weight");
    list[norm].0 = "model.layers.0.input_norm.weight".into();
    let gate = place(&list, "experts.1.gate_proj.weight");
    list[gate].1 = vec![3, 2];
    list.push(("model.layers.99.input_layernorm.weight".into(), vec![1]));
    list.push(("model.layers.0.mamba.in_proj.bias".into(), vec![1]));
    let message = resolve(card, &plan, written(&list), Origin::Card).unwrap_err();
    contains(
        &message,
        &[
            "blocks.0.norm is missing: there is no tensor model.layers.0.input_layernorm.weight",
            "found (3, 2) in model.safetensors, tensor model.layers.1.feed_forward.experts.1.gate_proj.weight",
            "blocks.1.moe.gate.1 wants (",
            "tensor \"model.layers.0.input_norm.weight\" (",
            "no line of `tensors` or `ignore` names it",
            "tensor \"model.layers.99.input_layernorm.weight\" (1) in model.safetensors is left over: the plan has no block 99",
            "left over: the plan has no blocks.0.mamba1.in_proj.bias",
        ],
    );
    // At the card's lines.
    let line = include_str!("../../../model-cards/jamba.yaml")
        .lines()
        .position(|l| l.contains("blocks.{i}.norm:"))
        .unwrap()
        + 1;
    contains(
        &message,
        &[&format!(
            "model-cards/jamba.yaml:{line}:3: blocks.0.norm is missing"
        )],
    );
}

#[test]
fn long_lists_are_summarised() {
    let files = golden("jamba/published-config");
    let (card, plan) = card_and_plan(&files);
    let list = [("model.embed_tokens.weight".to_string(), vec![128, 32])];
    let message = resolve(card, &plan, written(&list), Origin::Card).unwrap_err();
    assert!(message.lines().count() < 40, "{message}");
    contains(&message, &["more missing weights"]);
}

#[test]
fn element_types_that_do_not_run_are_named() {
    let files = golden("mamba/tied");
    let (card, plan) = card_and_plan(&files);
    let bytes = tensors(&listed(&files), 1.0);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let at = text.find("\"F32\"").unwrap();
    let mut bytes = bytes;
    bytes[at..at + 5].copy_from_slice(b"\"I32\"");
    let folder = Folder::new();
    folder.write("model.safetensors", &bytes);
    let checkpoint = Arc::new(Checkpoint::open(&folder.files()).unwrap());
    let message = resolve(card, &plan, checkpoint, Origin::Card).unwrap_err();
    contains(
        &message,
        &[
            "embed: unsupported element type I32; F32, F16 and BF16 are read, of GGUF files also blocks, in model.safetensors, tensor backbone.embeddings.weight",
        ],
    );
}

#[test]
fn an_edited_plan_may_leave_out_blocks_and_layers() {
    let files = golden("jamba/moe-shards");
    let (card, mut plan) = card_and_plan(&files);
    let checkpoint = Arc::new(Checkpoint::open(&files).unwrap());
    let blocks = plan.stack.len();
    plan.stack.truncate(blocks - 2);
    plan.stack.remove(0);
    let used: Vec<String> = plan.stack.iter().map(|p| p.block.clone()).collect();
    plan.blocks.retain(|b| used.contains(&b.name));
    let mapping = resolve(card, &plan, checkpoint.clone(), Origin::Edited).unwrap();
    let expected = format!(
        "the plan leaves out the checkpoint's blocks 0, {} to {} (",
        blocks - 2,
        blocks - 1
    );
    contains(&mapping.notes().join("\n"), &[&expected]);
    // Of a card's own plan it would be a fault: the config has fewer blocks than the files.
    let message = resolve(card, &plan, checkpoint.clone(), Origin::Card).unwrap_err();
    contains(&message, &["left over: the plan has no block 0"]);

    // One block less its second half.
    let block = plan
        .blocks
        .iter_mut()
        .find(|b| b.name == "mamba-moe")
        .unwrap();
    block.steps.truncate(1);
    let mapping = resolve(card, &plan, checkpoint.clone(), Origin::Edited).unwrap();
    contains(
        &mapping.notes().join("\n"),
        &[
            "the plan leaves out blocks.1.moe (",
            "the plan leaves out blocks.1.ff_norm (1 tensors)",
        ],
    );
}

#[test]
fn the_number_of_experts_cannot_be_changed() {
    let files = golden("jamba/moe-shards");
    let (card, plan) = card_and_plan(&files);
    let checkpoint = Arc::new(Checkpoint::open(&files).unwrap());
    let text = plan.print();
    let fewer = text.replace("experts: 4", "experts: 3");
    assert_ne!(text, fewer, "{text}");
    let plan = Plan::parse(&fewer, "plan.yaml").unwrap();
    let message = resolve(card, &plan, checkpoint, Origin::Edited).unwrap_err();
    contains(
        &message,
        &["the router chooses among 4 experts, the plan has 3; a plan cannot change their number"],
    );
    assert!(!message.contains("left over"), "{message}");
}

#[test]
fn fused_experts_are_the_parts_of_their_tensors() {
    let files = golden("jamba/fused-experts");
    let (card, plan) = card_and_plan(&files);
    let checkpoint = Arc::new(Checkpoint::open(&files).unwrap());
    let mapping = resolve(card, &plan, checkpoint.clone(), Origin::Card).unwrap();
    let fused = checkpoint
        .tensor("model.layers.2.feed_forward.experts.gate_up_proj")
        .unwrap();
    let fused = fused.to_f32(); // (E, 2F, H)
    let size = 24 * 32;
    for e in 0..4 {
        let gate = mapping.load(&format!("blocks.2.moe.gate.{e}")).unwrap();
        let up = mapping.load(&format!("blocks.2.moe.up.{e}")).unwrap();
        assert_eq!(gate.to_f32(), fused[2 * e * size..(2 * e + 1) * size]);
        assert_eq!(up.to_f32(), fused[(2 * e + 1) * size..(2 * e + 2) * size]);
    }
    let row = mapping
        .rows()
        .iter()
        .find(|r| r.path == "blocks.2.moe.up.3")
        .unwrap();
    assert_eq!(
        row.source.to_string(),
        "part(index(model.layers.2.feed_forward.experts.gate_up_proj, 3), 1, 2)"
    );
    assert_eq!((row.shape.clone(), row.bytes), (vec![24, 32], 24 * 32 * 2));
    assert!(mapping.load("blocks.2.moe.up.4").is_err());
}

#[test]
fn computed_weights_are_f32_and_the_rest_are_views() {
    let files = golden("jamba/dense-tied-bf16");
    let (card, plan) = card_and_plan(&files);
    let checkpoint = Arc::new(Checkpoint::open(&files).unwrap());
    let mapping = resolve(card, &plan, checkpoint.clone(), Origin::Card).unwrap();
    let a = mapping.load("blocks.0.mamba1.a").unwrap();
    let log = checkpoint.tensor("model.layers.0.mamba.A_log").unwrap();
    let expected: Vec<f32> = log.to_f32().iter().map(|v| -v.exp()).collect();
    assert_eq!(
        (a.format(), a.to_f32()),
        (strata_kernels::Format::F32, expected)
    );
    for (path, tensor) in [
        ("blocks.0.mamba1.conv", "model.layers.0.mamba.conv1d.weight"),
        (
            "blocks.0.mamba1.in_proj",
            "model.layers.0.mamba.in_proj.weight",
        ),
    ] {
        let (ours, theirs) = (
            mapping.load(path).unwrap(),
            checkpoint.tensor(tensor).unwrap(),
        );
        assert_eq!(ours.bytes().as_ptr(), theirs.bytes().as_ptr(), "{path}");
    }
}

#[test]
fn a_second_output_matrix_counts_if_it_differs() {
    let files = golden("mamba/tied");
    let (card, plan) = card_and_plan(&files);
    assert!(plan.head.tie);
    let list = listed(&files);
    let with_head = |shape: &[usize]| {
        let mut list = list.clone();
        list.push(("lm_head.weight".into(), shape.to_vec()));
        written(&list)
    };
    // Equal: every element is one.
    let equal = with_head(&[131, 40]);
    let mut same = plan.clone();
    assert_eq!(untie(Some(card), &mut same, &equal), None);
    let mapping = resolve(card, &same, equal, Origin::Card).unwrap();
    contains(
        &mapping.notes().join("\n"),
        &["lm_head.weight equals the embedding, and is not used"],
    );

    let folder = Folder::new();
    let mut bytes = tensors(
        &[&list[..], &[("lm_head.weight".into(), vec![131, 40])]].concat(),
        1.0,
    );
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    folder.write("model.safetensors", &bytes);
    let differs = Arc::new(Checkpoint::open(&folder.files()).unwrap());
    let message = resolve(card, &plan, differs.clone(), Origin::Edited).unwrap_err();
    contains(
        &message,
        &[
            "the plan says `tie: true`, but lm_head.weight differs from the embedding; say `tie: false`",
        ],
    );
    let mut untied = plan.clone();
    let told = untie(Some(card), &mut untied, &differs).unwrap();
    contains(&told, &["lm_head.weight differs from it and is used"]);
    let mapping = resolve(card, &untied, differs, Origin::Card).unwrap();
    assert_eq!(mapping.load("head").unwrap().shape(), [131, 40]);

    let mut untied = plan.clone();
    untied.head.tie = false;
    let message = resolve(card, &untied, written(&list), Origin::Card).unwrap_err();
    contains(
        &message,
        &[
            "head is missing: there is no tensor lm_head.weight; if the output matrix is the embedding, say `tie: true`",
        ],
    );
}

#[test]
fn other_names_of_the_embedding_are_found() {
    let files = golden("mamba/tied");
    let (card, plan) = card_and_plan(&files);
    let mut list = listed(&files);
    let embed = list
        .iter_mut()
        .find(|(n, _)| n == "backbone.embeddings.weight")
        .unwrap();
    embed.0 = "backbone.embedding.weight".into();
    assert!(resolve(card, &plan, written(&list), Origin::Card).is_ok());
    list[0].0 = "embeds".into();
    let message = resolve(card, &plan, written(&list), Origin::Card).unwrap_err();
    contains(
        &message,
        &["there is no tensor backbone.embeddings.weight nor backbone.embedding.weight"],
    );
}

#[test]
fn without_a_card_the_tensors_have_our_names() {
    let (_, plan) = card_and_plan(&golden("jamba/odd"));
    let graph = Graph::lower(&plan, "plan.yaml").unwrap();
    let list: Vec<(String, Vec<usize>)> = graph
        .weights()
        .into_iter()
        .map(|w| (w.path, w.spec.shape))
        .collect();
    let mapping = Mapping::resolve(None, &graph.weights(), written(&list), Origin::Card).unwrap();
    assert_eq!(mapping.rows().len(), list.len());
    let message =
        Mapping::resolve(None, &graph.weights(), written(&list[1..]), Origin::Card).unwrap_err();
    contains(
        &message.to_string(),
        &["embed is missing: there is no tensor embed"],
    );
}

/// The tensors of one family under the config of another.
#[test]
fn a_checkpoint_under_another_familys_name_is_told_apart() {
    for (tensors_of, config_of, names) in [
        ("mamba2/tied", "jamba/moe-shards", "mamba2"),
        ("jamba/moe-shards", "mamba/tied", "jamba"),
        ("nemotron-h/dense", "bamba/groups-biases", "nemotron-h"),
        ("mamba3/siso", "mamba3-fla/softplus", "mamba3"),
    ] {
        let (card, plan) = card_and_plan(&golden(config_of));
        let checkpoint = Arc::new(Checkpoint::open(&golden(tensors_of)).unwrap());
        let message = resolve(card, &plan, checkpoint, Origin::Card).unwrap_err();
        contains(
            &message,
            &[
                "is missing: there is no tensor ",
                "is left over",
                "named as those of ",
                names,
                "is config.json another model's?",
            ],
        );
    }
    // Where the names fit, it is the sizes that tell, and nothing is guessed.
    let (card, plan) = card_and_plan(&golden("jamba/odd"));
    let checkpoint = Arc::new(Checkpoint::open(&golden("jamba/moe-shards")).unwrap());
    let message = resolve(card, &plan, checkpoint, Origin::Card).unwrap_err();
    assert!(!message.contains("another model"), "{message}");
}
