//! The `tensors` of a card: our names to expressions over theirs.
//!
//! A pattern is a name with holes: `{i}` and `{e}` stand for a number (of a block, of an expert), any
//! other letter for a word without dots. An expression is a pattern, or a transform of one:
//! `part(index(model.layers.{i}.experts.gate_up_proj, {e}), 0, 2)`. Letters under `numbers` are computed
//! from the config, and perhaps from `i` or `e`.

use std::fmt;

use strata_kernels::HostTensor;
use strata_layers::param::list_of;
use strata_layers::yaml::Value;
use strata_layers::{Faults, Mark, Node};

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::expression::Scope;
pub use crate::pattern::{Captures, Pattern};
use crate::pattern::{NUMBERS, Piece};
use crate::transforms::{self, TRANSFORMS, Transform};

/// An expression with holes.
#[derive(Debug, Clone)]
enum Expression {
    Tensor(Pattern),
    Call(&'static Transform, Box<Expression>, Vec<Argument>),
}

#[derive(Debug, Clone, Copy)]
enum Argument {
    Literal(f64),
    Hole(char),
}

/// Deepest nesting of calls.
const MAX_CALLS: usize = 8;

impl Expression {
    fn parse(text: &str, depth: usize) -> std::result::Result<Self, String> {
        let text = text.trim();
        let Some((name, rest)) = text.split_once('(') else {
            return Ok(Expression::Tensor(Pattern::parse(text)?));
        };
        if depth > MAX_CALLS {
            return Err(format!("more than {MAX_CALLS} transforms of one tensor"));
        }
        let transform = TRANSFORMS.iter().find(|t| t.name == name).ok_or_else(|| {
            let known = list_of(TRANSFORMS.iter().map(|t| t.name));
            format!("there is no transform `{name}`; there are {known}")
        })?;
        let inside = rest
            .strip_suffix(')')
            .ok_or_else(|| format!("{text:?} does not end with `)`"))?;
        // All arguments behind the first are numbers, so commas are counted from the end.
        let mut parts: Vec<&str> = inside.rsplitn(transform.numbers.len() + 1, ',').collect();
        parts.reverse();
        let usage = || {
            let numbers: Vec<_> = transform.numbers.iter().map(|n| format!(", {n}")).collect();
            format!("{text:?} should read {name}(tensor{})", numbers.concat())
        };
        let (of, numbers) = parts.split_first().ok_or_else(usage)?;
        if numbers.len() != transform.numbers.len() {
            return Err(usage());
        }
        let fits =
            |n: &f64| n.is_finite() && (transform.fractions || (*n >= 0.0 && n.fract() == 0.0));
        let number = |text: &&str| match Pattern::parse(text.trim()).map(|p| p.0).as_deref() {
            Ok([Piece::Hole(hole)]) => Ok(Argument::Hole(*hole)),
            _ => {
                let number = text.trim().parse().ok().filter(fits);
                number.map(Argument::Literal).ok_or_else(usage)
            }
        };
        let numbers = numbers
            .iter()
            .map(number)
            .collect::<std::result::Result<_, _>>()?;
        let of = Box::new(Expression::parse(of, depth + 1)?);
        Ok(Expression::Call(transform, of, numbers))
    }

    fn pattern(&self) -> &Pattern {
        match self {
            Expression::Tensor(pattern) => pattern,
            Expression::Call(_, of, _) => of.pattern(),
        }
    }

    fn holes(&self) -> Vec<char> {
        match self {
            Expression::Tensor(pattern) => pattern.holes().collect(),
            Expression::Call(_, of, numbers) => {
                let mut holes = of.holes();
                holes.extend(numbers.iter().filter_map(|n| match n {
                    Argument::Hole(hole) => Some(*hole),
                    Argument::Literal(_) => None,
                }));
                holes
            }
        }
    }

    fn fill(&self, captures: &Captures) -> Option<Source> {
        Some(match self {
            Expression::Tensor(pattern) => Source::Tensor(pattern.fill(captures)?),
            Expression::Call(transform, of, numbers) => {
                let number = |n: &Argument| match n {
                    Argument::Literal(n) => Some(*n),
                    Argument::Hole(hole) => captures.get(hole)?.parse().ok(),
                };
                let numbers: Option<Vec<f64>> = numbers.iter().map(number).collect();
                Source::Call(transform, Box::new(of.fill(captures)?), numbers?)
            }
        })
    }
}

/// Where a weight comes from: an expression without holes.
#[derive(Debug, Clone)]
pub enum Source {
    /// A tensor of the checkpoint.
    Tensor(String),
    /// A transform of one, with its numbers.
    Call(&'static Transform, Box<Source>, Vec<f64>),
    /// The mean of several tensors, in the format of the first: blocks that a plan merges.
    Mean(Vec<String>),
}

impl Source {
    /// The tensor that it is made from.
    pub fn tensor(&self) -> &str {
        match self {
            Source::Tensor(name) => name,
            Source::Call(_, of, _) => of.tensor(),
            Source::Mean(of) => of.first().map_or("", String::as_str),
        }
    }

    /// The same, made from the mean of tensors. What is averaged is what the checkpoint holds, so that a
    /// checkpoint of the means is the same model.
    fn of_mean(&self, tensors: Vec<String>) -> Source {
        match self {
            Source::Tensor(_) | Source::Mean(_) => Source::Mean(tensors),
            Source::Call(transform, of, numbers) => {
                Source::Call(transform, Box::new(of.of_mean(tensors)), numbers.clone())
            }
        }
    }

    /// All tensors that it is made from.
    pub fn tensors(&self) -> Vec<&str> {
        match self {
            Source::Tensor(name) => vec![name],
            Source::Call(_, of, _) => of.tensors(),
            Source::Mean(of) => of.iter().map(String::as_str).collect(),
        }
    }

    /// The shape that it will have, or why there is none.
    pub fn shape(&self, checkpoint: &Checkpoint) -> std::result::Result<Vec<usize>, String> {
        match self {
            Source::Tensor(name) => {
                let info = checkpoint.get(name).ok_or("the tensor is not there")?;
                Ok(info.shape.clone())
            }
            Source::Call(transform, of, numbers) => {
                (transform.shape)(&of.shape(checkpoint)?, numbers)
                    .map_err(|why| format!("{}: {why}", transform.name))
            }
            Source::Mean(of) => {
                let shape = |name: &String| {
                    let info = checkpoint.get(name).ok_or("the tensor is not there")?;
                    Ok::<_, String>(info.shape.clone())
                };
                let mut shapes = of.iter().map(shape);
                let first = shapes
                    .next()
                    .unwrap_or_else(|| Err("a mean of nothing".into()))?;
                for other in shapes {
                    let other = other?;
                    if other != first {
                        return Err(format!("{first:?} and {other:?} have no mean"));
                    }
                }
                Ok(first)
            }
        }
    }

    /// Whether it is computed to f32.
    pub fn widens(&self) -> bool {
        match self {
            Source::Tensor(_) | Source::Mean(_) => false,
            Source::Call(transform, of, _) => transform.widens || of.widens(),
        }
    }

    /// The elements.
    pub fn load(&self, checkpoint: &Checkpoint) -> Result<HostTensor> {
        match self {
            Source::Tensor(name) => checkpoint.tensor(name),
            Source::Call(transform, of, numbers) => {
                (transform.apply)(&of.load(checkpoint)?, numbers)
            }
            Source::Mean(of) => {
                let loaded = of.iter().map(|name| checkpoint.tensor(name));
                let loaded = loaded.collect::<Result<Vec<_>>>()?;
                transforms::mean(&loaded)
            }
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Tensor(name) => f.write_str(name),
            Source::Call(transform, of, numbers) => {
                write!(f, "{}({of}", transform.name)?;
                numbers.iter().try_for_each(|n| write!(f, ", {n}"))?;
                f.write_str(")")
            }
            Source::Mean(of) => {
                write!(f, "mean({})", of.join(", "))
            }
        }
    }
}

/// A line of the map.
#[derive(Debug, Clone)]
struct Rule {
    ours: Pattern,
    /// The first whose tensor exists counts.
    theirs: Vec<Expression>,
    at: Mark,
}

/// A letter that stands for a computed number.
#[derive(Debug, Clone)]
struct Number {
    letter: char,
    /// Without its `=`.
    expression: String,
    at: Mark,
    values: Values,
}

/// What a computed number is.
#[derive(Debug, Clone)]
enum Values {
    /// No config is known yet.
    Unknown,
    /// The same everywhere.
    One(String),
    /// Another for every value of a hole. Where there is none, no tensor has such a name.
    By(char, Vec<Option<String>>),
}

/// Our names to expressions over theirs, and what of theirs is knowingly dropped.
#[derive(Debug, Clone, Default)]
pub struct TensorMap {
    rules: Vec<Rule>,
    numbers: Vec<Number>,
    ignore: Vec<Pattern>,
}

/// What a rule says about one weight.
#[derive(Debug)]
pub struct Found {
    /// The sources in order of preference; none when no rule knows the weight.
    pub sources: Vec<Source>,
    /// The rule's place in the card.
    pub at: Mark,
}

impl TensorMap {
    /// Reads the map of a card.
    pub fn read(
        tensors: &Node,
        numbers: Option<&Node>,
        ignore: Option<&Node>,
        faults: &mut Faults,
    ) -> Self {
        let mut map = TensorMap {
            numbers: numbers.map_or_else(Vec::new, |n| read_numbers(n, faults)),
            ..TensorMap::default()
        };
        let Value::Map(entries) = &tensors.value else {
            let found = tensors.value.describe();
            faults.add(
                tensors.at,
                format!("found {found}, expected a mapping of names"),
            );
            return map;
        };
        for entry in entries {
            let ours = match Pattern::parse(&entry.key) {
                Ok(ours) => ours,
                Err(why) => {
                    faults.add(entry.at, why);
                    continue;
                }
            };
            let computed = map.numbers.iter().map(|n| n.letter);
            let known: Vec<char> = ours.holes().chain(computed).collect();
            let mut theirs = Vec::new();
            for (text, at) in texts(&entry.value, faults) {
                match Expression::parse(text, 0) {
                    Ok(expression) => {
                        if let Some(hole) = expression.holes().iter().find(|h| !known.contains(h)) {
                            let message = format!("{{{hole}}} does not occur in `{ours}`");
                            faults.add(at, message);
                        }
                        theirs.push(expression);
                    }
                    Err(why) => faults.add(at, why),
                }
            }
            let at = entry.at;
            map.rules.push(Rule { ours, theirs, at });
        }
        for (text, at) in ignore.map(|n| texts(n, faults)).unwrap_or_default() {
            match Pattern::ignored(text) {
                Ok(pattern) => map.ignore.push(pattern),
                Err(why) => faults.add(at, why),
            }
        }
        map
    }

    /// Lets the lines of another map count first.
    pub(crate) fn put_before(&mut self, first: TensorMap) {
        self.rules.splice(0..0, first.rules);
    }

    /// The map of a checkpoint whose tensors have our names.
    pub fn identity() -> Self {
        TensorMap::default()
    }

    /// Where a weight may come from.
    pub fn find(&self, path: &str) -> Found {
        self.find_among(path, false)
    }

    /// Where a weight of an edited plan may come from: a tensor with our name first, which is there if the
    /// family has no name for such a weight.
    pub fn find_edited(&self, path: &str) -> Found {
        self.find_among(path, true)
    }

    fn find_among(&self, path: &str, ours: bool) -> Found {
        if let Some(merged) = strata_layers::plan::merged(path) {
            let each: Vec<Found> = merged.iter().map(|p| self.find_among(p, ours)).collect();
            let ways = each.iter().map(|f| f.sources.len()).min().unwrap_or(0);
            let mean = |way: usize| {
                let tensors = each.iter().map(|f| f.sources[way].tensor().to_string());
                Some(each.first()?.sources[way].of_mean(tensors.collect()))
            };
            return Found {
                sources: (0..ways).filter_map(mean).collect(),
                at: each.first().map(|f| f.at).unwrap_or_default(),
            };
        }
        if self.rules.is_empty() {
            return Found {
                sources: vec![Source::Tensor(path.into())],
                at: Mark::default(),
            };
        }
        let rule = self
            .rules
            .iter()
            .find_map(|r| Some((r, r.ours.captures(path)?)));
        let mut found = match rule {
            Some((rule, mut captures)) => {
                self.add_numbers(&mut captures);
                let theirs = rule.theirs.iter();
                Found {
                    sources: theirs.filter_map(|e| e.fill(&captures)).collect(),
                    at: rule.at,
                }
            }
            None => Found {
                sources: Vec::new(),
                at: Mark::default(),
            },
        };
        if ours {
            found.sources.insert(0, Source::Tensor(path.into()));
        }
        found
    }

    /// Whether some numbers depend on the config.
    pub(crate) fn has_numbers(&self) -> bool {
        !self.numbers.is_empty()
    }

    /// Computes them, with what expressions see and the number of blocks.
    pub(crate) fn compute_numbers(
        &mut self,
        scope: &mut Scope,
        blocks: usize,
        faults: &mut Faults,
    ) {
        let mut done: Vec<Number> = Vec::new();
        for number in &mut self.numbers {
            match values(number, &done, scope, blocks) {
                Ok(values) => number.values = values,
                Err(why) => faults.add(number.at, why),
            }
            done.push(number.clone());
        }
    }

    /// The computed numbers that belong to these holes.
    fn add_numbers(&self, captures: &mut Captures) {
        for number in &self.numbers {
            if let Some(value) = number.value(captures) {
                captures.insert(number.letter, value.into());
            }
        }
    }

    /// The holes that have led to these numbers, if any have.
    fn with_holes(&self, mut captures: Captures) -> Option<Captures> {
        let fits = |captures: &Captures| {
            let known = |n: &Number| match captures.get(&n.letter) {
                Some(found) => n.value(captures) == Some(found),
                None => true,
            };
            self.numbers.iter().all(known)
        };
        for number in &self.numbers {
            if let Values::By(hole, values) = &number.values
                && captures.contains_key(&number.letter)
                && !captures.contains_key(hole)
            {
                let with = |place: usize| {
                    let mut captures = captures.clone();
                    captures.insert(*hole, place.to_string());
                    fits(&captures).then_some(captures)
                };
                captures = (0..values.len()).find_map(with)?;
            }
        }
        fits(&captures).then_some(captures)
    }

    /// Whether a tensor of theirs is knowingly dropped.
    pub fn ignores(&self, tensor: &str) -> bool {
        let fits = |p: &Pattern| self.with_holes(p.captures(tensor)?);
        self.ignore.iter().any(|p| fits(p).is_some())
    }

    /// The weight that a tensor of theirs would be, and the rule's place.
    pub fn weight_of(&self, tensor: &str) -> Option<(String, Mark)> {
        if self.rules.is_empty() {
            return Some((tensor.into(), Mark::default()));
        }
        self.rules.iter().find_map(|rule| {
            rule.theirs.iter().find_map(|expression| {
                let mut captures = self.with_holes(expression.pattern().captures(tensor)?)?;
                // One tensor of all experts: the first stands for them.
                captures.entry('e').or_insert_with(|| "0".into());
                Some((rule.ours.fill(&captures)?, rule.at))
            })
        })
    }

    /// The block that a tensor of theirs belongs to, whether or not a rule knows the tensor.
    pub fn block_of(&self, tensor: &str) -> Option<usize> {
        let own = Pattern(vec![Piece::Text("blocks.".into()), Piece::Hole('i')]);
        if self.rules.is_empty() {
            return own.block(tensor);
        }
        let patterns = self
            .rules
            .iter()
            .flat_map(|r| r.theirs.iter().map(Expression::pattern));
        patterns.into_iter().find_map(|p| p.block(tensor))
    }
}

impl Number {
    fn value(&self, captures: &Captures) -> Option<&String> {
        match &self.values {
            Values::Unknown => None,
            Values::One(value) => Some(value),
            Values::By(hole, values) => {
                let place: usize = captures.get(hole)?.parse().ok()?;
                values.get(place)?.as_ref()
            }
        }
    }
}

/// `{j: =places(hybrids, i)[0]}`.
fn read_numbers(node: &Node, faults: &mut Faults) -> Vec<Number> {
    let Value::Map(entries) = &node.value else {
        let found = node.value.describe();
        let message = format!("found {found}, expected a mapping of letters to expressions");
        faults.add(node.at, message);
        return Vec::new();
    };
    let mut numbers = Vec::new();
    for entry in entries {
        let mut letters = entry.key.chars();
        let letter = match (letters.next(), letters.next()) {
            (Some(c), None) if c.is_ascii_lowercase() && !NUMBERS.contains(&c) => c,
            _ => {
                let message = format!("{:?} is no letter; i and e have a meaning", entry.key);
                faults.add(entry.at, message);
                continue;
            }
        };
        match &entry.value.value {
            Value::Text(text) if text.starts_with('=') => numbers.push(Number {
                letter,
                expression: text[1..].into(),
                at: entry.value.at,
                values: Values::Unknown,
            }),
            other => faults.add(
                entry.value.at,
                format!("found {}, expected an expression", other.describe()),
            ),
        }
    }
    numbers
}

/// What a number is, with those before it.
fn values(
    number: &Number,
    before: &[Number],
    scope: &mut Scope,
    blocks: usize,
) -> std::result::Result<Values, String> {
    let reads: Vec<String> = scope.reads(&number.expression);
    let reads = |letter: char| reads.iter().any(|r| r.chars().eq([letter]));
    let others: Vec<&Number> = before.iter().filter(|n| reads(n.letter)).collect();
    let by_others = others.iter().filter_map(|n| match &n.values {
        Values::By(hole, _) => Some(*hole),
        _ => None,
    });
    let read = NUMBERS.into_iter().filter(|hole| reads(*hole));
    let mut holes: Vec<char> = read.chain(by_others).collect();
    holes.sort_unstable();
    holes.dedup();
    let set = |letter: char, value: &str, scope: &mut Scope| {
        let value = value.parse().unwrap_or_default();
        scope.set(&letter.to_string(), &Value::Int(value), "of a name");
    };
    let compute = |captures: &Captures, scope: &mut Scope| {
        for (letter, value) in captures {
            set(*letter, value, scope);
        }
        for other in &others {
            let value = other
                .value(captures)
                .ok_or("a number that it reads is none")?;
            set(other.letter, value, scope);
        }
        let computed = scope.evaluate(&number.expression)?;
        match computed.value {
            Value::Int(n) if n >= 0 => Ok(n.to_string()),
            _ => Err(format!("a name holds whole numbers: {}", computed.told)),
        }
    };
    match holes[..] {
        [] => Ok(Values::One(compute(&Captures::new(), scope)?)),
        [hole] => {
            let mut at = |n: usize| compute(&Captures::from([(hole, n.to_string())]), scope);
            let all: Vec<_> = (0..blocks).map(&mut at).collect();
            match all.iter().find_map(|v| v.as_ref().err()) {
                Some(why) if all.iter().all(std::result::Result::is_err) => Err(why.clone()),
                _ => Ok(Values::By(
                    hole,
                    all.into_iter().map(std::result::Result::ok).collect(),
                )),
            }
        }
        _ => Err("a number in a name may depend on {i} or on {e}, not on both".into()),
    }
}

/// A text, or a list of texts.
fn texts<'a>(node: &'a Node, faults: &mut Faults) -> Vec<(&'a str, Mark)> {
    let nodes = match &node.value {
        Value::List(list) => list.iter().collect(),
        _ => vec![node],
    };
    let mut out = Vec::new();
    for node in nodes {
        match &node.value {
            Value::Text(text) => out.push((text.as_str(), node.at)),
            other => faults.add(
                node.at,
                format!("found {}, expected a name", other.describe()),
            ),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_read_with_their_faults() {
        let check = |text: &str, expected: &str| {
            let captures = Captures::from([('i', "3".into()), ('e', "1".into())]);
            let shown = match Expression::parse(text, 0) {
                Ok(e) => e
                    .fill(&captures)
                    .map_or("unknown hole".into(), |s| s.to_string()),
                Err(why) => why,
            };
            assert!(shown.contains(expected), "{text}: {shown}");
        };
        check(
            "part(index(l.{i}.x, {e}), 0, 2)",
            "part(index(l.3.x, 1), 0, 2)",
        );
        check("neg_exp( a )", "neg_exp(a)");
        check("a.{z}", "unknown hole");
        check(
            "exp(a)",
            "there is no transform `exp`; there are neg_exp, plus, ",
        );
        check("index(a)", "should read index(tensor, entry)");
        check("index(a, b)", "should read index(tensor, entry)");
        check("neg_exp(a, 1)", "no name");
        check("neg_exp(a", "does not end with `)`");
        check(
            &("neg_exp(".repeat(20) + "a" + &")".repeat(20)),
            "more than 8",
        );
    }
}
