//! The exactness contract, checked on a model here and now.
//!
//! A sequence's logits do not depend on how its prompt is cut into chunks, on who shares the batch,
//! on whether its state was kept, copied, saved and restored in between, nor on the number of
//! threads. On the CPU they are equal bit for bit, because every output row is computed by the same
//! operations in the same order whatever stands beside it. Sampled sequences repeat by seed.
//!
//! A device whose sums depend on the batch says how far they may move (`Backend::tolerance`): logits are
//! then compared within that many standard deviations of their row, up to where two tokens were so
//! nearly as likely that another was chosen. Where a layer picks experts, the last bits of its input may turn its
//! choice at some tokens, and what other experts give has no bound: there one row in 32 may be farther away.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use strata_kernels::{Backend, Format, KvType, random};

use crate::estimate::picks_experts;
use crate::ids::{SeqId, TokenId};
use crate::runner::{Network, Stage};
use crate::sampler::SamplingParams;
use crate::scheduler::Chunk;
use crate::sequence::Reason;
use crate::session::{Engine, EngineConfig, Error, Output, Request};
use crate::state_file::{self, Fingerprint};

/// One row in so many may be farther away than rounding takes it where a choice of experts can turn.
const STRAY: usize = 32;

/// How much is run.
#[derive(Debug, Clone)]
pub struct VerifyOptions {
    /// Tokens of the longest prompt.
    pub prompt: usize,
    /// Tokens generated after it.
    pub generate: usize,
    /// Sizes of chunks to compare with the whole.
    pub chunks: Vec<usize>,
    /// Type of keys and values.
    pub kv_dtype: KvType,
    /// Seed of the prompts.
    pub seed: u64,
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq)]
pub struct Check {
    /// What was compared: `chunked equals whole (chunk 7)`.
    pub name: String,
    /// What differed first; none if nothing did.
    pub fault: Option<String>,
    /// The largest difference of a row that was compared, in standard deviations of its logits.
    pub distance: f32,
    /// Rows that were farther away than rounding takes them, as a choice of experts may.
    pub strays: usize,
    /// Logits compared.
    pub compared: usize,
    /// Time taken.
    pub time: Duration,
}

/// What a caller is told while checks run.
pub enum Progress<'a> {
    /// A check is done.
    Checked(&'a Check),
    /// An engine has run, with memory as its config asks for.
    Ran(&'a Engine),
}

/// What a sequence gave: tokens, and the logits of every position.
#[derive(Debug, Clone, Default, PartialEq)]
struct Trace {
    generated: Vec<TokenId>,
    logits: BTreeMap<usize, Vec<f32>>,
}

impl Trace {
    /// The first difference, in words. `self` is a whole trace.
    fn difference(&self, other: &Trace, tolerance: f32, strays: usize) -> Option<String> {
        if tolerance > 0.0 {
            return self.far(other, tolerance, strays);
        }
        for (position, a) in &self.logits {
            let Some(b) = other.logits.get(position) else {
                continue;
            };
            let different = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits();
            if let Some(token) = a.iter().zip(b).position(different) {
                let most = a
                    .iter()
                    .zip(b)
                    .map(|(a, b)| (a - b).abs())
                    .fold(0.0, f32::max);
                return Some(format!(
                    "position {position}: the logit of token {token} is {} and {}, the largest difference there is {most:.3e}",
                    a[token], b[token]
                ));
            }
        }
        let n = (0..self.generated.len().min(other.generated.len()))
            .find(|n| self.generated[*n] != other.generated[*n])?;
        let (a, b) = (self.generated[n], other.generated[n]);
        Some(format!("generated token {n} is {a} and {b}"))
    }

    /// The first row that is farther away than `tolerance` standard deviations of its logits, if there are more than
    /// `strays` of them.
    fn far(&self, other: &Trace, tolerance: f32, strays: usize) -> Option<String> {
        let far = |(_, e): &(usize, f32)| e.is_nan() || *e > tolerance;
        let (rows, count) = (self.distances(other).count(), self.strays(other, tolerance));
        let broken = self.distances(other).any(|(_, e)| e.is_nan());
        if count <= strays && !broken {
            return None;
        }
        let (position, error) = self.distances(other).find(far)?;
        Some(format!(
            "position {position}: logits differ by {error:.1e} of their standard deviation, at most {tolerance:.1} is allowed; so do {count} of {rows} rows"
        ))
    }

    /// Rows farther away than that.
    fn strays(&self, other: &Trace, tolerance: f32) -> usize {
        let far = |(_, e): &(usize, f32)| *e > tolerance;
        self.distances(other).filter(far).count()
    }

    /// The largest difference of each row that can be compared, in standard deviations of its logits.
    fn distances<'a>(&'a self, other: &'a Trace) -> impl Iterator<Item = (usize, f32)> + 'a {
        let count = self.generated.len().min(other.generated.len());
        let parted = (0..count).find(|n| self.generated[*n] != other.generated[*n]);
        // The last row gave the last token: what follows a token that differs cannot be compared.
        let rows = self.logits.keys().last().map_or(0, |last| last + 1);
        let comparable = parted.map_or(rows, |n| rows - self.generated.len() + n + 1);
        self.logits.range(..comparable).filter_map(|(position, a)| {
            let b = other.logits.get(position)?;
            let mean = a.iter().sum::<f32>() / a.len() as f32;
            let deviation = a.iter().map(|a| (a - mean).powi(2)).sum::<f32>() / a.len() as f32;
            let distances = a.iter().zip(b).map(|(a, b)| (a - b).abs());
            let most = distances.fold(0.0, |m: f32, d| if m >= d || m.is_nan() { m } else { d });
            Some((*position, most / deviation.sqrt().max(f32::MIN_POSITIVE)))
        })
    }

    fn shared(&self, other: &Trace) -> usize {
        let shared = self
            .logits
            .iter()
            .filter(|(p, _)| other.logits.contains_key(p));
        shared.map(|(_, l)| l.len()).sum()
    }
}

/// Runs every check. `other_threads` holds backends of the same device with other numbers of threads.
/// `folder` is where a state file may be written and is removed again. `report` is told of each check
/// and of each engine as it is done.
pub fn verify(
    network: &Arc<Network>,
    options: &VerifyOptions,
    other_threads: &[(usize, Arc<dyn Backend>)],
    folder: &Path,
    report: &mut dyn FnMut(Progress<'_>),
) -> Result<Vec<Check>, Error> {
    let mut verify = Verify {
        network,
        options,
        checks: Vec::new(),
        report,
    };
    let prompt = verify.prompt(0, options.prompt);
    let start = Instant::now();
    let whole = verify.run_alone(
        network,
        &prompt,
        Chunk::AtMost(options.prompt.max(1)),
        greedy(),
    )?;
    let threads = whole.clone();
    verify.check(
        "the whole prompt runs, logits are finite",
        start,
        &whole,
        &threads,
        |trace| {
            let bad = trace
                .logits
                .iter()
                .find(|(_, l)| l.iter().any(|l| !l.is_finite()));
            bad.map(|(p, _)| format!("position {p}: a logit is not finite"))
        },
    );

    for chunk in &options.chunks {
        let start = Instant::now();
        let chunked = verify.run_alone(network, &prompt, Chunk::Every(*chunk), greedy())?;
        verify.compare(
            &format!("chunked equals whole (chunk {chunk})"),
            start,
            &whole,
            &chunked,
        );
    }
    for (count, backend) in other_threads {
        let start = Instant::now();
        let other = Arc::new(network.on(backend.clone()));
        let trace = verify.run_alone(&other, &prompt, Chunk::AtMost(options.prompt), greedy())?;
        let name = format!(
            "{count} thread{} give the same",
            if *count == 1 { "" } else { "s" }
        );
        verify.compare(&name, start, &whole, &trace);
    }
    verify.batched()?;
    verify.preempted()?;
    verify.forked(&whole, &prompt)?;
    verify.restored(&whole, &prompt, folder)?;
    verify.sampled(&prompt)?;
    verify.looked_up()?;
    Ok(verify.checks)
}

/// How far results of a network may move, in standard deviations; 0 is not at all.
pub fn tolerance(network: &Network) -> f32 {
    let of = |stage: &Stage| {
        let backend = stage.backend.clone();
        let of = move |format: &Format| backend.tolerance(network.activations, *format);
        network.formats().iter().map(of)
    };
    network.stages.iter().flat_map(of).fold(0.0, f32::max)
}

/// Of `rows` rows, how many may be farther away: none, but where a choice of experts can turn.
fn strays_allowed(network: &Network, rows: usize) -> usize {
    let turns = tolerance(network) > 0.0 && picks_experts(&network.graph);
    if turns { rows.div_ceil(STRAY) } else { 0 }
}

fn greedy() -> SamplingParams {
    SamplingParams::greedy()
}

struct Verify<'a> {
    network: &'a Arc<Network>,
    options: &'a VerifyOptions,
    checks: Vec<Check>,
    report: &'a mut dyn FnMut(Progress<'_>),
}

impl Verify<'_> {
    /// A prompt of random tokens.
    fn prompt(&self, number: u64, len: usize) -> Vec<TokenId> {
        let vocab = self.network.graph.vocab as f32;
        let draw = |i| random::uniform(self.options.seed ^ (number << 32), i as u64) * vocab;
        (0..len)
            .map(|i| (draw(i) as usize).min(self.network.graph.vocab - 1) as TokenId)
            .collect()
    }

    fn config(&self, sequences: usize) -> EngineConfig {
        let context = self.options.prompt + self.options.generate + 8;
        // A small odd page, so that every check crosses many of their borders.
        let config = EngineConfig::new(context, sequences, self.options.kv_dtype);
        EngineConfig {
            page_size: 5,
            ..config
        }
    }

    fn request(&self, prompt: &[TokenId], sampling: SamplingParams) -> Request {
        let max_tokens = self.options.generate;
        let stop = Vec::new();
        Request {
            prompt: prompt.to_vec(),
            max_tokens,
            stop,
            sampling,
            prompt_logits: true,
            marks: Vec::new(),
        }
    }

    fn run_alone(
        &mut self,
        network: &Arc<Network>,
        prompt: &[TokenId],
        chunk: Chunk,
        sampling: SamplingParams,
    ) -> Result<Trace, Error> {
        let (Chunk::AtMost(rows) | Chunk::Every(rows)) = chunk;
        let config = EngineConfig {
            chunk,
            token_budget: rows.max(1),
            ..self.config(1)
        };
        let mut engine = Engine::new(network.clone(), config)?;
        let id = engine.submit(self.request(prompt, sampling))?;
        let mut traces = run(&mut engine, usize::MAX)?;
        (self.report)(Progress::Ran(&engine));
        Ok(traces.remove(&id).unwrap_or_default())
    }

    fn compare(&mut self, name: &str, start: Instant, expected: &Trace, found: &Trace) {
        let tolerance = tolerance(self.network);
        let strays = strays_allowed(self.network, expected.distances(found).count());
        self.check(name, start, expected, found, |found| {
            expected.difference(found, tolerance, strays)
        });
    }

    fn check(
        &mut self,
        name: &str,
        start: Instant,
        expected: &Trace,
        found: &Trace,
        fault: impl FnOnce(&Trace) -> Option<String>,
    ) {
        let compared = expected.shared(found);
        let fault = match fault(found) {
            None if compared == 0 => Some("nothing could be compared".into()),
            fault => fault,
        };
        let check = Check {
            name: name.into(),
            fault,
            distance: expected
                .distances(found)
                .map(|(_, error)| error)
                .fold(0.0, f32::max),
            strays: match tolerance(self.network) {
                0.0 => 0,
                most => expected.strays(found, most),
            },
            compared,
            time: start.elapsed(),
        };
        (self.report)(Progress::Checked(&check));
        self.checks.push(check);
    }

    /// Prompts of several lengths, submitted one after the other, in chunks beside decoding rows.
    fn batched(&mut self) -> Result<(), Error> {
        let start = Instant::now();
        let longest = self.options.prompt;
        let lengths = [longest, 1, longest / 2 + 1, longest / 3 + 1, 2.min(longest)];
        let prompts: Vec<_> = lengths
            .iter()
            .zip(1..)
            .map(|(len, n)| self.prompt(n, *len))
            .collect();
        let chunk = longest / 4 + 1;
        let config = EngineConfig {
            chunk: Chunk::AtMost(chunk),
            token_budget: chunk + prompts.len(),
            ..self.config(prompts.len())
        };
        let mut engine = Engine::new(self.network.clone(), config)?;
        let (mut ids, mut together) = (Vec::new(), BTreeMap::new());
        for prompt in &prompts {
            ids.push(engine.submit(self.request(prompt, greedy()))?);
            merge(&mut together, run(&mut engine, 1)?);
        }
        merge(&mut together, run(&mut engine, usize::MAX)?);
        (self.report)(Progress::Ran(&engine));
        for (i, (id, prompt)) in ids.iter().zip(&prompts).enumerate() {
            let alone = self.run_alone(self.network, prompt, Chunk::AtMost(longest), greedy())?;
            let name = format!(
                "batched equals single (prompt {} of {})",
                i + 1,
                prompts.len()
            );
            let found = together.remove(id).unwrap_or_default();
            self.compare(&name, start, &alone, &found);
        }
        Ok(())
    }

    /// Three sequences in memory for one and a half.
    fn preempted(&mut self) -> Result<(), Error> {
        if self.network.graph.page_elements_per_token() == 0 {
            return Ok(());
        }
        let start = Instant::now();
        let (prompt, generate) = (self.options.prompt / 2 + 1, self.options.generate);
        let prompts: Vec<_> = (10..13).map(|n| self.prompt(n, prompt)).collect();
        let page_size = 2;
        let needed = (prompt + generate).div_ceil(page_size);
        let config = EngineConfig {
            page_size,
            ..self.config(3)
        };
        let mut engine = Engine::with_pages(self.network.clone(), config, needed + needed / 2 + 1)?;
        let mut ids = Vec::new();
        for prompt in &prompts {
            ids.push(engine.submit(self.request(prompt, greedy()))?);
        }
        let mut found = run(&mut engine, usize::MAX)?;
        for (id, prompt) in ids.iter().zip(&prompts) {
            let alone = self.run_alone(
                self.network,
                prompt,
                Chunk::AtMost(self.options.prompt),
                greedy(),
            )?;
            let name = format!("preempted equals undisturbed (sequence {})", id.0 + 1);
            self.compare(&name, start, &alone, &found.remove(id).unwrap_or_default());
        }
        Ok(())
    }

    /// A fork in the middle of decoding: both go on as the one did.
    fn forked(&mut self, whole: &Trace, prompt: &[TokenId]) -> Result<(), Error> {
        let start = Instant::now();
        let mut engine = Engine::new(self.network.clone(), self.config(3))?;
        let id = engine.submit(self.request(prompt, greedy()))?;
        let mut traces = BTreeMap::new();
        while engine
            .sequence(id)
            .is_some_and(|s| s.generated().len() < 2 && !s.is_finished())
        {
            merge(&mut traces, run(&mut engine, 1)?);
        }
        if engine.sequence(id).is_none_or(|s| s.is_finished()) {
            return Ok(());
        }
        let child = engine.fork(id, greedy())?;
        // A third goes another way on the shared pages: it must disturb neither.
        let other = engine.fork(
            id,
            SamplingParams {
                seed: 7,
                ..SamplingParams::default()
            },
        )?;
        merge(&mut traces, run(&mut engine, usize::MAX)?);
        (self.report)(Progress::Ran(&engine));
        let parent = traces.remove(&id).unwrap_or_default();
        self.compare("forked equals continuous (parent)", start, whole, &parent);
        let mut forked = traces.remove(&child).unwrap_or_default();
        traces.remove(&other);
        forked.generated.splice(
            0..0,
            whole.generated[..2.min(whole.generated.len())].to_vec(),
        );
        self.compare("forked equals continuous (child)", start, whole, &forked);
        Ok(())
    }

    /// State kept in the middle of the prompt, and after some generated tokens; in memory, and in a
    /// file that another engine reads.
    fn restored(&mut self, whole: &Trace, prompt: &[TokenId], folder: &Path) -> Result<(), Error> {
        let fingerprint = Fingerprint {
            plan: "verify".into(),
            weights: "verify".into(),
        };
        let all: Vec<TokenId> = prompt.iter().chain(&whole.generated).copied().collect();
        let cuts = [
            1,
            prompt.len() / 2,
            prompt.len(),
            prompt.len() + whole.generated.len() / 2,
        ];
        // One token goes in after the cut, and at least one must be left to compare.
        for cut in cuts.into_iter().filter(|c| *c > 0 && *c + 1 < all.len()) {
            let start = Instant::now();
            let mut engine = Engine::new(self.network.clone(), self.config(2))?;
            let id = engine.submit(Request {
                prompt: all[..cut].to_vec(),
                sampling: greedy(),
                ..Request::default()
            })?;
            run(&mut engine, usize::MAX)?;
            let snapshot = engine.snapshot(id)?;
            engine.remove(id);
            let rest = Request {
                prompt: all[..cut.max(prompt.len()) + usize::from(cut >= prompt.len())].to_vec(),
                ..self.request(&[], greedy())
            };
            let done = rest.prompt.len() - prompt.len();
            let rest = Request {
                max_tokens: self.options.generate - done,
                ..rest
            };
            let (label, mut found) = ("in memory", {
                let id = engine.restore(snapshot, rest.clone())?;
                run(&mut engine, usize::MAX)?
                    .remove(&id)
                    .unwrap_or_default()
            });
            found
                .generated
                .splice(0..0, whole.generated[..done].to_vec());
            let name = format!("restored equals continuous ({label}, after {cut} tokens)");
            self.compare(&name, start, whole, &found);

            let start = Instant::now();
            let path = folder.join(format!("strata-verify-{}-{cut}.state", std::process::id()));
            let saved = state_file::save(&engine, snapshot, &fingerprint, &path);
            (self.report)(Progress::Ran(&engine));
            let mut second = Engine::new(self.network.clone(), self.config(2))?;
            let loaded = saved.and_then(|()| state_file::load(&mut second, &fingerprint, &path));
            let _ = std::fs::remove_file(&path);
            let name = format!("restored equals continuous (from a file, after {cut} tokens)");
            match loaded {
                Ok(snapshot) => {
                    let id = second.restore(snapshot, rest)?;
                    let mut found = run(&mut second, usize::MAX)?
                        .remove(&id)
                        .unwrap_or_default();
                    found
                        .generated
                        .splice(0..0, whole.generated[..done].to_vec());
                    (self.report)(Progress::Ran(&second));
                    self.compare(&name, start, whole, &found);
                }
                Err(error) => {
                    let found = Trace::default();
                    self.check(&name, start, whole, &found, |_| Some(error.to_string()));
                }
            }
        }
        Ok(())
    }

    /// The same seed gives the same tokens, alone and in company.
    fn sampled(&mut self, prompt: &[TokenId]) -> Result<(), Error> {
        let start = Instant::now();
        let sampling = SamplingParams {
            seed: 1234,
            top_p: 0.95,
            ..SamplingParams::default()
        };
        let chunk = Chunk::AtMost(self.options.prompt);
        let alone = self.run_alone(self.network, prompt, chunk, sampling.clone())?;
        let mut engine = Engine::new(self.network.clone(), self.config(2))?;
        engine.submit(self.request(&self.prompt(20, 3), SamplingParams::default()))?;
        let id = engine.submit(self.request(prompt, sampling))?;
        let found = run(&mut engine, usize::MAX)?
            .remove(&id)
            .unwrap_or_default();
        (self.report)(Progress::Ran(&engine));
        self.compare("sampled sequences repeat by seed", start, &alone, &found);
        Ok(())
    }

    /// Tokens guessed ahead, in a prompt that repeats itself: they are kept only if they are what plain decoding gives.
    fn looked_up(&mut self) -> Result<(), Error> {
        let start = Instant::now();
        let half = self.prompt(21, self.options.prompt.div_ceil(2));
        let prompt: Vec<TokenId> = half
            .iter()
            .chain(&half)
            .copied()
            .take(self.options.prompt)
            .collect();
        // Two tokens to choose from: guesses are now right, now wrong.
        let sampling = SamplingParams {
            logit_bias: half.iter().take(2).map(|token| (*token, 1e3)).collect(),
            ..greedy()
        };
        let chunk = Chunk::AtMost(self.options.prompt);
        let plain = self.run_alone(self.network, &prompt, chunk, sampling.clone())?;
        let config = self.config(1).with_lookup(6);
        let mut engine = Engine::new(self.network.clone(), config)?;
        let id = engine.submit(self.request(&prompt, sampling))?;
        let found = run(&mut engine, usize::MAX)?
            .remove(&id)
            .unwrap_or_default();
        (self.report)(Progress::Ran(&engine));
        self.compare("guessed ahead equals plain", start, &plain, &found);
        Ok(())
    }
}

/// Runs up to `steps` steps and gathers what every sequence gave.
fn run(engine: &mut Engine, steps: usize) -> Result<BTreeMap<SeqId, Trace>, Error> {
    let mut traces: BTreeMap<SeqId, Trace> = BTreeMap::new();
    for _ in 0..steps {
        let more = engine.step(&mut |id, position, logits| {
            traces
                .entry(id)
                .or_default()
                .logits
                .insert(position, logits.to_vec());
        })?;
        for output in engine.outputs() {
            match output {
                Output::Token { id, sampled } => {
                    traces.entry(*id).or_default().generated.push(sampled.token);
                }
                Output::Finished { reason, .. } => debug_assert_ne!(*reason, Reason::Failed),
            }
        }
        if !more {
            break;
        }
    }
    Ok(traces)
}

fn merge(into: &mut BTreeMap<SeqId, Trace>, from: BTreeMap<SeqId, Trace>) {
    for (id, trace) in from {
        let entry = into.entry(id).or_default();
        entry.generated.extend(trace.generated);
        entry.logits.extend(trace.logits);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_rows_may_stray_where_a_choice_turns_and_none_may_be_broken() {
        let row = |p: usize| (p, vec![0.0, 1.0, 2.0, p as f32]);
        let whole = Trace {
            generated: Vec::new(),
            logits: (0..40).map(row).collect(),
        };
        let check = |changes: &[(usize, f32)], strays: usize, holds: bool| {
            let mut other = whole.clone();
            for (position, logit) in changes {
                other.logits.get_mut(position).unwrap()[0] = *logit;
            }
            let fault = whole.difference(&other, 0.5, strays);
            assert_eq!(fault.is_none(), holds, "{changes:?}, {strays}: {fault:?}");
        };
        check(&[], 0, true);
        check(&[(3, 0.01), (7, -0.01)], 0, true);
        check(&[(3, 50.0)], 0, false);
        check(&[(3, 50.0)], 1, true);
        check(&[(3, 50.0), (9, 80.0)], 1, false);
        check(&[(3, f32::NAN)], 1, false);
    }
}
