//! The scheduler under random traffic, on a runner that computes nothing but remembers everything.
//!
//! The runner keeps in each page the tokens and positions written to it, and in each slot a hash of all tokens
//! fed to it in order. The next token of a sequence is a hash of what is found there. A page shared and then
//! written, a stale slot or a preemption that forgets a token thus shows as a wrong token, if not before.

use std::collections::{BTreeMap, BTreeSet};

use strata::batch::{Batch, Logits};
use strata::ids::{PageId, SeqId, SlotId, TokenId};
use strata::scheduler::{Chunk, Event, Refused, Scheduler, SchedulerConfig, Step};
use strata::sequence::{Limits, Place, Reason, Sequence, SequenceRequest, Status};

/// Small enough for stop tokens to turn up.
const VOCAB: u64 = 40;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// From `low` to `high`, both included.
    fn range(&mut self, low: usize, high: usize) -> usize {
        low + (self.next() % (high - low + 1) as u64) as usize
    }

    fn percent(&mut self, percent: usize) -> bool {
        self.range(1, 100) <= percent
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> Option<T> {
        (!of.is_empty()).then(|| of[self.range(0, of.len() - 1)])
    }

    fn tokens(&mut self, len: usize) -> Vec<TokenId> {
        (0..len).map(|_| (self.next() % VOCAB) as TokenId).collect()
    }
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn feed(history: u64, token: TokenId) -> u64 {
    mix(history.wrapping_mul(31).wrapping_add(u64::from(token) + 1))
}

fn hash(tokens: &[TokenId]) -> u64 {
    tokens
        .iter()
        .fold(0, |history, &token| feed(history, token))
}

fn next_token(history: u64, seed: u64) -> TokenId {
    (mix(history ^ seed) % VOCAB) as TokenId
}

/// What a sequence must look like, kept apart from the scheduler.
#[derive(Clone)]
struct Expected {
    tokens: Vec<TokenId>,
    /// How many of the tokens were there when the sequence was submitted, adopted or forked.
    given: usize,
    prompt: usize,
    seed: u64,
    limits: Limits,
    cuts: Vec<usize>,
    prompt_logits: bool,
    /// Prompt rows whose logits were seen, or were not to be.
    scored: Vec<bool>,
    ended: Option<Reason>,
}

impl Expected {
    /// Runs the sequence to its end with nobody else around.
    fn alone(&self) -> (Vec<TokenId>, Reason) {
        let mut tokens = self.tokens[..self.given].to_vec();
        while tokens.len() - self.prompt < self.limits.max_tokens {
            tokens.push(next_token(hash(&tokens), self.seed));
            if self.limits.stop.contains(&tokens[tokens.len() - 1]) {
                return (tokens, Reason::Stop);
            }
        }
        (tokens, Reason::Length)
    }
}

/// The device memory: what stands in pages and slots.
struct Memory {
    page_size: usize,
    pages: Vec<Vec<Option<(TokenId, usize)>>>,
    /// Hash and number of the tokens fed.
    slots: Vec<(u64, usize)>,
}

impl Memory {
    fn new(config: &SchedulerConfig) -> Self {
        let page_size = config.page_size as usize;
        Self {
            page_size,
            pages: vec![vec![None; page_size]; config.pages.unwrap_or(0) as usize],
            slots: vec![(0xdead, 99); config.slots.unwrap_or(0) as usize],
        }
    }

    fn copy_slot(&mut self, (from, to): (SlotId, SlotId)) {
        self.slots[to.0 as usize] = self.slots[from.0 as usize];
    }

    /// What the pages hold up to a position, which must all have been written in place.
    fn read(&self, table: &[PageId], end: usize) -> u64 {
        (0..end).fold(0, |history, position| {
            let page = table[position / self.page_size];
            let (token, at) = self.pages[page.0 as usize][position % self.page_size]
                .unwrap_or_else(|| panic!("position {position} of {page:?} was never written"));
            assert_eq!(at, position, "{page:?} holds another position");
            feed(history, token)
        })
    }

    /// Runs a step; the hash of the history of each span.
    fn run(&mut self, batch: &Batch) -> Vec<u64> {
        for &(from, to) in &batch.copies {
            self.pages[to.0 as usize] = self.pages[from.0 as usize].clone();
        }
        for slot in &batch.clear {
            self.slots[slot.0 as usize] = (0, 0);
        }
        for span in &batch.spans {
            let tokens = batch.tokens_of(span);
            if !self.pages.is_empty() {
                for (position, &token) in (span.position..).zip(tokens) {
                    let page = batch.pages_of(span)[position / self.page_size];
                    self.pages[page.0 as usize][position % self.page_size] =
                        Some((token, position));
                }
            }
            if let Some(slot) = span.slot {
                let (history, fed) = &mut self.slots[slot.0 as usize];
                assert_eq!(
                    *fed, span.position,
                    "{slot:?} has seen other tokens, {span:?}"
                );
                *history = tokens
                    .iter()
                    .fold(*history, |history, &token| feed(history, token));
                *fed += span.len;
            }
        }
        let histories = batch.spans.iter().map(|span| {
            let paged = (!self.pages.is_empty())
                .then(|| self.read(batch.pages_of(span), span.position + span.len));
            let slotted = span.slot.map(|slot| self.slots[slot.0 as usize].0);
            if let (Some(paged), Some(slotted)) = (paged, slotted) {
                assert_eq!(paged, slotted, "pages and slot of {:?} differ", span.seq);
            }
            paged.or(slotted).unwrap_or(0)
        });
        histories.collect()
    }
}

/// What was seen at all: traffic that never preempts proves nothing about preemption.
#[derive(Debug, Default)]
struct Seen {
    events: u64,
    steps: u64,
    finished: u64,
    preemptions: u64,
    page_copies: u64,
    slot_copies: u64,
    adopted: u64,
    short: u64,
    stalled: u64,
    refused: u64,
    failed: u64,
    right: u64,
    wrong: u64,
}

struct World {
    random: Random,
    scheduler: Scheduler,
    memory: Memory,
    batch: Batch,
    expected: BTreeMap<SeqId, Expected>,
    /// Taken from the scheduler with their state.
    saved: Vec<(Sequence, Expected)>,
    in_flight: bool,
    /// The oldest running sequence of the last step, if it had no row in it.
    passed_over: Option<SeqId>,
    seen: Seen,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let kind = random.range(0, 3);
        let token_budget = if random.percent(20) {
            random.range(1, 4)
        } else {
            random.range(4, 40)
        };
        let config = SchedulerConfig {
            reach: None,
            page_size: [1, 2, 4, 16][random.range(0, 3)],
            pages: (kind != 0).then(|| random.range(3, 24) as u32),
            slots: (kind != 1).then(|| random.range(1, 6) as u32),
            token_budget,
            max_sequences: random.range(1, 8),
            chunk: match random.percent(50) {
                true => Chunk::AtMost(random.range(1, 40)),
                false => Chunk::Every(random.range(1, token_budget)),
            },
            context: random.range(10, 120),
        };
        Self {
            random,
            memory: Memory::new(&config),
            scheduler: Scheduler::new(config).expect("the sizes are sound"),
            batch: Batch::new(),
            expected: BTreeMap::new(),
            saved: Vec::new(),
            in_flight: false,
            passed_over: None,
            seen: Seen::default(),
        }
    }

    fn event(&mut self) {
        self.seen.events += 1;
        match self.random.range(0, 99) {
            0..=19 => self.submit(),
            20..=23 => self.fork(),
            24 => self.end_any(),
            25..=26 => self.remove_any(),
            27..=28 => self.take_any(),
            29..=31 => self.adopt_or_release(),
            _ => {
                self.step();
            }
        }
        self.check();
    }

    fn request(&mut self, prompt: Vec<TokenId>) -> SequenceRequest {
        let random = &mut self.random;
        let stop = if random.percent(20) {
            random.tokens(1)
        } else {
            Vec::new()
        };
        let mut cuts = Vec::new();
        while random.percent(25) {
            cuts.push(random.range(0, prompt.len() + 3));
        }
        cuts.sort_unstable();
        SequenceRequest {
            limits: Limits {
                max_tokens: random.range(0, 30),
                stop,
            },
            prompt_logits: random.percent(20),
            cuts,
            prompt,
        }
    }

    fn submit(&mut self) {
        let context = self.scheduler.config().context;
        let long = self.random.percent(20);
        let len = self.random.range(0, if long { context + 5 } else { 12 });
        let prompt = self.random.tokens(len);
        let request = self.request(prompt);
        let (max_tokens, total) = (request.limits.max_tokens, len + request.limits.max_tokens);
        let wanted = self.scheduler.pages().map_or(0, |pool| {
            pool.pages_for(total - usize::from(max_tokens > 0))
        });
        let pages = self.scheduler.pages().map_or(0, |pool| pool.total());
        let refused = match () {
            () if len == 0 => Some(Refused::EmptyPrompt),
            () if total > context => Some(Refused::TooLong {
                prompt: len,
                max_tokens,
                context,
            }),
            () if wanted > pages => Some(Refused::TooManyPages {
                prompt: len,
                max_tokens,
                wanted,
                pages,
            }),
            () => None,
        };
        let seed = self.random.next();
        match self.scheduler.submit(request.clone()) {
            Ok(id) => {
                assert_eq!(refused, None);
                self.expect(id, request, seed, 0);
            }
            Err(found) => {
                assert_eq!(refused, Some(found));
                self.seen.refused += 1;
            }
        }
    }

    fn expect(&mut self, id: SeqId, request: SequenceRequest, seed: u64, computed: usize) {
        let given = request.prompt.len();
        let fresh = self.expected.insert(
            id,
            Expected {
                given,
                prompt: given,
                seed,
                limits: request.limits,
                cuts: request.cuts,
                prompt_logits: request.prompt_logits,
                scored: (0..given).map(|row| row < computed).collect(),
                tokens: request.prompt,
                ended: None,
            },
        );
        assert!(fresh.is_none(), "{id:?} was there before");
    }

    fn any(&mut self) -> Option<SeqId> {
        let ids: Vec<_> = self.expected.keys().copied().collect();
        self.random.pick(&ids)
    }

    fn fork(&mut self) {
        let Some(id) = self.any() else { return };
        let Ok(fork) = self.scheduler.fork(id) else {
            assert!(self.expected[&id].ended.is_some());
            return;
        };
        if let Some(copy) = fork.copy {
            self.memory.copy_slot(copy);
            self.seen.slot_copies += 1;
        }
        let mut child = self.expected[&id].clone();
        child.seed = self.random.next();
        child.given = child.tokens.len();
        assert!(self.expected.insert(fork.id, child).is_none());
    }

    fn end_any(&mut self) {
        let Some(id) = self.any() else { return };
        let fresh = self.expected[&id].ended.is_none();
        let (ended, reason) = match self.random.percent(50) {
            true => (self.scheduler.finish(id, Reason::Stop), Reason::Stop),
            false => (self.scheduler.cancel(id), Reason::Cancelled),
        };
        assert_eq!(ended, fresh);
        if fresh {
            // Not by itself: only the tokens so far are checked.
            let expected = self.expected.get_mut(&id).expect("picked above");
            expected.ended = Some(reason);
        }
    }

    fn remove_any(&mut self) {
        let Some(id) = self.any() else { return };
        assert!(self.scheduler.remove(id));
        assert!(!self.scheduler.remove(id));
        self.expected.remove(&id);
    }

    fn take_any(&mut self) {
        let Some(id) = self.any() else { return };
        let sequence = self.scheduler.take(id).expect("it is there");
        let expected = self.expected.remove(&id).expect("picked above");
        assert_eq!(sequence.tokens, expected.tokens);
        self.saved.push((sequence, expected));
    }

    fn adopt_or_release(&mut self) {
        if self.saved.is_empty() {
            return;
        }
        let i = self.random.range(0, self.saved.len() - 1);
        if self.saved[i].0.computed == 0 || self.random.percent(20) {
            return self.release(i);
        }
        let (sequence, expected) = &self.saved[i];
        let (mut prompt, seed) = (sequence.tokens.clone(), expected.seed);
        let (computed, pages, slot) = (sequence.computed, sequence.pages.clone(), sequence.slot);
        let more = self.random.range(0, 9);
        prompt.extend(self.random.tokens(more));
        let request = self.request(prompt);
        match self
            .scheduler
            .adopt(request.clone(), computed, &pages, slot)
        {
            Ok(id) => {
                self.expect(id, request, seed, computed);
                self.saved.swap_remove(i);
                self.seen.adopted += 1;
            }
            Err(_) => self.release(i),
        }
    }

    fn release(&mut self, i: usize) {
        let (sequence, _) = self.saved.swap_remove(i);
        for page in sequence.pages {
            self.scheduler
                .pages_mut()
                .expect("it had pages")
                .release(page);
        }
        if let Some(slot) = sequence.slot {
            self.scheduler
                .slots_mut()
                .expect("it had a slot")
                .release(slot);
        }
    }

    /// One step; false if there is nothing to do.
    fn step(&mut self) -> bool {
        let before: BTreeSet<_> = self.scheduler.running().collect();
        self.guess();
        match self.scheduler.next(&mut self.batch) {
            Step::Idle => {
                assert!(self.scheduler.running().len() + self.scheduler.waiting().len() == 0);
                return false;
            }
            Step::Short(wanted) => {
                let free = |total: Option<usize>| total.unwrap_or(0);
                let pages = free(self.scheduler.pages().map(|pool| pool.free()));
                let slots = free(self.scheduler.slots().map(|pool| pool.free()));
                assert!(wanted.pages > pages || wanted.slots > slots, "{wanted:?}");
                let holder = self
                    .saved
                    .iter()
                    .position(|(sequence, _)| sequence.holds_state());
                self.release(holder.expect("short of nothing"));
                self.seen.short += 1;
                return true;
            }
            Step::Run => {}
        }
        self.in_flight = true;
        self.seen.steps += 1;
        self.seen.page_copies += self.batch.copies.len() as u64;
        self.check_batch(&before);
        self.check();
        let kept = self.memory.slots.clone();
        let histories = self.memory.run(&self.batch);
        for _ in 0..2 {
            match self.random.range(0, 39) {
                0 => self.end_any(),
                1 => self.remove_any(),
                2 => self.submit(),
                _ => continue,
            }
            self.check();
        }
        self.in_flight = false;
        let mut events = Vec::new();
        if self.random.percent(1) {
            self.seen.failed += 1;
            self.scheduler.failed(&self.batch, &mut events);
            for event in events {
                let Event::Finished {
                    id,
                    reason: Reason::Failed,
                } = event
                else {
                    panic!("{event:?} after a failure");
                };
                self.expected.get_mut(&id).expect("it is known").ended = Some(Reason::Failed);
            }
            return true;
        }
        let mut sampled = Vec::new();
        for (span, history) in self.batch.spans.iter().zip(histories) {
            let returns = |memory: &mut Memory, right| {
                if let Some(slot) = self.scheduler.returns(span, right) {
                    memory.slots[slot.0 as usize] = kept[slot.0 as usize];
                }
            };
            let Some(expected) = self.expected.get_mut(&span.seq) else {
                continue;
            };
            let end = span.position + span.len - span.guessed;
            let guesses = &self.batch.tokens_of(span)[span.len - span.guessed..];
            let mut fed = expected.tokens[..end].to_vec();
            fed.extend_from_slice(guesses);
            assert_eq!(history, hash(&fed), "{span:?}");
            if expected.ended.is_some() {
                // Its slot may be another's by now only if its state was taken.
                if self
                    .scheduler
                    .sequence(span.seq)
                    .is_some_and(Sequence::holds_state)
                {
                    returns(&mut self.memory, 0);
                }
                continue;
            }
            if span.logits == Logits::All {
                (span.position..end.min(expected.prompt))
                    .for_each(|row| expected.scored[row] = true);
            }
            if span.sample {
                assert_eq!(
                    end,
                    expected.tokens.len(),
                    "sampled in the middle, {span:?}"
                );
                let mut right = 0;
                loop {
                    let token = next_token(hash(&fed[..end + right]), expected.seed);
                    sampled.push((span.seq, token));
                    let stops = expected.limits.stop.contains(&token);
                    if guesses.get(right) != Some(&token) || stops {
                        break;
                    }
                    right += 1;
                }
                self.seen.right += right as u64;
                self.seen.wrong += (span.guessed - right) as u64;
                returns(&mut self.memory, right);
            }
        }
        self.scheduler.done(&self.batch, &sampled, &mut events);
        for event in events {
            self.deliver(event);
        }
        true
    }

    /// Guesses of which some are right, for some that run.
    fn guess(&mut self) {
        let running: Vec<_> = self.scheduler.running().collect();
        for id in running {
            let expected = &self.expected[&id];
            let most = self.scheduler.guesses(id);
            let count = if self.random.percent(50) {
                self.random.range(0, 9)
            } else {
                0
            };
            let wrong_at = self.random.range(0, 12);
            let mut tokens = expected.tokens.clone();
            for i in 0..count {
                let token = next_token(hash(&tokens), expected.seed);
                tokens.push(if i == wrong_at {
                    (token + 1) % VOCAB as TokenId
                } else {
                    token
                });
            }
            self.scheduler.guess(id, &tokens[expected.tokens.len()..]);
            let sequence = self.scheduler.sequence(id).expect("it runs");
            assert!(sequence.generated().len() + most < sequence.limits.max_tokens.max(1));
        }
    }

    fn deliver(&mut self, event: Event) {
        match event {
            Event::Token { id, token } => {
                self.expected
                    .get_mut(&id)
                    .expect("it is known")
                    .tokens
                    .push(token);
            }
            Event::Finished { id, reason } => {
                let expected = self.expected.get_mut(&id).expect("it is known");
                assert_eq!(expected.ended, None);
                assert_eq!(
                    (expected.tokens.clone(), reason),
                    expected.alone(),
                    "{id:?}"
                );
                if expected.prompt_logits {
                    assert!(
                        expected.scored.iter().all(|&seen| seen),
                        "{id:?} lacks prompt logits"
                    );
                }
                expected.ended = Some(reason);
                self.seen.finished += 1;
                if self.random.percent(60) {
                    assert!(self.scheduler.remove(id));
                    self.expected.remove(&id);
                }
            }
        }
    }

    fn place(&self, id: SeqId) -> Place {
        self.scheduler.sequence(id).expect("it is there").place()
    }

    /// What must hold for every batch.
    fn check_batch(&mut self, before: &BTreeSet<SeqId>) {
        let Self {
            scheduler,
            batch,
            expected,
            ..
        } = self;
        let config = scheduler.config();
        assert!(
            (1..=config.token_budget).contains(&batch.rows()),
            "{} rows",
            batch.rows()
        );
        let ids: BTreeSet<_> = batch.spans.iter().map(|span| span.seq).collect();
        assert_eq!(ids.len(), batch.spans.len(), "a sequence twice in a batch");
        let mut start = 0;
        for (i, span) in batch.spans.iter().enumerate() {
            let sequence = scheduler.sequence(span.seq).expect("it is there");
            let own = span.position + span.len - span.guessed;
            let end = span.position + span.len;
            assert_eq!((span.start, span.position), (start, sequence.computed));
            assert!(span.len > 0);
            start += span.len;
            assert_eq!(sequence.status, Status::Running);
            assert_eq!(
                i < batch.decodes,
                sequence.is_decoding() && span.len == 1,
                "decode rows come first"
            );
            assert_eq!(
                batch.tokens_of(span)[..own - span.position],
                expected[&span.seq].tokens[span.position..own]
            );
            assert!(span.guessed == 0 || own == sequence.tokens.len());
            assert_eq!(
                (batch.pages_of(span), span.slot),
                (&sequence.pages[..], sequence.slot)
            );
            assert_eq!(span.fresh, span.position == 0);
            assert_eq!(
                span.fresh,
                span.slot
                    .map_or(span.fresh, |slot| batch.clear.contains(&slot))
            );
            let sample = own == sequence.tokens.len() && sequence.limits.max_tokens > 0;
            assert_eq!(
                (span.sample, span.logits == Logits::None && sample),
                (sample, false)
            );
            if let Some(pool) = scheduler.pages() {
                assert_eq!(
                    sequence.pages.len(),
                    pool.pages_for(end),
                    "exactly the pages it needs"
                );
                for page in &sequence.pages[span.position / pool.page_size()..] {
                    assert_eq!(
                        pool.references(*page),
                        1,
                        "{page:?} is shared and will be written"
                    );
                }
            }
            let cuts = &expected[&span.seq].cuts;
            assert!(
                !cuts.iter().any(|cut| span.position < *cut && *cut < end),
                "no stop at a cut"
            );
            match config.chunk {
                Chunk::AtMost(rows) => assert!(span.len <= rows),
                Chunk::Every(rows) => {
                    assert_eq!(
                        span.position / rows,
                        (end - 1) / rows,
                        "crosses a multiple of {rows}"
                    );
                    assert!(
                        end % rows == 0 || own == sequence.tokens.len() || cuts.contains(&end),
                        "cut at {end}"
                    );
                }
            }
        }
        for id in scheduler.running().filter(|id| !ids.contains(id)) {
            let sequence = scheduler.sequence(id).expect("it is there");
            if sequence.is_decoding() {
                let pool = scheduler.pages().expect("only pages can be lacking");
                let at_border = sequence.computed % pool.page_size() == 0;
                assert!(at_border || pool.is_shared(sequence.pages[sequence.pages.len() - 1]));
                self.seen.stalled += 1;
            }
        }

        // Nobody enters before an older one, and the oldest waits for its rows one step at most.
        let entered = self
            .scheduler
            .running()
            .filter(|id| !before.contains(id))
            .map(|id| self.place(id))
            .max();
        let first = self.scheduler.waiting().next().map(|id| self.place(id));
        if let (Some(entered), Some(first)) = (entered, first) {
            assert!(entered < first, "{entered:?} entered before {first:?}");
        }
        let oldest = self
            .scheduler
            .running()
            .next()
            .filter(|id| !ids.contains(id));
        let outside = self
            .saved
            .iter()
            .any(|(sequence, _)| sequence.holds_state());
        assert!(
            outside || oldest.is_none() || oldest != self.passed_over,
            "{oldest:?} starves"
        );
        self.passed_over = oldest;
    }

    /// What must hold after every event.
    fn check(&self) {
        let scheduler = &self.scheduler;
        let holders = || {
            scheduler
                .sequences()
                .chain(self.saved.iter().map(|(sequence, _)| sequence))
        };
        if let Some(pool) = scheduler.pages() {
            let mut users = vec![0; pool.total()];
            holders()
                .flat_map(|holder| &holder.pages)
                .for_each(|page| users[page.0 as usize] += 1);
            for (page, &users) in users.iter().enumerate() {
                assert_eq!(
                    pool.references(PageId(page as u32)),
                    users,
                    "users of page {page}"
                );
            }
            assert_eq!(
                pool.used(),
                users.iter().filter(|&&users| users > 0).count()
            );
            assert_eq!(pool.free() + pool.used(), pool.total());
        }
        if let Some(pool) = scheduler.slots() {
            let mut owners = vec![0; pool.total()];
            holders()
                .flat_map(|holder| holder.slot)
                .for_each(|slot| owners[slot.0 as usize] += 1);
            for (slot, &owners) in owners.iter().enumerate() {
                assert_eq!(
                    u32::from(pool.is_owned(SlotId(slot as u32))),
                    owners,
                    "owners of slot {slot}"
                );
            }
            assert_eq!(pool.free() + pool.used(), pool.total());
        }
        let ids: Vec<_> = scheduler.sequences().map(|sequence| sequence.id).collect();
        assert!(
            ids.iter().eq(self.expected.keys()),
            "sequences lost or left over"
        );
        let running: Vec<_> = scheduler.running().collect();
        let waiting: Vec<_> = scheduler.waiting().collect();
        assert!(running.len() <= scheduler.running_limit());
        assert!(running.is_sorted_by_key(|&id| self.place(id)));
        assert!(waiting.is_sorted_by_key(|&id| self.place(id)));
        for sequence in scheduler.sequences() {
            let (id, expected) = (sequence.id, &self.expected[&sequence.id]);
            assert_eq!(sequence.tokens, expected.tokens, "{id:?}");
            let queues = (running.contains(&id), waiting.contains(&id));
            match sequence.status {
                Status::Running => assert_eq!(queues, (true, false)),
                Status::Waiting | Status::Preempted => assert_eq!(queues, (false, true)),
                Status::Finished(reason) => {
                    assert_eq!((queues, Some(reason)), ((false, false), expected.ended));
                }
            }
            assert_eq!(expected.ended.is_some(), sequence.is_finished());
            assert!(sequence.is_finished() || sequence.computed < sequence.tokens.len());
            if sequence.status == Status::Preempted {
                assert!(!sequence.holds_state());
            }
            if scheduler.slots().is_some() && (sequence.computed > 0 || queues.0) {
                assert!(sequence.slot.is_some(), "{id:?} has no slot");
            }
            if let Some(pool) = scheduler.pages() {
                let (pages, needed) = (sequence.pages.len(), pool.pages_for(sequence.computed));
                assert!(
                    pages == needed || self.in_flight && pages > needed,
                    "{id:?}: {pages} pages"
                );
            }
        }
    }

    /// Lets everything end, and looks for leaks.
    fn drain(mut self) -> Seen {
        while !self.saved.is_empty() {
            self.release(0);
        }
        // The oldest advances in every second step at least, and what it has computed it keeps.
        let work: usize = self
            .scheduler
            .sequences()
            .map(|s| s.tokens.len() + s.limits.max_tokens)
            .sum();
        let mut steps = 0;
        while self.step() {
            self.check();
            steps += 1;
            assert!(steps <= 2 * work + 1000, "{steps} steps for {work} tokens");
        }
        assert!(self.scheduler.sequences().all(Sequence::is_finished));
        for id in self
            .scheduler
            .sequences()
            .map(|sequence| sequence.id)
            .collect::<Vec<_>>()
        {
            assert!(self.scheduler.remove(id));
        }
        assert_eq!(
            self.scheduler.pages().map_or(0, |pool| pool.used()),
            0,
            "pages leak"
        );
        assert_eq!(
            self.scheduler.slots().map_or(0, |pool| pool.used()),
            0,
            "slots leak"
        );
        self.seen.preemptions = self.scheduler.preemptions();
        self.seen
    }
}

#[test]
fn random_traffic_leaves_every_sequence_as_if_alone() {
    let mut all = Seen::default();
    for seed in 0..1000 {
        let seen = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            for _ in 0..300 {
                world.event();
            }
            world.drain()
        })
        .unwrap_or_else(|cause| {
            eprintln!("seed {seed}");
            std::panic::resume_unwind(cause)
        });
        all.events += seen.events;
        all.steps += seen.steps;
        all.finished += seen.finished;
        all.preemptions += seen.preemptions;
        all.page_copies += seen.page_copies;
        all.slot_copies += seen.slot_copies;
        all.adopted += seen.adopted;
        all.short += seen.short;
        all.stalled += seen.stalled;
        all.refused += seen.refused;
        all.failed += seen.failed;
        all.right += seen.right;
        all.wrong += seen.wrong;
    }
    println!("{all:?}");
    let Seen {
        events,
        steps,
        finished,
        preemptions,
        page_copies,
        slot_copies,
        ..
    } = all;
    let Seen {
        adopted,
        short,
        stalled,
        refused,
        failed,
        right,
        wrong,
        ..
    } = all;
    for (count, name) in [
        (events, "events"),
        (steps, "steps"),
        (finished, "finished"),
        (preemptions, "preemptions"),
        (page_copies, "page copies"),
        (slot_copies, "slot copies"),
        (adopted, "adopted"),
        (short, "short"),
        (stalled, "stalled"),
        (refused, "refused"),
        (failed, "failed"),
        (right, "right guesses"),
        (wrong, "wrong guesses"),
    ] {
        assert!(
            count >= 50,
            "only {count} {name}: the traffic does not test them"
        );
    }
}
