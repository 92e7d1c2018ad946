//! The `stack` of a card: written out, or computed in one of five ways.

use strata_layers::param::{Fields, Param, list_of, mismatch};
use strata_layers::yaml::Value;
use strata_layers::{Faults, Mark, Node};

/// Most blocks in a stack.
const MAX_BLOCKS: usize = 10_000;

/// A block's name, and the place in the card that put it here.
pub(crate) type Name = (String, Mark);

/// The blocks in order. All expressions of `node` have been computed.
pub(crate) fn read(node: &Node, faults: &mut Faults) -> Option<Vec<Name>> {
    let stack = match &node.value {
        Value::List(list) => written(list, faults)?,
        Value::Map(_) => computed(node, faults)?,
        other => return mismatch(node, other, "a list of blocks, or how to make one", faults),
    };
    if stack.is_empty() {
        faults.add(node.at, "the stack holds no block");
        return None;
    }
    if stack.len() > MAX_BLOCKS {
        faults.add(
            node.at,
            format!("the stack holds more than {MAX_BLOCKS} blocks"),
        );
        return None;
    }
    Some(stack)
}

/// `[embed, mamba*4]`.
fn written(list: &[Node], faults: &mut Faults) -> Option<Vec<Name>> {
    let mut stack = Vec::new();
    for node in list {
        let Value::Text(text) = &node.value else {
            return mismatch(node, &node.value, "a block's name", faults);
        };
        let (name, count) = text.split_once('*').unwrap_or((text, "1"));
        match count.parse::<usize>() {
            Ok(count) if (1..=MAX_BLOCKS).contains(&count) => {
                stack.extend((0..count).map(|_| (name.to_string(), node.at)));
            }
            _ => return mismatch(node, &node.value, "`block` or `block*count`", faults),
        }
    }
    Some(stack)
}

fn computed(node: &Node, faults: &mut Faults) -> Option<Vec<Name>> {
    let has = |key: &str| node.get(key).is_some();
    let mut fields = Fields::of(node, "a stack", faults)?;
    let stack = if has("repeat") {
        let count = count(&mut fields, "repeat", faults);
        let block = fields.required::<String>("block", faults);
        let at = fields.at("block");
        fields.finish(faults);
        let block = block?;
        (0..count?).map(|_| (block.clone(), at)).collect()
    } else if has("list") {
        let kinds = fields.required::<Vec<String>>("list", faults);
        let map = fields.node("map");
        fields.finish(faults);
        mapped(kinds?, fields.at("list"), map, faults)?
    } else if has("string") {
        let text = fields.required::<String>("string", faults);
        let map = fields.node("map");
        fields.finish(faults);
        let kinds = text?.chars().map(String::from).collect();
        mapped(kinds, fields.at("string"), map, faults)?
    } else if has("at") {
        let count = count(&mut fields, "count", faults);
        let places = fields.required::<Vec<usize>>("at", faults);
        let (then, other) = (
            name(&mut fields, "then", faults),
            name(&mut fields, "else", faults),
        );
        fields.finish(faults);
        let (count, places) = (count?, places?);
        if let Some(place) = places.iter().find(|p| **p >= count) {
            faults.add(
                fields.at("at"),
                format!("there is no block {place} among {count}"),
            );
        }
        let (then, other) = (then?, other?);
        let choose = |i| {
            if places.contains(&i) {
                then.clone()
            } else {
                other.clone()
            }
        };
        (0..count).map(choose).collect()
    } else if has("every") {
        let count = count(&mut fields, "count", faults);
        let every = fields.node("every");
        fields.finish(faults);
        joined(count, every?, faults)?
    } else {
        faults.add(
            node.at,
            "a stack needs one of `repeat`, `list`, `string`, `at` and `every`",
        );
        return None;
    };
    Some(stack)
}

fn name(fields: &mut Fields<'_>, key: &'static str, faults: &mut Faults) -> Option<Name> {
    let name = fields.required::<String>(key, faults)?;
    Some((name, fields.at(key)))
}

fn count(fields: &mut Fields<'_>, key: &'static str, faults: &mut Faults) -> Option<usize> {
    let count = fields.required::<usize>(key, faults)?;
    if !(1..=MAX_BLOCKS).contains(&count) {
        faults.add(
            fields.at(key),
            format!("{count} blocks; there may be 1 to {MAX_BLOCKS}"),
        );
        return None;
    }
    Some(count)
}

/// Each kind of the config, by the card's names for them.
fn mapped(
    kinds: Vec<String>,
    at: Mark,
    map: Option<&Node>,
    faults: &mut Faults,
) -> Option<Vec<Name>> {
    let Some(Value::Map(entries)) = map.map(|n| &n.value) else {
        faults.add(at, "`map` must say which block each kind is");
        return None;
    };
    let mut stack = Vec::new();
    for kind in kinds {
        let Some(entry) = entries.iter().find(|e| e.key == kind) else {
            let known = list_of(entries.iter().map(|e| e.key.as_str()));
            faults.add(
                at,
                format!("{kind:?} is no kind of block; there are {known}"),
            );
            return None;
        };
        stack.push((String::read(&entry.value, faults)?, entry.value.at));
    }
    Some(stack)
}

/// One item of `every`.
struct Every {
    period: usize,
    offset: usize,
    then: String,
    other: String,
}

/// The choices of all items, joined with `-`.
fn joined(count: Option<usize>, every: &Node, faults: &mut Faults) -> Option<Vec<Name>> {
    let Value::List(list) = &every.value else {
        return mismatch(every, &every.value, "a list of choices", faults);
    };
    let items: Vec<Option<Every>> = list.iter().map(|n| read_every(n, faults)).collect();
    let items: Vec<Every> = items.into_iter().collect::<Option<_>>()?;
    let choose = |i: usize| {
        let names: Vec<&str> = items
            .iter()
            .map(|e| {
                if i % e.period == e.offset {
                    e.then.as_str()
                } else {
                    e.other.as_str()
                }
            })
            .collect();
        (names.join("-"), every.at)
    };
    Some((0..count?).map(choose).collect())
}

fn read_every(node: &Node, faults: &mut Faults) -> Option<Every> {
    let mut fields = Fields::of(node, "every", faults)?;
    let period = fields.required::<usize>("period", faults);
    let offset = fields.required::<usize>("offset", faults);
    let then = fields.required::<String>("then", faults);
    let other = fields.required::<String>("else", faults);
    fields.finish(faults);
    let (period, offset) = (period?, offset?);
    if period == 0 {
        faults.add(fields.at("period"), "a period must be at least 1");
        return None;
    }
    if offset >= period {
        let message = format!("the offset {offset} must be smaller than the period {period}");
        faults.add(fields.at("offset"), message);
    }
    Some(Every {
        period,
        offset,
        then: then?,
        other: other?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use strata_layers::yaml;

    #[test]
    fn a_stack_is_said_in_six_ways() {
        let check = |text: &str, expected: &str| {
            let mut faults = Faults::new("card");
            let stack = read(&yaml::parse(text, "card").unwrap(), &mut faults);
            let shown = match stack {
                Some(stack) if faults.is_empty() => {
                    let names: Vec<String> = stack.into_iter().map(|(n, _)| n).collect();
                    names.join(" ")
                }
                _ => faults.to_string(),
            };
            assert!(shown.contains(expected), "{text}: {shown}");
        };
        check("[a, b*2]", "a b b");
        check("{repeat: 3, block: m}", "m m m");
        check(
            "{list: [mamba, attention], map: {mamba: m, attention: a}}",
            "m a",
        );
        check("{string: \"M*M\", map: {M: m, \"*\": a}}", "m a m");
        check("{count: 3, at: [1], then: a, else: m}", "m a m");
        check(
            "{count: 3, every: [{period: 2, offset: 1, then: a, else: m}]}",
            "m a m",
        );
        check(
            "{count: 3, every: [{period: 3, offset: 1, then: a, else: m}, {period: 2, offset: 0, then: x, else: f}]}",
            "m-x a-f m-x",
        );
        check("{repeat: 0, block: m}", "0 blocks; there may be 1 to 10000");
        check("{repeat: 99999999, block: m}", "there may be 1 to 10000");
        check("{repeat: 3}", "a stack needs `block`");
        check(
            "{list: [q], map: {m: m}}",
            "\"q\" is no kind of block; there are m",
        );
        check("{list: [q]}", "`map` must say");
        check(
            "{count: 3, at: [3], then: a, else: m}",
            "there is no block 3 among 3",
        );
        check(
            "{count: 3, every: [{period: 0, offset: 0, then: a, else: m}]}",
            "at least 1",
        );
        check(
            "{count: 3, every: [{period: 2, offset: 2, then: a, else: m}]}",
            "smaller than",
        );
        check("{}", "needs one of");
        check("[]", "no block");
        check("[a*0]", "block*count");
        check("7", "expected a list of blocks");
    }
}
