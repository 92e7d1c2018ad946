//! What a card may do to a tensor on its way into a plan: pure functions, named from cards.
//!
//! Most are views. Those that compute make a small tensor of their own in f32, so none is meant for
//! large matrices; `every`, `unzip` and `unpair` copy.

use std::sync::Arc;

use strata_kernels::{Format, HostTensor};

use crate::error::Result;

/// A shape, or why there is none.
pub type Shaped = std::result::Result<Vec<usize>, String>;

/// A function from a tensor, and some numbers, to a tensor.
#[derive(Debug)]
pub struct Transform {
    /// What cards call it.
    pub name: &'static str,
    /// What its numbers are; one for each.
    pub numbers: &'static [&'static str],
    /// Whether the result is in f32, whatever came in.
    pub widens: bool,
    /// Whether its numbers may have fractions.
    pub fractions: bool,
    /// The shape of the result, or why there is none. Nothing is read yet.
    pub shape: fn(&[usize], &[f64]) -> Shaped,
    /// The result, after `shape` has agreed.
    pub apply: fn(&HostTensor, &[f64]) -> Result<HostTensor>,
    /// How to go back.
    pub undo: Undo,
}

/// A shape from the shape that was made, the numbers, and the shape of the tensor where it is known.
type ShapeBack = fn(&[usize], &[f64], Option<&[usize]>) -> Shaped;

/// From what a transform made to what it was made from.
#[derive(Debug, Clone, Copy)]
pub enum Undo {
    /// Element by element, with the transform's first number.
    Values(fn(f32, f64) -> f32),
    /// The same elements: the shape, from the shape that was made, the numbers, and the shape of the tensor
    /// where it is known.
    Shape(ShapeBack),
    /// The result is a piece: its place, and of how many or up to where, from the numbers.
    Place(fn(&[f64]) -> (usize, usize)),
    /// Some rows hold a factor: the first of them, the end, and the factor, from the numbers.
    Times(fn(&[f64]) -> (usize, usize, f64)),
    /// Runs of rows are dealt back.
    Piles,
    /// In each run of rows the two halves take turns again.
    Pairs,
    /// The result holds nothing of what it was made from.
    Nothing,
}

/// Numbers of rows, or places among them.
fn whole<const N: usize>(numbers: &[f64]) -> [usize; N] {
    std::array::from_fn(|i| numbers[i] as usize)
}

/// All transforms: a new one adds an entry here.
pub const TRANSFORMS: &[Transform] = &[
    // -exp(x): A of the state space models is stored as the logarithm of its negative.
    Transform {
        name: "neg_exp",
        numbers: &[],
        widens: true,
        fractions: false,
        shape: |shape, _| Ok(shape.to_vec()),
        apply: |x, _| {
            let values: Vec<f32> = x.to_f32().iter().map(|v| -v.exp()).collect();
            Ok(HostTensor::from_f32(x.shape(), &values)?)
        },
        undo: Undo::Values(|y, _| (-y).ln()),
    },
    // x + c: weights that are stored as what they differ by from c.
    Transform {
        name: "plus",
        numbers: &["amount"],
        widens: true,
        fractions: true,
        shape: |shape, _| Ok(shape.to_vec()),
        apply: |x, numbers| {
            let amount = numbers[0] as f32;
            let values: Vec<f32> = x.to_f32().iter().map(|v| v + amount).collect();
            Ok(HostTensor::from_f32(x.shape(), &values)?)
        },
        undo: Undo::Values(|y, amount| y - amount as f32),
    },
    // x / c: weights of a file that hold a factor which the plan has apart.
    Transform {
        name: "over",
        numbers: &["factor"],
        widens: true,
        fractions: true,
        shape: |shape, numbers| match numbers[0] {
            0.0 => Err("nothing is a multiple of zero".into()),
            _ => Ok(shape.to_vec()),
        },
        apply: |x, numbers| divided(x, 0..usize::MAX, numbers[0]),
        undo: Undo::Times(|numbers| (0, usize::MAX, numbers[0])),
    },
    // The same of some rows only.
    Transform {
        name: "rows_over",
        numbers: &["from", "to", "factor"],
        widens: true,
        fractions: true,
        shape: |shape, numbers| {
            let [from, to, _] = whole(numbers);
            if from < to && shape.first().is_some_and(|rows| to <= *rows) && numbers[2] != 0.0 {
                return Ok(shape.to_vec());
            }
            Err(format!(
                "there are no rows {} to {} in {shape:?} that hold a factor of {}",
                numbers[0], numbers[1], numbers[2]
            ))
        },
        apply: |x, numbers| {
            let [from, to, _] = whole(numbers);
            divided(x, from..to, numbers[2])
        },
        undo: Undo::Times(|numbers| {
            let [from, to, _] = whole(numbers);
            (from, to, numbers[2])
        }),
    },
    // Zeros in the shape of x: a weight that the family does without.
    Transform {
        name: "zeros",
        numbers: &[],
        widens: true,
        fractions: false,
        shape: |shape, _| Ok(shape.to_vec()),
        apply: |x, _| {
            let values = vec![0.0; x.shape().iter().product()];
            Ok(HostTensor::from_f32(x.shape(), &values)?)
        },
        undo: Undo::Nothing,
    },
    // Drops a dimension of size 1: (C, 1, K) of a depthwise convolution is (C, K).
    Transform {
        name: "squeeze",
        numbers: &["dimension"],
        widens: false,
        fractions: false,
        shape: |shape, numbers| squeezed(shape, numbers[0] as usize),
        apply: |x, numbers| {
            let shape =
                squeezed(x.shape(), numbers[0] as usize).unwrap_or_else(|_| x.shape().to_vec());
            Ok(x.reshape(&shape)?)
        },
        undo: Undo::Shape(|shape, numbers, _| {
            let dimension = numbers[0] as usize;
            let mut shape = shape.to_vec();
            shape.insert(dimension.min(shape.len()), 1);
            Ok(shape)
        }),
    },
    // Entry n of the outermost dimension: one expert of a stack.
    Transform {
        name: "index",
        numbers: &["entry"],
        widens: false,
        fractions: false,
        shape: |shape, numbers| match shape.split_first() {
            Some((&outer, rest)) if (numbers[0] as usize) < outer => Ok(rest.to_vec()),
            _ => Err(format!("there is no entry {} in {shape:?}", numbers[0])),
        },
        apply: |x, numbers| {
            let [n] = whole(numbers);
            let entry = x.slice(n..n.saturating_add(1))?;
            Ok(entry.reshape(entry.shape().get(1..).unwrap_or_default())?)
        },
        undo: Undo::Place(|numbers| (numbers[0] as usize, 0)),
    },
    // The two outermost dimensions as one: the rows of all heads.
    Transform {
        name: "flatten",
        numbers: &[],
        widens: false,
        fractions: false,
        shape: |shape, _| flattened(shape),
        apply: |x, _| {
            let shape = flattened(x.shape()).unwrap_or_else(|_| x.shape().to_vec());
            Ok(x.reshape(&shape)?)
        },
        undo: Undo::Shape(as_known),
    },
    // All dimensions as one: vectors that a file holds as columns, or in groups.
    Transform {
        name: "vector",
        numbers: &[],
        widens: false,
        fractions: false,
        shape: |shape, _| Ok(vec![shape.iter().product()]),
        apply: |x, _| Ok(x.reshape(&[x.len()])?),
        undo: Undo::Shape(as_known),
    },
    // The same of a column: (n, 1), or n numbers.
    Transform {
        name: "column",
        numbers: &[],
        widens: false,
        fractions: false,
        shape: |shape, _| Ok(vec![shape.iter().product()]),
        apply: |x, _| Ok(x.reshape(&[x.len()])?),
        undo: Undo::Shape(|shape, _, _| Ok(vec![shape.iter().product(), 1])),
    },
    // The same of n rows of equal size.
    Transform {
        name: "groups",
        numbers: &["count"],
        widens: false,
        fractions: false,
        shape: |shape, _| Ok(vec![shape.iter().product()]),
        apply: |x, _| Ok(x.reshape(&[x.len()])?),
        undo: Undo::Shape(|shape, numbers, _| {
            let (elements, [count]) = (shape.iter().product::<usize>(), whole(numbers));
            match elements.checked_rem(count) {
                Some(0) => Ok(vec![count, elements / count]),
                _ => Err(format!("{elements} elements are no {count} rows")),
            }
        }),
    },
    // In each run of `width` rows the even ones, then the odd ones: heads whose rotated pairs lie side by
    // side, and whose halves are rotated here.
    Transform {
        name: "unpair",
        numbers: &["width"],
        widens: false,
        fractions: false,
        shape: |shape, numbers| match (shape.first(), whole(numbers)) {
            (Some(&rows), [width]) if width > 0 && width % 2 == 0 && rows % width == 0 => {
                Ok(shape.to_vec())
            }
            _ => Err(format!(
                "the rows of {shape:?} are no pairs in runs of {}",
                numbers[0]
            )),
        },
        apply: |x, numbers| {
            let ([width], rows) = (whole(numbers), rows_of(x));
            let half = move |at: usize, odd: usize| (at + odd..at + width).step_by(2);
            let run = move |at: usize| half(at, 0).chain(half(at, 1));
            gathered(x, rows, (0..rows).step_by(width).flat_map(run))
        },
        undo: Undo::Pairs,
    },
    // All dimensions but the outermost as one: the filters of a convolution as rows of a matrix.
    Transform {
        name: "matrix",
        numbers: &[],
        widens: false,
        fractions: false,
        shape: |shape, _| match shape {
            [rows, rest @ ..] if !rest.is_empty() => Ok(vec![*rows, rest.iter().product()]),
            _ => Err(format!("{shape:?} has one dimension")),
        },
        apply: |x, _| {
            let rows = x.shape().first().copied().unwrap_or_default();
            let cols = x.shape().iter().skip(1).product();
            Ok(x.reshape(&[rows, cols])?)
        },
        undo: Undo::Shape(as_known),
    },
    // Rows k, k + n, k + 2n and so on, copied: two matrices whose rows take turns.
    Transform {
        name: "every",
        numbers: &["first", "step"],
        widens: false,
        fractions: false,
        shape: |shape, numbers| match (shape.split_first(), whole(numbers)) {
            (Some((&rows, rest)), [first, step]) if first < step && rows % step == 0 => {
                Ok([&[rows / step], rest].concat())
            }
            _ => Err(format!(
                "there is no row {} of every {} in {shape:?}",
                numbers[0], numbers[1]
            )),
        },
        apply: |x, numbers| {
            let ([first, step], rows) = (whole(numbers), rows_of(x));
            gathered(x, rows / step, (first..rows).step_by(step))
        },
        undo: Undo::Place(|numbers| (numbers[0] as usize, numbers[1] as usize)),
    },
    // Runs of `width` rows, dealt to n piles which lie one behind the other: heads whose two matrices take
    // turns.
    Transform {
        name: "unzip",
        numbers: &["piles", "width"],
        widens: false,
        fractions: false,
        shape: |shape, numbers| match (shape.first(), whole(numbers)) {
            (Some(&rows), [piles, width])
                if piles
                    .checked_mul(width)
                    .is_some_and(|p| p > 0 && rows % p == 0) =>
            {
                Ok(shape.to_vec())
            }
            _ => Err(format!(
                "the rows of {shape:?} are no {} piles of runs of {}",
                numbers[0], numbers[1]
            )),
        },
        apply: |x, numbers| {
            let ([piles, width], rows) = (whole(numbers), rows_of(x));
            let run = move |at: usize| at..at + width;
            let pile = move |k: usize| (k * width..rows).step_by(piles * width).flat_map(run);
            gathered(x, rows, (0..piles).flat_map(pile))
        },
        undo: Undo::Piles,
    },
    // Of every `period` rows those from one to before another, copied: queries, keys and values that are
    // stored a group at a time.
    Transform {
        name: "runs",
        numbers: &["from", "to", "period"],
        widens: false,
        fractions: false,
        shape: |shape, numbers| match (shape.split_first(), whole(numbers)) {
            (Some((&rows, rest)), [from, to, period])
                if from < to && to <= period && rows % period == 0 =>
            {
                Ok([&[rows / period * (to - from)], rest].concat())
            }
            _ => Err(format!(
                "there are no rows {} to {} of every {} in {shape:?}",
                numbers[0], numbers[1], numbers[2]
            )),
        },
        apply: |x, numbers| {
            let ([from, to, period], rows) = (whole(numbers), rows_of(x));
            let run = move |at: usize| at + from..at + to;
            let count = rows / period * (to - from);
            gathered(x, count, (0..rows).step_by(period).flat_map(run))
        },
        // Published under names without it: it is read only.
        undo: Undo::Nothing,
    },
    // Rows from one to before another: one of several matrices that are stored as one.
    Transform {
        name: "rows",
        numbers: &["from", "to"],
        widens: false,
        fractions: false,
        shape: |shape, numbers| match (shape.split_first(), whole(numbers)) {
            (Some((&rows, rest)), [from, to]) if from < to && to <= rows => {
                Ok([&[to - from], rest].concat())
            }
            _ => Err(format!(
                "there are no rows {} to {} in {shape:?}",
                numbers[0], numbers[1]
            )),
        },
        apply: |x, numbers| {
            let [from, to] = whole(numbers);
            Ok(x.slice(from..to)?)
        },
        undo: Undo::Place(|numbers| (numbers[0] as usize, numbers[1] as usize)),
    },
    // The k-th of n equal parts of the rows: gate and up that are stored as one.
    Transform {
        name: "part",
        numbers: &["which", "of how many"],
        widens: false,
        fractions: false,
        shape: |shape, numbers| match (shape.split_first(), whole(numbers)) {
            (Some((&rows, rest)), [which, parts]) if which < parts && rows % parts == 0 => {
                Ok([&[rows / parts], rest].concat())
            }
            _ => Err(format!(
                "there is no part {} of {} in {shape:?}",
                numbers[0], numbers[1]
            )),
        },
        apply: |x, numbers| {
            let [which, parts] = whole(numbers);
            let rows = rows_of(x) / parts.max(1);
            let start = rows.saturating_mul(which);
            Ok(x.slice(start..start.saturating_add(rows))?)
        },
        undo: Undo::Place(|numbers| (numbers[0] as usize, numbers[1] as usize)),
    },
];

/// The shape that the tensor is known to have.
fn as_known(_: &[usize], _: &[f64], known: Option<&[usize]>) -> Shaped {
    let known = known.ok_or("no file tells its shape")?;
    Ok(known.to_vec())
}

/// x · c, rounded once.
pub(crate) fn times(x: f32, factor: f64) -> f32 {
    (f64::from(x) * factor) as f32
}

/// x / c, rounded once.
pub(crate) fn over(x: f32, factor: f64) -> f32 {
    (f64::from(x) / factor) as f32
}

/// Some rows divided by a factor.
fn divided(x: &HostTensor, rows: std::ops::Range<usize>, factor: f64) -> Result<HostTensor> {
    let mut values = x.to_f32();
    let row = values.len() / rows_of(x).max(1);
    for (i, some) in values.chunks_mut(row.max(1)).enumerate() {
        if rows.contains(&i) {
            some.iter_mut().for_each(|v| *v = over(*v, factor));
        }
    }
    Ok(HostTensor::from_f32(x.shape(), &values)?)
}

fn rows_of(x: &HostTensor) -> usize {
    x.shape().first().copied().unwrap_or_default()
}

/// A copy of some rows.
fn gathered(x: &HostTensor, count: usize, rows: impl Iterator<Item = usize>) -> Result<HostTensor> {
    let row = x.bytes().len() / rows_of(x).max(1);
    let mut shape = x.shape().to_vec();
    if let Some(outer) = shape.first_mut() {
        *outer = count;
    }
    let mut bytes = Vec::with_capacity(count * row);
    for at in rows {
        bytes.extend_from_slice(&x.bytes()[at * row..(at + 1) * row]);
    }
    let range = 0..bytes.len();
    Ok(HostTensor::new(x.format(), &shape, Arc::new(bytes), range)?)
}

fn flattened(shape: &[usize]) -> Shaped {
    match shape {
        [a, b, rest @ ..] => Ok([&[a * b], rest].concat()),
        _ => Err(format!("{shape:?} has no two dimensions to make one of")),
    }
}

fn squeezed(shape: &[usize], dimension: usize) -> Shaped {
    if shape.get(dimension) != Some(&1) {
        return Err(format!(
            "dimension {dimension} of {shape:?} does not have size 1"
        ));
    }
    let mut shape = shape.to_vec();
    shape.remove(dimension);
    Ok(shape)
}

/// The mean of tensors of one shape, element by element, in the format of the first; in f32 if that has
/// blocks.
pub fn mean(of: &[HostTensor]) -> Result<HostTensor> {
    let Some(first) = of.first() else {
        return Ok(HostTensor::from_f32(&[0], &[])?);
    };
    let mut sum = vec![0.0f32; first.len()];
    for tensor in of {
        let values = tensor.to_f32();
        sum.iter_mut().zip(values).for_each(|(s, v)| *s += v);
    }
    let mean: Vec<f32> = sum.iter().map(|s| s / of.len() as f32).collect();
    match first.format() {
        format @ (Format::F16 | Format::BF16) => {
            let bytes: Vec<u8> = match format {
                Format::F16 => mean
                    .iter()
                    .flat_map(|v| half::f16::from_f32(*v).to_le_bytes())
                    .collect(),
                _ => mean
                    .iter()
                    .flat_map(|v| half::bf16::from_f32(*v).to_le_bytes())
                    .collect(),
            };
            let range = 0..bytes.len();
            let mean = HostTensor::new(format, first.shape(), Arc::new(bytes), range);
            Ok(mean?)
        }
        _ => Ok(HostTensor::from_f32(first.shape(), &mean)?),
    }
}

/// How many elements are NaN or infinite.
pub fn non_finite(x: &HostTensor) -> usize {
    // An element is not finite when all bits of its exponent are set. Counts of a few thousand elements
    // are kept in 32 bits, so that they are made several at a time.
    fn count<const SIZE: usize>(bytes: &[u8], is: impl Fn([u8; SIZE]) -> bool) -> usize {
        let some = |bytes: &[u8]| -> u32 {
            let (elements, _) = bytes.as_chunks::<SIZE>();
            elements.iter().map(|b| u32::from(is(*b))).sum()
        };
        bytes.chunks(1 << 14).map(|b| some(b) as usize).sum()
    }
    let bytes = x.bytes();
    match x.format() {
        Format::F16 => count(bytes, |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
        Format::BF16 => count(bytes, |b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
        Format::F32 => count(bytes, |b| {
            u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000
        }),
        // A row at a time, so that no large copy is made.
        _ => x.to_f32().iter().filter(|v| !v.is_finite()).count(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(
        name: &str,
        shape: &[usize],
        numbers: &[f64],
    ) -> std::result::Result<HostTensor, String> {
        let values: Vec<f32> = (0..shape.iter().product()).map(|i| i as f32).collect();
        let x = HostTensor::from_f32(shape, &values).unwrap();
        let t = TRANSFORMS.iter().find(|t| t.name == name).unwrap();
        assert_eq!(t.numbers.len(), numbers.len());
        let wanted = (t.shape)(shape, numbers)?;
        let y = (t.apply)(&x, numbers).unwrap();
        assert_eq!(y.shape(), wanted);
        Ok(y)
    }

    #[test]
    fn each_does_what_its_name_says() {
        assert_eq!(run("squeeze", &[3, 1, 2], &[1.0]).unwrap().shape(), [3, 2]);
        assert_eq!(run("squeeze", &[3, 1, 1], &[1.0]).unwrap().shape(), [3, 1]);
        assert!(run("squeeze", &[3, 2], &[1.0]).is_err() && run("squeeze", &[1], &[1.0]).is_err());
        assert_eq!(
            run("index", &[2, 2, 1], &[1.0]).unwrap().to_f32(),
            [2.0, 3.0]
        );
        assert!(run("index", &[2, 2], &[2.0]).is_err() && run("index", &[], &[0.0]).is_err());
        assert_eq!(
            run("part", &[4, 1], &[1.0, 2.0]).unwrap().to_f32(),
            [2.0, 3.0]
        );
        for bad in [[2.0, 2.0], [0.0, 3.0], [0.0, 0.0]] {
            assert!(run("part", &[4, 1], &bad).is_err(), "{bad:?}");
        }
        assert_eq!(run("neg_exp", &[1], &[]).unwrap().to_f32(), [-1.0]);
        assert_eq!(run("plus", &[2], &[0.5]).unwrap().to_f32(), [0.5, 1.5]);
        assert_eq!(run("over", &[2], &[0.25]).unwrap().to_f32(), [0.0, 4.0]);
        let some = run("rows_over", &[4, 1], &[1.0, 3.0, 0.5]).unwrap();
        assert_eq!(some.to_f32(), [0.0, 2.0, 4.0, 3.0]);
        for bad in [[1.0, 5.0, 1.0], [2.0, 2.0, 1.0], [0.0, 1.0, 0.0]] {
            assert!(run("rows_over", &[4, 1], &bad).is_err(), "{bad:?}");
        }
        assert_eq!(run("zeros", &[2], &[]).unwrap().to_f32(), [0.0, 0.0]);
        assert_eq!(run("rows", &[4], &[1.0, 3.0]).unwrap().to_f32(), [1.0, 2.0]);
        for bad in [[1.0, 5.0], [2.0, 2.0]] {
            assert!(run("rows", &[4, 1], &bad).is_err(), "{bad:?}");
        }
        let heads = run("unzip", &[8, 1], &[2.0, 2.0]).unwrap();
        assert_eq!(heads.to_f32(), [0.0, 1.0, 4.0, 5.0, 2.0, 3.0, 6.0, 7.0]);
        for bad in [[2.0, 3.0], [0.0, 1.0], [1e300, 1e300]] {
            assert!(run("unzip", &[8, 1], &bad).is_err(), "{bad:?}");
        }
        assert_eq!(run("column", &[3, 1], &[]).unwrap().shape(), [3]);
        assert_eq!(run("groups", &[3, 2], &[3.0]).unwrap().shape(), [6]);
        assert_eq!(run("vector", &[3, 1], &[]).unwrap().shape(), [3]);
        assert_eq!(run("vector", &[3], &[]).unwrap().shape(), [3]);
        let halves = run("unpair", &[8, 1], &[4.0]).unwrap();
        assert_eq!(halves.to_f32(), [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
        for bad in [[3.0], [0.0], [16.0]] {
            assert!(run("unpair", &[8, 1], &bad).is_err(), "{bad:?}");
        }
        let runs = run("runs", &[8, 1], &[1.0, 3.0, 4.0]).unwrap();
        assert_eq!(runs.to_f32(), [1.0, 2.0, 5.0, 6.0]);
        for bad in [
            [1.0, 1.0, 4.0],
            [1.0, 5.0, 4.0],
            [0.0, 1.0, 3.0],
            [0.0, 1.0, 0.0],
        ] {
            assert!(run("runs", &[8, 1], &bad).is_err(), "{bad:?}");
        }
        assert_eq!(run("flatten", &[3, 2, 4], &[]).unwrap().shape(), [6, 4]);
        assert!(run("flatten", &[3], &[]).is_err());
        let odd = run("every", &[4, 2], &[1.0, 2.0]).unwrap();
        assert_eq!(odd.to_f32(), [2.0, 3.0, 6.0, 7.0]);
        for bad in [[2.0, 2.0], [0.0, 3.0], [0.0, 0.0]] {
            assert!(run("every", &[4, 1], &bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn views_share_memory_with_their_tensor() {
        let x = HostTensor::from_f32(&[2, 4], &[0.0; 8]).unwrap();
        let views = TRANSFORMS.iter().filter(|t| {
            !t.widens && !["squeeze", "every", "unzip", "unpair", "runs"].contains(&t.name)
        });
        for t in views {
            let numbers = [1.0, 2.0];
            let y = (t.apply)(&x, &numbers[..t.numbers.len()]).unwrap();
            assert!(
                x.bytes().as_ptr_range().contains(&y.bytes().as_ptr()),
                "{}",
                t.name
            );
        }
    }

    #[test]
    fn non_finite_elements_are_counted() {
        let x = HostTensor::from_f32(&[4], &[1.0, f32::NAN, f32::NEG_INFINITY, f32::MAX]).unwrap();
        assert_eq!(non_finite(&x), 2);
        let bytes: Vec<u8> = [0x7f80u16, 0x7f7f, 0xffc0]
            .iter()
            .flat_map(|b| b.to_le_bytes())
            .collect();
        let x = HostTensor::new(Format::BF16, &[3], std::sync::Arc::new(bytes), 0..6);
        assert_eq!(non_finite(&x.unwrap()), 2);
    }
}
