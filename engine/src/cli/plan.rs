//! `strata plan`.

use std::collections::HashSet;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use serde_json::json;
use strata_kernels::{DType, Format};
use strata_layers::{Graph, plan};

use super::output::{Terminal, bytes};
use super::{DTypeChoice, Environment, ExpertsChoice, KvChoice, ParallelChoice, Source, read_text};
use crate::estimate::{Estimate, estimate};
use crate::fit::{self, Fit, Question};
use crate::footprint::Footprint;
use crate::load::{self, Planned};
use crate::placement;
use crate::plan_diff;
use crate::recipe::{Recipe, Storage};
use crate::session::EngineConfig;

/// Show, check and print layer plans.
#[derive(Debug, Subcommand)]
pub enum Plan {
    /// Print a model's plan: save it, edit it, and give it back with --plan
    Show {
        /// Folder, Hub id, bundled name, config.json or plan [default: demo]
        model: Option<String>,
        #[command(flatten)]
        source: Source,
    },
    /// Print what a plan lowers to: one line a node
    Graph {
        /// Folder, Hub id, bundled name, config.json or plan [default: demo]
        model: Option<String>,
        #[command(flatten)]
        source: Source,
    },
    /// Say what a model costs before it is loaded: parameters, bytes of weights and state, operations
    #[command(
        after_help = "Nothing is loaded: a config.json or a plan is enough. Bytes are those that the engine will hold."
    )]
    Estimate {
        /// Folder, Hub id, bundled name, config.json or plan [default: demo]
        model: Option<String>,
        #[command(flatten)]
        workload: Workload,
        #[command(flatten)]
        source: Source,
    },
    /// Show two plans side by side: what differs, block by block
    Diff {
        /// Folder, Hub id, bundled name, config.json or plan
        left: String,
        /// The other one
        right: String,
        #[command(flatten)]
        source: Source,
    },
    /// Check a plan file; all faults at once, with line and column
    Check {
        /// The plan
        file: PathBuf,
        /// Print for scripts
        #[arg(long)]
        json: bool,
    },
}

/// What an estimate is made for.
#[derive(Debug, Args)]
pub struct Workload {
    /// Tokens of a sequence [default: what the model was made for]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,
    /// Sequences at a time
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    batch: u32,
    /// Type of weights, keys and values; auto is what config.json names
    #[arg(long, value_enum, default_value_t = DTypeChoice::Auto)]
    dtype: DTypeChoice,
    /// How keys and values are kept, if not in that type: int8 is bytes with a scale for each head of each token
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = KvChoice::Auto)]
    kv: KvChoice,
    /// Store matrices by this recipe (q8_0, q6_k, q5_k_m, q4_k_m, q4_0), block format, or file of a recipe
    #[arg(long, value_name = "RECIPE", value_parser = Recipe::find)]
    quantize: Option<Recipe>,
    /// Say what goes where on these devices, and what they have room for: cuda:0,cuda:1; with limits cuda:0=40GB,cpu=16GB;
    /// or sizes alone for devices that are not here: 80GB,80GB
    #[arg(long, value_name = "DEVICES")]
    device: Option<String>,
    /// How several devices share the model
    #[arg(long, value_enum, default_value_t = ParallelChoice::Auto)]
    parallel: ParallelChoice,
    /// Keep experts in the host's memory
    #[arg(long, value_enum, value_name = "WHERE")]
    experts: Option<ExpertsChoice>,
}

impl Plan {
    pub fn run(self, environment: &Environment, terminal: &Terminal) -> Result<()> {
        let mut out = io::stdout().lock();
        match self {
            Plan::Show { model, source } => {
                let options = source.load_options(model.as_deref(), environment);
                let planned = load::plan(&options, &mut terminal.load_progress())?;
                if source.json {
                    let object = json!({"plan": planned.plan.print(), "name": planned.plan.name});
                    writeln!(out, "{object}")
                } else {
                    out.write_all(planned.plan.print().as_bytes())
                }
            }
            Plan::Graph { model, source } => {
                let options = source.load_options(model.as_deref(), environment);
                let planned = load::plan(&options, &mut terminal.load_progress())?;
                if source.json {
                    let nodes: Vec<_> = planned
                        .graph
                        .nodes
                        .iter()
                        .map(|n| json!({"name": n.name, "inputs": n.inputs, "output": n.output}))
                        .collect();
                    writeln!(out, "{}", json!({"nodes": nodes}))
                } else {
                    out.write_all(planned.graph.print().as_bytes())
                }
            }
            Plan::Estimate {
                model,
                workload,
                source,
            } => {
                let options = source.load_options(model.as_deref(), environment);
                let planned = load::plan(&options, &mut terminal.load_progress())?;
                let text = workload.estimate(planned, environment, source.json)?;
                out.write_all(text.as_bytes())
            }
            Plan::Diff {
                left,
                right,
                source,
            } => {
                let of = |model: &str| {
                    let options = source.load_options(Some(model), environment);
                    load::plan(&options, &mut terminal.load_progress())
                };
                let (a, b) = (of(&left)?.plan, of(&right)?.plan);
                let rows = plan_diff::diff(&a, &b)?;
                if source.json {
                    let same = rows.iter().all(|r| r.same);
                    let row = |r: &plan_diff::Row| json!({"path": r.path, "left": r.left, "right": r.right, "same": r.same});
                    let rows: Vec<_> = rows.iter().map(row).collect();
                    writeln!(out, "{}", json!({"same": same, "rows": rows}))
                } else {
                    out.write_all(plan_diff::print(&rows, &left, &right).as_bytes())
                }
            }
            Plan::Check { file, json } => {
                let label = file.display().to_string();
                let plan = plan::Plan::parse(&read_text(&file)?, &label)?;
                let graph = Graph::lower(&plan, &label)?;
                let weights = graph.weights();
                let parameters: u64 = weights.iter().map(|w| w.spec.elements() as u64).sum();
                let (slot, token) = (graph.slot_bytes(), graph.page_elements_per_token());
                if json {
                    let object = json!({
                        "name": plan.name, "blocks": plan.stack.len(), "nodes": graph.nodes.len(),
                        "weights": weights.len(), "parameters": parameters,
                        "state_bytes_per_sequence": slot, "kv_elements_per_token": token,
                    });
                    writeln!(out, "{object}")
                } else {
                    writeln!(
                        out,
                        "{label}: {} blocks, {} nodes, {} weights with {parameters} parameters; a sequence keeps {} and {token} elements of keys and values a token",
                        plan.stack.len(),
                        graph.nodes.len(),
                        weights.len(),
                        bytes(slot as u64),
                    )
                }
            }
        }
        .context("standard output")
    }
}

impl Workload {
    /// The type of weights that are not quantised.
    fn dtype(&self, planned: &Planned) -> DType {
        let dtype = self.dtype.chosen().or(planned.declared_dtype());
        dtype.unwrap_or(DType::F32)
    }

    /// The estimate as text, or for scripts.
    fn estimate(&self, planned: Planned, environment: &Environment, json: bool) -> Result<String> {
        let dtype = self.dtype(&planned);
        let format = dtype.into();
        let kv = self.kv.chosen().unwrap_or(dtype.into());
        let storage = Storage {
            format,
            recipe: self.quantize.clone(),
        };
        let context = self.context.map_or(planned.plan.context, |c| c as usize);
        let footprint = Footprint::of(planned.graph()?)?;
        let config =
            EngineConfig::new(context, self.batch as usize, kv).with_row_bytes(footprint.per_row());
        let rows = config.token_budget;
        let found = Estimate {
            unused_parameters: planned.unused.parameters,
            unused_tensors: planned.unused.tensors,
            ..estimate(&planned.graph, &config, &storage, &footprint, rows)
        };
        let text = match json {
            true => String::new(),
            false => self.text(&planned, &config, &found),
        };
        let mut object = self.object(&planned, &config, &found);
        let Some(devices) = &self.device else {
            return Ok(if json { format!("{object}\n") } else { text });
        };
        let rooms = rooms(devices, environment)?;
        let graph = Arc::new(planned.graph);
        let formats = graph.weights().into_iter();
        let formats = formats.map(|w| (w.path.clone(), storage.of(&w))).collect();
        let hosted = match self.experts {
            Some(ExpertsChoice::Cpu) => placement::experts(&graph),
            None => HashSet::new(),
        };
        let question = Question {
            graph: &graph,
            formats: &formats,
            hosted: &hosted,
            devices: &rooms,
            parallel: self.parallel.chosen(),
            kv,
            context,
            batch: self.batch as usize,
        };
        let fit = question.answer().map_err(anyhow::Error::msg)?;
        let ways = match fit.fits() {
            true => Vec::new(),
            false => question.ways(&|recipe| fit::quantised(&question, recipe)),
        };
        if !json {
            return Ok(text + &on_devices(&question, &fit, &ways));
        }
        let load = |l: &fit::Load| {
            json!({
                "device": l.device, "runs": l.runs, "room_bytes": l.room, "fits": l.fits(),
                "weights_bytes": l.weights, "kv_bytes": l.kv, "state_bytes": l.state,
                "buffer_bytes": l.buffers, "total_bytes": l.total(),
            })
        };
        let loads: Vec<_> = fit.loads.iter().map(load).collect();
        object["devices"] = json!(loads);
        object["fits"] = json!(fit.fits());
        object["host_bytes"] = json!(question.hosted_bytes());
        object["context_that_fits"] = json!(fit.context);
        object["batch_that_fits"] = json!(fit.batch);
        object["would_fit_with"] = json!(ways);
        Ok(format!("{object}\n"))
    }

    fn object(&self, planned: &Planned, config: &EngineConfig, e: &Estimate) -> serde_json::Value {
        json!({
            "name": planned.plan.name, "parameters": e.parameters, "weights": e.weights,
            "active_parameters": e.active_parameters,
            "unused_parameters": e.unused_parameters, "unused_tensors": e.unused_tensors,
            "context": config.context, "kv": config.kv_dtype.name(), "batch": config.max_sequences,
            "weights_bytes": e.weight_bytes, "kv_bytes_per_token": e.kv_bytes_per_token,
            "state_bytes_per_sequence": e.state_bytes_per_sequence, "kv_bytes": e.kv_bytes,
            "state_bytes": e.state_bytes, "buffer_bytes": e.buffer_bytes,
            "total_bytes": e.total_bytes(), "flops_per_token": e.flops_per_token,
            "flops_per_token_at_context": e.flops_at_context,
            "decode_bytes_per_token": e.decode_bytes,
        })
    }

    fn text(&self, planned: &Planned, config: &EngineConfig, e: &Estimate) -> String {
        let format = match &self.quantize {
            Some(recipe) => recipe.name.as_str(),
            None => Format::from(self.dtype(planned)).name(),
        };
        let flops = |f: f64| format!("{:.3} GFLOP", f / 1e9);
        let sequences = match config.max_sequences {
            1 => "1 sequence".to_string(),
            n => format!("{n} sequences"),
        };
        let mut rows = vec![
            (
                "weights",
                bytes(e.weight_bytes),
                format!(
                    "{format}; {} of them, {} parameters, of which a token meets {}",
                    grouped(e.weights as u64),
                    grouped(e.parameters),
                    grouped(e.active_parameters)
                ),
            ),
            (
                "keys and values",
                bytes(e.kv_bytes),
                format!(
                    "{}; {} bytes a token; {sequences} of {} tokens",
                    config.kv_dtype,
                    grouped(e.kv_bytes_per_token),
                    grouped(config.context as u64)
                ),
            ),
            (
                "state",
                bytes(e.state_bytes),
                format!("{} bytes a sequence", grouped(e.state_bytes_per_sequence)),
            ),
            (
                "buffers",
                bytes(e.buffer_bytes),
                format!("steps of up to {} rows", config.token_budget),
            ),
            ("together", bytes(e.total_bytes()), String::new()),
            (
                "a token takes",
                flops(e.flops_per_token),
                format!("{} as the last of its context", flops(e.flops_at_context)),
            ),
            (
                "decoding reads",
                bytes(e.decode_bytes),
                "a token, at the end of the context".into(),
            ),
        ];
        if e.unused_tensors > 0 {
            let more = format!(
                "and {} parameters in {} tensors that are not run",
                grouped(e.unused_parameters),
                grouped(e.unused_tensors)
            );
            rows.insert(1, ("", String::new(), more));
        }
        let mut text = format!("{}\n", planned.plan.name);
        for (what, value, more) in rows {
            let line = format!("  {what:<15}  {value:>12}  {more}");
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// The devices that were named, and the bytes that each has room for.
fn rooms(devices: &str, environment: &Environment) -> Result<Vec<(String, Option<u64>)>> {
    let room = |device: load::Named| -> Result<(String, Option<u64>)> {
        let known = device.limit.is_some() || matches!(&*device.name, "cpu" | "reference");
        let room = if known {
            device.limit
        } else {
            let (backend, _) = load::backend_at(&device.name, None, &environment.cuda)
                .with_context(|| format!("{0}: give its memory, such as {0}=80GB", device.name))?;
            backend.memory()?.map(|(free, _)| free)
        };
        Ok((device.said, room))
    };
    load::named(devices)?.into_iter().map(room).collect()
}

/// What goes where, as text.
fn on_devices(question: &Question<'_>, fit: &Fit, ways: &[String]) -> String {
    let mut text = String::from("on these devices\n");
    let mut line = |line: &str| {
        text.push_str("  ");
        text.push_str(line);
        text.push('\n');
    };
    fit::table(fit).iter().for_each(|l| line(l));
    if !question.hosted.is_empty() {
        let held = bytes(question.hosted_bytes());
        line(&format!("the host: experts; {held} of weights"));
    }
    let sequences = |n: usize| match n {
        1 => "1 sequence".to_string(),
        n => format!("{} sequences", grouped(n as u64)),
    };
    if !fit.fits() {
        let ways = match ways.is_empty() {
            true => "nothing that was tried: a smaller model, or more devices".into(),
            false => ways.join(", or "),
        };
        line(&format!("it does not fit; what would make it fit: {ways}"));
    }
    if let Some(context) = fit.context {
        let (tokens, of) = (grouped(context as u64), sequences(question.batch));
        line(&format!("room for {of} of {tokens} tokens each"));
    }
    if let Some(batch) = fit.batch {
        let tokens = grouped(question.context as u64);
        line(&format!(
            "room for {} of {tokens} tokens each",
            sequences(batch)
        ));
    }
    text
}

/// Digits in groups of three.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
