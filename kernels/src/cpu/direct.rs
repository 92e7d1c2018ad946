//! Products of a few rows of x with weights in blocks, read once, where they lie.
//!
//! Eight columns at a time go through their blocks side by side: codes of a column become bytes of a vector,
//! meet those of x, and sums of integers that belong to one block are gathered to a lane for each column.
//! From there on it is the arithmetic of `rounded`, lane by lane.

use super::blocks::{BlockDot, XRow};
use super::bytes::{Bytes, TILE};
use super::direct_codes::{Iq4Nl, Iq4Xs, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
use super::simd::{Isa, Kernel, Simd};
use crate::format::Format;

/// How many rows of x are multiplied so; more are worth a panel, which is costlier to fill with some formats.
pub(super) fn few_rows(isa: Isa, format: Format) -> usize {
    match format {
        _ if isa == Isa::Portable => 0,
        Format::Q5_0 | Format::Q5_1 | Format::Iq4Nl | Format::Iq4Xs => 8,
        _ => 4,
    }
}

/// The products of a few rows of x.
pub(super) struct Direct<'a>(pub(super) &'a BlockDot<'a>);

impl Kernel for Direct<'_> {
    type Out = ();
    const BF16_DOT: bool = true;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if !S::BYTES {
            unreachable!("a path without vectors of bytes was asked for them")
        }
        match self.0.format {
            Format::Q8_0 => self.columns::<S, Blocks<Q8_0>>(s),
            Format::Q4_0 => self.columns::<S, Blocks<Q4_0>>(s),
            Format::Q4_1 => self.columns::<S, Blocks<Q4_1>>(s),
            Format::Q5_0 => self.columns::<S, Blocks<Q5_0>>(s),
            Format::Q5_1 => self.columns::<S, Blocks<Q5_1>>(s),
            Format::Iq4Nl => self.columns::<S, Blocks<Iq4Nl>>(s),
            Format::Q6K => self.columns::<S, Supers<Q6K>>(s),
            Format::Q5K => self.columns::<S, Supers<Q5K>>(s),
            Format::Q4K => self.columns::<S, Supers<Q4K>>(s),
            Format::Iq4Xs => self.columns::<S, Supers<Iq4Xs>>(s),
            Format::Q3K => self.columns::<S, Supers<Q3K>>(s),
            Format::Q2K => self.columns::<S, Supers<Q2K>>(s),
            Format::F32 | Format::F16 | Format::BF16 | Format::Int8 | Format::Fp8 => {
                panic!("{} has no blocks", self.0.format)
            }
        }
    }
}

impl Direct<'_> {
    #[inline(always)]
    fn columns<S: Simd, T: Tile>(self, s: S) {
        let dot = self.0;
        for first in dot.columns.clone().step_by(TILE) {
            let columns = first..(first + TILE).min(dot.columns.end);
            // Columns that are not there repeat the last one; what comes out of them is dropped.
            let mut w = [dot.w.row(first).as_ptr(); TILE];
            for (c, w) in w.iter_mut().enumerate() {
                *w = dot.w.row((first + c).min(columns.end - 1)).as_ptr();
            }
            let mut row = 0;
            while row < dot.rows {
                // SAFETY: rows of x and of the weight have the blocks of K.
                row += unsafe {
                    if dot.rows - row > 1 {
                        self.tile::<S, T, 2>(s, row, w, columns.clone())
                    } else {
                        self.tile::<S, T, 1>(s, row, w, columns.clone())
                    }
                };
            }
        }
    }

    /// # Safety
    /// Rows `row..row + R` of x exist, and the rows of the weight have its blocks.
    #[inline(always)]
    unsafe fn tile<S: Simd, T: Tile, const R: usize>(
        &self,
        s: S,
        row: usize,
        w: [*const u8; TILE],
        columns: std::ops::Range<usize>,
    ) -> usize {
        let dot = self.0;
        let mut x = [dot.x.at(0, 0); R];
        for (r, x) in x.iter_mut().enumerate() {
            *x = dot.x.at(dot.place.at(row + r).0, 0);
        }
        // The same place in the next tile: the machine's own prefetching stops where a row ends.
        let ahead = if row == 0 { TILE * dot.w.stride() } else { 0 };
        // SAFETY: the caller's promise.
        let sums = unsafe { T::sums::<S, R>(s, &x, w, dot.x.k(), ahead) };
        for (r, sums) in sums.iter().enumerate() {
            let (_, y) = dot.place.at(row + r);
            // SAFETY: these columns of the row belong to this product, one slice at a time.
            let y = unsafe { dot.y.columns(y, columns.clone()) };
            for (c, (y, sum)) in y.iter_mut().zip(sums).enumerate() {
                *y = match dot.bias {
                    Some(bias) => sum + bias.row(0)[columns.start + c],
                    None => *sum,
                };
            }
        }
        R
    }
}

/// A form of weights, as the loop over columns sees it.
trait Tile {
    /// The products of `R` rows of x with eight columns over `k` elements. Unless it is zero, what lies
    /// `ahead` of them is asked for meanwhile.
    ///
    /// # Safety
    /// Rows of x and of the weight have the elements.
    unsafe fn sums<S: Simd, const R: usize>(
        s: S,
        x: &[XRow; R],
        w: [*const u8; TILE],
        k: usize,
        ahead: usize,
    ) -> [[f32; TILE]; R];
}

/// A format in blocks of 32 elements.
pub(super) trait Block32 {
    /// Bytes of a block. The scale comes first, then a minimum if there is one.
    const BYTES: usize;
    const MINIMA: bool = false;
    /// Whether codes are signed. Else they are below 128, and rows of x know what their sums begin with.
    const SIGNED: bool = false;
    /// # Safety
    /// `p` points to a block.
    unsafe fn codes<V: Bytes>(v: V, p: *const u8) -> V::B;
}

/// Tiles of such.
struct Blocks<F>(std::marker::PhantomData<F>);

impl<F: Block32> Tile for Blocks<F> {
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // rows and columns of a tile
    unsafe fn sums<S: Simd, const R: usize>(
        s: S,
        x: &[XRow; R],
        w: [*const u8; TILE],
        k: usize,
        ahead: usize,
    ) -> [[f32; TILE]; R] {
        let v = s.bytes();
        let mut acc = [v.splat(0.0); R];
        for b in 0..k / 32 {
            // SAFETY: the caller's promise.
            unsafe {
                let mut p = w;
                for p in &mut p {
                    *p = p.add(b * F::BYTES);
                }
                // Two or three short blocks share a cache line.
                if ahead > 0 && b.is_multiple_of(64 / F::BYTES) {
                    for p in p {
                        s.prefetch(p.wrapping_add(ahead));
                    }
                }
                let mut fours = [[v.zero(); TILE]; R];
                for c in 0..TILE {
                    let codes = F::codes(v, p[c]);
                    for r in 0..R {
                        let x = v.load(x[r].codes.add(32 * b).cast());
                        fours[r][c] = if F::SIGNED {
                            v.fours_signed(codes, x)
                        } else {
                            v.fours(codes, x)
                        };
                    }
                }
                let (d, m) = if F::MINIMA {
                    let both = v.lanes(p);
                    (v.low_halves(both), v.high_halves(both))
                } else {
                    (v.halves(p), v.splat(0.0))
                };
                for r in 0..R {
                    let mut sums = v.sums(fours[r]);
                    if !F::SIGNED && !F::MINIMA {
                        sums = v.add_lanes(sums, v.splat_lane(*x[r].begins.add(b)));
                    }
                    let dx = v.splat(bits(*x[r].scales.add(b)));
                    acc[r] = v.add(acc[r], v.mul(v.mul(v.to_f32(sums), d), dx));
                    if F::MINIMA {
                        let least = v.splat(bits(*x[r].extra.add(b)));
                        acc[r] = v.add(acc[r], v.mul(m, least));
                    }
                }
            }
        }
        acc.map(|acc| v.to_array(acc))
    }
}

#[inline(always)]
fn bits(x: i32) -> f32 {
    f32::from_bits(x.cast_unsigned())
}

/// Runs of eight columns: scales, and minima where they are bytes; and d and m.
pub(super) struct Header<V: Bytes> {
    pub(super) scales: [[u8; 16]; TILE],
    pub(super) minima: Minima<V>,
    pub(super) d: V::F,
    pub(super) m: V::F,
}

/// Minima of the runs of eight columns.
pub(super) enum Minima<V: Bytes> {
    None,
    /// Of runs of 32: those of four runs in the bytes of each lane, by columns.
    Eight([V::B; 2]),
    /// Of runs of 16: those of each column.
    Sixteen([[u8; 16]; TILE]),
}

/// A format in blocks of 256 elements.
pub(super) trait Block256 {
    const BYTES: usize;
    /// Elements of a run.
    const RUN: usize;
    /// Whether codes are signed. Else they are below 128.
    const SIGNED: bool = false;
    /// A code of zero stands for 2 to this power below nothing; none if it stands for zero.
    const OFFSET: Option<usize> = None;
    /// # Safety
    /// There are blocks at `p`.
    unsafe fn header<V: Bytes>(v: V, p: [*const u8; TILE]) -> Header<V>;
    /// The codes of a block, in order.
    ///
    /// # Safety
    /// `p` points to a block.
    unsafe fn codes<V: Bytes>(v: V, p: *const u8) -> [V::B; 8];
}

/// Tiles of such.
struct Supers<F>(std::marker::PhantomData<F>);

/// Indices of words of a half: for each of eight vectors the word of its run, and for each of four the words
/// of its two.
struct Indices {
    /// From bytes.
    widened: [[u8; 32]; 8],
    one: [[u8; 32]; 8],
    two: [[u8; 32]; 4],
}

static INDICES: Indices = {
    let mut to = Indices {
        widened: [[128; 32]; 8],
        one: [[0; 32]; 8],
        two: [[0; 32]; 4],
    };
    let mut i = 0;
    while i < 32 {
        let mut run = 0;
        while run < 8 {
            if i % 2 == 0 {
                to.widened[run][i] = run as u8;
            }
            to.one[run][i] = (2 * run + i % 2) as u8;
            run += 1;
        }
        let mut pair = 0;
        while pair < 4 {
            to.two[pair][i] = (4 * pair + i / 16 * 2 + i % 2) as u8;
            pair += 1;
        }
        i += 1;
    }
    to
};

/// For each vector of codes the scales of its words.
///
/// # Safety
/// None but that of the vectors: what is read is there.
#[inline(always)]
unsafe fn spread<V: Bytes, F: Block256>(v: V, scales: &[u8; 16]) -> [V::B; 8] {
    let mut out = [v.zero(); 8];
    // SAFETY: all arrays have the bytes.
    unsafe {
        if F::RUN == 32 && !F::SIGNED {
            let scales = v.load_twice(scales.as_ptr());
            for (i, out) in out.iter_mut().enumerate() {
                *out = v.lookup(scales, v.load(INDICES.widened[i].as_ptr()));
            }
        } else {
            let scales = v.load_words(scales.as_ptr());
            let (first, second) = (v.first_twice(scales), v.second_twice(scales));
            for (i, out) in out.iter_mut().enumerate() {
                *out = if F::RUN == 32 {
                    v.lookup(first, v.load(INDICES.one[i].as_ptr()))
                } else {
                    let half = if i < 4 { first } else { second };
                    v.lookup(half, v.load(INDICES.two[i % 4].as_ptr()))
                };
            }
        }
    }
    out
}

impl<F: Block256> Tile for Supers<F> {
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // rows and columns of a tile
    unsafe fn sums<S: Simd, const R: usize>(
        s: S,
        x: &[XRow; R],
        w: [*const u8; TILE],
        k: usize,
        ahead: usize,
    ) -> [[f32; TILE]; R] {
        let v = s.bytes();
        let mut acc = [v.splat(0.0); R];
        for b in 0..k / 256 {
            // SAFETY: the caller's promise.
            unsafe {
                let mut p = w;
                for p in &mut p {
                    *p = p.add(b * F::BYTES);
                }
                let header = F::header(v, p);
                let mut totals = [[v.zero(); TILE]; R];
                for c in 0..TILE {
                    if ahead > 0 {
                        for line in (0..F::BYTES).step_by(64) {
                            s.prefetch(p[c].wrapping_add(ahead + line));
                        }
                    }
                    let codes = F::codes(v, p[c]);
                    let scales = spread::<V2<S>, F>(v, &header.scales[c]);
                    for r in 0..R {
                        let from = x[r].codes.add(256 * b).cast::<u8>();
                        let mut total = v.zero();
                        for i in 0..8 {
                            let x = v.load(from.add(32 * i));
                            let pairs = if F::SIGNED {
                                v.pairs_signed(codes[i], x)
                            } else {
                                v.pairs(codes[i], x)
                            };
                            total = v.add_words(total, pairs, scales[i]);
                        }
                        totals[r][c] = total;
                    }
                    if F::OFFSET.is_some() {
                        let scales = v.load_words(header.scales[c].as_ptr());
                        for r in 0..R {
                            let sums = v.load(x[r].extra.add(8 * b).cast());
                            let below = v.add_words(v.zero(), scales, sums);
                            let below = match F::OFFSET {
                                Some(2) => v.left_lanes::<2>(below),
                                _ => v.left_lanes::<5>(below),
                            };
                            totals[r][c] = v.sub_lanes(totals[r][c], below);
                        }
                    }
                }
                for r in 0..R {
                    let dx = v.splat(bits(*x[r].scales.add(b)));
                    let total = v.to_f32(v.sums(totals[r]));
                    acc[r] = v.add(acc[r], v.mul(v.mul(total, header.d), dx));
                    if let Some(least) = least(v, &header.minima, x[r].extra, b) {
                        let least = v.mul(v.mul(v.to_f32(least), header.m), dx);
                        acc[r] = v.sub(acc[r], least);
                    }
                }
            }
        }
        acc.map(|acc| v.to_array(acc))
    }
}

/// The vectors of an instruction set.
type V2<S> = <S as Simd>::Bytes;

/// Minima times the sums of x over their runs, for block `b`.
///
/// # Safety
/// Sums of the block's runs are at `extra`.
#[inline(always)]
unsafe fn least<V: Bytes>(v: V, minima: &Minima<V>, extra: *const i32, b: usize) -> Option<V::B> {
    // SAFETY: the caller's promise.
    unsafe {
        match minima {
            Minima::None => None,
            Minima::Eight(minima) => {
                let mut least = v.zero();
                let byte = v.splat_lane(0x00ff_00ff);
                for (i, four) in minima.iter().enumerate() {
                    // Runs 0 and 1, and 2 and 3, become 0 and 2, and 1 and 3.
                    let first = (*extra.add(4 * b + 2 * i)).cast_unsigned();
                    let second = (*extra.add(4 * b + 2 * i + 1)).cast_unsigned();
                    let even = (first & 0xffff | second << 16).cast_signed();
                    let odd = (first >> 16 | second & 0xffff_0000).cast_signed();
                    least = v.add_words(least, v.and(*four, byte), v.splat_lane(even));
                    let four = v.and(v.right::<8>(*four), byte);
                    least = v.add_words(least, four, v.splat_lane(odd));
                }
                Some(least)
            }
            Minima::Sixteen(minima) => {
                let sums = v.load(extra.add(8 * b).cast());
                let mut least = [v.zero(); TILE];
                for (least, minima) in least.iter_mut().zip(minima) {
                    *least = v.add_words(v.zero(), v.load_words(minima.as_ptr()), sums);
                }
                Some(v.sums(least))
            }
        }
    }
}
