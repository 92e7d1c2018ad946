//! Stop strings, found across token borders.
//!
//! The stop string whose last character comes first wins, and of several ending there the one that
//! began first: what is found then never depends on how the text was cut into pieces.

use super::Error;

/// What [`StopStrings::push`] lets through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// Text that is no part of a stop string.
    pub text: String,
    /// Index of the stop string found; nothing more passes after it.
    pub stop: Option<usize>,
}

/// Holds back text that may be the beginning of a stop string.
#[derive(Clone, Debug)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopStrings {
    /// Watches for any of `stops`; an empty one is an error.
    pub fn new(stops: Vec<String>) -> Result<Self, Error> {
        match stops.iter().position(String::is_empty) {
            Some(index) => Err(Error::EmptyStop { index }),
            None => Ok(Self {
                stops,
                held: String::new(),
                stopped: false,
            }),
        }
    }

    /// Adds text; returns what can no longer become a stop string.
    pub fn push(&mut self, text: &str) -> Passed {
        if self.stopped {
            return Passed::default();
        }
        self.held.push_str(text);
        let found = self
            .stops
            .iter()
            .enumerate()
            .filter_map(|(index, stop)| {
                self.held
                    .find(stop.as_str())
                    .map(|start| (start + stop.len(), start, index))
            })
            .min();
        if let Some((_, start, index)) = found {
            self.stopped = true;
            self.held.truncate(start);
            return Passed {
                text: std::mem::take(&mut self.held),
                stop: Some(index),
            };
        }
        let kept = self.held.split_off(self.held.len() - self.beginning());
        Passed {
            text: std::mem::replace(&mut self.held, kept),
            stop: None,
        }
    }

    /// The text still held back: the sequence ended without completing a stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes of the longest end of the held text with which a stop string begins.
    fn beginning(&self) -> usize {
        let longest = |stop: &String| {
            let starts = self
                .held
                .char_indices()
                .map(|(start, _)| &self.held[start..]);
            starts
                .filter(|end| end.len() < stop.len())
                .find(|end| stop.starts_with(end))
                .map_or(0, str::len)
        };
        self.stops.iter().map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(stops: &[&str], pieces: &[&str], expected: &str, stop: Option<usize>) {
        let mut watch = StopStrings::new(stops.iter().map(ToString::to_string).collect())
            .expect("no empty stop");
        let (mut text, mut found) = (String::new(), None);
        for piece in pieces {
            let passed = watch.push(piece);
            text += &passed.text;
            found = found.or(passed.stop);
        }
        text += &watch.finish();
        assert_eq!(
            (text.as_str(), found),
            (expected, stop),
            "{stops:?} {pieces:?}"
        );
    }

    #[test]
    fn stops_are_found_across_borders() {
        check(&[], &["a", "b"], "ab", None);
        check(&["\n\n"], &["a\n", "b\n", "\nc"], "a\nb", Some(0));
        check(&["END"], &["xE", "N", "E", "ND more"], "xEN", Some(0));
        check(&["aab"], &["a", "a", "a", "b", "c"], "a", Some(0));
        check(
            &["Человек"],
            &["Я Чел", "овеч", "ий Чело", "век!"],
            "Я Человечий ",
            Some(0),
        );
        check(&["STOP"], &["no STO"], "no STO", None);
        check(&["x"], &["x"], "", Some(0));
    }

    #[test]
    fn the_stop_that_completes_first_wins_however_the_text_is_cut() {
        let (stops, text) = (&["abcdef", "cd", "bcd"][..], "zabcdefg");
        let chars: Vec<String> = text.chars().map(String::from).collect();
        check(stops, &[text], "za", Some(2));
        check(
            stops,
            &chars.iter().map(String::as_str).collect::<Vec<_>>(),
            "za",
            Some(2),
        );
    }

    #[test]
    fn text_passes_as_soon_as_it_cannot_stop() {
        let mut watch = StopStrings::new(vec!["</s>".into()]).expect("no empty stop");
        let mut passed = |text: &str| watch.push(text).text;
        assert_eq!(passed("a <"), "a ");
        assert_eq!(passed("/"), "");
        assert_eq!(passed("b>"), "</b>");
    }

    #[test]
    fn an_empty_stop_string_is_refused() {
        let error = StopStrings::new(vec!["a".into(), String::new()]).expect_err("empty");
        assert!(
            error.to_string().contains("stop string 1 is empty"),
            "{error}"
        );
    }
}
