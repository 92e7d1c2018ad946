//! From the last value to logits, or to the likeliest tokens.

use strata_kernels::ops::{Gather, Likeliest, Linear};
use strata_kernels::{Repeat, Result, Tensor};

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
        let backend = self.network.backend.clone();
        if step.is_decode(self.network.graph.vocab) {
            let repeat = Repeat {
                key: [self.id, !(self.scratch.bytes() as u64)],
                ids: step.tokens,
                ragged: step.ragged,
            };
            backend.repeat(&repeat, &mut || self.choose(step, rows))?;
        } else {
            self.choose(step, rows)?;
        }
        let count = step.logits.len();
        let found = &mut self.host_likeliest[..count];
        backend.read(&self.likeliest.first_rows(count), found)?;
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

    /// A step up to the likeliest tokens, all of it on the device.
    fn choose(&mut self, step: &Step<'_>, rows: usize) -> Result<()> {
        self.embed(step, rows)?;
        self.lap(Part::Embedding);
        self.nodes(step.ragged, rows, None)?;
        let mut first = 0;
        for wanted in step.logits.chunks(LOGIT_ROWS) {
            let logits = self.project(wanted, rows)?;
            let network = &self.network;
            network.backend.likeliest(Likeliest {
                x: &logits,
                by: network.graph.logit_scale.unwrap_or(1.0) as f32,
                y: &mut self.likeliest.row_range(first..first + wanted.len()),
            })?;
            first += wanted.len();
        }
        self.lap(Part::Head);
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
            let logits = if i * LOGIT_ROWS < projected {
                self.logits.first_rows(wanted.len())
            } else {
                self.project(wanted, rows)?
            };
            let host = &mut self.host_logits[..wanted.len() * graph.vocab];
            network.backend.read_rows(&logits, host, &mut |i, logits| {
                if let Some(by) = graph.logit_scale {
                    logits.iter_mut().for_each(|l| *l *= by as f32);
                }
                sink(wanted[i], logits);
            })?;
        }
        self.lap(Part::Head);
        Ok(())
    }

    /// The last value's rows `wanted`, at most [`LOGIT_ROWS`], times the output matrix.
    pub(super) fn project(&mut self, wanted: &[usize], rows: usize) -> Result<Tensor> {
        let (network, backend) = (&self.network, &*self.network.backend);
        let x = self.value(network.graph.last, rows);
        let mut picked = self.picked.first_rows(wanted.len());
        let mut logits = self.logits.first_rows(wanted.len());
        backend.gather(Gather {
            x: &x,
            rows: wanted,
            y: &mut picked,
        })?;
        backend.linear(Linear {
            x: &picked,
            w: &network.head,
            bias: network.head_bias.as_ref(),
            activations: network.activations,
            y: &mut logits,
        })?;
        Ok(logits)
    }
}
