//! What has happened since the start, in numbers, and Prometheus's text of it.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::job::Cached;
use super::picture::Picture;

/// Upper bounds of a histogram's buckets, in seconds.
const SECONDS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 600.0,
];

/// Times, counted by size.
#[derive(Debug, Default)]
pub struct Histogram(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    buckets: [u64; SECONDS.len()],
    count: u64,
    seconds: f64,
}

impl Histogram {
    /// Counts a time.
    pub fn add(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        let mut counts = lock(&self.0);
        counts.count += 1;
        counts.seconds += seconds;
        if let Some(i) = SECONDS.iter().position(|bound| seconds <= *bound) {
            counts.buckets[i] += 1;
        }
    }

    fn print(&self, out: &mut Text, name: &str, help: &str) {
        let counts = lock(&self.0);
        out.head(name, "histogram", help);
        let mut sum = 0;
        for (bound, count) in SECONDS.iter().zip(counts.buckets) {
            sum += count;
            out.line(&format!("{name}_bucket{{le=\"{bound}\"}}"), sum as f64);
        }
        out.line(
            &format!("{name}_bucket{{le=\"+Inf\"}}"),
            counts.count as f64,
        );
        out.line(&format!("{name}_sum"), counts.seconds);
        out.line(&format!("{name}_count"), counts.count as f64);
    }
}

/// A lock that a panic elsewhere does not take from us: what it guards are plain numbers.
pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What has happened since the start.
#[derive(Debug, Default)]
pub struct Metrics {
    /// By route and status.
    requests: Mutex<BTreeMap<(&'static str, u16), u64>>,
    /// Tokens of prompts.
    pub prompt_tokens: AtomicU64,
    /// Tokens that were generated.
    pub generated_tokens: AtomicU64,
    /// Jobs whose client left, or read nothing.
    pub cancelled: AtomicU64,
    /// Steps that went wrong.
    pub failed_steps: AtomicU64,
    /// Steps.
    pub steps: AtomicU64,
    kv_matched: AtomicU64,
    kv_unknown: AtomicU64,
    snapshot_hits: AtomicU64,
    snapshot_misses: AtomicU64,
    resumed: AtomicU64,
    replayed: AtomicU64,
    /// From a request's arrival to its first token.
    pub first_token: Histogram,
    /// From a token to the next of the same sequence.
    pub between_tokens: Histogram,
}

impl Metrics {
    /// Counts an answer.
    pub fn answered(&self, route: &'static str, status: u16) {
        *lock(&self.requests).entry((route, status)).or_default() += 1;
    }

    /// Counts what of a prompt was known.
    pub fn cached(&self, cached: &Cached) {
        let add = |counter: &AtomicU64, n: usize| {
            counter.fetch_add(n as u64, Ordering::Relaxed);
        };
        add(&self.kv_matched, cached.matched);
        add(
            &self.kv_unknown,
            cached.prompt - cached.matched.min(cached.prompt),
        );
        add(&self.resumed, cached.resumed_at);
        add(&self.replayed, cached.replayed);
        let hit = cached.resumed_at > 0;
        let counter = if hit {
            &self.snapshot_hits
        } else {
            &self.snapshot_misses
        };
        add(counter, 1);
    }

    /// All of it, with what the engine holds now.
    pub fn text(&self, picture: &Picture) -> String {
        let mut out = Text::default();
        out.head(
            "strata_requests_total",
            "counter",
            "Requests by route and status.",
        );
        for ((route, status), count) in lock(&self.requests).iter() {
            let name = format!("strata_requests_total{{route=\"{route}\",status=\"{status}\"}}");
            out.line(&name, *count as f64);
        }
        let counters = [
            (
                "strata_prompt_tokens_total",
                "Tokens of prompts, known or computed.",
                &self.prompt_tokens,
            ),
            (
                "strata_generated_tokens_total",
                "Tokens that were generated.",
                &self.generated_tokens,
            ),
            (
                "strata_cancelled_total",
                "Requests whose client left or read nothing.",
                &self.cancelled,
            ),
            ("strata_steps_total", "Steps of the engine.", &self.steps),
            (
                "strata_failed_steps_total",
                "Steps that went wrong.",
                &self.failed_steps,
            ),
            (
                "strata_prefix_cache_resumed_tokens_total",
                "Prompt tokens that were not computed again.",
                &self.resumed,
            ),
            (
                "strata_prefix_cache_replayed_tokens_total",
                "Prompt tokens whose keys and values were known, but no state behind them: computed again.",
                &self.replayed,
            ),
        ];
        for (name, help, counter) in counters {
            out.head(name, "counter", help);
            out.line(name, counter.load(Ordering::Relaxed) as f64);
        }
        out.pair(
            "strata_prefix_cache_kv_tokens_total",
            "Prompt tokens whose keys and values were known, and others.",
            [("hit", &self.kv_matched), ("miss", &self.kv_unknown)],
        );
        out.pair(
            "strata_prefix_cache_snapshots_total",
            "Prompts that went on from a kept state of fixed size, and others.",
            [
                ("hit", &self.snapshot_hits),
                ("miss", &self.snapshot_misses),
            ],
        );
        self.first_token.print(
            &mut out,
            "strata_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
        );
        self.between_tokens.print(
            &mut out,
            "strata_inter_token_seconds",
            "From a token to the next of the same sequence.",
        );
        picture.gauges(&mut |name, help, value| {
            out.head(name, "gauge", help);
            out.line(name, value);
        });
        out.0
    }
}

/// Prometheus's text.
#[derive(Default)]
struct Text(String);

impl Text {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a text does not fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn line(&mut self, name: &str, value: f64) {
        let _ = writeln!(self.0, "{name} {value}");
    }

    fn pair(&mut self, name: &str, help: &str, counters: [(&str, &AtomicU64); 2]) {
        self.head(name, "counter", help);
        for (outcome, counter) in counters {
            let name = format!("{name}{{outcome=\"{outcome}\"}}");
            self.line(&name, counter.load(Ordering::Relaxed) as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_counted_in_all_buckets_that_hold_them() {
        let metrics = Metrics::default();
        for millis in [1, 20, 3_000, 10_000_000] {
            metrics.first_token.add(Duration::from_millis(millis));
        }
        metrics.answered("/v1/models", 200);
        metrics.answered("/v1/models", 200);
        let text = metrics.text(&Picture::default());
        for line in [
            "strata_time_to_first_token_seconds_bucket{le=\"0.001\"} 1",
            "strata_time_to_first_token_seconds_bucket{le=\"0.025\"} 2",
            "strata_time_to_first_token_seconds_bucket{le=\"600\"} 3",
            "strata_time_to_first_token_seconds_bucket{le=\"+Inf\"} 4",
            "strata_requests_total{route=\"/v1/models\",status=\"200\"} 2",
            "# TYPE strata_prefix_cache_snapshots_total counter",
        ] {
            assert!(
                text.lines().any(|l| l == line),
                "{line} is missing:\n{text}"
            );
        }
    }
}
