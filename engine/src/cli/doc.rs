//! `strata doc`: documents that are read once.

mod ask;
mod probe;
mod read;
mod show;

use anyhow::Result;
use clap::Subcommand;

use super::Environment;
use super::output::Terminal;

/// Read documents once, keep their states as files, ask about them for ever
#[derive(Debug, Subcommand)]
pub enum Doc {
    Read(read::Read),
    Ask(ask::Ask),
    Show(show::Show),
    Probe(probe::Probe),
}

impl Doc {
    pub fn run(self, environment: &Environment, terminal: &Terminal) -> Result<()> {
        match self {
            Doc::Read(command) => command.run(environment, terminal),
            Doc::Ask(command) => command.run(environment, terminal),
            Doc::Show(command) => command.run(),
            Doc::Probe(command) => command.run(environment, terminal),
        }
    }
}
