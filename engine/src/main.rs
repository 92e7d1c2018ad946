//! The `strata` command.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use strata::cli::{self, Cli, Environment};
use strata::hub::HubOptions;
use strata::load::{self, CudaPlaces};

fn main() -> ExitCode {
    // The only place that reads the environment.
    let get = |name: &str| std::env::var(name).ok();
    let cli = Cli::parse();
    let run = || -> anyhow::Result<()> {
        let environment = Environment {
            hub: Some(HubOptions::from_env(get)?),
            cuda: CudaPlaces::from_env(get),
            cache: load::cache_folder(get),
            no_color: get("NO_COLOR").is_some_and(|v| !v.is_empty()),
            api_key: get("STRATA_API_KEY").filter(|key| !key.is_empty()),
            log: get("STRATA_LOG"),
        };
        cli::run(cli, &environment)
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing more can be done if standard error is closed, too.
            let _ = writeln!(std::io::stderr(), "error: {}", cli::describe(&error));
            ExitCode::FAILURE
        }
    }
}
