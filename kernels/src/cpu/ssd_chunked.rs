//! The scan of Mamba-2 by chunks: products of matrices in register tiles, channels of a head in lanes.
//!
//! First the products c · b of all rows with the tokens of their chunk, once for a group; then, head by
//! head, what the state and the chunk's tokens give to each row, and a new state where a chunk is full;
//! at last b is kept for the rows to come.
//!
//! A tile is some rows by some vectors of channels. Its sums run over the states, then over the tokens of
//! the chunk, each row up to its own, in their order: tiles and the cuts of a sequence show in no bit. A
//! row alone reads state and tokens once and writes neither but its own.

use std::ops::Range;

use super::Cpu;
use super::GRAIN;
use super::dot::{COLUMNS, Widened, tile};
use super::math::{exp, softplus};
use super::scratch::SharedMut;
use super::simd::{Kernel, Simd, load, store};
use super::ssd_tiles::{Outputs, STRIP, Update};
use crate::ops::SsdChunked;
use crate::span::Span;
use crate::tensor::{View, ViewMut};

/// Rows of the largest tile.
const ROWS: usize = 6;
/// Heads whose states stay in a second-level cache from chunk to chunk.
const MOST_HEADS: usize = 16;
/// Lanes of the widest instruction set.
const MOST_LANES: usize = 16;

impl Cpu {
    pub(super) fn do_ssd_chunked(&self, op: SsdChunked<'_>) {
        let (heads, states) = (op.scan.a.cols(), op.scan.states());
        let (rows, size, groups) = (op.scan.x.rows(), op.chunk_size, op.scan.groups);
        if rows == 0 {
            return;
        }
        let pitch = size.next_multiple_of(MOST_LANES);
        let mut shared = self.shared();
        let scores = SharedMut(shared.take::<f32>(rows * groups * pitch).as_mut_ptr());
        let scan = Scan {
            x: op.scan.x.view(),
            dt: op.scan.dt.view(),
            dt_bias: op.scan.dt_bias.map(|t| t.view()),
            dt_limit: op.scan.dt_limit,
            a: op.scan.a.view(),
            b: op.scan.b.view(),
            c: op.scan.c.view(),
            d: op.scan.d.map(|t| t.view()),
            scale_input: op.scan.scale_input,
            groups,
            heads_of_group: heads / groups,
            states,
            width: op.scan.x.cols() / heads,
            size,
            pitch,
            scores: &scores,
            state: op.scan.ssm_state.view_mut(),
            chunk_inputs: op.chunk_inputs.view_mut(),
            chunk_b: op.chunk_b.view_mut(),
            chunk_decays: op.chunk_decays.view_mut(),
            y: op.scan.y.view_mut(),
        };
        let (scan, spans) = (&scan, op.scan.ragged.spans);
        self.for_rows(rows, groups * states * size.div_ceil(2), |rows, _| {
            self.isa().launch(Scores { scan, spans, rows });
        });

        // The longest sequence alone makes parts enough for all threads where it has most of the rows.
        let longest = spans.iter().map(|span| span.len).max().unwrap_or(1);
        let cost = rows.div_ceil(spans.len()) * (states + 1) * scan.width.max(1);
        let height = (heads * rows)
            .div_ceil(longest * 4 * self.threads())
            .min(MOST_HEADS)
            .max(GRAIN.div_ceil(cost))
            .min(heads);
        let parts = heads.div_ceil(height);
        self.pool().run(spans.len() * parts, |part, scratch| {
            let (first, span) = (part % parts * height, &spans[part / parts]);
            let sizes = [pitch, pitch, ROWS * pitch, size * states, size * STRIP];
            let mut room = scratch.split(&sizes.map(|n| 4 * n));
            self.isa().launch(Heads {
                scan,
                span,
                heads: first..(first + height).min(heads),
                decays: room.next(sizes[0]),
                begins: room.next(sizes[1]),
                weights: room.next(sizes[2]),
                packed: room.next(sizes[3]),
                inputs: room.next(sizes[4]),
            });
        });

        self.for_rows(rows, groups * states, |rows, _| {
            for (span, rows) in spans_of(spans, rows) {
                for t in rows.filter(|t| t + size >= span.rows().end) {
                    // SAFETY: the row is of this part alone, and no other of the last `size` has its place.
                    unsafe { scan.keep_b(span, t) };
                }
            }
        });
    }
}

/// The spans that have some of `rows`, and which.
fn spans_of(spans: &[Span], rows: Range<usize>) -> impl Iterator<Item = (&Span, Range<usize>)> {
    let first = spans.partition_point(|span| span.rows().end <= rows.start);
    spans[first..]
        .iter()
        .take_while(move |span| span.start < rows.end)
        .map(move |span| {
            let theirs = span.rows();
            (span, rows.start.max(theirs.start)..rows.end.min(theirs.end))
        })
}

struct Scan<'a> {
    x: View<f32>,
    dt: View<f32>,
    dt_bias: Option<View<f32>>,
    dt_limit: (f32, f32),
    a: View<f32>,
    b: View<f32>,
    c: View<f32>,
    d: Option<View<f32>>,
    scale_input: bool,
    groups: usize,
    heads_of_group: usize,
    /// N.
    states: usize,
    /// P.
    width: usize,
    /// Q.
    size: usize,
    /// Q in whole vectors.
    pitch: usize,
    /// `pitch` numbers for each group of each row: its c by each b of its chunk.
    scores: &'a SharedMut<f32>,
    state: ViewMut<f32>,
    chunk_inputs: ViewMut<f32>,
    chunk_b: ViewMut<f32>,
    chunk_decays: ViewMut<f32>,
    y: ViewMut<f32>,
}

/// Rows of one sequence that lie in one chunk.
#[derive(Clone, Copy)]
struct Piece {
    /// The first of them, in the batch.
    row: usize,
    /// Its place in the chunk.
    place: usize,
    len: usize,
}

impl Scan<'_> {
    /// `rows` of `span`, chunk by chunk.
    #[inline(always)]
    fn pieces(&self, span: &Span, rows: Range<usize>) -> impl Iterator<Item = Piece> + use<> {
        let (size, mut row) = (self.size, rows.start);
        let mut place = (span.position + (row - span.start)) % size;
        std::iter::from_fn(move || {
            let len = (rows.end - row).min(size - place);
            let piece = Piece { row, place, len };
            (row, place) = (row + len, 0);
            (len > 0).then_some(piece)
        })
    }

    /// b of a group, of token `place` of the chunk in which `piece` lies: of the batch, or kept.
    #[inline(always)]
    fn b_of(&self, span: &Span, piece: &Piece, place: usize, group: usize) -> *const f32 {
        if piece.row + place >= span.start + piece.place {
            let row = self.b.row(piece.row + place - piece.place);
            row[group * self.states..][..self.states].as_ptr()
        } else {
            let kept = self.chunk_b.row_pointer(span.slot).cast_const();
            kept.wrapping_add((group * self.size + place) * self.states)
        }
    }

    /// Keeps b of row `t`.
    ///
    /// # Safety
    /// No one else reads or writes what the slot keeps for the row's place in its chunk.
    unsafe fn keep_b(&self, span: &Span, t: usize) {
        let place = (span.position + (t - span.start)) % self.size;
        for (group, b) in self.b.row(t).chunks_exact(self.states.max(1)).enumerate() {
            let at = (group * self.size + place) * self.states;
            // SAFETY: the caller's promise.
            let kept = unsafe { self.chunk_b.columns(span.slot, at..at + self.states) };
            kept.copy_from_slice(b);
        }
    }

    /// Where the scores of a row and group are.
    #[inline(always)]
    fn scores(&self, row: usize, group: usize) -> *mut f32 {
        let at = (row * self.groups + group) * self.pitch;
        self.scores.0.wrapping_add(at)
    }
}

/// The products c · b of some rows.
struct Scores<'a> {
    scan: &'a Scan<'a>,
    spans: &'a [Span],
    rows: Range<usize>,
}

impl Kernel for Scores<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (span, rows) in spans_of(self.spans, self.rows) {
            for piece in self.scan.pieces(span, rows) {
                for group in 0..self.scan.groups {
                    let mut first = 0;
                    while first < piece.len {
                        let at = Piece {
                            row: piece.row + first,
                            place: piece.place + first,
                            len: piece.len - first,
                        };
                        // SAFETY: the rows' scores are ours; nobody writes what the tokens keep.
                        first += unsafe {
                            match at.len {
                                4.. if S::LANES == 16 => {
                                    score::<S, 4>(s, self.scan, span, at, group)
                                }
                                2.. => score::<S, 2>(s, self.scan, span, at, group),
                                _ => score::<S, 1>(s, self.scan, span, at, group),
                            }
                        };
                    }
                }
            }
        }
    }
}

/// Scores of the first `R` rows of `piece` with the tokens up to the last of them.
///
/// # Safety
/// The scores of these rows belong to the caller.
#[inline(always)]
unsafe fn score<S: Simd, const R: usize>(
    s: S,
    scan: &Scan<'_>,
    span: &Span,
    piece: Piece,
    group: usize,
) -> usize {
    let c: [*const f32; R] = std::array::from_fn(|r| {
        scan.c.row(piece.row + r)[group * scan.states..][..scan.states].as_ptr()
    });
    let last = piece.place + R - 1;
    for place in (0..=last).step_by(COLUMNS) {
        // Tokens that are not there repeat the last one; what comes out of them is not used.
        let b = std::array::from_fn(|i| scan.b_of(span, &piece, (place + i).min(last), group));
        // SAFETY: all rows have `states` elements, and `pitch` is a multiple of `COLUMNS`.
        unsafe {
            let sums = tile::<S, Widened<f32>, R>(s, c, b, (S::LANES, 0), scan.states);
            for (r, sums) in sums.into_iter().enumerate() {
                let to = scan.scores(piece.row + r, group).add(place);
                to.cast::<[f32; COLUMNS]>().write(sums);
            }
        }
    }
    R
}

/// Some heads of one sequence.
struct Heads<'a> {
    scan: &'a Scan<'a>,
    span: &'a Span,
    heads: Range<usize>,
    /// Room for l of a chunk and the decays since its begin, and for the weights of `ROWS` rows.
    decays: &'a mut [f32],
    begins: &'a mut [f32],
    weights: &'a mut [f32],
    /// Room for b of a full chunk, and for what enters the state, `STRIP` of each token.
    packed: &'a mut [f32],
    inputs: &'a mut [f32],
}

impl Kernel for Heads<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let scan = self.scan;
        assert!(self.decays.len() >= scan.pitch && self.begins.len() >= scan.pitch);
        assert!(self.weights.len() >= ROWS * scan.pitch);
        assert!(self.packed.len() >= scan.size * scan.states);
        assert!(self.inputs.len() >= scan.size * STRIP);
        for piece in scan.pieces(self.span, self.span.rows()) {
            let is_full = piece.place + piece.len == scan.size;
            let mut of_group = usize::MAX;
            for head in self.heads.clone() {
                let group = head / scan.heads_of_group;
                // SAFETY: these heads of the rows and of the slot are ours, as a slot belongs to one
                // span; the rooms are as large as asserted; scores of all rows are there.
                unsafe {
                    self.enter(s, piece, head);
                    let mut first = 0;
                    while first < piece.len {
                        let at = Piece {
                            row: piece.row + first,
                            place: piece.place + first,
                            len: piece.len - first,
                        };
                        first += match at.len {
                            ROWS.. => self.rows::<S, ROWS>(s, at, head),
                            2.. => self.rows::<S, 2>(s, at, head),
                            _ => self.rows::<S, 1>(s, at, head),
                        };
                    }
                    if is_full {
                        if group != of_group {
                            of_group = group;
                            self.pack(piece, group);
                        }
                        self.update(s, head);
                    }
                }
            }
        }
    }
}

// SAFETY of the blocks below: what `run` states is every method's condition.
impl Heads<'_> {
    /// l and u of a piece's rows, to the room and to the slot.
    #[inline(always)]
    unsafe fn enter<S: Simd>(&mut self, s: S, piece: Piece, head: usize) {
        let scan = self.scan;
        let (width, (least, greatest)) = (scan.width, scan.dt_limit);
        let of_head = |view: View<f32>| s.splat(view.row(0)[head]);
        let (dt_bias, a) = (scan.dt_bias.map_or(s.splat(0.0), of_head), of_head(scan.a));
        // SAFETY: as above; a block is whole vectors, and vectors of channels are masked.
        unsafe {
            let kept = scan.chunk_decays.row_pointer(self.span.slot);
            let kept = kept.add(head * scan.size);
            let u = scan.chunk_inputs.row_pointer(self.span.slot);
            let u = u.add((head * scan.size + piece.place) * width);
            let (decays, begins) = (self.decays.as_mut_ptr(), self.begins.as_mut_ptr());
            std::ptr::copy_nonoverlapping(kept, decays, piece.place);
            let mut l = match piece.place {
                0 => 0.0,
                place => self.decays[place - 1],
            };
            for first in (0..piece.len).step_by(MOST_LANES) {
                let n = (piece.len - first).min(MOST_LANES);
                let (mut deltas, mut logs) = ([0.0; MOST_LANES], [0.0; MOST_LANES]);
                for (i, delta) in deltas[..n].iter_mut().enumerate() {
                    *delta = scan.dt.row(piece.row + first + i)[head];
                }
                for i in (0..n).step_by(S::LANES) {
                    let dt = s.load(deltas.as_ptr().add(i));
                    let delta = softplus(s, s.add(dt, dt_bias));
                    // The order of arguments lets a NaN through.
                    let delta = s.min(s.splat(greatest), s.max(s.splat(least), delta));
                    s.store(deltas.as_mut_ptr().add(i), delta);
                    s.store(logs.as_mut_ptr().add(i), s.mul(delta, a));
                }
                for i in 0..n {
                    l += logs[i];
                    *decays.add(piece.place + first + i) = l;
                    let row = piece.row + first + i;
                    let x = scan.x.row(row).as_ptr().add(head * width);
                    let y = scan.y.row_pointer(row).wrapping_add(head * width);
                    let u = u.add((first + i) * width);
                    for p in (0..width).step_by(S::LANES) {
                        let lanes = (width - p).min(S::LANES);
                        let x = load(s, x.add(p), lanes);
                        let x = match scan.scale_input {
                            true => s.mul(s.splat(deltas[i]), x),
                            false => x,
                        };
                        store(s, u.add(p), lanes, x);
                    }
                    // The next head, and what will be written of this one: rows are too far apart for
                    // the machine to guess.
                    for line in (0..width).step_by(16) {
                        s.prefetch(x.wrapping_add(width + line));
                        s.prefetch(y.wrapping_add(line));
                    }
                }
                for i in (0..n).step_by(S::LANES) {
                    let at = piece.place + first + i;
                    let lanes = (n - i).min(S::LANES);
                    let l = load(s, decays.add(at), lanes);
                    store(s, begins.add(at), lanes, exp(s, l));
                }
            }
            let (from, to) = (decays.add(piece.place), kept.add(piece.place));
            std::ptr::copy_nonoverlapping(from, to, piece.len);
        }
    }

    /// Outputs of the first `K` rows of a piece.
    #[inline(always)]
    unsafe fn rows<S: Simd, const K: usize>(&mut self, s: S, piece: Piece, head: usize) -> usize {
        let scan = self.scan;
        let (slot, states, width) = (self.span.slot, scan.states, scan.width);
        let group = head / scan.heads_of_group;
        let (decays, weights) = (self.decays.as_ptr(), self.weights.as_mut_ptr());
        // SAFETY: as above; rooms are whole vectors, and what lies beyond a row's own token is not used.
        unsafe {
            for k in 0..K {
                let l = s.splat(*decays.add(piece.place + k));
                let scores = scan.scores(piece.row + k, group);
                for i in (0..=piece.place + k).step_by(S::LANES) {
                    let decay = exp(s, s.sub(l, s.load(decays.add(i))));
                    let weight = s.mul(decay, s.load(scores.add(i)));
                    s.store(weights.add(k * scan.pitch + i), weight);
                }
            }
            let tokens = scan.chunk_inputs.row_pointer(slot).cast_const();
            let state = scan.state.row_pointer(slot).cast_const();
            let mut tile = Outputs::<S, K> {
                states,
                width,
                c: std::array::from_fn(|k| {
                    scan.c.row(piece.row + k)[group * states..][..states].as_ptr()
                }),
                state: state.add(head * states * width),
                by: std::array::from_fn(|k| s.splat(self.begins[piece.place + k])),
                weights: std::array::from_fn(|k| weights.add(k * scan.pitch).cast_const()),
                seen: piece.place + 1,
                tokens: tokens.add(head * scan.size * width),
                d: scan.d.map(|d| s.splat(d.row(0)[head])),
                x: std::array::from_fn(|k| scan.x.row(piece.row + k).as_ptr().add(head * width)),
                y: std::array::from_fn(|k| scan.y.row_pointer(piece.row + k).add(head * width)),
            };
            let mut left = width;
            while left > 0 {
                // So many vectors that a tile and what it multiplies fit into the registers.
                let n = match left / S::LANES {
                    0 => tile.run::<1, true>(s, left),
                    8.. if K == 1 => tile.run::<8, false>(s, S::LANES),
                    4.. if K == 1 || S::LANES == 16 => tile.run::<4, false>(s, S::LANES),
                    2.. => tile.run::<2, false>(s, S::LANES),
                    _ => tile.run::<1, false>(s, S::LANES),
                };
                left -= n;
                tile.advance(n);
            }
        }
        K
    }

    /// b of all tokens of a full chunk, of which a piece is the last.
    #[inline(always)]
    unsafe fn pack(&mut self, piece: Piece, group: usize) {
        let (scan, states) = (self.scan, self.scan.states);
        for place in 0..scan.size {
            let b = scan.b_of(self.span, &piece, place, group);
            // SAFETY: as above.
            unsafe {
                let to = self.packed.as_mut_ptr().add(place * states);
                std::ptr::copy_nonoverlapping(b, to, states);
            }
        }
    }

    /// The state after a full chunk.
    #[inline(always)]
    unsafe fn update<S: Simd>(&mut self, s: S, head: usize) {
        let scan = self.scan;
        let (size, states, width) = (scan.size, scan.states, scan.width);
        let last = s.splat(self.decays[size - 1]);
        // SAFETY: as above; vectors of channels are masked to those that are there.
        unsafe {
            let decays = self.decays.as_ptr();
            let ends = self.weights.as_mut_ptr();
            for i in (0..size).step_by(S::LANES) {
                let decay = exp(s, s.sub(last, s.load(decays.add(i))));
                s.store(ends.add(i), decay);
            }
            let u = scan.chunk_inputs.row_pointer(self.span.slot);
            let u = u.add(head * size * width);
            let state = scan.state.row_pointer(self.span.slot);
            let state = state.add(head * states * width);
            let inputs = self.inputs.as_mut_ptr();
            for first in (0..width).step_by(STRIP) {
                let channels = (width - first).min(STRIP);
                for place in 0..size {
                    let by = s.splat(*ends.add(place));
                    for p in (0..channels).step_by(S::LANES) {
                        let lanes = (channels - p).min(S::LANES);
                        let input = load(s, u.add(place * width + first + p), lanes);
                        s.store(inputs.add(place * STRIP + p), s.mul(by, input));
                    }
                }
                let mut p = 0;
                while p < channels {
                    let update = Update {
                        states,
                        width,
                        size,
                        state: state.add(first + p),
                        by: exp(s, last),
                        b: self.packed.as_ptr(),
                        inputs: inputs.add(p).cast_const(),
                    };
                    p += match (channels - p) / S::LANES {
                        0 => update.run::<1, true>(s, channels - p),
                        4.. if S::LANES == 16 => update.run::<4, false>(s, S::LANES),
                        2.. => update.run::<2, false>(s, S::LANES),
                        _ => update.run::<1, false>(s, S::LANES),
                    };
                }
            }
        }
    }
}
