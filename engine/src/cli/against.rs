//! `strata verify --against`: where a model leaves a reference's run of it.

use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::json;
use strata_kernels::DType;

use super::Common;
use super::output::Terminal;
use crate::load::Model;
use crate::reference_run::{Difference, ReferenceRun, Value, compare};
use crate::runner::Point;
use crate::session::Engine;

/// How far all rows together may be off by rounding, in standard deviations of a row. Seen were up to 4e-6
/// in f32, of goldens of all families and a trained model, and up to 0.05 in BF16. A single row of a model
/// with experts can be much farther off in BF16, where rounding makes it choose another expert.
fn default_tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-3,
        DType::BF16 | DType::F16 | DType::I32 | DType::U8 => 0.1,
    }
}

pub(super) fn against(
    model: &Model,
    path: &Path,
    tolerance: Option<f64>,
    common: &Common,
    terminal: &Terminal,
) -> Result<()> {
    let tolerance = tolerance.unwrap_or(default_tolerance(model.network.activations));
    let mut run = ReferenceRun::open(path, &model.network.graph)?;
    let count = run.tokens.len();
    let config = common.engine_config(model, count, 1);
    let bar = terminal.bar("comparing", count, "tok");
    let mut engine = Engine::new(model.network.clone(), config)?;
    let found = compare(&mut engine, &mut run, &mut |done| {
        bar.set_position(done as u64)
    });
    bar.finish_and_clear();
    let found = found?;
    let verbose = common.source.verbose;
    terminal.memory(model, engine.config(), engine.allocated(), verbose);
    let first = found.iter().position(|d| d.rms > tolerance);

    let mut out = io::stdout().lock();
    if common.source.json {
        let rows: Vec<_> = found
            .iter()
            .map(|d| {
                json!({
                    "tensor": d.value.tensor(), "what": what(model, d.value), "rms": d.rms,
                    "worst_row": d.worst, "worst_position": d.worst_position,
                    "largest": d.largest, "within": d.rms <= tolerance,
                })
            })
            .collect();
        let object = json!({
            "model": model.name, "against": path, "tokens": count, "tolerance": tolerance,
            "within": first.is_none(), "first": first.map(|i| found[i].value.tensor()),
            "compared": rows,
        });
        writeln!(out, "{object}").context("standard output")?;
    } else {
        let table = table(model, &found, first, tolerance, verbose);
        out.write_all(table.as_bytes()).context("standard output")?;
    }
    let Some(first) = first else {
        if !common.source.json {
            writeln!(
                out,
                "all {} values are within {tolerance} at all {count} positions",
                found.len()
            )
            .context("standard output")?;
        }
        return Ok(());
    };
    bail!("{}", verdict(model, &found, first, tolerance, path))
}

/// What a value is, in words.
fn what(model: &Model, value: Value) -> String {
    match value {
        Value::Stream(Point::Embedding) => "embedding".into(),
        Value::Stream(Point::Block(i)) => {
            let place = &model.plan.stack[i];
            format!("block {i} ({}@{})", place.block, place.weights)
        }
        Value::Stream(Point::Norm) => "final norm".into(),
        Value::Logits => "logits".into(),
    }
}

/// Rows of the table: all of them, or those at the ends and around the first that differs.
fn table(
    model: &Model,
    found: &[Difference],
    first: Option<usize>,
    tolerance: f64,
    all: bool,
) -> String {
    let names: Vec<String> = found.iter().map(|d| what(model, d.value)).collect();
    let wide = names.iter().map(String::len).max().unwrap_or(0);
    let mut out = format!(
        "{:<wide$} {:>10} {:>10} {:>9} {:>10}\n",
        "", "rms", "worst row", "position", "largest"
    );
    let ends = match first {
        // The last block, the norm and the logits.
        None => vec![0, found.len().saturating_sub(3)],
        Some(first) => vec![0, first.saturating_sub(1), found.len() - 1],
    };
    let mut left_out = 0;
    for (i, (d, name)) in found.iter().zip(&names).enumerate() {
        let near = Some(i) == first || ends.contains(&i) || first.is_none() && i > ends[1];
        if !all && !near {
            left_out += 1;
            continue;
        }
        let mark = if d.rms > tolerance { "  differs" } else { "" };
        out.push_str(&format!(
            "{name:<wide$} {:>10.2e} {:>10.2e} {:>9} {:>10.2e}{mark}\n",
            d.rms, d.worst, d.worst_position, d.largest
        ));
    }
    if left_out > 0 {
        out.push_str(&format!("{left_out} more; -v lists all\n"));
    }
    out
}

/// The first that differs: where, by how much, and what was before it.
fn verdict(
    model: &Model,
    found: &[Difference],
    first: usize,
    tolerance: f64,
    path: &Path,
) -> String {
    let d = &found[first];
    let by = match d.worst.is_finite() {
        true => format!(
            "its rows are off by {:.2e} of their standard deviation, that at position {} by {:.2e}",
            d.rms, d.worst_position, d.worst
        ),
        false => format!(
            "its row at position {} has a number that is none, or differs from one that is the same everywhere",
            d.worst_position
        ),
    };
    let before = match first.checked_sub(1).map(|i| &found[i]) {
        Some(before) => format!(
            "; {} before it is off by {:.1e}",
            what(model, before.value),
            before.rms
        ),
        None => String::new(),
    };
    format!(
        "{} is the first to differ from {} beyond {tolerance}: {by}{before}",
        what(model, d.value),
        path.display()
    )
}
