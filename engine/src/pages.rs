//! The pool of KV pages: which are free, and how many users each of the others has.

use crate::ids::PageId;

/// Counts the users of every page. It holds ids only; the memory lies with the runner.
///
/// A page with several users is shared and must not be written: whoever wants to write copies it first.
/// Using a free page is a bug of ours and asserts.
#[derive(Debug)]
pub struct PagePool {
    page_size: usize,
    references: Vec<u32>,
    /// The last one is handed out next: at first the lowest id, later the one freed last.
    free: Vec<PageId>,
}

impl PagePool {
    /// A pool of `pages` free pages of `page_size` tokens each.
    pub fn new(pages: u32, page_size: u32) -> Self {
        assert!(page_size > 0, "a page holds at least one token");
        Self {
            page_size: page_size as usize,
            references: vec![0; pages as usize],
            free: (0..pages).rev().map(PageId).collect(),
        }
    }

    /// Takes a free page for one user, or says that there is none.
    pub fn alloc(&mut self) -> Option<PageId> {
        let page = self.free.pop()?;
        self.references[page.0 as usize] = 1;
        Some(page)
    }

    /// Adds a user to a page in use.
    pub fn retain(&mut self, page: PageId) {
        *self.live(page) += 1;
    }

    /// Takes one user away; true if it was the last and the page is free again.
    pub fn release(&mut self, page: PageId) -> bool {
        let references = self.live(page);
        *references -= 1;
        let freed = *references == 0;
        if freed {
            self.free.push(page);
        }
        freed
    }

    /// Whether a page in use has more than one user.
    pub fn is_shared(&self, page: PageId) -> bool {
        let references = self.references(page);
        assert!(references > 0, "{page:?} is free");
        references > 1
    }

    /// How many users a page has; 0 for a free one.
    pub fn references(&self, page: PageId) -> u32 {
        self.references[page.0 as usize]
    }

    /// Tokens in a page.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// Pages that `tokens` tokens fill, the last perhaps in part.
    pub fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_size)
    }

    /// Pages that nobody uses.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Pages that somebody uses.
    pub fn used(&self) -> usize {
        self.total() - self.free()
    }

    /// All pages.
    pub fn total(&self) -> usize {
        self.references.len()
    }

    fn live(&mut self, page: PageId) -> &mut u32 {
        let references = &mut self.references[page.0 as usize];
        assert!(*references > 0, "{page:?} is free");
        references
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_free_when_its_last_user_leaves() {
        let mut pool = PagePool::new(2, 16);
        let page = pool.alloc().unwrap();
        assert_eq!(
            (page, pool.free(), pool.is_shared(page)),
            (PageId(0), 1, false)
        );
        pool.retain(page);
        assert!(pool.is_shared(page));
        assert!(!pool.release(page));
        assert!(pool.release(page));
        assert_eq!((pool.free(), pool.used(), pool.references(page)), (2, 0, 0));
    }

    #[test]
    fn pages_come_lowest_first_then_the_last_freed() {
        let mut pool = PagePool::new(3, 16);
        let all: Vec<_> = std::iter::from_fn(|| pool.alloc()).collect();
        assert_eq!(all, [PageId(0), PageId(1), PageId(2)]);
        pool.release(PageId(1));
        pool.release(PageId(0));
        assert_eq!(
            [pool.alloc(), pool.alloc(), pool.alloc()],
            [Some(PageId(0)), Some(PageId(1)), None]
        );
    }

    #[test]
    fn tokens_fill_pages_rounded_up() {
        let pool = PagePool::new(1, 16);
        for (tokens, pages) in [(0, 0), (1, 1), (16, 1), (17, 2)] {
            assert_eq!(pool.pages_for(tokens), pages, "{tokens} tokens");
        }
    }

    #[test]
    #[should_panic(expected = "PageId(0) is free")]
    fn a_page_is_not_freed_twice() {
        let mut pool = PagePool::new(1, 16);
        let page = pool.alloc().unwrap();
        pool.release(page);
        pool.release(page);
    }

    #[test]
    #[should_panic(expected = "PageId(1) is free")]
    fn a_free_page_is_not_shared() {
        PagePool::new(2, 16).retain(PageId(1));
    }
}
