//! A mixture of experts: a router picks `top_k` of the networks for each token, and their results are
//! added, weighted by the router's scores.

use std::ops::Range;

use strata_kernels::ops::{Activate, Activation, Combine, ExpertLinear, Route, Score};
use strata_kernels::{Matrix, Result, Tensor};

use crate::layer::{Context, Layer, LayerSpec};
use crate::linear::{Projection, projection};
use crate::param::{Check, Fields, Param};
use crate::share::{Of, Share, even};
use crate::weights::{Init, WeightSpec, Weights};
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
        /// Multiplies the weights at last.
        scale: f64 = 1.0,
        /// Whether the logits have a bias.
        bias: bool = false,
        /// Whether a learned bias is added to the scores by which experts are chosen, though not to
        /// their weights.
        choice_bias: bool = false,
        /// Experts of some groups only are chosen; of all if left out.
        groups: Option<Groups> = None,
    }
}

impl Check for Router {}

params! {
    /// Experts in groups, of which the best may be chosen from: those whose two best experts have the
    /// largest sum.
    pub struct Groups as "groups" {
        /// Number of equal groups.
        count: usize,
        /// How many may be chosen from.
        top: usize,
    }
}

impl Check for Groups {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        fields.positive(&[("count", self.count), ("top", self.top)], faults);
        if self.top > self.count {
            let message = format!("`top` is {}, but there are {} groups", self.top, self.count);
            faults.add(fields.at("top"), message);
        }
    }
}

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
        /// Whether a second projection is multiplied by the activated one.
        gated: bool = true,
        /// The value that the router reads; the stream if left out.
        route_by: Option<String> = None,
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
        if let Some(groups) = &self.router.groups {
            let (count, experts) = (groups.count, self.experts);
            if experts % count != 0 {
                let message = format!("{experts} experts have no {count} equal groups");
                faults.add(fields.at("router"), message);
            } else if groups.top * (experts / count) < self.top_k {
                let message = format!(
                    "`top_k` is {}, but {} groups have {} experts",
                    self.top_k,
                    groups.top,
                    groups.top * (experts / count)
                );
                faults.add(fields.at("top_k"), message);
            }
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
            let gate = self.gated.then_some(("gate", self.d_ff, d_in));
            let others = [("up", self.d_ff, d_in), ("down", d_in, self.d_ff)];
            gate.into_iter()
                .chain(others)
                .map(move |(name, rows, cols)| {
                    WeightSpec::matrix(format!("{name}.{e}"), rows, cols)
                })
        };
        let d_route = widths.get(1).copied().unwrap_or(d_in);
        let mut specs = projection("router", self.experts, d_route, self.router.bias);
        if self.router.choice_bias {
            let name = "router.choice_bias";
            specs.push(WeightSpec::vector(
                name,
                &[self.experts],
                Init::Constant(0.0),
            ));
        }
        specs.extend((0..self.experts).flat_map(expert));
        specs
    }

    fn operands(&self) -> Vec<&str> {
        self.route_by.as_deref().into_iter().collect()
    }

    fn share_used(&self, weight: &WeightSpec) -> f64 {
        if weight.name.starts_with("router") {
            1.0
        } else {
            self.top_k as f64 / self.experts as f64
        }
    }

    /// Experts are dealt out, and zeros stand for others', so that what a rank has none of adds nothing; or each
    /// expert is cut.
    fn share(&self, _widths: &[usize], rank: Of) -> Option<std::result::Result<Share, String>> {
        let (experts, d_ff) = (self.experts, self.d_ff);
        let names = ["gate", "up", "down"];
        if rank.experts {
            if experts < rank.count {
                let count = rank.count;
                return Some(Err(format!(
                    "{experts} experts are too few for {count} devices"
                )));
            }
            let owner = |e: usize| e * rank.count / experts;
            let others = (0..experts).filter(|e| owner(*e) != rank.index);
            let zeros = others.flat_map(|e| names.map(|name| format!("{name}.{e}")));
            return Some(Ok(zeros.fold(Share::new(self.clone()), Share::zeros)));
        }
        let own = |own: Range<usize>| {
            let spec = Moe {
                d_ff: own.len(),
                ..self.clone()
            };
            (0..experts).fold(Share::new(spec), |share, e| {
                let [gate, up, down] = names.map(|name| format!("{name}.{e}"));
                let rows = [own.clone()];
                let share = share.columns(&down, d_ff, own.clone(), rank);
                share.rows(&gate, d_ff, &rows).rows(&up, d_ff, &rows)
            })
        };
        Some(even(d_ff, rank).map(own))
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
            choice_bias: weights.optional_vector("router.choice_bias")?,
            gate: if self.gated {
                Some(experts("gate")?)
            } else {
                None
            },
            up: experts("up")?,
            down: experts("down")?,
        }))
    }
}

struct Ready {
    spec: Moe,
    router: Projection,
    choice_bias: Option<Tensor>,
    gate: Option<Vec<Matrix>>,
    up: Vec<Matrix>,
    down: Vec<Matrix>,
}

impl Layer for Ready {
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()> {
        let (tokens, top_k) = (x.rows(), self.spec.top_k);
        // Router logits stay f32 in every reference: a rounded input can flip a choice.
        let rounding = std::mem::replace(&mut cx.activations, strata_kernels::DType::F32);
        let routed_by = cx.operands.first().unwrap_or(x);
        let logits = self.router.apply(routed_by, cx); // (T, E)
        cx.activations = rounding;
        let logits = logits?;
        let mut experts = cx.take_i32(tokens, top_k)?;
        let mut weights = cx.take(tokens, top_k)?;
        let router = &self.spec.router;
        cx.backend.route(Route {
            logits: &logits,
            score: router.score,
            normalize: router.normalize,
            scale: router.scale as f32,
            choice_bias: self.choice_bias.as_ref(),
            groups: router.groups.as_ref().map(|g| (g.count, g.top)),
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
        let gate = self.gate.as_ref();
        let gate = gate.map(|w| product(x, w, cx)).transpose()?; // (T·k, F)
        let up = product(x, &self.up, cx)?;
        let mut inner = cx.take(up.rows(), up.cols())?;
        let act = self.spec.act;
        cx.backend.activate(Activate {
            x: &up,
            gate: gate.as_ref(),
            act,
            y: &mut inner,
        })?;
        let down = product(&inner, &self.down, cx)?; // (T·k, D)
        cx.backend.combine(Combine {
            x: &down,
            weights: &weights,
            y,
        })?;
        cx.all_reduce(y)
    }
}
