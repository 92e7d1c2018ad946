//! Names with holes: `blocks.{i}.norm`.
//!
//! `{i}` and `{e}` stand for a number (of a block, of an expert), any other letter for a word without dots.

use std::collections::BTreeMap;
use std::fmt;

/// What the holes of a pattern stand for.
pub type Captures = BTreeMap<char, String>;

/// A name with holes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(pub(crate) Vec<Piece>);

/// A part of a pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Piece {
    /// Itself.
    Text(String),
    /// A letter in braces.
    Hole(char),
    /// Whatever follows: at the end of what is ignored.
    Rest,
}

/// Holes that stand for numbers.
pub(crate) const NUMBERS: [char; 2] = ['i', 'e'];

impl Pattern {
    /// Reads `blocks.{i}.norm`.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        let fault = || format!("{text:?} is no name; holes look like {{i}}, and hold one letter");
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            if !before.is_empty() {
                pieces.push(Piece::Text(before.into()));
            }
            let (hole, after) = after.split_once('}').ok_or_else(fault)?;
            let mut letters = hole.chars();
            match (letters.next(), letters.next()) {
                (Some(c), None) if c.is_ascii_lowercase() => pieces.push(Piece::Hole(c)),
                _ => return Err(fault()),
            }
            rest = after;
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest.into()));
        }
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
        let plain = pieces.iter().all(|p| match p {
            Piece::Text(text) => text.chars().all(allowed),
            Piece::Hole(_) | Piece::Rest => true,
        });
        if pieces.is_empty() || !plain {
            return Err(fault());
        }
        Ok(Pattern(pieces))
    }

    /// Reads a name, or how names begin: `mtp.*`.
    pub(crate) fn ignored(text: &str) -> std::result::Result<Self, String> {
        match text.strip_suffix('*') {
            Some(start) => {
                let mut pattern = Pattern::parse(start)?;
                pattern.0.push(Piece::Rest);
                Ok(pattern)
            }
            None => Pattern::parse(text),
        }
    }

    /// What the holes stand for if this is the pattern of `name`.
    pub fn captures(&self, name: &str) -> Option<Captures> {
        let mut captures = Captures::new();
        matches(&self.0, name, &mut captures).then_some(captures)
    }

    /// The name, if every hole is known.
    pub fn fill(&self, captures: &Captures) -> Option<String> {
        let mut name = String::new();
        for piece in &self.0 {
            match piece {
                Piece::Text(text) => name.push_str(text),
                Piece::Hole(hole) => name.push_str(captures.get(hole)?),
                Piece::Rest => return None,
            }
        }
        Some(name)
    }

    /// The number of the block that `name` belongs to, by what stands before it.
    pub(crate) fn block(&self, name: &str) -> Option<usize> {
        let end = self.0.iter().position(|p| *p == Piece::Hole('i'))? + 1;
        let [before @ .., _] = &self.0[..end] else {
            return None;
        };
        let rest = before.iter().try_fold(name, |rest, piece| match piece {
            Piece::Text(text) => rest.strip_prefix(text.as_str()),
            Piece::Hole(_) | Piece::Rest => None,
        })?;
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let after = rest[digits..].chars().next();
        rest[..digits].parse().ok().filter(|_| after == Some('.'))
    }

    pub(crate) fn holes(&self) -> impl Iterator<Item = char> {
        self.0.iter().filter_map(|p| match p {
            Piece::Hole(hole) => Some(*hole),
            Piece::Text(_) | Piece::Rest => None,
        })
    }
}

fn matches(pieces: &[Piece], name: &str, captures: &mut Captures) -> bool {
    let Some((piece, rest)) = pieces.split_first() else {
        return name.is_empty();
    };
    match piece {
        Piece::Text(text) => name
            .strip_prefix(text.as_str())
            .is_some_and(|name| matches(rest, name, captures)),
        Piece::Rest => true,
        Piece::Hole(hole) if captures.contains_key(hole) => {
            let known = captures[hole].clone();
            name.strip_prefix(known.as_str())
                .is_some_and(|name| matches(rest, name, captures))
        }
        Piece::Hole(hole) => {
            let fits = |c: char| {
                if NUMBERS.contains(hole) {
                    c.is_ascii_digit()
                } else {
                    c.is_ascii_alphanumeric() || c == '_' || c == '-'
                }
            };
            let longest = name.len() - name.trim_start_matches(fits).len();
            (1..=longest).rev().any(|end| {
                captures.insert(*hole, name[..end].into());
                let found = matches(rest, &name[end..], captures);
                if !found {
                    captures.remove(hole);
                }
                found
            })
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|piece| match piece {
            Piece::Text(text) => f.write_str(text),
            Piece::Hole(hole) => write!(f, "{{{hole}}}"),
            Piece::Rest => f.write_str("*"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_find_what_their_holes_stand_for() {
        let check = |pattern: &str, name: &str, expected: Option<&str>| {
            let captures = Pattern::parse(pattern).unwrap().captures(name);
            let text = captures.map(|c| {
                let parts: Vec<String> = c.iter().map(|(k, v)| format!("{k}={v}")).collect();
                parts.join(" ")
            });
            assert_eq!(text.as_deref(), expected, "{pattern} {name}");
        };
        check("blocks.{i}.norm", "blocks.12.norm", Some("i=12"));
        check("blocks.{i}.norm", "blocks.12.norm2", None);
        check("blocks.{i}.norm", "blocks.x.norm", None);
        check("b.{i}.{x}_proj", "b.3.in_proj", Some("i=3 x=in"));
        check("b.{i}.{x}_proj", "b.3.a_proj_proj", Some("i=3 x=a_proj"));
        check("b.{x}.{x}", "b.a.a", Some("x=a"));
        check("b.{x}.{x}", "b.a.b", None);
        check("{i}{e}", "123", Some("e=3 i=12"));
        check("moe.{x}.{e}", "moe.gate.5", Some("e=5 x=gate"));
        for bad in ["", "a.{", "a.{}", "a.{ij}", "a b", "a.{I}", "a}"] {
            assert!(Pattern::parse(bad).is_err(), "{bad:?}");
        }
    }
}
