//! Memory that operations need for a moment: it grows to the largest ask and stays.

use half::bf16;

/// One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Aligned memory with undefined contents. One a thread.
#[derive(Default)]
pub(crate) struct Scratch {
    lines: Vec<Line>,
}

/// Types that any bytes are a value of.
pub(crate) trait Plain: Copy {}
impl Plain for f32 {}
impl Plain for bf16 {}
impl Plain for u32 {}
impl Plain for i32 {}
impl Plain for i8 {}
impl Plain for i16 {}
impl Plain for u8 {}

impl Scratch {
    /// `len` elements, aligned to a cache line, with whatever was left there.
    pub(crate) fn take<T: Plain>(&mut self, len: usize) -> &mut [T] {
        self.split(&[len * size_of::<T>()]).next(len)
    }

    /// Room for several slices: `bytes` of each.
    pub(crate) fn split(&mut self, bytes: &[usize]) -> Parts<'_> {
        let lines: usize = bytes.iter().map(|b| b.div_ceil(64)).sum();
        if self.lines.len() < lines {
            self.lines.resize(lines, Line([0; 64]));
        }
        Parts(&mut self.lines)
    }
}

/// What is left of the room that was asked for.
pub(crate) struct Parts<'a>(&'a mut [Line]);

impl<'a> Parts<'a> {
    /// The next `len` elements.
    pub(crate) fn next<T: Plain>(&mut self, len: usize) -> &'a mut [T] {
        let lines = (len * size_of::<T>()).div_ceil(64);
        let (head, tail) = std::mem::take(&mut self.0).split_at_mut(lines);
        self.0 = tail;
        // SAFETY: `head` has at least `len` elements' bytes, is aligned to 64, all of it is
        // initialised, any bytes are a `T`, and nobody else has it.
        unsafe { std::slice::from_raw_parts_mut(head.as_mut_ptr().cast(), len) }
    }
}

/// Memory of which each part of a job writes its own rows.
pub(crate) struct SharedMut<T>(pub(crate) *mut T);
// SAFETY: parts write disjoint rows.
unsafe impl<T: Plain> Sync for SharedMut<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_aligned_and_apart() {
        let mut scratch = Scratch::default();
        let mut parts = scratch.split(&[3 * 4, 5 * 2, 100]);
        let (a, b) = (parts.next::<f32>(3), parts.next::<bf16>(5));
        let c = parts.next::<u8>(100);
        a.fill(1.0);
        c.fill(7);
        assert!(a.iter().all(|a| *a == 1.0));
        for address in [
            a.as_ptr() as usize,
            b.as_ptr() as usize,
            c.as_ptr() as usize,
        ] {
            assert_eq!(address % 64, 0);
        }
    }
}
