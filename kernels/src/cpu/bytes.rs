//! Vectors of 32 bytes, in which rows of a weight in blocks meet rounded inputs where they lie.
//!
//! Integers are exact on every path, so the paths agree to the bit. [`Plain32`] says what each operation
//! does; `ymm` has the instructions.

use half::f16;

/// Columns of a tile: a vector of i32 or f32 holds a number for each.
pub(crate) const TILE: usize = 8;

/// Vectors of 32 bytes, also seen as 16 i16 (words) or as 8 i32 (lanes), and vectors of 8 f32.
///
/// Pointers: the caller answers for what is read and written being there.
pub(crate) trait Bytes: Copy {
    /// 32 bytes.
    type B: Copy;
    /// Eight f32.
    type F: Copy;

    fn zero(self) -> Self::B;
    /// This byte in all places.
    fn splat_byte(self, x: u8) -> Self::B;
    /// This i32 in all lanes.
    fn splat_lane(self, x: i32) -> Self::B;
    /// 32 bytes.
    unsafe fn load(self, p: *const u8) -> Self::B;
    /// 16 bytes, in both halves.
    unsafe fn load_twice(self, p: *const u8) -> Self::B;
    /// 16 i8, widened to words.
    unsafe fn load_words(self, p: *const u8) -> Self::B;
    /// The lower four bits of 16 bytes, then the upper ones.
    unsafe fn nibbles(self, p: *const u8) -> Self::B;
    /// 16 in each byte whose bit is set.
    fn fifths(self, bits: u32) -> Self::B;
    fn and(self, a: Self::B, b: Self::B) -> Self::B;
    fn or(self, a: Self::B, b: Self::B) -> Self::B;
    /// Words shifted to the right: bits of one byte come into the other.
    fn right<const N: i32>(self, x: Self::B) -> Self::B;
    /// Words shifted to the left.
    fn left<const N: i32>(self, x: Self::B) -> Self::B;
    /// Lanes shifted to the left.
    fn left_lanes<const N: i32>(self, x: Self::B) -> Self::B;
    /// Bytes less bytes.
    fn sub_bytes(self, a: Self::B, b: Self::B) -> Self::B;
    fn add_lanes(self, a: Self::B, b: Self::B) -> Self::B;
    fn sub_lanes(self, a: Self::B, b: Self::B) -> Self::B;
    /// In each half, the bytes of `table` that `index` names; 0 where it is at least 128.
    fn lookup(self, table: Self::B, index: Self::B) -> Self::B;
    /// The first half twice.
    fn first_twice(self, x: Self::B) -> Self::B;
    /// The second half twice.
    fn second_twice(self, x: Self::B) -> Self::B;
    /// Words that sum two products of bytes: of `w`, from 0 to 127, with those of `x`.
    fn pairs(self, w: Self::B, x: Self::B) -> Self::B;
    /// The same of signed bytes; those of `x` are at least -127.
    fn pairs_signed(self, w: Self::B, x: Self::B) -> Self::B;
    /// Lanes that sum four products of bytes: of `w`, from 0 to 127, with those of `x`.
    fn fours(self, w: Self::B, x: Self::B) -> Self::B;
    /// The same of signed bytes; those of `x` are at least -127.
    fn fours_signed(self, w: Self::B, x: Self::B) -> Self::B;
    /// Lanes plus sums of two products of words.
    fn add_words(self, acc: Self::B, a: Self::B, b: Self::B) -> Self::B;
    /// In lane c the sum of the lanes of vector c.
    fn sums(self, x: [Self::B; TILE]) -> Self::B;
    /// Four lanes from each of the places: in lane c of vector j, the j-th at place c.
    unsafe fn across(self, from: [*const u8; TILE]) -> [Self::B; 4];
    /// The way back, to 16 bytes for each place.
    fn along(self, x: [Self::B; 4]) -> [[u8; 16]; TILE];
    /// A lane from each of the places.
    unsafe fn lanes(self, from: [*const u8; TILE]) -> Self::B;
    /// An f16 from each of the places, widened.
    unsafe fn halves(self, from: [*const u8; TILE]) -> Self::F;
    /// The f16 in the lower halves of the lanes.
    fn low_halves(self, x: Self::B) -> Self::F;
    /// The f16 in the upper halves of the lanes.
    fn high_halves(self, x: Self::B) -> Self::F;

    fn splat(self, x: f32) -> Self::F;
    /// Lanes to the nearest f32.
    fn to_f32(self, x: Self::B) -> Self::F;
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn to_array(self, x: Self::F) -> [f32; TILE];
}

/// Plain Rust that the compiler vectorises.
#[derive(Clone, Copy)]
pub(crate) struct Plain32;

type B = [u8; 32];
type F = [f32; 8];

#[inline(always)]
fn words(x: B) -> [i16; 16] {
    std::array::from_fn(|i| i16::from_le_bytes([x[2 * i], x[2 * i + 1]]))
}

#[inline(always)]
fn from_words(x: [i16; 16]) -> B {
    std::array::from_fn(|i| x[i / 2].to_le_bytes()[i % 2])
}

#[inline(always)]
fn lanes(x: B) -> [i32; 8] {
    std::array::from_fn(|i| i32::from_le_bytes(std::array::from_fn(|b| x[4 * i + b])))
}

#[inline(always)]
fn from_lanes(x: [i32; 8]) -> B {
    std::array::from_fn(|i| x[i / 4].to_le_bytes()[i % 4])
}

#[inline(always)]
fn product(w: i32, x: u8) -> i32 {
    w * i32::from(x.cast_signed())
}

impl Bytes for Plain32 {
    type B = B;
    type F = F;

    #[inline(always)]
    fn zero(self) -> B {
        [0; 32]
    }
    #[inline(always)]
    fn splat_byte(self, x: u8) -> B {
        [x; 32]
    }
    #[inline(always)]
    fn splat_lane(self, x: i32) -> B {
        from_lanes([x; 8])
    }
    #[inline(always)]
    unsafe fn load(self, p: *const u8) -> B {
        // SAFETY: the caller has 32 bytes there.
        unsafe { p.cast::<B>().read() }
    }
    #[inline(always)]
    unsafe fn load_twice(self, p: *const u8) -> B {
        // SAFETY: the caller has 16 bytes there.
        let x = unsafe { p.cast::<[u8; 16]>().read() };
        std::array::from_fn(|i| x[i % 16])
    }
    #[inline(always)]
    unsafe fn load_words(self, p: *const u8) -> B {
        // SAFETY: the caller has 16 bytes there.
        from_words(unsafe { p.cast::<[i8; 16]>().read() }.map(i16::from))
    }
    #[inline(always)]
    unsafe fn nibbles(self, p: *const u8) -> B {
        // SAFETY: the caller has 16 bytes there.
        let x = unsafe { p.cast::<[u8; 16]>().read() };
        let mut out = [0; 32];
        for i in 0..16 {
            out[i] = x[i] & 15;
            out[i + 16] = x[i] >> 4;
        }
        out
    }
    #[inline(always)]
    fn fifths(self, bits: u32) -> B {
        std::array::from_fn(|i| (bits >> i & 1) as u8 * 16)
    }
    #[inline(always)]
    fn and(self, a: B, b: B) -> B {
        std::array::from_fn(|i| a[i] & b[i])
    }
    #[inline(always)]
    fn or(self, a: B, b: B) -> B {
        std::array::from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    fn right<const N: i32>(self, x: B) -> B {
        from_words(words(x).map(|x| (x.cast_unsigned() >> N).cast_signed()))
    }
    #[inline(always)]
    fn left<const N: i32>(self, x: B) -> B {
        from_words(words(x).map(|x| x << N))
    }
    #[inline(always)]
    fn left_lanes<const N: i32>(self, x: B) -> B {
        from_lanes(lanes(x).map(|x| x << N))
    }
    #[inline(always)]
    fn sub_bytes(self, a: B, b: B) -> B {
        std::array::from_fn(|i| a[i].wrapping_sub(b[i]))
    }
    #[inline(always)]
    fn add_lanes(self, a: B, b: B) -> B {
        let (a, b) = (lanes(a), lanes(b));
        from_lanes(std::array::from_fn(|i| a[i].wrapping_add(b[i])))
    }
    #[inline(always)]
    fn sub_lanes(self, a: B, b: B) -> B {
        let (a, b) = (lanes(a), lanes(b));
        from_lanes(std::array::from_fn(|i| a[i].wrapping_sub(b[i])))
    }
    #[inline(always)]
    fn lookup(self, table: B, index: B) -> B {
        std::array::from_fn(|i| {
            let found = table[i / 16 * 16 + usize::from(index[i] & 15)];
            if index[i] < 128 { found } else { 0 }
        })
    }
    #[inline(always)]
    fn first_twice(self, x: B) -> B {
        std::array::from_fn(|i| x[i % 16])
    }
    #[inline(always)]
    fn second_twice(self, x: B) -> B {
        std::array::from_fn(|i| x[16 + i % 16])
    }
    #[inline(always)]
    fn pairs(self, w: B, x: B) -> B {
        let one = |i: usize| product(i32::from(w[i]), x[i]);
        from_words(std::array::from_fn(|i| {
            (one(2 * i) + one(2 * i + 1)) as i16
        }))
    }
    #[inline(always)]
    fn pairs_signed(self, w: B, x: B) -> B {
        let one = |i: usize| product(i32::from(w[i].cast_signed()), x[i]);
        from_words(std::array::from_fn(|i| {
            (one(2 * i) + one(2 * i + 1)) as i16
        }))
    }
    #[inline(always)]
    fn fours(self, w: B, x: B) -> B {
        let one = |i: usize| product(i32::from(w[i]), x[i]);
        from_lanes(std::array::from_fn(|i| {
            (one(4 * i) + one(4 * i + 1)) + (one(4 * i + 2) + one(4 * i + 3))
        }))
    }
    #[inline(always)]
    fn fours_signed(self, w: B, x: B) -> B {
        let one = |i: usize| product(i32::from(w[i].cast_signed()), x[i]);
        from_lanes(std::array::from_fn(|i| {
            (one(4 * i) + one(4 * i + 1)) + (one(4 * i + 2) + one(4 * i + 3))
        }))
    }
    #[inline(always)]
    fn add_words(self, acc: B, a: B, b: B) -> B {
        let (acc, a, b) = (lanes(acc), words(a), words(b));
        let one = |i: usize| i32::from(a[i]) * i32::from(b[i]);
        from_lanes(std::array::from_fn(|i| {
            acc[i].wrapping_add(one(2 * i).wrapping_add(one(2 * i + 1)))
        }))
    }
    #[inline(always)]
    fn sums(self, x: [B; TILE]) -> B {
        from_lanes(x.map(|x| lanes(x).into_iter().fold(0, i32::wrapping_add)))
    }
    #[inline(always)]
    unsafe fn across(self, from: [*const u8; TILE]) -> [B; 4] {
        // SAFETY: the caller has 16 bytes at each place.
        let x = from.map(|p| unsafe { p.cast::<[[u8; 4]; 4]>().read() });
        std::array::from_fn(|j| std::array::from_fn(|i| x[i / 4][j][i % 4]))
    }
    #[inline(always)]
    fn along(self, x: [B; 4]) -> [[u8; 16]; TILE] {
        std::array::from_fn(|c| std::array::from_fn(|i| x[i / 4][4 * c + i % 4]))
    }
    #[inline(always)]
    unsafe fn lanes(self, from: [*const u8; TILE]) -> B {
        // SAFETY: the caller has four bytes at each place.
        from_lanes(from.map(|p| i32::from_le_bytes(unsafe { p.cast::<[u8; 4]>().read() })))
    }
    #[inline(always)]
    unsafe fn halves(self, from: [*const u8; TILE]) -> F {
        // SAFETY: the caller has two bytes at each place.
        from.map(|p| f16::from_le_bytes(unsafe { p.cast::<[u8; 2]>().read() }).to_f32())
    }
    #[inline(always)]
    fn low_halves(self, x: B) -> F {
        lanes(x).map(|x| f16::from_bits(x as u16).to_f32())
    }
    #[inline(always)]
    fn high_halves(self, x: B) -> F {
        lanes(x).map(|x| f16::from_bits((x >> 16) as u16).to_f32())
    }
    #[inline(always)]
    fn splat(self, x: f32) -> F {
        [x; 8]
    }
    #[inline(always)]
    fn to_f32(self, x: B) -> F {
        lanes(x).map(|x| x as f32)
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn to_array(self, x: F) -> [f32; TILE] {
        x
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::{Isa, Kernel, Simd};
    use super::*;

    /// Bytes that look random; those of x are at least -127.
    fn bytes(seed: usize) -> [u8; 128] {
        std::array::from_fn(|i| {
            let x = crate::random::uniform(seed as u64, i as u64) * 256.0;
            if x as u8 == 128 { 127 } else { x as u8 }
        })
    }

    /// What all operations make of some bytes.
    #[derive(Debug, Default, PartialEq)]
    struct Found(Vec<i32>, Vec<u32>, Vec<u8>);

    fn all<V: Bytes>(v: V, from: &[u8; 128]) -> Found {
        let mut found = Found::default();
        let p = |at: usize| from[at..].as_ptr();
        // SAFETY: 128 bytes are there, and reads begin at 96 at most.
        unsafe {
            let (a, x, low) = (v.load(p(0)), v.load(p(32)), v.splat_byte(0x7f));
            let u = v.and(a, low);
            let word = u32::from_le_bytes([from[0], from[1], from[2], from[3]]);
            // Saturating sums of words would differ: codes of formats stay below 64 there.
            let small = v.and(a, v.splat_byte(0x3f));
            let vectors = [
                v.zero(),
                v.splat_lane(word.cast_signed()),
                v.load_twice(p(5)),
                v.load_words(p(7)),
                v.nibbles(p(9)),
                v.fifths(word),
                v.or(a, x),
                v.right::<3>(a),
                v.left::<2>(a),
                v.left_lanes::<5>(a),
                v.sub_bytes(a, x),
                v.add_lanes(a, x),
                v.sub_lanes(a, x),
                v.lookup(a, v.load(p(64))),
                v.first_twice(a),
                v.second_twice(a),
                v.pairs(small, x),
                v.pairs_signed(a, x),
                v.fours(u, x),
                v.fours_signed(a, x),
                v.add_words(a, x, v.load(p(64))),
            ];
            let places: [*const u8; TILE] = std::array::from_fn(|c| p(11 * c));
            let across = v.across(places);
            let mut eight = [a; TILE];
            eight[..4].copy_from_slice(&across);
            eight[6] = x;
            let sums = [v.sums(eight), v.lanes(places)];
            // Lanes by products with 1 and 65536, so that nothing else is needed to read them.
            for vector in vectors.into_iter().chain(across).chain(sums) {
                for shift in 0..4 {
                    let byte = v.and(shifted(v, vector, shift), v.splat_lane(255));
                    let lanes = v.to_array(v.to_f32(byte));
                    found.0.extend(lanes.map(|lane| lane as i32));
                }
            }
            let floats = [
                v.halves(places),
                v.low_halves(a),
                v.high_halves(a),
                v.to_f32(a),
                v.mul(v.sub(v.to_f32(x), v.to_f32(a)), v.splat(0.3)),
                v.add(v.to_f32(x), v.to_f32(a)),
            ];
            for float in floats {
                let not_nan = |x: f32| if x.is_nan() { 1 } else { x.to_bits() };
                found.1.extend(v.to_array(float).map(not_nan));
            }
            found.2 = v.along(across).concat();
        }
        found
    }

    /// Byte `at` of each lane at its lower end.
    fn shifted<V: Bytes>(v: V, x: V::B, at: usize) -> V::B {
        let index: [u8; 32] = std::array::from_fn(|i| (i % 16 / 4 * 4 + (i % 4 + at) % 4) as u8);
        // SAFETY: the array has 32 bytes.
        v.lookup(x, unsafe { v.load(index.as_ptr()) })
    }

    struct All<'a>(&'a [u8; 128]);

    impl Kernel for All<'_> {
        type Out = Found;
        const BF16_DOT: bool = true;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Found {
            all(s.bytes(), self.0)
        }
    }

    #[test]
    fn every_path_has_the_operations_of_plain_rust() {
        for seed in 0..200 {
            let from = bytes(seed);
            let plain = all(Plain32, &from);
            for isa in Isa::available() {
                assert_eq!(isa.launch(All(&from)), plain, "{isa:?}");
            }
        }
    }
}
