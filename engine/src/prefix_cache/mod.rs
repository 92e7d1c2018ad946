//! States after beginnings of prompts, kept so that what begins alike is computed once.
//!
//! One radix tree over tokens. Its nodes carry states: pages, which sequences and states share by counting their
//! users, and a copy of a slot, in memory, in a state file, or both. A prompt is matched as far as its tokens are
//! known; a model with slots goes on from the deepest state of that path, a model of attention alone from any place,
//! since the pages of a longer state hold those of its beginnings.
//!
//! What is kept is a [`Policy`]. When the bytes are too many, the state goes whose loss costs least: see
//! `Cache::victim`. The engine does the rest ([`Engine::keep_states`](crate::session::Engine::keep_states)).

mod policy;
mod tree;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

pub use policy::{BadPolicy, Policy, parse_size};
pub(crate) use tree::{NodeId, Tree};

use crate::ids::{PageId, SeqId, TokenId};
use crate::session::State;
use crate::state_file::{Fingerprint, StateFile};

/// What of a prompt was known, and what of it was used. Positions count the tokens of the prompt, from 0.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reuse {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// How many of them begin like something known.
    pub matched: usize,
    /// How many of them were not computed again.
    pub resumed: usize,
    /// Whether the state came from a file.
    pub from_file: bool,
    /// What was known to follow, where the prompt left what is known.
    pub known: Option<TokenId>,
    /// What follows in the prompt.
    pub found: Option<TokenId>,
}

impl Reuse {
    /// Tokens that were known and computed again, for want of a state behind them.
    pub fn replayed(&self) -> usize {
        self.matched - self.resumed
    }

    /// Why so much was computed: `diverged at token 11,586: " Date", where " Time" is known; no state between
    /// tokens 10,240 and 11,586`. `text` shows a token.
    pub fn why(&self, text: &dyn Fn(TokenId) -> String) -> String {
        let at = thousands(self.matched);
        let mut why = match (self.known, self.found) {
            _ if self.matched == 0 && self.known.is_none() => "nothing was known".into(),
            (Some(known), Some(found)) => {
                let (known, found) = (text(known), text(found));
                format!("diverged at token {at}: {found:?}, where {known:?} is known")
            }
            (None, Some(_)) => format!("goes on behind the {at} tokens known"),
            (_, None) => format!("all {at} tokens are known"),
        };
        // The last token of a prompt is always computed: it gives the first of the answer.
        if self.replayed() > usize::from(self.matched == self.prompt) {
            let from = thousands(self.resumed);
            why.push_str(&format!("; no state between tokens {from} and {at}"));
        }
        why
    }
}

/// `11,586`.
pub fn thousands(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// What a cache holds and has done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CacheUse {
    /// States in memory.
    pub states: usize,
    /// Places whose state is in a file.
    pub in_files: usize,
    /// Bytes of memory: slots of states, and pages that any of them uses.
    pub bytes: u64,
    /// Bytes of files that were spilled.
    pub disk_bytes: u64,
    /// Prompts that began with something known, and went on from a state of it.
    pub hits: u64,
    /// Prompts that were computed from their first token.
    pub misses: u64,
    /// Tokens that were not computed again.
    pub reused_tokens: u64,
    /// Prompts that waited for another to read what they begin with, too.
    pub waited: u64,
    /// States taken.
    pub taken: u64,
    /// States given up.
    pub evicted: u64,
    /// Files written to make room.
    pub spilled: u64,
    /// What went wrong last while something was kept, spilled or read. Nobody's request suffers from it.
    pub trouble: Option<String>,
}

/// What a node carries: a state in memory, in a file, or both.
#[derive(Default)]
pub(crate) struct Held {
    pub memory: Option<State>,
    pub file: Option<(Arc<StateFile>, usize)>,
    /// When it was last on the path of a prompt.
    used: u64,
    /// Somebody asked for it to be kept.
    pub marked: bool,
}

/// A prompt's best beginning.
pub(crate) struct Found {
    /// Where its state is.
    pub node: NodeId,
    /// How many tokens of it can be gone on from.
    pub tokens: usize,
}

/// See the top of this file. Pages are counted here as the states of the cache use them; whoever puts states in or
/// takes them out counts them in the pool.
pub(crate) struct Cache {
    pub policy: Policy,
    pub fingerprint: Fingerprint,
    pub tree: Tree<Held>,
    /// Whether states have slots: if not, they can be cut anywhere.
    has_slots: bool,
    slot_bytes: u64,
    page_bytes: u64,
    page_size: usize,
    users: BTreeMap<PageId, u32>,
    /// Counts prompts.
    clock: u64,
    pub reuses: BTreeMap<SeqId, Reuse>,
    pub marks: BTreeMap<SeqId, Vec<usize>>,
    /// Whose prompt waits, and for what; none if it has waited.
    pub awaits: BTreeMap<SeqId, Option<Awaited>>,
    /// Files that were spilled: bytes, and when they were last read or written.
    pub spilled: BTreeMap<PathBuf, (u64, u64)>,
    pub told: CacheUse,
}

/// Tokens that a running sequence is about to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Awaited {
    pub reader: SeqId,
    /// So many of its first.
    pub tokens: usize,
}

/// The sizes of states.
pub(crate) struct Sizes {
    pub slot_bytes: u64,
    pub page_bytes: u64,
    pub page_size: usize,
}

impl Cache {
    pub fn new(policy: Policy, fingerprint: Fingerprint, sizes: &Sizes) -> Self {
        Cache {
            policy,
            fingerprint,
            tree: Tree::default(),
            has_slots: sizes.slot_bytes > 0,
            slot_bytes: sizes.slot_bytes,
            page_bytes: sizes.page_bytes,
            page_size: sizes.page_size,
            users: BTreeMap::new(),
            clock: 0,
            reuses: BTreeMap::new(),
            marks: BTreeMap::new(),
            awaits: BTreeMap::new(),
            spilled: BTreeMap::new(),
            told: CacheUse::default(),
        }
    }

    /// Bytes of memory in use.
    pub fn bytes(&self) -> u64 {
        let states = self.states().count() as u64;
        states * self.slot_bytes + self.users.len() as u64 * self.page_bytes
    }

    fn states(&self) -> impl Iterator<Item = (NodeId, &State)> {
        let loads = self.tree.loads();
        loads.filter_map(|(id, held)| Some((id, held.memory.as_ref()?)))
    }

    /// What it holds and has done.
    pub fn told(&self) -> CacheUse {
        let in_files = self.tree.loads().filter(|(_, held)| held.file.is_some());
        CacheUse {
            states: self.states().count(),
            in_files: in_files.count(),
            bytes: self.bytes(),
            disk_bytes: self.spilled.values().map(|(bytes, _)| bytes).sum(),
            ..self.told.clone()
        }
    }

    /// How far a sequence's tokens are known and where it can go on from, with at least one token left to compute.
    /// What lies on its path counts as used now.
    pub fn find(&mut self, tokens: &[TokenId]) -> (Reuse, Option<Found>) {
        self.clock += 1;
        let walk = self.tree.walk(tokens);
        let most = walk.matched.min(tokens.len().saturating_sub(1));
        let deepest = *walk.path.last().expect("the root at least");
        let below = self.tree.leaf(walk.inside.unwrap_or(deepest));
        let on_path = walk.path.iter().copied();
        let mut usable: Vec<NodeId> = on_path
            .filter(|n| self.tree.depth(*n) <= most && self.is_held(*n))
            .collect();
        if !self.has_slots && self.is_held(below) {
            usable.push(below);
        }
        let now = self.clock;
        let path = walk
            .path
            .iter()
            .copied()
            .chain((!self.has_slots).then_some(below));
        for node in path.collect::<Vec<_>>() {
            if let Some(held) = self.tree.load_mut(node) {
                held.used = now;
            }
        }
        let found = usable.last().map(|node| Found {
            node: *node,
            tokens: if self.has_slots {
                self.tree.depth(*node)
            } else {
                most.min(self.tree.depth(*node))
            },
        });
        let reuse = Reuse {
            prompt: tokens.len(),
            matched: walk.matched,
            resumed: 0,
            from_file: false,
            known: walk.next,
            found: tokens.get(walk.matched).copied(),
        };
        (reuse, found.filter(|f| f.tokens > 0))
    }

    fn is_held(&self, node: NodeId) -> bool {
        self.tree.load(node).is_some()
    }

    /// Puts a state in; its pages have the cache as a user already. False if there was one: the caller keeps it.
    pub fn hold(
        &mut self,
        tokens: &[TokenId],
        state: State,
        marked: bool,
    ) -> Result<NodeId, State> {
        let node = self.tree.insert(tokens);
        let now = self.clock;
        let held = self.tree.load_mut(node).get_or_insert_default();
        held.used = now;
        held.marked |= marked;
        if held.memory.is_some() {
            return Err(state);
        }
        for page in state.pages.iter().filter(|p| p.is_there()) {
            *self.users.entry(*page).or_default() += 1;
        }
        held.memory = Some(state);
        self.told.taken += 1;
        Ok(node)
    }

    /// Takes a state out of memory. The caller gives its pages back.
    pub fn let_go(&mut self, node: NodeId) -> Option<State> {
        let held = self.tree.load_mut(node).as_mut()?;
        let state = held.memory.take()?;
        if held.file.is_none() {
            *self.tree.load_mut(node) = None;
            self.tree.prune(node);
        }
        for page in state.pages.iter().filter(|p| p.is_there()) {
            let users = self.users.get_mut(page).expect("a page of the cache");
            *users -= 1;
            if *users == 0 {
                self.users.remove(page);
            }
        }
        Some(state)
    }

    /// The node of these tokens, if their state is in memory. If it is, it counts as used now.
    pub fn knows(&mut self, tokens: &[TokenId], marked: bool) -> Option<NodeId> {
        let walk = self.tree.walk(tokens);
        let last = *walk.path.last()?;
        if walk.matched < tokens.len() || walk.inside.is_some() {
            return None;
        }
        let now = self.clock;
        let held = self.tree.load_mut(last).as_mut()?;
        held.used = now;
        held.marked |= marked;
        held.memory.is_some().then_some(last)
    }

    /// Forgets that states lie in a file.
    pub fn forget_file(&mut self, path: &std::path::Path) {
        let of = |held: &Held| {
            held.file
                .as_ref()
                .is_some_and(|(file, _)| file.path() == path)
        };
        let nodes: Vec<NodeId> = self
            .tree
            .loads()
            .filter(|(_, h)| of(h))
            .map(|(n, _)| n)
            .collect();
        for node in nodes {
            let load = self.tree.load_mut(node);
            if let Some(held) = load {
                held.file = None;
                if held.memory.is_none() {
                    *load = None;
                    self.tree.prune(node);
                }
            }
        }
        self.spilled.remove(path);
    }

    /// Makes a file's states known.
    pub fn attach(&mut self, file: &Arc<StateFile>) {
        let tokens = file.tokens();
        for (index, at) in file.snapshots().iter().enumerate() {
            let node = self.tree.insert(&tokens[..*at]);
            let now = self.clock;
            let held = self.tree.load_mut(node).get_or_insert_default();
            held.file.get_or_insert_with(|| (file.clone(), index));
            held.used = now;
        }
    }

    /// Notes that a file was spilled or read.
    pub fn touch(&mut self, file: &StateFile, is_new: bool) {
        let now = self.clock;
        if is_new {
            self.spilled.insert(file.path().into(), (file.bytes(), now));
        } else if let Some((_, used)) = self.spilled.get_mut(file.path()) {
            *used = now;
        }
    }

    /// The spilled file that was used least lately, if there are more bytes of them than the policy allows.
    pub fn file_too_many(&self) -> Option<PathBuf> {
        let bytes: u64 = self.spilled.values().map(|(bytes, _)| bytes).sum();
        if bytes <= self.policy.disk? {
            return None;
        }
        let oldest = self.spilled.iter().min_by_key(|(_, (_, used))| *used);
        oldest.map(|(path, _)| path.clone())
    }

    /// Pages at the end of a state that no other state uses.
    fn own_pages<'a>(&'a self, state: &'a State) -> impl Iterator<Item = PageId> + 'a {
        let pages = state.pages.iter().rev().copied();
        let pages = pages.filter(|p| p.is_there());
        pages.take_while(|page| self.users[page] == 1)
    }

    /// Tokens between a state and the one above it, which a prompt that needs it would compute again.
    fn replay(&self, node: NodeId) -> usize {
        let depth = self.tree.depth(node);
        let above = self.tree.upward(node).skip(1).find(|n| self.is_held(*n));
        depth - above.map_or(0, |n| self.tree.depth(n))
    }

    /// The state whose loss costs least: the fewest tokens to compute again, for each byte that it frees and each
    /// prompt since it was last of use. So old paths go from their ends, and of the path that is in use every second
    /// state, then every second of the others: what is left stays evenly spread. States that somebody marked go last.
    /// Those that also lie in a file cost next to nothing. `frees` says which pages count, if only pages are wanted.
    pub fn victim(
        &self,
        frees: Option<&dyn Fn(PageId) -> bool>,
        but: Option<NodeId>,
    ) -> Option<NodeId> {
        let mut best: Option<(NodeId, (bool, f64))> = None;
        for (node, held) in self.tree.loads() {
            let Some(state) = &held.memory else { continue };
            if but == Some(node) {
                continue;
            }
            let pages = match frees {
                None => self.own_pages(state).count(),
                Some(frees) => match self.own_pages(state).filter(|p| frees(*p)).count() {
                    0 => continue,
                    pages => pages,
                },
            };
            let slot = if state.slot.is_empty() {
                0
            } else {
                self.slot_bytes
            };
            let bytes = (slot + pages as u64 * self.page_bytes).max(1) as f64;
            let covered = !self.has_slots && !self.tree.is_leaf(node);
            let replay = match (covered, held.file.is_some()) {
                (true, _) => 0.0,
                (false, true) => self.replay(node) as f64 * 0.01,
                (false, false) => self.replay(node) as f64,
            };
            let age = (self.clock - held.used + 1) as f64;
            let cost = (held.marked, replay / bytes / age);
            let less = |(_, least): &(NodeId, (bool, f64))| {
                cost.0
                    .cmp(&least.0)
                    .then(cost.1.total_cmp(&least.1))
                    .is_lt()
            };
            if best.as_ref().is_none_or(less) {
                best = Some((node, cost));
            }
        }
        best.map(|(node, _)| node)
    }

    /// Whether there are more bytes than the policy allows.
    pub fn is_over(&self) -> bool {
        self.policy
            .budget
            .is_some_and(|budget| self.bytes() > budget)
    }

    /// What does not hold that should, for tests: the tree is sound, every page of a state is counted, and states
    /// have the pages of their tokens.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = self.tree.faults();
        let mut users: BTreeMap<PageId, u32> = BTreeMap::new();
        for (node, state) in self.states() {
            let depth = self.tree.depth(node);
            let pages = match self.page_bytes {
                0 => 0,
                _ => depth.div_ceil(self.page_size),
            };
            if state.tokens != depth
                || state.pages.len() != pages
                || state.slot.is_empty() == self.has_slots
            {
                faults.push(format!(
                    "a state of {} tokens and {} pages at {depth}",
                    state.tokens,
                    state.pages.len()
                ));
            }
            state
                .pages
                .iter()
                .filter(|p| p.is_there())
                .for_each(|p| *users.entry(*p).or_default() += 1);
        }
        if users != self.users {
            faults.push("pages are miscounted".into());
        }
        for (node, held) in self.tree.loads() {
            match &held.file {
                None if held.memory.is_none() => faults.push(format!("{node:?} holds nothing")),
                Some((file, i)) if file.snapshots()[*i] != self.tree.depth(node) => {
                    faults.push(format!("{node:?} has another place in its file"));
                }
                _ => {}
            }
        }
        faults
    }

    /// Users of a page among the states.
    pub fn users(&self, page: PageId) -> u32 {
        self.users.get(&page).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reuse(
        prompt: usize,
        matched: usize,
        resumed: usize,
        known: Option<u32>,
        found: Option<u32>,
    ) -> Reuse {
        Reuse {
            prompt,
            matched,
            resumed,
            from_file: false,
            known,
            found,
        }
    }

    #[test]
    fn a_reuse_says_why() {
        let text = |t: TokenId| format!("t{t}");
        for (reuse, said) in [
            (reuse(9, 0, 0, None, Some(1)), "nothing was known"),
            (
                reuse(9, 0, 0, Some(2), Some(1)),
                "diverged at token 0: \"t1\", where \"t2\" is known",
            ),
            (
                reuse(20_000, 11_586, 10_240, Some(2), Some(1)),
                "diverged at token 11,586: \"t1\", where \"t2\" is known; no state between tokens 10,240 and 11,586",
            ),
            (
                reuse(1_234_567, 1_000, 1_000, None, Some(1)),
                "goes on behind the 1,000 tokens known",
            ),
            (reuse(9, 9, 8, None, None), "all 9 tokens are known"),
            (
                reuse(9, 9, 4, Some(1), None),
                "all 9 tokens are known; no state between tokens 4 and 9",
            ),
        ] {
            assert_eq!(reuse.why(&text), said);
        }
    }
}
