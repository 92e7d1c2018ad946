//! How well a model predicts a text, and how far another model's predictions are from its own.
//!
//! The text is read in windows of up to `context` tokens that begin every `stride` tokens; each token is
//! scored in the first window that reaches it, so that it is scored once and, the first window apart,
//! has at least `context - stride` tokens before it. All tokens of the first window but the very first
//! are scored. Each window starts from nothing; within it state is carried, so a text that fits one window
//! is one unbroken pass. Logarithms are natural, probabilities and sums are f64.

use std::collections::VecDeque;

use crate::ids::TokenId;
use crate::scheduler::Chunk;
use crate::session::{self, Engine, EngineConfig, Request};

/// Tokens that are read together: from an empty state, and which of them are scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// The first token of the text that is read.
    pub start: usize,
    /// The end of the tokens that are read.
    pub end: usize,
    /// The first token that is scored; all from here to the end are.
    pub scored: usize,
}

/// Windows of up to `context` tokens every `stride` tokens over a text of `tokens`. A window's first
/// token has nothing before it and is never scored: with `stride` equal to `context`, each window has one.
///
/// # Panics
/// If `context` is below 2, or `stride` is 0 or above `context`.
pub fn windows(tokens: usize, context: usize, stride: usize) -> Vec<Window> {
    assert!(
        context >= 2 && stride >= 1 && stride <= context,
        "context {context}, stride {stride}"
    );
    let mut list = Vec::new();
    let (mut start, mut done) = (0_usize, 0);
    while done < tokens {
        let end = start.saturating_add(context).min(tokens);
        let scored = done.max(start + 1);
        if scored < end {
            list.push(Window { start, end, scored });
        }
        (start, done) = (start.saturating_add(stride), end);
    }
    list
}

/// What can go wrong while a text is scored.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum Error {
    #[error(transparent)]
    Engine(#[from] session::Error),
    #[error(
        "{model}: at position {position} the logit of token {token} is {value}, and no probability follows from it"
    )]
    NotFinite {
        model: String,
        position: usize,
        token: usize,
        value: f32,
    },
    #[error("the models have vocabularies of {first} and {second} tokens; only equal ones compare")]
    Vocabularies { first: usize, second: usize },
}

/// What two models say of one token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Compared {
    /// The second model's -ln p of the token.
    pub nll: f64,
    /// D(first || second) of what they expected here, in nats.
    pub kl: f64,
    /// D(second || first).
    pub reverse_kl: f64,
    /// Whether both held the same token for the likeliest.
    pub agrees: bool,
}

/// One scored token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scored {
    /// Its place in the text.
    pub position: usize,
    /// The model's -ln p of it.
    pub nll: f64,
    /// What a second model says.
    pub compared: Option<Compared>,
}

/// A model that scores.
pub struct Scorer {
    name: String,
    engine: Engine,
}

/// Most bytes of logits of each model that wait for the other's.
const WAITING_BYTES: usize = 64 << 20;

impl Scorer {
    /// One for `engine`; `name` stands for the model in messages.
    pub fn new(name: &str, engine: Engine) -> Self {
        let name = name.into();
        Scorer { name, engine }
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    fn vocab(&self) -> usize {
        self.engine.network().graph.vocab
    }

    /// Runs one step of a window's sequence; `tell` gets the place in the text of every token that is
    /// predicted, and its predicted distribution.
    fn step(
        &mut self,
        window: Window,
        tell: &mut dyn FnMut(usize, Prediction),
    ) -> Result<bool, Error> {
        let Scorer { name, engine } = self;
        let mut failed = None;
        let more = engine.step(&mut |_, position, logits| {
            // The row of a token predicts the next.
            let position = window.start + position + 1;
            if position < window.scored || failed.is_some() {
                return;
            }
            match Prediction::of(logits) {
                Ok(prediction) => tell(position, prediction),
                Err((token, value)) => {
                    failed = Some(Error::NotFinite {
                        model: name.clone(),
                        position: position - 1,
                        token,
                        value,
                    });
                }
            }
        })?;
        failed.map_or(Ok(more), Err)
    }
}

/// Sizes for an engine that scores windows of `context` tokens, if its logits wait for another's.
pub fn comparing(config: EngineConfig, vocab: usize) -> EngineConfig {
    let most = (WAITING_BYTES / (4 * vocab.max(1))).max(1);
    let (Chunk::AtMost(rows) | Chunk::Every(rows)) = config.chunk;
    EngineConfig {
        chunk: Chunk::AtMost(rows.min(most)),
        token_budget: rows.min(most),
        ..config
    }
}

/// The distribution over the next token.
struct Prediction {
    /// (V)
    logits: Vec<f32>,
    /// ln of the sum of their exponentials.
    log_sum: f64,
    /// The likeliest token, the first of equals.
    best: usize,
}

impl Prediction {
    /// Of a row of logits; or the first logit that makes none, minus infinity being a probability of 0.
    fn of(logits: &[f32]) -> Result<Self, (usize, f32)> {
        let mut best = 0;
        for (token, logit) in logits.iter().enumerate() {
            if logit.is_nan() || *logit == f32::INFINITY {
                return Err((token, *logit));
            }
            if *logit > logits[best] {
                best = token;
            }
        }
        let most = f64::from(logits[best]);
        if most == f64::NEG_INFINITY {
            return Err((best, logits[best]));
        }
        let sum: f64 = logits.iter().map(|l| (f64::from(*l) - most).exp()).sum();
        Ok(Prediction {
            logits: logits.to_vec(),
            log_sum: most + sum.ln(),
            best,
        })
    }

    fn log_probability(&self, token: usize) -> f64 {
        f64::from(self.logits[token]) - self.log_sum
    }

    /// D(self || other) and D(other || self) in nats: sums over the vocabulary of p (ln p - ln q).
    fn divergences(&self, other: &Prediction) -> (f64, f64) {
        let (mut there, mut back) = (0.0, 0.0);
        for token in 0..self.logits.len() {
            let (p, q) = (self.log_probability(token), other.log_probability(token));
            // p ln p is 0 where p is.
            if p > f64::NEG_INFINITY {
                there += p.exp() * (p - q);
            }
            if q > f64::NEG_INFINITY {
                back += q.exp() * (q - p);
            }
        }
        // Below zero only by rounding.
        (there.max(0.0), back.max(0.0))
    }
}

/// Scores `tokens` in `windows`, by a second model too if there is one. `progress` is told how many
/// tokens of the text are done. Logits are compared as they come: a chunk of them is held at most.
pub fn score(
    first: &mut Scorer,
    mut second: Option<&mut Scorer>,
    tokens: &[TokenId],
    windows: &[Window],
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Scored>, Error> {
    if let Some(second) = &second
        && first.vocab() != second.vocab()
    {
        return Err(Error::Vocabularies {
            first: first.vocab(),
            second: second.vocab(),
        });
    }
    let mut list = Vec::new();
    for window in windows {
        let request = Request {
            prompt: tokens[window.start..window.end - 1].to_vec(),
            prompt_logits: true,
            ..Request::default()
        };
        let id = first.engine.submit(request.clone())?;
        let Some(second) = second.as_deref_mut() else {
            while first.step(*window, &mut |position, p| {
                list.push(Scored {
                    position,
                    nll: -p.log_probability(tokens[position] as usize),
                    compared: None,
                });
            })? {
                progress(list.last().map_or(0, |s| s.position + 1));
            }
            first.engine.remove(id);
            continue;
        };
        let other = second.engine.submit(request)?;
        let mut waiting: [VecDeque<(usize, Prediction)>; 2] = Default::default();
        loop {
            // Whoever is behind goes on, so that at most a chunk of each waits.
            let [ours, theirs] = &mut waiting;
            let behind = ours.len() > theirs.len();
            let more = if behind {
                second.step(*window, &mut |at, p| theirs.push_back((at, p)))?
            } else {
                first.step(*window, &mut |at, p| ours.push_back((at, p)))?
            };
            while !ours.is_empty() && !theirs.is_empty() {
                let (Some((at, p)), Some((also, q))) = (ours.pop_front(), theirs.pop_front())
                else {
                    unreachable!("both have one");
                };
                assert_eq!(at, also, "both models score the same tokens in order");
                list.push(compared(tokens, at, &p, &q));
            }
            progress(list.last().map_or(0, |s| s.position + 1));
            if !more && !behind && ours.is_empty() {
                break;
            }
            assert!(more || !behind, "the second model ended before the first");
        }
        first.engine.remove(id);
        second.engine.remove(other);
    }
    Ok(list)
}

fn compared(tokens: &[TokenId], position: usize, p: &Prediction, q: &Prediction) -> Scored {
    let token = tokens[position] as usize;
    let (kl, reverse_kl) = p.divergences(q);
    Scored {
        position,
        nll: -p.log_probability(token),
        compared: Some(Compared {
            nll: -q.log_probability(token),
            kl,
            reverse_kl,
            agrees: p.best == q.best,
        }),
    }
}

/// A mean, and the standard error of it: the sample's standard deviation over the root of its size, as if
/// tokens were independent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mean {
    /// The mean; 0 of nothing.
    pub mean: f64,
    /// Its standard error; 0 of fewer than two.
    pub error: f64,
}

impl Mean {
    /// Of some values.
    pub fn of(values: impl Iterator<Item = f64> + Clone) -> Mean {
        let count = values.clone().count();
        if count == 0 {
            return Mean {
                mean: 0.0,
                error: 0.0,
            };
        }
        let mean = values.clone().sum::<f64>() / count as f64;
        let error = match count {
            1 => 0.0,
            n => {
                let squares: f64 = values.map(|v| (v - mean).powi(2)).sum();
                (squares / (n - 1) as f64 / n as f64).sqrt()
            }
        };
        Mean { mean, error }
    }

    /// The exponential of the mean, with the error to first order: a perplexity from its logarithm.
    pub fn exp(self) -> Mean {
        let mean = self.mean.exp();
        Mean {
            mean,
            error: mean * self.error,
        }
    }
}

/// The value below which the part `part` of `sorted` lies, between neighbours in proportion.
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let at = part * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    if below == above {
        return below; // also where both are infinite
    }
    below + (above - below) * at.fract()
}

/// A range of positions, and what was found there.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// The first position and the end of the range.
    pub positions: std::ops::Range<usize>,
    /// Number of scored tokens.
    pub tokens: usize,
    /// -ln p of the model, nats a token.
    pub nll: Mean,
    /// What comes of a second model.
    pub compared: Option<Comparison>,
}

/// How far a second model's predictions are from the first's.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// -ln p of the second model, nats a token.
    pub nll: Mean,
    /// ln of the second perplexity over the first; its error is that of the differences token by token,
    /// far smaller than those of both.
    pub log_ratio: Mean,
    /// D(first || second) a token, in nats.
    pub kl: Mean,
    /// The median of those.
    pub kl_median: f64,
    /// 99 of 100 are below.
    pub kl_p99: f64,
    /// The largest.
    pub kl_max: f64,
    /// Where the largest is.
    pub kl_max_position: usize,
    /// D(second || first) a token, in nats.
    pub reverse_kl: Mean,
    /// Part of the tokens at which both held the same for the likeliest.
    pub agreement: Mean,
}

impl Summary {
    /// Of scored tokens in the order of positions; none if there are none.
    pub fn of(scored: &[Scored]) -> Option<Summary> {
        let (first, last) = (scored.first()?, scored.last()?);
        let both: Option<Vec<(f64, Compared)>> =
            scored.iter().map(|s| Some((s.nll, s.compared?))).collect();
        Some(Summary {
            positions: first.position..last.position + 1,
            tokens: scored.len(),
            nll: Mean::of(scored.iter().map(|s| s.nll)),
            compared: both.map(|both| comparison(scored, &both)),
        })
    }

    /// Of up to `count` equal ranges of positions; a range without scored tokens is left out.
    pub fn ranges(scored: &[Scored], count: usize) -> Vec<Summary> {
        let Some(all) = Summary::of(scored) else {
            return Vec::new();
        };
        let (start, len) = (all.positions.start, all.positions.len());
        let count = count.clamp(1, len);
        let border = |i: usize| start + (i as u128 * len as u128 / count as u128) as usize;
        let mut list = Vec::new();
        let mut rest = scored;
        for i in 0..count {
            let (here, after) = rest.split_at(rest.partition_point(|s| s.position < border(i + 1)));
            rest = after;
            list.extend(Summary::of(here).map(|summary| Summary {
                positions: border(i)..border(i + 1),
                ..summary
            }));
        }
        list
    }
}

fn comparison(scored: &[Scored], both: &[(f64, Compared)]) -> Comparison {
    let mut sorted: Vec<f64> = both.iter().map(|(_, c)| c.kl).collect();
    sorted.sort_by(f64::total_cmp);
    let largest = (0..both.len())
        .rev()
        .max_by(|a, b| both[*a].1.kl.total_cmp(&both[*b].1.kl))
        .expect("there is a token");
    let agrees = |c: &Compared| if c.agrees { 1.0 } else { 0.0 };
    Comparison {
        nll: Mean::of(both.iter().map(|(_, c)| c.nll)),
        log_ratio: Mean::of(both.iter().map(|(nll, c)| c.nll - nll)),
        kl: Mean::of(both.iter().map(|(_, c)| c.kl)),
        kl_median: quantile(&sorted, 0.5),
        kl_p99: quantile(&sorted, 0.99),
        kl_max: both[largest].1.kl,
        kl_max_position: scored[largest].position,
        reverse_kl: Mean::of(both.iter().map(|(_, c)| c.reverse_kl)),
        agreement: Mean::of(both.iter().map(|(_, c)| agrees(c))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_but_windows_first_is_scored_once_with_context() {
        for (tokens, context, stride) in [
            (10, 4, 2),
            (10, 4, 4),
            (10, 4, 1),
            (10, 100, 50),
            (2, 2, 1),
            (9, 8, 3),
            (1, 4, 2),
            (0, 4, 2),
            (17, 5, 5),
        ] {
            let list = windows(tokens, context, stride);
            let mut scored = vec![0; tokens];
            for (i, w) in list.iter().enumerate() {
                assert!(w.end - w.start <= context && w.scored > w.start && w.end > w.scored);
                // The first window's are what they are.
                let before = if i > 0 { context - stride } else { 1 };
                assert!(w.scored - w.start >= before, "{w:?} of {tokens}");
                scored[w.scored..w.end].iter_mut().for_each(|s| *s += 1);
            }
            let starts = |t: usize| t == 0 || stride == context && t.is_multiple_of(stride);
            for (t, times) in scored.iter().enumerate() {
                assert_eq!(
                    *times,
                    usize::from(!starts(t)),
                    "token {t} of {tokens}, {list:?}"
                );
            }
        }
    }

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-12, "{found} {expected}");
    }

    #[test]
    fn divergence_of_known_distributions() {
        let of = |p: &[f32]| {
            let logits: Vec<f32> = p.iter().map(|p| p.ln() + 3.0).collect();
            Prediction::of(&logits).unwrap()
        };
        let (p, q) = (of(&[0.5, 0.25, 0.25, 0.0]), of(&[0.25, 0.25, 0.5, 0.0]));
        let (there, back) = p.divergences(&q);
        assert!((there - 0.25 * 2_f64.ln()).abs() < 1e-6, "{there}");
        assert!((back - 0.25 * 2_f64.ln()).abs() < 1e-6, "{back}");
        assert_eq!(p.divergences(&p), (0.0, 0.0));
        // What the second holds for impossible.
        let (there, back) = p.divergences(&of(&[0.5, 0.5, 0.0, 0.0]));
        assert!(there == f64::INFINITY && (back - 0.5 * 2_f64.ln()).abs() < 1e-6);
        assert_eq!((p.best, q.best), (0, 2));
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(matches!(Prediction::of(&[0.0, bad]), Err((1, _))));
        }
        assert!(Prediction::of(&[f32::NEG_INFINITY; 3]).is_err());
    }

    #[test]
    fn means_quantiles_and_ranges() {
        let mean = Mean::of([1.0, 2.0, 3.0, 6.0].into_iter());
        close(mean.mean, 3.0);
        close(mean.error, (14.0_f64 / 3.0 / 4.0).sqrt());
        close(mean.exp().mean, 3_f64.exp());
        assert_eq!(Mean::of([5.0].into_iter()).error, 0.0);
        let sorted = [0.0, 1.0, 2.0, 10.0];
        close(quantile(&sorted, 0.5), 1.5);
        close(quantile(&sorted, 1.0), 10.0);
        assert_eq!(quantile(&[1.0, f64::INFINITY], 1.0), f64::INFINITY);

        let scored: Vec<Scored> = (1..8)
            .map(|position| Scored {
                position,
                nll: position as f64,
                compared: Some(Compared {
                    nll: 2.0 * position as f64,
                    kl: if position == 5 { 9.0 } else { 0.5 },
                    reverse_kl: 1.0,
                    agrees: position % 2 == 0,
                }),
            })
            .collect();
        let all = Summary::of(&scored).unwrap();
        let found = all.compared.unwrap();
        close(all.nll.mean, 4.0);
        close(found.log_ratio.mean, 4.0);
        close(found.kl_median, 0.5);
        assert_eq!((found.kl_max, found.kl_max_position), (9.0, 5));
        close(found.agreement.mean, 3.0 / 7.0);
        let ranges = Summary::ranges(&scored, 3);
        let borders: Vec<_> = ranges.iter().map(|r| r.positions.clone()).collect();
        assert_eq!(borders, [1..3, 3..5, 5..8]);
        assert_eq!(ranges.iter().map(|r| r.tokens).sum::<usize>(), 7);
        assert_eq!(Summary::ranges(&scored, 100).len(), 7);
        assert!(Summary::ranges(&[], 10).is_empty());
    }
}
