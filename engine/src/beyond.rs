//! Sequences beyond the context: what attention can still see of them, and what only the state of fixed size holds.

use std::ops::Range;

use serde_json::{Value, json};
use strata_layers::{Graph, Reach};

use crate::prefix_cache::thousands;

/// What is seen of a sequence by its last token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sight {
    /// All tokens of the sequence.
    pub tokens: usize,
    /// First tokens that stay in sight whatever follows.
    pub first: Range<usize>,
    /// The last ones that are seen.
    pub last: Range<usize>,
    /// Whether the model has a state of fixed size, which has gone through all tokens.
    pub has_state: bool,
}

impl Sight {
    /// Of the last of `tokens` tokens under the widest of a graph's windows; none where some layer sees all, or none
    /// looks back at keys.
    pub fn of(graph: &Graph, tokens: usize) -> Option<Sight> {
        let Reach { window, keep_first } = graph.reach()?;
        let start = tokens.saturating_sub(window);
        Some(Sight {
            tokens,
            // Positions count the prefix, which nobody is told of.
            first: 0..keep_first.saturating_sub(graph.prefix).min(start),
            last: start..tokens,
            has_state: graph.slot_bytes() > 0,
        })
    }

    /// Tokens that attention does not see any more.
    pub fn unseen(&self) -> Range<usize> {
        self.first.end..self.last.start
    }

    /// For scripts: ranges are the first token and the one behind the last, counted from 0.
    pub fn json(&self) -> Value {
        let range = |r: &Range<usize>| json!([r.start, r.end]);
        let seen = [&self.first, &self.last]
            .into_iter()
            .filter(|r| !r.is_empty());
        json!({
            "tokens": self.tokens,
            "attention_sees": seen.map(range).collect::<Vec<_>>(),
            "only_in_state": self.has_state.then(|| self.unseen().len()),
            "unseen": range(&self.unseen()),
        })
    }

    /// In words.
    pub fn text(&self) -> String {
        let run = |r: &Range<usize>| match r.len() {
            1 => format!("token {}", thousands(r.start)),
            _ => format!("tokens {} to {}", thousands(r.start), thousands(r.end - 1)),
        };
        let seen: Vec<String> = [&self.first, &self.last]
            .into_iter()
            .filter(|r| !r.is_empty())
            .map(run)
            .collect();
        let unseen = self.unseen();
        let fate = match (self.has_state, unseen.len()) {
            (true, 1) => "lives only in the state",
            (true, _) => "live only in the state",
            (false, 1) => "is lost, as the model has no other state",
            (false, _) => "are lost, as the model has no other state",
        };
        match unseen.is_empty() {
            true => format!("attention sees all {} tokens", thousands(self.tokens)),
            false => format!(
                "of {} tokens attention sees {} only; {} {fate}",
                thousands(self.tokens),
                seen.join(" and "),
                run(&unseen)
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_seen_and_what_is_not_are_all() {
        let sight = |tokens, first, start, has_state| Sight {
            tokens,
            first: 0..first,
            last: start..tokens,
            has_state,
        };
        let cases = [
            (sight(9, 0, 0, true), "attention sees all 9 tokens"),
            (
                sight(10_000, 0, 5904, true),
                "of 10,000 tokens attention sees tokens 5,904 to 9,999 only; tokens 0 to 5,903 live only in the state",
            ),
            (
                sight(20, 3, 12, false),
                "of 20 tokens attention sees tokens 0 to 2 and tokens 12 to 19 only; tokens 3 to 11 are lost, as the model has no other state",
            ),
            (
                sight(5, 0, 1, true),
                "of 5 tokens attention sees tokens 1 to 4 only; token 0 lives only in the state",
            ),
        ];
        for (sight, text) in cases {
            assert_eq!(sight.text(), text);
            let seen = sight.first.len() + sight.last.len();
            assert_eq!(seen + sight.unseen().len(), sight.tokens);
        }
        let json = sight(20, 3, 12, true).json();
        assert_eq!(json["attention_sees"], json!([[0, 3], [12, 20]]));
        assert_eq!(json["only_in_state"], 9);
    }
}
