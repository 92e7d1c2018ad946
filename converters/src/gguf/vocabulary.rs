//! A model's tokenizer as GGUF metadata.

use serde_json::{Map, Value as Json};

use super::builder::Builder;
use super::pre;
use crate::error::{Error, Result};
use crate::files::ModelFiles;

/// Writes the tokenizer of `files` for a vocabulary of `vocab`. What is worth telling: one that GGUF has no
/// words for is left out, and the file then takes ids only.
pub(super) fn write(
    files: &ModelFiles,
    vocab: usize,
    architecture: &str,
    header: &mut Builder,
) -> Result<Option<String>> {
    header.uint(&format!("{architecture}.vocab_size"), vocab as u32);
    let object = |name: &str| -> Result<Map<String, Json>> {
        let Some(text) = files.text(name)? else {
            return Ok(Map::new());
        };
        match serde_json::from_str(&text) {
            Ok(Json::Object(object)) => Ok(object),
            Ok(_) => Err(Error::file(files.label(name), "is no JSON object")),
            Err(e) => Err(Error::file(files.label(name), e.to_string())),
        }
    };
    let generation = object("generation_config.json")?;
    let Some(text) = files.text("tokenizer.json")? else {
        header.text("tokenizer.ggml.model", "none");
        ids(&generation, &Map::new(), &[], header);
        let others = ["tokenizer.jsonl", "tokenizer.model", "vocab.json"];
        let other = others.iter().find(|name| files.exists(name));
        return Ok(other.map(|name| {
            format!("the tokenizer is left out, as only tokenizer.json is written: {name} is all there is; the file takes token ids")
        }));
    };
    let tokenizer = object("tokenizer.json")?;
    let config = object("tokenizer_config.json")?;
    header.text("tokenizer.huggingface.json", &text);
    let made = vocabulary(&tokenizer, vocab, header);
    let (tokens, note) = match made {
        Ok(tokens) => (tokens, None),
        Err(why) => {
            header.text("tokenizer.ggml.model", "none");
            let note = format!("the tokenizer is left out for llama.cpp: {why}");
            (Vec::new(), Some(note))
        }
    };
    ids(&generation, &config, &tokens, header);
    for name in ["bos", "eos"] {
        if let Some(Json::Bool(adds)) = config.get(&format!("add_{name}_token")) {
            header.truth(&format!("tokenizer.ggml.add_{name}_token"), *adds);
        }
    }
    if let Some(Json::String(template)) = config.get("chat_template") {
        header.text("tokenizer.chat_template", template);
    }
    if let Some(template) = files.text("chat_template.jinja")? {
        header.text("tokenizer.chat_template", &template);
    }
    Ok(note)
}

/// The numbers of the special tokens: by their texts, else as generation_config.json has them.
fn ids(
    generation: &Map<String, Json>,
    config: &Map<String, Json>,
    tokens: &[String],
    header: &mut Builder,
) {
    let names = [
        ("bos", "bos"),
        ("eos", "eos"),
        ("padding", "pad"),
        ("unknown", "unk"),
    ];
    for (name, key) in names {
        let text = match config.get(&format!("{key}_token")) {
            Some(Json::String(text)) => Some(text.as_str()),
            Some(Json::Object(token)) => token.get("content").and_then(Json::as_str),
            _ => None,
        };
        let by_text = text.and_then(|t| tokens.iter().position(|token| token == t));
        let said = match generation.get(&format!("{key}_token_id")) {
            Some(Json::Array(list)) => list.first().and_then(Json::as_u64),
            Some(one) => one.as_u64(),
            None => None,
        };
        let id = by_text.map(|id| id as u64).or(said);
        if let Some(id) = id.and_then(|id| u32::try_from(id).ok()) {
            header.uint(&format!("tokenizer.ggml.{name}_token_id"), id);
        }
    }
}

/// Tokens, their types and merges. The tokens, or why GGUF has no words for them.
fn vocabulary(
    tokenizer: &Map<String, Json>,
    vocab: usize,
    header: &mut Builder,
) -> std::result::Result<Vec<String>, String> {
    let tokenizer = Json::Object(tokenizer.clone());
    let model = &tokenizer["model"];
    let Json::Object(words) = &model["vocab"] else {
        return Err("its model has no vocabulary of words".into());
    };
    if model["type"] != "BPE" {
        return Err(format!("its model is {}, not BPE", model["type"]));
    }
    let mut tokens: Vec<Option<(String, i32)>> = vec![None; vocab];
    let mut put = |id: u64, token: &str, class: i32| {
        let place = usize::try_from(id).ok().and_then(|id| tokens.get_mut(id));
        match place {
            Some(place) => {
                *place = Some((token.into(), class));
                Ok(())
            }
            None => Err(format!("token {id} lies beyond the {vocab} of the model")),
        }
    };
    for (token, id) in words {
        let byte = token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
        put(
            id.as_u64().unwrap_or(u64::MAX),
            token,
            if byte { 6 } else { 1 },
        )?;
    }
    for token in tokenizer["added_tokens"].as_array().into_iter().flatten() {
        let text = token["content"].as_str().unwrap_or_default();
        let class = if token["special"] == true { 3 } else { 4 };
        put(token["id"].as_u64().unwrap_or(u64::MAX), text, class)?;
    }
    let mut merges = Vec::new();
    for merge in model["merges"].as_array().into_iter().flatten() {
        let pair = match merge {
            Json::String(text) => text.clone(),
            Json::Array(pair) => {
                let part = |i: usize| pair.get(i).and_then(Json::as_str).unwrap_or_default();
                format!("{} {}", part(0), part(1))
            }
            _ => return Err("a merge is no pair".into()),
        };
        merges.push(pair);
    }
    let scored = model["byte_fallback"] == true;
    if scored {
        let mut best = std::collections::HashMap::new();
        for (rank, merge) in merges.iter().enumerate() {
            best.entry(merge.replacen(' ', "", 1))
                .or_insert(rank as f32);
        }
        // Those that no merge makes come last.
        let score = |t: &Option<(String, i32)>| {
            let rank = t.as_ref().and_then(|(t, _)| best.get(t));
            -rank.copied().unwrap_or(1e6)
        };
        let scores: Vec<f32> = tokens.iter().map(score).collect();
        header.text("tokenizer.ggml.model", "llama");
        header.text("tokenizer.ggml.pre", "default");
        header.floats("tokenizer.ggml.scores", &scores);
        let prefix = tokenizer["normalizer"].to_string().contains("\"Prepend\"")
            || tokenizer["pre_tokenizer"]["prepend_scheme"] == "always";
        header.truth("tokenizer.ggml.add_space_prefix", prefix);
    } else {
        let pre = pre::of(&tokenizer["pre_tokenizer"], merges.is_empty())?;
        header.text("tokenizer.ggml.model", "gpt2");
        header.text("tokenizer.ggml.pre", pre);
        header.texts("tokenizer.ggml.merges", merges.iter().map(String::as_str));
    }
    let unused = |(id, t): (usize, Option<(String, i32)>)| t.unwrap_or((format!("[PAD{id}]"), 5));
    let tokens: Vec<(String, i32)> = tokens.into_iter().enumerate().map(unused).collect();
    header.texts("tokenizer.ggml.tokens", tokens.iter().map(|t| t.0.as_str()));
    let classes: Vec<i32> = tokens.iter().map(|t| t.1).collect();
    header.ints("tokenizer.ggml.token_type", &classes);
    Ok(tokens.into_iter().map(|t| t.0).collect())
}
