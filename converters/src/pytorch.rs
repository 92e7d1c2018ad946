//! The tensors of PyTorch's files (`.bin`, `.pt`, `.pth`), as ranges of the mapped file.
//!
//! `torch.save` pickles an object and keeps the bytes of its tensors apart: since torch 1.6 as entries of
//! a zip archive (`<name>/data.pkl`, `<name>/data/<key>`), before that behind the pickles of the same
//! file. The pickle is read as data (`pickle.rs`); nothing that it names is run.
//!
//! Source of the layouts: PyTorch's `serialization.py` and `_utils.py`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

use strata_layers::Mark;
use strata_layers::param::list_of;

use crate::checkpoint::{FILES, TENSORS, TensorInfo};
use crate::pickle::{Id, Known, Pickle, Value};
use crate::report::Report;
use crate::view;
use crate::zip;

/// Longest name of a tensor.
const MAX_NAME: usize = 1024;
/// Most dimensions of a tensor.
const MAX_RANK: usize = 16;
/// A view that repeats elements may have this many, or as many as its storage.
const MAX_REPEATED: usize = 1 << 20;
/// How deep a state dictionary may lie in others.
const MAX_WRAPPERS: usize = 4;
/// What the dictionary of the weights is called inside another, the first choice first.
const WRAPPERS: [&str; 8] = [
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "params",
];
/// The number that the old form begins with: 0x1950a86a20f9469cfc6c.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
/// The version of the old form.
const LEGACY: i64 = 1001;

type Read<T> = Result<T, String>;

/// Whether a file of this name is PyTorch's, if it is a model's at all.
pub(crate) fn is_named(name: &str) -> bool {
    [".bin", ".pt", ".pth", ".ckpt"]
        .iter()
        .any(|e| name.ends_with(e))
}

/// The tensors of one file, by their names; none if something is wrong with it, which is reported.
pub(crate) fn read(
    shard: &str,
    file: &[u8],
    report: &mut Report,
) -> Option<Vec<(String, TensorInfo)>> {
    let opened = match open(file) {
        Ok(opened) => opened,
        Err(why) => {
            report.add(FILES, Mark::default(), format!("{shard}: {why}"));
            return None;
        }
    };
    for refused in &opened.pickle.refused {
        let message = format!(
            "{shard}: the pickle calls {} at byte {}; nothing in a file is run, and what it would make is not known. Save tensors alone: torch.save(model.state_dict(), …)",
            refused.what, refused.at
        );
        report.add(FILES, Mark::default(), message);
    }
    if !opened.pickle.refused.is_empty() {
        return None;
    }
    let (dict, way) = match opened.state_dict() {
        Ok(found) => found,
        Err(why) => {
            report.add(FILES, Mark::default(), format!("{shard}: {why}"));
            return None;
        }
    };
    if let Some(way) = way {
        report.note(format!("{shard}: {way}"));
    }
    opened.tensors(shard, dict, report)
}

/// A file's pickle, and where its storages are.
struct Opened<'a> {
    pickle: Pickle<'a>,
    /// By their keys: the range of the file that a storage's bytes are in.
    storages: HashMap<String, Range<usize>>,
}

fn open(file: &[u8]) -> Read<Opened<'_>> {
    if file.starts_with(b"PK\x03\x04") || file.starts_with(b"PK\x05\x06") {
        return open_zip(file);
    }
    if file.get(257..262) == Some(b"ustar") {
        return Err(
            "this is a tar archive, the form of torch before 0.1.10 (or a .nemo file), which is not read: save it again with a newer torch, or unpack it".into(),
        );
    }
    // Behind the protocol's number, a frame, and the opcode of a long number.
    let start = &file[..file.len().min(32)];
    if start.first() == Some(&0x80) && start.windows(MAGIC.len()).any(|w| w == MAGIC) {
        return open_legacy(file);
    }
    Err(format!(
        "this is no PyTorch file: it begins with {:02x?}, and neither with a zip archive nor with torch's number",
        &file[..file.len().min(8)]
    ))
}

fn open_zip(file: &[u8]) -> Read<Opened<'_>> {
    let entries = zip::read(file).map_err(|why| format!("zip archive: {why}"))?;
    let find = |name: &str| {
        let found = entries.iter().find(|e| e.name == name);
        found.map(|e| e.range.clone())
    };
    let pickles = |e: &&zip::Entry<'_>| e.name == "data.pkl" || e.name.ends_with("/data.pkl");
    let mut all = entries.iter().filter(pickles);
    let pickle = match (all.next(), all.next()) {
        (Some(one), None) => one,
        (Some(_), Some(_)) => return Err("the archive has several data.pkl".into()),
        (None, _) => {
            return Err("the archive has no data.pkl: it is not by torch.save".into());
        }
    };
    let prefix = pickle.name.strip_suffix("data.pkl").unwrap_or_default();
    if entries.iter().any(|e| {
        let name = e.name.strip_prefix(prefix).unwrap_or_default();
        name == "constants.pkl" || name.starts_with("code/")
    }) {
        return Err(
            "this is a program (TorchScript), not weights: save its state_dict() with torch.save"
                .into(),
        );
    }
    if let Some(why) = entries.iter().find_map(|e| e.packed.as_ref()) {
        return Err(format!("zip archive: {why}"));
    }
    if let Some(range) = find(&format!("{prefix}byteorder"))
        && !file[range.clone()].eq_ignore_ascii_case(b"little")
    {
        let found = String::from_utf8_lossy(&file[range.start..range.end.min(range.start + 16)]);
        return Err(format!(
            "its numbers are {found:?}-endian, and only those that are \"little\" are read: save it again on another machine"
        ));
    }
    let end = pickle.range.end;
    let read = Pickle::read(&file[..end], pickle.range.start, known)?;
    let data = format!("{prefix}data/");
    let storages = entries
        .iter()
        .filter_map(|e| Some((e.name.strip_prefix(&data)?.to_string(), e.range.clone())));
    Ok(Opened {
        pickle: read,
        storages: storages.collect(),
    })
}

fn open_legacy(file: &[u8]) -> Read<Opened<'_>> {
    let magic = Pickle::read(file, 0, known)?;
    let version = Pickle::read(file, magic.end, known)?;
    if *version.value() != Value::Int(LEGACY) {
        return Err(format!(
            "version {:?} of torch's old form; {LEGACY} is read",
            version.value()
        ));
    }
    let system = Pickle::read(file, version.end, known)?;
    if let Value::Dict(entries) = system.value() {
        let little = entries
            .iter()
            .find(|(key, _)| system.text(*key) == Some("little_endian"));
        if little.is_some_and(|(_, value)| *system.get(*value) == Value::Bool(false)) {
            return Err(
                "its numbers are big-endian, which is not read: save it again on another machine"
                    .into(),
            );
        }
    }
    let pickle = Pickle::read(file, system.end, known)?;
    let keys = Pickle::read(file, pickle.end, known)?;
    let Some(order) = keys.items(keys.root) else {
        return Err("no list of storages follows its pickle".into());
    };
    let sizes = storage_sizes(&pickle);
    let mut storages = HashMap::new();
    let mut at = keys.end;
    for key in order {
        let key = keys.text(*key).ok_or("a storage's key is no text")?;
        let size = *sizes
            .get(key)
            .ok_or_else(|| format!("no tensor has the storage {key:?}, whose bytes follow"))?;
        let count = file.get(at..).and_then(|rest| rest.first_chunk::<8>());
        let count = i64::from_le_bytes(*count.ok_or("the file ends before its last storage")?);
        let start = at + 8;
        let bytes = usize::try_from(count)
            .ok()
            .and_then(|n| n.checked_mul(size));
        let end = bytes.and_then(|bytes| start.checked_add(bytes));
        let Some(end) = end.filter(|end| *end <= file.len()) else {
            return Err(format!(
                "the storage {key:?} should have {count} elements of {size} bytes, but {} bytes follow: this is only a part of the file",
                file.len() - start
            ));
        };
        if storages.insert(key.to_string(), start..end).is_some() {
            return Err(format!("the storage {key:?} is there twice"));
        }
        at = end;
    }
    Ok(Opened { pickle, storages })
}

/// Bytes of an element of each storage that a pickle names.
fn storage_sizes(pickle: &Pickle<'_>) -> HashMap<String, usize> {
    let mut sizes = HashMap::new();
    for id in pickle.ids() {
        if let Value::Persistent(of) = pickle.get(id)
            && let Ok(storage) = storage(pickle, *of)
        {
            sizes.insert(storage.key.to_string(), storage.kind.1);
        }
    }
    sizes
}

/// What a pickle may ask to call. Nothing of it is: `Call`s are read by `tensor` and `plain` below.
fn known(module: &str, name: &str) -> Option<Known> {
    let plain = [
        "argparse.",
        "types.SimpleNamespace",
        "datetime.",
        "pathlib.",
        "decimal.Decimal",
        "uuid.UUID",
        "_io.BytesIO",
        "_codecs.encode",
        "builtins.set",
        "builtins.frozenset",
        "builtins.bytearray",
        "builtins.bytes",
        "builtins.complex",
        "builtins.range",
        "builtins.slice",
        "__builtin__.set",
        "__builtin__.frozenset",
        "__builtin__.bytearray",
        "__builtin__.complex",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "torch.device",
        "torch.Generator",
        "torch.serialization._get_layout",
        // Settings of trainers.
        "omegaconf.",
        "yacs.config.",
        "easydict.",
        "ml_collections.",
        "transformers.",
        "megatron.",
        "pytorch_lightning.",
        "lightning.",
        "lightning_fabric.",
        "lightning_utilities.",
        "timm.",
    ];
    let mappings = [
        "collections.OrderedDict",
        "collections.defaultdict",
        "collections.Counter",
        "builtins.dict",
        "__builtin__.dict",
        "lightning_fabric.utilities.data.AttributeDict",
        "pytorch_lightning.utilities.parsing.AttributeDict",
    ];
    let full = format!("{module}.{name}");
    let begins = |known: &&str| full == **known || known.ends_with('.') && full.starts_with(*known);
    if mappings.contains(&full.as_str()) {
        Some(Known::Mapping)
    } else if full == "torch.Size" || REBUILT.contains(&full.as_str()) || unread(&full).is_some() {
        Some(Known::Call)
    } else if plain.iter().any(begins) {
        Some(Known::Plain)
    } else {
        None
    }
}

/// What tensors are made by.
const REBUILT: [&str; 6] = [
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._tensor._rebuild_from_type_v2",
];

/// What a tensor is that is made in a way that is not read.
fn unread(what: &str) -> Option<&'static str> {
    Some(match what {
        "torch._utils._rebuild_qtensor" => "is quantised by torch",
        "torch._utils._rebuild_sparse_tensor"
        | "torch._utils._rebuild_sparse_csr_tensor"
        | "torch._utils._rebuild_sparse_compressed_tensor" => "is sparse",
        "torch._utils._rebuild_nested_tensor" => "is a nested tensor",
        "torch._utils._rebuild_meta_tensor_no_storage" => {
            "is on the meta device: it has no elements"
        }
        "torch._utils._rebuild_wrapper_subclass" => "is of a class of its own",
        "torch._utils._rebuild_device_tensor_from_numpy"
        | "torch._utils._rebuild_device_tensor_from_cpu_tensor" => "lies on a device of its own",
        _ => return None,
    })
}

/// Our word for an element type, and its bytes.
type Kind = (&'static str, usize);

/// The elements of a storage's class.
fn storage_kind(class: &str) -> Option<Kind> {
    Some(match class.strip_suffix("Storage")? {
        "Float" => ("F32", 4),
        "Double" => ("F64", 8),
        "Half" => ("F16", 2),
        "BFloat16" => ("BF16", 2),
        "Long" => ("I64", 8),
        "Int" => ("I32", 4),
        "Short" => ("I16", 2),
        "Char" => ("I8", 1),
        "Byte" | "Untyped" => ("U8", 1),
        "Bool" => ("BOOL", 1),
        "ComplexFloat" => ("C64", 8),
        "ComplexDouble" => ("C128", 16),
        // Of quantised tensors, which are named where they stand.
        "QInt8" | "QUInt8" | "QUInt4x2" | "QUInt2x4" => ("Q8", 1),
        "QInt32" => ("Q32", 4),
        _ => return None,
    })
}

/// The elements of a `torch.dtype`.
fn dtype_kind(name: &str) -> Option<Kind> {
    Some(match name {
        "float32" => ("F32", 4),
        "float64" => ("F64", 8),
        "float16" => ("F16", 2),
        "bfloat16" => ("BF16", 2),
        "int64" => ("I64", 8),
        "int32" => ("I32", 4),
        "int16" => ("I16", 2),
        "int8" => ("I8", 1),
        "uint8" => ("U8", 1),
        "uint16" => ("U16", 2),
        "uint32" => ("U32", 4),
        "uint64" => ("U64", 8),
        "bool" => ("BOOL", 1),
        "complex64" => ("C64", 8),
        "complex128" => ("C128", 16),
        "float8_e4m3fn" => ("F8_E4M3", 1),
        "float8_e5m2" => ("F8_E5M2", 1),
        "float8_e4m3fnuz" => ("F8_E4M3FNUZ", 1),
        "float8_e5m2fnuz" => ("F8_E5M2FNUZ", 1),
        "float8_e8m0fnu" => ("F8_E8M0", 1),
        _ => return None,
    })
}

/// What a pickle says of a storage.
struct Storage<'a> {
    key: &'a str,
    kind: Kind,
    /// Its elements.
    count: usize,
    /// Elements of the storage that it is a part of, before it.
    offset: usize,
}

/// `("storage", class, key, location, count)`; the old form adds what larger storage it is a part of.
fn storage<'a>(pickle: &Pickle<'a>, id: Id) -> Read<Storage<'a>> {
    let bad = || "its storage is not described as torch does".to_string();
    let items = pickle.items(id).ok_or_else(bad)?;
    let [word, class, key, _, count, view @ ..] = items else {
        return Err(bad());
    };
    if pickle.text(*word) != Some("storage") {
        return Err(bad());
    }
    let (_, class) = pickle.global(*class).ok_or_else(bad)?;
    let kind = storage_kind(class).ok_or_else(|| format!("torch has no storage {class:?}"))?;
    let mut offset = 0;
    let mut count = pickle.size(*count).ok_or_else(bad)?;
    if let [view] = view
        && let Some([_, from, size]) = pickle.items(*view)
    {
        offset = pickle.size(*from).ok_or_else(bad)?;
        count = pickle.size(*size).ok_or_else(bad)?;
    }
    Ok(Storage {
        key: pickle.text(*key).ok_or_else(bad)?,
        kind,
        count,
        offset,
    })
}

impl Opened<'_> {
    /// Whether a value is a tensor, be it readable or not.
    fn is_tensor(&self, id: Id) -> bool {
        let pickle = &self.pickle;
        match pickle.get(id) {
            Value::Call(what, _) => pickle
                .global(*what)
                .is_some_and(|(module, name)| (module, name) != ("torch", "Size")),
            _ => false,
        }
    }

    /// The tensors right in a dictionary.
    fn count(&self, dict: &[(Id, Id)]) -> usize {
        dict.iter()
            .filter(|(_, value)| self.is_tensor(*value))
            .count()
    }

    /// The dictionary of the weights, and what is worth telling about where it was.
    fn state_dict(&self) -> Read<(&[(Id, Id)], Option<String>)> {
        let pickle = &self.pickle;
        let holding = self.holding();
        let dict = |id: Id| match pickle.get(id) {
            Value::Dict(entries) => Some(entries.as_slice()),
            _ => None,
        };
        let Some(mut here) = dict(pickle.root) else {
            let found = match pickle.value() {
                _ if self.is_tensor(pickle.root) => "one tensor",
                Value::List(_) | Value::Tuple(_) => "a list",
                _ => "no dictionary",
            };
            return Err(format!(
                "the file holds {found}; a dictionary of tensors, by their names, is expected"
            ));
        };
        let mut way = Vec::new();
        let mut beside = Vec::new();
        for _ in 0..MAX_WRAPPERS {
            // Of keys that are there twice the last counts.
            let full = |id: &Id| dict(*id).filter(|_| holding.contains(id));
            let named = |wanted: &str| {
                let mut entries = here.iter().rev();
                let found = entries.find(|(key, _)| pickle.text(*key) == Some(wanted));
                found.and_then(|(_, value)| full(value))
            };
            let inside: Vec<(&str, &[(Id, Id)])> =
                match WRAPPERS.iter().find_map(|w| Some((*w, named(w)?))) {
                    Some(found) => vec![found],
                    None if self.count(here) > 0 => break,
                    None => here
                        .iter()
                        .filter_map(|(key, value)| {
                            Some((pickle.text(*key).unwrap_or("…"), full(value)?))
                        })
                        .collect(),
                };
            let keys = |entries: &[(Id, Id)]| -> Vec<String> {
                let texts = entries.iter().filter_map(|(key, _)| pickle.text(*key));
                let short = |t: &str| t.chars().take(40).collect();
                texts.take(12).map(short).collect()
            };
            match inside[..] {
                [(key, inside)] => {
                    way.push(format!("{:?}", key.chars().take(40).collect::<String>()));
                    beside = keys(here).into_iter().filter(|k| k != key).collect();
                    here = inside;
                }
                [] => {
                    let keys = list_of(keys(here).iter().map(String::as_str));
                    return Err(match keys.is_empty() {
                        true => "the file holds an empty dictionary".into(),
                        false => format!("the file holds no tensors, only {keys}"),
                    });
                }
                _ => {
                    let names = list_of(inside.iter().map(|(key, _)| *key));
                    return Err(format!(
                        "the file holds several dictionaries of tensors, {names}; which is the model's is not known"
                    ));
                }
            }
        }
        if self.count(here) == 0 {
            return Err(format!(
                "no tensors were found in {MAX_WRAPPERS} dictionaries, one in the other"
            ));
        }
        let told = (!way.is_empty()).then(|| {
            let rest = match beside.is_empty() {
                true => String::new(),
                false => format!(
                    "; {} beside it is not read",
                    list_of(beside.iter().map(String::as_str))
                ),
            };
            format!("the weights are in its {}{rest}", way.join(" in its "))
        });
        Ok((here, told))
    }

    /// The dictionaries that hold tensors, themselves or in others in them. Each is looked at a few times,
    /// however often another names it.
    fn holding(&self) -> HashSet<Id> {
        let dicts = || {
            self.pickle
                .ids()
                .filter_map(|id| match self.pickle.get(id) {
                    Value::Dict(entries) => Some((id, entries)),
                    _ => None,
                })
        };
        let direct = dicts().filter(|(_, entries)| self.count(entries) > 0);
        let mut holding: HashSet<Id> = direct.map(|(id, _)| id).collect();
        for _ in 0..MAX_WRAPPERS {
            let more: Vec<Id> = dicts()
                .filter(|(_, entries)| entries.iter().any(|(_, value)| holding.contains(value)))
                .map(|(id, _)| id)
                .collect();
            holding.extend(more);
        }
        holding
    }

    /// The tensors of a dictionary; none if something is wrong with one, which is reported.
    fn tensors(
        &self,
        shard: &str,
        dict: &[(Id, Id)],
        report: &mut Report,
    ) -> Option<Vec<(String, TensorInfo)>> {
        let mut found = BTreeMap::new();
        let mut fine = true;
        for (key, value) in dict.iter().filter(|(_, value)| self.is_tensor(*value)) {
            let (name, info) = match self.pickle.text(*key) {
                Some(name) if name.len() <= MAX_NAME => (name, self.tensor(*value)),
                Some(name) => {
                    let start = name
                        .char_indices()
                        .nth(40)
                        .map_or(name, |(at, _)| &name[..at]);
                    let why = format!("the name has more than {MAX_NAME} bytes");
                    (start, Err(why))
                }
                None => ("?", Err("the name is no text".into())),
            };
            match info {
                Ok(info) => {
                    found.insert(name.to_string(), info);
                }
                Err(why) => {
                    let message = format!("{shard}: tensor {name:?} {why}");
                    report.add(TENSORS, Mark::default(), message);
                    fine = false;
                }
            }
        }
        fine.then(|| found.into_iter().collect())
    }

    /// Follows parameters to the tensors that they are of, and checks those.
    fn tensor(&self, mut id: Id) -> Read<TensorInfo> {
        let pickle = &self.pickle;
        let bad = |what: &str| format!("is not described as torch does: {what}");
        // A parameter of a parameter of …: nobody writes three.
        for _ in 0..4 {
            let Value::Call(what, args) = pickle.get(id) else {
                return Err(bad("a parameter of no tensor"));
            };
            let (module, name) = pickle.global(*what).unwrap_or_default();
            if let Some(why) = unread(&format!("{module}.{name}")) {
                return Err(format!("{why}, which is not read"));
            }
            let args = pickle.items(*args).ok_or_else(|| bad("no arguments"))?;
            match (name, args) {
                ("_rebuild_parameter" | "_rebuild_parameter_with_state", [data, ..]) => id = *data,
                // Attributes beside a tensor: the function, its class, the arguments, and those.
                ("_rebuild_from_type_v2", [function, class, of, _]) => {
                    let class = pickle.global(*class).unwrap_or_default();
                    if !matches!(
                        class,
                        ("torch", "Tensor") | ("torch.nn.parameter", "Parameter")
                    ) {
                        return Err(format!("is of the class {}.{}", class.0, class.1));
                    }
                    let (_, name) = pickle.global(*function).unwrap_or_default();
                    let of = pickle.items(*of).ok_or_else(|| bad("no arguments"))?;
                    return self.rebuilt(name, of);
                }
                (name, args) => return self.rebuilt(name, args),
            }
        }
        Err(bad("parameters of parameters"))
    }

    /// `(storage, offset, sizes, strides, …)`, all in elements.
    fn rebuilt(&self, name: &str, args: &[Id]) -> Read<TensorInfo> {
        let pickle = &self.pickle;
        let bad = |what: &str| format!("is not described as torch does: {what}");
        let (of, offset, sizes, strides, rest) = match args {
            [of, offset, sizes, strides, rest @ ..] if name.starts_with("_rebuild_tensor") => {
                (*of, *offset, *sizes, *strides, rest)
            }
            _ => return Err(bad("another function")),
        };
        let Value::Persistent(of) = pickle.get(of) else {
            return Err(bad("a tensor without a storage"));
        };
        let storage = storage(pickle, *of)?;
        let (kind, metadata) = match (name, rest) {
            ("_rebuild_tensor_v3", [_, _, dtype, metadata @ ..]) => {
                let (_, dtype) = pickle.global(*dtype).unwrap_or_default();
                let kind = dtype_kind(dtype)
                    .ok_or_else(|| format!("has the element type {dtype:?}, which is not read"))?;
                (kind, metadata)
            }
            ("_rebuild_tensor_v3", _) => return Err(bad("no element type")),
            (_, [_, _, metadata @ ..]) => (storage.kind, metadata),
            _ => (storage.kind, &[][..]),
        };
        if let [metadata, ..] = metadata
            && matches!(pickle.get(*metadata), Value::Dict(d) if !d.is_empty())
        {
            return Err("is a conjugated or negated view, which is not read".into());
        }
        if kind.0.starts_with('Q') {
            return Err("is quantised by torch, which is not read".into());
        }
        let numbers = |id: Id, what: &str| -> Read<Vec<usize>> {
            // A torch.Size is a tuple by another name.
            let id = match pickle.get(id) {
                Value::Call(_, args) => match pickle.items(*args) {
                    Some([inside]) => *inside,
                    _ => id,
                },
                _ => id,
            };
            let items = pickle.items(id).ok_or_else(|| bad(what))?;
            if items.len() > MAX_RANK {
                return Err(format!("has more than {MAX_RANK} dimensions"));
            }
            let sizes: Option<_> = items.iter().map(|n| pickle.size(*n)).collect();
            sizes.ok_or_else(|| bad(what))
        };
        let offset = pickle.size(offset).ok_or_else(|| bad("its offset"))?;
        let shape = numbers(sizes, "its sizes")?;
        let strides = numbers(strides, "its strides")?;
        if shape.len() != strides.len() {
            return Err(format!("has sizes {shape:?} and strides {strides:?}"));
        }
        let range = self.range(&storage, kind, offset, &shape, &strides)?;
        Ok(TensorInfo {
            dtype: kind.0.into(),
            strides: (!view::is_contiguous(&shape, &strides)).then_some(strides),
            shape,
            shard: String::new(),
            range,
        })
    }

    /// The bytes of the file that a view reads.
    fn range(
        &self,
        storage: &Storage<'_>,
        (dtype, size): Kind,
        offset: usize,
        shape: &[usize],
        strides: &[usize],
    ) -> Read<Range<usize>> {
        let key: String = storage.key.chars().take(40).collect();
        let bytes = self
            .storages
            .get(storage.key)
            .ok_or_else(|| format!("has the storage {key:?}, whose bytes are not in the file"))?;
        let bytes_of = |n: usize, size: usize| n.checked_mul(size);
        let before = bytes_of(storage.offset, storage.kind.1);
        let length = bytes_of(storage.count, storage.kind.1);
        let within = before.zip(length).filter(|(before, length)| {
            before
                .checked_add(*length)
                .is_some_and(|n| n <= bytes.len())
        });
        let Some((before, length)) = within else {
            return Err(format!(
                "has the storage {key:?} of {} elements of {} bytes, but the file has {} bytes of it",
                storage.count,
                storage.kind.1,
                bytes.len()
            ));
        };
        let extent = view::extent(shape, strides);
        let first = bytes_of(offset, size);
        let read = extent.and_then(|n| bytes_of(n, size));
        let end = first.zip(read).and_then(|(a, b)| a.checked_add(b));
        let (Some(first), Some(end)) = (first, end.filter(|end| *end <= length)) else {
            return Err(format!(
                "reads beyond its storage: {shape:?} of {dtype} with strides {strides:?} from element {offset} on, of a storage of {length} bytes"
            ));
        };
        let elements = view::elements(shape).unwrap_or(usize::MAX);
        if elements > MAX_REPEATED.max(length / size) {
            return Err(format!(
                "repeats the elements of its storage of {length} bytes to {shape:?} by strides {strides:?}"
            ));
        }
        let start = bytes.start + before;
        Ok(start + first..start + end)
    }
}
