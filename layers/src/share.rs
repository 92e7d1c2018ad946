//! Layers in parts: what one of several ranks computes of a layer.
//!
//! A rank's share of a layer is a smaller layer of the same kind, with fewer heads, channels or experts, and says
//! which part of each weight it has. All ranks read the whole stream. The share's last product gives a part of a sum,
//! which [`crate::Context::all_reduce`] completes; a bias behind it is one rank's.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use strata_kernels::Result;

use crate::layer::{Layer, LayerSpec, Reach};
use crate::state::{Pages, StateSpec};
use crate::weights::{Cut, WeightSpec, Weights};
use crate::yaml::Value;

/// Which of several ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Of {
    /// From 0.
    pub index: usize,
    /// How many there are.
    pub count: usize,
    /// Whether experts are dealt out whole, rather than each cut.
    pub experts: bool,
}

/// A rank's share of a layer.
#[derive(Debug)]
pub struct Share {
    /// The smaller layer.
    pub spec: Arc<dyn LayerSpec>,
    /// By name of a weight, which part of it the rank has; of others all.
    pub cuts: BTreeMap<String, Cut>,
}

impl Share {
    /// A share of which nothing is said yet.
    pub fn new(spec: impl LayerSpec + 'static) -> Self {
        Share {
            spec: Arc::new(spec),
            cuts: BTreeMap::new(),
        }
    }

    /// The same with these rows of a weight, and of its bias where there is one.
    pub fn rows(mut self, name: &str, of: usize, take: &[Range<usize>]) -> Self {
        let take: Vec<_> = take.iter().filter(|t| !t.is_empty()).cloned().collect();
        for name in [name.to_string(), format!("{name}.bias")] {
            let take = take.clone();
            self.cuts.insert(name, Cut::Rows { of, take });
        }
        self
    }

    /// The same with these columns of a matrix. Its bias is the first rank's.
    pub fn columns(mut self, name: &str, of: usize, take: Range<usize>, rank: Of) -> Self {
        self.cuts.insert(name.into(), Cut::Columns { of, take });
        if rank.index > 0 {
            self.cuts.insert(format!("{name}.bias"), Cut::Zeros);
        }
        self
    }

    /// The same with a small weight that is wider than the smaller layer would have it: the whole.
    pub fn wider(mut self, name: &str, of: usize) -> Self {
        let take = std::iter::once(0..of).collect();
        self.cuts.insert(name.into(), Cut::Rows { of, take });
        self
    }

    /// The same with nothing of a weight: zeros in its place.
    pub fn zeros(mut self, name: String) -> Self {
        self.cuts.insert(name, Cut::Zeros);
        self
    }

    /// The layer whose weights say which part they are.
    pub fn spec(self) -> Arc<dyn LayerSpec> {
        Arc::new(Cutting {
            spec: self.spec,
            cuts: self.cuts,
        })
    }
}

/// A rank's even share of `width` channels, in runs that blocks of weights are made of where there are enough.
pub(crate) fn even(width: usize, rank: Of) -> std::result::Result<Range<usize>, String> {
    let runs = [256, 128, 64, 32, 16, 8, 4, 2, 1];
    let run = runs
        .into_iter()
        .find(|run| width.is_multiple_of(*run) && width / run >= rank.count);
    let run =
        run.ok_or_else(|| format!("{width} channels are too few for {} devices", rank.count))?;
    let at = |index: usize| width / run * index / rank.count * run;
    Ok(at(rank.index)..at(rank.index + 1))
}

/// A rank's share of heads and of the groups that runs of them read: whole groups where there are enough; else heads
/// of one group, which other ranks have too.
pub(crate) fn grouped(
    heads: usize,
    groups: usize,
    rank: Of,
) -> std::result::Result<[Range<usize>; 2], String> {
    let Of { index, count, .. } = rank;
    let each = heads / groups;
    if groups >= count {
        let at = |index: usize| groups * index / count;
        let own = at(index)..at(index + 1);
        return Ok([own.start * each..own.end * each, own]);
    }
    // The ranks of a group stand beside each other.
    let group = |index: usize| index * groups / count;
    let first = (0..count)
        .position(|i| group(i) == group(index))
        .unwrap_or(0);
    let ranks = (0..count).filter(|i| group(*i) == group(index)).count();
    if ranks > each {
        return Err(format!("{heads} heads are too few for {count} devices"));
    }
    let at = |place: usize| group(index) * each + each * place / ranks;
    let place = index - first;
    Ok([at(place)..at(place + 1), group(index)..group(index) + 1])
}

/// A range of heads as one of their channels.
pub(crate) fn scaled(range: &Range<usize>, by: usize) -> Range<usize> {
    range.start * by..range.end * by
}

/// The same further on.
pub(crate) fn shifted(range: &Range<usize>, by: usize) -> Range<usize> {
    range.start + by..range.end + by
}

/// A share among the layers of a graph.
#[derive(Debug)]
struct Cutting {
    spec: Arc<dyn LayerSpec>,
    cuts: BTreeMap<String, Cut>,
}

impl LayerSpec for Cutting {
    fn kind(&self) -> &'static str {
        self.spec.kind()
    }

    fn name(&self) -> &str {
        self.spec.name()
    }

    fn write(&self) -> Value {
        self.spec.write()
    }

    fn d_out(&self, d_in: usize) -> usize {
        self.spec.d_out(d_in)
    }

    fn operands(&self) -> Vec<&str> {
        self.spec.operands()
    }

    fn check_widths(&self, widths: &[usize]) -> std::result::Result<(), String> {
        self.spec.check_widths(widths)
    }

    fn weights(&self, widths: &[usize]) -> Vec<WeightSpec> {
        let mut specs = self.spec.weights(widths);
        for spec in &mut specs {
            spec.cut = self.cuts.get(&spec.name).cloned();
            if let Some(Cut::Rows { take, .. }) = &spec.cut {
                spec.shape[0] = take.iter().map(Range::len).sum();
            }
        }
        specs
    }

    fn state(&self, widths: &[usize]) -> StateSpec {
        self.spec.state(widths)
    }

    fn sees_later_tokens(&self) -> bool {
        self.spec.sees_later_tokens()
    }

    fn keeps_pages(&self) -> Option<&str> {
        self.spec.keeps_pages()
    }

    fn reads_pages(&self) -> Option<(&str, Pages)> {
        self.spec.reads_pages()
    }

    fn share_used(&self, weight: &WeightSpec) -> f64 {
        self.spec.share_used(weight)
    }

    fn sight(&self) -> Option<Reach> {
        self.spec.sight()
    }

    fn other_flops(&self, widths: &[usize], position: usize) -> f64 {
        self.spec.other_flops(widths, position)
    }

    fn build(&self, weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        self.spec.build(weights)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranks(count: usize) -> impl Iterator<Item = Of> {
        (0..count).map(move |index| Of {
            index,
            count,
            experts: false,
        })
    }

    #[test]
    fn channels_are_dealt_out_in_order_and_all() {
        for (width, count) in [(512, 2), (512, 3), (96, 2), (10, 3), (7, 7), (1536, 4)] {
            let shares: Vec<_> = ranks(count).map(|r| even(width, r).unwrap()).collect();
            assert_eq!((shares[0].start, shares[count - 1].end), (0, width));
            assert!(
                shares.windows(2).all(|s| s[0].end == s[1].start),
                "{shares:?}"
            );
            assert!(shares.iter().all(|s| !s.is_empty()), "{shares:?}");
        }
        assert_eq!(even(1536, ranks(4).nth(1).unwrap()).unwrap(), 256..768);
        assert!(
            even(2, ranks(3).next().unwrap())
                .unwrap_err()
                .contains("too few")
        );
    }

    #[test]
    fn heads_stay_with_their_groups() {
        for (heads, groups, count) in [
            (8, 2, 2),
            (8, 2, 3),
            (8, 1, 3),
            (12, 3, 2),
            (6, 6, 4),
            (8, 2, 8),
        ] {
            let mut next = 0;
            for rank in ranks(count) {
                let [own, read] = grouped(heads, groups, rank).unwrap();
                assert_eq!(own.start, next);
                assert!(!own.is_empty());
                next = own.end;
                // Each head's group is one of those that the rank has, and groups have equal runs of heads.
                let each = heads / groups;
                assert_eq!(
                    (own.start / each, (own.end - 1) / each + 1),
                    (read.start, read.end)
                );
                assert_eq!(own.len() % read.len(), 0);
            }
            assert_eq!(next, heads);
        }
        assert!(
            grouped(2, 1, ranks(3).next().unwrap())
                .unwrap_err()
                .contains("too few")
        );
    }
}
