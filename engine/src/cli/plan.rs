//! `strata plan`.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Subcommand;
use serde_json::json;
use strata_layers::{Graph, plan};

use super::output::{Terminal, bytes};
use super::{Environment, Source, read_text};
use crate::load;

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
    /// Check a plan file; all faults at once, with line and column
    Check {
        /// The plan
        file: PathBuf,
        /// Print for scripts
        #[arg(long)]
        json: bool,
    },
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
