//! Sums over devices that compute one model together.
//!
//! Each device has a [`Rank`] and a part of every sum. [`Rank::all_reduce`] gives all of them the whole: every
//! rank fetches the others' parts and adds all of them in the order of the ranks, in f32. So the result is the same
//! bits on every rank, whoever came first, in host memory and between GPUs alike.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::ops::Add;
use crate::tensor::Tensor;

/// Who says that a rank left.
const GONE: &str = "ranks";

/// A device among those that compute together.
#[derive(Clone)]
pub struct Rank {
    index: usize,
    devices: Arc<[Arc<dyn Backend>]>,
    meeting: Arc<Meeting>,
}

/// Where ranks wait for each other.
#[derive(Default)]
struct Meeting {
    state: Mutex<State>,
    told: Condvar,
}

#[derive(Default)]
struct State {
    /// By rank, what each brings to the next meeting.
    parts: Vec<Option<Tensor>>,
    /// What they brought to the last: no meeting ends before all have seen it.
    brought: Vec<Tensor>,
    waiting: usize,
    /// Meetings that are over.
    over: u64,
    /// Some rank will not come again.
    left: bool,
}

impl Meeting {
    fn enter(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Rank {
    /// A rank for each device, in their order.
    pub fn all(devices: &[Arc<dyn Backend>]) -> Vec<Rank> {
        let meeting = Arc::new(Meeting::default());
        meeting.enter().parts = vec![None; devices.len()];
        let rank = |index| Rank {
            index,
            devices: devices.into(),
            meeting: meeting.clone(),
        };
        (0..devices.len()).map(rank).collect()
    }

    /// Which it is, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.devices.len()
    }

    /// Tensors of the size of `x` that [`Rank::all_reduce`] works in.
    pub const ROOM: usize = 3;

    /// Replaces `x`, this rank's part, by the sum of all ranks' parts. All ranks call it, with tensors of one
    /// shape, and each waits for the others; it fails when one of them left.
    pub fn all_reduce(&self, x: &mut Tensor, room: [Tensor; Rank::ROOM]) -> Result<()> {
        let own = &*self.devices[self.index];
        let [mut fetched, mut sum, mut next] = room;
        let parts = self.meet(Some(x.clone()))?;
        for (i, part) in parts.iter().enumerate().skip(1) {
            // Rank 0's part begins the sum; it may be ours.
            if i == 1 {
                self.fetch(0, &parts[0], &mut sum)?;
            }
            let part = if i == self.index {
                part
            } else {
                self.fetch(i, part, &mut fetched)?;
                &fetched
            };
            own.add(Add {
                a: &sum,
                b: part,
                y: &mut next,
            })?;
            std::mem::swap(&mut sum, &mut next);
        }
        // Nobody reads our part any more.
        self.meet(None)?;
        if parts.len() > 1 {
            own.copy(&sum, x)?;
        }
        Ok(())
    }

    fn fetch(&self, from: usize, part: &Tensor, to: &mut Tensor) -> Result<()> {
        let own = &*self.devices[self.index];
        if from == self.index {
            return own.copy(part, to);
        }
        own.receive(part, &*self.devices[from], to)
    }

    /// Waits for all ranks; what they brought.
    fn meet(&self, part: Option<Tensor>) -> Result<Vec<Tensor>> {
        let gone = || Error::Device {
            backend: GONE,
            why: "another device failed".into(),
        };
        let mut state = self.meeting.enter();
        if state.left {
            return Err(gone());
        }
        state.parts[self.index] = part;
        state.waiting += 1;
        let meeting = state.over;
        if state.waiting == self.count() {
            state.waiting = 0;
            state.over += 1;
            state.brought = state.parts.iter().flatten().cloned().collect();
            self.meeting.told.notify_all();
        }
        while state.over == meeting && !state.left {
            let waited = self.meeting.told.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
        if state.over == meeting {
            return Err(gone());
        }
        Ok(state.brought.clone())
    }

    /// Whether an error says no more than that another rank left.
    pub fn is_gone(error: &Error) -> bool {
        matches!(error, Error::Device { backend: GONE, .. })
    }

    /// Says that this rank will not come again, so that nobody waits for it. [`Rank::begin`] takes it back.
    pub fn leave(&self) {
        self.meeting.enter().left = true;
        self.meeting.told.notify_all();
    }

    /// All ranks begin anew. None of them is at work.
    pub fn begin(&self) {
        let mut state = self.meeting.enter();
        state.left = false;
        state.waiting = 0;
        state.parts.fill(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::Reference;
    use crate::tensor::DType;

    fn ranks(count: usize) -> Vec<Rank> {
        let device: Arc<dyn Backend> = Arc::new(Reference);
        Rank::all(&vec![device; count])
    }

    fn tensor(values: &[f32]) -> Tensor {
        let mut t = Reference.alloc(DType::F32, 1, values.len()).unwrap();
        Reference.write(values, &mut t).unwrap();
        t
    }

    #[test]
    fn sums_are_those_of_the_ranks_order_on_every_rank() {
        // In any other order the small numbers would be lost or kept otherwise.
        let parts = [[1.0e8_f32, 1.0], [3.0, -1.0e8], [-1.0e8, 1.0e8]];
        let expected = [0, 1].map(|i| (parts[0][i] + parts[1][i]) + parts[2][i]);
        for count in 1..=3 {
            let found: Vec<Vec<f32>> = std::thread::scope(|scope| {
                let run = |rank: Rank| {
                    move || {
                        let mut x = tensor(&parts[rank.index()]);
                        for _ in 0..2 {
                            Reference.write(&parts[rank.index()], &mut x).unwrap();
                            let room = std::array::from_fn(|_| tensor(&[0.0; 2]));
                            rank.all_reduce(&mut x, room).unwrap();
                        }
                        let mut values = vec![0.0; 2];
                        Reference.read(&x, &mut values).unwrap();
                        values
                    }
                };
                let threads: Vec<_> = ranks(count)
                    .into_iter()
                    .map(|rank| scope.spawn(run(rank)))
                    .collect();
                threads.into_iter().map(|t| t.join().unwrap()).collect()
            });
            match count {
                1 => assert_eq!(found[0], parts[0]),
                3 => assert!(found.iter().all(|f| *f == expected), "{found:?}"),
                _ => assert_eq!(found[0], found[1]),
            }
        }
    }

    #[test]
    fn nobody_waits_for_a_rank_that_left() {
        let [stays, leaves] = ranks(2).try_into().ok().unwrap();
        let room = || std::array::from_fn(|_| tensor(&[0.0]));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| stays.all_reduce(&mut tensor(&[1.0]), room()));
            leaves.leave();
            let error = waits.join().unwrap().unwrap_err().to_string();
            assert!(error.contains("another device failed"), "{error}");
        });
        stays.begin();
        std::thread::scope(|scope| {
            let one = scope.spawn(|| stays.all_reduce(&mut tensor(&[1.0]), room()));
            leaves.all_reduce(&mut tensor(&[1.0]), room()).unwrap();
            one.join().unwrap().unwrap();
        });
    }
}
