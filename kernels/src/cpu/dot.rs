//! Products of rows of x with rows of a weight, the inner part of `linear` and `expert_linear`.
//!
//! The sum of one pair of rows is always formed in one order: K is cut into blocks of equal size, a
//! block's products go into the lanes of one register step by step, its lanes are summed by halves,
//! and blocks are added in order. Tiles hold several such registers side by side and never change
//! what goes into one, so neither the size of the batch nor a row's place in it shows in the bits.

use std::marker::PhantomData;
use std::ops::Range;

use half::bf16;

use super::fp8::{CodePairs, Codes};
use super::scratch::Plain;
use super::simd::{Float, Kernel, Simd};
use crate::tensor::{View, ViewMut};

/// Rows of the weight in a tile.
pub(crate) const COLUMNS: usize = 4;
/// Batches beyond this copy blocks of the weight into panels, in the order in which tiles read them.
pub(crate) const STREAMED_ROWS: usize = 8;
/// Rows of the weight in a panel: with 8 KiB of each it stays in a second-level cache.
pub(crate) const PANEL_ROWS: usize = 64;
/// Copies of x have rows of a multiple of this, zeros at the end.
const X_STEP: usize = 64;

/// Elements from row to row of a copy of x with `k` columns: an odd number of cache lines, so that
/// the rows of a tile do not fall into the same sets of a cache.
pub(crate) fn x_pitch(k: usize) -> usize {
    k.next_multiple_of(X_STEP) + X_STEP / 2
}

/// What a step of a product loads and how it multiplies.
pub(crate) trait Product<S: Simd>: 'static {
    /// Elements of x.
    type X: Plain;
    /// Elements of the weight.
    type W: Copy;
    /// The product with a packed weight.
    type Packed: Product<S, X = Self::X>;
    type Xs: Copy;
    type Ws: Copy;
    /// Elements of K in a step.
    const STEP: usize;
    /// The largest block of K. A panel of it stays in a second-level cache; where it is twice as long, sums over
    /// lanes are half as many, which counts for more than rows of x that leave the first-level cache.
    const BLOCK: usize;
    unsafe fn x(s: S, p: *const Self::X) -> Self::Xs;
    unsafe fn x_n(s: S, p: *const Self::X, n: usize) -> Self::Xs;
    unsafe fn w(s: S, p: *const Self::W) -> Self::Ws;
    unsafe fn w_n(s: S, p: *const Self::W, n: usize) -> Self::Ws;
    fn multiply_add(s: S, x: Self::Xs, w: Self::Ws, acc: S::V) -> S::V;
    /// Copies a step of `n` elements; the others become zero.
    unsafe fn pack(s: S, from: *const Self::W, n: usize, to: *mut Packed<S, Self>);
    /// Whether a row of the weight has a scale, which whole sums are multiplied by.
    const SCALED: bool = false;
    /// The scale of a row.
    #[inline(always)]
    fn scale(_row: &[Self::W]) -> f32 {
        1.0
    }
}

/// Elements of a packed weight.
pub(crate) type Packed<S, P> = <<P as Product<S>>::Packed as Product<S>>::W;

/// f32 times a weight that is widened in registers.
pub(crate) struct Widened<T>(PhantomData<T>);

// SAFETY of the blocks below: each method's caller answers for its pointers.
impl<S: Simd, T: Float> Product<S> for Widened<T> {
    type X = f32;
    type W = T;
    type Packed = Widened<f32>;
    type Xs = S::V;
    type Ws = S::V;
    const STEP: usize = S::LANES;
    const BLOCK: usize = 1024;
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
    unsafe fn w(s: S, p: *const T) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { T::load(s, p) }
    }
    #[inline(always)]
    unsafe fn w_n(s: S, p: *const T, n: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { T::load_n(s, p, n) }
    }
    #[inline(always)]
    fn multiply_add(s: S, x: S::V, w: S::V, acc: S::V) -> S::V {
        s.fma(x, w, acc)
    }
    #[inline(always)]
    unsafe fn pack(s: S, from: *const T, n: usize, to: *mut f32) {
        // SAFETY: the caller's promise; a panel has room for whole steps.
        unsafe {
            let w = if n == S::LANES {
                T::load(s, from)
            } else {
                T::load_n(s, from, n)
            };
            s.store(to, w);
        }
    }
}

/// BF16 times BF16 by the machine's dot product.
pub(crate) struct Pairs;

impl<S: Simd> Product<S> for Pairs {
    type X = bf16;
    type W = bf16;
    type Packed = Pairs;
    type Xs = S::Pairs;
    type Ws = S::Pairs;
    const STEP: usize = 2 * S::LANES;
    const BLOCK: usize = 4096;
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
    unsafe fn w(s: S, p: *const bf16) -> S::Pairs {
        // SAFETY: the caller's promise.
        unsafe { s.load_pairs(p) }
    }
    #[inline(always)]
    unsafe fn w_n(s: S, p: *const bf16, n: usize) -> S::Pairs {
        // SAFETY: the caller's promise.
        unsafe { s.load_pairs_n(p, n) }
    }
    #[inline(always)]
    fn multiply_add(s: S, x: S::Pairs, w: S::Pairs, acc: S::V) -> S::V {
        s.dot_pairs(acc, x, w)
    }
    #[inline(always)]
    unsafe fn pack(_s: S, from: *const bf16, n: usize, to: *mut bf16) {
        let step = 2 * S::LANES;
        // SAFETY: the caller's promise; a panel has room for whole steps.
        unsafe {
            std::ptr::copy_nonoverlapping(from, to, n);
            if n < step {
                std::ptr::write_bytes(to.add(n), 0, step - n);
            }
        }
    }
}

/// `R` rows of x by four rows of the weight, over `k` elements. The pointers of the weight advance by
/// `w_step` each step; unless it is zero, what lies `ahead` of them is asked for meanwhile.
///
/// # Safety
/// Each pointer of x has `k` elements, and each of the weight has its steps.
#[inline(always)]
pub(crate) unsafe fn tile<S: Simd, P: Product<S>, const R: usize>(
    s: S,
    x: [*const P::X; R],
    w: [*const P::W; COLUMNS],
    (w_step, ahead): (usize, usize),
    k: usize,
) -> [[f32; COLUMNS]; R] {
    let mut acc = [[s.splat(0.0); COLUMNS]; R];
    let steps = k / P::STEP;
    // SAFETY: steps below `steps` are whole, and the last one reads what is left.
    unsafe {
        for i in 0..steps {
            if ahead > 0 {
                for w in w {
                    s.prefetch(w.wrapping_add(i * w_step + ahead));
                }
            }
            let ws = [
                P::w(s, w[0].add(i * w_step)),
                P::w(s, w[1].add(i * w_step)),
                P::w(s, w[2].add(i * w_step)),
                P::w(s, w[3].add(i * w_step)),
            ];
            for r in 0..R {
                let x = P::x(s, x[r].add(i * P::STEP));
                for c in 0..COLUMNS {
                    acc[r][c] = P::multiply_add(s, x, ws[c], acc[r][c]);
                }
            }
        }
        let rest = k % P::STEP;
        if rest > 0 {
            let ws = [
                P::w_n(s, w[0].add(steps * w_step), rest),
                P::w_n(s, w[1].add(steps * w_step), rest),
                P::w_n(s, w[2].add(steps * w_step), rest),
                P::w_n(s, w[3].add(steps * w_step), rest),
            ];
            for r in 0..R {
                let x = P::x_n(s, x[r].add(steps * P::STEP), rest);
                for c in 0..COLUMNS {
                    acc[r][c] = P::multiply_add(s, x, ws[c], acc[r][c]);
                }
            }
        }
    }
    let mut sums = [[0.0; COLUMNS]; R];
    for r in 0..R {
        sums[r] = s.sum4(acc[r]);
    }
    sums
}

/// Cuts K into blocks of one size that depends on K only.
#[inline(always)]
fn blocks<S: Simd, P: Product<S>>(k: usize) -> impl Iterator<Item = Range<usize>> {
    let size = k
        .div_ceil(k.div_ceil(P::BLOCK).max(1))
        .next_multiple_of(X_STEP)
        .max(X_STEP);
    (0..k.max(1))
        .step_by(size)
        .map(move |start| start..(start + size).min(k))
}

/// Where rows of x lie.
#[derive(Clone, Copy)]
pub(crate) struct Rows<T> {
    pub(crate) pointer: *const T,
    /// Elements from row to row.
    pub(crate) pitch: usize,
}

impl<T> Rows<T> {
    /// The rows from `first` on.
    pub(crate) fn starting_at(self, first: usize) -> Self {
        Rows {
            pointer: self.pointer.wrapping_add(first * self.pitch),
            ..self
        }
    }
}

// SAFETY: a pointer to elements that nobody writes while products read them.
unsafe impl<T: Plain> Send for Rows<T> {}
// SAFETY: as above.
unsafe impl<T: Plain> Sync for Rows<T> {}

/// Which row of x and which row of y the i-th product reads and writes.
#[derive(Clone, Copy)]
pub(crate) enum Place<'a> {
    /// Row i of both.
    Same,
    /// Row `choices[i]` of y, and of x that divided by `x_div`. Rows of y are distinct.
    Listed { choices: &'a [u32], x_div: usize },
}

impl Place<'_> {
    /// The rows of x and of y.
    #[inline(always)]
    pub(crate) fn at(self, i: usize) -> (usize, usize) {
        match self {
            Place::Same => (i, i),
            Place::Listed { choices, x_div } => (choices[i] as usize / x_div, choices[i] as usize),
        }
    }
}

/// The products of some rows of x with rows `columns` of a weight.
pub(crate) struct Dot<'a, X, W> {
    pub(crate) x: Rows<X>,
    /// How many products each row of the weight takes part in.
    pub(crate) rows: usize,
    /// Which rows of x and y those are.
    pub(crate) place: Place<'a>,
    /// Rows of `k` elements, behind which a scale may lie.
    pub(crate) w: View<W>,
    pub(crate) k: usize,
    pub(crate) columns: Range<usize>,
    pub(crate) bias: Option<View<f32>>,
    /// Columns `columns` of the rows of y belong to this kernel alone.
    pub(crate) y: ViewMut<f32>,
    /// Room for a panel: `panel_len` elements of four bytes.
    pub(crate) panel: &'a mut [f32],
}

/// Elements of four bytes in a panel of `columns` rows of a weight.
pub(crate) fn panel_len(columns: usize) -> usize {
    // A block is at most 1024 elements of four bytes, or 4096 of two, and rounding up adds a little.
    columns.next_multiple_of(COLUMNS) * (2048 + X_STEP)
}

/// A [`Dot`] by a certain product.
pub(crate) struct By<P, D>(pub(crate) D, pub(crate) PhantomData<P>);

macro_rules! kernel {
    ([$($generics:tt)*] $product:ty, $x:ty, $w:ty, $bf16:expr) => {
        impl<$($generics)*> Kernel for By<$product, Dot<'_, $x, $w>> {
            type Out = ();
            const BF16_DOT: bool = $bf16;
            #[inline(always)]
            fn run<S: Simd>(self, s: S) {
                if self.0.rows <= STREAMED_ROWS {
                    stream::<S, $product>(s, self.0);
                } else {
                    by_panels::<S, $product>(s, self.0);
                }
            }
        }
    };
}
kernel!([T: Float] Widened<T>, f32, T, false);
kernel!([] Pairs, bf16, bf16, true);
kernel!([] Codes, f32, u8, false);
kernel!([] CodePairs, bf16, u8, true);

/// Few rows of x: the weight is read once, where it lies.
#[inline(always)]
fn stream<S: Simd, P: Product<S>>(s: S, dot: Dot<'_, P::X, P::W>)
where
    P::W: crate::tensor::Element,
{
    let k = dot.k;
    let far = Far::<COLUMNS>::over(dot.columns.clone());
    for n in far.places() {
        let columns = far.at(n);
        let w: [*const P::W; COLUMNS] = columns.map(|c| dot.w.row(c).as_ptr());
        let mut sums = [[0.0f32; COLUMNS]; STREAMED_ROWS];
        for block in blocks::<S, P>(k) {
            let mut first = 0;
            while first < dot.rows {
                let r = (dot.rows - first).min(S::ROWS).min(4);
                let (block, sums) = (block.clone(), &mut sums[first..]);
                // SAFETY: rows of x and of the weight have the elements of the block.
                unsafe {
                    match r {
                        1 => stream_tile::<S, P, 1>(s, &dot, first, w, block, sums),
                        2 => stream_tile::<S, P, 2>(s, &dot, first, w, block, sums),
                        3 => stream_tile::<S, P, 3>(s, &dot, first, w, block, sums),
                        _ => stream_tile::<S, P, 4>(s, &dot, first, w, block, sums),
                    }
                }
                first += r;
            }
        }
        for (r, sums) in sums.iter().enumerate().take(dot.rows) {
            for (c, sum) in columns.iter().zip(sums) {
                let sum = match P::SCALED {
                    true => sum * P::scale(dot.w.row(*c)),
                    false => *sum,
                };
                // SAFETY: these columns of the row belong to this kernel, one at a time.
                let y = unsafe { dot.y.columns(dot.place.at(r).1, *c..*c + 1) };
                y[0] = match dot.bias {
                    Some(bias) => sum + bias.row(0)[*c],
                    None => sum,
                };
            }
        }
    }
}

/// Columns of which `N` are taken at a time, far apart: of as many runs each the next. Memory is then read by
/// `N` streams that go on from row to row; rows side by side would be streams that end with every row, which
/// the machine's prefetching begins anew. On the machine of BENCHMARKS.md far ones read up to half as fast again.
pub(crate) struct Far<const N: usize> {
    columns: Range<usize>,
    run: usize,
}

impl<const N: usize> Far<N> {
    pub(crate) fn over(columns: Range<usize>) -> Self {
        let run = columns.len().div_ceil(N);
        Far { columns, run }
    }

    /// Where the runs are at once.
    pub(crate) fn places(&self) -> Range<usize> {
        0..self.run
    }

    /// The columns at a place. Where a run has none, its neighbours' last one is there again.
    pub(crate) fn at(&self, place: usize) -> [usize; N] {
        let last = self.columns.end - 1;
        std::array::from_fn(|c| (self.columns.start + c * self.run + place).min(last))
    }
}

/// Adds the products of a block to `sums`.
///
/// # Safety
/// Rows `first..first + R` exist, and rows of x and w have the elements of the block.
#[inline(always)]
unsafe fn stream_tile<S: Simd, P: Product<S>, const R: usize>(
    s: S,
    dot: &Dot<'_, P::X, P::W>,
    first: usize,
    w: [*const P::W; COLUMNS],
    block: Range<usize>,
    sums: &mut [[f32; COLUMNS]],
) where
    P::W: crate::tensor::Element,
{
    // SAFETY: the caller's promise.
    let part = unsafe {
        let mut x = [dot.x.pointer; R];
        for (r, x) in x.iter_mut().enumerate() {
            *x = x.add(dot.place.at(first + r).0 * dot.x.pitch + block.start);
        }
        let w = w.map(|w| w.add(block.start));
        // The machine's own prefetching follows streams that go on.
        tile::<S, P, R>(s, x, w, (P::STEP, 0), block.len())
    };
    for (sums, part) in sums.iter_mut().zip(part) {
        for (sum, part) in sums.iter_mut().zip(part) {
            *sum = if block.start == 0 { part } else { *sum + part };
        }
    }
}

/// Many rows of x: a block of the weight goes into a panel, from which all rows take it.
#[inline(always)]
fn by_panels<S: Simd, P: Product<S>>(s: S, dot: Dot<'_, P::X, P::W>)
where
    P::W: crate::tensor::Element,
{
    let k = dot.k;
    let panel = dot.panel.as_mut_ptr().cast::<Packed<S, P>>();
    for columns in dot.columns.clone().step_by(PANEL_ROWS) {
        let columns = columns..(columns + PANEL_ROWS).min(dot.columns.end);
        assert!(
            panel_len(columns.len()) <= dot.panel.len(),
            "room for the panel"
        );
        for block in blocks::<S, P>(k) {
            let steps = block.len().div_ceil(P::STEP);
            // SAFETY: rows of w have `k` elements, and the panel has room by the assertion.
            unsafe { pack::<S, P>(s, &dot.w, columns.clone(), block.clone(), panel) };
            let last = block.end == k;
            let mut first = 0;
            while first < dot.rows {
                let r = (dot.rows - first).min(S::ROWS);
                for n in (0..columns.len()).step_by(COLUMNS) {
                    // SAFETY: a tile of the panel has `steps` steps of four columns; rows of x are
                    // padded to whole steps.
                    unsafe {
                        let w = panel.add(n * steps * P::STEP);
                        let at = columns.start + n..(columns.start + n + COLUMNS).min(columns.end);
                        let (start, k) = (block.start, steps * P::STEP);
                        match r {
                            1 => panel_tile::<S, P, 1>(s, &dot, first, w, at, start, k, last),
                            2 => panel_tile::<S, P, 2>(s, &dot, first, w, at, start, k, last),
                            3 => panel_tile::<S, P, 3>(s, &dot, first, w, at, start, k, last),
                            4 => panel_tile::<S, P, 4>(s, &dot, first, w, at, start, k, last),
                            5 => panel_tile::<S, P, 5>(s, &dot, first, w, at, start, k, last),
                            _ => panel_tile::<S, P, 6>(s, &dot, first, w, at, start, k, last),
                        }
                    }
                }
                first += r;
            }
        }
    }
}

/// Copies a block so that a tile reads it from front to back: four columns a step, step by step.
///
/// # Safety
/// Rows of `w` have the elements of `block`, and `panel` has room.
#[inline(always)]
unsafe fn pack<S: Simd, P: Product<S>>(
    s: S,
    w: &View<P::W>,
    columns: Range<usize>,
    block: Range<usize>,
    panel: *mut Packed<S, P>,
) where
    P::W: crate::tensor::Element,
{
    let steps = block.len().div_ceil(P::STEP);
    let whole = block.len() / P::STEP;
    for n in (0..columns.len()).step_by(COLUMNS) {
        for c in 0..COLUMNS {
            let from = w.row((columns.start + n + c).min(columns.end - 1)).as_ptr();
            // SAFETY: the caller's promise.
            unsafe {
                let from = from.add(block.start);
                let to = panel.add((n * steps + c) * P::STEP);
                for i in 0..whole {
                    P::pack(
                        s,
                        from.add(i * P::STEP),
                        P::STEP,
                        to.add(i * COLUMNS * P::STEP),
                    );
                }
                if whole < steps {
                    let rest = block.len() - whole * P::STEP;
                    P::pack(
                        s,
                        from.add(whole * P::STEP),
                        rest,
                        to.add(whole * COLUMNS * P::STEP),
                    );
                }
            }
        }
    }
}

/// # Safety
/// Rows `first..first + R` exist and have `k` elements from `start`, as has the panel.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // the loop counters of one caller
unsafe fn panel_tile<S: Simd, P: Product<S>, const R: usize>(
    s: S,
    dot: &Dot<'_, P::X, P::W>,
    first: usize,
    w: *const Packed<S, P>,
    columns: Range<usize>,
    start: usize,
    k: usize,
    last: bool,
) where
    P::W: crate::tensor::Element,
{
    let places: [(usize, usize); R] = std::array::from_fn(|r| dot.place.at(first + r));
    // SAFETY: the caller's promise.
    let part = unsafe {
        let x = places.map(|(x, _)| dot.x.pointer.add(x * dot.x.pitch + start));
        let w = std::array::from_fn(|c| w.add(c * P::STEP));
        tile::<S, P::Packed, R>(s, x, w, (COLUMNS * P::STEP, 0), k)
    };
    for r in 0..R {
        // SAFETY: these columns of the row belong to this kernel, one slice at a time.
        let y = unsafe { dot.y.columns(places[r].1, columns.clone()) };
        let scaled = P::SCALED && last;
        if dot.bias.is_none()
            && !scaled
            && let Ok(y) = <&mut [f32; COLUMNS]>::try_from(&mut *y)
        {
            // The same, as one vector.
            if start > 0 {
                y.iter_mut().zip(part[r]).for_each(|(y, part)| *y += part);
            } else {
                *y = part[r];
            }
            continue;
        }
        for (c, y) in y.iter_mut().enumerate() {
            let mut sum = if start == 0 {
                part[r][c]
            } else {
                *y + part[r][c]
            };
            if scaled {
                sum *= P::scale(dot.w.row(columns.start + c));
            }
            *y = match dot.bias {
                Some(bias) if last => sum + bias.row(0)[columns.start + c],
                _ => sum,
            };
        }
    }
}

/// Copies rows of x in the form that a product takes: rounded to BF16 or not, stored as `T`, padded
/// with zeros to `x_pitch`.
pub(crate) struct CopyX<'a, T> {
    pub(crate) x: View<f32>,
    pub(crate) rows: Range<usize>,
    /// Rounds to BF16 where `T` does not.
    pub(crate) round: bool,
    /// The rows, `x_pitch` apart.
    pub(crate) to: &'a mut [T],
}

impl<T: Float> Kernel for CopyX<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let k = self.x.cols();
        let pitch = x_pitch(k);
        for (row, to) in self.rows.zip(self.to.chunks_exact_mut(pitch)) {
            let from = self.x.row(row);
            for i in (0..pitch).step_by(S::LANES) {
                let n = k.saturating_sub(i).min(S::LANES);
                // SAFETY: `n` elements of the row are there, and the pitch is a multiple of the
                // vector width.
                unsafe {
                    let x = if n == S::LANES {
                        s.load(from.as_ptr().add(i))
                    } else {
                        s.load_n(from.as_ptr().add(i.min(k)), n)
                    };
                    let x = if self.round { s.round_bf16(x) } else { x };
                    T::store(s, to.as_mut_ptr().add(i), x);
                }
            }
        }
    }
}
