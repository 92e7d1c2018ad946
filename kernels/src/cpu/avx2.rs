//! AVX2 with FMA and F16C: eight lanes.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::portable::{HALF_ROOT, first};
use super::simd::Simd;
use super::ymm::Ymm;

/// A token that AVX2, FMA and F16C are there.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

type V = __m256;

/// A method that is one expression of intrinsics.
macro_rules! op {
    ($(fn $name:ident($($arg:ident: $t:ty),*) -> $out:ty { $body:expr })*) => {
        $(#[inline(always)]
        fn $name(self, $($arg: $t),*) -> $out {
            // SAFETY: a token exists only where the features were found.
            unsafe { $body }
        })*
    };
}
/// The same with a pointer, for which the caller answers.
macro_rules! memory {
    ($(fn $name:ident($($arg:ident: $t:ty),*) $(-> $out:ty)? { $body:expr })*) => {
        $(#[inline(always)]
        unsafe fn $name(self, $($arg: $t),*) $(-> $out)? {
            // SAFETY: a token exists only where the features were found, and the caller answers for
            // the pointer.
            unsafe { $body }
        })*
    };
}

impl Simd for Avx2 {
    type V = V;
    type Pairs = ();
    type I = __m256i;
    const LANES: usize = 8;
    const ROWS: usize = 2;
    const BYTE_ROWS: usize = 2;

    op! {
        fn splat_i(x: i32) -> __m256i { _mm256_set1_epi32(x) }
        fn add_i(a: __m256i, b: __m256i) -> __m256i { _mm256_add_epi32(a, b) }
        fn mul_i(a: __m256i, b: __m256i) -> __m256i { _mm256_mullo_epi32(a, b) }
        fn to_f32(x: __m256i) -> V { _mm256_cvtepi32_ps(x) }
        fn halves(x: __m256i) -> V {{
            let words = _mm256_packus_epi32(_mm256_and_si256(x, _mm256_set1_epi32(0xffff)), x);
            let words = _mm256_permute4x64_epi64::<0b10_00>(words);
            _mm256_cvtph_ps(_mm256_castsi256_si128(words))
        }}
        fn dot_words(acc: __m256i, w: __m256i, x: i32) -> __m256i {
            _mm256_add_epi32(acc, _mm256_madd_epi16(w, _mm256_set1_epi32(x)))
        }
        fn splat(x: f32) -> V { _mm256_set1_ps(x) }
        fn add(a: V, b: V) -> V { _mm256_add_ps(a, b) }
        fn sub(a: V, b: V) -> V { _mm256_sub_ps(a, b) }
        fn mul(a: V, b: V) -> V { _mm256_mul_ps(a, b) }
        fn div(a: V, b: V) -> V { _mm256_div_ps(a, b) }
        fn fma(a: V, b: V, c: V) -> V { _mm256_fmadd_ps(a, b, c) }
        fn min(a: V, b: V) -> V { _mm256_min_ps(a, b) }
        fn max(a: V, b: V) -> V { _mm256_max_ps(a, b) }
        fn round(x: V) -> V {
            _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x)
        }
        fn scale(x: V, n: V) -> V {{
            // Two factors, so that neither leaves the range of exponents; only the second can round.
            let n = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(n);
            let bias = _mm256_set1_epi32(127);
            let first = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
            let rest = _mm256_add_epi32(_mm256_sub_epi32(n, half), bias);
            let second = _mm256_slli_epi32::<23>(rest);
            let x = _mm256_mul_ps(x, _mm256_castsi256_ps(first));
            _mm256_mul_ps(x, _mm256_castsi256_ps(second))
        }}
        fn split(x: V) -> (V, V) {{
            let root = _mm256_set1_epi32(HALF_ROOT);
            let bits = _mm256_sub_epi32(_mm256_castps_si256(x), root);
            let m = _mm256_and_si256(bits, _mm256_set1_epi32(0x7f_ffff));
            (
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<23>(bits)),
                _mm256_castsi256_ps(_mm256_add_epi32(m, root)),
            )
        }}
        fn if_greater(a: V, b: V, yes: V, no: V) -> V {
            _mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_GT_OQ>(a, b))
        }
        fn round_bf16(x: V) -> V { _mm256_castsi256_ps(rounded(x)) }
        fn sum(x: V) -> f32 { sum128(_mm_add_ps(low(x), high(x))) }
        fn largest(x: V) -> f32 {{
            let x = _mm_max_ps(low(x), high(x));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps::<1>(x, x)))
        }}
        fn sum4(x: [V; 4]) -> [f32; 4] {{
            sums128(
                _mm_add_ps(low(x[0]), high(x[0])),
                _mm_add_ps(low(x[1]), high(x[1])),
                _mm_add_ps(low(x[2]), high(x[2])),
                _mm_add_ps(low(x[3]), high(x[3])),
            )
        }}
    }
    memory! {
        fn load(p: *const f32) -> V { _mm256_loadu_ps(p) }
        fn load_n(p: *const f32, n: usize) -> V { _mm256_maskload_ps(p, mask(n)) }
        fn store(p: *mut f32, x: V) { _mm256_storeu_ps(p, x) }
        fn store_n(p: *mut f32, n: usize, x: V) { _mm256_maskstore_ps(p, mask(n), x) }
        fn load_bf16(p: *const bf16) -> V { widen(_mm_loadu_si128(p.cast())) }
        fn load_bf16_n(p: *const bf16, n: usize) -> V {
            widen(_mm_loadu_si128(first::<_, 8>(p, n, bf16::ZERO).as_ptr().cast()))
        }
        fn load_f16(p: *const f16) -> V { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
        fn load_f16_n(p: *const f16, n: usize) -> V {
            _mm256_cvtph_ps(_mm_loadu_si128(first::<_, 8>(p, n, f16::ZERO).as_ptr().cast()))
        }
        fn load_e4m3(p: *const u8) -> V { e4m3(_mm_loadl_epi64(p.cast())) }
        fn load_e4m3_n(p: *const u8, n: usize) -> V {
            e4m3(_mm_loadl_epi64(first::<_, 8>(p, n, 0).as_ptr().cast()))
        }
        fn store_bf16(p: *mut bf16, x: V) { _mm_storeu_si128(p.cast(), narrow(x)) }
        fn store_bf16_n(p: *mut bf16, n: usize, x: V) { store_words(p, n, narrow(x)) }
        fn store_f16(p: *mut f16, x: V) {
            _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x))
        }
        fn store_f16_n(p: *mut f16, n: usize, x: V) {
            store_words(p, n, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x))
        }
    }
    type Bytes = Ymm<false>;
    #[inline(always)]
    fn bytes(self) -> Ymm<false> {
        Ymm
    }
    #[inline(always)]
    unsafe fn load_i(self, p: *const i32) -> __m256i {
        // SAFETY: the caller has eight words there.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    fn dot_bytes<const WIDE: bool>(self, acc: __m256i, w: __m256i, x: i32) -> __m256i {
        // SAFETY: a token exists only where the features were found.
        unsafe {
            let (x, ones) = (_mm256_set1_epi32(x), _mm256_set1_epi16(1));
            // Pairs are summed in 16 bits, which hold 2 · 127 · 128.
            let low = if WIDE {
                _mm256_and_si256(w, _mm256_set1_epi8(127))
            } else {
                w
            };
            let sum = _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), ones);
            let acc = _mm256_add_epi32(acc, sum);
            if !WIDE {
                return acc;
            }
            let high = _mm256_and_si256(w, _mm256_set1_epi8(-128));
            let sum = _mm256_madd_epi16(_mm256_maddubs_epi16(high, x), ones);
            _mm256_add_epi32(acc, sum)
        }
    }
    #[inline(always)]
    fn prefetch<T>(self, p: *const T) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
}

/// A helper of intrinsics. Not a `#[target_feature]` function: those cannot be inlined always, and a
/// call in an inner loop would pass vectors through memory.
macro_rules! helper {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $t:ty),*) -> $out:ty { $($body:tt)* })*) => {
        $($(#[$doc])*
        ///
        /// # Safety
        /// The machine has AVX2.
        #[inline(always)]
        pub(super) unsafe fn $name($($arg: $t),*) -> $out {
            // SAFETY: the caller's promise.
            unsafe { $($body)* }
        })*
    };
}

helper! {
    /// The first eight E4M3 codes, widened. As the bits of an F16 they are 2^-8 of themselves, but for NaN.
    fn e4m3(codes: __m128i) -> V {
        let bits = _mm_slli_epi16::<7>(_mm_cvtepi8_epi16(codes));
        // Bit 14, the highest of the exponent, holds a copy of the sign.
        let bits = _mm_and_si128(bits, _mm_set1_epi16(0xbf80_u16 as i16));
        let most = _mm_set1_epi16(0x3f80);
        let nan = _mm_cmpeq_epi16(_mm_and_si128(bits, most), most);
        _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(bits, nan)), _mm256_set1_ps(256.0))
    }
    /// The first four lanes.
    fn low(x: V) -> __m128 { _mm256_castps256_ps128(x) }
    /// The last four lanes.
    fn high(x: V) -> __m128 { _mm256_extractf128_ps::<1>(x) }
    /// (x₀ + x₂) + (x₁ + x₃).
    fn sum128(x: __m128) -> f32 {
        let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps::<1>(x, x)))
    }
    /// `sum128` of four vectors, by the same additions.
    fn sums128(a: __m128, b: __m128, c: __m128, d: __m128) -> [f32; 4] {
        // (a₀ + a₂, a₁ + a₃, b₀ + b₂, b₁ + b₃), and c and d likewise.
        let ab = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
        let cd = _mm_add_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
        let sums = _mm_add_ps(
            _mm_shuffle_ps::<0b10_00_10_00>(ab, cd),
            _mm_shuffle_ps::<0b11_01_11_01>(ab, cd),
        );
        let mut out = [0.0; 4];
        _mm_storeu_ps(out.as_mut_ptr(), sums);
        out
    }
    /// Ones in the first `n` lanes.
    fn mask(n: usize) -> __m256i {
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), lanes)
    }
    /// The bits of `x` rounded to BF16, lower halves zero; a NaN stays one.
    fn rounded(x: V) -> __m256i {
        let bits = _mm256_castps_si256(x);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        let nearest = _mm256_castsi256_ps(_mm256_add_epi32(bits, up));
        let quiet = _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000)));
        let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x);
        let out = _mm256_castps_si256(_mm256_blendv_ps(nearest, quiet, nan));
        _mm256_and_si256(out, _mm256_set1_epi32(0xffff_0000_u32 as i32))
    }
    /// `x` as BF16.
    fn narrow(x: V) -> __m128i {
        let words = _mm256_srli_epi32::<16>(rounded(x));
        _mm_packus_epi32(
            _mm256_castsi256_si128(words),
            _mm256_extracti128_si256::<1>(words),
        )
    }
    /// BF16 as f32.
    fn widen(x: __m128i) -> V {
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(x)))
    }
}

/// Writes the first `n` of eight elements of two bytes.
///
/// # Safety
/// `p` points to `n` ≤ 8 elements of two bytes, and the machine has AVX2.
#[inline(always)]
unsafe fn store_words<T>(p: *mut T, n: usize, x: __m128i) {
    let mut words = [0u16; 8];
    // SAFETY: `words` has room for the register, and the caller for `n` of them.
    unsafe {
        _mm_storeu_si128(words.as_mut_ptr().cast(), x);
        std::ptr::copy_nonoverlapping(words.as_ptr(), p.cast(), n);
    }
}
