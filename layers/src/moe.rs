//! A mixture of experts: a router picks `top_k` of the networks for each token, and their results are
//! added, weighted by the router's scores.

use strata_kernels::ops::{Activate, Activation, Combine, ExpertLinear, Route, Score};
use strata_kernels::{Matrix, Result, Tensor};

use crate::layer::{Context, Layer, LayerSpec};
use crate::linear::Projection;
use crate::param::{Check, Fields, Param};
use crate::weights::{WeightSpec, Weights};
use crate::yaml::{Faults, Value};
use crate::{params, words};

words!(Score as "a score" {
    Softmax = "softmax",
    SoftmaxTopK = "softmax_topk",
    Sigmoid = "sigmoid",
});

params! {
    /// How experts are chosen.
    pub struct Router as "router" {
        /// How logits become weights.
        score: Score,
        /// Whether the weights of the chosen are made to sum to one.
        normalize: bool,
    }
}

impl Check for Router {}

params! {
    /// Parameters of `moe`.
    pub struct Moe as "moe" {
        /// Name of its weights within the block.
        name: Option<String> = None,
        /// Number of experts.
        experts: usize,
        /// How many of them a token goes through.
        top_k: usize,
        /// Inner width of an expert.
        d_ff: usize,
        /// The function in the middle.
        act: Activation,
        /// How experts are chosen.
        router: Router,
    }
}

/// Most experts of a layer: the router's choice is linear in their number, and published models
/// have 512.
const MAX_EXPERTS: usize = 65_536;

impl Check for Moe {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        let sizes = [
            ("experts", self.experts),
            ("top_k", self.top_k),
            ("d_ff", self.d_ff),
        ];
        fields.positive(&sizes, faults);
        if self.top_k > self.experts {
            let (k, e) = (self.top_k, self.experts);
            faults.add(
                fields.at("top_k"),
                format!("`top_k` is {k}, but there are {e} experts"),
            );
        }
        if self.experts > MAX_EXPERTS {
            let message = format!("{} experts are more than {MAX_EXPERTS}", self.experts);
            faults.add(fields.at("experts"), message);
        }
    }
}

impl LayerSpec for Moe {
    fn kind(&self) -> &'static str {
        "moe"
    }

    fn name(&self) -> &str {
        self.name.as_deref().unwrap_or("moe")
    }

    fn write(&self) -> Value {
        Param::write(self)
    }

    fn weights(&self, widths: &[usize]) -> Vec<WeightSpec> {
        let d_in = widths[0];
        let expert = |e| {
            [
                ("gate", self.d_ff, d_in),
                ("up", self.d_ff, d_in),
                ("down", d_in, self.d_ff),
            ]
            .map(|(name, rows, cols)| WeightSpec::matrix(format!("{name}.{e}"), rows, cols))
        };
        let router = WeightSpec::matrix("router", self.experts, d_in);
        std::iter::once(router)
            .chain((0..self.experts).flat_map(expert))
            .collect()
    }

    fn share_used(&self, weight: &WeightSpec) -> f64 {
        if weight.name == "router" {
            1.0
        } else {
            self.top_k as f64 / self.experts as f64
        }
    }

    fn build(&self, weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        let experts = |name: &str| -> Result<Vec<Matrix>> {
            (0..self.experts)
                .map(|e| weights.matrix(&format!("{name}.{e}")))
                .collect()
        };
        Ok(Box::new(Ready {
            spec: self.clone(),
            router: Projection::build("router", weights)?,
            gate: experts("gate")?,
            up: experts("up")?,
            down: experts("down")?,
        }))
    }
}

struct Ready {
    spec: Moe,
    router: Projection,
    gate: Vec<Matrix>,
    up: Vec<Matrix>,
    down: Vec<Matrix>,
}

impl Layer for Ready {
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()> {
        let (tokens, top_k) = (x.rows(), self.spec.top_k);
        // Router logits stay f32 in every reference: a rounded input can flip a choice.
        let rounding = std::mem::replace(&mut cx.activations, strata_kernels::DType::F32);
        let logits = self.router.apply(x, cx); // (T, E)
        cx.activations = rounding;
        let logits = logits?;
        let mut experts = cx.take_i32(tokens, top_k)?;
        let mut weights = cx.take(tokens, top_k)?;
        let Router { score, normalize } = self.spec.router;
        cx.backend.route(Route {
            logits: &logits,
            score,
            choice_bias: None,
            groups: None,
            normalize,
            scale: 1.0,
            experts: &mut experts,
            weights: &mut weights,
        })?;

        let product = |x: &Tensor, w: &[Matrix], cx: &mut Context<'_>| {
            let mut y = cx.take(tokens * top_k, w[0].rows())?;
            let (experts, activations) = (&experts, cx.activations);
            cx.backend.expert_linear(ExpertLinear {
                x,
                w,
                experts,
                activations,
                y: &mut y,
            })?;
            Ok(y)
        };
        let gate = product(x, &self.gate, cx)?; // (T·k, F)
        let up = product(x, &self.up, cx)?;
        let mut inner = cx.take(up.rows(), up.cols())?;
        let act = self.spec.act;
        cx.backend.activate(Activate {
            x: &up,
            gate: Some(&gate),
            act,
            y: &mut inner,
        })?;
        let down = product(&inner, &self.down, cx)?; // (T·k, D)
        cx.backend.combine(Combine {
            x: &down,
            weights: &weights,
            y,
        })
    }
}
