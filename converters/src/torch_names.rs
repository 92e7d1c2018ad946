//! The names in PyTorch's pickles, and what they mean here: what may be asked for, and element types.

use crate::pickle::Known;

/// What a pickle may ask to call. Nothing of it is: `Call`s are read by `pytorch.rs`.
pub(crate) fn known(module: &str, name: &str) -> Option<Known> {
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
pub(crate) fn unread(what: &str) -> Option<&'static str> {
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
pub(crate) type Kind = (&'static str, usize);

/// The elements of a storage's class.
pub(crate) fn storage_kind(class: &str) -> Option<Kind> {
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
pub(crate) fn dtype_kind(name: &str) -> Option<Kind> {
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
