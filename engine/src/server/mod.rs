//! The HTTP server: one engine, many clients, in the interfaces that OpenAI's clients speak.
//!
//! **How a request flows.** `net` takes a connection and holds the client to its times; `gate` asks who it is; `routes`
//! finds the handler, which reads the body (`fields`, `request`, `messages`, `constraint`: all faults at once), makes
//! tokens of it away from the event loop, and hands a `job::Job` to the engine's thread. `worker` owns the engine: it
//! takes commands between steps, runs steps, and puts what came of them into each job's bounded queue. The handler
//! reads that to its end (`said`) or passes it on as it comes (`stream`). Whoever stops reading drops his
//! `job::Ticket`, and with it the job.
//!
//! **Limits.** `max_queue` and the running sequences together are the places there are: a request without one is
//! refused with 503 at once. Bodies, their depth and their values, heads, connections, writes and requests are bounded.

mod chat;
mod completions;
mod constraint;
mod error;
mod fields;
mod gate;
mod job;
mod library;
mod messages;
mod metrics;
mod net;
mod page;
mod picture;
mod reading;
mod request;
mod responses;
mod routes;
mod said;
mod scores;
mod stream;
mod worker;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};
use tokio::sync::{Semaphore, watch};

use crate::document::ModelSource;
use crate::ids::TokenId;
use crate::load::{self, Model};
use crate::prefix_cache::Policy;
use crate::session::{self, Engine, EngineConfig};
use crate::state_file::Fingerprint;
use crate::text::Tokenizer;
use error::ApiError;
use job::{Choice, Command, Event, Job, MOST_EVENTS, Ticket};
use library::Library;
use metrics::Metrics;
use picture::Picture;
use worker::Worker;

pub use worker::Note;

/// What answers call the program that made them.
const FINGERPRINT: &str = concat!("strata-", env!("CARGO_PKG_VERSION"));
/// Threads that speak HTTP: most of the work is the engine's.
const HTTP_THREADS: usize = 2;
/// Threads that make tokens of texts: rendering a chat template reserves a gigabyte of addresses.
const TEXT_THREADS: usize = 3;

/// What a server is started with.
#[derive(Debug, Clone)]
pub struct Options {
    /// What the model is called by clients; the first is what answers call it.
    pub names: Vec<String>,
    /// Keys, of which a client must send one; none lets everybody in.
    pub api_keys: Vec<String>,
    /// Origins whose pages may ask; `*` is all.
    pub cors: Vec<String>,
    /// Most bytes of a body.
    pub max_body: usize,
    /// Most sequences that wait for their turn.
    pub max_queue: usize,
    /// Most tokens of an answer.
    pub max_tokens: Option<usize>,
    /// Seconds that a request may take.
    pub request_timeout: u64,
    /// Seconds that a client may take to send a request's head, and its body.
    pub read_timeout: u64,
    /// Seconds that a client may take to take anything of what it is sent.
    pub write_timeout: u64,
    /// Seconds that answers get to end when the server is told to.
    pub drain_seconds: u64,
    /// Which states are kept.
    pub cache: Policy,
    /// Where documents are kept.
    pub documents: Option<PathBuf>,
}

/// What keeps a server from starting, or ends it.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum Error {
    #[error(transparent)]
    Load(#[from] load::Error),
    #[error(transparent)]
    Engine(#[from] session::Error),
    #[error("{what}: {source}")]
    Io {
        what: String,
        source: std::io::Error,
    },
    #[error("the engine's thread has ended: this is a mistake of ours")]
    EngineGone,
}

fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
    let what = what.into();
    move |source| Error::Io { what, source }
}

/// What handlers share.
struct Server {
    options: Options,
    model: Arc<Model>,
    eos: Vec<TokenId>,
    /// Most tokens of a sequence.
    context: usize,
    config: EngineConfig,
    /// Whether only this machine is listened to.
    loopback: bool,
    commands: Sender<Command>,
    /// Free places among those that wait and run.
    free: Arc<Semaphore>,
    /// All places.
    places: usize,
    library: Library,
    past: responses::Past,
    metrics: Arc<Metrics>,
    picture: Arc<Mutex<Picture>>,
    draining: AtomicBool,
    started: Instant,
    /// When that was, in seconds since 1970.
    created: u64,
}

/// A model and an engine's sizes for it.
pub struct Setup {
    /// The model.
    pub model: Model,
    /// How it is loaded again.
    pub source: ModelSource,
    /// The engine's sizes.
    pub config: EngineConfig,
    /// Pages for running sequences and kept states.
    pub pages: usize,
}

/// A socket that listens.
pub fn bind(host: &str, port: u16) -> Result<std::net::TcpListener, Error> {
    std::net::TcpListener::bind((host, port)).map_err(|source| {
        let what = match source.kind() {
            std::io::ErrorKind::AddrInUse => format!(
                "{host}:{port} is taken by another program; end it, or choose another --port (0 takes a free one)"
            ),
            _ => format!("{host}:{port} cannot be listened on"),
        };
        Error::Io { what, source }
    })
}

/// Serves until SIGTERM or SIGINT, then lets running answers end. `ready` is called once requests are answered.
pub fn serve(
    listener: std::net::TcpListener,
    setup: Setup,
    options: Options,
    note: Note,
    ready: impl FnOnce(SocketAddr),
) -> Result<(), Error> {
    let address = listener.local_addr().map_err(io("the socket"))?;
    listener.set_nonblocking(true).map_err(io("the socket"))?;
    let Setup {
        model,
        source,
        config,
        pages,
    } = setup;
    // Reading all weights is for files that outlive the process.
    let kept_in_files = options.documents.is_some() || options.cache.spill.is_some();
    let fingerprint = if kept_in_files {
        model.fingerprint()?
    } else {
        Fingerprint {
            plan: String::new(),
            weights: String::new(),
        }
    };
    let mut engine = Engine::with_pages(model.network.clone(), config.clone(), pages)?;
    engine.keep_states(options.cache.clone(), fingerprint.clone());
    let places = engine.running_limit() + options.max_queue;
    let model = Arc::new(model);
    let metrics = Arc::new(Metrics::default());
    let picture = Arc::new(Mutex::new(Picture::default()));
    let (commands, queue) = channel();
    let fingerprint = kept_in_files.then_some(fingerprint);
    let server = Arc::new(Server {
        eos: model.eos(),
        context: config.context,
        loopback: address.ip().is_loopback(),
        library: Library::new(options.documents.clone(), source, fingerprint),
        past: responses::Past::default(),
        free: Arc::new(Semaphore::new(places)),
        places,
        started: Instant::now(),
        created: seconds_now(),
        draining: AtomicBool::new(false),
        options,
        config,
        commands,
        model: model.clone(),
        metrics: metrics.clone(),
        picture: picture.clone(),
    });
    let opened = server.library.open(&model, server.context);
    let (known, wrong) = opened.map_err(io("--documents"))?;
    for fault in wrong {
        note(&format!("{fault}; this document is left out"));
    }
    for reading in known {
        // The receiver is here.
        let _ = server.commands.send(Command::Read(reading));
    }
    let worker = Worker::new(engine, model, metrics, picture, queue, note.clone());
    let (alive, gone) = tokio::sync::oneshot::channel::<()>();
    let thread = std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || {
            worker.run();
            drop(alive);
        })
        .map_err(io("the engine's thread"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(HTTP_THREADS)
        .max_blocking_threads(TEXT_THREADS)
        .enable_all()
        .build()
        .map_err(io("the threads that speak HTTP"))?;
    let stopper = server.commands.clone();
    let served = runtime.block_on(run(server, listener, gone, &note, || ready(address)));
    // What still runs is told to end, and waited for: documents are kept.
    let _ = stopper.send(Command::Stop);
    let joined = thread.join();
    runtime.shutdown_timeout(Duration::from_secs(1));
    served?;
    joined.map_err(|_| Error::EngineGone)
}

async fn run(
    server: Arc<Server>,
    listener: std::net::TcpListener,
    mut gone: tokio::sync::oneshot::Receiver<()>,
    note: &Note,
    ready: impl FnOnce(),
) -> Result<(), Error> {
    let listener = tokio::net::TcpListener::from_std(listener).map_err(io("the socket"))?;
    let mut signals = Signals::new().map_err(io("signals"))?;
    let (stop, stopped) = watch::channel(false);
    let patience = net::Patience {
        read: Duration::from_secs(server.options.read_timeout),
        write: Duration::from_secs(server.options.write_timeout),
    };
    let router = routes::router(server.clone());
    let connections = tokio::spawn(net::serve(listener, router, patience, stopped));
    ready();
    let mut result = Ok(());
    tokio::select! {
        () = signals.next() => {
            server.draining.store(true, Ordering::SeqCst);
            let open = server.open();
            if open > 0 {
                let answers = if open == 1 { "answer is" } else { "answers are" };
                note(&format!("{open} {answers} let end; press Ctrl-C again to stop at once"));
            }
            // The thread is there until it is told to stop.
            let _ = server.commands.send(Command::Drain);
            let all = server.free.acquire_many(server.places as u32);
            let most = Duration::from_secs(server.options.drain_seconds);
            tokio::select! {
                // Whatever is left by then is cut off.
                _ = tokio::time::timeout(most, all) => {}
                () = signals.next() => {}
                _ = &mut gone => result = Err(Error::EngineGone),
            }
        }
        _ = &mut gone => result = Err(Error::EngineGone),
    }
    // Jobs that are left end, so that their clients are told so.
    let _ = server.commands.send(Command::Stop);
    let _ = stop.send(true);
    // It has nothing to say.
    let _ = connections.await;
    result
}

/// SIGTERM and SIGINT.
struct Signals {
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Signals {
            #[cfg(unix)]
            terminate: {
                use tokio::signal::unix::{SignalKind, signal};
                signal(SignalKind::terminate())?
            },
        })
    }

    async fn next(&mut self) {
        #[cfg(unix)]
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = self.terminate.recv() => {}
        }
        #[cfg(not(unix))]
        let _ = tokio::signal::ctrl_c().await;
    }
}

fn seconds_now() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |time| time.as_secs())
}

impl Server {
    fn now(&self) -> u64 {
        seconds_now()
    }

    /// A new name for something.
    fn name(&self, kind: &str) -> String {
        let separator = if kind == "chatcmpl" || kind == "cmpl" {
            '-'
        } else {
            '_'
        };
        format!(
            "{kind}{separator}{:016x}{:08x}",
            request::random(),
            request::random() as u32
        )
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// How many sequences wait or run.
    fn open(&self) -> usize {
        self.places - self.free.available_permits().min(self.places)
    }

    fn refuse_if_draining(&self) -> Result<(), ApiError> {
        if self.is_draining() {
            let message = "the server is stopping and takes nothing new";
            return Err(ApiError::unavailable("draining", message));
        }
        Ok(())
    }

    fn command(&self, command: Command) -> Result<(), ApiError> {
        let gone = |_| ApiError::internal("the engine's thread has ended");
        self.commands.send(command).map_err(gone)
    }

    /// Hands choices to the engine; returns once they are in its queue.
    async fn submit(&self, name: String, choices: Vec<Choice>) -> Result<Ticket, ApiError> {
        self.refuse_if_draining()?;
        let count = choices.len();
        if count > self.places {
            let message = format!(
                "{count} choices are more than the {} that may wait and run (--max-queue)",
                self.places
            );
            return Err(ApiError::field("n", message));
        }
        let Ok(place) = self.free.clone().try_acquire_many_owned(count as u32) else {
            let message = format!(
                "{} sequences wait or run already, and at most {} may (--max-queue); try again later",
                self.open(),
                self.places
            );
            return Err(ApiError::unavailable("queue_full", message));
        };
        let (events, receiver) = tokio::sync::mpsc::channel(MOST_EVENTS);
        let id = request::random();
        let job = Job {
            id,
            name,
            choices,
            events,
            received: Instant::now(),
            place,
        };
        self.command(Command::Run(job))?;
        let allowed = Duration::from_secs(self.options.request_timeout);
        let mut ticket = Ticket::new(id, receiver, self.commands.clone(), allowed);
        match ticket.next().await? {
            Event::Accepted => Ok(ticket),
            other => Err(ApiError::internal(format!("{other:?} came first"))),
        }
    }

    /// Runs what takes a while away from the threads that speak HTTP.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let done = tokio::task::spawn_blocking(work).await;
        done.unwrap_or_else(|_| Err(ApiError::internal("reading the request failed")))
    }

    fn tokenizer(&self) -> Result<&Arc<Tokenizer>, ApiError> {
        self.model
            .tokenizer()
            .map_err(|e| ApiError::invalid(e.to_string()))
    }

    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, ApiError> {
        let tokens = self.tokenizer()?.encode(text, add_special);
        tokens.map_err(|e| ApiError::invalid(e.to_string()))
    }

    fn decode(&self, tokens: &[TokenId]) -> Result<String, ApiError> {
        let text = self.tokenizer()?.decode(tokens, false);
        text.map_err(|e| ApiError::invalid(e.to_string()))
    }

    fn about_model(&self) -> Value {
        let (model, config) = (&self.model, &self.config);
        json!({
            "name": self.options.names[0],
            "names": self.options.names,
            "device": model.network.backend.name(),
            "dtype": model.dtype_word(),
            "kv": model.kv_dtype.name(),
            "weights_bytes": model.weights_bytes,
            "threads": model.threads,
            "vocab": model.network.graph.vocab,
            "context": self.context,
            "trained_context": model.plan.context,
            "max_sequences": config.max_sequences,
            "token_budget": config.token_budget,
            "has_chat_template": model.has_chat_template(),
            "cache": self.options.cache.to_string(),
            "summary": model.summary(),
            "version": env!("CARGO_PKG_VERSION"),
        })
    }
}
