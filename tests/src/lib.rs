//! What the tests of the command share: see ARCHITECTURE.md for the tests.

pub mod http;
pub mod models;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Most kilobytes of address space: a runaway allocation fails here, not on the machine.
const MEMORY_KB: usize = 4 << 20;
/// No command of a test may take longer.
const PATIENCE: Duration = Duration::from_secs(30);

/// The binary, built once with the profile of this test.
pub fn strata() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let test = std::env::current_exe().unwrap();
        let profile = test.parent().and_then(Path::parent).unwrap();
        let target = profile.parent().unwrap();
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "-p", "strata", "--bin", "strata"]);
        build.arg("--target-dir").arg(target);
        if profile.ends_with("release") {
            build.arg("--release");
        }
        // What cargo says of this package would make it build others anew.
        let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
        let ours = [
            "CARGO_PKG_",
            "CARGO_MANIFEST_",
            "CARGO_CRATE_",
            "CARGO_BIN_",
        ];
        for name in names.filter(|n| ours.iter().any(|o| n.starts_with(o))) {
            build.env_remove(name);
        }
        let built = build.current_dir(root()).status().unwrap();
        assert!(built.success(), "the binary does not build");
        profile.join(format!("strata{}", std::env::consts::EXE_SUFFIX))
    })
}

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A command in a folder of its own kind, away from the environment's settings.
pub fn command(args: &[&str], folder: &Path) -> Command {
    let mut command = Command::new("sh");
    let script = format!("ulimit -v {MEMORY_KB}; exec \"$0\" \"$@\"");
    command.args(["-c", &script]).arg(strata()).args(args);
    command.current_dir(folder);
    for name in [
        "HF_ENDPOINT",
        "HF_HUB_OFFLINE",
        "HF_TOKEN",
        "RUST_BACKTRACE",
    ] {
        command.env_remove(name);
    }
    command.env("HF_HOME", folder.join("hub"));
    command.stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// How a command ended.
#[derive(Debug)]
pub struct Done {
    /// Exit status; -1 after a signal.
    pub status: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

/// Gives a command its input and waits. A panic, and more than half a minute, fail the test.
pub fn finish(mut command: Command, input: &[u8]) -> Done {
    if !input.is_empty() {
        command.stdin(Stdio::piped());
    }
    let start = Instant::now();
    let mut child = command.spawn().unwrap();
    if let Some(mut stdin) = child.stdin.take() {
        // A command that fails early reads nothing.
        let _ = stdin.write_all(input);
    }
    let Output {
        status,
        stdout,
        stderr,
    } = child.wait_with_output().unwrap();
    let done = Done {
        status: status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&stdout).into(),
        err: String::from_utf8_lossy(&stderr).into(),
    };
    assert!(!done.err.contains("panicked at"), "{command:?}: {done:?}");
    assert!(start.elapsed() < PATIENCE, "{command:?}: too slow");
    done
}

/// Runs a command without input.
pub fn run(args: &[&str], folder: &Path) -> Done {
    finish(command(args, folder), b"")
}

/// A row of a table: the arguments, the exit status, and a part of what is said: on standard output
/// if the status is 0, else on standard error.
pub type Row<'a> = (&'a [&'a str], i32, &'a str);

/// Runs every row; all that are wrong are told together.
pub fn check(rows: &[Row<'_>], folder: &Path) {
    let mut wrong = Vec::new();
    for (args, status, says) in rows {
        let done = run(args, folder);
        let said = if *status == 0 { &done.out } else { &done.err };
        if done.status != *status || !said.contains(says) {
            wrong.push(format!(
                "{args:?} should end with {status} and say {says:?}: {done:?}"
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A folder that is gone after the test.
pub struct Folder(pub PathBuf);

impl Folder {
    /// An empty one.
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("strata-cli-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    /// Writes a file; returns its path.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path.display().to_string()
    }

    /// A copy of a model that may be spoilt.
    pub fn copy(&self, from: &Path, name: &str) -> PathBuf {
        let to = self.0.join(name);
        let _ = fs::remove_dir_all(&to);
        fs::create_dir_all(&to).unwrap();
        for file in fs::read_dir(from).unwrap() {
            let file = file.unwrap().path();
            if file.is_file() {
                fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
            }
        }
        to
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The folder of a golden.
pub fn golden(name: &str) -> PathBuf {
    root().join("tests/golden").join(name)
}

/// A path as an argument.
pub fn text(path: &Path) -> String {
    path.display().to_string()
}
