//! Models from the Hugging Face Hub, in the cache that other tools share.
//!
//! The cache's layout is hf-hub's; the transfer is our own. hf-hub 0.5 appends to the wrong place when it
//! retries, appends a whole answer to a part when a server ignores `Range`, does not check the length it
//! got, and panics on some addresses and answers; and it takes a server's `etag` for a file name unseen.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use hf_hub::{Cache, Repo, RepoType};
use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use ureq::http::{Response, StatusCode, header};
use ureq::{Agent, Body};

/// Read beside the weights, where a repository has them; only the first must be there.
const FILES: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];
const INDEX: &str = "model.safetensors.index.json";
const WEIGHTS: &str = "model.safetensors";

/// Where models come from and go to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubOptions {
    /// The cache, `~/.cache/huggingface/hub` unless told otherwise.
    pub cache: PathBuf,
    /// The Hub or a mirror of it, without a slash at the end.
    pub endpoint: String,
    /// Opens private and gated models.
    pub token: Option<String>,
    /// Uses the cache alone.
    pub offline: bool,
    /// An `http://`, `https://` or `socks5://` address.
    pub proxy: Option<String>,
    /// Hosts to reach without the proxy, separated by commas. Loopback always is.
    pub no_proxy: Option<String>,
    /// Fresh attempts after a connection broke; one that brought bytes does not count.
    pub retries: u32,
    /// Before the first fresh attempt; doubles each time.
    pub retry_wait: Duration,
}

impl HubOptions {
    /// The Hub, with its cache in `cache`.
    pub fn new(cache: PathBuf) -> Self {
        Self {
            cache,
            endpoint: "https://huggingface.co".into(),
            token: None,
            offline: false,
            proxy: None,
            no_proxy: None,
            retries: 5,
            retry_wait: Duration::from_secs(1),
        }
    }

    /// What `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and the
    /// usual proxy variables say, with the meaning and the defaults they have in other tools.
    ///
    /// An error if neither they nor `HOME` say where the cache is.
    pub fn from_env(get: impl Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let first = |names: &[&str]| {
            names
                .iter()
                .find_map(|name| get(name).filter(|value| !value.trim().is_empty()))
        };
        let home = first(&["HOME", "USERPROFILE"]);
        let path = |text: String| match (text.strip_prefix("~/"), &home) {
            (Some(rest), Some(home)) => Path::new(home).join(rest),
            _ => PathBuf::from(text),
        };
        let base = first(&["HF_HOME"]).map(path).or_else(|| {
            let cache = first(&["XDG_CACHE_HOME"])
                .map(path)
                .or_else(|| Some(Path::new(home.as_ref()?).join(".cache")));
            Some(cache?.join("huggingface"))
        });
        let cache = first(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]).map(path);
        let cache = cache
            .or_else(|| Some(base.as_ref()?.join("hub")))
            .ok_or(Error::NoCache)?;
        let token_file = first(&["HF_TOKEN_PATH"])
            .map(path)
            .or_else(|| Some(base.as_ref()?.join("token")));
        let token = first(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
            .or_else(|| fs::read_to_string(token_file?).ok())
            .map(|token| token.trim().to_owned())
            .filter(|token| !token.is_empty());
        let offline = first(&["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
            .unwrap_or_default()
            .to_ascii_uppercase();
        let mut options = Self::new(cache);
        options.token = token;
        options.offline = ["1", "ON", "YES", "TRUE"].contains(&offline.trim());
        options.proxy = first(&[
            "HTTPS_PROXY",
            "https_proxy",
            "ALL_PROXY",
            "all_proxy",
            "HTTP_PROXY",
            "http_proxy",
        ]);
        options.no_proxy = first(&["NO_PROXY", "no_proxy"]);
        if let Some(endpoint) = first(&["HF_ENDPOINT"]) {
            options.endpoint = endpoint.trim().trim_end_matches('/').to_owned();
        }
        Ok(options)
    }
}

/// Why a model cannot be had, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The id is none.
    #[error(
        "{id}: {reason}; expected owner/name or owner/name@revision, such as ai21labs/AI21-Jamba-Mini-1.7@main"
    )]
    Id {
        /// What was given.
        id: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Nobody says where the cache is.
    #[error("no place for downloads: HOME is not set; set HF_HOME or HF_HUB_CACHE to a directory")]
    NoCache,
    /// The proxy's address, the endpoint or the token cannot be used.
    #[error("{what} cannot be used: {reason}")]
    Option {
        /// Which one.
        what: &'static str,
        /// Why not.
        reason: String,
    },
    /// Not (all) in the cache, and offline.
    #[error(
        "{id} is not in {cache}: {missing}, and downloads are off. Run once without --offline and HF_HUB_OFFLINE, or copy the cache of a machine that has it"
    )]
    Offline {
        /// The model.
        id: String,
        /// The cache.
        cache: PathBuf,
        /// What it lacks.
        missing: String,
    },
    /// The Hub does not know it, or shows it to nobody without a token.
    #[error("{id}: {endpoint} has no such {what}{help}")]
    NotFound {
        /// The model.
        id: String,
        /// Who was asked.
        endpoint: String,
        /// "model" or "revision …".
        what: String,
        /// What to do.
        help: &'static str,
    },
    /// 401 or 403.
    #[error("{id}: {endpoint} refuses access (HTTP {status}). {help}")]
    Denied {
        /// The model.
        id: String,
        /// Who was asked.
        endpoint: String,
        /// 401 or 403.
        status: u16,
        /// What to do.
        help: &'static str,
    },
    /// The repository lacks a file we need.
    #[error("{id} has no {file}: {help}")]
    NoFile {
        /// The model.
        id: String,
        /// The file.
        file: String,
        /// What to do.
        help: &'static str,
    },
    /// An answer we cannot use.
    #[error(
        "{url}: {found}; expected {expected}. If HF_ENDPOINT is a mirror, it may not speak the Hub's language"
    )]
    Answer {
        /// What was asked for.
        url: String,
        /// What came.
        found: String,
        /// What should have come.
        expected: &'static str,
    },
    /// The network failed, again and again.
    #[error(
        "{url}: {reason}. Check the connection (and HTTPS_PROXY); what was downloaded is kept, run again to go on"
    )]
    Network {
        /// What was asked for.
        url: String,
        /// What the last attempt met.
        reason: String,
    },
    /// An index that names no proper files.
    #[error("{id}: {INDEX}: {found}; expected a weight_map from tensors to files beside it")]
    Index {
        /// The model.
        id: String,
        /// What it holds.
        found: String,
    },
    /// The disk is too full.
    #[error("{path}: {} to download, {} free: free {} or set HF_HUB_CACHE to a larger disk", HumanBytes(*need), HumanBytes(*free), HumanBytes(need - free))]
    Space {
        /// The cache.
        path: PathBuf,
        /// Bytes to come.
        need: u64,
        /// Bytes there are.
        free: u64,
    },
    /// The cache cannot be read or written.
    #[error(
        "{path}: cannot {action}: {source}. Check who owns it, or set HF_HUB_CACHE to a directory you can write to"
    )]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
}

/// Hears how a download goes.
pub trait Progress {
    /// `total` bytes are to come or there already, over all files, of which `done` are there.
    fn start(&mut self, total: u64, done: u64);
    /// Bytes of this file come now.
    fn file(&mut self, name: &str);
    /// So many more bytes are there.
    fn advance(&mut self, bytes: u64);
    /// Something a person may want to know, such as a fresh attempt.
    fn note(&mut self, text: &str);
    /// All is there.
    fn finish(&mut self);
}

/// Says nothing.
#[derive(Clone, Copy, Debug)]
pub struct Silent;

impl Progress for Silent {
    fn start(&mut self, _: u64, _: u64) {}
    fn file(&mut self, _: &str) {}
    fn advance(&mut self, _: u64) {}
    fn note(&mut self, _: &str) {}
    fn finish(&mut self) {}
}

/// A bar on stderr with bytes, speed and time left; nothing is drawn where stderr is no terminal.
#[derive(Debug)]
pub struct Bar(ProgressBar);

impl Bar {
    /// Not drawn before something is to be downloaded.
    pub fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
        let style = ProgressStyle::with_template(
            "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        );
        if let Ok(style) = style {
            bar.set_style(style);
        }
        Self(bar)
    }
}

impl Default for Bar {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress for Bar {
    fn start(&mut self, total: u64, done: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
        self.0.reset_eta();
    }
    fn file(&mut self, name: &str) {
        self.0.set_message(name.to_owned());
    }
    fn advance(&mut self, bytes: u64) {
        self.0.inc(bytes);
    }
    fn note(&mut self, text: &str) {
        self.0.println(text);
    }
    fn finish(&mut self) {
        self.0.finish_and_clear();
    }
}

/// A line now and then, for logs.
pub struct Lines<W: Write> {
    out: W,
    every: Duration,
    last: Option<Instant>,
    started: Instant,
    at_start: u64,
    done: u64,
    total: u64,
    name: String,
}

impl<W: Write> Lines<W> {
    /// Writes to `out`, at most one line `every` so often.
    pub fn new(out: W, every: Duration) -> Self {
        let started = Instant::now();
        Self {
            out,
            every,
            last: None,
            started,
            at_start: 0,
            done: 0,
            total: 0,
            name: String::new(),
        }
    }
}

impl<W: Write> Progress for Lines<W> {
    fn start(&mut self, total: u64, done: u64) {
        (self.total, self.done, self.at_start, self.started) = (total, done, done, Instant::now());
        writeln!(
            self.out,
            "downloading {}",
            HumanBytes(total.saturating_sub(done))
        )
        .ok();
        self.last = Some(Instant::now());
    }
    fn file(&mut self, name: &str) {
        self.name = name.into();
    }
    fn advance(&mut self, bytes: u64) {
        self.done += bytes;
        if self.last.is_some_and(|last| last.elapsed() < self.every) {
            return;
        }
        self.last = Some(Instant::now());
        let speed =
            (self.done - self.at_start) as f64 / self.started.elapsed().as_secs_f64().max(1e-3);
        let left =
            Duration::from_secs_f64((self.total.saturating_sub(self.done)) as f64 / speed.max(1.0));
        let (done, total, speed) = (
            HumanBytes(self.done),
            HumanBytes(self.total),
            HumanBytes(speed as u64),
        );
        let left = indicatif::HumanDuration(left);
        writeln!(
            self.out,
            "{}: {done} of {total}, {speed}/s, {left} left",
            self.name
        )
        .ok();
    }
    fn note(&mut self, text: &str) {
        writeln!(self.out, "{text}").ok();
    }
    fn finish(&mut self) {}
}

/// `owner/name` and a branch, tag or commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubId {
    /// `owner/name`.
    pub repository: String,
    /// "main" unless given.
    pub revision: String,
}

impl HubId {
    /// Reads `owner/name[@revision]`.
    pub fn parse(id: &str) -> Result<Self, Error> {
        let wrong = |reason| {
            Err(Error::Id {
                id: id.into(),
                reason,
            })
        };
        let (repository, revision) = id.split_once('@').unwrap_or((id, "main"));
        let plain = |text: &str, more: &[u8]| {
            let known = |byte: &u8| {
                byte.is_ascii_alphanumeric() || b"-_.".contains(byte) || more.contains(byte)
            };
            text.as_bytes().iter().all(known)
                && !text.contains("..")
                && !text.starts_with(['.', '-', '/'])
        };
        let Some((owner, name)) = repository.split_once('/') else {
            return wrong("there is no owner");
        };
        if owner.is_empty() || name.is_empty() || name.contains('/') {
            return wrong("it is not of two parts");
        }
        if !plain(owner, b"") || !plain(name, b"") || repository.len() > 140 {
            return wrong("its characters are not those of a model's name");
        }
        if revision.is_empty() || !plain(revision, b"/+") || revision.ends_with('/') {
            return wrong("its revision is no branch, tag or commit");
        }
        Ok(Self {
            repository: repository.into(),
            revision: revision.into(),
        })
    }

    fn is_commit(&self) -> bool {
        is_commit(&self.revision)
    }
}

fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Has a model's files ready; returns the directory that holds them.
///
/// Downloads what the cache lacks: the configuration, the tokenizer and the safetensors weights, never
/// pickled ones. An interrupted download goes on where it stopped.
pub fn fetch_model(
    id: &str,
    options: &HubOptions,
    progress: &mut dyn Progress,
) -> Result<PathBuf, Error> {
    let hub = Hub::new(id, options)?;
    let cached = hub.cached();
    match &cached {
        Ok(snapshot) if options.offline || hub.id.is_commit() => return Ok(snapshot.clone()),
        Err(missing) if options.offline => {
            return Err(Error::Offline {
                id: id.into(),
                cache: options.cache.clone(),
                missing: missing.clone(),
            });
        }
        _ => {}
    }
    match (hub.fetch(progress), cached) {
        // As other tools do: what was complete yesterday serves while the network is down.
        (Err(Error::Network { reason, .. }), Ok(snapshot)) => {
            progress.note(&format!(
                "{}: {reason}; using the copy in the cache",
                options.endpoint
            ));
            Ok(snapshot)
        }
        (result, _) => result,
    }
}

struct Hub<'a> {
    id: HubId,
    options: &'a HubOptions,
    agent: Agent,
    cache: hf_hub::CacheRepo,
    folder: PathBuf,
}

/// A file on the Hub.
struct Remote {
    name: String,
    url: String,
    etag: String,
    commit: String,
    size: u64,
}

impl<'a> Hub<'a> {
    fn new(id: &str, options: &'a HubOptions) -> Result<Self, Error> {
        let id = HubId::parse(id)?;
        let proxy = options
            .proxy
            .as_deref()
            .map(|url| proxy(url, options.no_proxy.as_deref()))
            .transpose()?;
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .proxy(proxy)
            .user_agent(concat!("strata/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity") // a compressed answer has no use for Range
            .redirect_auth_headers(ureq::config::RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(Duration::from_secs(15)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_per_read(Some(Duration::from_secs(60)))
            .build()
            .into();
        let repo = Repo::with_revision(id.repository.clone(), RepoType::Model, id.revision.clone());
        let folder = options.cache.join(repo.folder_name());
        let cache = Cache::new(options.cache.clone()).repo(repo);
        Ok(Self {
            id,
            options,
            agent,
            cache,
            folder,
        })
    }

    /// The snapshot in the cache, or what it lacks.
    fn cached(&self) -> Result<PathBuf, String> {
        let commit = if self.id.is_commit() {
            self.id.revision.clone()
        } else {
            let reference = self.folder.join("refs").join(&self.id.revision);
            let commit = fs::read_to_string(&reference)
                .map_err(|_| format!("there is no {}", reference.display()))?;
            commit.trim().to_owned()
        };
        if !plain(&commit) {
            return Err("its reference is no commit".into());
        }
        let snapshot = self.cache.pointer_path(&commit);
        let missing = |name: &str| format!("{} lacks {name}", snapshot.display());
        if !snapshot.join(FILES[0]).is_file() {
            return Err(missing(FILES[0]));
        }
        match fs::read(snapshot.join(INDEX)) {
            Ok(index) => {
                for name in shards(&index).map_err(|found| format!("{INDEX}: {found}"))? {
                    if !snapshot.join(&name).is_file() {
                        return Err(missing(&name));
                    }
                }
            }
            Err(_) if snapshot.join(WEIGHTS).is_file() => {}
            Err(_) => return Err(missing(WEIGHTS)),
        }
        Ok(snapshot)
    }

    fn fetch(&self, progress: &mut dyn Progress) -> Result<PathBuf, Error> {
        let config = self.required(
            FILES[0],
            &self.id.revision,
            "it is not a model in Hugging Face form; for GGUF, download the file and name it",
            progress,
        )?;
        let commit = config.commit.clone();
        let mut files = vec![config];
        for name in &FILES[1..] {
            files.extend(self.look_up(name, &commit, progress)?);
        }
        if let Some(index) = self.look_up(INDEX, &commit, progress)? {
            self.download(&index, progress)?;
            let path = self.snapshot(&index);
            let bytes = fs::read(&path).map_err(io(&path, "read"))?;
            let names = shards(&bytes).map_err(|found| Error::Index {
                id: self.id.repository.clone(),
                found,
            })?;
            for name in names {
                files.push(self.required(
                    &name,
                    &commit,
                    "the index names it; tell the model's authors",
                    progress,
                )?);
            }
        } else {
            let help = "only safetensors weights are read. Ask the authors for them, or convert the model with transformers' save_pretrained";
            files.push(self.required(WEIGHTS, &commit, help, progress)?);
        }
        let total = files.iter().map(|file| file.size).sum();
        let done: u64 = files.iter().map(|file| self.there(file)).sum();
        let snapshot = self.cache.pointer_path(&commit);
        fs::create_dir_all(&snapshot).map_err(io(&snapshot, "create"))?;
        check_space(
            &self.options.cache,
            total - done,
            free_bytes(&self.options.cache),
        )?;
        if done < total {
            progress.start(total, done);
        }
        for file in &files {
            progress.file(&file.name);
            self.download(file, progress)?;
        }
        if !self.id.is_commit() {
            let reference = self.folder.join("refs").join(&self.id.revision);
            self.cache
                .create_ref(&commit)
                .map_err(io(&reference, "write"))?;
        }
        progress.finish();
        Ok(snapshot)
    }

    fn snapshot(&self, file: &Remote) -> PathBuf {
        self.cache.pointer_path(&file.commit).join(&file.name)
    }

    /// Bytes of the file that are in the cache.
    fn there(&self, file: &Remote) -> u64 {
        let size = |path: &Path| fs::metadata(path).map_or(0, |file| file.len());
        let blob = self.cache.blob_path(&file.etag);
        let whole = [self.snapshot(file), blob.clone()]
            .iter()
            .any(|path| path.is_file() && size(path) == file.size);
        if whole {
            file.size
        } else {
            size(&part(&blob)).min(file.size)
        }
    }

    fn url(&self, name: &str, revision: &str) -> String {
        let name: Vec<String> = name.split('/').map(escape).collect();
        format!(
            "{}/{}/resolve/{}/{}",
            self.options.endpoint,
            self.id.repository,
            escape(revision),
            name.join("/")
        )
    }

    fn required(
        &self,
        name: &str,
        revision: &str,
        help: &'static str,
        progress: &mut dyn Progress,
    ) -> Result<Remote, Error> {
        let id = self.id.repository.clone();
        self.look_up(name, revision, progress)?
            .ok_or(Error::NoFile {
                id,
                file: name.into(),
                help,
            })
    }

    /// What the Hub says of a file; `None` if the repository has none of this name.
    fn look_up(
        &self,
        name: &str,
        revision: &str,
        progress: &mut dyn Progress,
    ) -> Result<Option<Remote>, Error> {
        let mut url = self.url(name, revision);
        for _ in 0..5 {
            let answer = self.patiently(&url, progress, |hub| {
                hub.request(hub.agent.head(&url))
                    .config()
                    .max_redirects(0)
                    .build()
                    .call()
            })?;
            // Renamed repositories redirect within the Hub; a redirect elsewhere already carries what we ask for.
            match text(&answer, "location") {
                Some(place)
                    if answer.status().is_redirection()
                        && place.starts_with('/')
                        && !place.starts_with("//") =>
                {
                    url = format!("{}{place}", origin(&self.options.endpoint));
                }
                _ => return self.remote(name, url, &answer),
            }
        }
        Err(Error::Answer {
            url,
            found: "five redirects".into(),
            expected: "a file",
        })
    }

    fn remote(
        &self,
        name: &str,
        url: String,
        answer: &Response<Body>,
    ) -> Result<Option<Remote>, Error> {
        let status = answer.status();
        if !status.is_success() && !status.is_redirection() {
            let found = text(answer, "x-error-code") == Some("EntryNotFound");
            return if found
                || (status == StatusCode::NOT_FOUND
                    && name != FILES[0]
                    && text(answer, "x-error-code").is_none())
            {
                Ok(None)
            } else {
                Err(self.refusal(&url, answer))
            };
        }
        let header = |names: &[&'static str], expected: &'static str| {
            let found = names.iter().find_map(|name| text(answer, name));
            let missing = || Error::Answer {
                url: url.clone(),
                found: format!("no header {}", names[0]),
                expected,
            };
            found.map(str::to_owned).ok_or_else(missing)
        };
        let etag = header(&["x-linked-etag", "etag"], "the file's etag")?;
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
        let commit = header(&["x-repo-commit"], "the commit the file is of")?;
        // They become names of files: nothing but letters and digits may.
        if !plain(&etag) || !plain(&commit) {
            let found = format!("etag {etag:?}, commit {commit:?}");
            return Err(Error::Answer {
                url,
                found,
                expected: "plain hexadecimal names",
            });
        }
        let size = header(
            &["x-linked-size", "content-length"],
            "the file's size in bytes",
        )?;
        let Ok(size) = size.parse() else {
            return Err(Error::Answer {
                url,
                found: format!("size {size:?}"),
                expected: "the file's size in bytes",
            });
        };
        Ok(Some(Remote {
            name: name.into(),
            url,
            etag,
            commit,
            size,
        }))
    }

    fn refusal(&self, url: &str, answer: &Response<Body>) -> Error {
        let (id, endpoint) = (self.id.repository.clone(), self.options.endpoint.clone());
        let login = ". If it is private, set HF_TOKEN to a token that may read it";
        match (answer.status().as_u16(), text(answer, "x-error-code")) {
            (_, Some("RevisionNotFound")) => {
                let what = format!("revision {:?} of it", self.id.revision);
                Error::NotFound {
                    id,
                    endpoint,
                    what,
                    help: ". Look for its branches and tags on the model's page",
                }
            }
            (status, Some("GatedRepo")) => Error::Denied {
                id,
                endpoint,
                status,
                help: "Its authors want their terms accepted: do so on the model's page, then set HF_TOKEN to a token of that account",
            },
            (401, _) if self.options.token.is_some() => Error::Denied {
                id,
                endpoint,
                status: 401,
                help: "There is no such model, or the token (HF_TOKEN or the token file) is wrong or may not read it",
            },
            (401, _) => Error::Denied {
                id,
                endpoint,
                status: 401,
                help: "There is no such model, or it is private: check the name, or set HF_TOKEN to a token that may read it",
            },
            (403, _) => Error::Denied {
                id,
                endpoint,
                status: 403,
                help: "Set HF_TOKEN to a token that may read this model",
            },
            (404, _) => Error::NotFound {
                id,
                endpoint,
                what: "model".into(),
                help: login,
            },
            (status, _) => Error::Answer {
                url: url.into(),
                found: format!("HTTP {status}"),
                expected: "a file",
            },
        }
    }

    fn request(
        &self,
        request: ureq::RequestBuilder<ureq::typestate::WithoutBody>,
    ) -> ureq::RequestBuilder<ureq::typestate::WithoutBody> {
        match &self.options.token {
            Some(token) => request.header(header::AUTHORIZATION, format!("Bearer {token}")),
            None => request,
        }
    }

    /// Asks again while the network or the server fails in ways that pass.
    fn patiently(
        &self,
        url: &str,
        progress: &mut dyn Progress,
        ask: impl Fn(&Self) -> Result<Response<Body>, ureq::Error>,
    ) -> Result<Response<Body>, Error> {
        let mut attempt = 0;
        loop {
            let reason = match ask(self) {
                Ok(answer) if !passing(answer.status()) => return Ok(answer),
                Ok(answer) => format!("HTTP {}", answer.status()),
                Err(error @ (ureq::Error::BadUri(_) | ureq::Error::Http(_))) => {
                    return Err(Error::Option {
                        what: "HF_ENDPOINT or the token",
                        reason: error.to_string(),
                    });
                }
                // Nobody is there: to ask for half a minute would not change it.
                Err(ureq::Error::Io(error))
                    if error.kind() == std::io::ErrorKind::ConnectionRefused && attempt >= 2 =>
                {
                    return Err(Error::Network {
                        url: url.into(),
                        reason: error.to_string(),
                    });
                }
                Err(error) => error.to_string(),
            };
            self.wait(&mut attempt, url, reason, progress)?;
        }
    }

    fn wait(
        &self,
        attempt: &mut u32,
        url: &str,
        reason: String,
        progress: &mut dyn Progress,
    ) -> Result<(), Error> {
        if *attempt >= self.options.retries {
            return Err(Error::Network {
                url: url.into(),
                reason,
            });
        }
        let wait = self.options.retry_wait * 2u32.pow((*attempt).min(5));
        progress.note(&format!("{reason}; trying again in {} s", wait.as_secs()));
        std::thread::sleep(wait);
        *attempt += 1;
        Ok(())
    }

    /// Has the file in the snapshot, downloading what the cache lacks.
    fn download(&self, file: &Remote, progress: &mut dyn Progress) -> Result<(), Error> {
        let pointer = self.snapshot(file);
        if pointer.is_file() && fs::metadata(&pointer).is_ok_and(|found| found.len() == file.size) {
            return Ok(());
        }
        let blob = self.cache.blob_path(&file.etag);
        let blobs = self.folder.join("blobs");
        fs::create_dir_all(&blobs).map_err(io(&blobs, "create"))?;
        // Another process may be at the same file: the same lock as hf-hub's keeps the two apart.
        let lock_path = blob.with_extension("lock");
        let lock = File::create(&lock_path).map_err(io(&lock_path, "create"))?;
        if lock.try_lock().is_err() {
            progress.note(&format!(
                "waiting for another process that downloads {}",
                file.name
            ));
            lock.lock().map_err(io(&lock_path, "lock"))?;
        }
        if !fs::metadata(&blob).is_ok_and(|found| found.len() == file.size) {
            let part = part(&blob);
            self.transfer(file, &part, progress)?;
            fs::rename(&part, &blob).map_err(io(&blob, "write"))?;
        }
        link(&blob, &pointer, file.name.split('/').count() + 1)?;
        fs::remove_file(&lock_path).ok();
        Ok(())
    }

    /// Brings the part to the file's size.
    fn transfer(
        &self,
        file: &Remote,
        part: &Path,
        progress: &mut dyn Progress,
    ) -> Result<(), Error> {
        let mut out = OpenOptions::new()
            .append(true)
            .create(true)
            .open(part)
            .map_err(io(part, "write"))?;
        let length = |out: &File| {
            out.metadata()
                .map(|found| found.len())
                .map_err(io(part, "read"))
        };
        if length(&out)? > file.size {
            out.set_len(0).map_err(io(part, "write"))?; // of another file, or damaged
        }
        let mut attempt = 0;
        loop {
            let start = length(&out)?;
            if start == file.size {
                return out.sync_all().map_err(io(part, "write"));
            }
            let answer = self.patiently(&file.url, progress, |hub| {
                hub.request(hub.agent.get(&file.url))
                    .header(header::RANGE, format!("bytes={start}-"))
                    .call()
            })?;
            match answer.status() {
                StatusCode::PARTIAL_CONTENT => {
                    let range = text(&answer, "content-range").unwrap_or_default();
                    if range != format!("bytes {start}-{}/{}", file.size - 1, file.size) {
                        let found = format!(
                            "content-range {range:?} after asking from byte {start} of {}",
                            file.size
                        );
                        return Err(Error::Answer {
                            url: file.url.clone(),
                            found,
                            expected: "the rest of the file",
                        });
                    }
                }
                // The whole file, as the server knows no Range.
                StatusCode::OK => out.set_len(0).map_err(io(part, "write"))?,
                _ => return Err(self.refusal(&file.url, &answer)),
            }
            let mut body = answer.into_body().into_reader().take(file.size);
            let mut buffer = vec![0; 1 << 18];
            let reason = loop {
                match body.read(&mut buffer) {
                    Ok(0) => break "the connection ended early".to_owned(),
                    Ok(bytes) => {
                        out.write_all(&buffer[..bytes]).map_err(io(part, "write"))?;
                        progress.advance(bytes as u64);
                    }
                    Err(error) => break error.to_string(),
                }
            };
            let now = length(&out)?;
            if now > file.size {
                out.set_len(0).map_err(io(part, "write"))?;
            }
            if now < file.size {
                attempt = if now > start { 0 } else { attempt };
                self.wait(&mut attempt, &file.url, reason, progress)?;
            }
        }
    }
}

/// Answers worth asking again for.
fn passing(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 429 | 500 | 502 | 503 | 504)
}

fn text<'a>(answer: &'a Response<Body>, name: &str) -> Option<&'a str> {
    answer.headers().get(name)?.to_str().ok()
}

fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io {
        path,
        action,
        source,
    }
}

fn part(blob: &Path) -> PathBuf {
    blob.with_extension("part")
}

/// Whether a server's word can be a file's name.
fn plain(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 128
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
}

/// The files an index names, each a plain name within the repository.
fn shards(index: &[u8]) -> Result<BTreeSet<String>, String> {
    let index: serde_json::Value =
        serde_json::from_slice(index).map_err(|error| error.to_string())?;
    let map = index
        .get("weight_map")
        .and_then(serde_json::Value::as_object)
        .ok_or("there is no weight_map")?;
    let within = |name: &str| {
        let parts = || Path::new(name).components();
        !name.contains(['\\', '\0', ':'])
            && parts().count() > 0
            && parts().all(|part| matches!(part, Component::Normal(_)))
    };
    let name = |(tensor, name): (&String, &serde_json::Value)| match name.as_str() {
        Some(name) if within(name) && name.ends_with(".safetensors") => Ok(name.to_owned()),
        _ => Err(format!(
            "{tensor} is in {name}, which is no .safetensors file of the repository"
        )),
    };
    let shards: BTreeSet<String> = map.iter().map(name).collect::<Result<_, _>>()?;
    if shards.is_empty() {
        Err("it names no files".into())
    } else {
        Ok(shards)
    }
}

/// Points `pointer` at `blob`, as the cache's other users do; a copy where links are not to be had.
fn link(blob: &Path, pointer: &Path, depth: usize) -> Result<(), Error> {
    if let Some(folder) = pointer.parent() {
        fs::create_dir_all(folder).map_err(io(folder, "create"))?;
    }
    if fs::symlink_metadata(pointer).is_ok() {
        fs::remove_file(pointer).map_err(io(pointer, "replace"))?;
    }
    #[cfg(unix)]
    {
        let mut target: PathBuf = std::iter::repeat_n("..", depth).collect();
        target.push("blobs");
        target.push(blob.file_name().unwrap_or_default());
        if std::os::unix::fs::symlink(target, pointer).is_ok() {
            return Ok(());
        }
    }
    let _ = depth;
    fs::copy(blob, pointer)
        .map(|_| ())
        .map_err(io(pointer, "write"))
}

fn escape(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
    text.bytes()
        .map(|byte| {
            if plain(byte) {
                char::from(byte).to_string()
            } else {
                format!("%{byte:02X}")
            }
        })
        .collect()
}

/// Scheme and host of an address.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    url[host..].find('/').map_or(url, |end| &url[..host + end])
}

fn proxy(url: &str, no_proxy: Option<&str>) -> Result<ureq::Proxy, Error> {
    let build = || {
        let parsed = ureq::Proxy::new(url)?;
        let mut builder = ureq::Proxy::builder(parsed.protocol())
            .host(parsed.host())
            .port(parsed.port());
        if let Some(username) = parsed.username() {
            builder = builder.username(username);
        }
        if let Some(password) = parsed.password() {
            builder = builder.password(password);
        }
        for host in no_proxy
            .unwrap_or_default()
            .split(',')
            .chain(["localhost", "127.0.0.1"])
        {
            builder = builder.no_proxy(host.trim());
        }
        builder.build()
    };
    build().map_err(|error: ureq::Error| Error::Option {
        what: "the proxy",
        reason: format!("{url}: {error}"),
    })
}

fn check_space(path: &Path, need: u64, free: Option<u64>) -> Result<(), Error> {
    match free {
        Some(free) if free < need => Err(Error::Space {
            path: path.into(),
            need,
            free,
        }),
        _ => Ok(()),
    }
}

/// Bytes we may write where `path` is or will be; `None` where the system does not say.
#[cfg(unix)]
fn free_bytes(path: &Path) -> Option<u64> {
    let there = path.ancestors().find(|path| path.exists())?;
    let found = rustix::fs::statvfs(there).ok()?;
    found.f_bavail.checked_mul(found.f_frsize)
}

#[cfg(not(unix))]
fn free_bytes(_: &Path) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::io::{BufRead, BufReader};
    use std::net::{TcpListener, TcpStream};
    use std::sync::{Arc, Mutex};

    use crate::testing::{Directory, directory};

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
    const TAGGED: &str = "89abcdef0123456789abcdef0123456789abcdef";

    /// What the server does wrong, each time once.
    #[derive(Clone, Debug)]
    enum Fault {
        /// Ends the answer after so many bytes of this file.
        Cut(&'static str, usize),
        /// Answers with this status.
        Status(u16),
        /// Sends the whole file whatever the range.
        NoRange,
    }

    #[derive(Default)]
    struct State {
        files: HashMap<String, Vec<u8>>,
        faults: Vec<Fault>,
        requests: Vec<String>,
        refuse: Option<(u16, &'static str)>,
        etag: Option<&'static str>,
    }

    /// A Hub on loopback that knows owner/model at `main` and at `v1`.
    struct Server {
        state: Arc<Mutex<State>>,
        options: HubOptions,
        _cache: Directory,
    }

    impl Server {
        fn new(files: &[(&str, &[u8])]) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            let files = files
                .iter()
                .map(|(name, bytes)| (name.to_string(), bytes.to_vec()))
                .collect();
            let state = Arc::new(Mutex::new(State {
                files,
                ..State::default()
            }));
            let cache = directory(&[]);
            let mut options = HubOptions::new(cache.path().join("hub"));
            options.endpoint = format!("http://{}", listener.local_addr().expect("an address"));
            options.retry_wait = Duration::from_millis(1);
            let shared = state.clone();
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    answer(stream, &shared).ok();
                }
            });
            Self {
                state,
                options,
                _cache: cache,
            }
        }

        fn model() -> Self {
            let index = br#"{"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}"#;
            Self::new(&[
                ("config.json", b"{}"),
                ("tokenizer.json", b"{\"t\": 1}"),
                ("pytorch_model.bin", b"never"),
                (INDEX, index),
                ("model-1-of-2.safetensors", &shard(1)),
                ("model-2-of-2.safetensors", &shard(2)),
            ])
        }

        fn fetch(&self, id: &str) -> Result<PathBuf, Error> {
            fetch_model(id, &self.options, &mut Silent)
        }

        fn with(&self, change: impl FnOnce(&mut State)) {
            change(&mut self.state.lock().expect("no panic"));
        }

        fn requests(&self) -> Vec<String> {
            std::mem::take(&mut self.state.lock().expect("no panic").requests)
        }
    }

    fn shard(seed: u8) -> Vec<u8> {
        (0..300_000u32)
            .map(|i| (i.wrapping_mul(31 + u32::from(seed)) >> 3) as u8)
            .collect()
    }

    fn answer(mut stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let request = lines.next().transpose()?.unwrap_or_default();
        let headers: Vec<String> = lines
            .map_while(Result::ok)
            .take_while(|line| !line.is_empty())
            .collect();
        let header = |name: &str| {
            let named = |line: &&String| line.to_ascii_lowercase().starts_with(name);
            headers
                .iter()
                .find(named)
                .map(|line| line[name.len()..].trim().to_owned())
        };
        let range = header("range:").and_then(|range| {
            range
                .strip_prefix("bytes=")?
                .strip_suffix('-')?
                .parse()
                .ok()
        });
        let (method, path) = request
            .trim_end_matches(" HTTP/1.1")
            .split_once(' ')
            .unwrap_or_default();
        let mut state = state.lock().expect("no panic");
        let token = header("authorization:")
            .map(|token| format!(" [{token}]"))
            .unwrap_or_default();
        state.requests.push(format!(
            "{method} {path} {}{token}",
            range.map_or(String::new(), |r: usize| r.to_string())
        ));
        let mut fault = |matches: &dyn Fn(&Fault) -> bool| {
            let at = state.faults.iter().position(matches)?;
            Some(state.faults.remove(at))
        };
        if let Some(Fault::Status(status)) = fault(&|fault| matches!(fault, Fault::Status(_))) {
            return write!(
                stream,
                "HTTP/1.1 {status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
        }
        let refused = |stream: &mut TcpStream, status: u16, code: &str| {
            write!(
                stream,
                "HTTP/1.1 {status} No\r\nX-Error-Code: {code}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
        };
        let cut = fault(
            &|fault| matches!(fault, Fault::Cut(name, _) if method == "GET" && path.ends_with(name)),
        );
        let no_range =
            fault(&|fault| matches!(fault, Fault::NoRange) && method == "GET" && range > Some(0))
                .is_some();
        if let Some((status, code)) = state.refuse {
            return refused(&mut stream, status, code);
        }
        if let Some(rest) = path.strip_prefix("/owner/renamed/") {
            return write!(
                stream,
                "HTTP/1.1 307 Moved\r\nLocation: /owner/model/{rest}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
        }
        let place = path
            .strip_prefix("/owner/model/resolve/")
            .or_else(|| path.strip_prefix("/cdn/"));
        let Some((revision, name)) = place.and_then(|place| place.split_once('/')) else {
            return refused(&mut stream, 404, "RepoNotFound");
        };
        let commit = match revision {
            "main" | COMMIT => COMMIT,
            "v1" | TAGGED => TAGGED,
            _ => return refused(&mut stream, 404, "RevisionNotFound"),
        };
        let Some(bytes) = state.files.get(name).cloned() else {
            return refused(&mut stream, 404, "EntryNotFound");
        };
        let named: String = name.chars().filter(char::is_ascii_alphanumeric).collect();
        let etag = state.etag.map_or(named, str::to_owned);
        let size = bytes.len();
        let large = name.ends_with(".safetensors");
        if large && !path.starts_with("/cdn/") {
            let host = header("host:").unwrap_or_default();
            return write!(
                stream,
                "HTTP/1.1 302 Found\r\nLocation: http://{host}/cdn/{commit}/{name}\r\nX-Repo-Commit: {commit}\r\nX-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {size}\r\nETag: \"other\"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
        }
        let start = range
            .filter(|start| *start < size && !no_range)
            .unwrap_or(0);
        let status = if range.is_some() && !no_range {
            "206 Partial Content"
        } else {
            "200 OK"
        };
        write!(
            stream,
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Range: bytes {start}-{}/{size}\r\nX-Repo-Commit: {commit}\r\nETag: W/\"{etag}\"\r\nConnection: close\r\n\r\n",
            size - start,
            size - 1,
        )?;
        if method == "GET" {
            let end = if let Some(Fault::Cut(_, bytes)) = cut {
                (start + bytes).min(size)
            } else {
                size
            };
            stream.write_all(&bytes[start..end])?;
        }
        Ok(())
    }

    #[test]
    fn a_model_is_downloaded_whole_and_once() {
        let server = Server::model();
        let snapshot = server.fetch("owner/model").expect("a model");
        assert!(
            snapshot.ends_with(format!("models--owner--model/snapshots/{COMMIT}")),
            "{snapshot:?}"
        );
        assert_eq!(
            fs::read(snapshot.join("model-2-of-2.safetensors")).expect("a shard"),
            shard(2)
        );
        assert_eq!(
            fs::read(snapshot.join("tokenizer.json")).expect("a file"),
            b"{\"t\": 1}"
        );
        assert!(!snapshot.join("pytorch_model.bin").exists());
        let reference = snapshot.join("../../refs/main");
        assert_eq!(fs::read_to_string(reference).expect("a reference"), COMMIT);
        let link = fs::read_link(snapshot.join("config.json")).expect("a link");
        assert!(link.starts_with("../../blobs"), "{link:?}");
        let left = |path: &str| fs::read_dir(snapshot.join(path)).expect("a folder").count();
        assert_eq!(left("../../blobs"), 5);
        assert_eq!(
            server
                .requests()
                .iter()
                .filter(|request| request.starts_with("GET"))
                .count(),
            7
        ); // 5 files, 2 of them over a redirect
        assert_eq!(server.fetch("owner/model").expect("again"), snapshot);
        assert!(
            server
                .requests()
                .iter()
                .all(|request| request.starts_with("HEAD"))
        );
    }

    #[test]
    fn an_interrupted_download_goes_on_where_it_stopped() {
        let mut server = Server::model();
        server.options.retries = 0;
        server.with(|state| {
            state.faults.push(Fault::Cut(
                "cdn/0123456789abcdef0123456789abcdef01234567/model-1-of-2.safetensors",
                100_000,
            ))
        });
        let error = server.fetch("owner/model").expect_err("cut").to_string();
        assert!(error.contains("run again to go on"), "{error}");
        server.requests();
        let snapshot = server.fetch("owner/model").expect("the rest");
        assert_eq!(
            fs::read(snapshot.join("model-1-of-2.safetensors")).expect("a shard"),
            shard(1)
        );
        let requests = server.requests();
        assert!(
            requests.iter().any(|request| request.contains("GET /cdn")
                && request.ends_with("model-1-of-2.safetensors 100000")),
            "{requests:#?}"
        );
    }

    #[test]
    fn broken_connections_and_busy_servers_are_tried_again() {
        for fault in [
            Fault::Cut("model-1-of-2.safetensors", 0),
            Fault::Status(503),
            Fault::Status(429),
        ] {
            let server = Server::model();
            server.with(|state| state.faults = vec![fault.clone(), fault.clone()]);
            let snapshot = server.fetch("owner/model").expect("after a while");
            assert_eq!(
                fs::read(snapshot.join("model-1-of-2.safetensors")).expect("a shard"),
                shard(1),
                "{fault:?}"
            );
        }
        let mut server = Server::model();
        server.options.retries = 1;
        server.with(|state| state.faults = vec![Fault::Status(503); 2]);
        assert!(
            server
                .fetch("owner/model")
                .expect_err("busy")
                .to_string()
                .contains("HTTP 503")
        );
    }

    #[test]
    fn a_server_without_ranges_sends_the_file_anew() {
        let server = Server::model();
        server.with(|state| {
            let name = "cdn/0123456789abcdef0123456789abcdef01234567/model-1-of-2.safetensors";
            state.faults = vec![Fault::Cut(name, 1000), Fault::NoRange];
        });
        let snapshot = server.fetch("owner/model").expect("a model");
        assert_eq!(
            fs::read(snapshot.join("model-1-of-2.safetensors")).expect("a shard"),
            shard(1)
        );
    }

    #[test]
    fn offline_serves_the_cache_and_says_what_it_lacks() {
        let mut server = Server::model();
        server.options.offline = true;
        let error = server
            .fetch("owner/model")
            .expect_err("nothing there")
            .to_string();
        assert!(
            error.contains("owner/model is not in") && error.contains("Run once without --offline"),
            "{error}"
        );
        server.options.offline = false;
        let snapshot = server.fetch("owner/model").expect("a model");
        server.options.offline = true;
        server.requests();
        assert_eq!(server.fetch("owner/model").expect("cached"), snapshot);
        assert_eq!(
            server
                .fetch(&format!("owner/model@{COMMIT}"))
                .expect("cached"),
            snapshot
        );
        assert_eq!(server.requests(), Vec::<String>::new());
        fs::remove_file(snapshot.join("model-2-of-2.safetensors")).expect("there");
        let error = server
            .fetch("owner/model")
            .expect_err("a shard is gone")
            .to_string();
        assert!(error.contains("lacks model-2-of-2.safetensors"), "{error}");
    }

    #[test]
    fn a_cached_model_serves_while_the_network_is_down() {
        let mut server = Server::model();
        let snapshot = server.fetch("owner/model").expect("a model");
        server.options.endpoint = "http://127.0.0.1:9".into();
        server.options.retries = 0;
        assert_eq!(server.fetch("owner/model").expect("cached"), snapshot);
        assert!(matches!(
            server.fetch("owner/other"),
            Err(Error::Network { .. })
        ));
    }

    #[test]
    fn a_server_that_does_not_speak_tls_is_an_error() {
        let mut server = Server::model();
        server.options.endpoint = server.options.endpoint.replace("http://", "https://");
        server.options.retries = 0;
        assert!(matches!(
            server.fetch("owner/model"),
            Err(Error::Network { .. })
        ));
        server.options.endpoint = "nonsense".into();
        assert!(matches!(
            server.fetch("owner/model"),
            Err(Error::Option { .. } | Error::Network { .. })
        ));
        server.options.endpoint = "http://127.0.0.1".into();
        server.options.token = Some("line\nbreak".into());
        assert!(matches!(
            server.fetch("owner/model"),
            Err(Error::Option { .. })
        ));
    }

    #[test]
    fn revisions_commits_and_new_names_are_followed() {
        let server = Server::model();
        let snapshot = server.fetch("owner/model@v1").expect("a tag");
        assert!(snapshot.ends_with(TAGGED));
        assert_eq!(
            fs::read_to_string(snapshot.join("../../refs/v1")).expect("a reference"),
            TAGGED
        );
        let snapshot = server
            .fetch(&format!("owner/model@{COMMIT}"))
            .expect("a commit");
        assert!(snapshot.ends_with(COMMIT) && !snapshot.join("../../refs").join(COMMIT).exists());
        let error = server
            .fetch("owner/model@nowhere")
            .expect_err("no such revision")
            .to_string();
        assert!(error.contains("no such revision \"nowhere\""), "{error}");
        assert!(server.fetch("owner/renamed").is_ok());
    }

    #[test]
    fn refusals_say_what_to_do() {
        let check = |refuse: (u16, &'static str), token: Option<&str>, expected: &str| {
            let mut server = Server::model();
            server.options.token = token.map(str::to_owned);
            server.with(|state| state.refuse = Some(refuse));
            let error = server.fetch("owner/model").expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
            let sent = server
                .requests()
                .iter()
                .any(|request| request.ends_with("[Bearer secret]"));
            assert_eq!(sent, token.is_some());
        };
        check(
            (404, "RepoNotFound"),
            None,
            "has no such model. If it is private, set HF_TOKEN",
        );
        check(
            (401, "RepoNotFound"),
            None,
            "There is no such model, or it is private",
        );
        check(
            (401, ""),
            Some("secret"),
            "the token (HF_TOKEN or the token file) is wrong",
        );
        check(
            (403, "GatedRepo"),
            None,
            "Its authors want their terms accepted",
        );
        check(
            (403, ""),
            Some("secret"),
            "Set HF_TOKEN to a token that may read this model",
        );
        check((418, ""), None, "HTTP 418");
    }

    #[test]
    fn what_a_repository_lacks_is_named() {
        let check = |files: &[(&str, &[u8])], expected: &str| {
            let error = Server::new(files)
                .fetch("owner/model")
                .expect_err(expected)
                .to_string();
            assert!(error.contains(expected), "{error}");
        };
        check(&[("model.gguf", b"x")], "owner/model has no config.json");
        check(
            &[("config.json", b"{}"), ("pytorch_model.bin", b"x")],
            "owner/model has no model.safetensors: only safetensors",
        );
        let index = |name: &str| format!(r#"{{"weight_map": {{"a": "{name}"}}}}"#);
        for name in [
            "../../../x.safetensors",
            "/etc/x.safetensors",
            "a/../x.safetensors",
            "x.bin",
            "",
            "a\\\\b.safetensors",
        ] {
            check(
                &[("config.json", b"{}"), (INDEX, index(name).as_bytes())],
                "which is no .safetensors file of the repository",
            );
        }
        check(&[("config.json", b"{}"), (INDEX, b"{")], "EOF");
        check(
            &[
                ("config.json", b"{}"),
                (INDEX, index("x.safetensors").as_bytes()),
            ],
            "owner/model has no x.safetensors",
        );
    }

    #[test]
    fn a_servers_words_never_become_paths() {
        for etag in ["../../evil", "", "a/b", ".."] {
            let server = Server::model();
            server.with(|state| state.etag = Some(etag));
            assert!(
                matches!(server.fetch("owner/model"), Err(Error::Answer { .. })),
                "{etag:?}"
            );
        }
    }

    #[test]
    fn a_place_that_cannot_be_written_is_named() {
        let server = Server::model();
        fs::write(&server.options.cache, "a file").expect("a file");
        let error = server
            .fetch("owner/model")
            .expect_err("no directory")
            .to_string();
        assert!(
            error.contains("cannot create") && error.contains("HF_HUB_CACHE"),
            "{error}"
        );
        let error = check_space(Path::new("hub"), 5 << 30, Some(1 << 30))
            .expect_err("full")
            .to_string();
        assert_eq!(
            error,
            "hub: 5.00 GiB to download, 1.00 GiB free: free 4.00 GiB or set HF_HUB_CACHE to a larger disk"
        );
        assert!(free_bytes(&std::env::temp_dir().join("not/yet/there")) > Some(0));
    }

    #[test]
    fn ids_are_two_plain_names_and_a_revision() {
        let check = |id: &str, expected: Option<(&str, &str)>| {
            let found = HubId::parse(id).ok().map(|id| (id.repository, id.revision));
            assert_eq!(
                found.as_ref().map(|(a, b)| (a.as_str(), b.as_str())),
                expected,
                "{id}"
            );
        };
        check("ai21labs/Jamba-v0.1", Some(("ai21labs/Jamba-v0.1", "main")));
        check("a/b@refs/pr/1", Some(("a/b", "refs/pr/1")));
        for id in [
            "", "a", "/a", "a/", "a/b/c", "../b", "a/..", "a/b@", "a/b@../x", "a/b@/x", "a/b c",
            "a/b?x", "é/b", "a/b@x/",
        ] {
            check(id, None);
        }
    }

    #[test]
    fn the_environment_means_what_it_means_elsewhere() {
        let home = directory(&[("token", " from-file\n")]);
        let home = home.path().display().to_string();
        let options = |pairs: &[(&str, &str)]| {
            let pairs: HashMap<String, String> = pairs
                .iter()
                .map(|(k, v)| (k.to_string(), v.to_string()))
                .collect();
            HubOptions::from_env(|name| pairs.get(name).cloned())
        };
        let plain = options(&[("HOME", "/h")]).expect("a home");
        assert_eq!(plain, HubOptions::new("/h/.cache/huggingface/hub".into()));
        let all = options(&[
            ("HOME", "/h"),
            ("HF_HOME", &home),
            ("HF_ENDPOINT", "http://mirror:8080/hf/"),
            ("HF_HUB_OFFLINE", "true"),
            ("https_proxy", "http://proxy:3128"),
            ("NO_PROXY", "a,b"),
        ])
        .expect("a home");
        assert_eq!(all.cache, Path::new(&home).join("hub"));
        assert_eq!(
            (all.token.as_deref(), all.offline),
            (Some("from-file"), true)
        );
        assert_eq!(all.endpoint, "http://mirror:8080/hf");
        assert_eq!(
            (all.proxy.as_deref(), all.no_proxy.as_deref()),
            (Some("http://proxy:3128"), Some("a,b"))
        );
        let some = options(&[
            ("HOME", "/h"),
            ("HF_TOKEN", "t"),
            ("HF_HUB_CACHE", "~/c"),
            ("HF_HUB_OFFLINE", "0"),
        ])
        .expect("a home");
        assert_eq!(
            (some.cache, some.token.as_deref(), some.offline),
            (PathBuf::from("/h/c"), Some("t"), false)
        );
        assert!(matches!(options(&[]), Err(Error::NoCache)));
        assert!(proxy("http://user:word@proxy:3128", Some("a, .b")).is_ok());
        assert!(proxy("nonsense://", None).is_err());
    }

    #[test]
    fn lines_tell_how_far_it_is() {
        let mut out = Vec::new();
        let mut lines = Lines::new(&mut out, Duration::ZERO);
        lines.start(4 << 20, 1 << 20);
        lines.file("model.safetensors");
        lines.advance(1 << 20);
        lines.note("trying again");
        let text = String::from_utf8(out).expect("UTF-8");
        assert!(
            text.starts_with("downloading 3.00 MiB\nmodel.safetensors: 2.00 MiB of 4.00 MiB, "),
            "{text}"
        );
        assert!(text.ends_with(" left\ntrying again\n"), "{text}");
    }
}
