//! Threads that share the parts of an operation.
//!
//! A job has a fixed number of parts, and what a part computes never depends on who computes it.
//! Threads take parts one by one, so a thread that the system has put aside holds up no more than
//! the part it has, and one that sleeps holds up nothing. Waiting is spinning for some tens of
//! microseconds, the usual gap between two operations, and sleeping after that: a busy neighbour on
//! the cores then gets them.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use super::scratch::Scratch;

/// How long a thread spins before it sleeps.
const SPIN: Duration = Duration::from_micros(40);

/// A number of threads, the caller's among them.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One job at a time; the caller's own scratch.
    caller: Mutex<Scratch>,
}

/// What the threads of a pool see.
struct Shared {
    /// The number of the job, above; how many of its parts nobody has taken yet, below.
    tickets: AtomicU64,
    /// Parts of the job that are not finished.
    unfinished: AtomicUsize,
    /// Written by the caller while no part is taken, read by those who hold a part.
    job: UnsafeCell<Option<Job>>,
    /// Workers that sleep or are about to.
    sleeping: AtomicUsize,
    /// The caller sleeps or is about to.
    caller_sleeps: AtomicBool,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written only by the holder of `Pool::caller` while `unfinished` is zero, and read
// only by threads that hold a ticket of it, which `unfinished` counts.
unsafe impl Sync for Shared {}
// SAFETY: a job's closure is `Sync`, and its pointer is used only while the caller waits for it.
unsafe impl Send for Shared {}

struct Job {
    parts: usize,
    /// The closure, its type forgotten.
    closure: *const (),
    call: unsafe fn(*const (), usize, &mut Scratch),
    caller: Thread,
}

impl Pool {
    /// A pool of `threads`, at least one. With one there are no workers; where the system grants
    /// fewer, there are fewer.
    pub(crate) fn new(threads: usize) -> Pool {
        let shared = Arc::new(Shared {
            tickets: AtomicU64::new(0),
            unfinished: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            sleeping: AtomicUsize::new(0),
            caller_sleeps: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let workers = (1..threads)
            .map_while(|i| {
                let shared = shared.clone();
                std::thread::Builder::new()
                    .name(format!("strata-cpu-{i}"))
                    .spawn(move || shared.work())
                    .ok()
            })
            .collect();
        Pool {
            shared,
            workers,
            caller: Mutex::default(),
        }
    }

    /// Number of threads, the caller's among them.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f` once for each of `0..parts`, on any of the threads, and returns when all are done.
    /// Each thread has a scratch of its own. A panic in a part is resumed here, after the others.
    ///
    /// `f` must not call `run` of the same pool.
    pub(crate) fn run<F: Fn(usize, &mut Scratch) + Sync>(&self, parts: usize, f: F) {
        let mut scratch = self.caller();
        if self.workers.is_empty() || parts <= 1 {
            (0..parts).for_each(|part| f(part, &mut scratch));
            return;
        }
        /// Gives the closure its type back.
        unsafe fn call<F: Fn(usize, &mut Scratch)>(f: *const (), part: usize, s: &mut Scratch) {
            // SAFETY: `f` came from a reference to an `F` that the caller of `run` still holds.
            unsafe { (*f.cast::<F>())(part, s) }
        }
        let shared = &*self.shared;
        assert!(u32::try_from(parts).is_ok(), "{parts} parts");
        // SAFETY: we hold `caller`, and the job before this one is finished, so nobody reads.
        unsafe {
            *shared.job.get() = Some(Job {
                parts,
                closure: (&raw const f).cast(),
                call: call::<F>,
                caller: std::thread::current(),
            });
        }
        shared.unfinished.store(parts, Ordering::Relaxed);
        let number = (shared.tickets.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        // Sequentially consistent, as is the count of sleepers: either we see that one is about to
        // sleep, or it sees the job.
        shared
            .tickets
            .store(number << 32 | parts as u64, Ordering::SeqCst);
        if shared.sleeping.load(Ordering::SeqCst) > 0 {
            self.workers.iter().for_each(|w| w.thread().unpark());
        }
        shared.take_parts(&mut scratch);
        shared.wait_for_the_others();
        let panic = lock(&shared.panic).take();
        drop(scratch);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// The caller's scratch. No job runs while it is held.
    fn caller(&self) -> MutexGuard<'_, Scratch> {
        lock(&self.caller)
    }
}

/// A panic leaves nothing half done in what these locks guard.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Computes parts until none is left to take.
    fn take_parts(&self, scratch: &mut Scratch) {
        let mut tickets = self.tickets.load(Ordering::Acquire);
        while tickets as u32 > 0 {
            // The number of the job is part of the comparison: a late thread takes nothing of a
            // job that it has not looked at.
            let taken = self.tickets.compare_exchange_weak(
                tickets,
                tickets - 1,
                Ordering::AcqRel,
                Ordering::Acquire,
            );
            match taken {
                Ok(_) => {
                    self.compute(tickets as u32 as usize, scratch);
                    tickets = self.tickets.load(Ordering::Acquire);
                }
                Err(now) => tickets = now,
            }
        }
    }

    /// Computes the part whose ticket was the last of `left`.
    fn compute(&self, left: usize, scratch: &mut Scratch) {
        // SAFETY: we hold a ticket, so the job stays as it is until we count it as finished.
        let job = unsafe { (*self.job.get()).as_ref() }.expect("a ticket has a job");
        let caller = job.caller.clone();
        // SAFETY: the caller waits in `run`, where the closure lives.
        let part = || unsafe { (job.call)(job.closure, job.parts - left, scratch) };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(part)) {
            *lock(&self.panic) = Some(panic);
        }
        // Sequentially consistent, as is the caller's flag: either it sees the zero, or we the flag.
        let last = self.unfinished.fetch_sub(1, Ordering::SeqCst) == 1;
        if last && self.caller_sleeps.load(Ordering::SeqCst) {
            caller.unpark();
        }
    }

    fn wait_for_the_others(&self) {
        let done = || self.unfinished.load(Ordering::Acquire) == 0;
        if spin_until(done) {
            return;
        }
        self.caller_sleeps.store(true, Ordering::SeqCst);
        while self.unfinished.load(Ordering::SeqCst) != 0 {
            std::thread::park();
        }
        self.caller_sleeps.store(false, Ordering::SeqCst);
    }

    /// The life of a worker.
    fn work(&self) {
        let mut scratch = Scratch::default();
        let parts_left = |order| self.tickets.load(order) as u32 > 0;
        while !self.stop.load(Ordering::Relaxed) {
            self.take_parts(&mut scratch);
            if spin_until(|| parts_left(Ordering::Acquire) || self.stop.load(Ordering::Relaxed)) {
                continue;
            }
            self.sleeping.fetch_add(1, Ordering::SeqCst);
            if !parts_left(Ordering::SeqCst) && !self.stop.load(Ordering::SeqCst) {
                std::thread::park();
            }
            self.sleeping.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// Spins for a while; whether `done` came true meanwhile.
fn spin_until(done: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        for _ in 0..32 {
            if done() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > SPIN {
            return false;
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // Parts catch their panics, so workers end without one.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_runs_once() {
        for threads in 1..5 {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for parts in [0, 1, 2, 3, 7, 100] {
                let counts: Vec<AtomicUsize> = (0..parts).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..50 {
                    pool.run(parts, |i, _| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    });
                }
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 50));
            }
        }
    }

    #[test]
    fn workers_wake_after_sleeping() {
        let pool = Pool::new(3);
        for _ in 0..20 {
            std::thread::sleep(SPIN * 3);
            let sum = AtomicUsize::new(0);
            pool.run(8, |i, _| {
                std::thread::sleep(Duration::from_micros(if i % 3 == 0 { 200 } else { 0 }));
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.load(Ordering::Relaxed), 28);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        for threads in [1, 3] {
            let pool = Pool::new(threads);
            for _ in 0..5 {
                let run = || pool.run(6, |i, _| assert!(i != 4, "part four"));
                let panic = catch_unwind(AssertUnwindSafe(run)).expect_err("part four panics");
                let text = panic.downcast_ref::<&str>().expect("a plain message");
                assert!(text.contains("part four"));
                pool.run(4, |_, _| ());
            }
        }
    }

    #[test]
    fn several_callers_take_turns() {
        let pool = Pool::new(2);
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        pool.run(5, |i, _| {
                            sum.fetch_add(i, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(sum.load(Ordering::Relaxed), 3 * 100 * 10);
    }
}
