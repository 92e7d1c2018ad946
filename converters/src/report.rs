//! Many faults, of which each kind shows its first few.

use strata_layers::{Faults, Mark};

/// Shown of each kind. Three kinds and their summaries make about forty lines.
const SHOWN: usize = 12;

/// Faults, kind by kind.
pub(crate) struct Report {
    file: String,
    groups: Vec<Group>,
    notes: Vec<String>,
}

struct Group {
    kind: &'static str,
    count: usize,
    shown: Vec<(Mark, String)>,
}

impl Report {
    pub fn new(file: &str) -> Self {
        Report {
            file: file.into(),
            groups: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Adds what is worth telling, and no fault.
    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// What is worth telling so far.
    pub fn take_notes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notes)
    }

    /// Adds a fault. `kind` is a plural noun, for "… and 7 more missing tensors".
    pub fn add(&mut self, kind: &'static str, at: Mark, message: impl Into<String>) {
        let place = self.groups.iter().position(|g| g.kind == kind);
        let place = place.unwrap_or_else(|| {
            let (count, shown) = (0, Vec::new());
            self.groups.push(Group { kind, count, shown });
            self.groups.len() - 1
        });
        let group = &mut self.groups[place];
        group.count += 1;
        if group.shown.len() < SHOWN {
            group.shown.push((at, message.into()));
        }
    }

    /// Whether there are none so far.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// All faults, if there are any.
    pub fn finish(self) -> Result<(), Faults> {
        let mut faults = Faults::new(&self.file);
        for Group { kind, count, shown } in self.groups {
            let more = count - shown.len();
            let last = shown.last().map(|(at, _)| *at).unwrap_or_default();
            shown.into_iter().for_each(|(at, m)| faults.add(at, m));
            if more > 0 {
                faults.add(last, format!("… and {more} more {kind}"));
            }
        }
        if faults.is_empty() {
            Ok(())
        } else {
            Err(faults)
        }
    }
}
