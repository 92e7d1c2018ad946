//! `--trace time`: what the parts of steps took.

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::Environment;
use super::output::Terminal;
use crate::load::{Limits, Model};
use crate::session::Engine;
use crate::trace::{Line, Report};

/// Where time goes.
#[derive(Debug, Clone, Args)]
pub struct Tracing {
    /// Report the time, bytes and FLOPs of every node of the graph, beside the machine's limits (on the CPU; also by
    /// STRATA_LOG=time)
    #[arg(long, value_name = "WHAT", value_enum, help_heading = "Output")]
    trace: Option<What>,
}

/// What is reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    Time,
}

impl Tracing {
    /// Whether it is wanted, by the option or the environment.
    pub fn wanted(&self, environment: &Environment) -> Result<bool> {
        match environment.log.as_deref() {
            _ if self.trace == Some(What::Time) => Ok(true),
            None | Some("") => Ok(false),
            Some("time") => Ok(true),
            Some(other) => bail!("STRATA_LOG is {other:?}; it knows time"),
        }
    }

    /// Begins, if it is wanted and the device's times would say something.
    pub fn begin(
        &self,
        environment: &Environment,
        model: &Model,
        engine: &mut Engine,
    ) -> Result<()> {
        if !self.wanted(environment)? {
            return Ok(());
        }
        let device = model.network.backend.name();
        if device == "cuda" {
            bail!(
                "--trace time: a GPU is handed its operations and does them later, so that times between them say nothing; NVIDIA's Nsight tools time its kernels"
            );
        }
        engine.trace();
        Ok(())
    }

    /// What was gathered for scripts; null if nothing was asked for.
    pub fn json(engine: &Engine, limits: impl FnOnce() -> Limits) -> Value {
        let Some(trace) = engine.traced() else {
            return Value::Null;
        };
        let limits = limits();
        let line = |line: &Line| {
            json!({
                "name": line.name, "parts": line.parts, "seconds": line.seconds, "bytes": line.work.bytes,
                "flops": line.work.flops, "share_of_limit": line.share_of_limit(&limits),
            })
        };
        let report = |report: &Report| {
            let (kinds, parts) = (report.kinds.iter().map(line), report.parts.iter().map(line));
            json!({
                "steps": report.steps, "rows": report.rows, "seconds": report.seconds(),
                "kinds": kinds.collect::<Value>(), "nodes": parts.collect::<Value>(),
            })
        };
        let reports = trace.reports();
        let mut object = json!({"limit": {
            "bytes_per_second": limits.bytes_per_second, "flops_per_second": limits.flops_per_second,
        }});
        for one in &reports {
            object[one.name] = report(one);
        }
        object
    }

    /// The same for people, on standard error: kinds of nodes, and every node if much is to be said.
    pub fn print(
        engine: &Engine,
        terminal: &Terminal,
        verbose: bool,
        limits: impl FnOnce() -> Limits,
    ) {
        let Some(trace) = engine.traced() else { return };
        let limits = limits();
        for report in trace.reports() {
            terminal.note(&table(&report, &limits, verbose));
        }
    }
}

fn table(report: &Report, limits: &Limits, verbose: bool) -> String {
    let total = report.seconds();
    let mut text = format!(
        "{}: {} steps, {} rows, {:.1} ms in nodes; limits {:.1} GB/s, {:.0} GFLOP/s\n{:>28}  {:>5} {:>10} {:>6} {:>9} {:>8} {:>9} {:>8} {:>6}\n",
        report.name,
        report.steps,
        report.rows,
        1e3 * total,
        limits.bytes_per_second / 1e9,
        limits.flops_per_second / 1e9,
        "node",
        "count",
        "ms a step",
        "time",
        "MB",
        "GB/s",
        "MFLOP",
        "GFLOP/s",
        "limit",
    );
    let lines = if verbose {
        &report.parts
    } else {
        &report.kinds
    };
    let steps = report.steps.max(1) as f64;
    for line in lines {
        let rate = |amount: f64| {
            if line.seconds > 0.0 {
                amount / line.seconds / 1e9
            } else {
                0.0
            }
        };
        let share = line.share_of_limit(limits);
        text += &format!(
            "{:>28}  {:>5} {:>10.4} {:>4.0} % {:>9.3} {:>8.2} {:>9.2} {:>8.2} {}\n",
            line.name,
            line.parts,
            1e3 * line.seconds / steps,
            100.0 * line.seconds / total.max(f64::MIN_POSITIVE),
            line.work.bytes / steps / 1e6,
            rate(line.work.bytes),
            line.work.flops / steps / 1e6,
            rate(line.work.flops),
            share.map_or("     –".into(), |s| format!("{:>4.0} %", 100.0 * s)),
        );
    }
    text
}
