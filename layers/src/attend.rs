//! Attention by itself: queries in the stream, keys and values named. The layer `attention` is this
//! between its projections.

use std::sync::Arc;

use strata_kernels::ops::{self, KvWrite};
use strata_kernels::{Result, Tensor};

use crate::layer::{Context, Layer, LayerSpec, Reach};
use crate::param::{Check, Fields, MAX_SIZE, Param};
use crate::params;
use crate::state::{Pages, StateSpec};
use crate::weights::{WeightSpec, Weights};
use crate::yaml::{Faults, Value};

/// The sizes of an attention, and what each token sees.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub v_head_dim: usize,
    pub window: Option<usize>,
    pub keep_first: usize,
    pub scale: f32,
}

impl Shape {
    /// Faults what does not fit together.
    pub fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        let (heads, kv_heads) = (self.heads, self.kv_heads);
        let sizes = [
            ("heads", heads),
            ("kv_heads", kv_heads),
            ("head_dim", self.head_dim),
            ("v_head_dim", self.v_head_dim),
        ];
        fields.positive(&sizes, faults);
        if kv_heads > 0 && heads % kv_heads != 0 {
            let message = format!("`heads` is {heads}, no multiple of the {kv_heads} `kv_heads`");
            faults.add(fields.at("kv_heads"), message);
        }
        if self.window == Some(0) {
            faults.add(fields.at("window"), "a `window` must hold at least 1 token");
        }
    }

    /// What a token adds to the pages.
    pub fn pages(&self) -> Pages {
        Pages {
            heads: self.kv_heads,
            head_dim: self.head_dim,
            v_head_dim: self.v_head_dim,
        }
    }

    /// What a token sees, where that is not all.
    pub fn sight(&self) -> Option<Reach> {
        let keep_first = self.keep_first;
        self.window.map(|window| Reach { window, keep_first })
    }

    /// Operations on the scores and sums of one token after `position` others.
    pub fn flops(&self, position: usize) -> f64 {
        let reach = self
            .window
            .map_or(usize::MAX, |w| w.saturating_add(self.keep_first));
        let seen = reach.min(position.saturating_add(1));
        2.0 * self.heads as f64 * (self.head_dim + self.v_head_dim) as f64 * seen as f64
    }

    /// Writes keys and values behind those of earlier tokens, if there are new ones, and lets every
    /// query see what it may.
    pub fn run(
        &self,
        q: &Tensor,
        new: Option<(&Tensor, &Tensor)>,
        y: &mut Tensor,
        cx: &mut Context<'_>,
    ) -> Result<()> {
        let ragged = cx.ragged;
        let [k_pages, v_pages] = cx.state.pages.as_mut().expect("attention has pages");
        if let Some((k, v)) = new {
            cx.backend.kv_write(KvWrite {
                k,
                v,
                k_pages,
                v_pages,
                kv_heads: self.kv_heads,
                ragged,
            })?;
        }
        cx.backend.attention(ops::Attention {
            q,
            k_pages,
            v_pages,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            v_head_dim: self.v_head_dim,
            scale: self.scale,
            window: self.window,
            keep_first: self.keep_first,
            ragged,
            y,
        })
    }
}

params! {
    /// Parameters of `attend`.
    pub struct Attend as "attend" {
        /// The value that holds the keys.
        k: Option<String> = None,
        /// The value that holds the values.
        v: Option<String> = None,
        /// Instead of both: what an earlier layer keeps under this name.
        kv: Option<String> = None,
        /// The name under which later layers may read these keys and values.
        keep: Option<String> = None,
        /// Query heads.
        heads: usize,
        /// Key and value heads; `heads` is a multiple.
        kv_heads: usize,
        /// Elements of a query's and of a key's head.
        head_dim: usize,
        /// Elements of a value's head; `head_dim` if left out.
        v_head_dim: Option<usize> = None,
        /// How many tokens each sees, itself included; all if left out.
        window: Option<usize> = None,
        /// So many first tokens of a sequence are seen by all, whatever the window.
        keep_first: usize = 0,
        /// Multiplies the scores; 1/√head_dim if left out.
        scale: Option<f64> = None,
    }
}

impl Attend {
    fn shape(&self) -> Shape {
        Shape {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            v_head_dim: self.v_head_dim.unwrap_or(self.head_dim),
            window: self.window,
            keep_first: self.keep_first,
            scale: self.scale.unwrap_or((self.head_dim as f64).powf(-0.5)) as f32,
        }
    }
}

impl Check for Attend {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        self.shape().check(fields, faults);
        match (&self.k, &self.v, &self.kv) {
            (Some(_), Some(_), None) | (None, None, Some(_)) => {}
            _ => faults.add(fields.at("k"), "`attend` needs `k` and `v`, or `kv`"),
        }
        if self.kv.is_some() && self.keep.is_some() {
            let message = "`keep` is for keys and values of its own; with `kv` there are none";
            faults.add(fields.at("keep"), message);
        }
    }
}

impl LayerSpec for Attend {
    fn kind(&self) -> &'static str {
        "attend"
    }

    fn name(&self) -> &str {
        "attend"
    }

    fn write(&self) -> Value {
        Param::write(self)
    }

    fn operands(&self) -> Vec<&str> {
        [&self.k, &self.v]
            .into_iter()
            .flatten()
            .map(String::as_str)
            .collect()
    }

    fn check_widths(&self, widths: &[usize]) -> std::result::Result<(), String> {
        let pages = self.shape().pages();
        let expected = [
            ("x, the queries,", self.heads * self.head_dim),
            ("`k`", pages.keys()),
            ("`v`", pages.values()),
        ];
        for ((what, expected), found) in expected.into_iter().zip(widths) {
            if *found != expected {
                return Err(format!(
                    "{what} must have width {expected}, and has {found}"
                ));
            }
        }
        let d_out = self.d_out(widths[0]);
        if d_out > MAX_SIZE {
            return Err(format!(
                "its output has width {d_out}, more than {MAX_SIZE}"
            ));
        }
        Ok(())
    }

    fn d_out(&self, _d_in: usize) -> usize {
        self.heads * self.shape().v_head_dim
    }

    fn weights(&self, _widths: &[usize]) -> Vec<WeightSpec> {
        Vec::new()
    }

    fn sight(&self) -> Option<Reach> {
        self.shape().sight()
    }

    fn attending_last(
        &self,
        window: usize,
        keep_first: usize,
    ) -> Option<std::result::Result<Arc<dyn LayerSpec>, String>> {
        let own = self.window.unwrap_or(window);
        Some(Ok(Arc::new(Attend {
            window: Some(own.min(window)),
            keep_first: self.keep_first.max(keep_first),
            ..self.clone()
        })))
    }

    fn state(&self, _widths: &[usize]) -> StateSpec {
        StateSpec {
            pages: self.kv.is_none().then(|| self.shape().pages()),
            slot: Vec::new(),
        }
    }

    fn other_flops(&self, _widths: &[usize], position: usize) -> f64 {
        self.shape().flops(position)
    }

    fn keeps_pages(&self) -> Option<&str> {
        self.keep.as_deref()
    }

    fn reads_pages(&self) -> Option<(&str, Pages)> {
        self.kv.as_deref().map(|name| (name, self.shape().pages()))
    }

    fn build(&self, _weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        Ok(Box::new(self.shape()))
    }
}

impl Layer for Shape {
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()> {
        let new = match cx.operands {
            [k, v] => Some((k, v)),
            _ => None,
        };
        self.run(x, new, y, cx)
    }
}
