//! Names for the things the engine counts. Each is its own type, so that a page is never taken for a slot.

/// A token of the model's vocabulary.
pub type TokenId = u32;

/// A sequence, for as long as the engine lives: numbers are never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqId(pub u64);

/// A page of KV memory: the same number names the page in every attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageId(pub u32);

impl PageId {
    /// Stands where a page was whose tokens nothing can see any more.
    pub const GONE: PageId = PageId(u32::MAX);

    /// Whether there is a page.
    pub fn is_there(self) -> bool {
        self != PageId::GONE
    }
}

/// A slot of fixed-size state: the same number names the slot in every layer that keeps one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub u32);
