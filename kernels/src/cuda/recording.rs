//! Steps that are recorded once and started as one: what [`Backend::repeat`](crate::Backend::repeat)
//! runs. Operations go to a stream that records; the tokens and the batch of a step lie in memory of the
//! recording, which is filled again before each start.
//!
//! A recording is for one key of the caller's, one number of sequences, and a power of two that bounds
//! their lengths and another that bounds their pages. It goes when memory goes that it was made with.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::thread::ThreadId;

use cudarc::driver::sys::{self, CUgraphExec};

use super::attention::reach;
use super::device::{Device, failed};
use super::lists::Fixed;
use super::{Cuda, State};
use crate::backend::Repeat;
use crate::error::Result;

/// Recordings that are kept. One more, and all are made anew.
const MOST: usize = 128;
/// Pages of the smallest recording.
const PAGES: usize = 256;

/// What a recording is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    of: [u64; 2],
    rows: usize,
    reach: usize,
    pages: usize,
}

impl Key {
    fn of(step: &Repeat<'_>) -> Self {
        let pages = step.ragged.page_table.len();
        Key {
            of: step.key,
            rows: step.ids.len(),
            reach: if pages == 0 { 0 } else { reach(&step.ragged) },
            pages: pages.next_power_of_two().max(PAGES),
        }
    }
}

enum Known {
    /// It ran once, so that all memory and all choices it needs are there.
    Ran,
    /// It can be started.
    Ready(Box<Ready>),
    /// It cannot be recorded.
    Never,
}

struct Ready {
    graph: CUgraphExec,
    lists: Fixed,
    device: Arc<Device>,
}

// SAFETY: a handle of the driver's, which any thread may use.
unsafe impl Send for Ready {}

impl Drop for Ready {
    fn drop(&mut self) {
        if self.device.enter().is_ok() {
            // SAFETY: made by `end_recording`, destroyed once; the driver waits for its last run.
            let _ = unsafe { sys::cuGraphExecDestroy(self.graph) };
        }
    }
}

/// All recordings, and the one under way.
#[derive(Default)]
pub(super) struct Recordings {
    known: HashMap<Key, Known>,
    under_way: Option<UnderWay>,
}

struct UnderWay {
    key: Key,
    by: ThreadId,
    /// Allocations before it began: one more, and a recording holds what will be freed.
    allocations: u64,
}

impl Recordings {
    /// Whether another thread records.
    pub fn keep_out(&self) -> bool {
        let here = std::thread::current().id();
        self.under_way.as_ref().is_some_and(|u| u.by != here)
    }

    /// Forgets them: memory they were made with goes.
    pub fn forget(&mut self) {
        self.known.clear();
    }
}

/// What to do with a step.
enum Next {
    Done,
    Run,
    Record,
}

impl State {
    /// Starts a step's recording if there is one.
    fn start(&mut self, key: Key, step: &Repeat<'_>) -> Result<Next> {
        let recordings = &mut self.recordings;
        match recordings.known.get(&key) {
            Some(Known::Ready(ready)) => {
                self.lists.refill(&ready.lists, step)?;
                // SAFETY: graph and stream are alive, and so is all memory that the graph was made with.
                let started = unsafe { sys::cuGraphLaunch(ready.graph, self.device.stream) };
                started.result().map_err(failed("starting a recording"))?;
                Ok(Next::Done)
            }
            Some(Known::Ran) => Ok(Next::Record),
            Some(Known::Never) => Ok(Next::Run),
            None => {
                if recordings.known.len() >= MOST {
                    recordings.forget();
                }
                recordings.known.insert(key, Known::Ran);
                Ok(Next::Run)
            }
        }
    }

    fn begin_recording(&mut self, key: Key, step: &Repeat<'_>) -> Result<()> {
        let lists = Fixed::new(&self.device, step, key.pages)?;
        self.device.begin_recording()?;
        self.lists.begin_recording(lists);
        self.recordings.under_way = Some(UnderWay {
            key,
            by: std::thread::current().id(),
            allocations: self.device.allocations(),
        });
        Ok(())
    }

    /// Ends what is recorded; it is kept if it is `whole`.
    fn end_recording(&mut self, whole: bool) {
        let Some(of) = self.recordings.under_way.take() else {
            return;
        };
        let lists = self.lists.end_recording();
        let ready = self.device.end_recording();
        let known = match (ready, lists) {
            (Ok(graph), Some(lists)) => {
                let device = self.device.clone();
                let ready = Ready {
                    graph,
                    lists,
                    device,
                };
                if self.device.allocations() != of.allocations {
                    Known::Ran
                } else if whole {
                    Known::Ready(Box::new(ready))
                } else {
                    Known::Never
                }
            }
            _ => Known::Never,
        };
        self.recordings.known.insert(of.key, known);
    }
}

/// Ends a recording, also when what is recorded panics.
struct Ending<'a> {
    cuda: &'a Cuda,
    whole: bool,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let state = self.cuda.state.lock();
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        let whole = state.flush().is_ok() && self.whole;
        state.end_recording(whole);
        drop(state);
        self.cuda.recorded.notify_all();
    }
}

impl Cuda {
    pub(super) fn run_or_repeat(
        &self,
        step: &Repeat<'_>,
        operations: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let key = Key::of(step);
        let next = self.enter()?.start(key, step)?;
        match next {
            Next::Done => return Ok(()),
            Next::Run => return operations(),
            Next::Record => self.enter()?.begin_recording(key, step)?,
        }
        let mut ending = Ending {
            cuda: self,
            whole: false,
        };
        ending.whole = operations().is_ok();
        drop(ending);
        let next = self.enter()?.start(key, step)?;
        match next {
            Next::Done => Ok(()),
            // What could not be recorded runs as always, and says itself what is wrong if anything is.
            Next::Run | Next::Record => operations(),
        }
    }
}
