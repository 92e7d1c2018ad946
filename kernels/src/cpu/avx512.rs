//! AVX-512: sixteen lanes, and with `BF16` the dot product of 32 pairs.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::avx2::{sum128, sums128};
use super::portable::HALF_ROOT;
use super::simd::Simd;
use super::ymm::Ymm;
use crate::formats::fp8::VALUES as VALUES_OF_CODES;

/// A token that AVX-512 F, BW, DQ and VL are there, and BF16 if it says so.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const BF16: bool>;

type V = __m512;

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
            // the pointer; masked lanes are not touched.
            unsafe { $body }
        })*
    };
}

impl<const BF16: bool> Simd for Avx512<BF16> {
    type V = V;
    type Pairs = __m512i;
    type I = __m512i;
    const LANES: usize = 16;
    const ROWS: usize = 6;
    const BYTE_ROWS: usize = 6;
    const BF16_DOT: bool = BF16;

    op! {
        fn splat_i(x: i32) -> __m512i { _mm512_set1_epi32(x) }
        fn add_i(a: __m512i, b: __m512i) -> __m512i { _mm512_add_epi32(a, b) }
        fn mul_i(a: __m512i, b: __m512i) -> __m512i { _mm512_mullo_epi32(a, b) }
        fn to_f32(x: __m512i) -> V { _mm512_cvtepi32_ps(x) }
        fn halves(x: __m512i) -> V { _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)) }
        fn dot_words(acc: __m512i, w: __m512i, x: i32) -> __m512i {
            if BF16 {
                _mm512_dpwssd_epi32(acc, w, _mm512_set1_epi32(x))
            } else {
                _mm512_add_epi32(acc, _mm512_madd_epi16(w, _mm512_set1_epi32(x)))
            }
        }
        fn splat(x: f32) -> V { _mm512_set1_ps(x) }
        fn add(a: V, b: V) -> V { _mm512_add_ps(a, b) }
        fn sub(a: V, b: V) -> V { _mm512_sub_ps(a, b) }
        fn mul(a: V, b: V) -> V { _mm512_mul_ps(a, b) }
        fn div(a: V, b: V) -> V { _mm512_div_ps(a, b) }
        fn fma(a: V, b: V, c: V) -> V { _mm512_fmadd_ps(a, b, c) }
        fn min(a: V, b: V) -> V { _mm512_min_ps(a, b) }
        fn max(a: V, b: V) -> V { _mm512_max_ps(a, b) }
        fn round(x: V) -> V {
            _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x)
        }
        fn scale(x: V, n: V) -> V { _mm512_scalef_ps(x, n) }
        fn split(x: V) -> (V, V) {{
            let root = _mm512_set1_epi32(HALF_ROOT);
            let bits = _mm512_sub_epi32(_mm512_castps_si512(x), root);
            let m = _mm512_and_si512(bits, _mm512_set1_epi32(0x7f_ffff));
            (
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<23>(bits)),
                _mm512_castsi512_ps(_mm512_add_epi32(m, root)),
            )
        }}
        fn if_greater(a: V, b: V, yes: V, no: V) -> V {
            _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b), no, yes)
        }
        fn round_bf16(x: V) -> V { _mm512_castsi512_ps(rounded(x)) }
        fn sum(x: V) -> f32 { sum128(quarter(x)) }
        fn largest(x: V) -> f32 {{
            let x = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
            let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps::<1>(x, x)))
        }}
        fn sum4(x: [V; 4]) -> [f32; 4] {
            sums128(quarter(x[0]), quarter(x[1]), quarter(x[2]), quarter(x[3]))
        }
        fn dot_pairs(acc: V, x: __m512i, w: __m512i) -> V {{
            if !BF16 {
                unreachable!("a path without BF16 dot products was asked for one")
            }
            // Both types are the same 512 bits.
            let x = std::mem::transmute::<__m512i, __m512bh>(x);
            _mm512_dpbf16_ps(acc, x, std::mem::transmute::<__m512i, __m512bh>(w))
        }}
    }
    memory! {
        fn load(p: *const f32) -> V { _mm512_loadu_ps(p) }
        fn load_n(p: *const f32, n: usize) -> V { _mm512_maskz_loadu_ps(mask(n), p) }
        fn store(p: *mut f32, x: V) { _mm512_storeu_ps(p, x) }
        fn store_n(p: *mut f32, n: usize, x: V) { _mm512_mask_storeu_ps(p, mask(n), x) }
        fn load_bf16(p: *const bf16) -> V { widen(_mm256_loadu_si256(p.cast())) }
        fn load_bf16_n(p: *const bf16, n: usize) -> V {
            widen(_mm256_maskz_loadu_epi16(mask(n), p.cast()))
        }
        fn load_f16(p: *const f16) -> V { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
        fn load_f16_n(p: *const f16, n: usize) -> V {
            _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p.cast()))
        }
        fn store_bf16(p: *mut bf16, x: V) { _mm256_storeu_si256(p.cast(), narrow(x)) }
        fn store_bf16_n(p: *mut bf16, n: usize, x: V) {
            _mm256_mask_storeu_epi16(p.cast(), mask(n), narrow(x))
        }
        fn store_f16(p: *mut f16, x: V) {
            _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x))
        }
        fn store_f16_n(p: *mut f16, n: usize, x: V) {
            _mm256_mask_storeu_epi16(
                p.cast(),
                mask(n),
                _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x),
            )
        }
        fn load_e4m3(p: *const u8) -> V { e4m3(_mm_loadu_si128(p.cast())) }
        fn load_e4m3_n(p: *const u8, n: usize) -> V {
            e4m3(_mm_maskz_loadu_epi8(mask(n), p.cast()))
        }
        fn load_e4m3_pairs(p: *const u8) -> __m512i { e4m3_words(_mm256_loadu_si256(p.cast())) }
        fn load_e4m3_pairs_n(p: *const u8, n: usize) -> __m512i {
            e4m3_words(_mm256_maskz_loadu_epi8(((1u64 << n) - 1) as __mmask32, p.cast()))
        }
        fn store_pairs(p: *mut bf16, x: __m512i) { _mm512_storeu_si512(p.cast(), x) }
        fn load_pairs(p: *const bf16) -> __m512i { _mm512_loadu_si512(p.cast()) }
        fn load_pairs_n(p: *const bf16, n: usize) -> __m512i {
            _mm512_maskz_loadu_epi16(((1u64 << n) - 1) as __mmask32, p.cast())
        }
    }
    type Bytes = Ymm<BF16>;
    #[inline(always)]
    fn bytes(self) -> Ymm<BF16> {
        Ymm
    }
    #[inline(always)]
    unsafe fn load_i(self, p: *const i32) -> __m512i {
        // SAFETY: the caller has sixteen words there.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    fn dot_bytes<const WIDE: bool>(self, acc: __m512i, w: __m512i, x: i32) -> __m512i {
        // SAFETY: a token exists only where the features were found.
        unsafe {
            let x = _mm512_set1_epi32(x);
            if BF16 {
                return _mm512_dpbusd_epi32(acc, w, x);
            }
            // As in `avx2`.
            let ones = _mm512_set1_epi16(1);
            let low = if WIDE {
                _mm512_and_si512(w, _mm512_set1_epi8(127))
            } else {
                w
            };
            let sum = _mm512_madd_epi16(_mm512_maddubs_epi16(low, x), ones);
            let acc = _mm512_add_epi32(acc, sum);
            if !WIDE {
                return acc;
            }
            let high = _mm512_and_si512(w, _mm512_set1_epi8(-128));
            let sum = _mm512_madd_epi16(_mm512_maddubs_epi16(high, x), ones);
            _mm512_add_epi32(acc, sum)
        }
    }
    #[inline(always)]
    unsafe fn transpose(self, from: *const i32, pitch: usize, to: *mut i32) {
        // SAFETY: the caller has sixteen words in each of sixteen rows, and room for as many.
        unsafe {
            // Loops, not closures: those of sixteen elements are not always inlined.
            let mut row = [_mm512_setzero_si512(); 16];
            for (r, row) in row.iter_mut().enumerate() {
                *row = _mm512_loadu_si512(from.add(r * pitch).cast());
            }
            // Quarters of a register hold words of two, then of four rows.
            let mut two = row;
            for i in 0..8 {
                let (a, b) = (row[2 * i], row[2 * i + 1]);
                two[2 * i] = _mm512_unpacklo_epi32(a, b);
                two[2 * i + 1] = _mm512_unpackhi_epi32(a, b);
            }
            // Index 4g + w: word w of each quarter, of rows 4g to 4g + 3.
            let mut four = two;
            for g in 0..4 {
                for w in 0..2 {
                    let (a, b) = (two[4 * g + w], two[4 * g + w + 2]);
                    four[4 * g + 2 * w] = _mm512_unpacklo_epi64(a, b);
                    four[4 * g + 2 * w + 1] = _mm512_unpackhi_epi64(a, b);
                }
            }
            for w in 0..4 {
                let (a, b, c, d) = (four[w], four[4 + w], four[8 + w], four[12 + w]);
                // Quarters 0 and 2, or 1 and 3, of two groups of rows.
                let ab = _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
                let cd = _mm512_shuffle_i32x4::<0b10_00_10_00>(c, d);
                let ab_odd = _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b);
                let cd_odd = _mm512_shuffle_i32x4::<0b11_01_11_01>(c, d);
                let out = [
                    _mm512_shuffle_i32x4::<0b10_00_10_00>(ab, cd),
                    _mm512_shuffle_i32x4::<0b10_00_10_00>(ab_odd, cd_odd),
                    _mm512_shuffle_i32x4::<0b11_01_11_01>(ab, cd),
                    _mm512_shuffle_i32x4::<0b11_01_11_01>(ab_odd, cd_odd),
                ];
                for (quarter, out) in out.iter().enumerate() {
                    _mm512_storeu_si512(to.add(16 * (4 * quarter + w)).cast(), *out);
                }
            }
        }
    }
    #[inline(always)]
    fn prefetch<T>(self, p: *const T) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
}

/// The first `n` lanes.
#[inline(always)]
fn mask(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}

/// Halves added to each other, twice.
///
/// # Safety
/// The machine has AVX-512 F and DQ. This and the following are no `#[target_feature]` functions for
/// the reason given in `avx2`.
#[inline(always)]
unsafe fn quarter(x: V) -> __m128 {
    // SAFETY: the caller's promise.
    unsafe {
        let x = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
        _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x))
    }
}

/// The bits of `x` rounded to BF16, lower halves zero; a NaN stays one. Unlike the conversion
/// instruction this keeps denormal numbers.
///
/// # Safety
/// The machine has AVX-512 F.
#[inline(always)]
unsafe fn rounded(x: V) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let bits = _mm512_castps_si512(x);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        let nearest = _mm512_add_epi32(bits, up);
        let out = _mm512_mask_or_epi32(nearest, nan, bits, _mm512_set1_epi32(0x40_0000));
        _mm512_and_si512(out, _mm512_set1_epi32(0xffff_0000_u32 as i32))
    }
}

/// `x` as BF16.
///
/// # Safety
/// The machine has AVX-512 F.
#[inline(always)]
unsafe fn narrow(x: V) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe { _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded(x))) }
}

/// BF16 as f32.
///
/// # Safety
/// The machine has AVX-512 F.
#[inline(always)]
unsafe fn widen(x: __m256i) -> V {
    // SAFETY: the caller's promise.
    unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x))) }
}

/// E4M3 codes as f32, as in `avx2`.
///
/// # Safety
/// The machine has AVX-512 F, BW and VL.
#[inline(always)]
unsafe fn e4m3(codes: __m128i) -> V {
    // SAFETY: the caller's promise.
    unsafe {
        let bits = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(codes));
        let bits = _mm256_and_si256(bits, _mm256_set1_epi16(0xbf80_u16 as i16));
        let most = _mm256_set1_epi16(0x3f80);
        let nan = _mm256_cmpeq_epi16(_mm256_and_si256(bits, most), most);
        let halves = _mm512_cvtph_ps(_mm256_or_si256(bits, nan));
        _mm512_mul_ps(halves, _mm512_set1_ps(256.0))
    }
}

/// The BF16 numbers of the codes without their sign.
#[repr(align(64))]
struct Words([u16; 128]);

static WORDS: Words = {
    let mut words = [0; 128];
    let mut code = 0;
    while code < 128 {
        words[code] = (VALUES_OF_CODES[code].to_bits() >> 16) as u16;
        code += 1;
    }
    Words(words)
};

/// E4M3 codes as BF16: looked up.
///
/// # Safety
/// The machine has AVX-512 F and BW.
#[inline(always)]
unsafe fn e4m3_words(codes: __m256i) -> __m512i {
    // SAFETY: the caller's promise; the table has four vectors.
    unsafe {
        let table = WORDS.0.as_ptr();
        let part = |i: usize| _mm512_load_si512(table.add(32 * i).cast());
        let codes = _mm512_cvtepu8_epi16(codes);
        // The lower six bits choose among two vectors, the seventh between pairs of those.
        let low = _mm512_permutex2var_epi16(part(0), codes, part(1));
        let high = _mm512_permutex2var_epi16(part(2), codes, part(3));
        let upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x40));
        let size = _mm512_mask_blend_epi16(upper, low, high);
        let sign = _mm512_slli_epi16::<8>(codes);
        // size | (sign & 0x8000)
        _mm512_ternarylogic_epi32::<0xf8>(size, sign, _mm512_set1_epi16(i16::MIN))
    }
}
