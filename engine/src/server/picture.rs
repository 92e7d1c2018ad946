//! What the engine is doing now: drawn by its thread, looked at by others.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};

use super::job::Cached;
use crate::prefix_cache::CacheUse;
use crate::session::{Engine, Used};

/// Most kept states that are shown; there may be thousands.
const MOST_STATES: usize = 256;
/// Decisions of the cache that are remembered.
const MOST_DECISIONS: usize = 32;
/// Over how long rates are taken.
const WINDOW: Duration = Duration::from_secs(5);

/// What the engine is doing.
#[derive(Debug, Clone, Default)]
pub struct Picture {
    pages: Used,
    page_tokens: usize,
    slots: Used,
    cache: Option<CacheUse>,
    states: Vec<Value>,
    running: Vec<Shown>,
    waiting: usize,
    preemptions: u64,
    buffer_bytes: usize,
    prompt_rate: f64,
    generated_rate: f64,
    decisions: VecDeque<Decision>,
}

/// A sequence.
#[derive(Debug, Clone, Serialize)]
pub struct Shown {
    /// The request.
    pub request: String,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens that are computed, prompt and generated.
    pub computed_tokens: usize,
    /// Tokens that were generated.
    pub generated_tokens: usize,
    /// `reading`, `writing` or `waiting`.
    pub doing: &'static str,
}

/// What the cache gave to a request.
#[derive(Debug, Clone, Serialize)]
pub struct Decision {
    /// The request.
    pub request: String,
    /// Seconds since 1970.
    pub at: u64,
    /// What was known.
    #[serde(flatten)]
    pub cached: Cached,
}

impl Picture {
    /// Draws what an engine holds.
    pub fn draw(
        &mut self,
        engine: &Engine,
        running: Vec<Shown>,
        waiting: usize,
        rates: (f64, f64),
    ) {
        self.pages = engine.pages_used();
        self.page_tokens = engine.config().page_size;
        self.slots = engine.slots_used();
        self.cache = engine.cache_use();
        let kept = engine.kept_states();
        let shown = kept.iter().take(MOST_STATES).map(|kept| {
            json!({
                "tokens": kept.tokens, "in_memory": kept.in_memory, "in_file": kept.in_file,
                "marked": kept.marked,
            })
        });
        self.states = shown.collect();
        self.running = running;
        self.waiting = waiting;
        self.preemptions = engine.preemptions();
        self.buffer_bytes = engine.buffer_bytes();
        (self.prompt_rate, self.generated_rate) = rates;
    }

    /// Remembers what the cache gave to a request.
    pub fn decided(&mut self, request: &str, at: u64, cached: Cached) {
        if self.decisions.len() == MOST_DECISIONS {
            self.decisions.pop_back();
        }
        self.decisions.push_front(Decision {
            request: request.into(),
            at,
            cached,
        });
    }

    /// For the page; newest decisions first.
    pub fn json(&self) -> Value {
        let used = |used: &Used| {
            json!({
                "used": used.used, "total": used.total, "bytes_each": used.bytes,
                "bytes_used": used.used * used.bytes,
            })
        };
        let mut pages = used(&self.pages);
        pages["tokens_each"] = self.page_tokens.into();
        let cache = self.cache.as_ref().map(|cache| {
            json!({
                "states": cache.states, "in_files": cache.in_files, "bytes": cache.bytes,
                "disk_bytes": cache.disk_bytes, "hits": cache.hits, "misses": cache.misses,
                "waited": cache.waited, "reused_tokens": cache.reused_tokens, "taken": cache.taken, "evicted": cache.evicted,
                "spilled": cache.spilled, "trouble": cache.trouble,
            })
        });
        json!({
            "pages": pages,
            "slots": used(&self.slots),
            "snapshots": self.states,
            "cache": cache,
            "running": self.running,
            "waiting": self.waiting,
            "preemptions": self.preemptions,
            "buffer_bytes": self.buffer_bytes,
            "tokens_per_second": {"prompt": self.prompt_rate, "generated": self.generated_rate},
            "decisions": self.decisions,
        })
    }

    /// Tells name, meaning and value of each gauge.
    pub fn gauges(&self, tell: &mut dyn FnMut(&str, &str, f64)) {
        let cache = self.cache.clone().unwrap_or_default();
        let gauges = [
            (
                "strata_running",
                "Sequences that run.",
                self.running.iter().filter(|r| r.doing != "waiting").count() as f64,
            ),
            (
                "strata_queue_depth",
                "Sequences that wait for their turn.",
                self.waiting as f64,
            ),
            (
                "strata_pages_used",
                "Pages of keys and values in use.",
                self.pages.used as f64,
            ),
            (
                "strata_pages_total",
                "Pages of keys and values.",
                self.pages.total as f64,
            ),
            (
                "strata_page_bytes",
                "Bytes of a page.",
                self.pages.bytes as f64,
            ),
            (
                "strata_slots_used",
                "Slots of fixed-size state in use.",
                self.slots.used as f64,
            ),
            (
                "strata_slots_total",
                "Slots of fixed-size state.",
                self.slots.total as f64,
            ),
            (
                "strata_slot_bytes",
                "Bytes of a slot.",
                self.slots.bytes as f64,
            ),
            (
                "strata_snapshots",
                "States kept in memory.",
                cache.states as f64,
            ),
            (
                "strata_snapshots_in_files",
                "States kept in files.",
                cache.in_files as f64,
            ),
            (
                "strata_prefix_cache_bytes",
                "Bytes of kept states: slots, and pages that any of them uses.",
                cache.bytes as f64,
            ),
            (
                "strata_prefix_cache_disk_bytes",
                "Bytes of states that were written to make room.",
                cache.disk_bytes as f64,
            ),
            (
                "strata_buffer_bytes",
                "Bytes of activations and scratch.",
                self.buffer_bytes as f64,
            ),
            (
                "strata_prompt_tokens_per_second",
                "Prompt tokens computed, over the last seconds.",
                self.prompt_rate,
            ),
            (
                "strata_generated_tokens_per_second",
                "Tokens generated, over the last seconds.",
                self.generated_rate,
            ),
        ];
        for (name, help, value) in gauges {
            tell(name, help, value);
        }
    }
}

/// Tokens a second, over the last seconds.
#[derive(Debug, Default)]
pub struct Rates(VecDeque<(Instant, usize, usize)>);

impl Rates {
    /// A step has computed so many rows of prompts and generated so many tokens.
    pub fn add(&mut self, prompt: usize, generated: usize) {
        self.0.push_back((Instant::now(), prompt, generated));
    }

    /// Prompt rows and generated tokens a second.
    pub fn now(&mut self) -> (f64, f64) {
        while self
            .0
            .front()
            .is_some_and(|(at, _, _)| at.elapsed() > WINDOW)
        {
            self.0.pop_front();
        }
        let sum = self
            .0
            .iter()
            .fold((0, 0), |(p, g), (_, prompt, generated)| {
                (p + prompt, g + generated)
            });
        let seconds = WINDOW.as_secs_f64();
        (sum.0 as f64 / seconds, sum.1 as f64 / seconds)
    }
}
