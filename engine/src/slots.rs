//! The pool of slots: the fixed-size state of a sequence, with one owner each.

use crate::ids::SlotId;

/// Knows which slots are owned. It holds ids only; the memory lies with the runner.
///
/// A slot changes with every token, so it is never shared: a second owner gets a copy.
/// Releasing a free slot is a bug of ours and asserts.
#[derive(Debug)]
pub struct SlotPool {
    owned: Vec<bool>,
    /// The last one is handed out next: at first the lowest id, later the one freed last.
    free: Vec<SlotId>,
}

impl SlotPool {
    /// A pool of `slots` free slots.
    pub fn new(slots: u32) -> Self {
        Self {
            owned: vec![false; slots as usize],
            free: (0..slots).rev().map(SlotId).collect(),
        }
    }

    /// Takes a free slot, or says that there is none. What an earlier owner left is still in it.
    pub fn alloc(&mut self) -> Option<SlotId> {
        let slot = self.free.pop()?;
        self.owned[slot.0 as usize] = true;
        Some(slot)
    }

    /// Gives a slot back.
    pub fn release(&mut self, slot: SlotId) {
        let owned = &mut self.owned[slot.0 as usize];
        assert!(*owned, "{slot:?} is free");
        *owned = false;
        self.free.push(slot);
    }

    /// Whether somebody owns the slot.
    pub fn is_owned(&self, slot: SlotId) -> bool {
        self.owned[slot.0 as usize]
    }

    /// Slots that nobody owns.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Slots that somebody owns.
    pub fn used(&self) -> usize {
        self.total() - self.free()
    }

    /// All slots.
    pub fn total(&self) -> usize {
        self.owned.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_come_lowest_first_then_the_last_freed() {
        let mut pool = SlotPool::new(2);
        assert_eq!(
            [pool.alloc(), pool.alloc(), pool.alloc()],
            [Some(SlotId(0)), Some(SlotId(1)), None]
        );
        pool.release(SlotId(1));
        pool.release(SlotId(0));
        assert_eq!(
            (pool.free(), pool.used(), pool.is_owned(SlotId(0))),
            (2, 0, false)
        );
        assert_eq!(pool.alloc(), Some(SlotId(0)));
    }

    #[test]
    #[should_panic(expected = "SlotId(0) is free")]
    fn a_slot_is_not_freed_twice() {
        let mut pool = SlotPool::new(1);
        let slot = pool.alloc().unwrap();
        pool.release(slot);
        pool.release(slot);
    }
}
