//! From logits to a token.
//!
//! In this order, as transformers' processors and OpenAI's parameters define them, once a [`Constraint`] has left only
//! the tokens that it allows:
//!
//! 1. repetition penalty `r`, once for every distinct token of prompt and output: `l > 0 ? l / r : l * r`
//! 2. presence `a` and frequency `b` penalties over the generated tokens: `l -= a * (n > 0) + b * n`
//! 3. logit bias: `l += bias`
//! 4. temperature `l / t`, then top-k, top-p, min-p, then one draw
//!
//! Log-probabilities are those of the model: log-softmax of the logits before all of it.
//! The draw for the n-th generated token depends on (seed, n) alone, so a sequence comes out the same
//! alone or in a batch, in chunks, or after it was preempted and resumed.

use std::fmt;

use crate::constraint::{self, Constraint, Follower};

/// How one sequence is sampled. The default is plain sampling at temperature 1.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 takes the likeliest token (the lowest id among equals); 1 is the model's own distribution.
    pub temperature: f32,
    /// Keeps the `top_k` likeliest tokens and their equals; 0 keeps all.
    pub top_k: usize,
    /// Keeps the likeliest tokens until their mass reaches `top_p`, in (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Drops tokens less likely than `min_p` times the likeliest, in [0, 1]; 0 drops none.
    pub min_p: f32,
    /// Above 1 makes tokens of prompt and output less likely; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from every generated token, in [-2, 2]; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted once per occurrence from every generated token, in [-2, 2]; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Key of the random draws.
    pub seed: u64,
    /// With `Some(k)`, every token comes with its log-probability and the `k` likeliest ones.
    pub logprobs: Option<usize>,
    /// The form that the generated text must have.
    pub constraint: Option<Constraint>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
            constraint: None,
        }
    }
}

/// Everything wrong with a [`SamplingParams`], one line per fault.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub struct SamplingFaults(pub Vec<String>);

impl fmt::Display for SamplingFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl SamplingParams {
    /// The likeliest token each time.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            ..Self::default()
        }
    }

    /// Collects every value out of range for a vocabulary of `vocab` tokens.
    pub fn check(&self, vocab: usize) -> Result<(), SamplingFaults> {
        let ranges = [
            (
                "temperature",
                self.temperature,
                0.0,
                f32::MAX,
                "0 (greedy) or more",
            ),
            (
                "top_p",
                self.top_p,
                f32::MIN_POSITIVE,
                1.0,
                "above 0, at most 1 (1 keeps all)",
            ),
            ("min_p", self.min_p, 0.0, 1.0, "from 0 (off) to 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                f32::MIN_POSITIVE,
                f32::MAX,
                "above 0 (1 is off)",
            ),
            (
                "presence_penalty",
                self.presence_penalty,
                -2.0,
                2.0,
                "from -2 to 2 (0 is off)",
            ),
            (
                "frequency_penalty",
                self.frequency_penalty,
                -2.0,
                2.0,
                "from -2 to 2 (0 is off)",
            ),
        ];
        let mut faults: Vec<String> = ranges
            .iter()
            .filter(|(_, value, low, high, _)| !(low..=high).contains(&value))
            .map(|(name, value, _, _, expected)| {
                format!("{name}: expected {expected}, found {value}")
            })
            .collect();
        for (token, bias) in &self.logit_bias {
            if *token as usize >= vocab {
                faults.push(format!(
                    "logit_bias: token {token} is outside the vocabulary of {vocab}"
                ));
            }
            if !bias.is_finite() {
                faults.push(format!(
                    "logit_bias: token {token} expects a finite number, found {bias}"
                ));
            }
        }
        if let Some(k) = self.logprobs.filter(|k| *k > vocab) {
            faults.push(format!(
                "logprobs: expected at most the vocabulary of {vocab}, found {k}"
            ));
        }
        if faults.is_empty() {
            Ok(())
        } else {
            Err(SamplingFaults(faults))
        }
    }

    fn changes_logits(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
            || !self.logit_bias.is_empty()
    }
}

/// A sampled token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Its log-probability under the model (natural logarithm), if asked for.
    pub logprob: Option<f32>,
    /// The likeliest tokens with their log-probabilities, likeliest first; empty if not asked for.
    pub top: Vec<(u32, f32)>,
}

impl Sampled {
    /// A token by itself.
    pub fn plain(token: u32) -> Self {
        Sampled {
            token,
            logprob: None,
            top: Vec::new(),
        }
    }
}

/// Logits no token can be taken from.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// A logit is NaN: a kernel or the weights are at fault.
    #[error(
        "logit of token {token} is NaN at generated token {position} ({count} of {vocab} are): the weights or a kernel are at fault; run `strata verify`"
    )]
    Nan {
        /// The first such token.
        token: u32,
        /// Index among the generated tokens.
        position: usize,
        /// How many logits are NaN.
        count: usize,
        /// How many logits there are.
        vocab: usize,
    },
    /// A logit is plus infinity, before or after penalties.
    #[error(
        "logit of token {token} is infinite at generated token {position}: the weights, a penalty or a kernel are at fault"
    )]
    Infinite {
        /// The first such token.
        token: u32,
        /// Index among the generated tokens.
        position: usize,
    },
    /// There is no logit, or every one is minus infinity.
    #[error(
        "no token of {vocab} is possible at generated token {position}: every logit is minus infinity"
    )]
    Nothing {
        /// How many logits there are.
        vocab: usize,
        /// Index among the generated tokens.
        position: usize,
    },
    /// A token of the history lies outside the vocabulary.
    #[error("token {token} of the sequence is outside the vocabulary of {vocab}")]
    Token {
        /// The token.
        token: u32,
        /// How many logits there are.
        vocab: usize,
    },
    /// The text is not what the constraint allows, or that is too much to follow.
    #[error(transparent)]
    Constraint(#[from] constraint::Error),
}

impl SampleError {
    /// Whether it is this sequence's alone: its constraint or its penalties leave nothing to choose.
    pub fn is_of_sequence(&self) -> bool {
        match self {
            SampleError::Constraint(_)
            | SampleError::Nothing { .. }
            | SampleError::Infinite { .. } => true,
            SampleError::Nan { .. } | SampleError::Token { .. } => false,
        }
    }
}

/// Samples one sequence. Holds scratch memory only, and where it stands in its constraint, which it finds from what
/// was generated: equal calls give equal tokens.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    follower: Option<Follower>,
    adjusted: Vec<f32>,          // (V)
    counts: Vec<u32>,            // (V) occurrences, zero between calls
    candidates: Vec<(u32, f32)>, // token, logit
}

impl Sampler {
    /// A sampler for a vocabulary of `vocab` tokens, or every fault of `params`.
    pub fn new(params: SamplingParams, vocab: usize) -> Result<Self, SamplingFaults> {
        params.check(vocab)?;
        Ok(Self {
            follower: params.constraint.as_ref().map(Constraint::begin),
            params,
            adjusted: Vec::new(),
            counts: Vec::new(),
            candidates: Vec::new(),
        })
    }

    /// What it samples by.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// Whether it takes the largest logit and needs to know no more of them.
    pub fn takes_likeliest(&self) -> bool {
        let greedy = self.params.temperature == 0.0 || self.params.top_k == 1;
        greedy
            && self.follower.is_none()
            && !self.params.changes_logits()
            && self.params.logprobs.is_none()
    }

    /// Whether what was `generated` before it is what its constraint allows.
    pub fn follow(&mut self, generated: &[u32]) -> Result<(), constraint::Error> {
        match &mut self.follower {
            Some(follower) => follower.follow(generated),
            None => Ok(()),
        }
    }

    /// The token after `prompt` and `generated`, from its logits (V).
    pub fn sample(
        &mut self,
        logits: &[f32],
        prompt: &[u32],
        generated: &[u32],
    ) -> Result<Sampled, SampleError> {
        let position = generated.len();
        let best = checked_argmax(logits, position)?;
        let token = if self.follower.is_some() || self.params.changes_logits() {
            let mut adjusted = std::mem::take(&mut self.adjusted);
            adjusted.clear();
            adjusted.extend_from_slice(logits);
            let restricted = match &mut self.follower {
                Some(follower) => follower.restrict(generated, &mut adjusted),
                None => Ok(()),
            };
            let token = restricted
                .map_err(SampleError::Constraint)
                .and_then(|()| self.adjust(&mut adjusted, prompt, generated))
                .and_then(|()| checked_argmax(&adjusted, position))
                .map(|best| self.choose(&adjusted, best, position));
            self.adjusted = adjusted;
            token?
        } else {
            self.choose(logits, best, position)
        };
        let (logprob, top) = match self.params.logprobs {
            Some(k) => {
                let normalizer = log_sum_exp(logits);
                let logprob = |logit: f32| (f64::from(logit) - normalizer) as f32;
                self.largest(logits, k);
                let top = self
                    .candidates
                    .iter()
                    .map(|&(token, logit)| (token, logprob(logit)))
                    .collect();
                (Some(logprob(logits[token as usize])), top)
            }
            None => (None, Vec::new()),
        };
        Ok(Sampled {
            token,
            logprob,
            top,
        })
    }

    /// Penalties and bias, in place.
    fn adjust(
        &mut self,
        logits: &mut [f32],
        prompt: &[u32],
        generated: &[u32],
    ) -> Result<(), SampleError> {
        let vocab = logits.len();
        if let Some(&token) = prompt
            .iter()
            .chain(generated)
            .find(|token| **token as usize >= vocab)
        {
            return Err(SampleError::Token { token, vocab });
        }
        self.counts.resize(vocab, 0);
        let penalty = self.params.repetition_penalty;
        if penalty != 1.0 {
            for &token in prompt.iter().chain(generated) {
                let seen = &mut self.counts[token as usize];
                if *seen == 0 {
                    *seen = 1;
                    let logit = &mut logits[token as usize];
                    *logit = if *logit > 0.0 {
                        *logit / penalty
                    } else {
                        *logit * penalty
                    };
                }
            }
            prompt
                .iter()
                .chain(generated)
                .for_each(|&token| self.counts[token as usize] = 0);
        }
        let (presence, frequency) = (self.params.presence_penalty, self.params.frequency_penalty);
        if presence != 0.0 || frequency != 0.0 {
            generated
                .iter()
                .for_each(|&token| self.counts[token as usize] += 1);
            for &token in generated {
                let count = std::mem::take(&mut self.counts[token as usize]);
                if count > 0 {
                    logits[token as usize] -= presence + frequency * count as f32;
                }
            }
        }
        for &(token, bias) in &self.params.logit_bias {
            logits[token as usize] += bias;
        }
        Ok(())
    }

    fn choose(&mut self, logits: &[f32], best: u32, position: usize) -> u32 {
        let SamplingParams {
            temperature,
            top_k,
            top_p,
            min_p,
            seed,
            ..
        } = self.params;
        if temperature == 0.0 || top_k == 1 {
            return best;
        }
        let top = logits[best as usize];
        let weight = |logit: f32| f64::from((logit - top) / temperature).exp();
        let everything = logits
            .iter()
            .enumerate()
            .map(|(token, &logit)| (token as u32, logit));
        self.candidates.clear();
        self.candidates.extend(everything.clone());
        if top_k > 0 && top_k < logits.len() {
            let (_, &mut (_, kth), _) = self.candidates.select_nth_unstable_by(top_k - 1, likelier);
            self.candidates.clear();
            self.candidates
                .extend(everything.filter(|(_, logit)| *logit >= kth));
        }
        if top_p < 1.0 {
            let mass: f64 = self
                .candidates
                .iter()
                .map(|&(_, logit)| weight(logit))
                .sum();
            let kept = nucleus(&mut self.candidates, mass * f64::from(top_p), weight);
            self.candidates.truncate(kept);
        }
        if min_p > 0.0 {
            let floor = top + min_p.ln() * temperature;
            self.candidates
                .retain(|&(token, logit)| logit >= floor || token == best);
        }
        let total: f64 = self
            .candidates
            .iter()
            .map(|&(_, logit)| weight(logit))
            .sum();
        let mut rest = uniform(seed, position as u64) * total;
        for &(token, logit) in &self.candidates {
            rest -= weight(logit);
            if rest < 0.0 {
                return token;
            }
        }
        best // rounding left a crumb of mass
    }

    /// Leaves the `k` likeliest tokens in `candidates`, likeliest first.
    fn largest(&mut self, logits: &[f32], k: usize) {
        self.candidates.clear();
        if k == 0 {
            return;
        }
        self.candidates.extend(
            logits
                .iter()
                .enumerate()
                .map(|(token, &logit)| (token as u32, logit)),
        );
        if k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k - 1, likelier);
            self.candidates.truncate(k);
        }
        self.candidates.sort_unstable_by(likelier);
    }
}

/// Likeliest first, the lower id first among equals.
fn likelier(a: &(u32, f32), b: &(u32, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The likeliest token, after checking that the logits can be sampled from.
fn checked_argmax(logits: &[f32], position: usize) -> Result<u32, SampleError> {
    // By lanes, as processors compare; which token it was is asked once.
    const LANES: usize = 16;
    let (mut tops, mut nans) = ([f32::NEG_INFINITY; LANES], [0u32; LANES]);
    let mut look = |logits: &[f32]| {
        for ((top, nans), logit) in tops.iter_mut().zip(&mut nans).zip(logits) {
            *top = if *logit > *top { *logit } else { *top };
            *nans += u32::from(logit.is_nan());
        }
    };
    let whole = logits.chunks_exact(LANES);
    let rest = whole.remainder();
    whole.for_each(&mut look);
    look(rest);
    let top = tops.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let count = nans.into_iter().sum::<u32>() as usize;
    let best = logits.iter().position(|l| *l == top).unwrap_or(0);
    let vocab = logits.len();
    if let Some(token) = (count > 0)
        .then(|| logits.iter().position(|logit| logit.is_nan()))
        .flatten()
    {
        return Err(SampleError::Nan {
            token: token as u32,
            position,
            count,
            vocab,
        });
    }
    match top {
        f32::NEG_INFINITY => Err(SampleError::Nothing { vocab, position }),
        f32::INFINITY => Err(SampleError::Infinite {
            token: best as u32,
            position,
        }),
        _ => Ok(best as u32),
    }
}

/// Sorts the fewest likeliest candidates whose weights reach `mass` to the front; says how many.
///
/// Sorts ever larger fronts, as the nucleus is usually far smaller than the vocabulary.
fn nucleus(candidates: &mut [(u32, f32)], mass: f64, weight: impl Fn(f32) -> f64) -> usize {
    let (mut sorted, mut sum) = (0, 0.0);
    while sorted < candidates.len() {
        let end = (sorted + 64.max(3 * sorted)).min(candidates.len());
        if end < candidates.len() {
            candidates[sorted..].select_nth_unstable_by(end - sorted - 1, likelier);
        }
        candidates[sorted..end].sort_unstable_by(likelier);
        for (i, &(_, logit)) in candidates[sorted..end].iter().enumerate() {
            sum += weight(logit);
            if sum >= mass {
                return sorted + i + 1;
            }
        }
        sorted = end;
    }
    sorted
}

/// The log-probability of `token` under these logits, and the `k` likeliest tokens with theirs, likeliest first.
pub fn log_probabilities(logits: &[f32], token: u32, k: usize) -> (f32, Vec<(u32, f32)>) {
    let normalizer = log_sum_exp(logits);
    let logprob = |logit: f32| (f64::from(logit) - normalizer) as f32;
    let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    let k = k.min(all.len());
    if k > 0 && k < all.len() {
        all.select_nth_unstable_by(k - 1, likelier);
    }
    all.truncate(k);
    all.sort_unstable_by(likelier);
    let top = all.into_iter().map(|(t, logit)| (t, logprob(logit)));
    (logprob(logits[token as usize]), top.collect())
}

/// The logarithm of the sum of exponentials, summed in f64.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits
        .iter()
        .map(|&logit| f64::from((logit - top).exp()))
        .sum();
    f64::from(top) + sum.ln()
}

/// A number in [0, 1) that depends on `seed` and `n` alone (splitmix64, twice keyed).
fn uniform(seed: u64, n: u64) -> f64 {
    let mix = |mut z: u64| {
        z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let bits = mix(mix(seed) ^ n.wrapping_mul(0xd1b5_4a32_d192_ed03));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(params: SamplingParams, vocab: usize) -> Sampler {
        Sampler::new(params, vocab).expect("parameters of a test")
    }

    fn logits(vocab: usize, seed: u64) -> Vec<f32> {
        (0..vocab)
            .map(|i| (uniform(seed, i as u64) * 12.0 - 6.0) as f32)
            .collect()
    }

    /// How often each token comes over `n` draws.
    fn frequencies(params: &SamplingParams, logits: &[f32], n: u64) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for seed in 0..n {
            let token = sampler(
                SamplingParams {
                    seed,
                    ..params.clone()
                },
                logits.len(),
            )
            .sample(logits, &[], &[])
            .expect("finite logits")
            .token;
            counts[token as usize] += 1.0 / n as f64;
        }
        counts
    }

    /// The distribution by full sort and f64, as the processors are written down.
    fn reference(params: &SamplingParams, logits: &[f32]) -> Vec<f64> {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
        let mut kept: Vec<(usize, f64)> = order
            .iter()
            .map(|i| {
                (
                    *i,
                    (f64::from(logits[*i]) / f64::from(params.temperature)).exp(),
                )
            })
            .collect();
        if params.top_k > 0 && params.top_k < kept.len() {
            let kth = kept[params.top_k - 1].1;
            kept.retain(|(_, weight)| *weight >= kth);
        }
        let mass: f64 = kept.iter().map(|(_, weight)| weight).sum();
        let mut before = 0.0;
        kept.retain(|(_, weight)| {
            let keep = before < mass * f64::from(params.top_p);
            before += weight;
            keep
        });
        let top = kept[0].1;
        kept.retain(|(_, weight)| *weight >= top * f64::from(params.min_p));
        let mass: f64 = kept.iter().map(|(_, weight)| weight).sum();
        let mut probabilities = vec![0.0; logits.len()];
        kept.iter()
            .for_each(|(i, weight)| probabilities[*i] = weight / mass);
        probabilities
    }

    #[test]
    fn draws_follow_the_distribution_of_a_full_sort() {
        let logits = logits(300, 5);
        let default = SamplingParams::default;
        for params in [
            default(),
            SamplingParams {
                temperature: 0.5,
                ..default()
            },
            SamplingParams {
                top_k: 5,
                ..default()
            },
            SamplingParams {
                top_p: 0.7,
                ..default()
            },
            SamplingParams {
                min_p: 0.3,
                ..default()
            },
            SamplingParams {
                temperature: 2.0,
                top_k: 100,
                top_p: 0.9,
                min_p: 0.02,
                ..default()
            },
        ] {
            let expected = reference(&params, &logits);
            let found = frequencies(&params, &logits, 20_000);
            for (token, (e, f)) in expected.iter().zip(&found).enumerate() {
                assert!(*e > 0.0 || *f == 0.0, "{params:?} token {token}: {e} {f}");
                // Five standard deviations of 20,000 draws.
                assert!(
                    (e - f).abs() <= 5.0 * (e / 20_000.0).sqrt() + 1e-4,
                    "{params:?} token {token}: {e} {f}"
                );
            }
        }
    }

    #[test]
    fn greedy_takes_the_lowest_id_among_equals() {
        let mut greedy = sampler(SamplingParams::greedy(), 4);
        assert_eq!(
            greedy
                .sample(&[1.0, 3.0, 3.0, 2.0], &[], &[])
                .expect("finite")
                .token,
            1
        );
        assert_eq!(
            greedy
                .sample(&[f32::NEG_INFINITY, -3.0, -2.0, -2.0], &[], &[])
                .expect("finite")
                .token,
            2
        );
    }

    #[test]
    fn a_draw_depends_on_seed_and_position_alone() {
        let logits = logits(1000, 1);
        let mut one = sampler(
            SamplingParams {
                seed: 9,
                ..Default::default()
            },
            1000,
        );
        let mut generated = Vec::new();
        for _ in 0..50 {
            generated.push(
                one.sample(&logits, &[1, 2], &generated)
                    .expect("finite")
                    .token,
            );
        }
        let mut resumed = sampler(
            SamplingParams {
                seed: 9,
                ..Default::default()
            },
            1000,
        );
        for n in [49, 0, 20] {
            assert_eq!(
                resumed
                    .sample(&logits, &[], &generated[..n])
                    .expect("finite")
                    .token,
                generated[n]
            );
        }
        let distinct: std::collections::HashSet<_> = generated.iter().collect();
        assert!(distinct.len() > 10, "{generated:?}");
    }

    #[test]
    fn penalties_and_bias_by_hand() {
        let (prompt, generated) = (&[0, 0, 1][..], &[1, 2, 2][..]);
        let check = |params: SamplingParams, expected: [f32; 4]| {
            let mut logits = vec![2.0, -2.0, 4.0, 1.0];
            sampler(params, 4)
                .adjust(&mut logits, prompt, generated)
                .expect("tokens in range");
            assert_eq!(logits, expected);
        };
        let default = SamplingParams::default;
        check(
            SamplingParams {
                repetition_penalty: 2.0,
                ..default()
            },
            [1.0, -4.0, 2.0, 1.0],
        );
        check(
            SamplingParams {
                presence_penalty: 0.5,
                ..default()
            },
            [2.0, -2.5, 3.5, 1.0],
        );
        check(
            SamplingParams {
                frequency_penalty: 0.5,
                ..default()
            },
            [2.0, -2.5, 3.0, 1.0],
        );
        check(
            SamplingParams {
                logit_bias: vec![(3, 5.0), (0, -1.0)],
                ..default()
            },
            [1.0, -2.0, 4.0, 6.0],
        );
        let all = SamplingParams {
            repetition_penalty: 2.0,
            presence_penalty: 1.0,
            frequency_penalty: 0.25,
            logit_bias: vec![(2, 1.0)],
            ..default()
        };
        check(all, [1.0, -5.25, 1.5, 1.0]);
    }

    #[test]
    fn logprobs_are_those_of_the_raw_logits() {
        let raw = [1.0f32, 2.0, 3.0];
        let params = SamplingParams {
            temperature: 0.1,
            top_k: 2,
            logit_bias: vec![(0, 50.0)],
            logprobs: Some(2),
            ..Default::default()
        };
        let sampled = sampler(params, 3).sample(&raw, &[], &[]).expect("finite");
        let normalizer = (1f64.exp() + 2f64.exp() + 3f64.exp()).ln();
        assert_eq!(sampled.token, 0);
        assert_eq!(sampled.logprob, Some((1.0 - normalizer) as f32));
        assert_eq!(
            sampled.top,
            vec![
                (2, (3.0 - normalizer) as f32),
                (1, (2.0 - normalizer) as f32)
            ]
        );
    }

    #[test]
    fn logits_that_cannot_be_sampled_are_named() {
        let check = |logits: &[f32], expected: &str| {
            let error = sampler(SamplingParams::default(), logits.len())
                .sample(logits, &[], &[0])
                .expect_err(expected);
            assert!(error.to_string().starts_with(expected), "{error}");
        };
        check(
            &[0.0, f32::NAN, f32::NAN],
            "logit of token 1 is NaN at generated token 1 (2 of 3 are)",
        );
        check(&[f32::INFINITY], "logit of token 0 is infinite");
        check(&[f32::NEG_INFINITY; 2], "no token of 2 is possible");
        check(&[], "no token of 0 is possible");
        let mut penalised = sampler(
            SamplingParams {
                presence_penalty: 1.0,
                ..Default::default()
            },
            2,
        );
        assert_eq!(
            penalised.sample(&[0.0, 0.0], &[7], &[]),
            Err(SampleError::Token { token: 7, vocab: 2 })
        );
    }

    #[test]
    fn every_fault_is_reported_at_once() {
        let params = SamplingParams {
            temperature: -1.0,
            top_p: 0.0,
            min_p: f32::NAN,
            repetition_penalty: 0.0,
            presence_penalty: 3.0,
            logit_bias: vec![(10, 0.0), (1, f32::INFINITY)],
            logprobs: Some(11),
            ..Default::default()
        };
        let SamplingFaults(faults) = params.check(10).expect_err("eight faults");
        assert_eq!(faults.len(), 8, "{faults:#?}");
        assert_eq!(
            faults[0],
            "temperature: expected 0 (greedy) or more, found -1"
        );
        assert_eq!(SamplingParams::default().check(10), Ok(()));
    }
}
