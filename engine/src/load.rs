//! From what a user named to a model that runs: the only user of the converters.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use strata_converters::mapping::{self, Mapping, Origin};
use strata_converters::{Card, Checkpoint, Config, ModelFiles, bundled, cards, transforms};
use strata_kernels::cpu::{self, Cpu, CpuOptions};
use strata_kernels::reference::Reference;
use strata_kernels::{Backend, DType, HostTensor, Matrix};
use strata_layers::graph::{GraphWeight, Run};
use strata_layers::{Faults, Graph, Plan, Role, WeightSource, WeightSpec};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::generation_config::{self, GenerationConfig};
use crate::hub::{self, HubId, HubOptions};
use crate::random_weights::RandomWeights;
use crate::runner::Network;
use crate::sampler::SampleError;
use crate::state_file::Fingerprint;
use crate::text::{self, Bytes, Chat, ChatTemplate, TextFiles, Tokenizer};

/// The bundled model that is used when nobody names one.
const DEFAULT_MODEL: &str = "demo";

/// What to load, and how.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Folder, Hub id, bundled name, config.json or plan; none is the demonstration model.
    pub model: Option<String>,
    /// A plan to run instead of the card's.
    pub plan: Option<PathBuf>,
    /// A card to use instead of the built-in ones.
    pub card: Option<PathBuf>,
    /// Weights drawn by this seed instead of a checkpoint's.
    pub random: Option<u64>,
    /// `cpu` or `reference`.
    pub device: String,
    /// Compute type; none is the checkpoint's.
    pub dtype: Option<DType>,
    /// Threads; none is as many as the process may use.
    pub threads: Option<usize>,
    /// Where the Hub is; none knows no Hub ids.
    pub hub: Option<HubOptions>,
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

/// A model that is ready to run.
pub struct Model {
    /// Its name.
    pub name: String,
    /// Its plan.
    pub plan: Plan,
    /// Its graph and weights.
    pub network: Arc<Network>,
    /// Its tokenizer, if it has one.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// How it asks to be sampled.
    pub generation: GenerationConfig,
    /// Type of keys and values.
    pub kv_dtype: DType,
    /// Bytes of all weights in the form they run in.
    pub weights_bytes: u64,
    /// Threads that compute.
    pub threads: usize,
    /// What is worth knowing.
    pub notes: Vec<String>,
    /// Fast paths in use.
    pub features: &'static str,
    cpu: Option<Arc<Cpu>>,
    template: Option<String>,
    weights: Weights,
}

/// Where weights come from.
enum Weights {
    Random(u64),
    Checkpoint(Mapping),
}

/// What a user named.
enum Located {
    /// The files of a model.
    Files(ModelFiles),
    /// A config.json alone.
    Config(PathBuf),
    /// A plan alone.
    Plan(PathBuf),
}

/// A plan and where it is from.
pub struct Planned {
    /// The plan.
    pub plan: Plan,
    /// What it lowers to.
    pub graph: Graph,
    label: String,
    origin: Origin,
    card: Option<CardOf>,
    config: Option<Config>,
}

/// A card that lives in the binary, or one of the user's.
enum CardOf {
    BuiltIn(&'static Card),
    Own(Box<Card>),
}

impl CardOf {
    fn card(&self) -> &Card {
        match self {
            CardOf::BuiltIn(card) => card,
            CardOf::Own(card) => card,
        }
    }
}

/// Finds the model, downloading it if it is a Hub id.
fn locate(options: &LoadOptions, progress: &mut dyn LoadProgress) -> Result<Located> {
    let name = options.model.as_deref().unwrap_or(DEFAULT_MODEL);
    let path = Path::new(name);
    if path.is_dir() {
        return Ok(Located::Files(ModelFiles::open(path)?));
    }
    if path.is_file() {
        let ending = path
            .extension()
            .and_then(|e| e.to_str())
            .unwrap_or_default();
        return match ending {
            "json" => Ok(Located::Config(path.into())),
            "yaml" | "yml" => Ok(Located::Plan(path.into())),
            "safetensors" => Err(Error::Input(format!(
                "{name}: give the folder that holds it, with its config.json"
            ))),
            _ => Err(Error::Input(format!(
                "{name}: a model is a folder with config.json and *.safetensors, a config.json, or a plan (.yaml)"
            ))),
        };
    }
    if let Some(files) = bundled::find(name) {
        return Ok(Located::Files(files));
    }
    if let (Ok(_), Some(hub)) = (HubId::parse(name), &options.hub) {
        let folder = hub::fetch_model(name, hub, progress.download())?;
        return Ok(Located::Files(ModelFiles::open(&folder)?));
    }
    let bundled = strata_layers::param::list_of(bundled::names());
    Err(Error::Input(format!(
        "{name}: there is no such folder or file; bundled models are {bundled}, and Hub ids have the form owner/name or owner/name@revision"
    )))
}

fn read(path: &Path) -> Result<String> {
    let io = |source| Error::Io {
        path: path.into(),
        source,
    };
    let bytes = std::fs::read(path).map_err(io)?;
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::Input(format!("{}: byte {at} is not UTF-8", path.display()))
    })
}

/// The plan of what was located.
fn planned(options: &LoadOptions, located: &Located) -> Result<Planned> {
    let config = match located {
        Located::Files(files) if files.exists("config.json") => Some(Config::open(files)?),
        Located::Config(path) => Some(Config::parse(&read(path)?, &path.display().to_string())?),
        Located::Files(_) | Located::Plan(_) => None,
    };
    let card = match (&options.card, &config) {
        (Some(path), _) => {
            let card = Card::parse(&read(path)?, &path.display().to_string())?;
            Some(CardOf::Own(Box::new(card)))
        }
        // With a plan of one's own a model may do without a family: its tensors then have our names.
        (None, Some(config)) if options.plan.is_some() => {
            cards::find(config).ok().map(CardOf::BuiltIn)
        }
        (None, Some(config)) => Some(CardOf::BuiltIn(cards::find(config)?)),
        (None, None) => None,
    };
    let own = match located {
        Located::Plan(path) => Some(options.plan.as_ref().unwrap_or(path)),
        _ => options.plan.as_ref(),
    };
    let (plan, label, origin) = match (own, &card, &config) {
        (Some(path), _, _) => {
            let label = path.display().to_string();
            (Plan::parse(&read(path)?, &label)?, label, Origin::Edited)
        }
        (None, Some(card), Some(config)) => {
            let name = match located {
                Located::Files(files) => short_name(files.name()),
                Located::Config(path) => {
                    short_name(&path.parent().unwrap_or(path).display().to_string())
                }
                Located::Plan(_) => unreachable!("a plan was found above"),
            };
            let plan = card.card().plan(config, &name)?;
            (plan, card.card().file().to_string(), Origin::Card)
        }
        (None, _, _) => {
            let name = match located {
                Located::Files(files) => files.name().to_string(),
                Located::Config(path) | Located::Plan(path) => path.display().to_string(),
            };
            return Err(Error::Input(format!(
                "{name}: there is no config.json; give a plan with --plan"
            )));
        }
    };
    let graph = Graph::lower(&plan, &label)?;
    Ok(Planned {
        plan,
        graph,
        label,
        origin,
        card,
        config,
    })
}

/// `models--owner--name/snapshots/<commit>` of a cache is `owner/name`; a folder is its last part.
fn short_name(folder: &str) -> String {
    let parts: Vec<&str> = folder
        .split(['/', '\\'])
        .filter(|p| !p.is_empty() && *p != ".")
        .collect();
    if let Some(repo) = parts.iter().rev().find_map(|p| p.strip_prefix("models--")) {
        return repo.replacen("--", "/", 1);
    }
    parts.last().map_or("model".into(), |p| p.to_string())
}

/// Opens the checkpoint and finds every weight of the plan in it.
fn mapped(planned: &mut Planned, files: &ModelFiles) -> Result<Mapping> {
    let checkpoint = Arc::new(Checkpoint::open(files)?);
    let card = planned.card.as_ref().map(CardOf::card);
    let mut notes = Vec::new();
    if planned.origin == Origin::Card
        && let Some(note) = mapping::untie(card, &mut planned.plan, &checkpoint)
    {
        planned.graph = Graph::lower(&planned.plan, &planned.label)?;
        notes.push(note);
    }
    let weights = planned.graph.weights();
    let mut mapping = Mapping::resolve(card, &weights, checkpoint, planned.origin)?;
    mapping.add_notes(notes);
    Ok(mapping)
}

/// The plan of a model, without its weights.
pub fn plan(options: &LoadOptions, progress: &mut dyn LoadProgress) -> Result<Planned> {
    let located = locate(options, progress)?;
    let mut planned = planned(options, &located)?;
    // The checkpoint may say that the output matrix is no copy of the embedding.
    if let (Located::Files(files), None) = (&located, options.random)
        && planned.origin == Origin::Card
        && let Ok(checkpoint) = Checkpoint::open(files)
    {
        let card = planned.card.as_ref().map(CardOf::card);
        mapping::untie(card, &mut planned.plan, &checkpoint);
        planned.graph = Graph::lower(&planned.plan, &planned.label)?;
    }
    Ok(planned)
}

/// One tensor of a checkpoint and what it feeds.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The weight of the plan; none for a tensor that feeds none.
    pub weight: Option<String>,
    /// The tensor.
    pub tensor: String,
    /// What is done to it, if anything.
    pub how: Option<String>,
    /// Element type in the file.
    pub dtype: String,
    /// Shape in the file.
    pub shape: Vec<usize>,
    /// Bytes in the file.
    pub bytes: u64,
    /// The file.
    pub shard: String,
}

/// What a checkpoint holds.
pub struct Inspected {
    /// A row for each weight, then one for each tensor that feeds none.
    pub rows: Vec<Row>,
    /// What is worth knowing.
    pub notes: Vec<String>,
    /// Why it would not load.
    pub fault: Option<Error>,
}

/// Lists a checkpoint's tensors and the weights they feed, without loading any.
pub fn inspect(options: &LoadOptions, progress: &mut dyn LoadProgress) -> Result<Inspected> {
    let Located::Files(files) = locate(options, progress)? else {
        return Err(Error::Input(
            "inspect needs a checkpoint, not a config or a plan alone".into(),
        ));
    };
    let checkpoint = Checkpoint::open(&files)?;
    let mut rows = Vec::new();
    let mut notes = Vec::new();
    let mut used = std::collections::BTreeSet::new();
    let mut planned = planned(options, &Located::Files(files.clone()));
    let mapping = match &mut planned {
        Ok(planned) => mapped(planned, &files),
        Err(_) => Err(Error::Input(String::new())),
    };
    if let Ok(mapping) = &mapping {
        notes.extend(mapping.notes().iter().cloned());
        for row in mapping.rows() {
            let tensor = row.source.tensor().to_string();
            let expression = row.source.to_string();
            let info = checkpoint.get(&tensor);
            used.insert(tensor.clone());
            rows.push(Row {
                weight: Some(row.path.clone()),
                how: (expression != tensor).then_some(expression),
                dtype: info.map_or(String::new(), |i| i.dtype.clone()),
                shape: info.map_or(Vec::new(), |i| i.shape.clone()),
                bytes: row.bytes as u64,
                shard: row.shard.clone(),
                tensor,
            });
        }
    }
    for (name, info) in checkpoint
        .tensors()
        .filter(|(name, _)| !used.contains(*name))
    {
        rows.push(Row {
            weight: None,
            tensor: name.to_string(),
            how: None,
            dtype: info.dtype.clone(),
            shape: info.shape.clone(),
            bytes: info.range.len() as u64,
            shard: info.shard.clone(),
        });
    }
    let fault = match (planned, mapping) {
        (Err(fault), _) | (Ok(_), Err(fault)) => Some(fault),
        (Ok(_), Ok(_)) => None,
    };
    Ok(Inspected { rows, notes, fault })
}

/// A backend, and the CPU behind it where there is one.
type Device = (Arc<dyn Backend>, Option<Arc<Cpu>>);

/// The backend of a device.
pub fn backend(device: &str, threads: Option<usize>) -> Result<Device> {
    let available = || std::thread::available_parallelism().map_or(1, usize::from);
    match device {
        "cpu" => {
            let threads = threads.unwrap_or_else(available);
            let cpu = Arc::new(Cpu::new(CpuOptions {
                threads,
                ..CpuOptions::default()
            }));
            Ok((cpu.clone(), Some(cpu)))
        }
        "reference" => Ok((Arc::new(Reference), None)),
        other if other.starts_with("cuda") => Err(Error::Input(format!(
            "--device {other}: this build has no CUDA backend; use --device cpu"
        ))),
        other => Err(Error::Input(format!(
            "--device {other}: devices are cpu and reference"
        ))),
    }
}

/// Loads a model.
pub fn load(options: &LoadOptions, progress: &mut dyn LoadProgress) -> Result<Model> {
    let (backend, cpu) = backend(&options.device, options.threads)?;
    let located = locate(options, progress)?;
    let mut planned = planned(options, &located)?;
    let mut notes = Vec::new();

    let (source, stored) = match (options.random, &located) {
        (Some(seed), _) => {
            let declared = planned.config.as_ref().and_then(declared_dtype);
            (Weights::Random(seed), declared.unwrap_or(DType::F32))
        }
        (None, Located::Files(files)) => {
            let mapping = mapped(&mut planned, files)?;
            notes.extend(mapping.notes().iter().cloned());
            let stored = main_dtype(&mapping);
            (Weights::Checkpoint(mapping), stored)
        }
        (None, Located::Config(path) | Located::Plan(path)) => {
            return Err(Error::Input(format!(
                "{}: it has no weights; --random SEED draws some",
                path.display()
            )));
        }
    };
    let dtype = options.dtype.unwrap_or(stored);
    let activations = if dtype == DType::BF16 {
        DType::BF16
    } else {
        DType::F32
    };

    let weights = planned.graph.weights();
    let network = match &source {
        Weights::Random(seed) => {
            let drawn = RandomWeights::new(*seed, planned.plan.init_std, dtype, backend.clone());
            Network::build(planned.graph, &drawn, backend, activations)?
        }
        Weights::Checkpoint(mapping) => {
            notes.extend(non_finite(mapping, SCANNED_BYTES));
            let total = mapping.rows().iter().map(|r| r.bytes as u64).sum();
            progress.start("loading", total);
            let source = Stored {
                mapping,
                // Widening is exact, so `f32` computes from the stored form.
                convert: options.dtype.filter(|d| *d != DType::F32),
                backend: backend.clone(),
                ready: RefCell::default(),
                progress: RefCell::new(progress),
            };
            let network = Network::build(planned.graph, &source, backend, activations)?;
            progress.finish();
            network
        }
    };
    let weights_bytes = match &source {
        Weights::Random(_) => {
            let size = |w: &GraphWeight| match w.spec.role {
                Role::Vector => 4,
                Role::Matrix | Role::Table => dtype.size(),
            };
            weights
                .iter()
                .map(|w| (w.spec.elements() * size(w)) as u64)
                .sum()
        }
        Weights::Checkpoint(mapping) => {
            // One pass: the rows stand in the order of the weights.
            let each = weights.iter().zip(mapping.rows());
            each.map(|(w, row)| {
                let size = match (w.spec.role, options.dtype) {
                    (Role::Vector, _) => 4,
                    (_, Some(d)) if d != DType::F32 => d.size(),
                    _ => row.dtype.size(),
                };
                (w.spec.elements() * size) as u64
            })
            .sum()
        }
    };

    let (tokenizer, generation) = match &located {
        Located::Files(files) => text_of(files)?,
        Located::Config(_) | Located::Plan(_) => (None, GenerationConfig::default()),
    };
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
        kv_dtype: dtype,
        weights_bytes,
        threads: cpu.as_ref().map_or(1, |c| c.threads()),
        features: cpu.as_ref().map_or("plain loops", |c| c.features()),
        cpu,
        notes,
        template,
        weights: source,
    })
}

/// The files of a model, as those who read text see them.
struct Files<'a>(&'a ModelFiles);

impl TextFiles for Files<'_> {
    fn read(&self, name: &str) -> std::result::Result<Option<String>, text::Error> {
        self.0.text(name).map_err(|error| text::Error::File {
            path: self.path(name),
            found: error.to_string(),
            expected: "UTF-8 text".into(),
            help: "Fetch the file again.".into(),
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.label(name).into()
    }

    fn list(&self, folder: &str) -> Vec<String> {
        self.0
            .folder()
            .map(|f| TextFiles::list(f, folder))
            .unwrap_or_default()
    }
}

/// The tokenizer, if the files have one, and how the model asks to be sampled.
fn text_of(files: &ModelFiles) -> Result<(Option<Arc<Tokenizer>>, GenerationConfig)> {
    let files = Files(files);
    let generation = GenerationConfig::open(&files)?;
    let bytes = byte_offset(&files)?.map(|offset| Bytes {
        offset,
        bos: None,
        eos: generation.eos_token_ids.first().copied(),
        pad: generation.pad_token_id,
    });
    let tokenizer = match bytes {
        None if !files.0.exists("tokenizer.json") => None,
        bytes => Some(Arc::new(Tokenizer::open(&files, bytes)?)),
    };
    Ok((tokenizer, generation))
}

/// The `byte_offset` of tokenizer_config.json: the id of byte 0 in a model that reads bytes.
fn byte_offset(files: &Files<'_>) -> Result<Option<u32>> {
    let name = "tokenizer_config.json";
    let config = text::read_object(files, name)?.unwrap_or_default();
    let Some(offset) = config.get("byte_offset") else {
        return Ok(None);
    };
    let narrow = offset
        .as_u64()
        .and_then(|o| u32::try_from(o).ok())
        .filter(|o| *o < 1 << 16);
    narrow.map(Some).ok_or_else(|| {
        let path = files.path(name);
        Error::Input(format!(
            "{}: byte_offset is {offset}, expected 0 to 65535",
            path.display()
        ))
    })
}

/// The element type that a config.json names.
fn declared_dtype(config: &Config) -> Option<DType> {
    let word = ["dtype", "torch_dtype"]
        .iter()
        .flat_map(|key| config.texts(key))
        .next()?;
    match word {
        "bfloat16" => Some(DType::BF16),
        "float16" => Some(DType::F16),
        _ => Some(DType::F32),
    }
}

/// The element type that most bytes of a checkpoint's matrices have.
fn main_dtype(mapping: &Mapping) -> DType {
    let mut bytes: HashMap<DType, usize> = HashMap::new();
    for row in mapping.rows().iter().filter(|r| r.shape.len() == 2) {
        *bytes.entry(row.dtype).or_default() += row.bytes;
    }
    let most = bytes
        .into_iter()
        .max_by_key(|(dtype, bytes)| (*bytes, *dtype));
    most.map_or(DType::F32, |(dtype, _)| dtype)
}

/// Checkpoints up to this size are scanned whole for numbers that are none; of larger ones, the small
/// weights are. It takes a few hundredths of a second.
const SCANNED_BYTES: usize = 256 << 20;

/// A warning for each weight with numbers that are none.
fn non_finite(mapping: &Mapping, up_to: usize) -> Vec<String> {
    let total: usize = mapping.rows().iter().map(|r| r.bytes).sum();
    let rows = mapping
        .rows()
        .iter()
        .filter(|r| total <= up_to || r.shape.len() < 2);
    let warning = |row: &mapping::Row| {
        let count = transforms::non_finite(&mapping.load(&row.path).ok()?);
        let elements: usize = row.shape.iter().product();
        (count > 0).then(|| {
            format!(
                "warning: {count} of the {elements} elements of {} ({}) are not finite: the checkpoint is damaged, or its training failed",
                row.path, row.source
            )
        })
    };
    rows.filter_map(warning).collect()
}

/// A checkpoint's weights on a device.
struct Stored<'a> {
    mapping: &'a Mapping,
    convert: Option<DType>,
    backend: Arc<dyn Backend>,
    ready: RefCell<HashMap<String, Matrix>>,
    progress: RefCell<&'a mut dyn LoadProgress>,
}

impl Stored<'_> {
    fn host(&self, path: &str) -> strata_kernels::Result<HostTensor> {
        let host = self
            .mapping
            .load(path)
            .map_err(|error| strata_kernels::Error::Value {
                op: "load",
                why: error.to_string(),
            })?;
        self.progress
            .borrow_mut()
            .advance(host.bytes().len() as u64);
        Ok(host)
    }
}

impl WeightSource for Stored<'_> {
    fn matrix(&self, path: &str, spec: &WeightSpec) -> strata_kernels::Result<Matrix> {
        if let Some(ready) = self.ready.borrow().get(path) {
            return Ok(ready.clone());
        }
        let host = self.host(path)?;
        let [rows, cols] = spec.shape[..] else {
            panic!("{path}: a matrix has two dimensions, not {:?}", spec.shape);
        };
        let data = match self.convert {
            Some(dtype) if dtype != host.dtype() => {
                let data = self.backend.alloc(dtype, rows, cols)?;
                // By rows, so that no f32 copy of a large matrix is made.
                const ROWS: usize = 64;
                for first in (0..rows).step_by(ROWS) {
                    let range = first..(first + ROWS).min(rows);
                    let part = host.reshape(&[rows, cols])?.slice(range.clone())?;
                    self.backend
                        .write(&part.to_f32(), &mut data.row_range(range))?;
                }
                data
            }
            _ => self.backend.upload(&host, rows, cols)?,
        };
        let matrix = Matrix::dense(data);
        self.ready.borrow_mut().insert(path.into(), matrix.clone());
        Ok(matrix)
    }

    fn vector(&self, path: &str, _spec: &WeightSpec) -> strata_kernels::Result<Vec<f32>> {
        Ok(self.host(path)?.to_f32())
    }
}

/// What a machine can do at most.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Limits {
    /// Bytes read from memory a second.
    pub bytes_per_second: f64,
    /// Operations a second of the kind that this model's products are.
    pub flops_per_second: f64,
}

impl Model {
    /// The tokenizer, or what to do without one.
    pub fn tokenizer(&self) -> Result<&Arc<Tokenizer>> {
        self.tokenizer.as_ref().ok_or_else(|| {
            Error::Input(format!(
                "{} has no tokenizer.json; give --token-ids, or put the tokenizer's files beside its config.json",
                self.name
            ))
        })
    }

    /// Tokens that end a sequence.
    pub fn eos(&self) -> Vec<u32> {
        if !self.generation.eos_token_ids.is_empty() {
            return self.generation.eos_token_ids.clone();
        }
        self.tokenizer
            .as_ref()
            .and_then(|t| t.eos_id())
            .into_iter()
            .collect()
    }

    /// Messages under the model's chat template.
    pub fn render_chat(
        &self,
        messages: &[serde_json::Value],
        add_generation_prompt: bool,
    ) -> Result<String> {
        let source = self.template.as_ref().ok_or_else(|| {
            Error::Input(format!(
                "{} has no chat template; use `strata generate` with the whole text",
                self.name
            ))
        })?;
        let special_tokens = self.tokenizer.as_ref().map(|t| t.special_tokens());
        let chat = Chat {
            messages,
            add_generation_prompt,
            special_tokens,
            ..Chat::default()
        };
        Ok(ChatTemplate::new(source)?.render(&chat)?)
    }

    /// One line about the model.
    pub fn summary(&self) -> String {
        let parameters: u64 = self
            .network
            .graph
            .weights()
            .iter()
            .map(|w| w.spec.elements() as u64)
            .sum();
        format!(
            "{}: {:.2} million parameters, {:.1} MB of weights, {}, {} thread{} ({})",
            self.name,
            parameters as f64 / 1e6,
            self.weights_bytes as f64 / 1e6,
            self.dtype_word(),
            self.threads,
            if self.threads == 1 { "" } else { "s" },
            self.features,
        )
    }

    /// The compute type, as `--dtype` has it.
    pub fn dtype_word(&self) -> &'static str {
        match self.kv_dtype {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            DType::F16 => "f16",
            DType::I32 => "i32",
        }
    }

    /// Hashes of the plan, less its name, and of all weights. Reads every weight.
    pub fn fingerprint(&self) -> Result<Fingerprint> {
        let plan = Plan {
            name: String::new(),
            ..self.plan.clone()
        };
        let mut hash = Xxh3::new();
        match &self.weights {
            Weights::Random(seed) => {
                hash.update(format!("random {seed} {}", self.dtype_word()).as_bytes());
            }
            Weights::Checkpoint(mapping) => {
                for row in mapping.rows() {
                    let host = mapping.load(&row.path)?;
                    hash.update(format!("{} {} {:?}", row.path, row.dtype, row.shape).as_bytes());
                    hash.update(host.bytes());
                }
            }
        }
        Ok(Fingerprint {
            plan: format!("{:032x}", xxh3_128(plan.print().as_bytes())),
            weights: format!("{:032x}", hash.digest128()),
        })
    }

    /// Adds to an error what can be found out about its cause.
    pub fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        let nan = error.chain().any(|e| {
            matches!(
                e.downcast_ref::<SampleError>(),
                Some(SampleError::Nan { .. })
            )
        });
        let Weights::Checkpoint(mapping) = &self.weights else {
            return error;
        };
        let found = if nan {
            non_finite(mapping, usize::MAX)
        } else {
            Vec::new()
        };
        if found.is_empty() {
            error
        } else {
            error.context(found.join("\n"))
        }
    }

    /// What the machine can do at most, measured now.
    pub fn limits(&self) -> Limits {
        let Some(cpu) = &self.cpu else {
            return Limits::default();
        };
        let measured = cpu::measure(cpu);
        Limits {
            bytes_per_second: measured.read_bytes_per_second,
            flops_per_second: match self.network.activations {
                DType::BF16 => measured.bf16_flops_per_second,
                _ => measured.f32_flops_per_second,
            },
        }
    }

    /// Elements of the matrices that one token is multiplied with: `[within the blocks, output]`.
    fn multiplied(&self) -> [f64; 2] {
        let graph = &self.network.graph;
        let mut inside = 0.0;
        for node in &graph.nodes {
            if let Run::Layer { spec, .. } = &node.run {
                let wanted = spec.weights(graph.widths[node.inputs[0]]);
                let matrices = wanted.iter().filter(|w| w.role == Role::Matrix);
                let share = |w: &WeightSpec| w.elements() as f64 * spec.share_used(w);
                inside += matrices.map(share).sum::<f64>();
            }
        }
        [inside, (graph.vocab * graph.d_model) as f64]
    }

    /// Bytes of the matrices that decoding one token reads.
    pub fn decode_bytes(&self) -> u64 {
        let elements: f64 = self.multiplied().iter().sum();
        let all: f64 = self
            .network
            .graph
            .weights()
            .iter()
            .filter(|w| w.spec.role != Role::Vector)
            .map(|w| w.spec.elements() as f64)
            .sum();
        (self.weights_bytes as f64 * elements / all) as u64
    }

    /// Floating-point operations of the matrix products that a prompt token goes through.
    pub fn flops_per_token(&self) -> f64 {
        2.0 * self.multiplied()[0]
    }
}
