//! The state of sequences after some of their tokens: taken, kept, gone on from.

use strata_kernels::{DType, Tensor};

use super::{Engine, Error, Request};
use crate::ids::{PageId, SeqId, SlotId, TokenId};

/// Names a snapshot of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SnapshotId(u64);

/// The state after some tokens: pages, shared with whoever else has them, and a copy of a slot. It never changes.
pub(crate) struct State {
    /// How many tokens it stands for, those of the model's prefix among them.
    pub tokens: usize,
    /// Its pages, in the order of the tokens. Whoever owns the state is one of their users.
    pub pages: Vec<PageId>,
    /// (1, elements) of each part of a slot, in the order of the store.
    pub slot: Vec<Tensor>,
}

/// A state and its tokens.
pub(crate) struct Snapshot {
    pub tokens: Vec<TokenId>,
    pub state: State,
}

impl Engine {
    /// Keeps the state of a sequence as it is now, between two steps.
    pub fn snapshot(&mut self, id: SeqId) -> Result<SnapshotId, Error> {
        let state = self.state_of(id)?;
        let sequence = self.sequence(id).ok_or(Error::NoState(id))?;
        let tokens = sequence.tokens[..state.tokens].to_vec();
        Ok(self.keep(Snapshot { tokens, state }))
    }

    /// The state of a sequence as it is now. Its pages have one more user.
    pub(super) fn state_of(&mut self, id: SeqId) -> Result<State, Error> {
        let sequence = self.scheduler.sequence(id).ok_or(Error::NoState(id))?;
        if !sequence.holds_state() {
            return Err(Error::NoState(id));
        }
        let tokens = sequence.computed;
        let (pages, slot) = (sequence.pages.clone(), sequence.slot);
        let mut copy = Vec::new();
        if let Some(slot) = slot {
            let row = slot.0 as usize;
            for part in self.runner.state.parts().filter(|p| !p.paged) {
                let mut own = part.backend.alloc(DType::F32, 1, part.tensor.cols())?;
                part.backend
                    .copy(&part.tensor.row_range(row..row + 1), &mut own)?;
                copy.push(own);
            }
        }
        self.retain(&pages);
        Ok(State {
            tokens,
            pages,
            slot: copy,
        })
    }

    pub(crate) fn keep(&mut self, snapshot: Snapshot) -> SnapshotId {
        let id = SnapshotId(self.next_snapshot);
        self.next_snapshot += 1;
        self.snapshots.insert(id, snapshot);
        id
    }

    /// The tokens whose state a snapshot holds.
    pub fn snapshot_tokens(&self, id: SnapshotId) -> Result<&[TokenId], Error> {
        let tokens = &self.get(id)?.tokens;
        Ok(&tokens[self.prefix().len().min(tokens.len())..])
    }

    pub(crate) fn get(&self, id: SnapshotId) -> Result<&Snapshot, Error> {
        self.snapshots.get(&id).ok_or(Error::NoSnapshot(id))
    }

    /// Takes a request on whose prompt begins with the tokens of a snapshot and goes on by at least
    /// one: those are not computed again. The snapshot stays as it is.
    pub fn restore(&mut self, id: SnapshotId, request: Request) -> Result<SeqId, Error> {
        let snapshot = self.get(id)?;
        let (prompt, tokens) = (&request.prompt, self.snapshot_tokens(id)?);
        if let Some(position) = (0..tokens.len()).find(|i| prompt.get(*i) != Some(&tokens[*i])) {
            let found = prompt
                .get(position)
                .map_or("no token".into(), |t| format!("token {t}"));
            let expected = tokens[position];
            return Err(Error::Diverged {
                position,
                found,
                expected,
            });
        }
        let (computed, pages) = (snapshot.tokens.len(), snapshot.state.pages.clone());
        let has_slot = !snapshot.state.slot.is_empty();
        let (sequence, sampler) = self.accept(request)?;
        let slot = if has_slot {
            Some(self.fill_slot(id)?)
        } else {
            None
        };
        self.retain(&pages);
        match self.scheduler.adopt(sequence, computed, &pages, slot) {
            Ok(seq) => {
                self.samplers.insert(seq, sampler);
                Ok(seq)
            }
            Err(refused) => {
                self.release(&pages);
                if let (Some(pool), Some(slot)) = (self.scheduler.slots_mut(), slot) {
                    pool.release(slot);
                }
                Err(refused.into())
            }
        }
    }

    /// A new slot with the contents of a snapshot's.
    fn fill_slot(&mut self, id: SnapshotId) -> Result<SlotId, Error> {
        let running = self.scheduler.running().count();
        let pool = self
            .scheduler
            .slots_mut()
            .expect("a snapshot with a slot comes from a pool");
        let slot = pool.alloc().ok_or(Error::NoSlot { running })?;
        let copied = self.copy_to_slot(&self.snapshots[&id].state.slot, slot);
        if copied.is_err()
            && let Some(pool) = self.scheduler.slots_mut()
        {
            pool.release(slot);
        }
        copied.map(|()| slot)
    }

    /// Fills a slot with the parts of one that was kept.
    pub(super) fn copy_to_slot(&self, parts: &[Tensor], slot: SlotId) -> Result<(), Error> {
        let row = slot.0 as usize;
        let store = &self.runner.state;
        for (part, own) in store.parts().filter(|p| !p.paged).zip(parts) {
            let mut to = part.tensor.row_range(row..row + 1);
            part.backend.copy(own, &mut to)?;
        }
        Ok(())
    }

    /// Forgets a snapshot.
    pub fn drop_snapshot(&mut self, id: SnapshotId) -> Result<(), Error> {
        let snapshot = self.snapshots.remove(&id).ok_or(Error::NoSnapshot(id))?;
        self.release(&snapshot.state.pages);
        Ok(())
    }

    pub(crate) fn retain(&mut self, pages: &[PageId]) {
        if let Some(pool) = self.scheduler.pages_mut() {
            let live = pages.iter().filter(|p| p.is_there());
            live.for_each(|page| pool.retain(*page));
        }
    }

    pub(crate) fn release(&mut self, pages: &[PageId]) {
        if let Some(pool) = self.scheduler.pages_mut() {
            for page in pages.iter().filter(|p| p.is_there()) {
                pool.release(*page);
            }
        }
    }

    /// New pages for `tokens` tokens, held by the caller. A cache makes room for them.
    pub(crate) fn alloc_pages(&mut self, tokens: usize) -> Result<Vec<PageId>, Error> {
        let count = tokens.div_ceil(self.config.page_size);
        self.free_pages(count);
        let Some(pool) = self.scheduler.pages_mut() else {
            return Ok(Vec::new());
        };
        if pool.free() < count {
            return Err(Error::NoPages { tokens });
        }
        Ok((0..count)
            .map(|_| pool.alloc().expect("as many are free"))
            .collect())
    }
}
