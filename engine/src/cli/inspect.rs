//! `strata inspect`.

use std::io::{self, Write};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;

use super::output::{Terminal, bytes};
use super::{Environment, Source};
use crate::load;

/// List the tensors of a checkpoint and the weights they feed
#[derive(Debug, Args)]
#[command(
    after_help = "Only headers are read: no weight is loaded. Tensors that feed no weight are marked `-`."
)]
pub struct Inspect {
    /// Folder, Hub id (owner/name[@revision]) or bundled name [default: demo]
    model: Option<String>,
    #[command(flatten)]
    source: Source,
}

impl Inspect {
    pub fn run(self, environment: &Environment, terminal: &Terminal) -> Result<()> {
        let options = self.source.load_options(self.model.as_deref(), environment);
        let inspected = load::inspect(&options, &mut terminal.load_progress())?;
        let mut out = io::stdout().lock();
        self.print(&inspected, &mut out)
            .context("standard output")?;
        // What does not fit is a fault, as it would be when loading; the list above helps to see why.
        inspected.fault.map_or(Ok(()), |fault| Err(fault.into()))
    }

    fn print(&self, inspected: &load::Inspected, out: &mut dyn Write) -> io::Result<()> {
        if self.source.json {
            for row in &inspected.rows {
                let object = json!({
                    "weight": row.weight, "tensor": row.tensor, "how": row.how, "dtype": row.dtype,
                    "shape": row.shape, "bytes": row.bytes, "shard": row.shard,
                });
                writeln!(out, "{object}")?;
            }
            return Ok(());
        }
        let width = |f: fn(&load::Row) -> usize| inspected.rows.iter().map(f).max().unwrap_or(0);
        let (names, tensors, types) = (
            width(|r| r.weight.as_ref().map_or(1, String::len)),
            width(|r| r.tensor.len()),
            width(|r| r.dtype.len()).max(5),
        );
        for row in &inspected.rows {
            let weight = row.weight.as_deref().unwrap_or("-");
            let how = row
                .how
                .as_ref()
                .map_or(String::new(), |how| format!("  {how}"));
            writeln!(
                out,
                "{weight:<names$}  {:<tensors$}  {:<types$} {:<16} {:>10}  {}{how}",
                row.tensor,
                row.dtype,
                format!("{:?}", row.shape),
                bytes(row.bytes),
                row.shard,
            )?;
        }
        let total: u64 = inspected.rows.iter().map(|r| r.bytes).sum();
        let used = inspected.rows.iter().filter(|r| r.weight.is_some()).count();
        writeln!(
            out,
            "{} rows, {}; {used} feed weights of the plan, {} are left over",
            inspected.rows.len(),
            bytes(total),
            inspected.rows.len() - used,
        )?;
        for note in &inspected.notes {
            writeln!(out, "{note}")?;
        }
        Ok(())
    }
}
