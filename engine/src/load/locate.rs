//! What a user named, and the plan of it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use strata_converters::mapping::{self, Mapping, Origin};
use strata_converters::{Card, Checkpoint, Config, ModelFiles, Unused, bundled, cards};
use strata_kernels::DType;
use strata_layers::{Graph, Plan};

use super::stored::declared_dtype;
use super::{Error, LoadOptions, LoadProgress, Result};
use crate::hub::{self, HubId};

/// The bundled model that is used when nobody names one.
const DEFAULT_MODEL: &str = "demo";

/// The plan of a checkpoint that runs another than its card's.
pub(super) const PLAN: &str = "plan.yaml";

/// What a user named.
pub(super) enum Located {
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
    /// What the checkpoint holds beside.
    pub unused: Unused,
    pub(super) label: String,
    pub(super) origin: Origin,
    pub(super) card: Option<Card>,
    /// The card with the names that the family publishes, whatever names this checkpoint has.
    pub(super) published: Option<Card>,
    pub(super) config: Option<Config>,
    /// The compute type that was asked for.
    dtype: Option<DType>,
}

impl Planned {
    /// The plan, lowered anew.
    pub fn graph(&self) -> Result<Graph> {
        Ok(Graph::lower(&self.plan, &self.label)?)
    }

    /// The type of weights that config.json names.
    pub fn declared_dtype(&self) -> Option<DType> {
        self.config.as_ref().and_then(declared_dtype)
    }
}

/// Finds the model, downloading it if it is a Hub id.
pub(super) fn locate(options: &LoadOptions, progress: &mut dyn LoadProgress) -> Result<Located> {
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
            "safetensors" | "bin" | "pt" | "pth" | "ckpt" => {
                Ok(Located::Files(ModelFiles::beside(path)?))
            }
            "gguf" => Ok(Located::Files(ModelFiles::gguf_file(path)?)),
            _ => Err(Error::Input(format!(
                "{name}: a model is a folder with config.json and its weights, one of these files (.safetensors, .bin, .pt, .pth), a GGUF file (.gguf), a config.json, or a plan (.yaml)"
            ))),
        };
    }
    if let Some(files) = bundled::find(name) {
        return Ok(Located::Files(files));
    }
    if let (Ok(_), Some(hub)) = (HubId::parse(name), &options.hub) {
        let beside: Vec<&str> = cards::beside_config().collect();
        let folder = hub::fetch_model(name, &beside, hub, progress.download())?;
        return Ok(Located::Files(ModelFiles::open(&folder)?));
    }
    let bundled = strata_layers::param::list_of(bundled::names());
    Err(Error::Input(format!(
        "{name}: there is no such folder or file; bundled models are {bundled}, and Hub ids have the form owner/name or owner/name@revision"
    )))
}

/// The text of a file.
pub(super) fn read(path: &Path) -> Result<String> {
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
pub(super) fn planned(options: &LoadOptions, located: &Located) -> Result<Planned> {
    let given = match &options.card {
        Some(path) => Some(Card::parse(&read(path)?, &path.display().to_string())?),
        None => None,
    };
    let gguf = match located {
        Located::Files(files) => files.gguf(),
        Located::Config(_) | Located::Plan(_) => None,
    };
    let config = match located {
        Located::Files(files) if gguf.is_some() => {
            match (gguf.zip(given.as_ref()), &options.plan) {
                (Some((gguf, card)), _) => Some(card.config_of(gguf)?),
                (None, None) => Some(Config::open(files)?),
                // Of a family without a card the tensors have our names.
                (None, Some(_)) => Config::open(files).ok(),
            }
        }
        Located::Files(files) if Config::name_in(files).is_some() => Some(Config::open(files)?),
        Located::Config(path) => Some(Config::parse(&read(path)?, &path.display().to_string())?),
        Located::Files(_) | Located::Plan(_) => None,
    };
    let has_plan = match located {
        Located::Files(files) => options.plan.is_some() || files.exists(PLAN),
        _ => options.plan.is_some(),
    };
    let card = match (given, &config) {
        (Some(card), _) => Some(card),
        // With a plan of one's own a model may do without a family: its tensors then have our names.
        (None, Some(config)) if has_plan => cards::find(config).ok().cloned(),
        (None, Some(config)) => Some(cards::find(config)?.clone()),
        (None, None) => None,
    };
    let published = match (&card, &config) {
        (Some(card), Some(config)) => Some(card.bound(config)?),
        _ => None,
    };
    // Cards that know no GGUF files were refused with the config.
    let card = match gguf {
        Some(_) => card.and_then(|c| c.for_gguf()),
        None => card,
    };
    let own = match (located, &options.plan) {
        (_, Some(path)) | (Located::Plan(path), None) => {
            Some((path.display().to_string(), read(path)?))
        }
        // A checkpoint of a plan that somebody wrote says so.
        (Located::Files(files), None) => {
            let text = files.text(PLAN)?;
            text.map(|text| (files.label(PLAN), text))
        }
        (Located::Config(_), None) => None,
    };
    let (plan, label, origin) = match (own, &card, &config) {
        (Some((label, text)), _, _) => (Plan::parse(&text, &label)?, label, Origin::Edited),
        (None, Some(card), Some(config)) => {
            let name = match located {
                Located::Files(files) => match files.gguf() {
                    Some(gguf) => gguf.name().to_string(),
                    None => short_name(files.name()),
                },
                Located::Config(path) => config_name(path),
                Located::Plan(_) => unreachable!("a plan was found above"),
            };
            let plan = card.plan(config, &name)?;
            (plan, card.file().to_string(), Origin::Card)
        }
        (None, _, _) => {
            let name = match located {
                Located::Files(files) => files.name().to_string(),
                Located::Config(path) | Located::Plan(path) => path.display().to_string(),
            };
            return Err(Error::Input(format!(
                "{name}: there is no config.json; a model's folder has one beside its weights, and --plan gives what it would say"
            )));
        }
    };
    let graph = Graph::lower(&plan, &label)?;
    let mut unused = Unused::default();
    let card = match (card, &config) {
        (Some(card), Some(config)) => {
            unused = card.unused(config)?;
            Some(card.bound(config)?)
        }
        (card, _) => card,
    };
    Ok(Planned {
        plan,
        graph,
        unused,
        label,
        origin,
        card,
        published,
        config,
        dtype: options.dtype,
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

/// A config's model: the folder of a `config.json`, else the file's own name.
fn config_name(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    match (stem.as_ref(), path.parent()) {
        ("config", Some(folder)) => short_name(&folder.display().to_string()),
        (stem, _) => stem.into(),
    }
}

/// Finds every weight of the plan in a checkpoint.
pub(super) fn mapped(planned: &mut Planned, mut checkpoint: Checkpoint) -> Result<Mapping> {
    if planned.dtype == Some(DType::F32) {
        checkpoint.widen_to_f32();
    }
    let checkpoint = Arc::new(checkpoint);
    let card = planned.card.as_ref();
    let mut notes = checkpoint.notes().to_vec();
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
        mapping::untie(planned.card.as_ref(), &mut planned.plan, &checkpoint);
        planned.graph = Graph::lower(&planned.plan, &planned.label)?;
    }
    Ok(planned)
}
