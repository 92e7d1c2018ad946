//! Products with weights in blocks, of inputs rounded to bytes: `rounded` defines them to the bit.
//!
//! A few rows read the weight where it lies (`direct`). For many, some rows of the weight are taken apart
//! for a chunk of K (`Unpack`) and laid out so that a vector holds the same four bytes of as many columns,
//! then all rows of x take their products from there (`Multiply`). Either way integer sums are exact, and f32
//! sums go block by block for each column alone.

use std::ops::Range;

use super::Cpu;
use super::bytes::TILE;
use super::direct::{Direct, few_rows};
use super::dot::{Place, Rows};
use super::scratch::Scratch;
use super::simd::{Kernel, Simd};
use crate::format::Format;
use crate::formats::unpack::{CHUNK, Form, RAW, WORDS, expand, unpack};
use crate::rounded::round_block;
use crate::tensor::{View, ViewMut};

/// Words of one column in a panel: the codes of a chunk, four in each, and what goes with them.
const COLUMN: usize = CHUNK / 4 + WORDS;
/// Rows of x that one panel serves: sums and inputs of as many stay in a second-level cache.
const MOST_ROWS: usize = 512;

/// A row of a chunk taken apart. Rows do not begin in the same set of a cache.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Apart {
    codes: [u8; CHUNK],
    raw: [u32; RAW],
    gap: [u32; 16],
}

impl super::scratch::Plain for Apart {}

/// Rows of x as products with weights of one form take them.
#[derive(Clone, Copy)]
pub(super) struct Rounded {
    form: Form,
    k: usize,
    codes: Rows<i8>,
    /// For each row: the scales of its blocks, as bits; for each run, what its sum begins with; and the
    /// scaled sums of blocks of 32 for minima, as bits, or the sums of runs of larger blocks, two in a word.
    words: Rows<i32>,
}

impl Rounded {
    fn blocks(&self) -> usize {
        self.k / self.form.block
    }

    fn runs(&self) -> usize {
        self.k / self.form.run
    }

    /// Elements of a row.
    pub(super) fn k(&self) -> usize {
        self.k
    }

    /// Row `r` from element `start` on.
    #[inline(always)]
    pub(super) fn at(&self, r: usize, start: usize) -> XRow {
        let words = self.words.pointer.wrapping_add(r * self.words.pitch);
        let extra = words.wrapping_add(self.blocks() + self.runs());
        XRow {
            codes: self
                .codes
                .pointer
                .wrapping_add(r * self.codes.pitch + start),
            scales: words.wrapping_add(start / self.form.block),
            begins: words.wrapping_add(self.blocks() + start / self.form.run),
            extra: extra.wrapping_add(if self.form.block == 32 {
                start / 32
            } else {
                start / self.form.run / 2
            }),
        }
    }

    pub(super) fn starting_at(self, first: usize) -> Self {
        Rounded {
            codes: self.codes.starting_at(first),
            words: self.words.starting_at(first),
            ..self
        }
    }
}

/// A row of x from the start of a chunk on.
#[derive(Clone, Copy)]
pub(super) struct XRow {
    pub(super) codes: *const i8,
    pub(super) scales: *const i32,
    pub(super) begins: *const i32,
    pub(super) extra: *const i32,
}

/// The products of some rows of x with rows `columns` of a weight.
pub(super) struct BlockDot<'a> {
    pub(super) x: Rounded,
    pub(super) rows: usize,
    pub(super) place: Place<'a>,
    pub(super) format: Format,
    /// The bytes of the weight's blocks.
    pub(super) w: View<u8>,
    pub(super) columns: Range<usize>,
    pub(super) bias: Option<View<f32>>,
    /// Columns `columns` of the rows of y belong to this product alone.
    pub(super) y: ViewMut<f32>,
}

impl Cpu {
    /// Columns that a panel holds.
    pub(super) fn panel_columns(&self) -> usize {
        2 * self.isa().lanes()
    }

    /// x, rounded for weights of this form.
    pub(super) fn round_x(&self, x: View<f32>, form: Form, to: &mut Scratch) -> Rounded {
        let k = x.cols();
        let (blocks, runs) = (k / form.block, k / form.run);
        // An odd number of cache lines.
        let code_pitch = 64 * (k.div_ceil(64) | 1);
        let word_pitch = blocks + 2 * runs;
        let bytes = [x.rows() * code_pitch, 4 * x.rows() * word_pitch];
        let mut room = to.split(&bytes);
        let codes = room.next::<i8>(bytes[0]);
        let words = room.next::<i32>(bytes[1] / 4);
        let (codes, words) = (codes.as_mut_ptr(), words.as_mut_ptr());
        let rounded = Rounded {
            form,
            k,
            codes: Rows {
                pointer: codes,
                pitch: code_pitch,
            },
            words: Rows {
                pointer: words,
                pitch: word_pitch,
            },
        };
        self.for_rows(x.rows(), k, |rows, _| {
            self.isa().launch(RoundX {
                x,
                rows,
                to: rounded,
            });
        });
        rounded
    }

    /// A product, in parts of the columns and of the rows.
    pub(super) fn block_products(&self, dot: &BlockDot<'_>) {
        let unit = if dot.rows <= few_rows(self.isa(), dot.format) {
            TILE
        } else {
            self.panel_columns()
        };
        let columns = if dot.rows > 8 {
            unit
        } else {
            dot.columns
                .len()
                .div_ceil(4 * self.threads())
                .next_multiple_of(unit)
        };
        let parts = dot.columns.len().div_ceil(columns);
        let cuts = if dot.rows > 8 {
            self.threads().div_ceil(parts.max(1))
        } else {
            1
        };
        let height = dot.rows.div_ceil(cuts).clamp(1, MOST_ROWS);
        let cuts = dot.rows.div_ceil(height);
        self.pool().run(parts * cuts, |part, scratch| {
            let (first, n) = (part / parts * height, part % parts * columns);
            let part = BlockDot {
                x: dot.x.starting_at(first),
                rows: height.min(dot.rows - first),
                place: dot.place,
                columns: n..(n + columns).min(dot.columns.end),
                y: dot.y.starting_at(first),
                ..*dot
            };
            self.block_dot(&part, scratch);
        });
    }

    /// One part, on one thread.
    pub(super) fn block_dot(&self, dot: &BlockDot<'_>, scratch: &mut Scratch) {
        if dot.rows <= few_rows(self.isa(), dot.format) {
            return self.isa().launch(Direct(dot));
        }
        let (lanes, unit) = (self.isa().lanes(), self.panel_columns());
        let k = dot.x.k;
        let rows = dot.rows.min(MOST_ROWS);
        let sizes = [
            lanes * size_of::<Apart>(),
            4 * unit * COLUMN,
            4 * rows * unit,
        ];
        let mut room = scratch.split(&sizes);
        let apart = room.next::<Apart>(lanes);
        let panel = room.next::<i32>(unit * COLUMN);
        let sums = room.next::<f32>(rows * unit);
        for columns in dot.columns.clone().step_by(unit) {
            let columns = columns..(columns + unit).min(dot.columns.end);
            for first in (0..dot.rows).step_by(rows) {
                let rows = rows.min(dot.rows - first);
                let sums = &mut sums[..rows * unit];
                sums.fill(0.0);
                for start in (0..k).step_by(CHUNK) {
                    let chunk = start..(start + CHUNK).min(k);
                    self.isa().launch(Unpack {
                        format: dot.format,
                        w: dot.w,
                        columns: columns.clone(),
                        chunk: chunk.clone(),
                        apart,
                        panel,
                    });
                    self.isa().launch(Multiply {
                        dot,
                        first,
                        rows,
                        chunk,
                        panel,
                        sums,
                    });
                }
                for (r, sums) in sums.chunks_exact(unit).enumerate() {
                    let (_, y) = dot.place.at(first + r);
                    // SAFETY: these columns of the row belong to this product, one slice at a time.
                    let y = unsafe { dot.y.columns(y, columns.clone()) };
                    match dot.bias {
                        Some(bias) => {
                            let bias = &bias.row(0)[columns.clone()];
                            let terms = y.iter_mut().zip(sums).zip(bias);
                            terms.for_each(|((y, sum), bias)| *y = sum + bias);
                        }
                        None => y.copy_from_slice(&sums[..columns.len()]),
                    }
                }
            }
        }
    }
}

/// Rounds rows of x.
struct RoundX {
    x: View<f32>,
    rows: Range<usize>,
    to: Rounded,
}

impl Kernel for RoundX {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, _s: S) {
        let (form, k) = (self.to.form, self.to.k);
        let (blocks, runs) = (self.to.blocks(), self.to.runs());
        for r in self.rows {
            // SAFETY: the copy has a pitch of codes and of words for each row, and these rows are ours.
            let (codes, words) = unsafe {
                let codes = self.to.codes.pointer.add(r * self.to.codes.pitch);
                let words = self.to.words.pointer.add(r * self.to.words.pitch);
                (
                    std::slice::from_raw_parts_mut(codes.cast_mut(), k),
                    std::slice::from_raw_parts_mut(words.cast_mut(), blocks + 2 * runs),
                )
            };
            let (scales, words) = words.split_at_mut(blocks);
            let (begins, extra) = words.split_at_mut(runs);
            let x = self.x.row(r);
            if form.block == 32 {
                round_blocks::<32>(x, codes, scales);
            } else {
                round_blocks::<256>(x, codes, scales);
            }
            if form.run == 32 {
                sum_runs::<32>(codes, begins);
            } else {
                sum_runs::<16>(codes, begins);
            }
            if form.minima && form.block == 32 {
                for (i, extra) in extra.iter_mut().enumerate() {
                    let scaled = f32::from_bits(scales[i].cast_unsigned()) * begins[i] as f32;
                    *extra = scaled.to_bits().cast_signed();
                }
            } else if form.block > 32 {
                for (i, extra) in extra[..runs / 2].iter_mut().enumerate() {
                    *extra = begins[2 * i] & 0xffff | begins[2 * i + 1] << 16;
                }
            }
            begins.iter_mut().for_each(|sum| *sum *= -form.offset);
        }
    }
}

#[inline(always)]
fn round_blocks<const BLOCK: usize>(x: &[f32], codes: &mut [i8], scales: &mut [i32]) {
    let (x, codes) = (x.as_chunks::<BLOCK>().0, codes.as_chunks_mut::<BLOCK>().0);
    for ((x, codes), scale) in x.iter().zip(codes).zip(scales) {
        *scale = round_block(x, codes).to_bits().cast_signed();
    }
}

#[inline(always)]
fn sum_runs<const RUN: usize>(codes: &[i8], sums: &mut [i32]) {
    for (codes, sum) in codes.as_chunks::<RUN>().0.iter().zip(sums) {
        *sum = codes.iter().map(|c| i32::from(*c)).sum();
    }
}

/// Takes a chunk of some rows of a weight apart and fills a panel with it: two vectors of columns, each
/// word by word.
struct Unpack<'a> {
    format: Format,
    w: View<u8>,
    columns: Range<usize>,
    chunk: Range<usize>,
    apart: &'a mut [Apart],
    panel: &'a mut [i32],
}

impl Kernel for Unpack<'_> {
    type Out = ();
    const BF16_DOT: bool = true;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (form, k) = (Form::of(self.format), self.chunk.len());
        let at = |element| self.format.row_bytes(element).unwrap_or_default();
        let bytes = at(self.chunk.start)..at(self.chunk.end);
        assert!(self.apart.len() >= S::LANES && self.panel.len() >= 2 * S::LANES * COLUMN);
        let pitch = size_of::<Apart>() / 4;
        let next = self.w.row(self.columns.start).as_ptr();
        let next = next.wrapping_add(2 * S::LANES * self.w.stride());
        for (group, panel) in self.panel.chunks_exact_mut(S::LANES * COLUMN).enumerate() {
            // Columns that are not there repeat the last one; what comes out of them is dropped.
            let column = |r: usize| self.columns.start + group * S::LANES + r;
            let row = |n: usize| self.w.row(n.min(self.columns.end - 1));
            for (r, apart) in self.apart[..S::LANES].iter_mut().enumerate() {
                let n = column(r);
                // What the next panel will read, from front to back: rows follow each other.
                let done = bytes.start * 2 * S::LANES + (group * S::LANES + r) * bytes.len();
                for line in (0..bytes.len()).step_by(64) {
                    s.prefetch(next.wrapping_add(done + line));
                }
                let from = &row(n)[bytes.clone()];
                unpack(self.format, from, &mut apart.codes, &mut apart.raw);
            }
            let panel = panel.as_mut_ptr();
            // SAFETY: the rows have the words that are read, and the panel room for them: k / 4 is at most
            // that of a chunk, and all of these are multiples of the vector's width, of sixteen at most.
            unsafe {
                let codes = self.apart.as_ptr().cast::<i32>();
                for word in (0..k / 4).step_by(S::LANES) {
                    s.transpose(codes.add(word), pitch, panel.add(word * S::LANES));
                }
                let (raw, panel) = (codes.add(CHUNK / 4), panel.add(CHUNK / 4 * S::LANES));
                if S::LANES == 16 {
                    place::<S, 16>(s, self.format, k, raw, panel);
                } else {
                    place::<S, 8>(s, self.format, k, raw, panel);
                }
                let widen = |word: usize| {
                    let at = panel.add(word * S::LANES);
                    s.store(at.cast(), s.halves(s.load_i(at)));
                };
                for block in 0..k / form.block {
                    widen(form.d(block));
                    if form.minima {
                        widen(form.m(block));
                    }
                }
            }
        }
    }
}

/// Places the words of a chunk of `L` rows, as many as vectors have lanes, in a panel.
///
/// # Safety
/// The rows have their words, and the panel has room for those of a chunk.
#[inline(always)]
unsafe fn place<S: Simd, const L: usize>(
    s: S,
    format: Format,
    k: usize,
    raw: *const i32,
    panel: *mut i32,
) {
    assert_eq!(L, S::LANES);
    let mut across = [[0u32; L]; RAW];
    let pitch = size_of::<Apart>() / 4;
    // SAFETY: the caller's promise; any bits are a word.
    unsafe {
        for (i, across) in across.chunks_exact_mut(L).enumerate() {
            s.transpose(raw.add(i * L), pitch, across.as_mut_ptr().cast());
        }
        expand(format, k, &across, &mut *panel.cast::<[[u32; L]; WORDS]>());
    }
}

/// Adds the products of a chunk to the sums of some rows.
struct Multiply<'a> {
    dot: &'a BlockDot<'a>,
    first: usize,
    rows: usize,
    chunk: Range<usize>,
    panel: &'a [i32],
    /// For each row, a number for each column of the panel.
    sums: &'a mut [f32],
}

impl Kernel for Multiply<'_> {
    type Out = ();
    const BF16_DOT: bool = true;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let form = self.dot.x.form;
        match (form.block, form.run, form.minima) {
            (32, _, false) => self.tiles::<S, Tile32<false, true>>(s),
            (32, _, true) => self.tiles::<S, Tile32<true, false>>(s),
            (_, 32, true) => self.tiles::<S, Tile256<32, true, false>>(s),
            (_, 16, true) => self.tiles::<S, Tile256<16, true, false>>(s),
            (_, 16, false) => self.tiles::<S, Tile256<16, false, false>>(s),
            (..) => self.tiles::<S, Tile256<32, false, true>>(s),
        }
    }
}

impl Multiply<'_> {
    #[inline(always)]
    fn tiles<S: Simd, T: Tile>(self, s: S) {
        assert!(self.sums.len() >= self.rows * 2 * S::LANES);
        assert!(self.panel.len() >= 2 * S::LANES * COLUMN);
        let mut first = 0;
        while first < self.rows {
            let rest = self.rows - first;
            // SAFETY: rows of x have the elements of the chunk, and so has the panel; sums are there by
            // the assertion.
            first += unsafe {
                if S::BYTE_ROWS >= 6 && rest >= 6 {
                    self.tile::<S, T, 6>(s, first)
                } else if S::BYTE_ROWS >= 6 && rest >= 3 {
                    self.tile::<S, T, 3>(s, first)
                } else if rest >= 2 {
                    self.tile::<S, T, 2>(s, first)
                } else {
                    self.tile::<S, T, 1>(s, first)
                }
            };
        }
    }

    /// # Safety
    /// Rows `first..first + R` are there.
    #[inline(always)]
    unsafe fn tile<S: Simd, T: Tile, const R: usize>(&self, s: S, first: usize) -> usize {
        let x: [XRow; R] = std::array::from_fn(|r| {
            let (row, _) = self.dot.place.at(self.first + first + r);
            self.dot.x.at(row, self.chunk.start)
        });
        let panel = self.panel.as_ptr();
        let panel = [panel, panel.wrapping_add(S::LANES * COLUMN)];
        let sums = self.sums.as_ptr().cast_mut();
        // SAFETY: the caller's promise; this kernel alone has the sums.
        unsafe {
            let sums = sums.add(first * 2 * S::LANES);
            T::add::<S, R>(s, x, panel, self.chunk.len(), sums);
        }
        R
    }
}

/// A form of weights, as the inner loops see it.
trait Tile {
    /// Adds the products of `R` rows of x with two vectors of columns over `k` elements.
    ///
    /// # Safety
    /// Rows of x and the panel have the elements, and there are two vectors of sums for each row.
    unsafe fn add<S: Simd, const R: usize>(
        s: S,
        x: [XRow; R],
        panel: [*const i32; 2],
        k: usize,
        sums: *mut f32,
    );
}

/// Integer sums over one run: `words` words of four codes.
///
/// # Safety
/// Rows of x and the panel have the words.
#[inline(always)]
unsafe fn run_sums<S: Simd, const WIDE: bool, const R: usize>(
    s: S,
    x: &[XRow; R],
    // The run, and whether its sums begin with what x says.
    (run, begin): (usize, bool),
    panel: [*const i32; 2],
    words: usize,
) -> [[S::I; 2]; R] {
    // Loops, not closures, here and below: those are not always inlined.
    let mut sums = [[s.splat_i(0); 2]; R];
    // SAFETY: the caller's promise.
    unsafe {
        if begin {
            for r in 0..R {
                sums[r] = [s.splat_i(*x[r].begins.add(run)); 2];
            }
        }
        for j in 0..words {
            let at = (words * run + j) * S::LANES;
            let w = [s.load_i(panel[0].add(at)), s.load_i(panel[1].add(at))];
            for r in 0..R {
                let x = x[r].codes.add(4 * (words * run + j));
                let x = x.cast::<i32>().read_unaligned();
                sums[r][0] = s.dot_bytes::<WIDE>(sums[r][0], w[0], x);
                sums[r][1] = s.dot_bytes::<WIDE>(sums[r][1], w[1], x);
            }
        }
    }
    sums
}

/// Blocks of 32.
struct Tile32<const MINIMA: bool, const WIDE: bool>;

impl<const MINIMA: bool, const WIDE: bool> Tile for Tile32<MINIMA, WIDE> {
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // rows and columns of a tile
    unsafe fn add<S: Simd, const R: usize>(
        s: S,
        x: [XRow; R],
        panel: [*const i32; 2],
        k: usize,
        sums: *mut f32,
    ) {
        let form = const {
            Form {
                block: 32,
                run: 32,
                offset: 0,
                minima: MINIMA,
            }
        };
        // SAFETY: the caller's promise.
        unsafe {
            let sum = |r: usize, c: usize| sums.add((2 * r + c) * S::LANES);
            let mut acc = [[s.splat(0.0); 2]; R];
            for r in 0..R {
                acc[r] = [s.load(sum(r, 0)), s.load(sum(r, 1))];
            }
            let words = panel.map(|p| p.add(CHUNK / 4 * S::LANES).cast::<f32>());
            for b in 0..k / 32 {
                let runs = run_sums::<S, WIDE, R>(s, &x, (b, !MINIMA), panel, 8);
                for c in 0..2 {
                    let d = s.load(words[c].add(form.d(b) * S::LANES));
                    for r in 0..R {
                        let dx = s.splat(f32::from_bits((*x[r].scales.add(b)).cast_unsigned()));
                        let scaled = s.mul(s.mul(s.to_f32(runs[r][c]), d), dx);
                        acc[r][c] = s.add(acc[r][c], scaled);
                    }
                    if MINIMA {
                        let m = s.load(words[c].add(form.m(b) * S::LANES));
                        for r in 0..R {
                            let sum = f32::from_bits((*x[r].extra.add(b)).cast_unsigned());
                            acc[r][c] = s.add(acc[r][c], s.mul(m, s.splat(sum)));
                        }
                    }
                }
            }
            for r in 0..R {
                s.store(sum(r, 0), acc[r][0]);
                s.store(sum(r, 1), acc[r][1]);
            }
        }
    }
}

/// Blocks of 256 in runs of `RUN`.
struct Tile256<const RUN: usize, const MINIMA: bool, const WIDE: bool>;

impl<const RUN: usize, const MINIMA: bool, const WIDE: bool> Tile for Tile256<RUN, MINIMA, WIDE> {
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // rows and columns of a tile
    unsafe fn add<S: Simd, const R: usize>(
        s: S,
        x: [XRow; R],
        panel: [*const i32; 2],
        k: usize,
        sums: *mut f32,
    ) {
        let form = const {
            Form {
                block: 256,
                run: RUN,
                offset: 0,
                minima: MINIMA,
            }
        };
        let runs_a_block = 256 / RUN;
        // SAFETY: the caller's promise.
        unsafe {
            let words = panel.map(|p| p.add(CHUNK / 4 * S::LANES));
            let word = |c: usize, word: usize| words[c].add(word * S::LANES);
            for b in 0..k / 256 {
                let mut total = [[s.splat_i(0); 2]; R];
                for run in 0..runs_a_block {
                    let i = b * runs_a_block + run;
                    let sums = run_sums::<S, WIDE, R>(s, &x, (i, !MINIMA), panel, RUN / 4);
                    for c in 0..2 {
                        let scale = s.load_i(word(c, form.scale(b, run)));
                        for r in 0..R {
                            let scaled = s.mul_i(sums[r][c], scale);
                            total[r][c] = s.add_i(total[r][c], scaled);
                        }
                    }
                }
                for c in 0..2 {
                    let d = s.load(word(c, form.d(b)).cast());
                    for r in 0..R {
                        let at = sums.add((2 * r + c) * S::LANES);
                        let dx = s.splat(f32::from_bits((*x[r].scales.add(b)).cast_unsigned()));
                        let scaled = s.mul(s.mul(s.to_f32(total[r][c]), d), dx);
                        let mut sum = s.add(s.load(at), scaled);
                        if MINIMA {
                            let mut least = s.splat_i(0);
                            for pair in 0..runs_a_block / 2 {
                                let x = *x[r].extra.add(b * runs_a_block / 2 + pair);
                                let minima = s.load_i(word(c, form.minima(b, pair)));
                                least = s.dot_words(least, minima, x);
                            }
                            let m = s.load(word(c, form.m(b)).cast());
                            sum = s.sub(sum, s.mul(s.mul(s.to_f32(least), m), dx));
                        }
                        s.store(at, sum);
                    }
                }
            }
        }
    }
}
