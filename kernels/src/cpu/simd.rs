//! The vector operations that kernels are written in, once for all instruction sets.
//!
//! A kernel is a struct that implements [`Kernel`]; [`Isa::launch`] runs it with the token of an
//! instruction set. All methods are inlined into the launch function, which enables the features.

use half::{bf16, f16};

use super::bytes::Bytes;
use crate::tensor::{DType, Element};

/// A fast path, from the plainest to the widest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust that the compiler vectorises.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The same with dot products of BF16 and, as every such machine has them, of bytes (VNNI).
    Avx512Bf16,
}

impl Isa {
    /// The paths that this machine can run, plainest first.
    pub fn available() -> Vec<Isa> {
        [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16]
            .into_iter()
            .filter(|isa| isa.is_available())
            .collect()
    }

    /// The name that `Cpu::features` gives.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512bf16",
        }
    }

    /// Lanes of its vectors.
    pub(crate) fn lanes(self) -> usize {
        match self {
            Isa::Portable | Isa::Avx2 => 8,
            Isa::Avx512 | Isa::Avx512Bf16 => 16,
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn is_available(self) -> bool {
        use std::arch::is_x86_feature_detected as has;
        let avx2 = has!("avx2") && has!("fma") && has!("f16c");
        let avx512 =
            avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
        match self {
            Isa::Portable => true,
            Isa::Avx2 => avx2,
            Isa::Avx512 => avx512,
            Isa::Avx512Bf16 => avx512 && has!("avx512bf16") && has!("avx512vnni"),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn is_available(self) -> bool {
        self == Isa::Portable
    }

    /// The widest path of this machine, at most `ceiling`.
    pub(crate) fn best(ceiling: Option<Isa>) -> Isa {
        Isa::available()
            .into_iter()
            .rfind(|isa| ceiling.is_none_or(|c| *isa <= c))
            .unwrap_or(Isa::Portable)
    }

    /// Runs `kernel` on this path. Only paths from [`Isa::available`] may be launched.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn launch<K: Kernel>(self, kernel: K) -> K::Out {
        use super::{avx2::Avx2, avx512::Avx512};

        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2<K: Kernel>(kernel: K) -> K::Out {
            kernel.run(Avx2)
        }
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
        fn avx512<K: Kernel>(kernel: K) -> K::Out {
            kernel.run(Avx512::<false>)
        }
        #[target_feature(
            enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni"
        )]
        fn avx512_bf16<K: Kernel>(kernel: K) -> K::Out {
            kernel.run(Avx512::<true>)
        }
        // SAFETY: `Cpu` holds only paths whose features were found on this machine.
        unsafe {
            match self {
                Isa::Portable => kernel.run(super::portable::Portable),
                Isa::Avx2 => avx2(kernel),
                Isa::Avx512 => avx512(kernel),
                Isa::Avx512Bf16 if K::BF16_DOT => avx512_bf16(kernel),
                Isa::Avx512Bf16 => avx512(kernel),
            }
        }
    }

    /// Runs `kernel` on this path.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn launch<K: Kernel>(self, kernel: K) -> K::Out {
        kernel.run(super::portable::Portable)
    }
}

/// Work that runs on any instruction set.
pub(crate) trait Kernel {
    /// What it returns.
    type Out;
    /// Whether it has a form of its own for dot products of BF16 or of bytes.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // read by `launch` there
    const BF16_DOT: bool = false;
    /// The work. Implementations are `#[inline(always)]`, as is all they call in an inner loop.
    fn run<S: Simd>(self, s: S) -> Self::Out;
}

/// An instruction set. A value exists only inside [`Isa::launch`].
///
/// Pointers: `load` and `store` touch `LANES` elements, `load_n` and `store_n` the first `n` < `LANES`;
/// the caller answers for those being in bounds. Lanes that `load_n` does not read are zero.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// A vector of f32.
    type V: Copy;
    /// Its width.
    const LANES: usize;
    /// Rows of x in the largest register tile of a product with four columns.
    const ROWS: usize;
    /// Whether `dot_bf16` is there.
    const BF16_DOT: bool = false;

    fn splat(self, x: f32) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b + c.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The smaller; `b` when one is not a number.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// The larger; `b` when one is not a number.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The nearest integer, for |x| < 2²².
    fn round(self, x: Self::V) -> Self::V;
    /// x · 2ⁿ, rounded once, for integers |n| ≤ 250.
    fn scale(self, x: Self::V, n: Self::V) -> Self::V;
    /// For a positive normal x: e and m with x = m · 2ᵉ and √½ ≤ m < √2.
    fn split(self, x: Self::V) -> (Self::V, Self::V);
    /// In each lane, `yes` where a > b, else `no`.
    fn if_greater(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V;
    /// Rounded to BF16, to nearest even.
    fn round_bf16(self, x: Self::V) -> Self::V;
    /// The sum of all lanes: halves are added to each other until one lane is left.
    fn sum(self, x: Self::V) -> f32;
    /// The largest lane.
    fn largest(self, x: Self::V) -> f32;
    /// Four sums at once, each the same bits as from `sum`.
    #[inline(always)]
    fn sum4(self, x: [Self::V; 4]) -> [f32; 4] {
        [
            self.sum(x[0]),
            self.sum(x[1]),
            self.sum(x[2]),
            self.sum(x[3]),
        ]
    }

    unsafe fn load(self, p: *const f32) -> Self::V;
    unsafe fn load_n(self, p: *const f32, n: usize) -> Self::V;
    unsafe fn store(self, p: *mut f32, x: Self::V);
    unsafe fn store_n(self, p: *mut f32, n: usize, x: Self::V);
    unsafe fn load_bf16(self, p: *const bf16) -> Self::V;
    unsafe fn load_bf16_n(self, p: *const bf16, n: usize) -> Self::V;
    unsafe fn load_f16(self, p: *const f16) -> Self::V;
    unsafe fn load_f16_n(self, p: *const f16, n: usize) -> Self::V;
    /// Rounded to nearest even.
    unsafe fn store_bf16(self, p: *mut bf16, x: Self::V);
    unsafe fn store_bf16_n(self, p: *mut bf16, n: usize, x: Self::V);
    /// Rounded to nearest even.
    unsafe fn store_f16(self, p: *mut f16, x: Self::V);
    unsafe fn store_f16_n(self, p: *mut f16, n: usize, x: Self::V);

    /// E4M3 codes (`formats::fp8`), widened.
    unsafe fn load_e4m3(self, p: *const u8) -> Self::V;
    unsafe fn load_e4m3_n(self, p: *const u8, n: usize) -> Self::V;

    /// `2 · LANES` BF16 values as they lie in memory.
    type Pairs: Copy;
    /// Loads them.
    #[inline(always)]
    unsafe fn load_pairs(self, _p: *const bf16) -> Self::Pairs {
        unreachable!("a path without BF16 dot products was asked for one")
    }
    /// Loads the first `n`, the others zero.
    #[inline(always)]
    unsafe fn load_pairs_n(self, _p: *const bf16, _n: usize) -> Self::Pairs {
        unreachable!("a path without BF16 dot products was asked for one")
    }
    /// As many E4M3 codes, widened to BF16.
    #[inline(always)]
    unsafe fn load_e4m3_pairs(self, _p: *const u8) -> Self::Pairs {
        unreachable!("a path without BF16 dot products was asked for one")
    }
    /// The first `n`, the others zero.
    #[inline(always)]
    unsafe fn load_e4m3_pairs_n(self, _p: *const u8, _n: usize) -> Self::Pairs {
        unreachable!("a path without BF16 dot products was asked for one")
    }
    /// Stores `2 · LANES` of them.
    #[inline(always)]
    unsafe fn store_pairs(self, _p: *mut bf16, _x: Self::Pairs) {
        unreachable!("a path without BF16 dot products was asked for one")
    }
    /// acc plus the products of pairs.
    #[inline(always)]
    fn dot_pairs(self, _acc: Self::V, _x: Self::Pairs, _w: Self::Pairs) -> Self::V {
        unreachable!("a path without BF16 dot products was asked for one")
    }

    /// A vector of `LANES` i32.
    type I: Copy;
    /// Rows of x in the largest register tile of a product with two vectors of columns.
    const BYTE_ROWS: usize;
    fn splat_i(self, x: i32) -> Self::I;
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    fn mul_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// To the nearest f32.
    fn to_f32(self, x: Self::I) -> Self::V;
    /// The f16 in the lower half of each lane.
    fn halves(self, x: Self::I) -> Self::V;
    unsafe fn load_i(self, p: *const i32) -> Self::I;
    /// Each lane of acc plus the products of its four bytes of `w`, not negative, with those of `x`. Bytes
    /// of `w` from 128 on are allowed only if `WIDE`; bytes of x are at least -127.
    fn dot_bytes<const WIDE: bool>(self, acc: Self::I, w: Self::I, x: i32) -> Self::I;
    /// Each lane of acc plus the products of its two i16 of `w` with those of `x`.
    fn dot_words(self, acc: Self::I, w: Self::I, x: i32) -> Self::I;
    /// `LANES` words of each of `LANES` rows, `pitch` words apart, to a vector for each word.
    #[inline(always)]
    unsafe fn transpose(self, from: *const i32, pitch: usize, to: *mut i32) {
        for j in 0..Self::LANES {
            for r in 0..Self::LANES {
                // SAFETY: the caller has these words.
                unsafe { *to.add(j * Self::LANES + r) = *from.add(r * pitch + j) }
            }
        }
    }

    /// Whether products of few rows are faster with those.
    const BYTES: bool = true;
    /// The vectors of 32 bytes that go with it.
    type Bytes: Bytes;
    fn bytes(self) -> Self::Bytes;

    /// Asks for the cache line at `p`, soon to be read. Any address is allowed.
    #[inline(always)]
    fn prefetch<T>(self, _p: *const T) {}
}

/// The first `n` ≤ `LANES` elements at `p`, the other lanes zero.
///
/// # Safety
/// `p` points to `n` elements.
#[inline(always)]
pub(crate) unsafe fn load<S: Simd>(s: S, p: *const f32, n: usize) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        if n == S::LANES {
            s.load(p)
        } else {
            s.load_n(p, n)
        }
    }
}

/// Writes the first `n` ≤ `LANES` lanes to `p`.
///
/// # Safety
/// `p` points to `n` elements.
#[inline(always)]
pub(crate) unsafe fn store<S: Simd>(s: S, p: *mut f32, n: usize, x: S::V) {
    // SAFETY: the caller's promise.
    unsafe {
        if n == S::LANES {
            s.store(p, x)
        } else {
            s.store_n(p, n, x)
        }
    }
}

/// Floating-point element types, widened on loading.
pub(crate) trait Float: Element {
    /// `LANES` elements.
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V;
    /// The first `n`.
    unsafe fn load_n<S: Simd>(s: S, p: *const Self, n: usize) -> S::V;
    /// `LANES` elements, rounded to nearest even.
    unsafe fn store<S: Simd>(s: S, p: *mut Self, x: S::V);
    /// The first `n`.
    unsafe fn store_n<S: Simd>(s: S, p: *mut Self, n: usize, x: S::V);
}

macro_rules! float {
    ($t:ty: $load:ident, $load_n:ident, $store:ident, $store_n:ident) => {
        impl Float for $t {
            #[inline(always)]
            unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V {
                // SAFETY: the caller's promise is the same.
                unsafe { s.$load(p) }
            }
            #[inline(always)]
            unsafe fn load_n<S: Simd>(s: S, p: *const Self, n: usize) -> S::V {
                // SAFETY: as above.
                unsafe { s.$load_n(p, n) }
            }
            #[inline(always)]
            unsafe fn store<S: Simd>(s: S, p: *mut Self, x: S::V) {
                // SAFETY: as above.
                unsafe { s.$store(p, x) }
            }
            #[inline(always)]
            unsafe fn store_n<S: Simd>(s: S, p: *mut Self, n: usize, x: S::V) {
                // SAFETY: as above.
                unsafe { s.$store_n(p, n, x) }
            }
        }
    };
}
float!(f32: load, load_n, store, store_n);
float!(bf16: load_bf16, load_bf16_n, store_bf16, store_bf16_n);
float!(f16: load_f16, load_f16_n, store_f16, store_f16_n);

/// Runs `$body` with `$t` standing for the element type of `$dtype`.
macro_rules! with_float {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            $crate::tensor::DType::F32 => {
                type $t = f32;
                $body
            }
            $crate::tensor::DType::BF16 => {
                type $t = half::bf16;
                $body
            }
            $crate::tensor::DType::F16 => {
                type $t = half::f16;
                $body
            }
            $crate::tensor::DType::I32 | $crate::tensor::DType::U8 => {
                unreachable!("the operation's check refuses integers")
            }
        }
    };
}
pub(crate) use with_float;

/// Widens a row. Both slices have the same length.
#[inline(always)]
pub(crate) fn widen<S: Simd, T: Float>(s: S, from: &[T], to: &mut [f32]) {
    assert_eq!(from.len(), to.len());
    let whole = from.len() / S::LANES * S::LANES;
    // SAFETY: both slices have `from.len()` elements, and `whole` is a multiple of the vector width.
    unsafe {
        for i in (0..whole).step_by(S::LANES) {
            s.store(to.as_mut_ptr().add(i), T::load(s, from.as_ptr().add(i)));
        }
        let rest = from.len() - whole;
        if rest > 0 {
            let x = T::load_n(s, from.as_ptr().add(whole), rest);
            s.store_n(to.as_mut_ptr().add(whole), rest, x);
        }
    }
}

/// Rounds a row to nearest even. Both slices have the same length.
#[inline(always)]
pub(crate) fn narrow<S: Simd, T: Float>(s: S, from: &[f32], to: &mut [T]) {
    assert_eq!(from.len(), to.len());
    let whole = from.len() / S::LANES * S::LANES;
    // SAFETY: both slices have `from.len()` elements, and `whole` is a multiple of the vector width.
    unsafe {
        for i in (0..whole).step_by(S::LANES) {
            T::store(s, to.as_mut_ptr().add(i), s.load(from.as_ptr().add(i)));
        }
        let rest = from.len() - whole;
        if rest > 0 {
            let x = s.load_n(from.as_ptr().add(whole), rest);
            T::store_n(s, to.as_mut_ptr().add(whole), rest, x);
        }
    }
}

/// Whether BF16 weights meet BF16 inputs in BF16 dot products.
pub(crate) fn dots_bf16(isa: Isa, weight: DType, activations: DType) -> bool {
    isa == Isa::Avx512Bf16 && weight == DType::BF16 && activations == DType::BF16
}
