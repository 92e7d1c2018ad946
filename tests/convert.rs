//! Converted checkpoints are the models that they were made from.

use std::path::{Path, PathBuf};

use strata::load::{ConvertOptions, LoadOptions, Model, Silent, convert, load};
use strata_converters::write::Quiet;
use strata_kernels::DType;
use strata_tests::models::on_cpu;

/// A folder that vanishes with its owner.
struct Room(PathBuf);

impl Room {
    fn new(name: &str) -> Room {
        let path = std::env::temp_dir().join(format!("strata-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Room(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn golden(name: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    root.join(name).display().to_string()
}

fn from(model: &str, plan: Option<PathBuf>) -> LoadOptions {
    LoadOptions {
        plan,
        ..on_cpu(Path::new(model))
    }
}

fn options(from: LoadOptions, to: PathBuf) -> ConvertOptions {
    ConvertOptions {
        from,
        to,
        gguf: false,
        dtype: None,
        quantize: None,
        shard_bytes: 5_000_000_000,
        force: false,
        threads: 2,
        seed: 0,
    }
}

fn logits(options: &LoadOptions) -> Vec<f32> {
    let model: Model = load(options, &mut Silent::default()).unwrap_or_else(|e| panic!("{e}"));
    let tokens: Vec<u32> = (1..24).collect();
    strata_tests::models::logits(&model, &tokens)
}

fn bytes(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        // Beside them lie a golden's answers.
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with("model") && name.ends_with(".safetensors") {
            let file = std::fs::read(&path).unwrap();
            let file = safetensors::SafeTensors::deserialize(&file).unwrap();
            for (name, view) in file.tensors() {
                found.push((
                    format!("{name} {:?} {:?}", view.dtype(), view.shape()),
                    view.data().to_vec(),
                ));
            }
        }
    }
    found.sort();
    found
}

#[test]
fn a_copy_has_the_same_tensors_however_it_is_cut() {
    let room = Room::new("convert-copy");
    for (i, name) in [
        "jamba/moe-shards",
        "mamba2/groups-infinity",
        "zamba2/two-blocks-rope",
    ]
    .iter()
    .enumerate()
    {
        if !Path::new(&golden(name)).is_dir() {
            panic!("{name} is no golden");
        }
        let source = golden(name);
        let expected = bytes(Path::new(&source));
        for (cut, shard_bytes) in [5_000_000_000, 20_000].into_iter().enumerate() {
            let to = room.path(&format!("{i}-{cut}"));
            let converted = convert(
                &ConvertOptions {
                    shard_bytes,
                    ..options(from(&source, None), to.clone())
                },
                &mut Silent::default(),
                &mut Quiet,
            )
            .unwrap();
            assert_eq!(converted.files.len() > 1, cut == 1);
            assert_eq!(to.join("model.safetensors.index.json").exists(), cut == 1);
            assert!(bytes(&to) == expected, "{name}: other tensors");
            let again = from(&to.display().to_string(), None);
            assert_eq!(logits(&again), logits(&from(&source, None)), "{name}");
        }
    }
}

#[test]
fn a_gguf_file_and_back_gives_the_same_bytes() {
    let room = Room::new("convert-gguf");
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model-cards/demo");
    for (i, source) in [
        demo.display().to_string(),
        golden("jamba/moe-shards"),
        golden("jamba/dense-tied-bf16"),
        golden("mamba2/tied"),
        golden("granite-moe-hybrid/moe-rope-shards"),
        // A bias that only the file has.
        golden("mamba2/groups-infinity"),
        // Multipliers that the file's weights hold: in F32, BF16 and F16.
        golden("falcon-h1/norm-groups-shards"),
        golden("falcon-h1/plain-gate"),
        golden("falcon-h1/rope-linear"),
        golden("plamo2/window"),
        golden("plamo2/step4-untied"),
    ]
    .into_iter()
    .enumerate()
    {
        let file = room.path(&format!("{i}.gguf"));
        let there = ConvertOptions {
            gguf: true,
            ..options(from(&source, None), file.clone())
        };
        convert(&there, &mut Silent::default(), &mut Quiet).unwrap_or_else(|e| panic!("{e}"));
        let back = room.path(&format!("{i}"));
        let gguf = from(&file.display().to_string(), None);
        let converted = convert(
            &options(gguf, back.clone()),
            &mut Silent::default(),
            &mut Quiet,
        );
        converted.unwrap_or_else(|e| panic!("{source}: {e}"));
        let expected = bytes(Path::new(&source));
        let found = bytes(&back);
        let names =
            |of: &[(String, Vec<u8>)]| -> Vec<String> { of.iter().map(|t| t.0.clone()).collect() };
        assert_eq!(names(&found), names(&expected), "{source}");
        assert!(found == expected, "{source}: other bytes");
        let config = |folder: &Path| std::fs::read_to_string(folder.join("config.json")).unwrap();
        assert_eq!(config(&back), config(Path::new(&source)));
        // It runs as it is, though a factor may lie in the weights.
        let of = |model: &Path| {
            logits(&LoadOptions {
                dtype: Some(DType::F32),
                ..from(&model.display().to_string(), None)
            })
        };
        let (ours, theirs) = (of(&file), of(Path::new(&source)));
        let far = |(a, b): (&f32, &f32)| (a - b).abs();
        let worst = ours.iter().zip(&theirs).map(far).fold(0.0, f32::max);
        assert!(worst < 1e-3, "{source}: off by {worst}");
    }
}

#[test]
fn a_quantised_gguf_file_runs_as_the_model_quantised_while_loading() {
    let room = Room::new("convert-quantised");
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model-cards/demo");
    let demo = demo.display().to_string();
    for name in ["q8_0", "q4_k_m"] {
        let recipe = strata::recipe::Recipe::find(name).unwrap();
        let file = room.path(&format!("{name}.gguf"));
        let there = ConvertOptions {
            gguf: true,
            quantize: Some(recipe.clone()),
            ..options(from(&demo, None), file.clone())
        };
        convert(&there, &mut Silent::default(), &mut Quiet).unwrap_or_else(|e| panic!("{e}"));
        let loaded = LoadOptions {
            quantize: Some(recipe),
            ..from(&demo, None)
        };
        let (found, expected) = (
            logits(&from(&file.display().to_string(), None)),
            logits(&loaded),
        );
        assert!(found == expected, "{name}");
        assert!(
            expected != logits(&from(&demo, None)),
            "{name} changes something"
        );
    }
}

#[test]
fn int8_runs_close_to_what_it_is_made_from_and_is_no_gguf_file() {
    let recipe = strata::recipe::Recipe::find("int8").unwrap();
    let quantised = LoadOptions {
        quantize: Some(recipe.clone()),
        ..from("demo", None)
    };
    let (plain, found) = (logits(&from("demo", None)), logits(&quantised));
    let square = |x: f32, y: f32| f64::from(x - y).powi(2);
    let size: f64 = plain.iter().map(|x| square(*x, 0.0)).sum();
    let error: f64 = plain.iter().zip(&found).map(|(x, y)| square(*x, *y)).sum();
    let error = (error / size).sqrt();
    assert!(error > 0.0 && error < 0.05, "{error}");
    // Threads change nothing.
    let alone = LoadOptions {
        threads: Some(1),
        ..quantised
    };
    assert!(logits(&alone) == found);

    let room = Room::new("convert-int8");
    let file = room.path("demo.gguf");
    let there = ConvertOptions {
        gguf: true,
        quantize: Some(recipe),
        ..options(from("demo", None), file.clone())
    };
    let error = convert(&there, &mut Silent::default(), &mut Quiet).unwrap_err();
    let error = error.to_string();
    let says = |part: &str| error.contains(part);
    assert!(says("q8_0") && says("folder of safetensors"), "{error}");
    assert!(!file.exists());
}

#[test]
fn what_is_there_stays_unless_forced() {
    let room = Room::new("convert-force");
    let (source, to) = (golden("mamba/tied"), room.path("model"));
    let once = options(from(&source, None), to.clone());
    convert(&once, &mut Silent::default(), &mut Quiet).unwrap();
    let error = convert(&once, &mut Silent::default(), &mut Quiet).unwrap_err();
    assert!(error.to_string().contains("--force"), "{error}");
    let forced = ConvertOptions {
        force: true,
        dtype: Some(DType::BF16),
        ..once
    };
    convert(&forced, &mut Silent::default(), &mut Quiet).unwrap();
    let halves = bytes(&to)
        .iter()
        .filter(|(n, _)| n.contains("BF16"))
        .count();
    assert!(halves > 0, "matrices are in bf16 now");
    // Small weights keep what they have.
    assert!(bytes(&to).iter().any(|(n, _)| n.contains("A_log F32")));
    let config = std::fs::read_to_string(to.join("config.json")).unwrap();
    assert!(!config.contains("float32"), "{config}");
}

/// Converts a golden by a plan whose stack has been edited. The config.json of the result, and whether there
/// is a plan.yaml.
fn edited(room: &Room, name: &str, edit: impl Fn(&mut Vec<String>)) -> (serde_json::Value, bool) {
    let source = golden(name);
    let planned = strata::load::plan(&from(&source, None), &mut Silent::default()).unwrap();
    let text = planned.plan.print();
    let (before, rest) = text.split_once("stack:\n").unwrap();
    let places = rest.lines().take_while(|l| l.starts_with("  - "));
    let mut places: Vec<String> = places.map(ToString::to_string).collect();
    let after: Vec<&str> = rest.lines().skip(places.len()).collect();
    edit(&mut places);
    let plan = format!(
        "{before}stack:\n{}\n{}\n",
        places.join("\n"),
        after.join("\n")
    );
    let file = room.path("edited.yaml");
    std::fs::write(&file, plan).unwrap();
    let to = room.path("edited");
    let _ = std::fs::remove_dir_all(&to);
    let given = from(&source, Some(file));
    convert(
        &options(given.clone(), to.clone()),
        &mut Silent::default(),
        &mut Quiet,
    )
    .unwrap_or_else(|e| panic!("{e}"));
    let found = logits(&from(&to.display().to_string(), None));
    assert!(found == logits(&given), "{name}: another model");
    let config = std::fs::read_to_string(to.join("config.json")).unwrap();
    let plan = to.join("plan.yaml").exists();
    (serde_json::from_str(&config).unwrap(), plan)
}

#[test]
fn the_config_says_an_edited_stack_where_it_can() {
    let room = Room::new("convert-solve");
    let (config, plan) = edited(&room, "jamba/moe-shards", |s| drop(s.remove(0)));
    assert!(!plan);
    let keys = [
        "num_hidden_layers",
        "attn_layer_offset",
        "expert_layer_offset",
        "expert_layer_period",
    ];
    let found: Vec<i64> = keys.iter().map(|k| config[k].as_i64().unwrap()).collect();
    assert_eq!(found, [4, 1, 0, 2]);
    let (config, plan) = edited(&room, "nemotron-h/dense", |s| s.reverse());
    assert!(!plan);
    assert_eq!(config["hybrid_override_pattern"], "-M*-MM-*M-M");
    let (config, plan) = edited(&room, "granite-moe-hybrid/dense-nope", |s| s.swap(0, 2));
    assert!(!plan);
    let words = ["attention", "mamba", "mamba", "mamba", "attention"];
    assert_eq!(config["layer_types"], serde_json::json!(words));
    let (config, plan) = edited(&room, "bamba/half-rotary-shards", |s| s.swap(0, 1));
    assert!(!plan);
    assert_eq!(config["attn_layer_indices"], serde_json::json!([0, 4]));
    // Two attention layers in a row have no period.
    let (config, plan) = edited(&room, "jamba/moe-shards", |s| s.insert(2, s[2].clone()));
    assert!(plan);
    assert_eq!(config["num_hidden_layers"], 5, "it stays as it was");
}

/// The places of a printed plan's stack.
fn places(plan: &str) -> Vec<&str> {
    let (_, stack) = plan.split_once("stack:\n").unwrap();
    let places = stack.lines().map_while(|l| l.strip_prefix("  - "));
    places.collect()
}

/// The plan with other places in its stack, and without the blocks that none uses.
fn with_stack(plan: &str, edit: &[String]) -> String {
    let (head, stack) = plan.split_once("stack:\n").unwrap();
    let before = places(plan);
    let rest: Vec<&str> = stack.lines().skip(before.len()).collect();
    let lines: String = edit.iter().map(|p| format!("  - {p}\n")).collect();
    let mut plan = format!("{head}stack:\n{lines}{}\n", rest.join("\n"));
    let block = |place: &str| place.split('@').next().unwrap().to_string();
    let used: Vec<String> = edit.iter().map(|p| block(p)).collect();
    for unused in before.iter().map(|p| block(p)) {
        if !used.contains(&unused) {
            plan = without_block(&plan, &unused);
        }
    }
    plan
}

/// Adapters of shared blocks, and layers of which each has another part of a tensor, have no names but by their
/// places in the family's own stack: elsewhere they keep the plan's.
#[test]
fn what_a_family_cannot_name_in_an_edited_stack_has_the_plans_name() {
    let room = Room::new("convert-own-names");
    for family in [
        "zamba2/one-block-adapters",
        "zamba2/two-blocks-rope",
        "zamba2/two-blocks-shards",
        "hymba/memory-tokens",
    ] {
        let source = golden(family);
        let planned = strata::load::plan(&from(&source, None), &mut Silent::default()).unwrap();
        let text = planned.plan.print();
        let stack: Vec<String> = places(&text).into_iter().map(ToString::to_string).collect();
        let last = stack.last().unwrap().clone();
        let edits = [
            [&stack[..], &[last.clone()][..]].concat(),
            stack[1..].to_vec(),
            [&[last][..], &stack[..]].concat(),
            [&stack[..], &stack[..]].concat(),
        ];
        let mut named = 0;
        for (i, edit) in edits.iter().enumerate() {
            let at = format!("{}-{i}", family.replace('/', "-"));
            let file = room.path(&format!("{at}.yaml"));
            std::fs::write(&file, with_stack(&text, edit)).unwrap();
            let edited = from(&source, Some(file));
            let to = room.path(&at);
            convert(
                &options(edited.clone(), to.clone()),
                &mut Silent::default(),
                &mut Quiet,
            )
            .unwrap_or_else(|e| panic!("{family}: {e}"));
            let found = logits(&from(&to.display().to_string(), None));
            assert!(found == logits(&edited), "{family} {edit:?}");
            let tensors = bytes(&to);
            named += usize::from(tensors.iter().any(|(name, _)| name.starts_with("blocks.")));
            assert!(to.join("plan.yaml").exists());
        }
        assert!(named > 0, "{family}");
    }
}

#[test]
fn an_edited_plan_leaves_a_checkpoint_that_is_the_same_model() {
    let room = Room::new("convert-plan");
    let source = golden("jamba/moe-shards");
    let planned = strata::load::plan(&from(&source, None), &mut Silent::default()).unwrap();
    let text = planned.plan.print();
    let places = places(&text);
    let block = |i: usize| places[i].split('@').next().unwrap();
    // Dropped, moved, used twice, merged, new.
    let same = (1..places.len()).find(|i| block(*i) == block(0)).unwrap();
    let edits = [
        places[1..]
            .to_vec()
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>(),
        vec![places[1].into(), places[0].into(), places[0].into()],
        vec![format!("{}@0+{same}", block(0)), places[1].to_string()],
        vec![
            places[0].into(),
            format!("{}@new", block(1)),
            format!("{}@new", block(0)),
        ],
    ];
    for (i, edit) in edits.iter().enumerate() {
        let plan = with_stack(&text, edit);
        let file = room.path(&format!("plan{i}.yaml"));
        std::fs::write(&file, &plan).unwrap();
        let edited = from(&source, Some(file));
        let to = room.path(&format!("model{i}"));
        let converted = convert(
            &options(edited.clone(), to.clone()),
            &mut Silent::default(),
            &mut Quiet,
        );
        let converted = converted.unwrap_or_else(|e| panic!("{e}\n{plan}"));
        let told = converted
            .notes
            .iter()
            .any(|n| n.contains("drawn with seed 0"));
        assert_eq!(
            told,
            edit.iter().any(|p| p.ends_with("@new")),
            "{:?}",
            converted.notes
        );
        let found = logits(&from(&to.display().to_string(), None));
        let expected = logits(&edited);
        assert_eq!(found.len(), expected.len());
        let worst = found
            .iter()
            .zip(&expected)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        // A of a new block goes to the file as its logarithm, and comes back rounded.
        let room = if told { 1e-4 } else { 0.0 };
        assert!(worst <= room, "{edit:?}: off by {worst}");
    }
}

/// A printed plan without one of its blocks.
fn without_block(plan: &str, block: &str) -> String {
    let mut lines = Vec::new();
    let mut inside = false;
    for line in plan.lines() {
        if line.starts_with("  ") && !line.starts_with("   ") {
            inside = line.trim_end() == format!("  {block}:");
        } else if !line.starts_with(' ') {
            inside = false;
        }
        if !inside {
            lines.push(line);
        }
    }
    lines.join("\n") + "\n"
}
