//! From what a user named to a model that runs: the only user of the converters.

mod calibrate;
mod convert;
mod convert_gguf;
mod convert_random;
mod convert_rows;
mod device;
mod hashes;
mod inspect;
mod layout;
mod limits;
mod locate;
mod model;
mod stored;
mod text_files;

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use strata_converters::{Checkpoint, Config};
use strata_kernels::{Backend, DType, Format, KvType};
use strata_layers::graph::GraphWeight;
use strata_layers::yaml::Value;
use strata_layers::{Faults, Graph, Role, WeightSource};

use crate::fit::{self, Question};
use crate::footprint::Footprint;
use crate::generation_config::{self, GenerationConfig};
use crate::hosted::{Hosted, HostedWeights};
use crate::hub::{self, HubOptions};
use crate::placement::Parallel;
use crate::random_weights::RandomWeights;
use crate::recipe::{Recipe, Storage};
use crate::runner::{Network, Placed};
use crate::text;

pub use strata_converters::files::map_file;
pub use strata_converters::write::Progress as WriteProgress;

pub use calibrate::Calibration;
pub use convert::{ConvertOptions, Converted, convert};
pub use device::{CudaPlaces, Device, backend, backend_at, cache_folder};
pub use inspect::{Inspected, Row, inspect};
pub use layout::{Named, named};
pub use locate::{Planned, plan};
pub use model::{Limits, Model, dtype_of_word};

use hashes::Hashes;
use layout::Devices;
use locate::{Located, locate, mapped, planned};
use model::Weights;
use stored::{SCANNED_BYTES, Stored, main_format, non_finite};
use text_files::text_of;

/// Seed of the weights of new blocks, where nobody gives one.
pub const NEW_SEED: u64 = 0;

/// What to load, and how.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Folder, GGUF file, Hub id, bundled name, config.json or plan; none is the demonstration model.
    pub model: Option<String>,
    /// A plan to run instead of the card's.
    pub plan: Option<PathBuf>,
    /// A card to use instead of the built-in ones.
    pub card: Option<PathBuf>,
    /// Weights drawn by this seed instead of a checkpoint's.
    pub random: Option<u64>,
    /// `cpu`, `cuda`, `cuda:N` or `reference`; or several, with commas between.
    pub device: String,
    /// How several devices share the model.
    pub parallel: Parallel,
    /// Whether experts stay in the host's memory.
    pub experts_on_host: bool,
    /// Tokens of a sequence and number of sequences that there must be room for; none is one of a page.
    pub workload: Option<(usize, usize)>,
    /// Where a GPU's libraries may be, and where its kernels are kept.
    pub cuda: CudaPlaces,
    /// Compute type; none is the checkpoint's.
    pub dtype: Option<DType>,
    /// How keys and values are kept; none is in the compute type.
    pub kv: Option<KvType>,
    /// What becomes of sequences longer than the context.
    pub beyond: Beyond,
    /// Quantises matrices while loading.
    pub quantize: Option<Recipe>,
    /// How much the columns of matrices count when they are quantised; none is alike.
    pub calibrate: Option<Calibration>,
    /// Threads; none is as many as the process may use.
    pub threads: Option<usize>,
    /// Where the Hub is; none knows no Hub ids.
    pub hub: Option<HubOptions>,
    /// Folder of the hashes of weights; none computes them each time that they are asked for.
    pub hashes: Option<PathBuf>,
}

/// What becomes of sequences that are longer than the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Beyond {
    /// They are refused.
    #[default]
    Refuse,
    /// Attention sees their last tokens only: so many, or as many as the model was made for.
    AttendLast(Option<usize>),
}

/// Why a model cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum Error {
    #[error(transparent)]
    Converters(#[from] strata_converters::Error),
    #[error(transparent)]
    Faults(#[from] Faults),
    #[error(transparent)]
    Kernel(#[from] strata_kernels::Error),
    #[error(transparent)]
    Hub(#[from] hub::Error),
    #[error(transparent)]
    Text(#[from] text::Error),
    #[error(transparent)]
    Generation(#[from] generation_config::Error),
    #[error(transparent)]
    Constraint(#[from] crate::constraint::Error),
    #[error("{path}: {source}")]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{0}")]
    Input(String),
}

type Result<T> = std::result::Result<T, Error>;

/// Told how loading goes on.
pub trait LoadProgress {
    /// `what` begins, over so many bytes.
    fn start(&mut self, what: &str, bytes: u64);
    /// So many more are done.
    fn advance(&mut self, bytes: u64);
    /// It is done.
    fn finish(&mut self);
    /// Told how a download goes on.
    fn download(&mut self) -> &mut dyn hub::Progress;
}

/// Tells nobody.
pub struct Silent(hub::Silent);

impl Default for Silent {
    fn default() -> Self {
        Silent(hub::Silent)
    }
}

impl LoadProgress for Silent {
    fn start(&mut self, _what: &str, _bytes: u64) {}
    fn advance(&mut self, _bytes: u64) {}
    fn finish(&mut self) {}
    fn download(&mut self) -> &mut dyn hub::Progress {
        &mut self.0
    }
}

/// Loads a model.
pub fn load(options: &LoadOptions, progress: &mut dyn LoadProgress) -> Result<Model> {
    let devices = Devices::open(options)?;
    let located = locate(options, progress)?;
    let mut planned = planned(options, &located)?;
    if let Beyond::AttendLast(window) = options.beyond {
        let window = window.unwrap_or(planned.plan.context);
        let plan = planned.plan.attending_last(window);
        planned.plan = plan.map_err(|why| Error::Input(format!("--beyond-context: {why}")))?;
        planned.graph = Graph::lower(&planned.plan, &planned.label)?;
    }
    let mut notes = Vec::new();
    let hashes = match (&options.hashes, &located) {
        (Some(folder), Located::Files(files)) => Hashes::of(folder, files),
        _ => None,
    };

    let (source, stored) = match (options.random, &located) {
        (Some(seed), _) => {
            let declared = planned.declared_dtype();
            (
                Weights::Random(seed),
                Format::from(declared.unwrap_or(DType::F32)),
            )
        }
        (None, Located::Files(files)) => {
            let mapping = mapped(&mut planned, Checkpoint::open(files)?)?;
            notes.extend(mapping.notes().iter().cloned());
            notes.extend(mapping.checkpoint().widening().iter().cloned());
            if !mapping.drawn().is_empty() {
                let count = mapping.drawn().len();
                notes.push(format!(
                    "{count} weights of new blocks are drawn with seed {NEW_SEED}"
                ));
            }
            let stored = main_format(&mapping);
            (Weights::Checkpoint(mapping), stored)
        }
        (None, Located::Config(path) | Located::Plan(path)) => {
            return Err(Error::Input(format!(
                "{}: it has no weights; --random SEED draws some",
                path.display()
            )));
        }
    };
    let recipe = options.quantize.as_ref();
    let importance = calibrate::importance(options, recipe, &planned.graph, &mut notes, progress)?;
    // What weights in blocks are multiplied with is rounded to BF16, as it is for those in BF16.
    let auto = match options.quantize {
        Some(_) => DType::BF16,
        None => stored.dtype().unwrap_or(DType::BF16),
    };
    let dtype = options.dtype.unwrap_or(auto);
    let kv_dtype = options.kv.unwrap_or(dtype.into());
    let activations = if dtype == DType::BF16 {
        DType::BF16
    } else {
        DType::F32
    };

    let weights = planned.graph.weights();
    let cpu = devices.cpu.clone();
    let threads = cpu.as_ref().map_or(1, |c| c.threads());
    // What a device does not compute, this machine prepares with all it has.
    let preparing = match &cpu {
        Some(_) => threads,
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    let storage = Storage {
        format: stored.dtype().map_or(stored, |_| dtype.into()),
        recipe: options.quantize.clone(),
    };
    // Of checkpoints what is not in blocks yet may be changed, and FP8 quantised further; widening is exact, so
    // `f32` computes from the stored form.
    let convert = options.dtype.filter(|d| *d != DType::F32);
    let runs_in = |weight: &GraphWeight, stored: Format| match stored.dtype() {
        _ if weight.spec.role == Role::Vector => Format::F32,
        None if stored != Format::Fp8 => stored,
        dtype => {
            let chosen = options.quantize.as_ref().and_then(|r| r.choose(weight));
            let kept = dtype.map_or(stored, |dtype| convert.unwrap_or(dtype).into());
            chosen.unwrap_or(kept)
        }
    };
    // In blocks there is nothing to draw: the weights of new blocks stay wide.
    let matrices = convert.or(stored.dtype()).unwrap_or(DType::BF16);
    let formats: HashMap<String, Format> = match &source {
        Weights::Random(_) => weights
            .iter()
            .map(|w| (w.path.clone(), storage.of(w)))
            .collect(),
        Weights::Checkpoint(mapping) => {
            let rows = mapping
                .rows()
                .iter()
                .map(|row| (row.path.as_str(), row.format));
            let rows: HashMap<&str, Format> = rows.collect();
            let format = |w: &GraphWeight| match rows.get(w.path.as_str()) {
                Some(stored) => runs_in(w, *stored),
                None => runs_in(w, matrices.into()),
            };
            weights
                .iter()
                .map(|w| (w.path.clone(), format(w)))
                .collect()
        }
    };
    let std = planned.plan.init_std;
    let graph = Arc::new(planned.graph);
    let hosted = devices.hosted(options, &graph, &mut notes);
    let (context, batch) = options.workload.unwrap_or((1, 1));
    let question = Question {
        graph: &graph,
        formats: &formats,
        hosted: &hosted,
        devices: &devices.rooms(),
        parallel: options.parallel,
        kv: kv_dtype,
        context,
        batch,
    };
    let fit = question.answer().map_err(Error::Input)?;
    if !fit.fits() {
        return Err(Error::Input(fit::refusal(&question, &fit)));
    }
    let weights_bytes = fit.loads.iter().map(|l| l.weights).sum::<u64>() + question.hosted_bytes();
    let split = fit.spots.iter().any(|s| s.rank.is_some());
    let whole = graph.unshared();
    if split && !whole.is_empty() {
        notes.push(format!(
            "layers of kind {} have no parts: every device has them whole; --parallel pipeline has each once",
            strata_layers::param::list_of(whole)
        ));
    }
    let ranks = devices.ranks(&fit.spots);
    let total: u64 = match &source {
        Weights::Random(_) => {
            fits_memory(weights_bytes)?;
            0
        }
        Weights::Checkpoint(mapping) => {
            notes.extend(non_finite(mapping, SCANNED_BYTES));
            if options.quantize.is_some() && mapping.rows().iter().any(|r| r.format.rounds_inputs())
            {
                notes.push("matrices that are in blocks already stay in them".into());
            }
            mapping.rows().iter().map(|r| r.bytes as u64).sum()
        }
    };
    if total > 0 {
        progress.start("loading", total);
    }
    let progress = RefCell::new(progress);
    // Of each device, as weights go straight to it.
    let mut sources: Vec<Box<dyn WeightSource + '_>> = Vec::new();
    let mut backends = Vec::new();
    for backend in &devices.backends {
        let (seed, wide) = match &source {
            Weights::Random(seed) => (*seed, dtype),
            Weights::Checkpoint(_) => (NEW_SEED, matrices),
        };
        let on = |backend: &Arc<dyn Backend>| -> Box<dyn WeightSource + '_> {
            let drawn = RandomWeights::new(seed, std, wide, backend.clone());
            let drawn = drawn.with_formats(formats.clone(), preparing, importance.clone());
            let Weights::Checkpoint(mapping) = &source else {
                return Box::new(drawn);
            };
            let (formats, backend) = (formats.clone(), backend.clone());
            let stored = Stored::new(mapping, formats, preparing, drawn, backend, &progress);
            Box::new(stored.weighing(importance.clone()))
        };
        let device = on(backend);
        match &devices.host {
            Some(host) if !hosted.is_empty() && backend.memory()?.is_some() => {
                let paths = &hosted;
                let host_weights = on(host);
                sources.push(Box::new(HostedWeights {
                    paths,
                    host: host_weights,
                    device,
                }));
                backends
                    .push(Arc::new(Hosted::new(backend.clone(), host.clone())) as Arc<dyn Backend>);
            }
            _ => {
                sources.push(device);
                backends.push(backend.clone());
            }
        }
    }
    let parts = fit.spots.iter().zip(backends).zip(ranks);
    let places = parts
        .zip(&sources)
        .map(|(((spot, backend), rank), source)| Placed {
            backend,
            source: &**source,
            graph: spot.graph.clone(),
            nodes: spot.nodes.clone(),
            rank,
        });
    let network = Network::over(graph.clone(), places.collect(), activations)?;
    drop(sources);
    if total > 0 {
        progress.into_inner().finish();
    }

    let footprint = match &fit.footprints[..] {
        [one] => *one,
        _ => Footprint::of((*graph).clone())?,
    };
    let (tokenizer, generation, no_text) = match &located {
        Located::Files(files) => text_of(files, planned.plan.vocab)?,
        Located::Config(_) | Located::Plan(_) => (None, GenerationConfig::default(), None),
    };
    notes.extend(no_text.iter().map(|why| format!("warning: {why}")));
    let template = tokenizer
        .as_ref()
        .and_then(|t| t.chat_template(None, false))
        .map(ToString::to_string);
    Ok(Model {
        name: planned.plan.name.clone(),
        plan: planned.plan,
        network: Arc::new(network),
        tokenizer,
        generation,
        dtype,
        kv_dtype,
        weights_bytes,
        footprint,
        stages: fit.spots.into_iter().zip(fit.footprints).collect(),
        storage,
        threads,
        features: cpu.as_ref().map_or("plain loops", |c| c.features()),
        cpu,
        labels: planned.config.as_ref().map(labels).unwrap_or_default(),
        notes,
        no_text,
        template,
        weights: source,
        hashes,
        vocabulary: std::sync::OnceLock::new(),
    })
}

/// `id2label` of a config, in the order of the classes; empty unless it names all from 0 on.
fn labels(config: &Config) -> Vec<String> {
    let entry = config.entries().iter().find(|e| e.key == "id2label");
    let Some(Value::Map(entries)) = entry.map(|e| &e.value.value) else {
        return Vec::new();
    };
    let label = |i: usize| {
        let key = i.to_string();
        let found = entries.iter().find(|e| e.key == key)?;
        match &found.value.value {
            Value::Text(text) => Some(text.clone()),
            _ => None,
        }
    };
    let labels: Option<Vec<String>> = (0..entries.len()).map(label).collect();
    labels.unwrap_or_default()
}

/// Drawing more than the machine can hold would end in the middle, or take the machine down.
fn fits_memory(bytes: u64) -> Result<()> {
    let has = memory_bytes();
    if bytes <= has {
        return Ok(());
    }
    let gb = |bytes: u64| bytes as f64 / 1e9;
    Err(Error::Input(format!(
        "the weights need {:.1} GB and this process may have {:.1} GB of memory; take a smaller model or a smaller --dtype",
        gb(bytes),
        gb(has)
    )))
}

/// Bytes of memory that this process may have at most.
fn memory_bytes() -> u64 {
    #[cfg(target_os = "linux")]
    {
        let system = rustix::system::sysinfo();
        // Their types differ between machines.
        #[allow(clippy::unnecessary_cast)]
        let total = (system.totalram as u64).saturating_mul(u64::from(system.mem_unit));
        let limit = rustix::process::getrlimit(rustix::process::Resource::As).current;
        total.min(limit.unwrap_or(u64::MAX))
    }
    #[cfg(not(target_os = "linux"))]
    u64::MAX
}
