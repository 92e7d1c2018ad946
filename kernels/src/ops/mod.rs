//! The operations: one file each, with the formula, the argument struct, the shape checks that every
//! backend runs first, and the plain reference that defines the result.
//!
//! Letters: T rows of the batch, K inputs, N outputs or state size, I Mamba's inner width, P the width of
//! one of its heads, E experts.

mod activate;
mod add;
mod attention;
mod conv1d;
mod embed;
mod expert_linear;
mod gather;
mod kv_write;
mod layer_norm;
mod likeliest;
pub(crate) mod linear;
mod mamba3_scan;
mod rms_norm;
mod rope;
mod route;
mod s4d_scan;
mod scale;
mod selective_scan;
mod ssd_chunked;
mod ssd_scan;

pub use activate::{Activate, Activation};
pub use add::Add;
pub use attention::Attention;
pub(crate) use attention::Sight;
pub use conv1d::Conv1d;
pub use embed::Embed;
pub use expert_linear::{Combine, ExpertLinear};
pub use gather::Gather;
pub use kv_write::KvWrite;
pub use layer_norm::LayerNorm;
pub use likeliest::Likeliest;
pub use linear::Linear;
pub use mamba3_scan::{Decay, HeadNorm, Mamba3Scan, Mimo};
pub use rms_norm::RmsNorm;
pub use rope::Rope;
pub use route::{Route, Score};
pub use s4d_scan::S4dScan;
pub use scale::Scale;
pub use selective_scan::SelectiveScan;
pub use ssd_chunked::SsdChunked;
pub use ssd_scan::SsdScan;

use crate::error::{Error, Result};
use crate::kv::KvType;
use crate::span::Ragged;
use crate::tensor::{DType, Tensor};

/// Collects what an operation asks of its arguments.
pub(crate) struct Check(pub &'static str);

impl Check {
    pub fn equal(&self, what: &'static str, found: usize, expected: usize) -> Result<()> {
        if found == expected {
            return Ok(());
        }
        Err(Error::Shape {
            op: self.0,
            what,
            found,
            expected,
        })
    }

    pub fn at_least(&self, what: &'static str, found: usize, expected: usize) -> Result<()> {
        if found >= expected {
            return Ok(());
        }
        Err(Error::Shape {
            op: self.0,
            what,
            found,
            expected,
        })
    }

    pub fn is(&self, what: &'static str, tensor: &Tensor, dtype: DType) -> Result<()> {
        if tensor.dtype() == dtype {
            return Ok(());
        }
        let expected = match dtype {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            DType::I32 => "I32",
            DType::U8 => "U8",
        };
        Err(Error::Type {
            op: self.0,
            what,
            found: tensor.dtype(),
            expected,
        })
    }

    pub fn f32(&self, tensors: &[(&'static str, &Tensor)]) -> Result<()> {
        tensors
            .iter()
            .try_for_each(|(what, t)| self.is(what, t, DType::F32))
    }

    pub fn float(&self, what: &'static str, tensor: &Tensor) -> Result<()> {
        if !matches!(tensor.dtype(), DType::I32 | DType::U8) {
            return Ok(());
        }
        Err(Error::Type {
            op: self.0,
            what,
            found: tensor.dtype(),
            expected: "floating point",
        })
    }

    /// Pages of keys or values: rows of `heads` heads that have `width` numbers together.
    pub fn heads(&self, pages: &Tensor, width: usize, heads: usize) -> Result<()> {
        let Some(kv) = KvType::of(pages.dtype()) else {
            return self.float("pages", pages);
        };
        self.at_least("kv_heads", heads, 1)?;
        self.equal("columns beyond whole heads", width % heads, 0)?;
        let expected = kv.columns(heads, width / heads);
        self.equal("columns of pages", pages.cols(), expected)
    }

    /// Pages of values in bytes where those of keys are.
    pub fn kept_alike(&self, k_pages: &Tensor, v_pages: &Tensor) -> Result<()> {
        let bytes = |pages: &Tensor| pages.dtype() == DType::U8;
        if bytes(k_pages) == bytes(v_pages) {
            return Ok(());
        }
        Err(Error::Type {
            op: self.0,
            what: "pages of values",
            found: v_pages.dtype(),
            expected: if bytes(k_pages) {
                "U8, as those of keys"
            } else {
                "floating point, as those of keys"
            },
        })
    }

    /// Elements that can be drawn: of any type but the bytes of blocks.
    pub fn drawn(&self, tensor: &Tensor) -> Result<()> {
        if tensor.dtype() != DType::U8 {
            return Ok(());
        }
        Err(Error::Type {
            op: self.0,
            what: "the tensor",
            found: DType::U8,
            expected: "numbers",
        })
    }

    /// One row of `cols` elements.
    pub fn vector(&self, what: &'static str, tensor: &Tensor, cols: usize) -> Result<()> {
        self.is(what, tensor, DType::F32)?;
        self.equal(what, tensor.rows(), 1)?;
        self.equal(what, tensor.cols(), cols)
    }

    pub fn apart(&self, what: &'static str, output: &Tensor, inputs: &[&Tensor]) -> Result<()> {
        if !output.is_writable() || inputs.iter().any(|i| output.overlaps(i)) {
            return Err(Error::Overlap { op: self.0, what });
        }
        Ok(())
    }

    pub fn value(&self, ok: bool, why: impl FnOnce() -> String) -> Result<()> {
        if ok {
            Ok(())
        } else {
            Err(Error::Value {
                op: self.0,
                why: why(),
            })
        }
    }

    /// Spans cover the rows without gaps, and every slot exists.
    pub fn slots(&self, ragged: &Ragged<'_>, rows: usize, state: &Tensor) -> Result<()> {
        self.spans(ragged, rows)?;
        for span in ragged.spans {
            self.value(span.slot < state.rows(), || {
                format!("slot {} of {} slots", span.slot, state.rows())
            })?;
        }
        Ok(())
    }

    /// Spans cover the rows without gaps.
    pub fn spans(&self, ragged: &Ragged<'_>, rows: usize) -> Result<()> {
        let mut next = 0;
        for span in ragged.spans {
            self.equal("start of a span", span.start, next)?;
            self.at_least("length of a span", span.len, 1)?;
            next += span.len;
        }
        self.equal("rows of the spans", next, rows)
    }

    /// Every token has a page, and every page exists.
    pub fn pages(&self, ragged: &Ragged<'_>, rows: usize, pages: &Tensor) -> Result<()> {
        self.spans(ragged, rows)?;
        self.at_least("page size", ragged.page_size, 1)?;
        for span in ragged.spans {
            let table = ragged
                .page_table
                .get(span.pages.clone())
                .ok_or_else(|| Error::Value {
                    op: self.0,
                    why: format!("pages {:?} lie outside the page table", span.pages),
                })?;
            self.at_least(
                "tokens that the pages of a span hold",
                table.len() * ragged.page_size,
                span.position + span.len,
            )?;
            for &page in table {
                self.at_least(
                    "rows of the pages",
                    pages.rows(),
                    (page as usize + 1) * ragged.page_size,
                )?;
            }
        }
        Ok(())
    }
}

/// SiLU (swish): x · σ(x).
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

/// ln(1 + eˣ), without overflow. Beyond 20 it is x in single precision (the reference
/// implementations of Mamba cut there too).
pub(crate) fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}
