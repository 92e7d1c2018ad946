//! Vectors as small arrays, which the compiler turns into whatever the machine has.

use half::{bf16, f16};

use super::bytes::Plain32;
use super::simd::Simd;
use crate::formats::fp8::VALUES;

/// Eight lanes of plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

const LANES: usize = 8;
type V = [f32; LANES];

#[inline(always)]
fn zip(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// Adding and taking away this rounds to an integer, whose bits then end the sum's.
const ROUND: f32 = 12_582_912.0;

impl Simd for Portable {
    type V = V;
    type Pairs = ();
    const LANES: usize = LANES;
    const ROWS: usize = 2;

    const BYTES: bool = false;
    type Bytes = Plain32;
    #[inline(always)]
    fn bytes(self) -> Plain32 {
        Plain32
    }
    #[inline(always)]
    fn splat(self, x: f32) -> V {
        [x; LANES]
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        std::array::from_fn(|i| {
            // Without the instruction, `mul_add` is a slow call.
            if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
                a[i].mul_add(b[i], c[i])
            } else {
                a[i] * b[i] + c[i]
            }
        })
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn round(self, x: V) -> V {
        x.map(|x| (x + ROUND) - ROUND)
    }
    #[inline(always)]
    fn scale(self, x: V, n: V) -> V {
        // Two factors, so that neither leaves the range of exponents; only the second can round.
        zip(x, n, |x, n| {
            let n = (n + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
            let half = n >> 1;
            let power = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
            x * power(half) * power(n - half)
        })
    }
    #[inline(always)]
    fn split(self, x: V) -> (V, V) {
        let bits = x.map(|x| (x.to_bits() as i32) - HALF_ROOT);
        (
            bits.map(|b| (b >> 23) as f32),
            bits.map(|b| f32::from_bits(((b & 0x7f_ffff) + HALF_ROOT) as u32)),
        )
    }
    #[inline(always)]
    fn if_greater(self, a: V, b: V, yes: V, no: V) -> V {
        std::array::from_fn(|i| if a[i] > b[i] { yes[i] } else { no[i] })
    }
    #[inline(always)]
    fn round_bf16(self, x: V) -> V {
        x.map(|x| f32::from_bits(u32::from(to_bf16(x)) << 16))
    }
    #[inline(always)]
    fn sum(self, x: V) -> f32 {
        let four: [f32; 4] = std::array::from_fn(|i| x[i] + x[i + 4]);
        (four[0] + four[2]) + (four[1] + four[3])
    }
    #[inline(always)]
    fn largest(self, x: V) -> f32 {
        x.into_iter()
            .fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a })
    }

    type I = [i32; LANES];
    const BYTE_ROWS: usize = 2;
    #[inline(always)]
    fn splat_i(self, x: i32) -> Self::I {
        [x; LANES]
    }
    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    fn mul_i(self, a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|i| a[i].wrapping_mul(b[i]))
    }
    #[inline(always)]
    fn to_f32(self, x: Self::I) -> V {
        x.map(|x| x as f32)
    }
    #[inline(always)]
    fn halves(self, x: Self::I) -> V {
        x.map(|x| f16::from_bits(x as u16).to_f32())
    }
    #[inline(always)]
    unsafe fn load_i(self, p: *const i32) -> Self::I {
        // SAFETY: the caller has `LANES` elements there.
        unsafe { p.cast::<Self::I>().read_unaligned() }
    }
    #[inline(always)]
    fn dot_bytes<const WIDE: bool>(self, acc: Self::I, w: Self::I, x: i32) -> Self::I {
        let x = x.to_le_bytes().map(|x| i32::from(x.cast_signed()));
        std::array::from_fn(|i| {
            let w = w[i].to_le_bytes().map(i32::from);
            acc[i] + (w[0] * x[0] + w[1] * x[1]) + (w[2] * x[2] + w[3] * x[3])
        })
    }
    #[inline(always)]
    fn dot_words(self, acc: Self::I, w: Self::I, x: i32) -> Self::I {
        let (low, high) = (i32::from(x as i16), x >> 16);
        std::array::from_fn(|i| acc[i] + i32::from(w[i] as i16) * low + (w[i] >> 16) * high)
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> V {
        // SAFETY: the caller has `LANES` elements there.
        unsafe { p.cast::<V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_n(self, p: *const f32, n: usize) -> V {
        // SAFETY: the caller has `n` elements there.
        unsafe { first(p, n, 0.0) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: V) {
        // SAFETY: the caller has `LANES` elements there.
        unsafe { p.cast::<V>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn store_n(self, p: *mut f32, n: usize, x: V) {
        // SAFETY: the caller has `n` ≤ `LANES` elements there.
        unsafe { std::ptr::copy_nonoverlapping(x.as_ptr(), p, n) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> V {
        // SAFETY: the caller has `LANES` elements there.
        let x = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        x.map(|x| f32::from_bits(u32::from(x) << 16))
    }
    #[inline(always)]
    unsafe fn load_bf16_n(self, p: *const bf16, n: usize) -> V {
        // SAFETY: the caller has `n` elements there.
        unsafe { first(p, n, bf16::ZERO) }.map(|x| f32::from_bits(u32::from(x.to_bits()) << 16))
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> V {
        // SAFETY: the caller has `LANES` elements there.
        unsafe { p.cast::<[f16; LANES]>().read_unaligned() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_f16_n(self, p: *const f16, n: usize) -> V {
        // SAFETY: the caller has `n` elements there.
        unsafe { first(p, n, f16::ZERO) }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_e4m3(self, p: *const u8) -> V {
        // SAFETY: the caller has `LANES` elements there.
        unsafe { p.cast::<[u8; LANES]>().read_unaligned() }.map(|c| VALUES[usize::from(c)])
    }
    #[inline(always)]
    unsafe fn load_e4m3_n(self, p: *const u8, n: usize) -> V {
        // SAFETY: the caller has `n` elements there.
        unsafe { first::<_, LANES>(p, n, 0) }.map(|c| VALUES[usize::from(c)])
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, x: V) {
        // SAFETY: the caller has `LANES` elements there.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(x.map(to_bf16)) }
    }
    #[inline(always)]
    unsafe fn store_bf16_n(self, p: *mut bf16, n: usize, x: V) {
        // SAFETY: the caller has `n` ≤ `LANES` elements there.
        unsafe { std::ptr::copy_nonoverlapping(x.map(to_bf16).as_ptr(), p.cast(), n) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16, x: V) {
        // SAFETY: the caller has `LANES` elements there.
        unsafe {
            p.cast::<[f16; LANES]>()
                .write_unaligned(x.map(f16::from_f32))
        }
    }
    #[inline(always)]
    unsafe fn store_f16_n(self, p: *mut f16, n: usize, x: V) {
        // SAFETY: the caller has `n` ≤ `LANES` elements there.
        unsafe { std::ptr::copy_nonoverlapping(x.map(f16::from_f32).as_ptr(), p, n) }
    }
}

/// The bits of √½: numbers from there to √2 have the same distance's upper bits.
pub(crate) const HALF_ROOT: i32 = 0x3f35_04f3;

/// Nearest even; a NaN stays one.
#[inline(always)]
fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let nan = (bits >> 16) | 0x40;
    (if x.is_nan() { nan } else { rounded }) as u16
}

/// The first `n` of `LANES` elements, the others `rest`.
///
/// # Safety
/// `p` points to `n` elements, at most `LANES`.
#[inline(always)]
pub(crate) unsafe fn first<T: Copy, const L: usize>(p: *const T, n: usize, rest: T) -> [T; L] {
    let mut out = [rest; L];
    // SAFETY: the caller's promise, and `n` ≤ `L`.
    unsafe { std::ptr::copy_nonoverlapping(p, out.as_mut_ptr(), n) };
    out
}
