//! The way back: from the weights of a plan to the tensors that the family publishes.
//!
//! A card says of each weight what it is made from: `part(index(T, 3), 0, 2)`. Read backwards, all weights
//! that are made from T together make T again. What comes out is not the elements but where they are:
//! runs of the weights' elements, one behind the other.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::tensor_map::Source;
use crate::transforms::{self, Transform, Undo};

/// A tensor made from weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Assembled {
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Its elements, in order.
    pub runs: Vec<Run>,
    /// What is done to each element, the first first.
    pub undo: Vec<Step>,
}

/// Elements of a weight, in a row.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// The weight: its place in the list that was given.
    pub weight: usize,
    /// Which of its elements.
    pub elements: Range<usize>,
    /// What each is multiplied by before anything else.
    pub times: f64,
}

/// A change of each element.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    name: &'static str,
    change: fn(f32, f64) -> f32,
    number: f64,
}

impl Step {
    /// Multiplies. None by 1.
    pub fn times(factor: f64) -> Option<Step> {
        (factor != 1.0).then_some(Step {
            name: "times",
            change: transforms::times,
            number: factor,
        })
    }

    /// Divides. None by 1.
    pub fn over(factor: f64) -> Option<Step> {
        (factor != 1.0).then_some(Step {
            name: "over",
            change: transforms::over,
            number: factor,
        })
    }

    /// The element that the transform made `value` from.
    pub fn apply(&self, value: f32) -> f32 {
        (self.change)(value, self.number)
    }
}

impl PartialEq for Step {
    fn eq(&self, other: &Self) -> bool {
        (self.name, self.number) == (other.name, other.number)
    }
}

/// A weight on its way back: the transforms that are still to be undone, the one next to the tensor first.
struct Piece<'a> {
    steps: Vec<(&'static Transform, &'a [f64])>,
    made: Assembled,
}

/// Groups weights by the tensor that they are made from. `weights` are (source, shape) of each; `known`
/// the shape of a tensor where a file has told it. Tensors that cannot be made again come with the reason.
pub fn assemble(
    weights: &[(Source, Vec<usize>)],
    known: impl Fn(&str) -> Option<Vec<usize>>,
) -> Vec<(String, Result<Assembled, String>)> {
    let mut order: Vec<&str> = Vec::new();
    let mut pieces: BTreeMap<&str, Vec<Piece<'_>>> = BTreeMap::new();
    for (weight, (source, shape)) in weights.iter().enumerate() {
        let tensor = source.tensor();
        let of = pieces.entry(tensor).or_insert_with(|| {
            order.push(tensor);
            Vec::new()
        });
        let mut steps = Vec::new();
        let mut at = source;
        while let Source::Call(transform, inner, numbers) = at {
            steps.push((*transform, &numbers[..]));
            at = inner;
        }
        // From the tensor outwards.
        steps.reverse();
        let elements = 0..shape.iter().product();
        let made = Assembled {
            shape: shape.clone(),
            runs: vec![Run {
                weight,
                elements,
                times: 1.0,
            }],
            undo: Vec::new(),
        };
        of.push(Piece { steps, made });
    }
    let whole = |tensor: &str| {
        let pieces = pieces.remove(tensor).unwrap_or_default();
        let made = join(pieces, known(tensor).as_deref());
        (tensor.to_string(), made)
    };
    order.into_iter().map(whole).collect()
}

/// What all pieces together were before the first of their transforms.
fn join(mut pieces: Vec<Piece<'_>>, known: Option<&[usize]>) -> Result<Assembled, String> {
    pieces.retain(|p| !matches!(p.steps.first(), Some((t, _)) if matches!(t.undo, Undo::Nothing)));
    let Some((first, numbers)) = pieces.first().and_then(|p| p.steps.first().copied()) else {
        // The same weight may be wanted in two places; one copy of it is the tensor.
        let mut whole = pieces.into_iter().map(|p| p.made);
        return whole
            .next()
            .ok_or_else(|| "no weight is made from it".into());
    };
    let others = |p: &Piece<'_>| p.steps.first().map(|(t, _)| t.name) != Some(first.name);
    if let Some(other) = pieces.iter().find(|p| others(p)) {
        let other = other.steps.first().map_or("nothing", |(t, _)| t.name);
        return Err(format!(
            "{} and {other} of it cannot be put together",
            first.name
        ));
    }
    match first.undo {
        Undo::Nothing => Err("no weight holds its elements".into()),
        Undo::Values(change) => {
            let number = numbers.first().copied().unwrap_or_default();
            let name = first.name;
            let mut made = join(inner(pieces), known)?;
            made.undo.push(Step {
                name,
                change,
                number,
            });
            Ok(made)
        }
        Undo::Times(of) => {
            if pieces.iter().any(|p| p.steps[0].1 != numbers) {
                return Err("its weights have different factors".into());
            }
            let made = join(inner(pieces), known)?;
            if !made.undo.is_empty() {
                return Err(format!("{} comes after another change", first.name));
            }
            let (from, to, factor) = of(numbers);
            Ok(multiplied(made, from..to, factor))
        }
        Undo::Shape(shape) => {
            let mut made = join(inner(pieces), None)?;
            made.shape = shape(&made.shape, numbers, known)?;
            Ok(made)
        }
        Undo::Pairs => {
            let width = numbers[0] as usize;
            let made = join(inner(pieces), known)?;
            let rows = made.shape.first().copied().unwrap_or(0);
            // Row j of half o was row 2 j + o.
            let place = |row: usize| {
                let (run, at) = (row / width * width, row % width);
                run + at % 2 * (width / 2) + at / 2
            };
            let rows: Vec<Range<usize>> = (0..rows).map(|r| place(r)..place(r) + 1).collect();
            rearrange(&made, &rows)
        }
        Undo::Piles => {
            let [piles, width] = [numbers[0] as usize, numbers[1] as usize];
            let made = join(inner(pieces), known)?;
            let rows = made.shape.first().copied().unwrap_or(0);
            let runs = rows / (piles * width).max(1);
            // Run r of pile p was run r · piles + p.
            let order = (0..runs).flat_map(|r| (0..piles).map(move |p| (p * runs + r) * width));
            let rows: Vec<Range<usize>> = order.map(|from| from..from + width).collect();
            rearrange(&made, &rows)
        }
        Undo::Place(place) => {
            // Pieces of one place among themselves first.
            let mut groups: BTreeMap<(usize, usize), Vec<Piece<'_>>> = BTreeMap::new();
            for piece in pieces {
                let numbers = piece.steps[0].1;
                groups.entry(place(numbers)).or_default().push(piece);
            }
            let keys: Vec<(usize, usize)> = groups.keys().copied().collect();
            let made = groups
                .into_values()
                .map(|pieces| join(inner(pieces), None))
                .collect::<Result<Vec<_>, _>>()?;
            match first.name {
                "index" => stacked(&keys, made, known),
                "every" => interleaved(&keys, &made),
                _ => behind_each_other(first.name, &keys, made, known),
            }
        }
    }
}

/// The pieces without the transform next to the tensor.
fn inner(mut pieces: Vec<Piece<'_>>) -> Vec<Piece<'_>> {
    pieces.iter_mut().for_each(|p| {
        p.steps.remove(0);
    });
    pieces
}

/// Entries 0 to n of a tensor with one more dimension.
fn stacked(
    keys: &[(usize, usize)],
    made: Vec<Assembled>,
    known: Option<&[usize]>,
) -> Result<Assembled, String> {
    let count = known.and_then(|k| k.first().copied()).unwrap_or(made.len());
    if keys.len() != count || keys.iter().enumerate().any(|(i, (at, _))| i != *at) {
        return Err(format!(
            "only {} of its {count} entries are there",
            keys.len()
        ));
    }
    let mut whole = concatenated(made)?;
    let inner = whole.shape.first().copied().unwrap_or(1) / count.max(1);
    if let Some(first) = whole.shape.first_mut() {
        *first = inner;
    }
    whole.shape.insert(0, count);
    Ok(whole)
}

/// Runs of rows, one behind the other.
fn behind_each_other(
    name: &str,
    keys: &[(usize, usize)],
    made: Vec<Assembled>,
    known: Option<&[usize]>,
) -> Result<Assembled, String> {
    let mut next = 0;
    for (key, piece) in keys.iter().zip(&made) {
        let rows = piece.shape.first().copied().unwrap_or(0);
        // Parts are numbered; rows say where they begin.
        let from = if name == "part" { key.0 * rows } else { key.0 };
        if from != next {
            return Err(format!("no weight holds its rows {next} to {from}"));
        }
        next = from + rows;
    }
    let wanted = match (name, keys.first(), made.first()) {
        ("part", Some((_, parts)), Some(first)) => first.shape.first().map(|rows| rows * parts),
        _ => known.and_then(|k| k.first().copied()),
    };
    if wanted.is_some_and(|w| w != next) {
        let wanted = wanted.unwrap_or(0);
        return Err(format!("no weight holds its rows {next} to {wanted}"));
    }
    concatenated(made)
}

/// Rows that take turns.
fn interleaved(keys: &[(usize, usize)], made: &[Assembled]) -> Result<Assembled, String> {
    let step = keys.first().map_or(0, |k| k.1);
    if made.len() != step {
        return Err(format!(
            "only {} of its {step} sets of rows are there",
            made.len()
        ));
    }
    let rows = made[0].shape.first().copied().unwrap_or(0);
    let whole = concatenated(made.to_vec())?;
    let order: Vec<Range<usize>> = (0..rows)
        .flat_map(|r| (0..step).map(move |k| k * rows + r))
        .map(|row| row..row + 1)
        .collect();
    rearrange(&whole, &order)
}

fn concatenated(made: Vec<Assembled>) -> Result<Assembled, String> {
    let mut pieces = made.into_iter();
    let mut whole = pieces.next().ok_or("no weight is made from it")?;
    for piece in pieces {
        let same = whole.shape.get(1..) == piece.shape.get(1..) && whole.undo == piece.undo;
        let (Some(rows), Some(more), true) = (whole.shape.first_mut(), piece.shape.first(), same)
        else {
            return Err("its pieces do not have the same shape".into());
        };
        *rows += more;
        whole.runs.extend(piece.runs);
    }
    Ok(whole)
}

/// The same tensor with some rows multiplied.
fn multiplied(of: Assembled, rows: Range<usize>, factor: f64) -> Assembled {
    let width: usize = of.shape.iter().skip(1).product();
    let (from, to) = (
        rows.start.saturating_mul(width),
        rows.end.saturating_mul(width),
    );
    let mut runs = Vec::with_capacity(of.runs.len());
    let mut first = 0;
    for run in of.runs {
        let (start, end) = (first, first + run.elements.len());
        first = end;
        let cuts = [
            start,
            from.clamp(start, end),
            to.clamp(start, end).max(from.clamp(start, end)),
            end,
        ];
        for (i, cut) in cuts.windows(2).enumerate().filter(|(_, c)| c[0] < c[1]) {
            let at = run.elements.start;
            runs.push(Run {
                weight: run.weight,
                elements: at + (cut[0] - start)..at + (cut[1] - start),
                times: if i == 1 {
                    run.times * factor
                } else {
                    run.times
                },
            });
        }
    }
    Assembled { runs, ..of }
}

/// Runs of elements, and the factor of each.
pub type Factors = Vec<(Range<usize>, f64)>;

/// Of a weight in the shape `shape` with this source: the source without the factors that the tensor holds,
/// and the runs of its elements with the factor of each. None if it holds none, or if rows are
/// rearranged on the way.
pub fn factors(source: &Source, shape: &[usize]) -> Option<(Source, Factors)> {
    let mut bare = source;
    let mut found = Vec::new();
    while let Source::Call(transform, inner, numbers) = bare {
        let Undo::Times(of) = transform.undo else {
            break;
        };
        found.push(of(numbers));
        bare = inner;
    }
    if found.is_empty() {
        return None;
    }
    let elements = 0..shape.iter().product();
    let mut made = Assembled {
        shape: shape.to_vec(),
        runs: vec![Run {
            weight: 0,
            elements,
            times: 1.0,
        }],
        undo: Vec::new(),
    };
    for (from, to, factor) in found {
        made = multiplied(made, from..to, factor);
    }
    let runs = made.runs.into_iter().map(|r| (r.elements, r.times));
    Some((bare.clone(), runs.collect()))
}

/// The same tensor with its rows in another order.
fn rearrange(of: &Assembled, rows: &[Range<usize>]) -> Result<Assembled, String> {
    let [count, inner @ ..] = &of.shape[..] else {
        return Err("it has no rows".into());
    };
    let width: usize = inner.iter().product();
    let mut starts = Vec::with_capacity(of.runs.len());
    let mut total = 0;
    for run in &of.runs {
        starts.push(total);
        total += run.elements.len();
    }
    if total != count * width {
        return Err("its pieces do not fill it".into());
    }
    let mut runs: Vec<Run> = Vec::new();
    for rows in rows {
        let mut at = rows.start * width;
        let end = rows.end * width;
        while at < end {
            let k = starts.partition_point(|s| *s <= at) - 1;
            let run = &of.runs[k];
            let from = run.elements.start + (at - starts[k]);
            let to = (from + (end - at)).min(run.elements.end);
            at += to - from;
            match runs.last_mut() {
                Some(last)
                    if last.weight == run.weight
                        && last.elements.end == from
                        && last.times == run.times =>
                {
                    last.elements.end = to;
                }
                _ => runs.push(Run {
                    elements: from..to,
                    ..run.clone()
                }),
            }
        }
    }
    Ok(Assembled {
        shape: of.shape.clone(),
        runs,
        undo: of.undo.clone(),
    })
}
