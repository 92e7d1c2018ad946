//! The tokenizer of a GGUF file, as the text files that a model's folder would have.
//!
//! Two kinds are read: `gpt2`, merges over bytes, and `llama`, merges over characters that SentencePiece
//! scored. A file that carries its `tokenizer.json` gives that.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value as Json, json};

use super::{Gguf, pre};

/// Most tokens. The largest vocabularies have some hundred thousand.
const MAX_TOKENS: usize = 1 << 22;
/// Longest token whose parts are looked for.
const MAX_PARTS: usize = 512;

/// The files, and why there is no tokenizer if there should be one.
#[derive(Default)]
pub(super) struct Texts {
    pub files: BTreeMap<&'static str, String>,
    pub fault: Option<String>,
}

/// What a token is, by its number in files.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl Class {
    fn numbered(number: i64) -> Class {
        match number {
            2 => Class::Unknown,
            3 => Class::Control,
            4 => Class::UserDefined,
            5 => Class::Unused,
            6 => Class::Byte,
            _ => Class::Normal,
        }
    }
}

/// The files that the metadata stands for.
pub(super) fn texts(gguf: &Gguf) -> Texts {
    let mut texts = Texts::default();
    if let Some(text) = generation(gguf) {
        texts.files.insert("generation_config.json", text);
    }
    let kind = match gguf.text("tokenizer.ggml.model") {
        None | Some("none" | "no_vocab") => return texts,
        Some(kind) => kind,
    };
    let made = Vocabulary::read(gguf).and_then(|vocabulary| {
        let made = match (gguf.text("tokenizer.huggingface.json"), kind) {
            (Some(text), _) => Made {
                json: text.into(),
                bos: false,
            },
            (None, "gpt2") => byte_level(gguf, &vocabulary)?,
            (None, "llama") => scored(gguf, &vocabulary),
            (None, other) => {
                return Err(format!(
                    "tokenizer.ggml.model is {other:?}; gpt2 and llama are read"
                ));
            }
        };
        Ok((config(gguf, &vocabulary, made.bos), made.json))
    });
    match made {
        Ok((config, json)) => {
            texts.files.insert("tokenizer_config.json", config);
            texts.files.insert("tokenizer.json", json);
        }
        Err(why) => texts.fault = Some(why),
    }
    texts
}

/// A tokenizer.json, and whether its texts begin with BOS where the file does not say.
struct Made {
    json: String,
    bos: bool,
}

/// The tokens.
struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    classes: Vec<Class>,
}

impl<'a> Vocabulary<'a> {
    fn read(gguf: &'a Gguf) -> Result<Self, String> {
        let Some((count, mut items)) = gguf.items("tokenizer.ggml.tokens") else {
            return Err("there is no list tokenizer.ggml.tokens".into());
        };
        if count > MAX_TOKENS {
            return Err(format!("{count} tokens; {MAX_TOKENS} are read"));
        }
        let mut tokens = Vec::new();
        while let Some(bytes) = items.text() {
            let token = std::str::from_utf8(bytes);
            tokens.push(token.map_err(|_| format!("token {} is not UTF-8", tokens.len()))?);
        }
        if tokens.len() != count {
            return Err("tokenizer.ggml.tokens holds no texts".into());
        }
        let classes = match gguf.items("tokenizer.ggml.token_type") {
            Some((n, _)) if n != count => {
                return Err(format!("there are {count} tokens, but the types of {n}"));
            }
            Some((_, items)) => items
                .map(|v| match v {
                    super::Value::Int(n) => Class::numbered(n),
                    _ => Class::Normal,
                })
                .collect(),
            None => vec![Class::Normal; count],
        };
        if classes.len() != count {
            return Err("tokenizer.ggml.token_type holds no numbers".into());
        }
        Ok(Vocabulary { tokens, classes })
    }

    /// The token whose number is under a key, such as `bos`.
    fn named(&self, gguf: &Gguf, name: &str) -> Option<&'a str> {
        let id = gguf.int(&format!("tokenizer.ggml.{name}_token_id"))?;
        self.tokens.get(usize::try_from(id).ok()?).copied()
    }

    /// Tokens, numbers and classes. What only fills a vocabulary up is left out.
    fn each(&self) -> impl Iterator<Item = (usize, &'a str, Class)> {
        let all = self.tokens.iter().zip(&self.classes).enumerate();
        all.map(|(id, (token, class))| (id, *token, *class))
            .filter(|(id, token, class)| *class != Class::Unused || *token != format!("[PAD{id}]"))
    }

    fn json(&self) -> Json {
        let each = self.each();
        Json::Object(each.map(|(id, t, _)| (t.into(), json!(id))).collect())
    }

    /// Control tokens are special; those that users added are words.
    fn added(&self) -> Json {
        let of = |(id, token, class): (usize, &str, Class)| {
            let special = match class {
                Class::Control | Class::Unknown => true,
                Class::UserDefined => false,
                Class::Normal | Class::Unused | Class::Byte => return None,
            };
            Some(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": special,
            }))
        };
        self.each().filter_map(of).collect()
    }
}

/// `gpt2`: merges over bytes, within words.
fn byte_level(gguf: &Gguf, vocabulary: &Vocabulary<'_>) -> Result<Made, String> {
    let name = gguf.text("tokenizer.ggml.pre").unwrap_or("default");
    let cut = pre::named(name)?;
    let mut merges = Vec::new();
    if let Some((_, mut items)) = gguf.items("tokenizer.ggml.merges") {
        while let Some(bytes) = items.text() {
            let text = std::str::from_utf8(bytes).unwrap_or_default();
            // A space parts the two; the first character may be one.
            let first = text.chars().next().map_or(0, char::len_utf8);
            let at = text[first..].find(' ').map(|at| at + first);
            let Some((left, right)) = at.map(|at| (&text[..at], &text[at + 1..])) else {
                return Err(format!("merge {} is no pair of tokens", merges.len()));
            };
            merges.push(json!([left, right]));
        }
    }
    let split = |regex: &String| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let mut steps: Vec<Json> = cut.cuts.iter().map(split).collect();
    steps.push(bytes(false));
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": vocabulary.added(),
        "normalizer": cut.normalizer.as_ref().map(|name| json!({"type": name})),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": null,
        "decoder": bytes(true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": cut.whole_words, "vocab": vocabulary.json(), "merges": merges,
        },
    });
    Ok(Made {
        json: json.to_string(),
        bos: cut.bos,
    })
}

/// `llama`: of all pairs whose union is a token, the one with the best token is merged first.
fn scored(gguf: &Gguf, vocabulary: &Vocabulary<'_>) -> Made {
    let scores: Vec<f64> = match gguf.items("tokenizer.ggml.scores") {
        Some((_, items)) => items
            .map(|v| match v {
                super::Value::Float(f) => f,
                super::Value::Int(n) => n as f64,
                _ => 0.0,
            })
            .collect(),
        None => Vec::new(),
    };
    let score = |id: usize| scores.get(id).copied().unwrap_or(0.0);
    let parts =
        |(_, _, class): &(usize, &str, Class)| matches!(class, Class::Normal | Class::UserDefined);
    let ids: HashMap<&str, usize> = vocabulary
        .each()
        .filter(parts)
        .map(|(id, token, _)| (token, id))
        .collect();
    let mut wholes: Vec<(usize, &str)> = vocabulary
        .each()
        .filter(|t| parts(t) && t.1.len() <= MAX_PARTS)
        .map(|(id, token, _)| (id, token))
        .collect();
    // Where the scores say nothing the order of the tokens does, which is that of their training.
    wholes.sort_by(|a, b| score(b.0).total_cmp(&score(a.0)).then(a.0.cmp(&b.0)));
    let mut merges = Vec::new();
    for (_, token) in wholes {
        let mut pairs: Vec<(usize, usize, usize)> = token
            .char_indices()
            .skip(1)
            .filter_map(|(at, _)| Some((*ids.get(&token[..at])?, *ids.get(&token[at..])?, at)))
            .collect();
        pairs.sort_unstable();
        merges.extend(
            pairs
                .into_iter()
                .map(|(_, _, at)| json!([&token[..at], &token[at..]])),
        );
    }
    let prefix = gguf
        .truth("tokenizer.ggml.add_space_prefix")
        .unwrap_or(true);
    let space = json!({"String": " "});
    let mut normalizers = Vec::new();
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.push(json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    normalizers.push(json!({"type": "Replace", "pattern": space, "content": "▁"}));
    let bytes = vocabulary.each().any(|(_, token, _)| token == "<0x00>");
    let unknown = vocabulary.named(gguf, "unknown").or_else(|| {
        let mut each = vocabulary.each();
        each.find(|t| t.2 == Class::Unknown).map(|t| t.1)
    });
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": vocabulary.added(),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": bytes,
            "ignore_merges": false, "vocab": vocabulary.json(), "merges": merges,
        },
    });
    Made {
        json: json.to_string(),
        bos: true,
    }
}

/// `tokenizer_config.json`.
fn config(gguf: &Gguf, vocabulary: &Vocabulary<'_>, bos: bool) -> String {
    let mut config = Map::new();
    let names = [
        ("bos", "bos_token"),
        ("eos", "eos_token"),
        ("unknown", "unk_token"),
        ("padding", "pad_token"),
        ("seperator", "sep_token"),
        ("mask", "mask_token"),
    ];
    for (name, key) in names {
        if let Some(token) = vocabulary.named(gguf, name) {
            config.insert(key.into(), token.into());
        }
    }
    let adds = |name: &str, default: bool| {
        let said = gguf.truth(&format!("tokenizer.ggml.add_{name}_token"));
        Json::from(said.unwrap_or(default))
    };
    config.insert("add_bos_token".into(), adds("bos", bos));
    config.insert("add_eos_token".into(), adds("eos", false));
    const TEMPLATE: &str = "tokenizer.chat_template";
    let named: Vec<Json> = gguf
        .metadata
        .keys()
        .filter_map(|key| {
            let name = key.strip_prefix(TEMPLATE)?.strip_prefix('.')?;
            Some(json!({"name": name, "template": gguf.text(key)?}))
        })
        .collect();
    match (gguf.text(TEMPLATE), named.is_empty()) {
        (Some(only), true) => {
            config.insert("chat_template".into(), only.into());
        }
        (default, false) => {
            let default = default.map(|t| json!({"name": "default", "template": t}));
            let all: Vec<Json> = default.into_iter().chain(named).collect();
            config.insert("chat_template".into(), all.into());
        }
        (None, true) => {}
    }
    Json::Object(config).to_string()
}

/// `generation_config.json`: the tokens that end a text.
fn generation(gguf: &Gguf) -> Option<String> {
    let id = |name: &str| {
        let id = gguf.int(&format!("tokenizer.ggml.{name}_token_id"))?;
        u32::try_from(id).ok()
    };
    let mut ends: Vec<u32> = ["eos", "eot", "eom"].into_iter().filter_map(id).collect();
    ends.dedup();
    let mut config = Map::new();
    if !ends.is_empty() {
        config.insert("eos_token_id".into(), ends.into());
    }
    for (name, key) in [("bos", "bos_token_id"), ("padding", "pad_token_id")] {
        if let Some(id) = id(name) {
            config.insert(key.into(), id.into());
        }
    }
    (!config.is_empty()).then(|| Json::Object(config).to_string())
}
