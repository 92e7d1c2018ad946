//! One file: a header, then tensors at known places, made by several threads and written in order.
//!
//! The file grows under another name and gets its own when it is whole and on disk. How far it is on disk
//! is noted beside it, so that a conversion that was killed goes on where it was.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use super::Target;
use crate::error::{Error, Result};

/// Told how writing goes on.
pub trait Progress {
    /// So many bytes will be written in all.
    fn begin(&mut self, _bytes: u64) {}
    /// So many bytes more are written, or were found written by an earlier run.
    fn advance(&mut self, bytes: u64);
    /// Whether to stop; what is written stays for the next run.
    fn stopped(&self) -> bool {
        false
    }
}

/// Tells nobody.
pub struct Quiet;

impl Progress for Quiet {
    fn advance(&mut self, _bytes: u64) {}
}

/// A file that is to be written.
pub struct File<'a> {
    /// Where it will be.
    pub path: &'a Path,
    /// What comes before the tensors.
    pub header: &'a [u8],
    /// The tensors, in the order of the file.
    pub targets: &'a [&'a Target],
    /// Tensors begin at multiples of so many bytes, counted from the end of the header.
    pub align: u64,
}

/// Bytes after which what is written is forced to the disk and noted.
const NOTED: u64 = 256 << 20;
/// Pieces that may lie ready for each thread: each has at most four megabytes.
const AHEAD: usize = 4;

/// A piece of a tensor, and zeros behind it.
struct Job {
    target: usize,
    piece: usize,
    padding: usize,
}

/// Writes a file with `threads` threads. What an earlier run wrote of it is kept if its note fits `identity`,
/// which stands for all that decides the file's bytes.
pub fn write(
    file: &File<'_>,
    identity: u64,
    threads: usize,
    progress: &mut dyn Progress,
) -> Result<()> {
    let (partial, note) = (beside(file.path, "partial"), beside(file.path, "note"));
    let write_error = |path: &Path| {
        let file = path.display().to_string();
        move |source| Error::Write { file, source }
    };
    let jobs = jobs(file)?;
    let mut out = fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&partial)
        .map_err(write_error(&partial))?;
    let noted = read_note(&note, identity).filter(|(done, bytes)| {
        *done <= jobs.len() && out.metadata().is_ok_and(|m| m.len() >= *bytes)
    });
    let (first, mut written) = noted.unwrap_or((0, 0));
    out.set_len(written).map_err(write_error(&partial))?;
    out.seek(SeekFrom::Start(written))
        .map_err(write_error(&partial))?;
    if written == 0 {
        out.write_all(file.header).map_err(write_error(&partial))?;
        written = file.header.len() as u64;
    }
    progress.advance(written);
    let mut durable = written;
    in_order(file.targets, &jobs, first, threads, |done, bytes| {
        out.write_all(&bytes).map_err(write_error(&partial))?;
        written += bytes.len() as u64;
        progress.advance(bytes.len() as u64);
        let stopped = progress.stopped();
        if written - durable >= NOTED || stopped {
            out.sync_data().map_err(write_error(&partial))?;
            durable = written;
            let text = format!("{identity:016x} {} {written}\n", done + 1);
            fs::write(&note, text).map_err(write_error(&note))?;
        }
        if stopped { Err(Error::Stopped) } else { Ok(()) }
    })?;
    out.sync_all().map_err(write_error(&partial))?;
    drop(out);
    fs::rename(&partial, file.path).map_err(write_error(file.path))?;
    // Without its file the note means nothing; that it could not be removed is no fault.
    let _ = fs::remove_file(&note);
    Ok(())
}

/// Bytes that a run which was stopped left beside `path`: they are gone on with, or removed.
pub fn begun(path: &Path) -> u64 {
    let size = |path: &Path| fs::metadata(path).ok().filter(|m| m.is_file());
    let partial = beside(path, "partial");
    let within = fs::read_dir(&partial).into_iter().flatten().flatten();
    let files = within.map(|e| e.path()).chain([partial.clone()]);
    files.filter_map(|f| Some(size(&f)?.len())).sum()
}

/// `NAME.partial` for NAME.
pub(super) fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{ending}"));
    path.with_file_name(name)
}

/// Pieces and bytes that are on disk, by the note of a run that wrote the same.
fn read_note(path: &Path, identity: u64) -> Option<(usize, u64)> {
    let text = fs::read_to_string(path).ok()?;
    let mut words = text.split_whitespace();
    let same = u64::from_str_radix(words.next()?, 16).ok()? == identity;
    let (done, bytes) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    same.then_some((done, bytes))
}

fn jobs(file: &File<'_>) -> Result<Vec<Job>> {
    let mut jobs = Vec::new();
    let mut at = 0u64;
    for (target, of) in file.targets.iter().enumerate() {
        at += of.bytes()?;
        let end = at.next_multiple_of(file.align);
        let pieces = of.pieces();
        for piece in 0..pieces {
            let last = piece + 1 == pieces;
            let padding = if last { (end - at) as usize } else { 0 };
            jobs.push(Job {
                target,
                piece,
                padding,
            });
        }
        at = end;
    }
    Ok(jobs)
}

/// What threads and the writer share.
struct Shared {
    next: AtomicUsize,
    stop: AtomicBool,
    ready: Mutex<Ready>,
    changed: Condvar,
}

struct Ready {
    pieces: BTreeMap<usize, Result<Vec<u8>>>,
    written: usize,
}

/// Makes pieces on `threads` threads and hands them to `write` in order, from `first` on.
fn in_order(
    targets: &[&Target],
    jobs: &[Job],
    first: usize,
    threads: usize,
    mut write: impl FnMut(usize, Vec<u8>) -> Result<()>,
) -> Result<()> {
    let threads = threads.max(1);
    let shared = Shared {
        next: AtomicUsize::new(first),
        stop: AtomicBool::new(false),
        ready: Mutex::new(Ready {
            pieces: BTreeMap::new(),
            written: first,
        }),
        changed: Condvar::new(),
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| make(targets, jobs, threads * AHEAD, &shared));
        }
        for job in first..jobs.len() {
            let mut ready = shared.ready.lock().unwrap_or_else(PoisonError::into_inner);
            let piece = loop {
                match ready.pieces.remove(&job) {
                    Some(piece) => break piece,
                    None => {
                        let waited = shared.changed.wait(ready);
                        ready = waited.unwrap_or_else(PoisonError::into_inner);
                    }
                }
            };
            ready.written = job + 1;
            drop(ready);
            shared.changed.notify_all();
            if let Err(error) = piece.and_then(|bytes| write(job, bytes)) {
                shared.stop.store(true, Ordering::Relaxed);
                shared.changed.notify_all();
                return Err(error);
            }
        }
        Ok(())
    })
}

/// One thread's work: the next piece that nobody makes, not too far ahead of the writer.
fn make(targets: &[&Target], jobs: &[Job], ahead: usize, shared: &Shared) {
    loop {
        let job = shared.next.fetch_add(1, Ordering::Relaxed);
        let Some(wanted) = jobs.get(job) else { return };
        let mut ready = shared.ready.lock().unwrap_or_else(PoisonError::into_inner);
        while job >= ready.written + ahead && !shared.stop.load(Ordering::Relaxed) {
            // A writer that stops between the test and the wait would not be heard without a time limit.
            let limit = std::time::Duration::from_millis(50);
            let waited = shared.changed.wait_timeout(ready, limit);
            ready = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(ready);
        if shared.stop.load(Ordering::Relaxed) {
            return;
        }
        let mut bytes = Vec::new();
        let made = targets[wanted.target].piece(wanted.piece, &mut bytes);
        bytes.resize(bytes.len() + wanted.padding, 0);
        let mut ready = shared.ready.lock().unwrap_or_else(PoisonError::into_inner);
        ready.pieces.insert(job, made.map(|()| bytes));
        drop(ready);
        shared.changed.notify_all();
    }
}
