//! How a download goes, as a bar on a terminal or as lines in a log.

use std::io::Write;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Hears how a download goes.
pub trait Progress {
    /// `total` bytes are to come or there already, over all files, of which `done` are there.
    fn start(&mut self, total: u64, done: u64);
    /// Bytes of this file come now.
    fn file(&mut self, name: &str);
    /// So many more bytes are there.
    fn advance(&mut self, bytes: u64);
    /// Something a person may want to know, such as a fresh attempt.
    fn note(&mut self, text: &str);
    /// All is there.
    fn finish(&mut self);
}

/// Says nothing.
#[derive(Clone, Copy, Debug)]
pub struct Silent;

impl Progress for Silent {
    fn start(&mut self, _: u64, _: u64) {}
    fn file(&mut self, _: &str) {}
    fn advance(&mut self, _: u64) {}
    fn note(&mut self, _: &str) {}
    fn finish(&mut self) {}
}

/// A bar on stderr with bytes, speed and time left; nothing is drawn where stderr is no terminal.
#[derive(Debug)]
pub struct Bar(ProgressBar);

impl Bar {
    /// Not drawn before something is to be downloaded.
    pub fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
        let style = ProgressStyle::with_template(
            "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        );
        if let Ok(style) = style {
            bar.set_style(style);
        }
        Self(bar)
    }
}

impl Default for Bar {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress for Bar {
    fn start(&mut self, total: u64, done: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
        self.0.reset_eta();
    }
    fn file(&mut self, name: &str) {
        self.0.set_message(name.to_owned());
    }
    fn advance(&mut self, bytes: u64) {
        self.0.inc(bytes);
    }
    fn note(&mut self, text: &str) {
        self.0.println(text);
    }
    fn finish(&mut self) {
        self.0.finish_and_clear();
    }
}

/// A line now and then, for logs.
pub struct Lines<W: Write> {
    out: W,
    every: Duration,
    last: Option<Instant>,
    started: Instant,
    at_start: u64,
    done: u64,
    total: u64,
    name: String,
}

impl<W: Write> Lines<W> {
    /// Writes to `out`, at most one line `every` so often.
    pub fn new(out: W, every: Duration) -> Self {
        let started = Instant::now();
        Self {
            out,
            every,
            last: None,
            started,
            at_start: 0,
            done: 0,
            total: 0,
            name: String::new(),
        }
    }
}

impl<W: Write> Progress for Lines<W> {
    fn start(&mut self, total: u64, done: u64) {
        (self.total, self.done, self.at_start, self.started) = (total, done, done, Instant::now());
        writeln!(
            self.out,
            "downloading {}",
            HumanBytes(total.saturating_sub(done))
        )
        .ok();
        self.last = Some(Instant::now());
    }
    fn file(&mut self, name: &str) {
        self.name = name.into();
    }
    fn advance(&mut self, bytes: u64) {
        self.done += bytes;
        if self.last.is_some_and(|last| last.elapsed() < self.every) {
            return;
        }
        self.last = Some(Instant::now());
        let speed =
            (self.done - self.at_start) as f64 / self.started.elapsed().as_secs_f64().max(1e-3);
        let left =
            Duration::from_secs_f64((self.total.saturating_sub(self.done)) as f64 / speed.max(1.0));
        let (done, total, speed) = (
            HumanBytes(self.done),
            HumanBytes(self.total),
            HumanBytes(speed as u64),
        );
        let left = indicatif::HumanDuration(left);
        writeln!(
            self.out,
            "{}: {done} of {total}, {speed}/s, {left} left",
            self.name
        )
        .ok();
    }
    fn note(&mut self, text: &str) {
        writeln!(self.out, "{text}").ok();
    }
    fn finish(&mut self) {}
}
