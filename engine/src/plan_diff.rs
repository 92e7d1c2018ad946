//! Two plans side by side: what differs, block by block and parameter by parameter.

use std::collections::BTreeMap;

use strata_layers::yaml::{self, Value};
use strata_layers::{Faults, Node, Plan};

/// Values by their path, in the order of the plan.
type Leaves = Vec<(String, String)>;

/// One line of a comparison. A side that has nothing there is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Where: `d_model`, `3.residual.0.norm.eps`; for a run of equal blocks `0..6`.
    pub path: String,
    /// On the left.
    pub left: String,
    /// On the right.
    pub right: String,
    /// Whether both sides say the same.
    pub same: bool,
}

/// A block of the stack: its name with the place of its weights, and its parameters.
struct Block {
    name: String,
    leaves: Leaves,
}

/// Compares two plans: the head of each first, then the stacks, whose blocks are aligned so that as many
/// as can be are equal.
pub fn diff(left: &Plan, right: &Plan) -> Result<Vec<Row>, Faults> {
    let (left, right) = (read(left)?, read(right)?);
    let mut rows = differing("", &left.0, &right.0);
    let (left, right) = (left.1, right.1);
    let mut run: Option<(usize, usize)> = None;
    let close = |run: &mut Option<(usize, usize)>, rows: &mut Vec<Row>| {
        if let Some((first, last)) = run.take() {
            let name = match first == last {
                true => left[first].name.clone(),
                false => format!("{} … {}", left[first].name, left[last].name),
            };
            let path = match first == last {
                true => first.to_string(),
                false => format!("{first}..{last}"),
            };
            rows.push(Row {
                path,
                left: name.clone(),
                right: name,
                same: true,
            });
        }
    };
    for pair in align(&left, &right) {
        match pair {
            (Some(l), Some(r)) if l == r && same(&left[l], &right[r]) => {
                run = Some((run.map_or(l, |(first, _)| first), l));
            }
            (l, r) => {
                close(&mut run, &mut rows);
                rows.extend(block_rows(
                    l.map(|l| (l, &left[l])),
                    r.map(|r| (r, &right[r])),
                ));
            }
        }
    }
    close(&mut run, &mut rows);
    Ok(rows)
}

/// What a plan says before its stack, and its blocks in order.
fn read(plan: &Plan) -> Result<(Leaves, Vec<Block>), Faults> {
    let node = yaml::parse(&plan.print(), "a printed plan")?;
    let (mut top, mut kinds) = (Leaves::new(), BTreeMap::new());
    let Value::Map(entries) = &node.value else {
        return Ok((top, Vec::new()));
    };
    for entry in entries {
        match (entry.key.as_str(), &entry.value.value) {
            ("stack", _) => {}
            ("blocks", Value::Map(blocks)) => {
                for block in blocks {
                    let mut leaves = Leaves::new();
                    flatten("", &block.value, &mut leaves);
                    kinds.insert(block.key.clone(), leaves);
                }
            }
            (key, _) => flatten(key, &entry.value, &mut top),
        }
    }
    let blocks = plan.stack.iter().map(|place| Block {
        name: format!("{}@{}", place.block, place.weights),
        leaves: kinds.get(&place.block).cloned().unwrap_or_default(),
    });
    Ok((top, blocks.collect()))
}

fn flatten(path: &str, node: &Node, out: &mut Leaves) {
    let under = |key: &str| match path {
        "" => key.to_string(),
        path => format!("{path}.{key}"),
    };
    match &node.value {
        Value::Map(entries) => {
            for entry in entries {
                flatten(&under(&entry.key), &entry.value, out);
            }
        }
        Value::List(list) => {
            for (i, item) in list.iter().enumerate() {
                // A step is a mapping of one key, which says more than its number.
                let single = matches!(&item.value, Value::Map(e) if e.len() == 1);
                let repeated = list
                    .iter()
                    .take(i)
                    .any(|other| first_key(other) == first_key(item));
                match single && !repeated {
                    true => flatten(path, item, out),
                    false => flatten(&under(&i.to_string()), item, out),
                }
            }
        }
        other => out.push((
            path.into(),
            yaml::print(&other.clone().into()).trim().into(),
        )),
    }
}

fn first_key(node: &Node) -> Option<&str> {
    match &node.value {
        Value::Map(entries) => entries.first().map(|e| e.key.as_str()),
        _ => None,
    }
}

fn same(left: &Block, right: &Block) -> bool {
    left.name == right.name && left.leaves == right.leaves
}

/// How alike two blocks are: blocks with the same weights and parameters are kept together first, then
/// those with one of the two.
fn likeness(left: &Block, right: &Block) -> usize {
    let weights = |b: &Block| b.name.rsplit('@').next().map(str::to_string);
    let parameters = usize::from(left.leaves == right.leaves);
    4 * usize::from(same(left, right))
        + 2 * usize::from(weights(left) == weights(right))
        + parameters
}

/// Most pairs of blocks that are compared to align two stacks; longer ones are compared place by place.
const MOST_PAIRS: usize = 4_000_000;

type Pair = (Option<usize>, Option<usize>);

/// The alignment of largest likeness (a longest common subsequence, weighted).
fn align(left: &[Block], right: &[Block]) -> Vec<Pair> {
    let (n, m) = (left.len(), right.len());
    if n * m > MOST_PAIRS {
        let at = |i: usize, len: usize| (i < len).then_some(i);
        return (0..n.max(m)).map(|i| (at(i, n), at(i, m))).collect();
    }
    let mut best = vec![0usize; (n + 1) * (m + 1)];
    let at = |i: usize, j: usize| i * (m + 1) + j;
    for i in (0..n).rev() {
        for j in (0..m).rev() {
            let paired = best[at(i + 1, j + 1)] + likeness(&left[i], &right[j]);
            best[at(i, j)] = paired.max(best[at(i + 1, j)]).max(best[at(i, j + 1)]);
        }
    }
    let (mut i, mut j, mut pairs) = (0, 0, Vec::new());
    while i < n || j < m {
        let likely = i < n && j < m && likeness(&left[i], &right[j]) > 0;
        if likely && best[at(i, j)] == best[at(i + 1, j + 1)] + likeness(&left[i], &right[j]) {
            pairs.push((Some(i), Some(j)));
            (i, j) = (i + 1, j + 1);
        } else if j == m || (i < n && best[at(i + 1, j)] >= best[at(i, j + 1)]) {
            pairs.push((Some(i), None));
            i += 1;
        } else {
            pairs.push((None, Some(j)));
            j += 1;
        }
    }
    pairs
}

fn block_rows(left: Option<(usize, &Block)>, right: Option<(usize, &Block)>) -> Vec<Row> {
    let name = |side: Option<(usize, &Block)>| side.map_or(String::new(), |(_, b)| b.name.clone());
    let path = match (left, right) {
        (Some((l, _)), Some((r, _))) if l != r => format!("{l} | {r}"),
        (Some((i, _)), _) | (None, Some((i, _))) => i.to_string(),
        (None, None) => String::new(),
    };
    let alike = left.map(|l| l.1).zip(right.map(|r| r.1));
    let mut rows = vec![Row {
        same: alike.is_some_and(|(l, r)| same(l, r)),
        left: name(left),
        right: name(right),
        path: path.clone(),
    }];
    if let Some((l, r)) = alike {
        rows.extend(differing(&format!("{path}."), &l.leaves, &r.leaves));
    }
    rows
}

/// The values that two lists do not share.
fn differing(before: &str, left: &Leaves, right: &Leaves) -> Vec<Row> {
    let of = |list: &Leaves, path: &str| {
        let found = list.iter().find(|(p, _)| p == path);
        found.map_or(String::new(), |(_, value)| value.clone())
    };
    let more = right
        .iter()
        .filter(|(p, _)| !left.iter().any(|(l, _)| l == p));
    let rows = left.iter().chain(more).map(|(path, _)| Row {
        path: format!("{before}{path}"),
        left: of(left, path),
        right: of(right, path),
        same: of(left, path) == of(right, path),
    });
    rows.filter(|row| !row.same).collect()
}

/// Both columns as text; equal blocks on one line.
pub fn print(rows: &[Row], left: &str, right: &str) -> String {
    let width = |f: fn(&Row) -> &str, title: &str| {
        let cells = rows.iter().map(|r| f(r).chars().count());
        cells.chain([title.chars().count()]).max().unwrap_or(0)
    };
    let (path, first) = (width(|r| &r.path, ""), width(|r| &r.left, left));
    let mut out = format!("  {:path$}  {left:first$}  {right}\n", "");
    for row in rows {
        let mark = if row.same { ' ' } else { '*' };
        let line = format!(
            "{mark} {:path$}  {:first$}  {}",
            row.path, row.left, row.right
        );
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: &str = "\
plan: 1
name: a
vocab: 16
d_model: 8
context: 64
blocks:
  m: [residual: [norm: {eps: 1.0e-6}, mamba1: {d_inner: 16, d_state: 4, d_conv: 4, dt_rank: 2}]]
  f: [residual: [norm: {eps: 1.0e-6}, mlp: {d_ff: 12, act: silu}]]
stack: [m*3, f, m]
head: {norm: {eps: 1.0e-6}, tie: true}
";

    fn rows(edits: &[(&str, &str)]) -> Vec<Row> {
        let edited = edits.iter().fold(PLAN.to_string(), |text, (from, to)| {
            assert!(text.contains(from));
            text.replace(from, to)
        });
        let plan = |text: &str| Plan::parse(text, "p.yaml").unwrap();
        diff(&plan(PLAN), &plan(&edited)).unwrap()
    }

    #[test]
    fn equal_plans_are_one_run_of_blocks() {
        let rows = rows(&[]);
        assert_eq!(rows.len(), 1);
        assert!(rows[0].same && rows[0].path == "0..4", "{rows:?}");
    }

    #[test]
    fn a_parameter_is_named_with_both_its_values() {
        let rows = rows(&[("d_ff: 12", "d_ff: 24"), ("context: 64", "context: 32")]);
        let text = print(&rows, "a", "b");
        assert!(
            text.contains("* context") && text.contains("64  "),
            "{text}"
        );
        let row = rows
            .iter()
            .find(|r| r.path == "3.residual.mlp.d_ff")
            .unwrap();
        assert_eq!((row.left.as_str(), row.right.as_str()), ("12", "24"));
    }

    #[test]
    fn a_dropped_block_leaves_a_gap() {
        let rows = rows(&[("[m*3, f, m]", "[m, m@2, f@3, m@4]")]);
        let gap = rows.iter().find(|r| r.right.is_empty()).unwrap();
        assert_eq!((gap.path.as_str(), gap.left.as_str()), ("1", "m@1"));
        // The others are moved, and the same.
        assert_eq!(rows.iter().filter(|r| !r.same).count(), 1, "{rows:?}");
    }
}
