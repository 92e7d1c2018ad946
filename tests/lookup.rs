//! Guesses change no token and no logit: what is generated with them is what plain decoding gives, greedy and
//! sampled, alone and beside others, where pages are short, where guesses are wrong, and up to the last token.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use strata::generation::{self, StopReason, Watch};
use strata::ids::{SeqId, TokenId};
use strata::load::{LoadOptions, Model, Silent, load};
use strata::lookup::Guessed;
use strata::sampler::SamplingParams;
use strata::session::{Engine, EngineConfig, Output, Request};
use strata_kernels::DType;
use strata_tests::{golden, root};

/// One of each kind of state: slots and pages, slots alone, pages alone, learned rows before the prompt, shared
/// weights, attention and scan side by side.
const GOLDENS: [&str; 9] = [
    "jamba/dense-tied-bf16",
    "mamba/tied",
    "mamba2/tied",
    "mamba3/siso",
    "hymba/memory-tokens",
    "zamba2/two-blocks-rope",
    "falcon-h1/plain-gate",
    "granite-moe-hybrid/attention-only",
    "nemotron-h/dense",
];

fn open(folder: &Path) -> Model {
    let plan = Some(folder.join("plan.yaml")).filter(|p| p.is_file());
    let options = LoadOptions {
        model: Some(folder.display().to_string()),
        plan,
        device: "cpu".into(),
        dtype: Some(DType::F32),
        threads: Some(2),
        ..LoadOptions::default()
    };
    load(&options, &mut Silent::default()).unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
}

/// Tokens of a sequence, and the bits of the logits that chose them, by position.
type Run = (Vec<TokenId>, BTreeMap<usize, Vec<u32>>);

fn run(engine: &mut Engine, requests: &[Request]) -> (Vec<Run>, Guessed) {
    let ids: Vec<SeqId> = requests
        .iter()
        .map(|r| engine.submit(r.clone()).unwrap())
        .collect();
    let mut runs = vec![Run::default(); ids.len()];
    let at = |id: SeqId| ids.iter().position(|i| *i == id).unwrap();
    loop {
        let more = engine.step(&mut |id, position, logits| {
            let bits = logits.iter().map(|l| l.to_bits()).collect();
            let before = runs[at(id)].1.insert(position, bits);
            // A preempted sequence computes a row again.
            assert!(before.is_none_or(|b| b == runs[at(id)].1[&position]));
        });
        if !more.unwrap() {
            break;
        }
        for output in engine.outputs() {
            if let Output::Token { id, sampled } = output {
                runs[at(*id)].0.push(sampled.token);
            }
        }
    }
    let mut all = Guessed::default();
    for id in ids {
        let one = engine.guessed(id);
        all.tokens += one.tokens;
        all.right += one.right;
        all.steps += one.steps;
        engine.remove(id);
    }
    (runs, all)
}

/// Prompts in which the same tokens come again, so that there is something to find. All but the last choose among
/// two to four tokens only: models of random weights repeat nothing of themselves, and this way guesses are now right,
/// now wrong.
fn requests(vocab: usize, max_tokens: usize) -> Vec<Request> {
    let prompt = |seed: usize, len: usize, period: usize| -> Vec<TokenId> {
        let token = |i: usize| (i % period * (7 + seed) + seed + i / 29) % vocab.min(40);
        (0..len).map(|i| token(i) as TokenId).collect()
    };
    let sampled = |temperature, seed| SamplingParams {
        temperature,
        seed,
        top_k: 5,
        repetition_penalty: if seed % 2 == 0 { 1.2 } else { 1.0 },
        frequency_penalty: if seed % 3 == 0 { 0.3 } else { 0.0 },
        logprobs: Some(2),
        ..SamplingParams::default()
    };
    let choices = [
        (prompt(1, 37, 9), SamplingParams::greedy()),
        (prompt(2, 5, 2), SamplingParams::greedy()),
        (prompt(3, 60, 12), sampled(0.8, 3)),
        (prompt(4, 22, 5), sampled(0.2, 4)),
        (prompt(5, 1, 1), sampled(1.5, 5)),
    ];
    choices
        .into_iter()
        .zip([2, 3, 2, 4, 0])
        .map(|((prompt, sampling), few)| Request {
            prompt,
            max_tokens,
            sampling: SamplingParams {
                logit_bias: (0..few).map(|token| (3 * token, 1e3)).collect(),
                ..sampling
            },
            ..Request::default()
        })
        .collect()
}

#[test]
fn goldens_generate_the_same_tokens_and_logits() {
    let mut wrong_with_slots = 0;
    for name in GOLDENS {
        let model = open(&golden(name));
        let network = &model.network;
        let requests = requests(network.graph.vocab, 40);
        let config = |sequences| EngineConfig {
            page_size: 4,
            ..EngineConfig::new(100, sequences, DType::F32)
        };
        let mut plain = Vec::new();
        for request in &requests {
            let mut engine = Engine::new(network.clone(), config(1)).unwrap();
            plain.push(run(&mut engine, std::slice::from_ref(request)).0.remove(0));
        }
        let mut seen = Guessed::default();
        let mut alone = Engine::new(network.clone(), config(1).with_lookup(11)).unwrap();
        for (i, request) in requests.iter().enumerate() {
            let (runs, guessed) = run(&mut alone, std::slice::from_ref(request));
            assert_eq!(runs[0], plain[i], "{name}: request {i} alone");
            seen.tokens += guessed.tokens;
            seen.right += guessed.right;
        }
        // Side by side, in chunks of five, and with pages for little more than one of them.
        let chunked = config(5).with_chunk(5).with_lookup(3);
        let scarce = 100usize.div_ceil(4) + 3;
        for (how, config, pages) in [
            ("together", config(5).with_lookup(16), 5 * 26),
            ("in chunks", chunked, 5 * 26),
            ("short of pages", config(5).with_lookup(16), scarce),
        ] {
            let mut engine = Engine::with_pages(network.clone(), config, pages).unwrap();
            let (runs, guessed) = run(&mut engine, &requests);
            for (i, (found, plain)) in runs.iter().zip(&plain).enumerate() {
                assert_eq!(found, plain, "{name}: request {i} {how}");
            }
            seen.tokens += guessed.tokens;
            seen.right += guessed.right;
            let has_pages = network.graph.page_elements_per_token() > 0;
            let preempted = engine.preemptions() > 0;
            assert!(
                preempted == (has_pages && how == "short of pages"),
                "{name} {how}"
            );
        }
        assert!(seen.right > 20, "{name}: {seen:?} tests no right guess");
        assert!(
            seen.tokens - seen.right > 20,
            "{name}: {seen:?} tests no wrong guess"
        );
        if network.graph.slot_bytes() > 0 {
            wrong_with_slots += seen.tokens - seen.right;
        }
    }
    assert!(wrong_with_slots > 100, "{wrong_with_slots}");
}

/// The state behind a wrong guess is the state without it: it can be kept, restored and forked.
#[test]
fn state_between_steps_is_that_of_the_tokens_computed() {
    for name in [
        "jamba/dense-tied-bf16",
        "mamba2/tied",
        "hymba/memory-tokens",
    ] {
        let model = open(&golden(name));
        let network = &model.network;
        let request = requests(network.graph.vocab, 30).remove(0);
        let config = EngineConfig {
            page_size: 4,
            ..EngineConfig::new(100, 3, DType::F32)
        };
        let mut plain = Engine::new(network.clone(), config.clone()).unwrap();
        let whole = run(&mut plain, std::slice::from_ref(&request))
            .0
            .remove(0)
            .0;
        let mut forks = 0;
        for steps in 2..12 {
            let mut engine = Engine::new(network.clone(), config.clone().with_lookup(8)).unwrap();
            let id = engine.submit(request.clone()).unwrap();
            for _ in 0..steps {
                engine.step(&mut |_, _, _| {}).unwrap();
            }
            let sequence = engine.sequence(id).unwrap();
            if sequence.is_finished() {
                break;
            }
            forks += 1;
            let done = sequence.generated().len();
            assert_eq!(
                sequence.generated(),
                &whole[..done],
                "{name} after {steps} steps"
            );
            let snapshot = engine.snapshot(id).unwrap();
            let kept = engine.snapshot_tokens(snapshot).unwrap().len();
            let child = engine.fork(id, request.sampling.clone()).unwrap();
            let mut prompt = request.prompt.clone();
            prompt.extend_from_slice(&whole[..done]);
            assert!(kept < prompt.len(), "{name}: a token is left to compute");
            let rest = Request {
                prompt,
                max_tokens: 30 - done,
                ..request.clone()
            };
            let restored = engine.restore(snapshot, rest).unwrap();
            let mut found: BTreeMap<SeqId, Vec<TokenId>> = BTreeMap::new();
            while engine.step(&mut |_, _, _| {}).unwrap() {
                for output in engine.outputs() {
                    if let Output::Token { id, sampled } = output {
                        found.entry(*id).or_default().push(sampled.token);
                    }
                }
            }
            for of in [id, child, restored] {
                assert_eq!(
                    found[&of],
                    whole[done..],
                    "{name}: {of:?} after {steps} steps"
                );
            }
        }
        assert!(forks > 2, "{name}: {forks}");
    }
}

struct Quiet;

impl Watch for Quiet {}

fn demo() -> Model {
    let options = LoadOptions {
        model: Some("demo".into()),
        device: "cpu".into(),
        threads: Some(2),
        ..LoadOptions::default()
    };
    load(&options, &mut Silent::default()).unwrap()
}

/// Text, tokens, why it ended, and what came of guessing.
fn ask(
    model: &Model,
    prompt: &str,
    lookup: usize,
    max_tokens: usize,
    stops: &[&str],
    eos: &[TokenId],
) -> (String, Vec<TokenId>, StopReason, Guessed) {
    let prompt = model.tokenizer().unwrap().encode(prompt, true).unwrap();
    // The context ends with the last token asked for.
    let config = EngineConfig::new(prompt.len() + max_tokens, 1, model.kv_dtype);
    let mut engine = Engine::new(model.network.clone(), config.with_lookup(lookup)).unwrap();
    let id = engine
        .submit(Request {
            prompt,
            max_tokens,
            stop: eos.to_vec(),
            sampling: SamplingParams::greedy(),
            ..Request::default()
        })
        .unwrap();
    let stops: Vec<String> = stops.iter().map(ToString::to_string).collect();
    let tokenizer = model.tokenizer.as_ref().map(Arc::clone);
    let done =
        generation::generate(&mut engine, id, tokenizer.as_ref(), &stops, eos, &mut Quiet).unwrap();
    let tokens = done.tokens.iter().map(|t| t.token).collect();
    (done.text, tokens, done.reason, done.guessed)
}

#[test]
fn the_demonstration_model_quotes_the_same_with_guesses() {
    let model = demo();
    let document = std::fs::read_to_string(root().join("model-cards/demo/sample.md")).unwrap();
    let eos = model.eos();
    let questions = [
        "Where does Mara Tolvin live?",
        "What is the favourite dish of Ines Quill?",
        "What is the boat of Hugo?",
        "What is the instrument of Hugo?",
    ];
    for question in questions {
        let prompt = format!("{document}\n\nQ: {question}\nA:");
        for lookup in [1, 4, 32] {
            let plain = ask(&model, &prompt, 0, 40, &[], &eos);
            let guessed = ask(&model, &prompt, lookup, 40, &[], &eos);
            assert_eq!(guessed.0, plain.0, "{question}");
            assert_eq!((&guessed.1, guessed.2), (&plain.1, plain.2), "{question}");
            assert_eq!(plain.2, StopReason::Eos, "{question}: {}", plain.0);
        }
    }
}

#[test]
fn ends_are_where_they_are_without_guesses() {
    let model = demo();
    let document = std::fs::read_to_string(root().join("model-cards/demo/sample.md")).unwrap();
    let prompt = format!("{document}\n\nQ: Where does Mara Tolvin live?\nA:");
    let (mut right, mut in_step) = (0, 0);
    for max_tokens in [1, 2, 3, 17, 64, 200] {
        let plain = ask(&model, &prompt, 0, max_tokens, &[], &[]);
        let guessed = ask(&model, &prompt, 24, max_tokens, &[], &[]);
        assert_eq!(
            (&guessed.0, &guessed.1, guessed.2),
            (&plain.0, &plain.1, plain.2)
        );
        assert_eq!((plain.1.len(), plain.2), (max_tokens, StopReason::Length));
        right += guessed.3.right;
    }
    assert!(right > 50, "{right} right guesses");
    // A stop string at every place of the text, also in the middle of a step.
    let whole = ask(&model, &prompt, 0, 120, &[], &[]).0;
    for at in (0..whole.len() - 4)
        .step_by(3)
        .filter(|at| whole.is_char_boundary(*at))
    {
        let Some(stop) = whole.get(at..at + 4) else {
            continue;
        };
        let plain = ask(&model, &prompt, 0, 120, &[stop], &[]);
        let guessed = ask(&model, &prompt, 24, 120, &[stop], &[]);
        assert_eq!(
            (&guessed.0, &guessed.1, guessed.2),
            (&plain.0, &plain.1, plain.2),
            "{stop:?}"
        );
        assert_eq!(plain.2, StopReason::Stop, "{stop:?}");
        in_step += u64::from(guessed.3.right > 0);
    }
    assert!(in_step > 5, "{in_step}");
}
