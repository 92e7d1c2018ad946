//! Vectors of 32 bytes by AVX2, and with `VNNI` by its dot products.

use std::arch::x86_64::*;

use super::bytes::{Bytes, TILE};

/// A token that AVX2 and F16C are there, and AVX-512 VNNI with VL if it says so.
#[derive(Clone, Copy)]
pub(crate) struct Ymm<const VNNI: bool>;

type B = __m256i;

/// A method that is one expression of intrinsics.
macro_rules! op {
    ($(fn $name:ident $([$n:ident])? ($($arg:ident: $t:ty),*) -> $out:ty { $($body:tt)* })*) => {
        $(#[inline(always)]
        fn $name $(<const $n: i32>)? (self, $($arg: $t),*) -> $out {
            // SAFETY: a token exists only where the features were found.
            unsafe { $($body)* }
        })*
    };
}
/// The same with a pointer, for which the caller answers.
macro_rules! memory {
    ($(fn $name:ident($($arg:ident: $t:ty),*) -> $out:ty { $($body:tt)* })*) => {
        $(#[inline(always)]
        unsafe fn $name(self, $($arg: $t),*) -> $out {
            // SAFETY: a token exists only where the features were found, and the caller answers for
            // the pointer.
            unsafe { $($body)* }
        })*
    };
}

impl<const VNNI: bool> Bytes for Ymm<VNNI> {
    type B = B;
    type F = __m256;

    op! {
        fn zero() -> B { _mm256_setzero_si256() }
        fn splat_byte(x: u8) -> B { _mm256_set1_epi8(x.cast_signed()) }
        fn splat_lane(x: i32) -> B { _mm256_set1_epi32(x) }
        fn fifths(bits: u32) -> B {
            // Byte i of the vector looks at bit i % 8 of byte i / 8.
            let place = _mm256_setr_epi64x(
                0,
                0x0101_0101_0101_0101,
                0x0202_0202_0202_0202,
                0x0303_0303_0303_0303,
            );
            let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64.cast_signed());
            let x = _mm256_shuffle_epi8(_mm256_set1_epi32(bits.cast_signed()), place);
            let set = _mm256_cmpeq_epi8(_mm256_and_si256(x, bit), bit);
            _mm256_and_si256(set, _mm256_set1_epi8(16))
        }
        fn and(a: B, b: B) -> B { _mm256_and_si256(a, b) }
        fn or(a: B, b: B) -> B { _mm256_or_si256(a, b) }
        fn right[N](x: B) -> B { _mm256_srli_epi16::<N>(x) }
        fn left[N](x: B) -> B { _mm256_slli_epi16::<N>(x) }
        fn left_lanes[N](x: B) -> B { _mm256_slli_epi32::<N>(x) }
        fn sub_bytes(a: B, b: B) -> B { _mm256_sub_epi8(a, b) }
        fn add_lanes(a: B, b: B) -> B { _mm256_add_epi32(a, b) }
        fn sub_lanes(a: B, b: B) -> B { _mm256_sub_epi32(a, b) }
        fn lookup(table: B, index: B) -> B { _mm256_shuffle_epi8(table, index) }
        fn first_twice(x: B) -> B { _mm256_permute4x64_epi64::<0b01_00_01_00>(x) }
        fn second_twice(x: B) -> B { _mm256_permute4x64_epi64::<0b11_10_11_10>(x) }
        fn pairs(w: B, x: B) -> B { _mm256_maddubs_epi16(w, x) }
        fn pairs_signed(w: B, x: B) -> B {
            // Magnitudes, and x with the signs of w: two products are at most 2 · 128 · 127.
            _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
        }
        fn fours(w: B, x: B) -> B { fours::<VNNI>(w, x) }
        fn fours_signed(w: B, x: B) -> B {
            fours::<VNNI>(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
        }
        fn add_words(acc: B, a: B, b: B) -> B {
            if VNNI {
                _mm256_dpwssd_epi32(acc, a, b)
            } else {
                _mm256_add_epi32(acc, _mm256_madd_epi16(a, b))
            }
        }
        fn sums(x: [B; TILE]) -> B {
            // In each half lanes of (0, 1, 0, 1), and so on.
            let two = [
                add_pairs(x[0], x[1]),
                add_pairs(x[2], x[3]),
                add_pairs(x[4], x[5]),
                add_pairs(x[6], x[7]),
            ];
            // In each half lanes of (0, 1, 2, 3), and of (4, 5, 6, 7).
            let first = _mm256_add_epi32(
                _mm256_unpacklo_epi64(two[0], two[1]),
                _mm256_unpackhi_epi64(two[0], two[1]),
            );
            let second = _mm256_add_epi32(
                _mm256_unpacklo_epi64(two[2], two[3]),
                _mm256_unpackhi_epi64(two[2], two[3]),
            );
            _mm256_add_epi32(
                _mm256_permute2x128_si256::<0x20>(first, second),
                _mm256_permute2x128_si256::<0x31>(first, second),
            )
        }
        fn along(x: [B; 4]) -> [[u8; 16]; TILE] {
            let rows = transposed(x);
            let mut out = [[0; 16]; TILE];
            for (c, row) in rows.iter().enumerate() {
                _mm_storeu_si128(out[c].as_mut_ptr().cast(), _mm256_castsi256_si128(*row));
                let high = _mm256_extracti128_si256::<1>(*row);
                _mm_storeu_si128(out[c + 4].as_mut_ptr().cast(), high);
            }
            out
        }
        fn low_halves(x: B) -> __m256 { halves(_mm256_and_si256(x, _mm256_set1_epi32(0xffff))) }
        fn high_halves(x: B) -> __m256 { halves(_mm256_srli_epi32::<16>(x)) }
        fn splat(x: f32) -> __m256 { _mm256_set1_ps(x) }
        fn to_f32(x: B) -> __m256 { _mm256_cvtepi32_ps(x) }
        fn add(a: __m256, b: __m256) -> __m256 { _mm256_add_ps(a, b) }
        fn sub(a: __m256, b: __m256) -> __m256 { _mm256_sub_ps(a, b) }
        fn mul(a: __m256, b: __m256) -> __m256 { _mm256_mul_ps(a, b) }
        fn to_array(x: __m256) -> [f32; TILE] {
            let mut out = [0.0; TILE];
            _mm256_storeu_ps(out.as_mut_ptr(), x);
            out
        }
    }
    memory! {
        fn load(p: *const u8) -> B { _mm256_loadu_si256(p.cast()) }
        fn load_twice(p: *const u8) -> B { _mm256_broadcastsi128_si256(_mm_loadu_si128(p.cast())) }
        fn load_words(p: *const u8) -> B { _mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast())) }
        fn nibbles(p: *const u8) -> B {
            let x = _mm256_broadcastsi128_si256(_mm_loadu_si128(p.cast()));
            let x = _mm256_srlv_epi64(x, _mm256_setr_epi64x(0, 0, 4, 4));
            _mm256_and_si256(x, _mm256_set1_epi8(15))
        }
        fn across(from: [*const u8; TILE]) -> [B; 4] {
            let mut rows = [_mm256_setzero_si256(); 4];
            for (c, row) in rows.iter_mut().enumerate() {
                let low = _mm256_castsi128_si256(_mm_loadu_si128(from[c].cast()));
                *row = _mm256_inserti128_si256::<1>(low, _mm_loadu_si128(from[c + 4].cast()));
            }
            transposed(rows)
        }
        fn lanes(from: [*const u8; TILE]) -> B {
            let mut half = [_mm_setzero_si128(); 2];
            for (i, half) in half.iter_mut().enumerate() {
                let at = |c: usize| from[4 * i + c].cast::<i32>().read_unaligned();
                *half = _mm_cvtsi32_si128(at(0));
                *half = _mm_insert_epi32::<1>(*half, at(1));
                *half = _mm_insert_epi32::<2>(*half, at(2));
                *half = _mm_insert_epi32::<3>(*half, at(3));
            }
            _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(half[0]), half[1])
        }
        fn halves(from: [*const u8; TILE]) -> __m256 {
            // Two chains of insertions.
            let mut half = [_mm_setzero_si128(); 2];
            for (i, half) in half.iter_mut().enumerate() {
                let at = |c: usize| i32::from(from[4 * i + c].cast::<i16>().read_unaligned());
                *half = _mm_cvtsi32_si128(at(0));
                *half = _mm_insert_epi16::<1>(*half, at(1));
                *half = _mm_insert_epi16::<2>(*half, at(2));
                *half = _mm_insert_epi16::<3>(*half, at(3));
            }
            _mm256_cvtph_ps(_mm_unpacklo_epi64(half[0], half[1]))
        }
    }
}

/// Helpers of intrinsics: no `#[target_feature]` functions for the reason given in `avx2`.
///
/// # Safety
/// The machine has AVX2 and F16C.
#[inline(always)]
unsafe fn halves(x: B) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        let words = _mm256_permute4x64_epi64::<0b10_00>(_mm256_packus_epi32(x, x));
        _mm256_cvtph_ps(_mm256_castsi256_si128(words))
    }
}

/// # Safety
/// As of `halves`; and the machine has VNNI where it says so.
#[inline(always)]
unsafe fn fours<const VNNI: bool>(w: B, x: B) -> B {
    // SAFETY: the caller's promise.
    unsafe {
        if VNNI {
            _mm256_dpbusd_epi32(_mm256_setzero_si256(), w, x)
        } else {
            _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1))
        }
    }
}

/// Lanes 0 + 2 of a, those of b, 1 + 3 of a, those of b, in each half.
///
/// # Safety
/// As of `halves`.
#[inline(always)]
unsafe fn add_pairs(a: B, b: B) -> B {
    // SAFETY: the caller's promise.
    unsafe { _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)) }
}

/// In each half, four rows of four lanes become columns.
///
/// # Safety
/// As of `halves`.
#[inline(always)]
unsafe fn transposed(x: [B; 4]) -> [B; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let (a, b) = (
            _mm256_unpacklo_epi32(x[0], x[1]),
            _mm256_unpackhi_epi32(x[0], x[1]),
        );
        let (c, d) = (
            _mm256_unpacklo_epi32(x[2], x[3]),
            _mm256_unpackhi_epi32(x[2], x[3]),
        );
        [
            _mm256_unpacklo_epi64(a, c),
            _mm256_unpackhi_epi64(a, c),
            _mm256_unpacklo_epi64(b, d),
            _mm256_unpackhi_epi64(b, d),
        ]
    }
}
