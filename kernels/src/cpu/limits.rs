//! What the machine can do at most, measured: the yardstick for every kernel.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::Cpu;
use super::simd::{Kernel, Simd};

/// Sustained rates of all threads together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Bytes read from a buffer far larger than the caches, in the way that is fastest here: one place of each
    /// thread after the other, or several side by side.
    pub read_bytes_per_second: f64,
    /// Multiplications and additions of BF16 inputs summed in f32, from registers. On paths
    /// without BF16 dot products these are the f32 ones.
    pub bf16_flops_per_second: f64,
    /// Multiplications and additions of f32, from registers.
    pub f32_flops_per_second: f64,
}

/// Bytes that are read once for a measurement.
const BUFFER: usize = 640 << 20;
/// Measurements of each kind. Of reads the median counts: a bus shared with other work is at times
/// faster than it sustains. Of arithmetic the fastest: other work can only slow it down.
const RUNS: usize = 7;

/// Measures with the threads and the instruction set of `cpu`, in about a second.
pub fn measure(cpu: &Cpu) -> Limits {
    let threads = cpu.threads();
    // Ones, so that every page is really there.
    let buffer = vec![1.0f32; BUFFER / 4];
    // Several pieces a thread, as products have them.
    let piece = (buffer.len() / (8 * threads)).next_multiple_of(MOST_STREAMS * 64);
    let seconds: [_; 3] = times(&|streams| {
        cpu.pool().run(buffer.len().div_ceil(piece), |part, _| {
            let end = ((part + 1) * piece).min(buffer.len());
            let piece = &buffer[part * piece..end];
            match streams {
                0 => black_box(cpu.isa().launch(Read::<1>(piece))),
                1 => black_box(cpu.isa().launch(Read::<4>(piece))),
                _ => black_box(cpu.isa().launch(Read::<MOST_STREAMS>(piece))),
            };
        });
    });
    let fastest = seconds.map(|of_one| of_one[RUNS / 2]);
    let fastest = fastest.into_iter().fold(f64::INFINITY, f64::min);
    let read_bytes_per_second = BUFFER as f64 / fastest;
    let flops = |bf16: bool| {
        // Operations of one call, and how many calls fill some ten milliseconds.
        let run = |rounds: usize| {
            cpu.pool().run(threads, |_, _| {
                if bf16 {
                    black_box(cpu.isa().launch(Bf16Products(rounds)));
                } else {
                    black_box(cpu.isa().launch(F32Products(rounds)));
                }
            });
        };
        let mut rounds = 1 << 12;
        loop {
            let start = Instant::now();
            run(rounds);
            if start.elapsed() > Duration::from_millis(10) {
                break;
            }
            rounds *= 2;
        }
        let lanes = cpu.isa().launch(Lanes);
        let pairs = if bf16 && cpu.isa() == super::Isa::Avx512Bf16 {
            2
        } else {
            1
        };
        let operations = 2 * pairs * lanes * CHAINS * rounds * threads;
        let [seconds] = times(&|_| run(rounds));
        operations as f64 / seconds[0]
    };
    Limits {
        read_bytes_per_second,
        bf16_flops_per_second: flops(true),
        f32_flops_per_second: flops(false),
    }
}

/// Seconds that each of `N` ways of `f` takes, in turn and several times; of each the fastest first.
fn times<const N: usize>(f: &dyn Fn(usize)) -> [[f64; RUNS]; N] {
    let mut times = [[0.0; RUNS]; N];
    for run in 0..RUNS {
        for (way, times) in times.iter_mut().enumerate() {
            let start = Instant::now();
            f(way);
            times[run] = start.elapsed().as_secs_f64();
        }
    }
    for times in &mut times {
        times.sort_by(f64::total_cmp);
    }
    times
}

/// Most places that a thread reads from at once.
const MOST_STREAMS: usize = 8;
/// Sums that do not wait for each other.
const CHAINS: usize = 12;

/// A piece that is read at so many places side by side, as products read rows.
struct Read<'a, const STREAMS: usize>(&'a [f32]);

impl<const STREAMS: usize> Kernel for Read<'_, STREAMS> {
    type Out = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.splat(0.0); STREAMS];
        let stream = self.0.len() / STREAMS;
        for i in (0..stream).step_by(S::LANES) {
            for (c, sum) in sums.iter_mut().enumerate() {
                let at = self.0.as_ptr().wrapping_add(c * stream + i);
                s.prefetch(at.wrapping_add(1024));
                // SAFETY: a piece is a whole number of vectors for every stream.
                *sum = s.add(*sum, unsafe { s.load(at) });
            }
        }
        sums.into_iter().map(|sum| s.sum(sum)).sum()
    }
}

struct F32Products(usize);

impl Kernel for F32Products {
    type Out = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (a, b) = (s.splat(black_box(0.999)), s.splat(black_box(0.001)));
        let mut sums = [a; CHAINS];
        for _ in 0..self.0 {
            for sum in &mut sums {
                *sum = s.fma(*sum, a, b);
            }
        }
        sums.into_iter().map(|sum| s.sum(sum)).sum()
    }
}

struct Bf16Products(usize);

impl Kernel for Bf16Products {
    type Out = f32;
    const BF16_DOT: bool = true;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        if !S::BF16_DOT {
            return F32Products(self.0).run(s);
        }
        let ones = black_box([half::bf16::ONE; 64]);
        // SAFETY: the array holds the pairs of the widest vector.
        let pairs = unsafe { s.load_pairs(ones.as_ptr()) };
        let mut sums = [s.splat(0.0); CHAINS];
        for _ in 0..self.0 {
            for sum in &mut sums {
                *sum = s.dot_pairs(*sum, pairs, pairs);
            }
        }
        sums.into_iter().map(|sum| s.sum(sum)).sum()
    }
}

struct Lanes;

impl Kernel for Lanes {
    type Out = usize;
    #[inline(always)]
    fn run<S: Simd>(self, _s: S) -> usize {
        S::LANES
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::CpuOptions;

    #[test]
    fn limits_are_finite_and_positive() {
        let limits = measure(&Cpu::new(CpuOptions::default()));
        for rate in [
            limits.read_bytes_per_second,
            limits.bf16_flops_per_second,
            limits.f32_flops_per_second,
        ] {
            assert!(rate.is_finite() && rate > 1e6, "{limits:?}");
        }
    }
}
