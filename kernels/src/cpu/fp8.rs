//! Products with rows of E4M3 codes and a scale: those of the codes, widened in registers or into panels, as
//! products with BF16 and f32 are. A whole sum is multiplied by its row's scale: `formats::fp8` has the formula.

use half::bf16;

use super::dot::{Pairs, Product, Widened};
use super::simd::Simd;
use crate::formats::fp8;

/// f32 times codes.
pub(crate) struct Codes;

// SAFETY of the blocks below: each method's caller answers for its pointers.
impl<S: Simd> Product<S> for Codes {
    type X = f32;
    type W = u8;
    type Packed = Widened<f32>;
    type Xs = S::V;
    type Ws = S::V;
    const STEP: usize = S::LANES;
    const BLOCK: usize = <Widened<f32> as Product<S>>::BLOCK;
    const SCALED: bool = true;
    #[inline(always)]
    fn scale(row: &[u8]) -> f32 {
        fp8::scale(row)
    }
    #[inline(always)]
    unsafe fn x(s: S, p: *const f32) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load(p) }
    }
    #[inline(always)]
    unsafe fn x_n(s: S, p: *const f32, n: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_n(p, n) }
    }
    #[inline(always)]
    unsafe fn w(s: S, p: *const u8) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_e4m3(p) }
    }
    #[inline(always)]
    unsafe fn w_n(s: S, p: *const u8, n: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_e4m3_n(p, n) }
    }
    #[inline(always)]
    fn multiply_add(s: S, x: S::V, w: S::V, acc: S::V) -> S::V {
        s.fma(x, w, acc)
    }
    #[inline(always)]
    unsafe fn pack(s: S, from: *const u8, n: usize, to: *mut f32) {
        // SAFETY: the caller's promise; a panel has room for whole steps.
        unsafe {
            let w = if n == S::LANES {
                s.load_e4m3(from)
            } else {
                s.load_e4m3_n(from, n)
            };
            s.store(to, w);
        }
    }
}

/// BF16 times codes by the machine's dot product.
pub(crate) struct CodePairs;

impl<S: Simd> Product<S> for CodePairs {
    type X = bf16;
    type W = u8;
    type Packed = Pairs;
    type Xs = S::Pairs;
    type Ws = S::Pairs;
    const STEP: usize = 2 * S::LANES;
    const BLOCK: usize = <Pairs as Product<S>>::BLOCK;
    const SCALED: bool = true;
    #[inline(always)]
    fn scale(row: &[u8]) -> f32 {
        fp8::scale(row)
    }
    #[inline(always)]
    unsafe fn x(s: S, p: *const bf16) -> S::Pairs {
        // SAFETY: the caller's promise.
        unsafe { s.load_pairs(p) }
    }
    #[inline(always)]
    unsafe fn x_n(s: S, p: *const bf16, n: usize) -> S::Pairs {
        // SAFETY: the caller's promise.
        unsafe { s.load_pairs_n(p, n) }
    }
    #[inline(always)]
    unsafe fn w(s: S, p: *const u8) -> S::Pairs {
        // SAFETY: the caller's promise.
        unsafe { s.load_e4m3_pairs(p) }
    }
    #[inline(always)]
    unsafe fn w_n(s: S, p: *const u8, n: usize) -> S::Pairs {
        // SAFETY: the caller's promise.
        unsafe { s.load_e4m3_pairs_n(p, n) }
    }
    #[inline(always)]
    fn multiply_add(s: S, x: S::Pairs, w: S::Pairs, acc: S::V) -> S::V {
        s.dot_pairs(acc, x, w)
    }
    #[inline(always)]
    unsafe fn pack(s: S, from: *const u8, n: usize, to: *mut bf16) {
        // SAFETY: the caller's promise; a panel has room for whole steps.
        unsafe {
            let w = if n == 2 * S::LANES {
                s.load_e4m3_pairs(from)
            } else {
                s.load_e4m3_pairs_n(from, n)
            };
            s.store_pairs(to, w);
        }
    }
}
