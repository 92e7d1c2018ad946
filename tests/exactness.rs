//! The exactness contract on random models of many shapes, on every backend of the CPU.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use strata::load::{LoadOptions, Silent, load};
use strata::random_weights::RandomWeights;
use strata::runner::{Network, Point};
use strata::sampler::SamplingParams;
use strata::session::{Engine, EngineConfig, Output, Request};
use strata::state_file::{self, Fingerprint};
use strata::verify::{VerifyOptions, verify};
use strata_kernels::cpu::{Cpu, CpuOptions};
use strata_kernels::reference::Reference;
use strata_kernels::{Backend, DType, KvType};
use strata_layers::{Graph, Plan};
use strata_tests::golden;

const MOE: &str =
    "{experts: 4, top_k: 2, d_ff: 20, act: silu, router: {score: softmax, normalize: false}}";

fn plan(blocks: &str, stack: &str) -> Plan {
    let text = format!(
        "plan: 1\nname: t\nvocab: 37\nd_model: 24\ncontext: 4096\ninit_std: 0.3\nblocks:\n{blocks}\nstack: {stack}\nhead: {{norm: {{eps: 1.0e-6}}, tie: true}}\n"
    );
    Plan::parse(&text, "plan").unwrap_or_else(|f| panic!("{f}\n{text}"))
}

fn hybrid() -> Plan {
    let mamba = "mamba1: {d_inner: 40, d_state: 5, d_conv: 4, dt_rank: 3, inner_norm: {eps: 1.0e-6, weight: true}}";
    let attention = "attention: {heads: 4, kv_heads: 2, head_dim: 7, window: 11, rope: {theta: 10000, dims: 6}}";
    let n = "norm: {eps: 1.0e-6}";
    let f = "norm: {name: ff_norm, eps: 1.0e-6}";
    plan(
        &format!(
            "  m:\n    - residual: [{n}, {mamba}]\n    - residual: [{f}, moe: {MOE}]\n  a:\n    - residual: [{n}, {attention}]\n    - residual: [{f}, mlp: {{d_ff: 30, act: gelu}}]\n  p:\n    - residual: [{n}, parallel: [[{attention}], [{mamba}, scale: {{by: 0.5}}]]]"
        ),
        "[m, a, m, p, a@1]",
    )
}

fn pure_mamba() -> Plan {
    let mamba = "mamba1: {d_inner: 48, d_state: 16, d_conv: 1, dt_rank: 2}";
    plan(
        &format!("  m: [residual: [norm: {{eps: 1.0e-6}}, {mamba}]]"),
        "[m*3]",
    )
}

fn trapezoids() -> Plan {
    let n = "norm: {eps: 1.0e-6}";
    let one = "mamba3: {heads: 4, head_dim: 9, groups: 2, d_state: 12, angles: 3, decay: softplus, norm_eps: 1.0e-5}";
    let many = "mamba3: {heads: 3, head_dim: 16, d_state: 10, angles: 5, mimo: true, rank: 3, decay: heavy_tail, norm_eps: 1.0e-5, out_norm: true, bias: true, out_bias: true}";
    plan(
        &format!("  s: [residual: [{n}, {one}]]\n  m: [residual: [{n}, {many}]]"),
        "[s, m, s]",
    )
}

/// Scans of Mamba-2 by chunks, some of them longer than the prompt, beside their recurrence, after a
/// learned prefix that is no whole chunk.
fn chunks() -> Plan {
    let n = "norm: {eps: 1.0e-6}";
    let mixer = |name: &str, size: &str| {
        format!(
            "mamba2: {{name: {name}, heads: 6, head_dim: 7, groups: 2, d_state: 9, d_conv: 3, norm: {{eps: 1.0e-5}}{size}}}"
        )
    };
    let (few, many) = (
        mixer("few", ", chunk_size: 7"),
        mixer("many", ", chunk_size: 64"),
    );
    let scan = "let: {dt: [linear: {name: dt, d_out: 3}]}, let: {b: [linear: {name: b, d_out: 5}]}, let: {c: [linear: {name: c, d_out: 5}]}";
    let scan = scan.replace(", let", "}, {let");
    let one = "ssd_scan: {dt: dt, b: b, c: c, heads: 3, d_state: 5, scale_input: false, dt_max: 0.5, chunk_size: 1}";
    plan(
        &format!(
            "  f: [residual: [{n}, {few}]]\n  m: [residual: [{n}, {many}]]\n  r: [residual: [{n}, {}]]\n  s: [residual: [{n}, {{{scan}}}, {one}]]",
            mixer("none", "")
        ),
        "[f, m, r, s, f@1]\nembed: {prefix: 5}",
    )
}

fn pure_attention() -> Plan {
    let attention = "attention: {heads: 3, kv_heads: 1, head_dim: 8}";
    plan(
        &format!("  a: [residual: [norm: {{eps: 1.0e-6}}, {attention}]]"),
        "[a*2]",
    )
}

fn check(
    name: &str,
    plan: &Plan,
    (dtype, kv): (DType, KvType),
    backend: Arc<dyn Backend>,
    others: &[(usize, Arc<dyn Backend>)],
) {
    let graph = Graph::lower(plan, "plan").unwrap();
    let weights = RandomWeights::new(5, plan.init_std, dtype, backend.clone());
    let network = Arc::new(Network::build(graph, &weights, backend, dtype).unwrap());
    let options = VerifyOptions {
        prompt: 41,
        generate: 9,
        chunks: vec![1, 3, 16],
        kv_dtype: kv,
        seed: 3,
    };
    // Tests that run at once have folders of their own.
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(kv.name());
    std::fs::create_dir_all(&folder).unwrap();
    let checks = verify(&network, &options, others, &folder, &mut |_| {}).unwrap();
    for check in &checks {
        assert_eq!(check.fault, None, "{name}, {dtype}, {kv}: {}", check.name);
    }
    let least = if plan.blocks.iter().any(|b| b.name == "a") {
        18
    } else {
        15
    };
    assert!(
        checks.len() >= least,
        "{name}: only {} checks ran",
        checks.len()
    );
}

#[test]
fn the_reference_is_exact() {
    for (name, plan) in [
        ("hybrid", hybrid()),
        ("mamba", pure_mamba()),
        ("attention", pure_attention()),
        ("trapezoids", trapezoids()),
        ("chunks", chunks()),
    ] {
        let types = (DType::F32, KvType::F32);
        check(name, &plan, types, Arc::new(Reference), &[]);
    }
}

#[test]
fn keys_and_values_in_bytes_are_exact() {
    let cpu = |threads| -> Arc<dyn Backend> {
        let options = CpuOptions {
            threads,
            ..CpuOptions::default()
        };
        Arc::new(Cpu::new(options))
    };
    for (name, plan) in [("hybrid", hybrid()), ("attention", pure_attention())] {
        let types = (DType::F32, KvType::Int8);
        check(name, &plan, types, Arc::new(Reference), &[]);
        for dtype in [DType::F32, DType::BF16] {
            let others: Vec<_> = [1, 3].map(|n| (n, cpu(n))).into();
            check(name, &plan, (dtype, KvType::Int8), cpu(2), &others);
        }
    }
}

/// The stream of some sequences at every point, and their logits: by sequence, then point, then position.
type Streams = Vec<Vec<(Point, Vec<Vec<u32>>)>>;

fn streams(
    folder: &Path,
    prompts: &[Vec<u32>],
    config: &dyn Fn(EngineConfig) -> EngineConfig,
) -> Streams {
    let options = LoadOptions {
        model: Some(folder.display().to_string()),
        device: "cpu".into(),
        dtype: Some(DType::F32),
        threads: Some(2),
        ..LoadOptions::default()
    };
    let model = load(&options, &mut Silent::default()).unwrap();
    let network = Arc::clone(&model.network);
    let graph = network.graph.clone();
    let points = || {
        let blocks = (0..graph.stack.len()).map(Point::Block);
        [Point::Embedding]
            .into_iter()
            .chain(blocks)
            .chain([Point::Norm])
    };
    let mut found: Streams = prompts
        .iter()
        .map(|_| points().map(|p| (p, Vec::new())).collect())
        .collect();
    let mut engine = Engine::new(
        network,
        config(EngineConfig::new(64, prompts.len(), DType::F32)),
    )
    .unwrap();
    let ids: Vec<_> = prompts
        .iter()
        .map(|p| {
            engine
                .submit(Request {
                    prompt: p.clone(),
                    ..Request::default()
                })
                .unwrap()
        })
        .collect();
    let mut take = |w: strata::session::Watched<'_>| {
        let sequence = ids.iter().position(|id| *id == w.id).unwrap();
        let (_, rows) = found[sequence]
            .iter_mut()
            .find(|(p, _)| *p == w.point)
            .unwrap();
        assert_eq!(
            w.position,
            rows.len(),
            "{:?}: rows come in order, those of a prefix to no one",
            w.point
        );
        rows.extend(
            w.rows
                .chunks_exact(graph.d_model)
                .map(|r| r.iter().map(|x| x.to_bits()).collect()),
        );
    };
    while engine.step_watched(&mut take, &mut |_, _, _| {}).unwrap() {}
    found
}

#[test]
fn the_watched_stream_depends_on_no_chunk_and_no_neighbour() {
    // One with learned rows before every sequence, one whose blocks share weights.
    for name in [
        "hymba/memory-tokens",
        "jamba/dense-tied-bf16",
        "zamba2/two-blocks-rope",
    ] {
        let folder: PathBuf = golden(name);
        let prompts: Vec<Vec<u32>> = vec![(1..24).collect(), vec![5], vec![9, 8, 7, 6]];
        let alone: Streams = prompts
            .iter()
            .flat_map(|p| streams(&folder, std::slice::from_ref(p), &|c| c))
            .collect();
        for (rows, prompt) in alone.iter().zip(&prompts) {
            assert!(rows.iter().all(|(_, r)| r.len() == prompt.len()), "{name}");
        }
        assert_eq!(streams(&folder, &prompts, &|c| c), alone, "{name}: batched");
        assert_eq!(
            streams(&folder, &prompts, &|c| c.with_chunk(3)),
            alone,
            "{name}: chunked"
        );
    }
}

/// What sequences with these parameters generate, each token by the number of its sequence; or the first error.
fn generated(std: f64, sampling: &[SamplingParams], seen: bool) -> Result<Vec<Vec<u32>>, String> {
    let plan = hybrid();
    let graph = Graph::lower(&plan, "plan").unwrap();
    let backend: Arc<dyn Backend> = Arc::new(Reference);
    let weights = RandomWeights::new(3, std, DType::F32, backend.clone());
    let network = Arc::new(Network::build(graph, &weights, backend, DType::F32).unwrap());
    let config = EngineConfig::new(64, sampling.len(), DType::F32);
    let mut engine = Engine::new(network, config).unwrap();
    let mut ids = Vec::new();
    for (i, sampling) in sampling.iter().enumerate() {
        let request = Request {
            prompt: (0..3 + i % 4).map(|t| ((t * 5 + i) % 37) as u32).collect(),
            max_tokens: 6,
            sampling: sampling.clone(),
            ..Request::default()
        };
        ids.push(engine.submit(request).unwrap());
    }
    let mut tokens = vec![Vec::new(); ids.len()];
    loop {
        let more = match seen {
            true => engine.step(&mut |_, _, _| {}),
            false => engine.advance(),
        };
        if !more.map_err(|e| e.to_string())? {
            return Ok(tokens);
        }
        for output in engine.outputs() {
            if let Output::Token { id, sampled } = output {
                let at = ids.iter().position(|i| i == id).unwrap();
                tokens[at].push(sampled.token);
            }
        }
    }
}

#[test]
fn tokens_are_the_same_whether_logits_are_seen_or_not() {
    let greedy = SamplingParams::greedy();
    let first = SamplingParams {
        top_k: 1,
        ..SamplingParams::default()
    };
    let drawn = SamplingParams {
        seed: 4,
        ..SamplingParams::default()
    };
    // More sequences than rows of logits are computed at a time.
    let many = vec![greedy.clone(); 35];
    for sampling in [
        many,
        vec![greedy.clone(), first, drawn],
        vec![greedy.clone()],
    ] {
        let found = generated(0.3, &sampling, false).unwrap();
        assert!(found.iter().all(|tokens| tokens.len() == 6));
        assert_eq!(found, generated(0.3, &sampling, true).unwrap());
    }
    // Logits that no token can be taken from are told of in the same words.
    let bad = generated(f64::NAN, std::slice::from_ref(&greedy), false).unwrap_err();
    assert_eq!(bad, generated(f64::NAN, &[greedy], true).unwrap_err());
}

/// Attention that sees all, beside a state of fixed size; `window` is written into it, or nothing.
fn unbounded(window: &str, prefix: usize) -> Plan {
    let mamba = "mamba1: {d_inner: 40, d_state: 5, d_conv: 4, dt_rank: 3}";
    let n = "norm: {eps: 1.0e-6}";
    let (mixer, before) = match prefix {
        0 => (
            format!(
                "attention: {{heads: 4, kv_heads: 2, head_dim: 8{window}, rope: {{theta: 10000}}}}"
            ),
            String::new(),
        ),
        // Layers of attention without places for first tokens cannot keep a prefix in sight.
        _ => (
            format!(
                "{{let: {{k: [linear: {{name: k, d_out: 12}}]}}}}, {{let: {{v: [linear: {{name: v, d_out: 12}}]}}}}, attend: {{k: k, v: v, heads: 4, kv_heads: 2, head_dim: 6{window}}}"
            ),
            format!("\nembed: {{prefix: {prefix}}}"),
        ),
    };
    plan(
        &format!("  m: [residual: [{n}, {mamba}]]\n  a: [residual: [{n}, {mixer}]]"),
        &format!("[a, m, a, m]{before}"),
    )
}

fn network(plan: &Plan) -> Arc<Network> {
    let backend: Arc<dyn Backend> = Arc::new(Cpu::new(CpuOptions {
        threads: 2,
        ..CpuOptions::default()
    }));
    let graph = Graph::lower(plan, "plan").unwrap();
    let weights = RandomWeights::new(5, plan.init_std, DType::F32, backend.clone());
    Arc::new(Network::build(graph, &weights, backend, DType::F32).unwrap())
}

/// Tokens and logits of prompts of these lengths, and the most pages in use.
fn long(engine: &mut Engine, lengths: &[usize]) -> (Vec<Vec<Vec<u32>>>, usize) {
    let ids: Vec<_> = lengths
        .iter()
        .map(|n| {
            let prompt = (0..*n).map(|i| (i * i % 37) as u32).collect();
            let request = Request {
                prompt,
                max_tokens: 11,
                prompt_logits: true,
                ..Request::default()
            };
            engine.submit(request).unwrap()
        })
        .collect();
    // Rows that are computed anew come again.
    let mut rows = vec![std::collections::BTreeMap::new(); ids.len()];
    let mut most = 0;
    let mut observe = |id, position, logits: &[f32]| {
        let bits: Vec<u32> = logits.iter().map(|l| l.to_bits()).collect();
        let sequence = ids.iter().position(|i| *i == id).unwrap();
        let known = rows[sequence].insert(position, bits.clone());
        assert!(known.is_none_or(|known| known == bits), "{position}");
    };
    while engine.step(&mut observe).unwrap() {
        most = most.max(engine.pages_used().used);
    }
    let rows = rows
        .into_iter()
        .map(|r| r.into_values().collect())
        .collect();
    ids.iter().for_each(|id| assert!(engine.remove(*id)));
    assert_eq!(engine.pages_used().used, 0);
    (rows, most)
}

#[test]
fn attention_to_the_last_tokens_is_a_plan_with_windows_and_gives_pages_back() {
    for (prefix, told) in [(0, ", window: 13"), (3, ", window: 13, keep_first: 3")] {
        let written = unbounded(told, prefix);
        let changed = unbounded("", prefix).attending_last(13).unwrap();
        assert_eq!(changed.print(), written.print());
        let lengths = [150, 1, 90, 61];
        let config = |chunk| EngineConfig {
            page_size: 4,
            ..EngineConfig::new(170, 4, DType::F32).with_chunk(chunk)
        };
        let mut plain = Engine::new(network(&written), config(64)).unwrap();
        let (expected, all) = long(&mut plain, &lengths);
        assert_eq!(expected[0].len(), 160);
        let changed = network(&changed);
        let graph = &changed.graph;
        for (chunk, lookup) in [(1, 0), (7, 0), (16, 3), (64, 0)] {
            let config = config(chunk).giving_back(graph).with_lookup(lookup);
            let mut engine = Engine::new(changed.clone(), config.clone()).unwrap();
            let (found, most) = long(&mut engine, &lengths);
            assert!(
                found == expected,
                "chunks of {chunk}, {prefix} rows of a prefix"
            );
            assert!(most <= config.pages(prefix), "{most} pages");
            assert!(chunk > 16 || most < all / 2, "{most} pages of {all}");
            // So few that sequences wait for each other's.
            let few = config.pages(prefix) / 4 + 2;
            let mut engine = Engine::with_pages(changed.clone(), config, few).unwrap();
            assert!(long(&mut engine, &lengths).0 == expected, "{few} pages");
        }
    }
    // Without places for first tokens a prefix would be lost.
    let text = "plan: 1\nname: t\nvocab: 9\nd_model: 8\ncontext: 64\nblocks:\n  a: [attention: {heads: 1, kv_heads: 1, head_dim: 8}]\nstack: [a]\nembed: {prefix: 2}\nhead: {norm: {eps: 1.0e-6}, tie: true}\n";
    let plan = Plan::parse(text, "plan").unwrap();
    let error = plan.attending_last(5).unwrap_err();
    assert!(error.contains("2 learned rows"), "{error}");
    assert!(plan.attending_last(0).is_err());
}

#[test]
fn states_of_which_pages_were_given_back_go_on_the_same() {
    let plan = unbounded("", 0).attending_last(13).unwrap();
    let network = network(&plan);
    let config = EngineConfig {
        page_size: 4,
        ..EngineConfig::new(170, 3, DType::F32).with_chunk(16)
    };
    let prompt = |n: usize| (0..n).map(|i| (i * i % 37) as u32).collect::<Vec<_>>();
    let request = |n: usize, max_tokens: usize| Request {
        prompt: prompt(n),
        max_tokens,
        ..Request::default()
    };
    let last = |engine: &mut Engine, id| {
        let mut last = Vec::new();
        while engine
            .step(&mut |_, _, logits| last = logits.to_vec())
            .unwrap()
        {}
        let tokens = engine.sequence(id).unwrap().tokens.clone();
        engine.remove(id);
        (tokens, last)
    };
    let mut plain = Engine::new(network.clone(), config.clone()).unwrap();
    let id = plain.submit(request(120, 9)).unwrap();
    let expected = last(&mut plain, id);
    let config = config.giving_back(&network.graph);
    let mut engine = Engine::new(network.clone(), config.clone()).unwrap();
    let id = engine.submit(request(97, 0)).unwrap();
    while engine.advance().unwrap() {}
    let used = engine.pages_used().used;
    assert!(used <= 5, "{used} pages for a window of 13 tokens");
    let snapshot = engine.snapshot(id).unwrap();
    engine.remove(id);
    let fingerprint = Fingerprint {
        plan: "p".into(),
        weights: "w".into(),
    };
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("given-back.state");
    state_file::save(&engine, snapshot, &fingerprint, &path).unwrap();
    for _ in 0..2 {
        let id = engine.restore(snapshot, request(120, 9)).unwrap();
        assert!(last(&mut engine, id) == expected, "from memory");
    }
    engine.drop_snapshot(snapshot).unwrap();
    assert_eq!(engine.pages_used().used, 0);
    let read = state_file::load(&mut plain, &fingerprint, &path).unwrap();
    let id = plain.restore(read, request(120, 9)).unwrap();
    assert!(last(&mut plain, id) == expected, "from a file");
    std::fs::remove_file(path).unwrap();
}
