//! How much each input column of a matrix counts: the mean of its squares over a text.
//!
//! The error of a product is `Σₖ (Δw[n, k] · x[k])²`. Where columns are taken as independent, its mean over many
//! inputs is `Σₖ Δw[n, k]² · mean(x[k]²)`, so a quantiser that weighs the squared error of column k by `mean(x[k]²)`
//! loses least of what the model computes. llama.cpp's imatrix gathers the same.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use strata_kernels::ops::{
    Activate, Add, Attention, Combine, Conv1d, Embed, ExpertLinear, Gather, KvWrite, LayerNorm,
    Likeliest, Linear, Mamba3Scan, RmsNorm, Rope, Route, S4dScan, Scale, SelectiveScan, SsdChunked,
    SsdScan,
};
use strata_kernels::{Backend, DType, Format, HostTensor, Matrix, Result, Tensor};

use crate::runner::{Network, Place};

/// What was gathered for one matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Columns {
    /// (K) The mean of `x[k]²` over the rows that the matrix multiplied; 0 of no rows.
    pub mean_squares: Vec<f32>,
    /// Number of those rows.
    pub rows: u64,
}

/// What was gathered for the matrices of a model, by their paths.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Importance {
    /// By the path of the weight. Tables that nothing is multiplied with are not there.
    pub columns: BTreeMap<String, Columns>,
}

impl Importance {
    /// How much each column of the weight counts. A matrix that saw no row has columns that count alike; a
    /// column that was always zero counts as little as the least of the others, so that it is kept for other
    /// texts. None for a weight that was never looked at.
    pub fn of(&self, path: &str) -> Option<Arc<[f32]>> {
        let Columns { mean_squares, rows } = self.columns.get(path)?;
        let positive = mean_squares.iter().copied().filter(|m| *m > 0.0);
        let least = positive.reduce(f32::min).unwrap_or(1.0);
        let weigh = |m: &f32| if *rows == 0 || *m <= 0.0 { least } else { *m };
        Some(mean_squares.iter().map(weigh).collect())
    }

    /// The paths of matrices that saw no row: experts that were never chosen.
    pub fn unseen(&self) -> impl Iterator<Item = &str> {
        let unseen = self.columns.iter().filter(|(_, c)| c.rows == 0);
        unseen.map(|(path, _)| path.as_str())
    }

    /// The first path, by name, of a matrix with a number that is none.
    pub fn not_finite(&self) -> Option<&str> {
        let bad = |c: &Columns| c.mean_squares.iter().any(|m| !m.is_finite());
        let found = self.columns.iter().find(|(_, c)| bad(c));
        found.map(|(path, _)| path.as_str())
    }
}

/// Sums of one matrix. f64, in the order of rows: any cut of the text into steps gives the same bits.
struct Sums {
    squares: Vec<f64>,
    rows: u64,
}

impl Sums {
    fn add(&mut self, row: &[f32]) {
        self.rows += 1;
        for (sum, x) in self.squares.iter_mut().zip(row) {
            *sum += f64::from(*x) * f64::from(*x);
        }
    }
}

/// A backend that notes the inputs of matrix products on their way to another. It holds 8 bytes for each input
/// column of each matrix, and one operation's inputs.
pub struct Observer {
    backend: Arc<dyn Backend>,
    paths: Arc<BTreeMap<Place, Vec<String>>>,
    sums: Mutex<BTreeMap<Place, Sums>>,
}

impl Observer {
    /// One for the matrices of a network, before its own backend.
    pub fn new(network: &Network) -> Self {
        Observer {
            backend: network.backend.clone(),
            paths: network.paths().clone(),
            sums: Mutex::default(),
        }
    }

    /// What was gathered so far of `matrices` (paths, and numbers of columns); those that were not multiplied are
    /// there with no rows.
    pub fn gathered(&self, matrices: &[(String, usize)]) -> Importance {
        let mut columns: BTreeMap<String, Columns> = BTreeMap::new();
        for (path, cols) in matrices {
            let none = Columns {
                mean_squares: vec![0.0; *cols],
                rows: 0,
            };
            columns.insert(path.clone(), none);
        }
        let sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        for (place, sums) in sums.iter() {
            let mean = |sum: &f64| (sum / sums.rows.max(1) as f64) as f32;
            let found = Columns {
                mean_squares: sums.squares.iter().map(mean).collect(),
                rows: sums.rows,
            };
            for path in self.paths.get(place).into_iter().flatten() {
                if let Some(columns) = columns.get_mut(path) {
                    columns.clone_from(&found);
                }
            }
        }
        Importance { columns }
    }

    /// Adds rows of `x`, each to the matrix that `matrix` says; rows that it has none for are left out.
    fn add<'a>(&self, x: &Tensor, matrix: impl Iterator<Item = (usize, &'a Matrix)>) -> Result<()> {
        let cols = x.cols();
        let mut values = vec![0.0; x.rows() * cols];
        self.backend.read(x, &mut values)?;
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        for (row, w) in matrix {
            let place = w.place();
            if !self.paths.contains_key(&place) {
                continue;
            }
            let of = sums.entry(place).or_insert_with(|| Sums {
                squares: vec![0.0; cols],
                rows: 0,
            });
            of.add(&values[row * cols..(row + 1) * cols]);
        }
        Ok(())
    }
}

/// Operations that are handed on as they are.
macro_rules! hand_on {
    ($($name:ident: $op:ident),* $(,)?) => {
        $(
            fn $name(&self, op: $op<'_>) -> Result<()> {
                self.backend.$name(op)
            }
        )*
    };
}

impl Backend for Observer {
    fn name(&self) -> &'static str {
        self.backend.name()
    }

    fn tolerance(&self, activations: DType, format: Format) -> f32 {
        self.backend.tolerance(activations, format)
    }

    fn prompt_rows(&self) -> usize {
        self.backend.prompt_rows()
    }

    fn alloc(&self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor> {
        self.backend.alloc(dtype, rows, cols)
    }

    fn upload(&self, from: &HostTensor, rows: usize, cols: usize) -> Result<Tensor> {
        self.backend.upload(from, rows, cols)
    }

    fn read(&self, from: &Tensor, to: &mut [f32]) -> Result<()> {
        self.backend.read(from, to)
    }

    fn write(&self, from: &[f32], to: &mut Tensor) -> Result<()> {
        self.backend.write(from, to)
    }

    fn copy(&self, from: &Tensor, to: &mut Tensor) -> Result<()> {
        self.backend.copy(from, to)
    }

    fn clear(&self, tensor: &mut Tensor) -> Result<()> {
        self.backend.clear(tensor)
    }

    fn fill_normal(&self, tensor: &mut Tensor, seed: u64, std: f32) -> Result<()> {
        self.backend.fill_normal(tensor, seed, std)
    }

    fn linear(&self, op: Linear<'_>) -> Result<()> {
        op.check()?;
        self.add(op.x, (0..op.x.rows()).map(|row| (row, op.w)))?;
        self.backend.linear(op)
    }

    fn expert_linear(&self, op: ExpertLinear<'_>) -> Result<()> {
        op.check()?;
        let choices = op.experts.cols();
        let mut chosen = vec![0.0; op.experts.rows() * choices];
        self.backend.read(op.experts, &mut chosen)?;
        // The operation itself refuses experts that are not there.
        let matrix = chosen.iter().enumerate().filter_map(|(i, expert)| {
            let row = op.x_row(i / choices, i % choices);
            Some((row, op.w.get(*expert as usize)?))
        });
        self.add(op.x, matrix)?;
        self.backend.expert_linear(op)
    }

    hand_on! {
        embed: Embed, gather: Gather, rms_norm: RmsNorm, layer_norm: LayerNorm, add: Add, scale: Scale,
        activate: Activate, conv1d: Conv1d, selective_scan: SelectiveScan, ssd_scan: SsdScan,
        ssd_chunked: SsdChunked, mamba3_scan: Mamba3Scan, s4d_scan: S4dScan, rope: Rope, kv_write: KvWrite,
        attention: Attention, route: Route, combine: Combine, likeliest: Likeliest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_saw_nothing_counts_alike_and_zeros_count_little() {
        let columns = |mean_squares: &[f32], rows| Columns {
            mean_squares: mean_squares.to_vec(),
            rows,
        };
        let importance = Importance {
            columns: BTreeMap::from([
                ("a".into(), columns(&[4.0, 0.0, 0.25], 3)),
                ("b".into(), columns(&[0.0, 0.0], 0)),
                ("c".into(), columns(&[0.0, 0.0], 7)),
            ]),
        };
        assert_eq!(&*importance.of("a").unwrap(), &[4.0, 0.25, 0.25]);
        assert_eq!(&*importance.of("b").unwrap(), &[1.0, 1.0]);
        assert_eq!(&*importance.of("c").unwrap(), &[1.0, 1.0]);
        assert_eq!(importance.of("d"), None);
        assert_eq!(importance.unseen().collect::<Vec<_>>(), ["b"]);
        assert_eq!(importance.not_finite(), None);
    }
}
