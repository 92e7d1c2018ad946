//! Attention with grouped queries (Ainslie et al., 2023), with or without rotary positions, over all
//! earlier tokens or a window of them.

use std::ops::Range;
use std::sync::Arc;

use strata_kernels::ops::RmsNorm;
use strata_kernels::{Result, Tensor};

use crate::attend::Shape;
use crate::layer::{Context, Layer, LayerSpec, Reach};
use crate::linear::{Projection, projection};
use crate::norm::check_eps;
use crate::param::{Check, Fields, Param};
use crate::params;
use crate::rope::{Rope, Rotation};
use crate::share::{Of, Share, grouped, scaled};
use crate::state::StateSpec;
use crate::weights::{Init, WeightSpec, Weights};
use crate::yaml::{Faults, Value};

params! {
    /// RMS normalisation of every head of queries and keys, before they are turned.
    pub struct QkNorm as "qk_norm" {
        /// Added to the mean square before the root.
        eps: f64,
        /// Whether each head has a weight of its own, rather than all the same.
        per_head: bool = false,
    }
}

impl Check for QkNorm {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        check_eps("eps", self.eps, fields, faults);
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
        /// Normalisation of queries and keys; none if left out.
        qk_norm: Option<QkNorm> = None,
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

impl Attention {
    fn shape(&self) -> Shape {
        Shape {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            v_head_dim: self.head_dim,
            window: self.window,
            keep_first: 0,
            scale: self.scale.unwrap_or((self.head_dim as f64).powf(-0.5)) as f32,
        }
    }
}

impl Check for Attention {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        self.shape().check(fields, faults);
        if let Some(Err(why)) = self.rope.as_ref().map(|r| r.check_dims(self.head_dim)) {
            faults.add(fields.at("rope"), why);
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
        if let Some(norm) = &self.qk_norm {
            let head = |heads: usize| self.head_dim * if norm.per_head { heads } else { 1 };
            for (name, heads) in [("q_norm", self.heads), ("k_norm", self.kv_heads)] {
                specs.push(WeightSpec::vector(
                    name,
                    &[head(heads)],
                    Init::Constant(1.0),
                ));
            }
        }
        specs
    }

    fn sight(&self) -> Option<Reach> {
        self.shape().sight()
    }

    fn attending_last(
        &self,
        window: usize,
        keep_first: usize,
    ) -> Option<std::result::Result<Arc<dyn LayerSpec>, String>> {
        if keep_first > 0 {
            return Some(Err(format!(
                "`attention` cannot go on seeing {keep_first} learned rows before the tokens; `attend` has `keep_first`"
            )));
        }
        let window = Some(self.window.map_or(window, |own| own.min(window)));
        Some(Ok(Arc::new(Attention {
            window,
            ..self.clone()
        })))
    }

    fn state(&self, _widths: &[usize]) -> StateSpec {
        StateSpec {
            pages: Some(self.shape().pages()),
            slot: Vec::new(),
        }
    }

    fn other_flops(&self, _widths: &[usize], position: usize) -> f64 {
        self.shape().flops(position)
    }

    /// Whole groups of query heads where there are enough; else queries that share keys and values with other
    /// ranks'.
    fn share(&self, _widths: &[usize], rank: Of) -> Option<std::result::Result<Share, String>> {
        let (heads, kv_heads, dim) = (self.heads, self.kv_heads, self.head_dim);
        let own = |[own, kv]: [Range<usize>; 2]| {
            let spec = Attention {
                heads: own.len(),
                kv_heads: kv.len(),
                scale: Some(self.scale.unwrap_or((dim as f64).powf(-0.5))),
                ..self.clone()
            };
            let (q, kv) = (scaled(&own, dim), [scaled(&kv, dim)]);
            let share = Share::new(spec)
                .columns("o", heads * dim, q.clone(), rank)
                .rows("k", kv_heads * dim, &kv)
                .rows("v", kv_heads * dim, &kv);
            let q = [q];
            let share = share.rows("q", heads * dim, &q);
            match self.qk_norm.as_ref().is_some_and(|n| n.per_head) {
                true => share
                    .rows("q_norm", heads * dim, &q)
                    .rows("k_norm", kv_heads * dim, &kv),
                false => share,
            }
        };
        Some(grouped(heads, kv_heads, rank).map(own))
    }

    fn build(&self, weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        let rope = self.rope.as_ref();
        let rotation = rope.map(|r| r.build(self.head_dim, weights)).transpose()?;
        Ok(Box::new(Ready {
            shape: self.shape(),
            rotation,
            norm_eps: self.qk_norm.as_ref().map_or(0.0, |n| n.eps as f32),
            q_norm: weights.optional_vector("q_norm")?,
            k_norm: weights.optional_vector("k_norm")?,
            q: Projection::build("q", weights)?,
            k: Projection::build("k", weights)?,
            v: Projection::build("v", weights)?,
            o: Projection::build("o", weights)?,
        }))
    }
}

struct Ready {
    shape: Shape,
    rotation: Option<Rotation>,
    norm_eps: f32,
    q_norm: Option<Tensor>,
    k_norm: Option<Tensor>,
    q: Projection,
    k: Projection,
    v: Projection,
    o: Projection,
}

impl Ready {
    /// Heads of queries or keys, normalised and turned.
    fn placed(
        &self,
        x: &Tensor,
        projection: &Projection,
        norm: Option<&Tensor>,
        cx: &mut Context<'_>,
    ) -> Result<Tensor> {
        let mut y = projection.apply(x, cx)?; // (T, heads · head_dim)
        if let Some(weight) = norm {
            let x = y;
            y = cx.take(x.rows(), x.cols())?;
            cx.backend.rms_norm(RmsNorm {
                x: &x,
                weight: Some(weight),
                eps: self.norm_eps,
                groups: x.cols() / self.shape.head_dim,
                y: &mut y,
            })?;
        }
        if let Some(rotation) = &self.rotation {
            rotation.apply(&mut y, cx)?;
        }
        Ok(y)
    }
}

impl Layer for Ready {
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()> {
        let q = self.placed(x, &self.q, self.q_norm.as_ref(), cx)?;
        let k = self.placed(x, &self.k, self.k_norm.as_ref(), cx)?;
        let v = self.v.apply(x, cx)?;
        let mut seen = cx.take(q.rows(), q.cols())?;
        self.shape.run(&q, Some((&k, &v)), &mut seen, cx)?;
        self.o.forward(&seen, y, cx)?;
        cx.all_reduce(y)
    }
}
