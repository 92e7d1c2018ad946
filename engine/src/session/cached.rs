//! The engine with a prefix cache: what prompts go on from, which states are kept, and what makes room.

use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3;

use super::{Engine, Error, State};
use crate::ids::{PageId, SeqId, TokenId};
use crate::prefix_cache::{Cache, CacheUse, NodeId, Policy, Reuse, Sizes};
use crate::state_file::{self, Content, Fingerprint, Slots, StateFile};

impl Engine {
    /// From here on states are kept as `policy` says, and prompts go on from those they begin with. `fingerprint`
    /// is that of the model, for state files.
    pub fn keep_states(&mut self, policy: Policy, fingerprint: Fingerprint) {
        let graph = &self.network().graph;
        let page_bytes = self.config.page_bytes(graph);
        let sizes = Sizes {
            slot_bytes: graph.slot_bytes() as u64,
            page_bytes: page_bytes as u64,
            page_size: self.config.page_size,
        };
        self.forget_states();
        // States share pages, and those of a beginning may be needed again.
        self.scheduler.keep_pages();
        self.cache = Some(Cache::new(policy, fingerprint, &sizes));
    }

    /// Keeps no states any more. Files that were spilled stay where they are.
    pub fn forget_states(&mut self) {
        if let Some(cache) = self.cache.take() {
            for id in cache.awaits.keys() {
                self.scheduler.hold(*id, false);
            }
            let held = cache
                .tree
                .loads()
                .filter_map(|(_, held)| held.memory.as_ref());
            let pages: Vec<PageId> = held.flat_map(|state| state.pages.iter().copied()).collect();
            self.release(&pages);
        }
    }

    /// Makes the states of a file known. It must not be shortened while the engine lives.
    pub fn attach(&mut self, file: &Arc<StateFile>) -> Result<(), state_file::Error> {
        let Some(cache) = &self.cache else {
            return Ok(());
        };
        file.fits(self, &cache.fingerprint.clone())?;
        if let Some(cache) = &mut self.cache {
            cache.attach(file);
        }
        Ok(())
    }

    /// Forgets the states of a file. What of them is in memory stays.
    pub fn detach(&mut self, path: &std::path::Path) {
        if let Some(cache) = &mut self.cache {
            cache.forget_file(path);
        }
    }

    /// What of a sequence's prompt was known, from its first step until it is removed.
    pub fn reuse(&self, id: SeqId) -> Option<&Reuse> {
        self.cache.as_ref()?.reuses.get(&id)
    }

    /// What the cache holds and has done.
    pub fn cache_use(&self) -> Option<CacheUse> {
        self.cache.as_ref().map(Cache::told)
    }

    /// What does not hold of the cache that should; for tests.
    pub fn cache_faults(&self) -> Vec<String> {
        let Some(cache) = &self.cache else {
            return Vec::new();
        };
        let mut faults = cache.faults();
        if let Some(pool) = self.scheduler.pages() {
            let mut users = vec![0; pool.total()];
            let sequences = self.scheduler.sequences().flat_map(|s| &s.pages);
            let kept = self.snapshots.values().flat_map(|s| &s.state.pages);
            let live = sequences.chain(kept).filter(|p| p.is_there());
            live.for_each(|p| users[p.0 as usize] += 1);
            for (i, users) in users.iter().enumerate() {
                let page = PageId(i as u32);
                let (found, expected) = (pool.references(page), users + cache.users(page));
                if found != expected {
                    faults.push(format!("{page:?} has {found} users, expected {expected}"));
                }
            }
        }
        // One may be beyond the budget: see `keep_state`.
        if cache.is_over() && cache.told().states > 1 {
            faults.push(format!("{} bytes are kept", cache.bytes()));
        }
        faults
    }

    /// Lets sequences of the queue in, each with the state that is known of its beginning.
    pub(super) fn admit_with_states(&mut self) {
        if self.cache.is_none() {
            return;
        }
        self.end_waits();
        while let Some(id) = self.scheduler.next_in_line() {
            let sequence = self.scheduler.sequence(id);
            if sequence.is_some_and(|s| !s.holds_state()) {
                if self.waits_for_reader(id) {
                    continue;
                }
                self.resume(id);
            }
            self.make_room();
            if !self.scheduler.admit_first() {
                break;
            }
        }
        self.make_room();
    }

    /// Gives up states until the pages that the scheduler could use are free.
    fn make_room(&mut self) {
        let wanted = self.scheduler.wanted().pages;
        self.free_pages(wanted);
    }

    /// Gives up states until so many pages are free, if there are such.
    pub(super) fn free_pages(&mut self, wanted: usize) {
        while let (Some(pool), Some(cache)) = (self.scheduler.pages(), &self.cache) {
            if pool.free() >= wanted {
                return;
            }
            let Some(node) = cache.victim(Some(&|page| pool.references(page) == 1), None) else {
                return;
            };
            self.evict(node);
        }
    }

    /// Gives one state's pages up, if any would be free then.
    pub(super) fn give_way(&mut self) -> bool {
        let free = |engine: &Engine| engine.scheduler.pages().map_or(0, |pool| pool.free());
        let before = free(self);
        self.free_pages(before + 1);
        free(self) > before
    }

    /// Finds the state that a queued sequence can go on from, gives it to it, and says where states are to be kept.
    fn resume(&mut self, id: SeqId) {
        let prefix = self.prefix().len();
        loop {
            let (Some(cache), Some(sequence)) = (&mut self.cache, self.scheduler.sequence(id))
            else {
                return;
            };
            // Rows that are not computed have no logits to give.
            let scores = sequence.prompt_logits;
            let (mut reuse, found) = cache.find(&sequence.tokens);
            let found = found.filter(|f| !scores && f.tokens > prefix);
            let mut resumed = 0;
            if let Some(found) = found {
                let in_file =
                    |c: &Cache| c.tree.load(found.node).is_some_and(|h| h.memory.is_none());
                let from_file =
                    in_file(cache) || cache.reuses.get(&id).is_some_and(|r| r.from_file);
                if in_file(cache) {
                    // Read, it is in memory, and found again; if it cannot be read, another is.
                    let room = self.read_in(found.node);
                    self.note(id, |reuse| reuse.from_file = true);
                    if room {
                        continue;
                    }
                } else {
                    match self.seed(id, found.node, found.tokens) {
                        Ok(true) => (resumed, reuse.from_file) = (found.tokens, from_file),
                        Ok(false) => {}
                        Err(error) => self.trouble(error.to_string()),
                    }
                }
            }
            reuse.resumed = resumed;
            self.plan_cuts(id, &reuse);
            let Some(cache) = &mut self.cache else { return };
            for count in [&mut reuse.prompt, &mut reuse.matched, &mut reuse.resumed] {
                *count = count.saturating_sub(prefix);
            }
            let first = cache.reuses.get(&id).is_none_or(|r| r.prompt == 0);
            if first && resumed > 0 {
                cache.told.hits += 1;
                cache.told.reused_tokens += reuse.resumed as u64;
            } else if first {
                cache.told.misses += 1;
            }
            // Later, its state having been taken, it may go on from what it left here itself.
            if first {
                cache.reuses.insert(id, reuse);
            }
            return;
        }
    }

    fn note(&mut self, id: SeqId, change: impl FnOnce(&mut Reuse)) {
        if let Some(cache) = &mut self.cache {
            change(cache.reuses.entry(id).or_default());
        }
    }

    fn trouble(&mut self, what: String) {
        if let Some(cache) = &mut self.cache {
            cache.told.trouble = Some(what);
        }
    }

    /// Reads a state from its file into memory. A file that cannot be read is forgotten. False if there was no room.
    fn read_in(&mut self, node: NodeId) -> bool {
        let Some(cache) = &mut self.cache else {
            return false;
        };
        let held = cache.tree.load(node).and_then(|held| held.file.clone());
        let (file, index) = held.expect("a state is in memory or in a file");
        let tokens = cache.tree.tokens(node);
        cache.touch(&file, false);
        let read = file.restore(self, index);
        let Some(cache) = &mut self.cache else {
            return false;
        };
        match read {
            Ok(state) => {
                if let Err(state) = cache.hold(&tokens, state, false) {
                    self.release(&state.pages);
                }
                true
            }
            Err(state_file::Error::Engine(Error::NoPages { .. })) => false,
            Err(error) => {
                cache.forget_file(file.path());
                self.trouble(error.to_string());
                true
            }
        }
    }

    /// Gives a queued sequence the state of its first `tokens` tokens. False if no slot is free.
    fn seed(&mut self, id: SeqId, node: NodeId, tokens: usize) -> Result<bool, Error> {
        let Some(cache) = &self.cache else {
            return Ok(false);
        };
        let state = cache.tree.load(node).and_then(|held| held.memory.as_ref());
        let state = state.expect("it was found in memory");
        let pages = if state.pages.is_empty() {
            0
        } else {
            tokens.div_ceil(self.config.page_size)
        };
        match self.scheduler.seed(id, tokens, &state.pages[..pages]) {
            Ok(Some(slot)) => self.copy_to_slot(&state.slot, slot).map(|()| true),
            Ok(None) => Ok(true),
            Err(_) => Ok(false),
        }
    }

    /// Where the chunks of a sequence must end, so that states can be kept there.
    fn plan_cuts(&mut self, id: SeqId, reuse: &Reuse) {
        let prefix = self.prefix().len();
        let (Some(cache), Some(sequence)) = (&self.cache, self.scheduler.sequence(id)) else {
            return;
        };
        let policy = &cache.policy;
        let last = sequence.tokens.len() - 1;
        let mut cuts: Vec<usize> = Vec::new();
        if let Some(every) = policy.every {
            cuts.extend((every..=last).step_by(every));
        }
        if policy.ends && sequence.limits.max_tokens > 0 {
            cuts.push(sequence.prompt_len - 1);
        }
        // One that saves less than a page is not worth a slot.
        if policy.branches && reuse.known.is_some() && reuse.replayed() >= self.config.page_size {
            cuts.push(reuse.matched);
        }
        let marks = cache.marks.get(&id).into_iter().flatten();
        cuts.extend(marks.map(|at| at.saturating_add(prefix)));
        cuts.retain(|at| *at > reuse.resumed.max(prefix) && *at <= last + 1);
        cuts.sort_unstable();
        cuts.dedup();
        self.scheduler.cut_at(id, cuts);
    }

    /// Keeps the states that the policy wants of the step that is done, and makes room.
    pub(super) fn keep_of_step(&mut self) {
        let Some(cache) = &self.cache else { return };
        let (every, ends) = (cache.policy.every, cache.policy.ends);
        let prefix = self.prefix().len();
        for i in 0..self.batch.spans.len() {
            let id = self.batch.spans[i].seq;
            let Some(sequence) = self.scheduler.sequence(id) else {
                continue;
            };
            let at = sequence.computed;
            let wanted = sequence.cuts.binary_search(&at).is_ok()
                || every.is_some_and(|every| at > 0 && at.is_multiple_of(every))
                || ends && sequence.is_finished();
            if wanted && at > prefix && sequence.holds_state() {
                self.keep_now(id, false);
            }
        }
        self.stay_within_budget(None);
    }

    /// Keeps the state of a sequence as it is now, whatever the policy is. A `marked` one is given up last, and not
    /// now, were it beyond the budget.
    pub fn keep_state(&mut self, id: SeqId, marked: bool) {
        let kept = self.keep_now(id, marked);
        self.stay_within_budget(kept.filter(|_| marked));
    }

    /// Keeps the state of a sequence that was ended, if the policy wants that.
    pub(super) fn keep_end(&mut self, id: SeqId) {
        if self.cache.as_ref().is_some_and(|c| c.policy.ends) {
            self.keep_state(id, false);
        }
    }

    fn keep_now(&mut self, id: SeqId, marked: bool) -> Option<NodeId> {
        let (cache, sequence) = (self.cache.as_mut()?, self.scheduler.sequence(id)?);
        let (prefix, at) = (self.runner.network().graph.prefix, sequence.computed);
        if at == 0 {
            return None;
        }
        let marks = cache.marks.get(&id);
        let marked = marked || marks.is_some_and(|m| m.iter().any(|m| m + prefix == at));
        let tokens: Vec<TokenId> = sequence.tokens[..at].to_vec();
        if let Some(node) = cache.knows(&tokens, marked) {
            return Some(node);
        }
        let state = match self.state_of(id) {
            Ok(state) => state,
            Err(error) => {
                self.trouble(error.to_string());
                return None;
            }
        };
        match self.cache.as_mut()?.hold(&tokens, state, marked) {
            Ok(node) => Some(node),
            Err(state) => {
                self.release(&state.pages);
                None
            }
        }
    }

    /// Gives up states until no more bytes are kept than the policy allows, but not the one named.
    fn stay_within_budget(&mut self, but: Option<NodeId>) {
        while let Some(cache) = &self.cache {
            if !cache.is_over() {
                return;
            }
            let Some(node) = cache.victim(None, but) else {
                return;
            };
            self.evict(node);
        }
    }

    /// Gives up a state; if nothing goes on from it and the policy has a folder, it and those on its path are
    /// written there first.
    fn evict(&mut self, node: NodeId) {
        let Some(cache) = &self.cache else { return };
        let in_file = cache
            .tree
            .load(node)
            .is_some_and(|held| held.file.is_some());
        if cache.policy.spill.is_some()
            && !in_file
            && cache.tree.is_leaf(node)
            && let Err(error) = self.spill(node)
        {
            self.trouble(error.to_string());
        }
        let Some(cache) = &mut self.cache else { return };
        cache.told.evicted += 1;
        if let Some(State { pages, .. }) = cache.let_go(node) {
            self.release(&pages);
        }
    }

    /// Writes a path into the policy's folder, under the hash of its tokens.
    fn spill(&mut self, node: NodeId) -> Result<(), state_file::Error> {
        let Some(cache) = &self.cache else {
            return Ok(());
        };
        let Some(folder) = cache.policy.spill.clone() else {
            return Ok(());
        };
        let tokens = cache.tree.tokens(node);
        let mut hash = Xxh3::new();
        let Fingerprint { plan, weights } = &cache.fingerprint;
        hash.update(format!("{plan} {weights}").as_bytes());
        tokens.iter().for_each(|t| hash.update(&t.to_le_bytes()));
        let path = folder.join(format!("{:032x}.state", hash.digest128()));
        std::fs::create_dir_all(&folder).map_err(|source| state_file::Error::Io {
            path: folder,
            source,
        })?;
        self.write_path(node, &Default::default(), &path)?;
        let file = Arc::new(StateFile::open(&path)?);
        let Some(cache) = &mut self.cache else {
            return Ok(());
        };
        cache.attach(&file);
        cache.touch(&file, true);
        cache.told.spilled += 1;
        while let Some(old) = cache.file_too_many() {
            cache.forget_file(&old);
            // What cannot be deleted now is no use to anybody; the next of its name replaces it.
            std::fs::remove_file(&old).ok();
        }
        Ok(())
    }

    /// Writes all states on the path of these tokens, whose own is in memory, as a state file.
    pub fn write_states(
        &self,
        tokens: &[TokenId],
        notes: &std::collections::BTreeMap<String, String>,
        path: &std::path::Path,
    ) -> Result<(), state_file::Error> {
        let all: Vec<TokenId> = self.prefix().chain(tokens.iter().copied()).collect();
        let cache = self.cache.as_ref();
        let node = cache.and_then(|cache| {
            let walk = cache.tree.walk(&all);
            let last = *walk.path.last()?;
            (cache.tree.depth(last) == all.len()).then_some(last)
        });
        let missing = Error::NotKept {
            tokens: tokens.len(),
        };
        self.write_path(node.ok_or(missing)?, notes, path)
    }

    fn write_path(
        &self,
        node: NodeId,
        notes: &std::collections::BTreeMap<String, String>,
        path: &std::path::Path,
    ) -> Result<(), state_file::Error> {
        let missing = |tokens| Error::NotKept { tokens };
        let cache = self.cache.as_ref().ok_or(missing(0))?;
        let tokens = cache.tree.tokens(node);
        let last = cache.tree.load(node).and_then(|held| held.memory.as_ref());
        let last = last.ok_or(missing(tokens.len()))?;
        let mut states: Vec<(usize, Slots<'_>)> = Vec::new();
        for at in cache.tree.upward(node) {
            let Some(held) = cache.tree.load(at) else {
                continue;
            };
            let slots = match (&held.memory, &held.file) {
                (Some(state), _) => Slots::Memory(&state.slot),
                (None, Some((file, index))) => Slots::File(file, *index),
                (None, None) => continue,
            };
            states.push((cache.tree.depth(at), slots));
        }
        states.reverse();
        let content = Content {
            tokens: &tokens,
            pages: &last.pages,
            states,
            notes,
        };
        state_file::write(self, &content, &cache.fingerprint, path)
    }
}
