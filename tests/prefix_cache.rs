//! The prefix cache under random traffic: whatever is kept, shared, spilled, given up or preempted, every sequence
//! generates what it would alone, and every page has the users it is counted to have.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use strata::ids::{SeqId, TokenId};
use strata::prefix_cache::{CacheUse, Policy};
use strata::random_weights::RandomWeights;
use strata::runner::Network;
use strata::sampler::SamplingParams;
use strata::sequence::Reason;
use strata::session::{Engine, EngineConfig, Output, Request};
use strata::state_file::{Fingerprint, StateFile};
use strata_kernels::DType;
use strata_kernels::reference::Reference;
use strata_layers::{Graph, Plan};

const VOCAB: u32 = 7;
const CONTEXT: usize = 120;

const ATTENTION: &str = "attention: {heads: 1, kv_heads: 1, head_dim: 2}";
const MAMBA: &str = "mamba1: {d_inner: 4, d_state: 2, d_conv: 2, dt_rank: 1}";

fn network(layers: &[&str]) -> Arc<Network> {
    prefixed(layers, 0)
}

/// A network with so many learned rows before every sequence.
fn prefixed(layers: &[&str], prefix: usize) -> Arc<Network> {
    let embed = match prefix {
        0 => String::new(),
        rows => format!("embed: {{prefix: {rows}}}\n"),
    };
    let text = format!(
        "plan: 1\nname: t\nvocab: {VOCAB}\nd_model: 4\ncontext: {CONTEXT}\nblocks:\n  b: [residual: [{}]]\n\
         stack: [b]\nhead: {{norm: {{eps: 1.0e-6}}, tie: true}}\n{embed}",
        layers.join(", ")
    );
    let plan = Plan::parse(&text, "plan").expect("a plan");
    let graph = Graph::lower(&plan, "plan").expect("a graph");
    let backend = Arc::new(Reference);
    let weights = RandomWeights::new(5, 1.0, DType::F32, backend.clone());
    Arc::new(Network::build(graph, &weights, backend, DType::F32).expect("a network"))
}

fn fingerprint() -> Fingerprint {
    Fingerprint {
        plan: "p".into(),
        weights: "w".into(),
    }
}

/// A folder that is gone after the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("strata-cache-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// From `low` to `high`, both included.
    fn range(&mut self, low: usize, high: usize) -> usize {
        low + (self.next() % (high - low + 1) as u64) as usize
    }

    fn percent(&mut self, percent: usize) -> bool {
        self.range(1, 100) <= percent
    }

    fn tokens(&mut self, len: usize) -> Vec<TokenId> {
        (0..len)
            .map(|_| (self.next() % u64::from(VOCAB)) as TokenId)
            .collect()
    }
}

fn request(prompt: &[TokenId], max_tokens: usize) -> Request {
    Request {
        prompt: prompt.to_vec(),
        max_tokens,
        ..Request::default()
    }
}

/// A token, and a hash of the bits of all logits it was chosen by.
type Chosen = (TokenId, u64);

/// One step; what came of it, and the hash of each sequence's logits. False if there was nothing to do.
fn step(engine: &mut Engine) -> (bool, Vec<Output>, BTreeMap<SeqId, u64>) {
    let mut hashes = BTreeMap::new();
    let ran = engine.step(&mut |id, _, logits| {
        let mut hash = Random(1);
        for logit in logits {
            hash.0 ^= u64::from(logit.to_bits());
            hash.0 = hash.next();
        }
        hashes.insert(id, hash.0);
    });
    (ran.expect("a step"), engine.outputs().to_vec(), hashes)
}

/// Runs an engine until nothing is left to do; what each sequence generated.
fn run(engine: &mut Engine) -> BTreeMap<SeqId, Vec<Chosen>> {
    let mut generated: BTreeMap<SeqId, Vec<Chosen>> = BTreeMap::new();
    loop {
        let (ran, outputs, hashes) = step(engine);
        if !ran {
            return generated;
        }
        for output in outputs {
            if let Output::Token { id, sampled } = output {
                generated
                    .entry(id)
                    .or_default()
                    .push((sampled.token, hashes[&id]));
            }
        }
    }
}

/// An engine for one sequence that keeps nothing.
struct Alone {
    engine: Engine,
    known: BTreeMap<Vec<TokenId>, Vec<Chosen>>,
}

const MOST: usize = 10;

impl Alone {
    fn new(network: &Arc<Network>) -> Self {
        let config = EngineConfig::new(CONTEXT, 1, DType::F32);
        Alone {
            engine: Engine::new(network.clone(), config).unwrap(),
            known: BTreeMap::new(),
        }
    }

    /// What follows a prompt.
    fn follow(&mut self, prompt: &[TokenId]) -> &[Chosen] {
        if !self.known.contains_key(prompt) {
            let id = self.engine.submit(request(prompt, MOST)).unwrap();
            let generated = run(&mut self.engine).remove(&id).unwrap_or_default();
            self.engine.remove(id);
            self.known.insert(prompt.into(), generated);
        }
        &self.known[prompt]
    }
}

#[derive(Default)]
struct Expected {
    prompt: Vec<TokenId>,
    generated: Vec<Chosen>,
    max_tokens: usize,
}

/// One engine under traffic of prompts that often begin alike.
fn traffic(
    network: &Arc<Network>,
    alone: &mut Alone,
    seed: u64,
    folder: &Folder,
) -> (CacheUse, u64) {
    let mut random = Random(seed);
    let sequences = random.range(1, 4);
    let page_size = [1, 2, 4, 16][random.range(0, 3)];
    let budget = random.range(1, 12);
    let config = EngineConfig {
        page_size,
        token_budget: random.range(sequences, 40) + sequences,
        ..EngineConfig::new(CONTEXT, sequences, DType::F32)
    };
    let least = (CONTEXT + network.graph.prefix).div_ceil(page_size) + 2;
    let pages = random.range(least, 3 * least);
    let mut engine = Engine::with_pages(network.clone(), config, pages).expect("an engine");
    let policy = Policy {
        every: random.percent(60).then(|| random.range(1, 20)),
        ends: random.percent(70),
        branches: random.percent(70),
        wait: random.percent(90).then(|| random.range(1, 4)),
        budget: random.percent(70).then_some(budget as u64 * 300),
        spill: random.percent(60).then(|| folder.0.join(format!("{seed}"))),
        disk: None,
    };
    let disk = policy.spill.is_some() && random.percent(50);
    let policy = Policy {
        disk: disk.then_some(20_000),
        ..policy
    };
    assert_eq!(policy.to_string().parse::<Policy>().as_ref(), Ok(&policy));
    engine.keep_states(policy.clone(), fingerprint());
    let documents: Vec<Vec<TokenId>> = (0..3).map(|_| random.tokens(70)).collect();
    let mut expected: BTreeMap<SeqId, Expected> = BTreeMap::new();
    let mut compared = 0;
    for _ in 0..120 {
        match random.range(0, 9) {
            0..=2 => {
                let document = &documents[random.range(0, 2)];
                let mut prompt = document[..random.range(0, document.len())].to_vec();
                let more = random.range(1, 6);
                prompt.extend(random.tokens(more));
                let max_tokens = random.range(0, MOST);
                let marks = if random.percent(20) {
                    vec![random.range(0, prompt.len() + 2)]
                } else {
                    Vec::new()
                };
                let request = Request {
                    marks,
                    ..request(&prompt, max_tokens)
                };
                let id = engine.submit(request).expect("it fits the context");
                let new = Expected {
                    prompt,
                    generated: Vec::new(),
                    max_tokens,
                };
                expected.insert(id, new);
            }
            3 if random.percent(20) => {
                let ids: Vec<SeqId> = expected.keys().copied().collect();
                if !ids.is_empty() {
                    let id = ids[random.range(0, ids.len() - 1)];
                    if random.percent(50) {
                        engine.finish(id, [Reason::Stop, Reason::Cancelled][random.range(0, 1)]);
                    }
                    engine.remove(id);
                    expected.remove(&id);
                }
            }
            4 if random.percent(30) => {
                let ids: Vec<SeqId> = expected.keys().copied().collect();
                if !ids.is_empty() {
                    let id = ids[random.range(0, ids.len() - 1)];
                    if let Ok(fork) = engine.fork(id, SamplingParams::default()) {
                        let Expected {
                            prompt,
                            generated,
                            max_tokens,
                        } = &expected[&id];
                        let child = Expected {
                            prompt: prompt.clone(),
                            generated: generated.clone(),
                            max_tokens: *max_tokens,
                        };
                        expected.insert(fork, child);
                    }
                }
            }
            _ => {
                let (_, outputs, hashes) = step(&mut engine);
                for output in outputs {
                    match output {
                        Output::Token { id, sampled } => {
                            let expected = expected.get_mut(&id).unwrap();
                            expected.generated.push((sampled.token, hashes[&id]));
                        }
                        Output::Finished { id, reason } => {
                            assert_eq!(reason, Reason::Length);
                            let known = &expected[&id];
                            let alone = alone.follow(&known.prompt);
                            let follows = &alone[..known.max_tokens];
                            assert_eq!(known.generated, follows, "seed {seed}: {id:?} {policy}");
                            compared += 1;
                            if random.percent(80) {
                                let reuse = engine.reuse(id).cloned();
                                if let Some(reuse) = reuse {
                                    assert!(
                                        reuse.resumed <= reuse.matched
                                            && reuse.matched <= reuse.prompt
                                    );
                                }
                                engine.remove(id);
                                expected.remove(&id);
                            }
                        }
                    }
                }
            }
        }
        assert_eq!(
            engine.cache_faults(),
            Vec::<String>::new(),
            "seed {seed}: {policy}"
        );
    }
    let told = engine.cache_use().expect("there is a cache");
    assert_eq!(told.trouble, None, "seed {seed}: {policy}");
    engine.forget_states();
    (told, compared)
}

#[test]
fn random_traffic_generates_what_each_would_alone() {
    for (kind, layers, prefix) in [
        ("hybrid", &[ATTENTION, MAMBA][..], 0),
        ("attention", &[ATTENTION], 0),
        ("mamba", &[MAMBA], 0),
        ("prefix", &[ATTENTION, MAMBA], 3),
    ] {
        let folder = Folder::new(kind);
        let network = prefixed(layers, prefix);
        let mut alone = Alone::new(&network);
        let mut all = CacheUse::default();
        let mut compared = 0;
        for seed in 0..60 {
            let (told, n) = traffic(&network, &mut alone, seed, &folder);
            compared += n;
            all.hits += told.hits;
            all.misses += told.misses;
            all.waited += told.waited;
            all.taken += told.taken;
            all.evicted += told.evicted;
            all.spilled += told.spilled;
            all.reused_tokens += told.reused_tokens;
        }
        println!("{kind}: {compared} sequences, {all:?}");
        for (count, name) in [
            (compared, "sequences"),
            (all.hits, "hits"),
            (all.misses, "misses"),
            (all.waited, "waits"),
            (all.taken, "taken"),
            (all.evicted, "evicted"),
            (all.spilled, "spilled"),
        ] {
            assert!(
                count >= 50,
                "{kind}: only {count} {name}: the traffic does not test them"
            );
        }
    }
}

fn engine(network: &Arc<Network>, policy: &str) -> Engine {
    let config = EngineConfig {
        page_size: 4,
        ..EngineConfig::new(CONTEXT, 2, DType::F32)
    };
    let mut engine = Engine::new(network.clone(), config).unwrap();
    engine.keep_states(policy.parse().unwrap(), fingerprint());
    engine
}

/// Runs a prompt to its end: matched, resumed, why.
fn ask(engine: &mut Engine, prompt: &[TokenId]) -> (usize, usize, String) {
    let id = engine.submit(request(prompt, 2)).unwrap();
    run(engine);
    let reuse = engine.reuse(id).expect("it ran").clone();
    engine.remove(id);
    assert_eq!(engine.cache_faults(), Vec::<String>::new());
    (reuse.matched, reuse.resumed, reuse.why(&|t| t.to_string()))
}

fn counted(from: u32, n: usize) -> Vec<TokenId> {
    (from..)
        .map(|t| (t * t + t / 3) % (VOCAB - 1))
        .take(n)
        .collect()
}

#[test]
fn a_prompt_goes_on_from_the_deepest_state_and_says_why() {
    let network = network(&[ATTENTION, MAMBA]);
    let mut engine = engine(&network, "every=16; ends; branches");
    let document = counted(0, 60);
    let other = |at: usize| {
        let mut prompt = document[..at].to_vec();
        prompt.extend([VOCAB - 1; 5]);
        prompt
    };
    assert_eq!(
        ask(&mut engine, &document),
        (0, 0, "nothing was known".into())
    );
    // The same again computes its last token only.
    let again = ask(&mut engine, &document);
    assert_eq!(again, (60, 59, "all 60 tokens are known".into()));
    // What leaves it in the middle replays what follows the last multiple of 16.
    let (matched, resumed, why) = ask(&mut engine, &other(42));
    assert_eq!((matched, resumed), (42, 32));
    let known = document[42];
    assert_eq!(
        why,
        format!(
            "diverged at token 42: \"6\", where \"{known}\" is known; no state between tokens 32 and 42"
        )
    );
    // Where the two parted there is a state now.
    let mut third = document[..42].to_vec();
    third.extend([(known + 1) % (VOCAB - 1), VOCAB - 1]);
    assert_eq!(ask(&mut engine, &third).1, 42);
    // A longer prompt goes on from the end of the first, and what it generated.
    let longer: Vec<TokenId> = document.iter().copied().chain([6, 6, 6]).collect();
    let (matched, resumed, _) = ask(&mut engine, &longer);
    assert!(
        (60..=61).contains(&matched) && (59..=61).contains(&resumed),
        "{matched} {resumed}"
    );
}

#[test]
fn prompts_that_come_together_read_what_they_share_once() {
    for layers in [&[ATTENTION, MAMBA][..], &[MAMBA], &[ATTENTION]] {
        let network = network(layers);
        for (policy, waits) in [("ends; wait=8", true), ("ends; branches", false)] {
            let config = EngineConfig {
                page_size: 4,
                token_budget: 16,
                ..EngineConfig::new(CONTEXT, 4, DType::F32)
            };
            let mut engine = Engine::new(network.clone(), config).unwrap();
            engine.keep_states(policy.parse().unwrap(), fingerprint());
            let document = counted(0, 60);
            let prompts = [6, 5, 4].map(|end| [&document[..], &[end; 3]].concat());
            let ids = prompts
                .each_ref()
                .map(|p| engine.submit(request(p, 2)).unwrap());
            // One that begins otherwise passes by.
            let other = engine.submit(request(&[5, 5, 5, 5], 2)).unwrap();
            let mut rows = 0;
            let mut ended = Vec::new();
            loop {
                let (more, outputs, _) = step(&mut engine);
                if !more {
                    break;
                }
                rows += engine.prompt_rows();
                ended.extend(outputs.iter().filter_map(|o| match o {
                    Output::Finished { id, .. } => Some(*id),
                    Output::Token { .. } => None,
                }));
            }
            let resumed = ids.map(|id| engine.reuse(id).expect("it ran").resumed);
            if waits {
                assert_eq!(resumed, [0, 60, 60]);
                assert_eq!(rows, 63 + 3 + 3 + 4);
                assert_eq!(ended[0], other);
                assert_eq!(engine.cache_use().unwrap().waited, 2);
            } else {
                assert_eq!(resumed, [0; 3]);
                assert_eq!(rows, 3 * 63 + 4);
            }
            // The reader leaves: the next one reads.
            for id in ids {
                engine.remove(id);
            }
            let fresh = counted(3, 50);
            let pair = [1, 2].map(|end| [&fresh[..], &[end; 2]].concat());
            let [first, second] = pair
                .each_ref()
                .map(|p| engine.submit(request(p, 1)).unwrap());
            step(&mut engine);
            engine.remove(first);
            run(&mut engine);
            assert_eq!(engine.sequence(second).unwrap().generated().len(), 1);
            assert_eq!(engine.cache_faults(), Vec::<String>::new());
        }
    }
}

#[test]
fn attention_alone_goes_on_from_any_place() {
    let network = network(&[ATTENTION]);
    let mut engine = engine(&network, "ends");
    let document = counted(0, 60);
    ask(&mut engine, &document);
    let mut prompt = document[..37].to_vec();
    prompt.push(VOCAB - 1);
    let (matched, resumed, why) = ask(&mut engine, &prompt);
    assert_eq!((matched, resumed), (37, 37), "{why}");
}

#[test]
fn a_marked_place_outlives_others() {
    let network = network(&[ATTENTION, MAMBA]);
    let mut engine = engine(&network, "every=8; ends; budget=1200");
    let document = counted(0, 60);
    let marked = Request {
        marks: vec![20],
        ..request(&document, 1)
    };
    let id = engine.submit(marked).unwrap();
    run(&mut engine);
    engine.remove(id);
    for from in 1..6 {
        ask(&mut engine, &counted(100 * from, 50));
    }
    let told = engine.cache_use().unwrap();
    assert!(told.evicted > 10 && told.bytes <= 1200, "{told:?}");
    assert!(ask(&mut engine, &document).1 >= 20);
}

#[test]
fn what_is_spilled_is_read_again_and_a_lost_file_is_only_a_miss() {
    let folder = Folder::new("spill");
    let network = network(&[ATTENTION, MAMBA]);
    let policy = format!("every=16; ends; budget=1; spill={}", folder.0.display());
    let mut engine = engine(&network, &policy);
    let document = counted(0, 60);
    let mut alone = Alone::new(&network);
    let follows = alone.follow(&document)[..2].to_vec();
    for (resumed, from_file) in [(0, false), (59, true), (59, true)] {
        let id = engine.submit(request(&document, 2)).unwrap();
        let generated = run(&mut engine);
        assert_eq!(generated[&id], follows);
        let reuse = engine.reuse(id).unwrap().clone();
        assert_eq!((reuse.resumed, reuse.from_file), (resumed, from_file));
        engine.remove(id);
    }
    assert!(engine.cache_use().unwrap().spilled > 0);

    // Another engine, after a restart.
    let files: Vec<PathBuf> = std::fs::read_dir(&folder.0)
        .unwrap()
        .map(|f| f.unwrap().path())
        .collect();
    let mut second = self::engine(&network, "ends");
    for file in &files {
        let file = Arc::new(StateFile::open(file).unwrap());
        second.attach(&file).unwrap();
    }
    assert_eq!(ask(&mut second, &document).1, 59);

    // A folder that cannot be written to is told and hurts nobody.
    let nowhere = folder.0.join("file");
    std::fs::write(&nowhere, b"").unwrap();
    let policy = format!("ends; budget=1; spill={}", nowhere.display());
    let mut third = self::engine(&network, &policy);
    let id = third.submit(request(&document, 2)).unwrap();
    assert_eq!(run(&mut third)[&id], follows);
    let trouble = third.cache_use().unwrap().trouble.unwrap_or_default();
    assert!(trouble.contains("file"), "{trouble}");
}

#[test]
fn a_file_for_another_model_is_not_attached() {
    let folder = Folder::new("attach");
    let network = network(&[ATTENTION, MAMBA]);
    let mut first = engine(&network, "every=16; ends");
    let document = counted(0, 40);
    let id = first.submit(request(&document, 0)).unwrap();
    run(&mut first);
    first.remove(id);
    let path = folder.0.join("a.state");
    first
        .write_states(&document, &BTreeMap::new(), &path)
        .unwrap();
    let file = Arc::new(StateFile::open(&path).unwrap());
    assert_eq!(file.snapshots(), [16, 32, 40]);
    assert_eq!(file.tokens(), document);
    assert!(
        first
            .write_states(&document[..9], &BTreeMap::new(), &path)
            .is_err()
    );

    let config = EngineConfig::new(CONTEXT, 1, DType::F32);
    let mut other = Engine::new(network.clone(), config.clone()).unwrap();
    let policy: Policy = "ends".parse().unwrap();
    let weights = Fingerprint {
        weights: "x".into(),
        ..fingerprint()
    };
    other.keep_states(policy.clone(), weights);
    let error = other.attach(&file).unwrap_err().to_string();
    assert!(
        error.contains("belongs to another set of weights"),
        "{error}"
    );

    let small = self::network(&[MAMBA]);
    let mut other = Engine::new(small, config).unwrap();
    other.keep_states(policy, fingerprint());
    let error = other.attach(&file).unwrap_err().to_string();
    assert!(error.contains("belongs to no layer"), "{error}");
}
