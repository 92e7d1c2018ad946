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
const INDEX: &str = super::FORMS[0].0;

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
        fetch_model(id, &[], &self.options, &mut Silent)
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
fn weights_of_pytorch_are_taken_where_there_are_no_others() {
    let index = br#"{"weight_map": {"a": "pytorch_model-1-of-1.bin"}}"#;
    for (files, expected) in [
        (vec![("pytorch_model.bin", &b"x"[..])], "pytorch_model.bin"),
        (
            vec![
                ("pytorch_model.bin.index.json", &index[..]),
                ("pytorch_model-1-of-1.bin", b"x"),
            ],
            "pytorch_model-1-of-1.bin",
        ),
        (
            vec![
                ("model.safetensors", &b"x"[..]),
                ("pytorch_model.bin", b"y"),
            ],
            "model.safetensors",
        ),
    ] {
        let files = [&[("config.json", &b"{}"[..])], &files[..]].concat();
        let server = Server::new(&files);
        let snapshot = server.fetch("owner/model").expect("a model");
        assert_eq!(fs::read(snapshot.join(expected)).expect("weights"), b"x");
        assert_eq!(
            snapshot.join("pytorch_model.bin").exists(),
            expected == "pytorch_model.bin"
        );
    }
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
        &[("config.json", b"{}"), ("model.gguf", b"x")],
        "owner/model has no model.safetensors: nor pytorch_model.bin",
    );
    let index = |name: &str| format!(r#"{{"weight_map": {{"a": "{name}"}}}}"#);
    for name in [
        "../../../x.safetensors",
        "/etc/x.safetensors",
        "a/../x.safetensors",
        "x.py",
        "",
        "a\\\\b.safetensors",
    ] {
        check(
            &[("config.json", b"{}"), (INDEX, index(name).as_bytes())],
            "which is no .safetensors or .bin file of the repository",
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
