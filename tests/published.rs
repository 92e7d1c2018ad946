//! What `strata plan estimate` says of published models, beside what is known of their files.
//!
//! `model-cards/configs` has a config for each row here. They hold the keys that matter, as published;
//! a value that nobody saw in a published file, and that only arithmetic makes likely, is named in its
//! row as inferred. Where no exact number is published, the count must round to the one that is.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use strata::estimate::{Estimate, estimate};
use strata::footprint::Footprint;
use strata::load::{LoadOptions, Silent, plan};
use strata::session::EngineConfig;
use strata_kernels::{DType, Format};

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model-cards/configs")
}

/// The estimate of a published config, in bf16, for one sequence of its whole context.
fn of(name: &str) -> Estimate {
    let options = LoadOptions {
        model: Some(configs().join(format!("{name}.json")).display().to_string()),
        ..LoadOptions::default()
    };
    let planned = plan(&options, &mut Silent::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(planned.plan.name, name);
    let config = EngineConfig::new(planned.plan.context, 1, DType::BF16);
    // Buffers are no matter of the published numbers.
    let none = Footprint::default();
    let format = Format::BF16;
    Estimate {
        unused_parameters: planned.unused.parameters,
        unused_tensors: planned.unused.tensors,
        ..estimate(&planned.graph, &config, &format.into(), &none, 1)
    }
}

/// Published models, and their parameters: all digits, or those that are published, in millions (M)
/// or thousands of millions (B).
const PARAMETERS: [(&str, &str); 67] = [
    // Jamba. Mini 1.6 and 1.7 and Jamba2-Mini are of the same sizes, Large 1.6 and 1.7 as well.
    ("jamba-v0.1", "51,570,323,328"),
    ("jamba-mini-1.5", "51,570,323,328"),
    // Inferred: intermediate_size and mamba_dt_rank, by the sum.
    ("jamba-large-1.5", "398,555,145,696"),
    // As the Q8_0 file of 3.17 GiB has it. One copy of the config says tie_word_embeddings, and would
    // have 3.03 B; inferred from the size: it is false.
    ("jamba-reasoning-3b", "3.197 B"),
    // Inferred for both: vocab_size, of which any number below 100 gives these digits.
    ("dayhoff-170m", "170.3 M"),
    ("dayhoff-3b", "2.98 B"),
    // Mamba in transformers' form.
    ("mamba-130m-hf", "129,135,360"),
    ("mamba-370m-hf", "371,516,416"),
    ("mamba-790m-hf", "793,204,224"),
    ("mamba-1.4b-hf", "1,372,178,432"),
    ("mamba-2.8b-hf", "2,768,345,600"),
    ("falcon-mamba-7b", "7.27 B"),
    // Inferred: the sizes, as those of falcon-mamba-7b.
    ("falcon3-mamba-7b", "7.3 B"),
    // Mamba-2 in transformers' form; 370m, 780m and 1.3b as their names say.
    ("mamba2-130m-hf", "128,989,632"),
    ("mamba2-370m-hf", "0.37 B"),
    ("mamba2-780m-hf", "780 M"),
    ("mamba2-1.3b-hf", "1.3 B"),
    ("mamba2-2.7b-hf", "2,702,599,680"),
    ("mamba-codestral-7b", "7,285,403,648"),
    // Mamba-3: 1.5b's d_intermediate was seen, 3824, where its tensors are 3840 wide. Inferred: the
    // others', as wide as the tensors. Of two the count is published, of the others it is a sum of shapes.
    ("mamba3-siso-187m", "186,849,600"),
    ("mamba3-siso-443m", "443.0 M"),
    ("mamba3-siso-893m", "892.8 M"),
    ("mamba3-siso-1.5b", "1494.7 M"),
    ("mamba3-mimo-187m", "187,291,968"),
    ("mamba3-mimo-444m", "444.2 M"),
    ("mamba3-mimo-894m", "894.6 M"),
    ("mamba3-mimo-1.5b", "1497.1 M"),
    ("bamba-9b", "9.8 B"),
    // Granite 4.0 h. Inferred: the four multipliers of 1b, tiny and small, of which no count depends.
    ("granite-4.0-h-350m", "340,332,224"),
    ("granite-4.0-h-1b", "1.5 B"),
    ("granite-4.0-h-micro", "3,191,396,096"),
    ("granite-4.0-h-tiny", "6,939,037,248"),
    ("granite-4.0-h-small", "32,207,337,984"),
    // Nemotron-H, Nano v2, Nemotron 3. What these have beside, for a further token, is below.
    ("nemotron-h-4b", "4.49 B"),
    ("nemotron-h-8b", "8,100,852,736"),
    ("nemotron-h-47b", "46.8 B"),
    ("nemotron-h-56b", "56.3 B"),
    ("nemotron-nano-9b-v2", "8,888,227,328"),
    ("nemotron-nano-12b-v2", "12 B"),
    ("nemotron-3-nano-4b", "3,973,556,832"),
    ("nemotron-3-nano-30b-a3b", "31,577,940,288"),
    ("nemotron-3.5-lightning-30b-a3b", "31,577,940,288"),
    ("nemotron-3-super-120b-a12b", "120,668,707,840"),
    ("nemotron-3-ultra-550b-a55b", "549.31 B"),
    // Falcon-H1: of 0.5b and tiny the multipliers are those of the files, the others' were not seen and
    // are left out. Inferred: mamba_rms_norm of 1.5b, 1.5b-deep and 7b, without which their exact counts
    // would not come out, and of 3b and 34b; intermediate_size of 1.5b-deep, 34b and tiny; vocab_size of 34b.
    ("falcon-h1-tiny-90m", "91,131,072"),
    ("falcon-h1-0.5b", "521,411,104"),
    ("falcon-h1-1.5b", "1,554,863,488"),
    ("falcon-h1-1.5b-deep", "1,554,872,208"),
    ("falcon-h1-3b", "3.15 B"),
    ("falcon-h1-7b", "7,585,648,736"),
    ("falcon-h1-34b", "33.6 B"),
    ("zamba-7b-v1", "7.2 B"),
    // 1.2b and 2.7b in the names that newer files use; 7b's is the first revision's file.
    ("zamba2-1.2b", "1,215,064,704"),
    ("zamba2-2.7b", "2.7 B"),
    ("zamba2-7b", "7.4 B"),
    // In the form of their authors' package. MambaByte's are named without the embedding and the biases of
    // norms, and rounded down: 353 M and 972 M. Inferred: its rms_norm, by the authors' model.
    ("mamba-130m", "129,135,360"),
    ("mamba2-130m", "128,989,632"),
    ("mamba2attn-2.7b", "2.7 B"),
    ("mambabyte-353m", "0.35 B"),
    ("mambabyte-972m", "0.97 B"),
    // Inferred: the keys that no one lists, as the authors' code reads them. The 1.5B's sizes were not seen.
    ("blackmamba-2.8b", "2.8 B"),
    // Seen of plamo-2-1b. Inferred for 8b: all but the sizes that its class has as defaults.
    ("plamo-2-1b", "1 B"),
    ("plamo-2-8b", "8 B"),
    ("phi-4-mini-flash", "3.85 B"),
    // There is no config.json of these: arguments of the authors' class.
    ("vim-tiny", "7 M"),
    ("vim-small", "26 M"),
    ("vim-base", "98 M"),
];

/// Digits in groups of three.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let parts: Vec<&str> = (0..digits.len().div_ceil(3))
        .rev()
        .map(|i| {
            let end = digits.len() - 3 * i;
            &digits[end.saturating_sub(3)..end]
        })
        .collect();
    parts.join(",")
}

/// A count as `published` writes it.
fn rounded(count: u64, published: &str) -> String {
    let Some((digits, unit)) = published.split_once(' ') else {
        return grouped(count);
    };
    let places = digits.split_once('.').map_or(0, |(_, behind)| behind.len());
    let scale = if unit == "B" { 1e9 } else { 1e6 };
    format!("{:.places$} {unit}", count as f64 / scale)
}

#[test]
fn parameters_are_as_published() {
    let mut wrong = Vec::new();
    for (name, published) in PARAMETERS {
        let found = of(name).parameters;
        println!("{name:<32} {:>18}   {published}", grouped(found));
        if rounded(found, published) != published {
            wrong.push(format!("{name}: {} instead of {published}", grouped(found)));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_config_has_a_row() {
    let files: BTreeSet<String> = std::fs::read_dir(configs())
        .unwrap()
        .map(|f| f.unwrap().file_name().into_string().unwrap())
        .collect();
    let rows: BTreeSet<String> = PARAMETERS
        .iter()
        .map(|(n, _)| format!("{n}.json"))
        .collect();
    assert_eq!(rows.len(), PARAMETERS.len(), "a name stands twice");
    assert_eq!(files, rows);
}

/// What Ultra has for a further token: attention, experts, and what is around them.
const ULTRA_MTP: u64 = 8192 * (1 + 2 * 128 * (64 + 2))
    + 8192 * (1 + 512 + 2 * 10240 + 2 * 2048)
    + 512 * (1 + 2 * 5120 * 2048)
    + 8192 * (2 * 8192 + 3);

/// Those whose checkpoints were counted tensor by tensor, and whose tensors are our weights one by one:
/// all tensors, all parameters, and of both those that do not run.
#[test]
fn tensors_and_what_does_not_run_are_as_published() {
    for (name, tensors, parameters, unused_tensors, unused_parameters) in [
        ("nemotron-3-nano-4b", 263, 3_973_556_832, 0, 0),
        // All of 3.5's and Super's numbers but the last are published.
        (
            "nemotron-3.5-lightning-30b-a3b",
            6_513,
            32_913_266_240,
            270,
            1_335_325_952,
        ),
        (
            "nemotron-3-super-120b-a12b",
            42_683,
            123_611_033_088,
            1_040,
            2_942_325_248,
        ),
        ("nemotron-3-nano-30b-a3b", 6_513 - 270, 31_577_940_288, 0, 0),
        ("mamba-130m-hf", 242, 129_135_360, 0, 0),
        // 9 in each of 48 Mamba blocks, 5 in 12 of attention, 5 + 2 · 512 + 2 in 48 of experts, and 3;
        // then 5, 1031 and 4 for a further token.
        (
            "nemotron-3-ultra-550b-a55b",
            9 * 48 + 5 * 12 + 1_031 * 48 + 3 + 1_040,
            549_308_993_536 + ULTRA_MTP,
            1_040,
            ULTRA_MTP,
        ),
    ] {
        let found = of(name);
        assert_eq!(
            (found.unused_tensors, found.unused_parameters),
            (unused_tensors, unused_parameters),
            "{name}"
        );
        let all = found.parameters + found.unused_parameters;
        assert_eq!(
            found.weights as u64 + found.unused_tensors,
            tensors,
            "{name}"
        );
        assert_eq!(all, parameters, "{name}");
    }
    // Super's files have 247,222,108,160 bytes: bf16, but for the choice biases of its 41 routers, which
    // are f32.
    let super_ = of("nemotron-3-super-120b-a12b");
    let all = super_.parameters + super_.unused_parameters;
    assert_eq!(2 * all + 2 * 41 * 512, 247_222_108_160);
}

#[test]
fn few_of_many_experts_are_met() {
    // As the names and the model cards round them.
    for (name, published) in [
        ("jamba-v0.1", "12 B"),
        ("jamba-large-1.5", "94 B"),
        ("granite-4.0-h-tiny", "1 B"),
        ("granite-4.0-h-small", "9 B"),
        ("nemotron-3-nano-30b-a3b", "3.6 B"),
        ("nemotron-3-ultra-550b-a55b", "56 B"),
    ] {
        assert_eq!(
            rounded(of(name).active_parameters, published),
            published,
            "{name}"
        );
    }
}

/// Keys and values of a token in bf16, state of a sequence in f32: by hand.
#[test]
fn states_are_as_counted_by_hand() {
    for (name, kv, state) in [
        // 24 blocks: 1536 channels of 16 states, and of 3 earlier inputs.
        ("mamba-130m-hf", 0, 24 * 1536 * (16 + 3) * 4),
        // 4 of 32 blocks: keys and values of 8 heads of 128. The others: 8192 channels.
        ("jamba-v0.1", 4 * 2 * 8 * 128 * 2, 28 * 8192 * (16 + 3) * 4),
        // 2 of 28 blocks: 1 head of 128.
        (
            "jamba-reasoning-3b",
            2 * 2 * 128 * 2,
            26 * 5120 * (16 + 3) * 4,
        ),
        // 24 heads of 64 by 128 states, and 3 earlier inputs of 1536 + 2 · 128 channels.
        (
            "mamba2-130m-hf",
            0,
            24 * (24 * 64 * 128 + 3 * (1536 + 256)) * 4,
        ),
        // 24 heads of 64 by 128 states, the last B and x, and 32 angles a head.
        (
            "mamba3-siso-187m",
            0,
            12 * 24 * (64 * 128 + 128 + 64 + 32) * 4,
        ),
        // The last B for each of 4 ranks, all else the same.
        (
            "mamba3-mimo-187m",
            0,
            12 * 24 * (64 * 128 + 4 * 128 + 64 + 32) * 4,
        ),
        // 4 of 40 blocks: 4 heads of 128. The others: 48 heads of 64 by 128.
        (
            "granite-4.0-h-tiny",
            4 * 2 * 4 * 128 * 2,
            36 * (48 * 64 * 128 + 3 * (3072 + 256)) * 4,
        ),
        // 6 blocks: 2 heads of 128. 23 blocks: 64 heads of 64 by 128, B and C in 8 groups.
        (
            "nemotron-3-nano-30b-a3b",
            6 * 2 * 2 * 128 * 2,
            23 * (64 * 64 * 128 + 3 * (4096 + 2 * 8 * 128)) * 4,
        ),
        // Both in all of 44 blocks: 2 heads of 128; 24 heads of 128 by 256.
        (
            "falcon-h1-7b",
            44 * 2 * 2 * 128 * 2,
            44 * (24 * 128 * 256 + 3 * (3072 + 2 * 256)) * 4,
        ),
        // The shared block has a memory of its own in each of 13 places: 32 heads of 224.
        (
            "zamba2-7b",
            13 * 2 * 32 * 224 * 2,
            81 * (112 * 64 * 64 + 3 * (7168 + 2 * 2 * 64)) * 4,
        ),
    ] {
        let found = of(name);
        assert_eq!(
            (found.kv_bytes_per_token, found.state_bytes_per_sequence),
            (kv, state),
            "{name}"
        );
    }
}
