//! GGUF files that lie: each fault is told, and nothing is sized by what they say.

use std::path::PathBuf;

use strata_converters::{Checkpoint, Gguf, ModelFiles};

/// Makes the bytes of a file.
#[derive(Default, Clone)]
struct Maker {
    metadata: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    data: usize,
}

fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

fn u32s(n: u32) -> Vec<u8> {
    n.to_le_bytes().to_vec()
}

fn u64s(n: u64) -> Vec<u8> {
    n.to_le_bytes().to_vec()
}

/// A value of a type, behind its key.
fn entry(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [text(key), u32s(kind), value.to_vec()].concat()
}

fn tensor(name: &str, sizes: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let sizes: Vec<u8> = sizes.iter().flat_map(|n| n.to_le_bytes()).collect();
    let rank = (sizes.len() / 8) as u32;
    [text(name), u32s(rank), sizes, u32s(kind), u64s(offset)].concat()
}

impl Maker {
    fn entry(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        self.metadata.push(entry(key, kind, value));
        self
    }

    fn tensor(mut self, name: &str, sizes: &[u64], kind: u32, offset: u64) -> Self {
        self.tensors.push(tensor(name, sizes, kind, offset));
        self
    }

    fn data(mut self, bytes: usize) -> Self {
        self.data = bytes;
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let counts = [self.tensors.len() as u64, self.metadata.len() as u64];
        let mut out = [b"GGUF".to_vec(), u32s(3), u64s(counts[0]), u64s(counts[1])].concat();
        self.metadata
            .iter()
            .chain(&self.tensors)
            .for_each(|b| out.extend(b));
        out.resize(out.len().next_multiple_of(32), 0);
        out.resize(out.len() + self.data, 0);
        out
    }
}

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("strata-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        Folder(folder)
    }

    fn open(&self, bytes: &[u8]) -> Result<Gguf, String> {
        let path = self.0.join("x.gguf");
        std::fs::write(&path, bytes).unwrap();
        Gguf::open(&path).map_err(|e| e.to_string())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

fn whole() -> Maker {
    Maker::default()
        .entry("general.architecture", 8, &text("nothing"))
        .entry("a.list", 9, &[u32s(4), u64s(2), u32s(7), u32s(9)].concat())
        .tensor("w", &[32, 2], 8, 0)
        .tensor("v", &[8], 0, 96)
        .data(96 + 32)
}

#[test]
fn a_whole_file_opens_and_every_cut_is_told() {
    let folder = Folder::new("gguf-cuts");
    let bytes = whole().bytes();
    let gguf = folder.open(&bytes).unwrap();
    assert_eq!(gguf.architecture(), Some("nothing"));
    let checkpoint = Checkpoint::open(&ModelFiles::open(&folder.0).unwrap()).unwrap();
    let w = checkpoint.get("w").unwrap();
    assert_eq!((w.dtype.as_str(), &w.shape[..]), ("Q8_0", &[2, 32][..]));
    assert_eq!(checkpoint.tensor("v").unwrap().to_f32(), [0.0; 8]);
    let why = strata_converters::Config::open(&ModelFiles::open(&folder.0).unwrap());
    let why = why.unwrap_err().to_string();
    assert!(
        why.contains("no model card is for the architecture \"nothing\""),
        "{why}"
    );
    for cut in 0..bytes.len() {
        assert!(folder.open(&bytes[..cut]).is_err(), "cut at {cut}");
    }
}

#[test]
fn any_byte_of_a_header_may_be_wrong() {
    let folder = Folder::new("gguf-bytes");
    let mut bytes = whole().bytes();
    for at in 0..bytes.len() - 128 {
        for change in [0x01, 0x80, 0xff] {
            bytes[at] ^= change;
            // Refused, or another file; never a panic, and never a tensor outside.
            if let Ok(gguf) = folder.open(&bytes) {
                gguf.tokenizer_fault();
                let files = ModelFiles::gguf_file(&folder.0.join("x.gguf")).unwrap();
                let checkpoint = Checkpoint::open(&files).unwrap();
                for (name, info) in checkpoint.tensors() {
                    assert!(info.range.end <= bytes.len());
                    checkpoint.tensor(name).ok();
                }
            }
            bytes[at] ^= change;
        }
    }
}

#[test]
fn lies_are_told() {
    let folder = Folder::new("gguf-lies");
    let check = |bytes: &[u8], expected: &[&str]| {
        let why = folder.open(bytes).map(|_| ()).unwrap_err();
        for part in expected {
            assert!(why.contains(part), "{part}: {why}");
        }
    };
    let head = |version: u32, tensors: u64, entries: u64| {
        [
            b"GGUF".to_vec(),
            u32s(version),
            u64s(tensors),
            u64s(entries),
        ]
        .concat()
    };
    check(b"", &["0 bytes"]);
    check(b"PK\x03\x04aaaaaaaa", &["no GGUF file"]);
    check(&head(1, 0, 0), &["version 1"]);
    check(&head(9, 0, 0), &["GGUF version 9"]);
    check(&head(3u32.swap_bytes(), 0, 0), &["big endian"]);
    check(&head(3, u64::MAX, 0), &["18446744073709551615 tensors"]);
    check(&head(3, 0, 1 << 40), &["entries of metadata"]);
    check(&head(3, 0, 1 << 20), &["are left"]);
    let one = |kind: u32, value: Vec<u8>| Maker::default().entry("k", kind, &value).bytes();
    check(&one(13, vec![]), &["no type of values 13"]);
    check(&one(8, u64s(u64::MAX)), &["\"k\"", "are left"]);
    check(&one(7, vec![2]), &["truth value"]);
    check(&one(9, [u32s(0), u64s(u64::MAX)].concat()), &["are left"]);
    check(&one(9, [u32s(10), u64s(1 << 61)].concat()), &["are left"]);
    check(&one(9, [u32s(8), u64s(1 << 61)].concat()), &["are left"]);
    check(
        &one(9, [u32s(77), u64s(1)].concat()),
        &["no type of values 77"],
    );
    // Lists in lists in lists.
    let mut nested = [u32s(0), u64s(1), vec![7]].concat();
    for _ in 0..9 {
        nested = [u32s(9), u64s(1), nested].concat();
    }
    check(&one(9, nested), &["nested more than 8 deep"]);
    let empty = Maker::default().entry("", 0, &[1]).bytes();
    check(&empty, &["0 bytes; 1 to 1024"]);
    let long = Maker::default().entry(&"k".repeat(2000), 0, &[1]).bytes();
    check(&long, &["2000 bytes; 1 to 1024"]);
    let twice = Maker::default()
        .entry("k", 0, &[1])
        .entry("k", 0, &[1])
        .bytes();
    check(&twice, &["\"k\" twice"]);
    for bad in [0u32, 3, 1 << 30] {
        let bytes = Maker::default()
            .entry("general.alignment", 4, &u32s(bad))
            .bytes();
        check(&bytes, &["general.alignment is no power of two"]);
    }
    let text_alignment = Maker::default()
        .entry("general.alignment", 8, &text("x"))
        .bytes();
    check(&text_alignment, &["general.alignment is no power of two"]);

    // All faults of the tensors at once.
    let many = Maker::default()
        .tensor("far", &[8], 0, 1 << 40)
        .tensor("wraps", &[8], 0, u64::MAX - 31)
        .tensor("new", &[8], 99, 0)
        .tensor("cut", &[33], 8, 0)
        .tensor("huge", &[u64::MAX, u64::MAX], 0, 0)
        .tensor("none", &[0, 4], 0, 0)
        .tensor("odd", &[8], 0, 165)
        .tensor("a", &[16], 0, 0)
        .tensor("b", &[16], 0, 32)
        .tensor("b", &[8], 0, 96)
        .data(256)
        .bytes();
    check(
        &many,
        &[
            "\"far\": its 32 bytes at offset 1099511627776 lie outside",
            "\"wraps\"",
            "\"new\": there is no element type 99",
            "\"cut\": sizes [33] of Q8_0 are no whole blocks of 32",
            "\"huge\"",
            "\"none\"",
            "\"odd\": its offset 165 is no multiple of the alignment 32",
            "tensors \"a\" and \"b\" overlap",
            "\"b\": stands in the header twice",
        ],
    );
    let rank = Maker::default()
        .tensor("deep", &[1; 9], 0, 0)
        .data(32)
        .bytes();
    check(&rank, &["9 dimensions; 8 are allowed"]);
}

#[test]
fn sets_of_files_are_checked() {
    let folder = Folder::new("gguf-sets");
    let part = |number: u16, count: u16, name: &str| {
        Maker::default()
            .entry("split.no", 2, &number.to_le_bytes())
            .entry("split.count", 2, &count.to_le_bytes())
            .entry("split.tensors.count", 5, &u32s(2))
            .tensor(name, &[8], 0, 0)
            .data(32)
            .bytes()
    };
    let path = |n: usize| folder.0.join(format!("m-0000{n}-of-00002.gguf"));
    let write = |n: usize, bytes: Vec<u8>| std::fs::write(path(n), bytes).unwrap();
    let open = |n: usize| Gguf::open(&path(n)).map_err(|e| e.to_string());
    write(1, part(0, 2, "a"));
    assert!(open(1).unwrap_err().contains("m-00002-of-00002.gguf"));
    write(2, part(1, 2, "b"));
    for n in [1, 2] {
        assert_eq!(open(n).unwrap().name(), "m");
    }
    let files = ModelFiles::open(&folder.0).unwrap();
    assert_eq!(Checkpoint::open(&files).unwrap().tensors().count(), 2);
    write(2, part(0, 2, "b"));
    assert!(open(1).unwrap_err().contains("another file of its set"));
    write(2, part(1, 3, "b"));
    assert!(open(1).unwrap_err().contains("one of 3 files"));
    write(2, part(1, 2, "a"));
    assert!(open(1).unwrap_err().contains("\"a\" is in m-00001"));
}

#[test]
fn tokenizers_that_lie_are_no_tokenizers() {
    let folder = Folder::new("gguf-tokens");
    let list = |kind: u32, items: &[Vec<u8>]| {
        [u32s(kind), u64s(items.len() as u64), items.concat()].concat()
    };
    let tokens = list(8, &[text("a"), text("b"), text("ab")]);
    let with = |model: &str| {
        Maker::default()
            .entry("tokenizer.ggml.model", 8, &text(model))
            .entry("tokenizer.ggml.tokens", 9, &tokens)
    };
    let check = |maker: Maker, expected: &str| {
        let gguf = folder.open(&maker.bytes()).unwrap();
        let why = gguf.tokenizer_fault().unwrap_or_default().to_string();
        assert!(why.contains(expected), "{expected}: {why}");
    };
    check(
        with("unigram"),
        "tokenizer.ggml.model is \"unigram\"; gpt2 and llama are read",
    );
    check(
        with("gpt2").entry("tokenizer.ggml.pre", 8, &text("tomorrow")),
        "tokenizer.ggml.pre is \"tomorrow\"",
    );
    check(
        with("gpt2").entry("tokenizer.ggml.merges", 9, &list(8, &[text("ab")])),
        "merge 0 is no pair",
    );
    check(
        with("gpt2").entry("tokenizer.ggml.token_type", 9, &list(5, &[u32s(1)])),
        "there are 3 tokens, but the types of 1",
    );
    let bad = list(8, &[[u64s(1), vec![0xff]].concat()]);
    let model = Maker::default().entry("tokenizer.ggml.model", 8, &text("llama"));
    check(
        model.clone().entry("tokenizer.ggml.tokens", 9, &bad),
        "token 0 is not UTF-8",
    );
    check(model, "there is no list tokenizer.ggml.tokens");

    let fine = with("gpt2")
        .entry("tokenizer.ggml.pre", 8, &text("gpt-2"))
        .entry("tokenizer.ggml.merges", 9, &list(8, &[text("a b")]))
        .entry("tokenizer.ggml.eos_token_id", 4, &u32s(2));
    std::fs::write(folder.0.join("x.gguf"), fine.bytes()).unwrap();
    let files = ModelFiles::open(&folder.0).unwrap();
    let json = files.text("tokenizer.json").unwrap().unwrap();
    assert!(json.contains(r#""merges":[["a","b"]]"#), "{json}");
    let config = files.text("tokenizer_config.json").unwrap().unwrap();
    assert!(config.contains(r#""eos_token":"ab""#), "{config}");
}

mod written {
    use std::path::Path;
    use std::sync::Arc;

    use strata_converters::gguf::original;
    use strata_converters::gguf::write::{Input, Options, Written, write};
    use strata_converters::tensor_map::Source;
    use strata_converters::write::Quiet;
    use strata_converters::{Card, Checkpoint, Config, Gguf, Mapping, ModelFiles, Origin, cards};
    use strata_layers::{Graph, Plan};

    use super::Folder;

    /// A model's files, card, config, plan and weights.
    fn opened(files: &ModelFiles) -> (Card, Config, Plan, Mapping) {
        let config = Config::open(files).unwrap();
        let card = cards::find(&config).unwrap();
        let mut plan = card.plan(&config, "model").unwrap();
        let named = match files.gguf() {
            Some(_) => card.for_gguf().unwrap(),
            None => card.clone(),
        };
        let checkpoint = Arc::new(Checkpoint::open(files).unwrap());
        let bound = named.bound(&config).unwrap();
        strata_converters::mapping::untie(Some(&bound), &mut plan, &checkpoint);
        let weights = Graph::lower(&plan, "plan").unwrap().weights();
        let mapping = Mapping::resolve(Some(&bound), &weights, checkpoint, Origin::Card).unwrap();
        (card.clone(), config, plan, mapping)
    }

    fn written(files: &ModelFiles, to: &Path) -> Result<Written, String> {
        let (card, config, plan, mapping) = opened(files);
        let input = Input {
            files,
            card: &card,
            config: &config,
            plan: &plan,
            mapping: &mapping,
        };
        let options = Options {
            choose: &|_| None,
            weigh: &|_| None,
            threads: 2,
            force: false,
        };
        write(to, &input, &options, &mut Quiet).map_err(|e| e.to_string())
    }

    /// Where files stay for `check_llama_cpp.py`.
    fn kept(name: &str) -> std::path::PathBuf {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("gguf");
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join(format!("{name}.gguf"));
        std::fs::remove_file(&path).ok();
        path
    }

    #[test]
    fn weights_come_back_bit_for_bit() {
        for name in [
            "jamba/moe-shards",
            "jamba/dense-tied-bf16",
            "jamba/fused-experts",
            "mamba/tied",
            "mamba2/tied",
            "falcon-mamba/wide-expand",
            "granite-moe-hybrid/dense-nope",
            "granite-moe-hybrid/moe-rope-shards",
            "nemotron-h/dense",
            "nemotron-h/latent-experts",
            "nemotron-h/moe-groups-shards",
            "../../model-cards/demo",
        ] {
            let files = super::super::common::golden(name);
            let path = kept(&name.trim_start_matches("../").replace('/', "-"));
            let told = written(&files, &path).unwrap_or_else(|e| panic!("{name}: {e}"));
            println!("{name}: {told:?}");
            assert_eq!(
                told.bytes,
                std::fs::metadata(&path).unwrap().len(),
                "{name}"
            );
            let gguf = Gguf::open(&path).unwrap();
            let back = ModelFiles::gguf_file(&path).unwrap();
            let (_, _, plan, before) = opened(&files);
            let (_, _, plan_after, after) = opened(&back);
            assert_eq!(plan.stack, plan_after.stack, "{name}");
            for row in before.rows() {
                let [a, b] = [&before, &after].map(|m| m.load(&row.path).unwrap());
                assert_eq!(a.shape(), b.shape(), "{name}: {}", row.path);
                let bits = |x: &strata_kernels::HostTensor| -> Vec<u32> {
                    x.to_f32().iter().map(|v| v.to_bits()).collect()
                };
                assert_eq!(bits(&a), bits(&b), "{name}: {}", row.path);
                // And what the weight was computed from.
                if let Source::Call(transform, inner, _) = &row.source
                    && transform.name == "neg_exp"
                {
                    let was = inner.load(before.checkpoint()).unwrap();
                    let found = original::values(&gguf, &row.path, &b, &row.source, was.format());
                    let found: Vec<u32> = found.iter().map(|v| v.to_bits()).collect();
                    assert_eq!(bits(&was), found, "{name}: {}", row.path);
                }
            }
        }
    }

    #[test]
    fn what_gguf_cannot_say_is_refused_and_nothing_is_left() {
        let folder = Folder::new("gguf-refused");
        let to = folder.0.join("x.gguf");
        for (name, expected) in [
            ("mamba2/dt-limits-shards", "cannot say"),
            ("falcon-h1/norm-first", "cannot say"),
            ("zamba/shared", "no GGUF file"),
        ] {
            let files = super::super::common::golden(name);
            let why = written(&files, &to).unwrap_err();
            assert!(why.contains(expected), "{name}: {why}");
            assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 0, "{name}");
        }
        std::fs::write(&to, "x").unwrap();
        let why = written(&super::super::common::golden("mamba/tied"), &to).unwrap_err();
        assert!(why.contains("is there already"), "{why}");
    }
}
