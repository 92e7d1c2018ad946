//! What people see: progress on a terminal, notes, colours.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressState, ProgressStyle};

use crate::estimate::Allocated;
use crate::hub;
use crate::load::{LoadProgress, Model};
use crate::session::{DEFAULT_CHUNK, EngineConfig};

/// Standard error, as a place for messages.
#[derive(Debug, Clone)]
pub struct Terminal {
    progress: bool,
    color: bool,
}

impl Terminal {
    /// Progress only on a terminal, colour only there and where it is wanted.
    pub fn new(no_color: bool) -> Self {
        let terminal = io::stderr().is_terminal();
        Terminal {
            progress: terminal,
            color: terminal && !no_color,
        }
    }

    /// Whether standard error is a terminal.
    pub fn is_interactive(&self) -> bool {
        self.progress
    }

    /// Compares what an engine of these sizes holds at the end of a run, after steps of up to so many rows,
    /// with what was estimated: says both, or only that they differ by more than one part in a hundred.
    pub fn memory(
        &self,
        model: &Model,
        config: &EngineConfig,
        (allocated, rows): (Allocated, usize),
        verbose: bool,
    ) {
        let estimate = model.estimate(config, rows);
        if let Some(off) = allocated.beside(&estimate) {
            self.note(&format!(
                "the estimate of memory was wrong, which is a mistake of ours: {off}"
            ));
        }
        if verbose {
            let (held, expected) = (allocated.total(), estimate.total_bytes());
            self.note(&format!(
                "{} held, {} estimated",
                bytes(held),
                bytes(expected)
            ));
        }
    }

    /// Something worth knowing that is no fault.
    pub fn note(&self, text: &str) {
        for line in text.lines() {
            let line = self.dim(line);
            // Nobody is left to be told if standard error is closed.
            let _ = writeln!(io::stderr(), "{line}");
        }
    }

    /// Less important text.
    pub fn dim(&self, text: &str) -> String {
        if self.color {
            format!("\x1b[2m{text}\x1b[0m")
        } else {
            text.into()
        }
    }

    /// More important text.
    pub fn bold(&self, text: &str) -> String {
        if self.color {
            format!("\x1b[1m{text}\x1b[0m")
        } else {
            text.into()
        }
    }

    /// A bar over `count` of a `unit`; hidden away from a terminal, and where it would only flicker.
    pub fn bar(&self, what: &'static str, count: usize, unit: &'static str) -> ProgressBar {
        if !self.progress || (unit == "tok" && count <= DEFAULT_CHUNK) {
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::new(count as u64);
        let template = "{msg} {wide_bar} {pos}/{len} {unit}, {rate}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            let style = style
                .with_key(
                    "unit",
                    move |_: &ProgressState, out: &mut dyn fmt::Write| {
                        let _ = out.write_str(unit);
                    },
                )
                .with_key(
                    "rate",
                    move |state: &ProgressState, out: &mut dyn fmt::Write| {
                        let _ = write!(out, "{:.1} {unit}/s", state.per_sec());
                    },
                );
            bar.set_style(style);
        }
        bar.set_message(what);
        bar
    }

    /// A bar over bytes, whose length is told later; hidden away from a terminal.
    pub fn byte_bar(&self, what: &'static str) -> ProgressBar {
        if !self.progress {
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::new(0);
        let template = "{msg} {wide_bar} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what);
        bar
    }

    /// Progress of loading.
    pub fn load_progress(&self) -> LoadBar {
        let download: Box<dyn hub::Progress> = if self.progress {
            Box::new(hub::Bar::new())
        } else {
            Box::new(hub::Lines::new(io::stderr(), Duration::from_secs(15)))
        };
        LoadBar {
            shown: self.progress,
            bar: ProgressBar::hidden(),
            download,
        }
    }
}

/// A bar over bytes.
pub struct LoadBar {
    shown: bool,
    bar: ProgressBar,
    download: Box<dyn hub::Progress>,
}

impl LoadProgress for LoadBar {
    fn start(&mut self, what: &str, bytes: u64) {
        // Mapped files are there at once; a bar would only flicker.
        if !self.shown || bytes < 64 << 20 {
            return;
        }
        self.bar = ProgressBar::new(bytes);
        let template = "{msg} {wide_bar} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style);
        }
        self.bar.set_message(what.to_string());
        self.bar.enable_steady_tick(Duration::from_millis(200));
    }

    fn advance(&mut self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn finish(&mut self) {
        self.bar.finish_and_clear();
    }

    fn download(&mut self) -> &mut dyn hub::Progress {
        &mut *self.download
    }
}

/// `6.06 GB`.
pub fn bytes(bytes: u64) -> String {
    let units = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    let found = units.into_iter().find(|(size, _)| bytes as f64 >= *size);
    found.map_or(format!("{bytes} B"), |(size, unit)| {
        format!("{:.2} {unit}", bytes as f64 / size)
    })
}

/// A rate that is zero when nothing was measured.
pub fn rate(count: usize, time: Duration) -> f64 {
    if time.is_zero() {
        0.0
    } else {
        count as f64 / time.as_secs_f64()
    }
}
