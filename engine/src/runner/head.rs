//! From the last value to logits, or to the likeliest tokens.

use strata_kernels::ops::{Gather, Likeliest, Linear};
use strata_kernels::{Repeat, Result, Tensor};

use super::lane::{End, Lane};
use super::{Runner, Step};
use crate::ids::TokenId;
use crate::trace::Part;

/// Rows of logits that are computed at a time: the output matrix is read once for all of them, and
/// their memory stays small beside any vocabulary.
pub(super) const LOGIT_ROWS: usize = 32;

/// What came of a row that wanted logits.
#[derive(Debug, Clone, Copy)]
pub enum Row<'a> {
    /// Its logits.
    Logits(&'a [f32]),
    /// Its likeliest token, the lowest id among equals.
    Likeliest(TokenId),
}

impl Runner {
    /// Runs one step of whose logits nobody needs more than which is the largest: they stay on the device.
    /// `sink` gets the row number and the likeliest token of every row that asked for logits, in order; the
    /// logits of them all where one row has none, because a number of it is none or infinite.
    pub fn likeliest(
        &mut self,
        step: &Step<'_>,
        sink: &mut dyn FnMut(usize, Row<'_>),
    ) -> Result<()> {
        let rows = self.begin(step);
        let decode = step.is_decode(self.network.graph.vocab);
        self.all(rows, None, &|lane, state, onlookers| {
            let mut choose = |lane: &mut Lane| {
                lane.run(step, state, onlookers)?;
                lane.choose(step.logits, rows)?;
                onlookers.lap(Part::Head);
                Ok(())
            };
            if decode {
                lane.repeat(step, true, &mut choose)
            } else {
                choose(lane)
            }
        })?;
        let count = step.logits.len();
        let lane = self.lanes.iter().find(|lane| lane.end.is_some());
        let (lane, end) = lane
            .and_then(|l| Some((l, l.end.as_ref()?)))
            .expect("some stage has the output matrix");
        let found = &mut self.host_likeliest[..count];
        let likeliest = end.likeliest.first_rows(count);
        lane.stage.backend.read(&likeliest, found)?;
        if found.iter().any(|token| *token < 0.0) {
            return self.head(step.logits, rows, 0, &mut |row, logits| {
                sink(row, Row::Logits(logits));
            });
        }
        for (row, token) in step.logits.iter().zip(found) {
            sink(*row, Row::Likeliest(*token as TokenId));
        }
        Ok(())
    }

    /// The logits of `wanted` rows, of which the first `projected` are in memory already.
    pub(super) fn head(
        &mut self,
        wanted: &[usize],
        rows: usize,
        projected: usize,
        sink: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()> {
        let network = self.network.clone();
        let graph = &network.graph;
        for (i, wanted) in wanted.chunks(LOGIT_ROWS).enumerate() {
            let lane = self.end();
            let backend = lane.stage.backend.clone();
            let logits = match &lane.end {
                Some(end) if i * LOGIT_ROWS < projected => end.logits.first_rows(wanted.len()),
                _ => lane.project(wanted, rows)?,
            };
            let host = &mut self.host_logits[..wanted.len() * graph.vocab];
            backend.read_rows(&logits, host, &mut |i, logits| {
                if let Some(by) = graph.logit_scale {
                    logits.iter_mut().for_each(|l| *l *= by as f32);
                }
                sink(wanted[i], logits);
            })?;
        }
        self.lap(Part::Head);
        Ok(())
    }
}

impl Lane {
    /// Runs what comes again for as long as its sequences do; two kinds of it, told apart by `chooses`.
    pub(super) fn repeat(
        &mut self,
        step: &Step<'_>,
        chooses: bool,
        operations: &mut dyn FnMut(&mut Lane) -> Result<()>,
    ) -> Result<()> {
        // Ranks wait for each other on the way, which nothing records.
        if self.stage.rank.is_some() {
            return operations(self);
        }
        // Scratch is another when it has grown; all else is there for as long as the lane.
        let scratch = self.scratch.bytes() as u64;
        let repeat = Repeat {
            key: [self.id, if chooses { !scratch } else { scratch }],
            ids: step.tokens,
            ragged: step.ragged,
        };
        let backend = self.stage.backend.clone();
        backend.repeat(&repeat, &mut || operations(self))
    }

    /// The likeliest tokens of `wanted` rows, all of it on the device; nothing in a stage without the output matrix.
    fn choose(&mut self, wanted: &[usize], rows: usize) -> Result<()> {
        let Some(End { likeliest, .. }) = &self.end else {
            return Ok(());
        };
        let likeliest = likeliest.clone();
        let mut first = 0;
        for wanted in wanted.chunks(LOGIT_ROWS) {
            let logits = self.project(wanted, rows)?;
            self.stage.backend.likeliest(Likeliest {
                x: &logits,
                by: self.stage.graph.logit_scale.unwrap_or(1.0) as f32,
                y: &mut likeliest.row_range(first..first + wanted.len()),
            })?;
            first += wanted.len();
        }
        Ok(())
    }

    /// The last value's rows `wanted`, at most [`LOGIT_ROWS`], times the output matrix.
    pub(super) fn project(&mut self, wanted: &[usize], rows: usize) -> Result<Tensor> {
        let (stage, backend) = (&self.stage, &*self.stage.backend);
        let (Some((head, bias)), Some(end)) = (&stage.head, &self.end) else {
            panic!("the output matrix is in another stage");
        };
        let x = self.value(stage.graph.last, rows);
        let mut picked = end.picked.first_rows(wanted.len());
        let mut logits = end.logits.first_rows(wanted.len());
        backend.gather(Gather {
            x: &x,
            rows: wanted,
            y: &mut picked,
        })?;
        backend.linear(Linear {
            x: &picked,
            w: head,
            bias: bias.as_ref(),
            activations: self.activations,
            y: &mut logits,
        })?;
        Ok(logits)
    }
}
