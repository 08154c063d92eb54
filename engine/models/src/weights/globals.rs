//! What a pickle may name. Nothing of it is ever called: each name only says how the values beside it are understood.

use super::element::Element;

/// A function or class that a checkpoint may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Callable {
    /// `torch._utils._rebuild_tensor_v2`: storage, offset, shape, strides.
    RebuildTensor,
    /// `torch._utils._rebuild_parameter`: a tensor.
    RebuildParameter,
    /// `torch._tensor._rebuild_from_type_v2`: function, type, its arguments, attributes.
    RebuildFromType,
    /// `torch.FloatStorage` and its like.
    Storage(Element),
    /// `collections.OrderedDict`.
    Dict,
    /// Something whose values no weight depends on.
    Inert,
}

/// Classes and functions of trainings' options and counters; what they would make is left out.
const INERT: &[(&str, &[&str])] = &[
    ("__builtin__", BUILTINS),
    ("builtins", BUILTINS),
    ("_codecs", &["encode"]),
    ("argparse", &["Namespace"]),
    ("collections", &["defaultdict", "Counter", "deque"]),
    ("datetime", &["date", "datetime", "time", "timedelta", "timezone"]),
    ("numpy", &["dtype", "ndarray"]),
    ("numpy.core.multiarray", &["_reconstruct", "scalar"]),
    ("numpy._core.multiarray", &["_reconstruct", "scalar"]),
    ("pathlib", &["Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"]),
    ("types", &["SimpleNamespace"]),
    (
        "torch",
        &[
            "Size", "Tensor", "device", "bfloat16", "bool", "double", "float", "float16", "float32", "float64", "half",
            "int", "int16", "int32", "int64", "int8", "long", "short", "uint8",
        ],
    ),
    ("torch.nn.parameter", &["Parameter", "Buffer"]),
    ("torch.serialization", &["_get_layout"]),
];

const BUILTINS: &[&str] = &[
    "bool",
    "bytearray",
    "bytes",
    "complex",
    "dict",
    "float",
    "frozenset",
    "int",
    "list",
    "range",
    "set",
    "slice",
    "str",
    "tuple",
];

const STORAGES: &[(&str, Element)] = &[
    ("BFloat16Storage", Element::Bf16),
    ("BoolStorage", Element::Bool),
    ("ByteStorage", Element::U8),
    ("CharStorage", Element::I8),
    ("DoubleStorage", Element::F64),
    ("FloatStorage", Element::F32),
    ("HalfStorage", Element::F16),
    ("IntStorage", Element::I32),
    ("LongStorage", Element::I64),
    ("ShortStorage", Element::I16),
];

impl Callable {
    /// What `module.name` stands for; none for what is not on the list.
    pub fn known(module: &str, name: &str) -> Option<Callable> {
        match (module, name) {
            ("collections", "OrderedDict") => return Some(Callable::Dict),
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => return Some(Callable::RebuildTensor),
            ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => {
                return Some(Callable::RebuildParameter);
            }
            ("torch._tensor", "_rebuild_from_type_v2") => return Some(Callable::RebuildFromType),
            _ => {}
        }
        // Tensors saved on a GPU name the storage class of old releases.
        if module == "torch" || module == "torch.cuda" {
            let storage = STORAGES.iter().find(|(storage, _)| *storage == name);
            if let Some(&(_, element)) = storage {
                return Some(Callable::Storage(element));
            }
        }
        let names = INERT.iter().find(|(inert, _)| *inert == module)?.1;
        names.contains(&name).then_some(Callable::Inert)
    }
}
