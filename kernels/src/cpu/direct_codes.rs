//! What the blocks of each format hold, as vectors of codes and as scales of eight columns: see `direct`.

use super::bytes::{Bytes, TILE};
use super::direct::{Block32, Block256, Header, Minima};
use crate::formats::iq4::{VALUES, run_scale};

/// Formats of 32 elements, and the expression of their codes.
macro_rules! blocks {
    ($($name:ident: $bytes:literal, $minima:literal, $signed:literal, |$v:ident, $p:ident| $codes:expr;)*) => {$(
        pub(super) struct $name;
        impl Block32 for $name {
            const BYTES: usize = $bytes;
            const MINIMA: bool = $minima;
            const SIGNED: bool = $signed;
            #[inline(always)]
            unsafe fn codes<V: Bytes>($v: V, $p: *const u8) -> V::B {
                // SAFETY: the caller has the block.
                unsafe { $codes }
            }
        }
    )*};
}
blocks! {
    Q8_0: 34, false, true, |v, p| v.load(p.add(2));
    Q4_0: 18, false, false, |v, p| v.nibbles(p.add(2));
    Q4_1: 20, true, false, |v, p| v.nibbles(p.add(4));
    Q5_0: 22, false, false, |v, p| {
        let high = v.fifths(p.add(2).cast::<u32>().read_unaligned());
        v.or(v.nibbles(p.add(6)), high)
    };
    Q5_1: 24, true, false, |v, p| {
        let high = v.fifths(p.add(4).cast::<u32>().read_unaligned());
        v.or(v.nibbles(p.add(8)), high)
    };
    Iq4Nl: 18, false, true, |v, p| v.lookup(values(v), v.nibbles(p.add(2)));
}

/// What codes of four bits stand for.
#[inline(always)]
fn values<V: Bytes>(v: V) -> V::B {
    // SAFETY: there are sixteen.
    unsafe { v.load_twice(VALUES.as_ptr().cast()) }
}

/// Codes of four bits of four pieces of 32 bytes: the lower ones of each, then the upper ones.
///
/// # Safety
/// `p` points to 128 bytes.
#[inline(always)]
unsafe fn fours<V: Bytes>(v: V, p: *const u8) -> [V::B; 8] {
    let mut out = [v.zero(); 8];
    let four = v.splat_byte(15);
    for j in 0..4 {
        // SAFETY: the caller's promise.
        let x = unsafe { v.load(p.add(32 * j)) };
        out[2 * j] = v.and(x, four);
        out[2 * j + 1] = v.and(v.right::<4>(x), four);
    }
    out
}

/// The header that q4_k and q5_k share: d, m, and six bits for each scale and minimum.
///
/// # Safety
/// There are 16 bytes at `p`.
#[inline(always)]
unsafe fn six_bits<V: Bytes>(v: V, p: [*const u8; TILE]) -> Header<V> {
    // SAFETY: the caller's promise.
    let [d, first, second, third] = unsafe { v.across(p) };
    let (six, four) = (v.splat_byte(0x3f), v.splat_byte(15));
    let high = v.splat_byte(0x30);
    let last = |low, above| v.or(v.and(low, four), v.and(v.right::<2>(above), high));
    let scales = [v.and(first, six), last(third, first)];
    let minima = [v.and(second, six), last(v.right::<4>(third), second)];
    Header {
        scales: v.along([scales[0], scales[1], v.zero(), v.zero()]),
        minima: Minima::Eight(minima),
        d: v.low_halves(d),
        m: v.high_halves(d),
    }
}

pub(super) struct Q4K;

impl Block256 for Q4K {
    const BYTES: usize = 144;
    const RUN: usize = 32;
    #[inline(always)]
    unsafe fn header<V: Bytes>(v: V, p: [*const u8; TILE]) -> Header<V> {
        // SAFETY: the caller's promise.
        unsafe { six_bits(v, p) }
    }
    #[inline(always)]
    unsafe fn codes<V: Bytes>(v: V, p: *const u8) -> [V::B; 8] {
        // SAFETY: the caller's promise.
        unsafe { fours(v, p.add(16)) }
    }
}

pub(super) struct Q5K;

impl Block256 for Q5K {
    const BYTES: usize = 176;
    const RUN: usize = 32;
    #[inline(always)]
    unsafe fn header<V: Bytes>(v: V, p: [*const u8; TILE]) -> Header<V> {
        // SAFETY: the caller's promise.
        unsafe { six_bits(v, p) }
    }
    #[inline(always)]
    unsafe fn codes<V: Bytes>(v: V, p: *const u8) -> [V::B; 8] {
        // SAFETY: the caller's promise.
        let (low, high) = unsafe { (fours(v, p.add(48)), v.load(p.add(16))) };
        // Bit i of each byte is the fifth of its code in vector i.
        let fifth = v.splat_byte(16);
        [
            v.or(low[0], v.and(v.left::<4>(high), fifth)),
            v.or(low[1], v.and(v.left::<3>(high), fifth)),
            v.or(low[2], v.and(v.left::<2>(high), fifth)),
            v.or(low[3], v.and(v.left::<1>(high), fifth)),
            v.or(low[4], v.and(high, fifth)),
            v.or(low[5], v.and(v.right::<1>(high), fifth)),
            v.or(low[6], v.and(v.right::<2>(high), fifth)),
            v.or(low[7], v.and(v.right::<3>(high), fifth)),
        ]
    }
}

pub(super) struct Q6K;

impl Block256 for Q6K {
    const BYTES: usize = 210;
    const RUN: usize = 16;
    const OFFSET: Option<usize> = Some(5);
    #[inline(always)]
    unsafe fn header<V: Bytes>(v: V, p: [*const u8; TILE]) -> Header<V> {
        let mut scales = [[0; 16]; TILE];
        // SAFETY: the caller's promise.
        unsafe {
            for (scales, p) in scales.iter_mut().zip(p) {
                *scales = p.add(192).cast::<[u8; 16]>().read();
            }
            Header {
                scales,
                minima: Minima::None,
                d: v.halves(p.map(|p| p.add(208))),
                m: v.splat(0.0),
            }
        }
    }
    #[inline(always)]
    unsafe fn codes<V: Bytes>(v: V, p: *const u8) -> [V::B; 8] {
        let mut out = [v.zero(); 8];
        let (four, high) = (v.splat_byte(15), v.splat_byte(0x30));
        for half in 0..2 {
            // SAFETY: the caller's promise.
            let (first, second, above) = unsafe {
                (
                    v.load(p.add(64 * half)),
                    v.load(p.add(64 * half + 32)),
                    v.load(p.add(128 + 32 * half)),
                )
            };
            let at = 4 * half;
            out[at] = v.or(v.and(first, four), v.and(v.left::<4>(above), high));
            out[at + 1] = v.or(v.and(second, four), v.and(v.left::<2>(above), high));
            let (first, second) = (v.right::<4>(first), v.right::<4>(second));
            out[at + 2] = v.or(v.and(first, four), v.and(above, high));
            out[at + 3] = v.or(v.and(second, four), v.and(v.right::<2>(above), high));
        }
        out
    }
}

/// Codes of two bits of two pieces of 32 bytes.
///
/// # Safety
/// `p` points to 64 bytes.
#[inline(always)]
unsafe fn twos<V: Bytes>(v: V, p: *const u8) -> [V::B; 8] {
    let mut out = [v.zero(); 8];
    let two = v.splat_byte(3);
    for half in 0..2 {
        // SAFETY: the caller's promise.
        let x = unsafe { v.load(p.add(32 * half)) };
        out[4 * half] = v.and(x, two);
        out[4 * half + 1] = v.and(v.right::<2>(x), two);
        out[4 * half + 2] = v.and(v.right::<4>(x), two);
        out[4 * half + 3] = v.and(v.right::<6>(x), two);
    }
    out
}

pub(super) struct Q3K;

impl Block256 for Q3K {
    const BYTES: usize = 110;
    const RUN: usize = 16;
    const OFFSET: Option<usize> = Some(2);
    #[inline(always)]
    unsafe fn header<V: Bytes>(v: V, p: [*const u8; TILE]) -> Header<V> {
        // SAFETY: the caller's promise.
        let (low, second, high, d) = unsafe {
            let at = |at: usize| p.map(|p| p.add(at));
            (
                v.lanes(at(96)),
                v.lanes(at(100)),
                v.lanes(at(104)),
                v.halves(at(108)),
            )
        };
        let (four, above) = (v.splat_byte(15), v.splat_byte(0x30));
        let offset = v.splat_byte(32);
        let join = |low, high| v.sub_bytes(v.or(v.and(low, four), v.and(high, above)), offset);
        let scales = [
            join(low, v.left::<4>(high)),
            join(second, v.left::<2>(high)),
            join(v.right::<4>(low), high),
            join(v.right::<4>(second), v.right::<2>(high)),
        ];
        Header {
            scales: v.along(scales),
            minima: Minima::None,
            d,
            m: v.splat(0.0),
        }
    }
    #[inline(always)]
    unsafe fn codes<V: Bytes>(v: V, p: *const u8) -> [V::B; 8] {
        // SAFETY: the caller's promise.
        let (low, high) = unsafe { (twos(v, p.add(32)), v.load(p)) };
        // Bit i of each byte is the third of its code in vector i.
        let third = v.splat_byte(4);
        [
            v.or(low[0], v.and(v.left::<2>(high), third)),
            v.or(low[1], v.and(v.left::<1>(high), third)),
            v.or(low[2], v.and(high, third)),
            v.or(low[3], v.and(v.right::<1>(high), third)),
            v.or(low[4], v.and(v.right::<2>(high), third)),
            v.or(low[5], v.and(v.right::<3>(high), third)),
            v.or(low[6], v.and(v.right::<4>(high), third)),
            v.or(low[7], v.and(v.right::<5>(high), third)),
        ]
    }
}

pub(super) struct Q2K;

impl Block256 for Q2K {
    const BYTES: usize = 84;
    const RUN: usize = 16;
    #[inline(always)]
    unsafe fn header<V: Bytes>(v: V, p: [*const u8; TILE]) -> Header<V> {
        let (mut scales, mut minima) = ([[0; 16]; TILE], [[0; 16]; TILE]);
        for ((scales, minima), p) in scales.iter_mut().zip(&mut minima).zip(p) {
            // SAFETY: the caller's promise.
            let both = unsafe { p.cast::<[u8; 16]>().read() };
            *scales = both.map(|x| x & 15);
            *minima = both.map(|x| x >> 4);
        }
        // SAFETY: the caller's promise.
        let d = unsafe { v.lanes(p.map(|p| p.add(80))) };
        Header {
            scales,
            minima: Minima::Sixteen(minima),
            d: v.low_halves(d),
            m: v.high_halves(d),
        }
    }
    #[inline(always)]
    unsafe fn codes<V: Bytes>(v: V, p: *const u8) -> [V::B; 8] {
        // SAFETY: the caller's promise.
        unsafe { twos(v, p.add(16)) }
    }
}

pub(super) struct Iq4Xs;

impl Block256 for Iq4Xs {
    const BYTES: usize = 136;
    const RUN: usize = 32;
    const SIGNED: bool = true;
    #[inline(always)]
    unsafe fn header<V: Bytes>(v: V, p: [*const u8; TILE]) -> Header<V> {
        let mut scales = [[0; 16]; TILE];
        for (scales, p) in scales.iter_mut().zip(p) {
            // SAFETY: the caller's promise.
            let b = unsafe { &*p.cast::<[u8; 8]>() };
            for (run, scale) in scales[..8].iter_mut().enumerate() {
                *scale = run_scale(b, run).cast_unsigned();
            }
        }
        Header {
            scales,
            minima: Minima::None,
            // SAFETY: the caller's promise.
            d: unsafe { v.halves(p) },
            m: v.splat(0.0),
        }
    }
    #[inline(always)]
    unsafe fn codes<V: Bytes>(v: V, p: *const u8) -> [V::B; 8] {
        let mut out = [v.zero(); 8];
        for (i, out) in out.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *out = unsafe { v.lookup(values(v), v.nibbles(p.add(8 + 16 * i))) };
        }
        out
    }
}
