//! Steps allocate nothing once they are warm: all memory was taken when the engine was made, or while
//! the first steps ran.
//!
//! The thread that steps allocates nothing at all. The threads that compute may, a few times: which of
//! them meets the largest piece of an operation first, and grows its scratch for it, is chance.
//!
//! The allocator counts for the whole process, so this file has one test only.

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use strata::ids::SeqId;
use strata::random_weights::RandomWeights;
use strata::runner::Network;
use strata::sampler::SamplingParams;
use strata::session::{Engine, EngineConfig, Request};
use strata_kernels::DType;
use strata_kernels::cpu::{Cpu, CpuOptions};
use strata_layers::{Graph, Plan};

struct Counting;

static COUNTS: AtomicBool = AtomicBool::new(false);
/// By the thread that steps; by all others.
static COUNT: [AtomicUsize; 2] = [AtomicUsize::new(0), AtomicUsize::new(0)];
/// So many are shown with where they come from.
const SHOWN: usize = 3;

thread_local! {
    static STEPS: Cell<bool> = const { Cell::new(false) };
    /// To show an allocation takes memory, too.
    static SHOWS: Cell<bool> = const { Cell::new(false) };
}

impl Counting {
    fn note(&self, size: usize) {
        if !COUNTS.load(Ordering::Relaxed) || SHOWS.get() {
            return;
        }
        let count = &COUNT[usize::from(!STEPS.get())];
        if count.fetch_add(1, Ordering::Relaxed) < SHOWN && STEPS.get() {
            SHOWS.set(true);
            eprintln!("{size} bytes at\n{}", Backtrace::force_capture());
            SHOWS.set(false);
        }
    }
}

// SAFETY: all of it is the system's allocator's doing; the counter beside it touches no memory of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.note(layout.size());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.note(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        self.note(new_size);
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations while `run` runs, by this thread and by others.
fn allocations(run: impl FnOnce()) -> [usize; 2] {
    COUNT.iter().for_each(|c| c.store(0, Ordering::Relaxed));
    STEPS.set(true);
    COUNTS.store(true, Ordering::Relaxed);
    run();
    COUNTS.store(false, Ordering::Relaxed);
    STEPS.set(false);
    [0, 1].map(|i| COUNT[i].load(Ordering::Relaxed))
}

/// Most allocations of the threads that compute in one case: each has a handful of scratch buffers,
/// which grow to the largest piece by a few sizes.
const BY_CHANCE: usize = 40;

const PLAN: &str = "\
plan: 1
name: hybrid
vocab: 37
d_model: 24
context: 4096
init_std: 0.3
blocks:
  m:
    - residual: [norm: {eps: 1.0e-6}, mamba1: {d_inner: 40, d_state: 5, d_conv: 4, dt_rank: 3, inner_norm: {eps: 1.0e-6, weight: true}}]
    - residual: [norm: {name: ff_norm, eps: 1.0e-6}, moe: {experts: 4, top_k: 2, d_ff: 20, act: silu, router: {score: softmax, normalize: false}}]
  a:
    - residual: [norm: {eps: 1.0e-6}, attention: {heads: 4, kv_heads: 2, head_dim: 8, window: 50, rope: {theta: 10000}}]
    - residual: [norm: {name: ff_norm, eps: 1.0e-6}, mlp: {d_ff: 30, act: gelu}]
  f:
    - residual: [norm: {eps: 1.0e-6}, attention: {heads: 4, kv_heads: 1, head_dim: 6}]
stack: [m, a, m, f]
head: {norm: {eps: 1.0e-6}, tie: true}
";

fn engine(dtype: DType, sequences: usize, chunk: usize) -> Engine {
    engine_with(dtype, sequences, chunk, 0)
}

fn engine_with(dtype: DType, sequences: usize, chunk: usize, lookup: usize) -> Engine {
    let plan = Plan::parse(PLAN, "plan").unwrap();
    let graph = Graph::lower(&plan, "plan").unwrap();
    let backend = Arc::new(Cpu::new(CpuOptions {
        threads: 2,
        ..CpuOptions::default()
    }));
    let weights = RandomWeights::new(5, plan.init_std, dtype, backend.clone());
    let network = Arc::new(Network::build(graph, &weights, backend, dtype).unwrap());
    let config = EngineConfig::new(1024, sequences, dtype)
        .with_chunk(chunk)
        .with_lookup(lookup);
    Engine::new(network, config).unwrap()
}

fn submit(engine: &mut Engine, prompt: usize, sampling: &SamplingParams) -> SeqId {
    let request = Request {
        prompt: (0..prompt).map(|i| (i * 7 % 37) as u32).collect(),
        max_tokens: 400,
        sampling: sampling.clone(),
        ..Request::default()
    };
    engine.submit(request).unwrap()
}

fn step(engine: &mut Engine) {
    assert!(engine.step(&mut |_, _, _| {}).unwrap(), "there is work");
}

/// Faults unless `steps` steps allocate nothing.
fn check(what: &str, engine: &mut Engine, steps: usize, faults: &mut Vec<String>) {
    let [here, others] = allocations(|| (0..steps).for_each(|_| step(engine)));
    if here > 0 || others > BY_CHANCE {
        eprintln!("^ {what}");
        faults.push(format!(
            "{what}: {here} allocations in {steps} steps, {others} by threads that compute"
        ));
    }
}

#[test]
fn warm_steps_allocate_nothing() {
    let mut faults = Vec::new();
    let greedy = SamplingParams::greedy();
    let sampled = SamplingParams {
        temperature: 0.8,
        top_k: 10,
        top_p: 0.9,
        min_p: 0.01,
        repetition_penalty: 1.1,
        frequency_penalty: 0.1,
        ..SamplingParams::default()
    };
    for dtype in [DType::F32, DType::BF16] {
        for sequences in [1, 4] {
            for (how, sampling) in [("greedy", &greedy), ("sampled", &sampled)] {
                let mut engine = engine(dtype, sequences, 16);
                for i in 0..sequences {
                    submit(&mut engine, 5 + i, sampling);
                }
                (0..60).for_each(|_| step(&mut engine));
                let what = format!("{dtype}, {sequences} sequences, {how}");
                check(&what, &mut engine, 100, &mut faults);
            }
        }
        // Tokens guessed ahead, among three that are chosen from: some right, some wrong.
        let few = SamplingParams {
            logit_bias: (0..3).map(|token| (token, 1e3)).collect(),
            frequency_penalty: 0.5,
            ..SamplingParams::greedy()
        };
        for sequences in [1, 3] {
            let mut engine = engine_with(dtype, sequences, 16, 6);
            let ids: Vec<SeqId> = (0..sequences)
                .map(|i| submit(&mut engine, 5 + i, &few))
                .collect();
            (0..70).for_each(|_| step(&mut engine));
            let what = format!("{dtype}, {sequences} sequences that guess");
            check(&what, &mut engine, 20, &mut faults);
            for id in ids {
                let guessed = engine.guessed(id);
                assert!(
                    guessed.right > 0 && guessed.right < guessed.tokens,
                    "{what}: {guessed:?}"
                );
            }
        }
        // One prompt alone, and one beside sequences that decode; each after one of its like, since
        // scratch grows with what there is to look back on.
        for others in [0, 3] {
            let mut engine = engine(dtype, 4, 32);
            for i in 0..others {
                submit(&mut engine, 5 + i, &greedy);
            }
            let first = submit(&mut engine, 600, &greedy);
            (0..40).for_each(|_| step(&mut engine));
            engine.remove(first);
            submit(&mut engine, 600, &greedy);
            (0..3).for_each(|_| step(&mut engine));
            let what = format!("{dtype}, chunks of a prompt beside {others}");
            check(&what, &mut engine, 15, &mut faults);
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
