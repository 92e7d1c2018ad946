//! The register tiles of the scan by chunks: see `ssd_chunked`.

use super::simd::Simd;

/// Channels whose weighted inputs are made for one update of their states.
pub(super) const STRIP: usize = 64;
/// States of a tile that updates.
const STATES: usize = 6;
/// How many elements ahead a row alone asks for a state.
const AHEAD: usize = 1024;

/// `lanes` elements, all of a vector unless it is `MASKED`.
///
/// # Safety
/// `p` points to as many.
#[inline(always)]
unsafe fn get<S: Simd, const MASKED: bool>(s: S, p: *const f32, lanes: usize) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        if MASKED {
            s.load_n(p, lanes)
        } else {
            s.load(p)
        }
    }
}

/// The other way.
///
/// # Safety
/// As for [`get`].
#[inline(always)]
unsafe fn put<S: Simd, const MASKED: bool>(s: S, p: *mut f32, lanes: usize, x: S::V) {
    // SAFETY: the caller's promise.
    unsafe {
        if MASKED {
            s.store_n(p, lanes, x);
        } else {
            s.store(p, x);
        }
    }
}

/// Outputs of `K` rows that follow each other in a chunk, from some channel of a head on.
pub(super) struct Outputs<S: Simd, const K: usize> {
    pub(super) states: usize,
    pub(super) width: usize,
    /// By row: c, the decay since the chunk's begin, the weights of the tokens.
    pub(super) c: [*const f32; K],
    pub(super) by: [S::V; K],
    pub(super) weights: [*const f32; K],
    pub(super) state: *const f32,
    /// u of the chunk's tokens, and how many of them the first row sees; each other sees one more.
    pub(super) tokens: *const f32,
    pub(super) seen: usize,
    pub(super) d: Option<S::V>,
    pub(super) x: [*const f32; K],
    pub(super) y: [*mut f32; K],
}

impl<S: Simd, const K: usize> Outputs<S, K> {
    /// `V` vectors of channels, or the first `lanes` of one; returns how many.
    ///
    /// # Safety
    /// The channels are there, and those of y belong to the caller.
    #[inline(always)]
    pub(super) unsafe fn run<const V: usize, const MASKED: bool>(
        &self,
        s: S,
        lanes: usize,
    ) -> usize {
        let mut acc = [[s.splat(0.0); V]; K];
        let mut row = [s.splat(0.0); V];
        // SAFETY: the caller's promise.
        unsafe {
            for n in 0..self.states {
                let at = self.state.add(n * self.width);
                for (v, row) in row.iter_mut().enumerate() {
                    *row = get::<S, MASKED>(s, at.add(v * S::LANES), lanes);
                    if K == 1 && v * S::LANES % 16 == 0 {
                        // What the head's tokens gave is read next.
                        let token = self.tokens.wrapping_add(n.min(self.seen) * self.width);
                        s.prefetch(at.wrapping_add(AHEAD + v * S::LANES));
                        s.prefetch(token.wrapping_add(v * S::LANES));
                    }
                }
                for (acc, c) in acc.iter_mut().zip(self.c) {
                    let c = s.splat(*c.add(n));
                    for (acc, row) in acc.iter_mut().zip(row) {
                        *acc = s.fma(c, row, *acc);
                    }
                }
            }
            for (acc, by) in acc.iter_mut().zip(self.by) {
                for acc in acc {
                    *acc = s.mul(by, *acc);
                }
            }
            for token in 0..self.seen {
                self.add::<V, MASKED>(s, token, 0, &mut acc, lanes);
            }
            for k in 1..K {
                self.add::<V, MASKED>(s, self.seen + k - 1, k, &mut acc, lanes);
            }
            for (k, acc) in acc.into_iter().enumerate() {
                for (v, acc) in acc.into_iter().enumerate() {
                    let x = get::<S, MASKED>(s, self.x[k].add(v * S::LANES), lanes);
                    let y = self.d.map_or(acc, |d| s.fma(d, x, acc));
                    put::<S, MASKED>(s, self.y[k].add(v * S::LANES), lanes, y);
                }
            }
        }
        if MASKED { lanes } else { V * S::LANES }
    }

    /// What a token gives to the rows from `first` on.
    ///
    /// # Safety
    /// As for `run`.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // a tile is read by its two indices
    unsafe fn add<const V: usize, const MASKED: bool>(
        &self,
        s: S,
        token: usize,
        first: usize,
        acc: &mut [[S::V; V]; K],
        lanes: usize,
    ) {
        let mut row = [s.splat(0.0); V];
        // SAFETY: the caller's promise.
        unsafe {
            let at = self.tokens.add(token * self.width);
            for (v, row) in row.iter_mut().enumerate() {
                *row = get::<S, MASKED>(s, at.add(v * S::LANES), lanes);
            }
            for k in first..K {
                let weight = s.splat(*self.weights[k].add(token));
                for v in 0..V {
                    acc[k][v] = s.fma(weight, row[v], acc[k][v]);
                }
            }
        }
    }

    /// Goes on by `n` channels.
    #[inline(always)]
    pub(super) fn advance(&mut self, n: usize) {
        self.state = self.state.wrapping_add(n);
        self.tokens = self.tokens.wrapping_add(n);
        for k in 0..K {
            self.x[k] = self.x[k].wrapping_add(n);
            self.y[k] = self.y[k].wrapping_add(n);
        }
    }
}

/// The states of some channels of a head through a chunk.
pub(super) struct Update<S: Simd> {
    pub(super) states: usize,
    pub(super) width: usize,
    pub(super) size: usize,
    pub(super) state: *mut f32,
    /// The decay over the whole chunk.
    pub(super) by: S::V,
    /// (Q, N).
    pub(super) b: *const f32,
    /// (Q, `STRIP`): u, each decayed from its token to the chunk's end.
    pub(super) inputs: *const f32,
}

impl<S: Simd> Update<S> {
    /// `V` vectors of channels, or the first `lanes` of one; returns how many.
    ///
    /// # Safety
    /// The channels are there, and belong to the caller.
    #[inline(always)]
    pub(super) unsafe fn run<const V: usize, const MASKED: bool>(
        &self,
        s: S,
        lanes: usize,
    ) -> usize {
        let mut n = 0;
        while n < self.states {
            // SAFETY: the caller's promise.
            n += unsafe {
                match self.states - n {
                    STATES.. => self.tile::<STATES, V, MASKED>(s, n, lanes),
                    2.. => self.tile::<2, V, MASKED>(s, n, lanes),
                    _ => self.tile::<1, V, MASKED>(s, n, lanes),
                }
            };
        }
        if MASKED { lanes } else { V * S::LANES }
    }

    /// `K` states from `n` on.
    ///
    /// # Safety
    /// As for `run`.
    #[inline(always)]
    unsafe fn tile<const K: usize, const V: usize, const MASKED: bool>(
        &self,
        s: S,
        n: usize,
        lanes: usize,
    ) -> usize {
        let mut acc = [[s.splat(0.0); V]; K];
        // SAFETY: the caller's promise.
        unsafe {
            for (k, acc) in acc.iter_mut().enumerate() {
                for (v, acc) in acc.iter_mut().enumerate() {
                    let at = self.state.add((n + k) * self.width + v * S::LANES);
                    *acc = s.mul(self.by, get::<S, MASKED>(s, at, lanes));
                }
            }
            for token in 0..self.size {
                let (b, at) = (
                    self.b.add(token * self.states + n),
                    self.inputs.add(token * STRIP),
                );
                let mut row = [s.splat(0.0); V];
                for (v, row) in row.iter_mut().enumerate() {
                    *row = s.load(at.add(v * S::LANES));
                }
                for (k, acc) in acc.iter_mut().enumerate() {
                    let b = s.splat(*b.add(k));
                    for (acc, row) in acc.iter_mut().zip(row) {
                        *acc = s.fma(b, row, *acc);
                    }
                }
            }
            for (k, acc) in acc.into_iter().enumerate() {
                for (v, acc) in acc.into_iter().enumerate() {
                    let at = self.state.add((n + k) * self.width + v * S::LANES);
                    put::<S, MASKED>(s, at, lanes, acc);
                }
            }
        }
        K
    }
}
