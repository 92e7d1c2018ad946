//! The `strata` command.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use strata::cli::{self, Cli, Environment};
use strata::hub::HubOptions;

fn main() -> ExitCode {
    // The only place that reads the environment.
    let get = |name: &str| std::env::var(name).ok();
    let environment = Environment {
        hub: HubOptions::from_env(get),
        no_color: get("NO_COLOR").is_some_and(|v| !v.is_empty()),
    };
    let cli = Cli::parse();
    match cli::run(cli, &environment) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing more can be done if standard error is closed, too.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
