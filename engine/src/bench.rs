//! Prefill and decode speed of a model, and the machine's limits beside it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use strata_kernels::{Backend, DType, KvType, random};

use crate::ids::TokenId;
use crate::sampler::SamplingParams;
use crate::session::{Engine, EngineConfig, Error, Output, Request};

/// What is run.
#[derive(Clone)]
pub struct BenchOptions {
    /// Tokens of the timed prompt.
    pub prompt: usize,
    /// Tokens generated after it.
    pub generate: usize,
    /// Tokens that are in the state before the timed prompt begins.
    pub depth: usize,
    /// Sequences that run together.
    pub batch: usize,
    /// Timed runs, after one that is not counted.
    pub repeat: usize,
    /// Whether that one is left out: nothing is run twice.
    pub cold: bool,
    /// Type of keys and values.
    pub kv_dtype: KvType,
    /// Bytes of activations that each row of a step takes.
    pub bytes_per_row: usize,
    /// The device.
    pub device: Arc<dyn Backend>,
}

/// A figure over several runs.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Figure {
    /// The middle one.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Figure {
    /// Of at least one value.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let (Some(min), Some(max)) = (values.first(), values.last()) else {
            return Figure::default();
        };
        Figure {
            median: values[values.len() / 2],
            min: *min,
            max: *max,
        }
    }
}

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Benched {
    /// Prompt tokens a second, all sequences together.
    pub prefill: Figure,
    /// Generated tokens a second, all sequences together.
    pub decode: Figure,
}

impl BenchOptions {
    /// The sizes that the runs need.
    pub fn config(&self) -> EngineConfig {
        let tokens = self.depth + self.prompt + self.generate + 1;
        EngineConfig::new(tokens, self.batch, self.kv_dtype)
            .for_device(&*self.device, self.bytes_per_row)
    }
}

/// Times an engine of these sizes. `report` is told after each run what is done of how many.
pub fn bench(
    engine: &mut Engine,
    options: &BenchOptions,
    report: &mut dyn FnMut(usize, usize),
) -> Result<Benched, Error> {
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    // The first run touches memory for the first time.
    let untimed = usize::from(!options.cold);
    for run in 0..options.repeat + untimed {
        let (read, generated) = once(engine, options)?;
        if run >= untimed {
            prefill.push(rate(options.prompt * options.batch, read));
            decode.push(rate(options.generate * options.batch, generated));
        }
        report(run + 1 - untimed, options.repeat);
    }
    Ok(Benched {
        prefill: Figure::of(prefill),
        decode: Figure::of(decode),
    })
}

fn rate(count: usize, time: Duration) -> f64 {
    if time.is_zero() {
        0.0
    } else {
        count as f64 / time.as_secs_f64()
    }
}

/// One run: the times for the prompts and for what is generated after them.
fn once(engine: &mut Engine, options: &BenchOptions) -> Result<(Duration, Duration), Error> {
    let vocab = engine.network().graph.vocab;
    let tokens = |sequence: usize, count: usize| -> Vec<TokenId> {
        let draw = |i| random::uniform(sequence as u64, i as u64) * vocab as f32;
        (0..count)
            .map(|i| (draw(i) as usize).min(vocab - 1) as TokenId)
            .collect()
    };
    // Depth first, untimed: the timed prompt goes on from its snapshot.
    let mut starts = Vec::new();
    for sequence in 0..options.batch {
        if options.depth == 0 {
            break;
        }
        let prompt = tokens(sequence, options.depth);
        let id = engine.submit(Request {
            prompt,
            ..Request::default()
        })?;
        while engine.advance()? {}
        starts.push(engine.snapshot(id)?);
        engine.remove(id);
    }
    // A device may still be at work on that: reading waits for it.
    let last = options.device.alloc(DType::F32, 1, 1)?;
    options.device.read(&last, &mut [0.0])?;

    let start = Instant::now();
    let mut ids = Vec::new();
    for sequence in 0..options.batch {
        let request = Request {
            prompt: tokens(sequence, options.depth + options.prompt.max(1)),
            // The first token comes from the prompt; the timed ones follow.
            max_tokens: options.generate + 1,
            sampling: SamplingParams::greedy(),
            ..Request::default()
        };
        ids.push(match starts.get(sequence) {
            Some(snapshot) => engine.restore(*snapshot, request)?,
            None => engine.submit(request)?,
        });
    }
    // Until every sequence has its first token; later ones of sequences that were done earlier count
    // as decoding from here on.
    let mut waiting = ids.clone();
    while !waiting.is_empty() && engine.advance()? {
        for output in engine.outputs() {
            if let Output::Token { id, .. } = output {
                waiting.retain(|w| w != id);
            }
        }
    }
    let read = start.elapsed();
    let start = Instant::now();
    while engine.advance()? {}
    let generated = start.elapsed();
    for id in ids {
        engine.remove(id);
    }
    for snapshot in starts {
        engine.drop_snapshot(snapshot)?;
    }
    Ok((read, generated))
}
