//! Importance matrices: gathered from a text, read from a file, written to one.
//!
//! A file is a safetensors file with two tensors for each matrix: `PATH.mean_squares` (K) F32, and `PATH.rows`
//! (1) I64, the rows that they are the mean of. PATH is the weight's in the plan.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use strata_converters::checkpoint::Contents;
use strata_converters::write::{self, Quiet, Target, safetensors};
use strata_converters::{Checkpoint, ModelFiles};
use strata_kernels::Format;
use strata_layers::{Graph, Role};
use xxhash_rust::xxh3::Xxh3;

use super::locate::read as read_text;
use super::{Error, LoadOptions, LoadProgress, Model, Result, load};
use crate::importance::{Columns, Importance, Observer};
use crate::recipe::Recipe;
use crate::session::{Engine, EngineConfig, Request};

/// How much columns of matrices count, and from where that is known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Calibration {
    /// A text, or what was written as `save` (then its name ends with .safetensors). `-` is standard input.
    pub file: PathBuf,
    /// Where to write what was gathered.
    pub save: Option<PathBuf>,
}

/// Tokens that are read together, each time from an empty state, if the model was made for as many.
const CONTEXT: usize = 2048;
/// Fewest tokens of a text: means of fewer rows say little of a column.
const LEAST: usize = 256;
/// Names told of many.
const TOLD: usize = 8;

const MEANS: &str = ".mean_squares";
const ROWS: &str = ".rows";

/// The importance that `options` ask for, if they do, for the matrices of `graph`; and what is worth knowing of
/// it. A text is run through the model as its files are, on the CPU.
pub(super) fn importance(
    options: &LoadOptions,
    recipe: Option<&Recipe>,
    graph: &Graph,
    notes: &mut Vec<String>,
    progress: &mut dyn LoadProgress,
) -> Result<Option<Arc<Importance>>> {
    let Some(calibration) = &options.calibrate else {
        return Ok(None);
    };
    if recipe.is_none() {
        return Err(Error::Input(
            "--calibrate is for --quantize, which is not given".into(),
        ));
    }
    let file = &calibration.file;
    let saved = file
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("safetensors"));
    let importance = if saved {
        read(file)?
    } else {
        let text = match file.as_os_str() == "-" {
            true => std::io::read_to_string(std::io::stdin()).map_err(|source| Error::Io {
                path: "standard input".into(),
                source,
            })?,
            false => read_text(file)?,
        };
        let device = match options.device.as_str() {
            gpu if gpu.starts_with("cuda") => {
                notes.push(format!(
                    "{} is run on the CPU, whatever --device says; --save-importance keeps what comes of it",
                    file.display()
                ));
                "cpu"
            }
            other => other,
        };
        let plain = LoadOptions {
            quantize: None,
            calibrate: None,
            device: device.into(),
            ..options.clone()
        };
        let model = load(&plain, progress)?;
        gather(&model, &text, file, notes, progress)?
    };
    fits(&importance, graph, file)?;
    if let Some(path) = &calibration.save {
        save(&importance, path)?;
    }
    let unseen: Vec<&str> = importance.unseen().collect();
    if !unseen.is_empty() {
        notes.push(format!(
            "{} of {} matrices saw no row of {}, so that their columns count alike: {}; a longer or another text may reach them",
            unseen.len(),
            importance.columns.len(),
            file.display(),
            few(&unseen)
        ));
    }
    Ok(Some(Arc::new(importance)))
}

/// Runs a text through a model and gathers the inputs of its matrices.
fn gather(
    model: &Model,
    text: &str,
    file: &Path,
    notes: &mut Vec<String>,
    progress: &mut dyn LoadProgress,
) -> Result<Importance> {
    let fault = |why: String| Error::Input(format!("{}: {why}", file.display()));
    let network = &model.network;
    if network.graph.image.is_some() {
        return Err(fault(
            "a model of images reads no text to be calibrated on".into(),
        ));
    }
    let tokens = model.tokenizer()?.encode(text, true)?;
    if tokens.len() < LEAST {
        return Err(fault(format!(
            "{} tokens are too few to tell which columns count: at least {LEAST} are needed, and some 100,000 serve well",
            tokens.len()
        )));
    }
    if let Some(token) = tokens.iter().find(|t| **t as usize >= network.graph.vocab) {
        return Err(fault(format!(
            "the tokenizer gives token {token}, and the model has {}",
            network.graph.vocab
        )));
    }
    let context = model.plan.context.clamp(1, CONTEXT).min(tokens.len());
    let observer = Arc::new(Observer::new(network));
    let observed = Arc::new(network.on(observer.clone()));
    let config = EngineConfig::new(context, 1, model.kv_dtype)
        .for_device(&*network.backend, model.footprint.per_row());
    let failed = |error: crate::session::Error| fault(error.to_string());
    let mut engine = Engine::new(observed, config).map_err(failed)?;
    progress.start("calibrating", text.len() as u64);
    for (i, chunk) in tokens.chunks(context).enumerate() {
        let request = Request {
            prompt: chunk.to_vec(),
            // Else the output matrix would see the last row only.
            prompt_logits: true,
            ..Request::default()
        };
        let id = engine.submit(request).map_err(failed)?;
        while engine.step(&mut |_, _, _| {}).map_err(failed)? {}
        engine.remove(id);
        let bytes = |tokens_done: usize| {
            (tokens_done as u128 * text.len() as u128 / tokens.len() as u128) as u64
        };
        let start = i * context;
        progress.advance(bytes(start + chunk.len()) - bytes(start));
    }
    progress.finish();
    let importance = observer.gathered(&multiplied(&network.graph));
    if let Some(path) = importance.not_finite() {
        return Err(fault(format!(
            "running it, {} computes inputs of {path} that are not finite: its weights are damaged, or the text is not for it",
            model.name
        )));
    }
    notes.push(format!(
        "{} tokens of {} were run for the importance of columns",
        tokens.len(),
        file.display()
    ));
    Ok(importance)
}

/// The paths and columns of all matrices that products are formed with.
fn multiplied(graph: &Graph) -> Vec<(String, usize)> {
    let is = |path: &str, role| role == Role::Matrix || graph.tied && path == "embed";
    let weights = graph.weights().into_iter();
    let matrices = weights.filter(|w| is(&w.path, w.spec.role));
    matrices
        .map(|w| (w.path, w.spec.shape.last().copied().unwrap_or(0)))
        .collect()
}

/// Fails unless an importance is that of all matrices of a graph, and of no others. All that does not fit is
/// told together.
fn fits(importance: &Importance, graph: &Graph, file: &Path) -> Result<()> {
    let mut faults = Vec::new();
    let expected: BTreeMap<String, usize> = multiplied(graph).into_iter().collect();
    for (path, cols) in &expected {
        match importance.columns.get(path) {
            None => faults.push(format!("{path} is missing")),
            Some(found) if found.mean_squares.len() != *cols => faults.push(format!(
                "{path} has {} columns, expected {cols}",
                found.mean_squares.len()
            )),
            Some(_) => {}
        }
    }
    let others = importance
        .columns
        .keys()
        .filter(|path| !expected.contains_key(*path));
    faults.extend(others.map(|path| format!("{path} is no matrix of the plan")));
    if faults.is_empty() {
        return Ok(());
    }
    let told: Vec<&str> = faults.iter().map(String::as_str).collect();
    Err(Error::Input(format!(
        "{}: gathered with another model or plan: {}; gather it anew, with --calibrate TEXT",
        file.display(),
        few(&told)
    )))
}

/// The first few of a list.
fn few(list: &[&str]) -> String {
    let more = match list.len().saturating_sub(TOLD) {
        0 => String::new(),
        more => format!(", and {more} more"),
    };
    format!("{}{more}", list[..list.len().min(TOLD)].join(", "))
}

/// Reads what [`save`] wrote. All faults are told together.
fn read(path: &Path) -> Result<Importance> {
    let io = |source| Error::Io {
        path: path.into(),
        source,
    };
    std::fs::metadata(path).map_err(io)?;
    let checkpoint = Checkpoint::open(&ModelFiles::beside(path)?)?;
    let mut importance = Importance::default();
    let mut faults = Vec::new();
    for (name, info) in checkpoint.tensors() {
        let matrix = match (name.strip_suffix(MEANS), name.strip_suffix(ROWS)) {
            (Some(matrix), _) => matrix,
            (None, Some(matrix)) if checkpoint.get(&format!("{matrix}{MEANS}")).is_some() => {
                continue;
            }
            _ => {
                faults.push(format!(
                    "tensor {name:?} is no part of an importance matrix, which has PATH{MEANS} and PATH{ROWS}"
                ));
                continue;
            }
        };
        if info.dtype != "F32" || info.shape.len() != 1 {
            faults.push(format!(
                "tensor {name:?} is {} of shape {:?}, expected F32 of one dimension",
                info.dtype, info.shape
            ));
            continue;
        }
        let mean_squares = checkpoint.tensor(name)?.to_f32();
        let bad = |m: &f32| !m.is_finite() || *m < 0.0;
        if let Some(k) = mean_squares.iter().position(bad) {
            faults.push(format!(
                "tensor {name:?} holds {} for column {k}, where a mean of squares was expected",
                mean_squares[k]
            ));
            continue;
        }
        let rows = format!("{matrix}{ROWS}");
        match rows_of(&checkpoint, &rows) {
            Some(rows) => {
                let columns = Columns { mean_squares, rows };
                importance.columns.insert(matrix.into(), columns);
            }
            None => faults.push(format!("tensor {rows:?} should be one number of rows, I64")),
        }
    }
    if faults.is_empty() && importance.columns.is_empty() {
        faults.push("it holds no importance matrix".into());
    }
    if faults.is_empty() {
        return Ok(importance);
    }
    let told: Vec<&str> = faults.iter().map(String::as_str).collect();
    Err(Error::Input(format!("{}: {}", path.display(), few(&told))))
}

/// A count of rows.
fn rows_of(checkpoint: &Checkpoint, name: &str) -> Option<u64> {
    if checkpoint.get(name)?.dtype != "I64" {
        return None;
    }
    let contents = checkpoint.contents(name).ok()?;
    let bytes: [u8; 8] = contents.bytes().try_into().ok()?;
    i64::from_le_bytes(bytes).try_into().ok()
}

/// Writes a file that is whole or not there; another of its name is replaced.
fn save(importance: &Importance, path: &Path) -> Result<()> {
    let targets = importance.columns.iter().flat_map(|(matrix, columns)| {
        let part = |name: String, shape, dtype, bytes: Vec<u8>| {
            let count = bytes.len() as u64;
            let open = move || Ok(Contents::owned(bytes.clone()));
            Target::stored(name, shape, dtype, count, open)
        };
        let means: Vec<u8> = columns
            .mean_squares
            .iter()
            .flat_map(|m| m.to_le_bytes())
            .collect();
        let shape = vec![means.len() / Format::F32.block().bytes];
        let rows = columns.rows.to_le_bytes().to_vec();
        [
            part(format!("{matrix}{MEANS}"), shape, "F32", means),
            part(format!("{matrix}{ROWS}"), vec![1], "I64", rows),
        ]
    });
    let targets: Vec<Target> = targets.collect();
    let targets: Vec<&Target> = targets.iter().collect();
    let header = safetensors::header(&targets)?;
    let file = write::File {
        path,
        header: &header,
        targets: &targets,
        align: 1,
    };
    let mut hash = Xxh3::new();
    hash.update(&header);
    for columns in importance.columns.values() {
        let means = columns.mean_squares.iter();
        means.for_each(|m| hash.update(&m.to_le_bytes()));
        hash.update(&columns.rows.to_le_bytes());
    }
    write::write(&file, hash.digest(), 1, &mut Quiet)?;
    Ok(())
}
