//! Models from the Hugging Face Hub, in the cache that other tools share.
//!
//! The cache's layout is hf-hub's; the transfer is our own. hf-hub 0.5 appends to the wrong place when it
//! retries, appends a whole answer to a part when a server ignores `Range`, does not check the length it
//! got, and panics on some addresses and answers; and it takes a server's `etag` for a file name unseen.

mod address;
mod disk;
pub(crate) use disk::free_bytes;
mod error;
mod id;
mod progress;

pub use error::Error;
pub use id::HubId;
pub use progress::{Bar, Lines, Progress, Silent};

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::{Cache, Repo, RepoType};
use ureq::http::{Response, StatusCode, header};
use ureq::{Agent, Body};

use address::{escape, origin, proxy};
use disk::{check_space, link};
use id::{plain, shards};

/// Read beside the weights, where a repository has them; only the first must be there.
const FILES: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];
const WEIGHTS: &str = "model.safetensors";
/// Where weights may be: an index of shards, or one file. PyTorch's are taken where there are no others.
const FORMS: [(&str, &str); 2] = [
    ("model.safetensors.index.json", WEIGHTS),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
];

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

/// Has a model's files ready; returns the directory that holds them.
///
/// Downloads what the cache lacks: the configuration and the files `beside` it that some models have, the
/// tokenizer and the weights: safetensors, else PyTorch's, of which nothing is run. An interrupted download goes on where it stopped.
pub fn fetch_model(
    id: &str,
    beside: &[&str],
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
    match (hub.fetch(beside, progress), cached) {
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
        for (index, whole) in FORMS {
            if let Ok(bytes) = fs::read(snapshot.join(index)) {
                let shards = shards(&bytes).map_err(|found| format!("{index}: {found}"))?;
                let absent = |name: &&String| !snapshot.join(name).is_file();
                return match shards.iter().find(absent) {
                    Some(name) => Err(missing(name)),
                    None => Ok(snapshot),
                };
            }
            if snapshot.join(whole).is_file() {
                return Ok(snapshot);
            }
        }
        Err(missing(WEIGHTS))
    }

    fn fetch(&self, beside: &[&str], progress: &mut dyn Progress) -> Result<PathBuf, Error> {
        let config = self.required(
            FILES[0],
            &self.id.revision,
            "it is not a model in Hugging Face form; for GGUF, download the file and name it",
            progress,
        )?;
        let commit = config.commit.clone();
        let mut files = vec![config];
        for name in FILES[1..].iter().chain(beside) {
            files.extend(self.look_up(name, &commit, progress)?);
        }
        files.extend(self.weights(&commit, progress)?);
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

    /// The files with the weights, as the repository has them.
    fn weights(&self, commit: &str, progress: &mut dyn Progress) -> Result<Vec<Remote>, Error> {
        for (index, whole) in FORMS {
            if let Some(index) = self.look_up(index, commit, progress)? {
                self.download(&index, progress)?;
                let path = self.snapshot(&index);
                let bytes = fs::read(&path).map_err(io(&path, "read"))?;
                let id = self.id.repository.clone();
                let names = shards(&bytes).map_err(|found| Error::Index { id, found })?;
                let help = "the index names it; tell the model's authors";
                let file = |name: &String| self.required(name, commit, help, progress);
                return names.iter().map(file).collect();
            }
            if let Some(file) = self.look_up(whole, commit, progress)? {
                return Ok(vec![file]);
            }
        }
        let help = "nor pytorch_model.bin; weights in other files have to be downloaded by hand; the folder that holds them is then the model";
        self.required(WEIGHTS, commit, help, progress)
            .map(|file| vec![file])
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

#[cfg(test)]
mod tests;
