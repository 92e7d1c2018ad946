//! Attention with grouped queries (Ainslie et al., 2023), with or without rotary positions, over all
//! earlier tokens or a window of them.

use strata_kernels::ops::{self, KvWrite};
use strata_kernels::{Result, Tensor};

use crate::layer::{Context, Layer, LayerSpec};
use crate::linear::{Projection, projection};
use crate::param::{Check, Fields, Param};
use crate::params;
use crate::state::{Pages, StateSpec};
use crate::weights::{WeightSpec, Weights};
use crate::yaml::{Faults, Value};

params! {
    /// Rotary positions.
    pub struct Rope as "rope" {
        /// Base of the frequencies: pair f turns by theta^(-2f / dims) radians a token.
        theta: f64,
        /// How many elements of a head turn; all if left out.
        dims: Option<usize> = None,
        /// Whether neighbours form a pair, rather than the halves.
        interleaved: bool = false,
    }
}

impl Check for Rope {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        if self.theta <= 0.0 {
            faults.add(
                fields.at("theta"),
                format!("`theta` is {}; it must be positive", self.theta),
            );
        }
    }
}

params! {
    /// Parameters of `attention`.
    pub struct Attention as "attention" {
        /// Name of its weights within the block.
        name: Option<String> = None,
        /// Query heads.
        heads: usize,
        /// Key and value heads; `heads` is a multiple.
        kv_heads: usize,
        /// Elements of a head.
        head_dim: usize,
        /// Rotary positions; none if left out.
        rope: Option<Rope> = None,
        /// How many tokens each sees, itself included; all if left out.
        window: Option<usize> = None,
        /// Multiplies the scores; 1/√head_dim if left out.
        scale: Option<f64> = None,
        /// Whether the projections of queries, keys and values have biases.
        bias: bool = false,
        /// Whether the output projection has one.
        out_bias: bool = false,
    }
}

impl Check for Attention {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        let (heads, kv_heads) = (self.heads, self.kv_heads);
        let sizes = [
            ("heads", heads),
            ("kv_heads", kv_heads),
            ("head_dim", self.head_dim),
        ];
        fields.positive(&sizes, faults);
        if kv_heads > 0 && heads % kv_heads != 0 {
            let message = format!("`heads` is {heads}, no multiple of the {kv_heads} `kv_heads`");
            faults.add(fields.at("heads"), message);
        }
        if self.window == Some(0) {
            faults.add(fields.at("window"), "a `window` must hold at least 1 token");
        }
        if let Some(dims) = self.rope.as_ref().and_then(|r| r.dims)
            && (dims > self.head_dim || dims % 2 != 0)
        {
            let message = format!(
                "`dims` of rope is {dims}; it must be even and at most {}",
                self.head_dim
            );
            faults.add(fields.at("rope"), message);
        }
    }
}

impl LayerSpec for Attention {
    fn kind(&self) -> &'static str {
        "attention"
    }

    fn name(&self) -> &str {
        self.name.as_deref().unwrap_or("attention")
    }

    fn write(&self) -> Value {
        Param::write(self)
    }

    fn weights(&self, widths: &[usize]) -> Vec<WeightSpec> {
        let d_in = widths[0];
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut specs = projection("q", q, d_in, self.bias);
        specs.extend(projection("k", kv, d_in, self.bias));
        specs.extend(projection("v", kv, d_in, self.bias));
        specs.extend(projection("o", d_in, q, self.out_bias));
        specs
    }

    fn state(&self) -> StateSpec {
        let width = self.kv_heads * self.head_dim;
        let pages = Some(Pages {
            keys: width,
            values: width,
        });
        StateSpec {
            pages,
            slot: Vec::new(),
        }
    }

    fn build(&self, weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        let frequencies = match &self.rope {
            Some(rope) => {
                let dims = rope.dims.unwrap_or(self.head_dim / 2 * 2);
                // f64 until the end, as `theta` reaches 1e11 and beyond.
                let turn = |f| rope.theta.powf(-2.0 * f as f64 / dims as f64) as f32;
                let turns: Vec<f32> = (0..dims / 2).map(turn).collect();
                Some(weights.upload(1, turns.len(), &turns)?)
            }
            None => None,
        };
        let scale = self.scale.unwrap_or((self.head_dim as f64).powf(-0.5)) as f32;
        Ok(Box::new(Ready {
            scale,
            frequencies,
            q: Projection::build("q", weights)?,
            k: Projection::build("k", weights)?,
            v: Projection::build("v", weights)?,
            o: Projection::build("o", weights)?,
            spec: self.clone(),
        }))
    }
}

struct Ready {
    spec: Attention,
    scale: f32,
    frequencies: Option<Tensor>,
    q: Projection,
    k: Projection,
    v: Projection,
    o: Projection,
}

impl Layer for Ready {
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()> {
        let Attention {
            heads,
            kv_heads,
            head_dim,
            window,
            ..
        } = self.spec;
        let mut q = self.q.apply(x, cx)?; // (T, heads · head_dim)
        let mut k = self.k.apply(x, cx)?; // (T, kv_heads · head_dim)
        let v = self.v.apply(x, cx)?;
        let ragged = cx.ragged;
        if let (Some(frequencies), Some(rope)) = (&self.frequencies, &self.spec.rope) {
            let interleaved = rope.interleaved;
            for x in [&mut q, &mut k] {
                cx.backend.rope(ops::Rope {
                    x,
                    head_dim,
                    frequencies,
                    interleaved,
                    scale: 1.0,
                    ragged,
                })?;
            }
        }
        let mut seen = cx.take(q.rows(), q.cols())?;
        let [k_pages, v_pages] = cx.state.pages.as_mut().expect("attention asks for pages");
        cx.backend.kv_write(KvWrite {
            k: &k,
            v: &v,
            k_pages,
            v_pages,
            ragged,
        })?;
        cx.backend.attention(ops::Attention {
            q: &q,
            k_pages,
            v_pages,
            heads,
            kv_heads,
            head_dim,
            v_head_dim: head_dim,
            scale: self.scale,
            window,
            keep_first: 0,
            ragged,
            y: &mut seen,
        })?;
        self.o.forward(&seen, y, cx)
    }
}
