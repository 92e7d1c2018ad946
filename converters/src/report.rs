//! Many faults, of which each kind shows its first few.

use strata_layers::{Faults, Mark};

/// Shown of each kind. Three kinds and their summaries make about forty lines.
const SHOWN: usize = 12;

/// Faults in the order in which they are added, kind by kind.
pub(crate) struct Report {
    faults: Faults,
    kind: &'static str,
    count: usize,
    last: Mark,
}

impl Report {
    pub fn new(file: &str) -> Self {
        Report {
            faults: Faults::new(file),
            kind: "",
            count: 0,
            last: Mark::default(),
        }
    }

    /// Starts to add faults of another kind: a plural noun, for "… and 7 more missing tensors".
    pub fn kind(&mut self, kind: &'static str) {
        self.summary();
        (self.kind, self.count) = (kind, 0);
    }

    pub fn add(&mut self, at: Mark, message: impl Into<String>) {
        self.count += 1;
        if self.count <= SHOWN {
            self.faults.add(at, message);
            self.last = at;
        }
    }

    fn summary(&mut self) {
        if self.count > SHOWN {
            let more = self.count - SHOWN;
            let message = format!("… and {more} more {}", self.kind);
            self.faults.add(self.last, message);
        }
    }

    pub fn finish(mut self) -> Result<(), Faults> {
        self.summary();
        if self.faults.is_empty() {
            Ok(())
        } else {
            Err(self.faults)
        }
    }
}
