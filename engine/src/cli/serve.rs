//! `strata serve`.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;

use super::generate::LookingUp;
use super::output::{Terminal, bytes};
use super::{Common, Environment};
use crate::document::ModelSource;
use crate::load::Model;
use crate::prefix_cache::{Policy, parse_size, thousands};
use crate::server::{self, Options, Setup};
use crate::session::EngineConfig;

/// Bytes of keys and values when nobody says how many.
const DEFAULT_MEMORY: u64 = 4 << 30;

const AFTER: &str = "\
The server speaks OpenAI's interfaces: /v1/models, /v1/completions, /v1/chat/completions,
/v1/responses; and /tokenize, /detokenize, /v1/documents (texts that are read once and asked for
ever), /health, /metrics (Prometheus) and /strata/state. A page for people is at /.
It listens on this machine only, unless --host says otherwise; then give --api-key, too. With
--port 0 it takes a free port and prints which. SIGTERM and Ctrl-C let running answers end.

Examples:
  strata serve
  strata serve ./Jamba2-3B --documents ./books --port 8000
  strata serve ./Jamba2-3B --host 0.0.0.0 --api-key-file key.txt --max-sequences 16";

/// Serve a model over HTTP, as OpenAI does
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct Serve {
    /// Folder, GGUF file, Hub id (owner/name[@revision]) or bundled name [default: demo]
    model: Option<String>,
    /// What clients call the model; may be given several times [default: its own name]
    #[arg(long, value_name = "NAME")]
    name: Vec<String>,
    /// The address to listen on; 0.0.0.0 is all of this machine's
    #[arg(
        long,
        value_name = "ADDRESS",
        default_value = "127.0.0.1",
        help_heading = "Network"
    )]
    host: String,
    /// The port to listen on; 0 takes a free one
    #[arg(
        long,
        value_name = "PORT",
        default_value_t = 8080,
        help_heading = "Network"
    )]
    port: u16,
    /// A key that clients must send; may be given several times. Others on this machine can see it: rather use
    /// --api-key-file
    #[arg(long, value_name = "KEY", help_heading = "Network")]
    api_key: Vec<String>,
    /// A file with a key on each line
    #[arg(long, value_name = "FILE", help_heading = "Network")]
    api_key_file: Option<PathBuf>,
    /// An origin whose pages may ask, such as https://chat.example; * is all; may be given several times
    #[arg(long, value_name = "ORIGIN", help_heading = "Network")]
    cors: Vec<String>,
    /// Keep documents here over restarts
    #[arg(long, value_name = "DIR", help_heading = "Memory")]
    documents: Option<PathBuf>,
    /// Which states are kept for prompts that begin alike; "" keeps none
    #[arg(long, value_name = "POLICY", default_value_t = Policy::standard(), help_heading = "Memory")]
    cache: Policy,
    /// Most bytes of keys and values, of running sequences and of kept states [default: what --max-sequences of
    /// --context take and --cache may keep, at most 4GiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, help_heading = "Memory")]
    memory: Option<u64>,
    /// Most tokens of a sequence, prompt and answer [default: what the model was made for, if it fits --memory]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Memory")]
    context: Option<u32>,
    /// Most sequences that are computed at once
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Computing")]
    max_sequences: u16,
    /// Most tokens that are computed in a step, prompts and answers together [default: by the device]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536), help_heading = "Computing")]
    token_budget: Option<u32>,
    /// Cut prompts at multiples of N exactly
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536), conflicts_with = "token_budget", help_heading = "Computing")]
    chunk: Option<u32>,
    #[command(flatten)]
    lookup: LookingUp,
    /// Most sequences that wait for their turn; others are refused with status 503
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(..=65536), help_heading = "Limits")]
    max_queue: u32,
    /// Most tokens of an answer [default: what the context has left]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Limits")]
    max_tokens: Option<u32>,
    /// Most bytes of a request's body
    #[arg(long, value_name = "SIZE", default_value = "16MiB", value_parser = parse_size, help_heading = "Limits")]
    max_body: u64,
    /// Most seconds of a request
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400), help_heading = "Limits")]
    request_timeout: u64,
    /// Most seconds in which a client sends a request's head, and its body
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400), help_heading = "Limits")]
    read_timeout: u64,
    /// Most seconds in which a client takes nothing of what it is sent
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400), help_heading = "Limits")]
    write_timeout: u64,
    /// Seconds that running answers get to end when the server is told to
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(..=86_400), help_heading = "Limits")]
    drain_seconds: u64,
    #[command(flatten)]
    common: Common,
}

impl Serve {
    pub fn run(self, environment: &Environment, terminal: &Terminal) -> Result<()> {
        // All that can be wrong is found before the model is loaded.
        let api_keys = self.keys(environment)?;
        let listener = server::bind(&self.host, self.port)?;
        if let Some(folder) = &self.documents {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("--documents {}", folder.display()))?;
        }
        let address = listener.local_addr().context("the socket")?;
        if !address.ip().is_loopback() && api_keys.is_empty() {
            terminal.note("everybody who reaches this machine can use the server: --api-key-file lets in those with a key only");
        }
        let options = self.common.load_options(self.model.as_deref(), environment);
        let model = self.common.load_with(&options, terminal)?;
        let (config, pages) = self.sizes(&model, terminal)?;
        let mut names = self.name.clone();
        if names.is_empty() {
            names.push(model.name.clone());
        }
        let options = Options {
            names,
            api_keys,
            cors: self.cors.clone(),
            max_body: usize::try_from(self.max_body).context("--max-body")?,
            max_queue: self.max_queue as usize,
            max_tokens: self.max_tokens.map(|n| n as usize),
            request_timeout: self.request_timeout,
            read_timeout: self.read_timeout,
            write_timeout: self.write_timeout,
            drain_seconds: self.drain_seconds,
            cache: self.cache.clone(),
            documents: self.documents.clone(),
        };
        let name = options.names[0].clone();
        let source = ModelSource::of(
            &self.common.load_options(self.model.as_deref(), environment),
            &model,
        );
        let setup = Setup {
            model,
            source,
            config,
            pages,
        };
        let told = terminal.clone();
        let note: server::Note = Arc::new(move |text: &str| told.note(text));
        server::serve(listener, setup, options, note, |address| {
            self.tell(address, &name, terminal);
        })?;
        Ok(())
    }

    /// The keys, from everywhere they may be given.
    fn keys(&self, environment: &Environment) -> Result<Vec<String>> {
        let mut keys = self.api_key.clone();
        keys.extend(environment.api_key.clone());
        if let Some(path) = &self.api_key_file {
            let text = super::read_text(Path::new(path))?;
            let lines = text.lines().map(str::trim).filter(|l| !l.is_empty());
            let before = keys.len();
            keys.extend(lines.map(String::from));
            if keys.len() == before {
                bail!("{}: there is no key in it", path.display());
            }
        }
        if keys.iter().any(|key| key.trim().is_empty()) {
            bail!("a key is empty");
        }
        Ok(keys)
    }

    /// The engine's sizes, and its pages.
    fn sizes(&self, model: &Model, terminal: &Terminal) -> Result<(EngineConfig, usize)> {
        let graph = &model.network.graph;
        let sequences = usize::from(self.max_sequences);
        let wanted = self.context.map_or(model.plan.context, |n| n as usize);
        let mut config = self.common.engine_config(model, wanted, sequences);
        if let Some(budget) = self.token_budget {
            config.token_budget = budget as usize;
        }
        if let Some(chunk) = self.chunk {
            config = config.with_chunk(chunk as usize);
        }
        let mut config = self.lookup.config(config, model, terminal);
        let page_bytes = config.page_bytes(graph) as u64;
        if page_bytes == 0 {
            return Ok((config, 0));
        }
        let kept = self.cache.budget.unwrap_or(DEFAULT_MEMORY) / page_bytes;
        let most = self.memory.unwrap_or(DEFAULT_MEMORY) / page_bytes;
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        let all = config.pages(graph.prefix).saturating_add(kept as usize);
        // One sequence of the whole context must fit, and a page in which it leaves what others know.
        let beside = graph.prefix.div_ceil(config.page_size) + 2;
        let fits = most.saturating_sub(beside) * config.page_size;
        if fits < config.context {
            let memory = bytes(most as u64 * page_bytes);
            if self.context.is_some() || fits < config.page_size {
                bail!(
                    "{memory} of keys and values hold {} tokens, less than a --context of {}; raise --memory (a token takes {} bytes)",
                    thousands(fits),
                    thousands(config.context),
                    page_bytes / config.page_size as u64
                );
            }
            terminal.note(&format!(
                "the context is {} of the {} tokens that the model was made for, as {memory} of keys and values hold no more; --memory raises it",
                thousands(fits),
                thousands(config.context),
            ));
            config.context = fits;
        }
        let pages = match self.memory {
            Some(_) => most,
            None => all.min(most),
        };
        Ok((config, pages))
    }

    /// Says where the server is.
    fn tell(&self, address: SocketAddr, name: &str, terminal: &Terminal) {
        let url = format!("http://{address}");
        let said = if self.common.source.json {
            let object = json!({"url": url, "model": name, "pid": std::process::id()});
            let mut out = io::stdout();
            writeln!(out, "{object}").and_then(|()| out.flush())
        } else {
            writeln!(io::stdout(), "{name} is served at {url}").and_then(|()| io::stdout().flush())
        };
        if said.is_err() {
            terminal.note(&format!("{name} is served at {url}"));
        }
    }
}
