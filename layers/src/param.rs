//! Parameters of layers: from YAML, with every fault in its place, and back.

use crate::yaml::{Entry, Faults, Mark, Node, Value};

/// A value that a plan may hold.
pub trait Param: Sized {
    /// Reads it. `None` when at least one fault was added.
    fn read(node: &Node, faults: &mut Faults) -> Option<Self>;

    /// Writes it, all numbers literal. `Null` leaves its key out.
    fn write(&self) -> Value;
}

/// Largest size that a plan may name. The product of two never overflows.
pub const MAX_SIZE: usize = 1 << 30;

impl Param for usize {
    fn read(node: &Node, faults: &mut Faults) -> Option<Self> {
        match node.value {
            Value::Int(i) if i < 0 || i as u64 > MAX_SIZE as u64 => {
                faults.add(node.at, format!("{i} is outside 0 to {MAX_SIZE}"));
                None
            }
            Value::Int(i) => Some(i as usize),
            ref other => mismatch(node, other, "a whole number", faults),
        }
    }

    fn write(&self) -> Value {
        Value::Int(*self as i64)
    }
}

impl Param for f64 {
    fn read(node: &Node, faults: &mut Faults) -> Option<Self> {
        match node.value {
            Value::Int(i) => Some(i as f64),
            Value::Float(f) if f.is_finite() => Some(f),
            ref other => mismatch(node, other, "a finite number", faults),
        }
    }

    fn write(&self) -> Value {
        Value::Float(*self)
    }
}

impl Param for bool {
    fn read(node: &Node, faults: &mut Faults) -> Option<Self> {
        match node.value {
            Value::Bool(b) => Some(b),
            ref other => mismatch(node, other, "true or false", faults),
        }
    }

    fn write(&self) -> Value {
        Value::Bool(*self)
    }
}

impl Param for String {
    fn read(node: &Node, faults: &mut Faults) -> Option<Self> {
        match &node.value {
            Value::Text(t) => Some(t.clone()),
            other => mismatch(node, other, "text", faults),
        }
    }

    fn write(&self) -> Value {
        Value::Text(self.clone())
    }
}

impl<T: Param> Param for Option<T> {
    fn read(node: &Node, faults: &mut Faults) -> Option<Self> {
        match node.value {
            Value::Null => Some(None),
            _ => T::read(node, faults).map(Some),
        }
    }

    fn write(&self) -> Value {
        self.as_ref().map_or(Value::Null, T::write)
    }
}

impl<T: Param> Param for Vec<T> {
    fn read(node: &Node, faults: &mut Faults) -> Option<Self> {
        match &node.value {
            Value::List(list) => {
                let read: Vec<Option<T>> = list.iter().map(|n| T::read(n, faults)).collect();
                read.into_iter().collect()
            }
            other => mismatch(node, other, "a list", faults),
        }
    }

    fn write(&self) -> Value {
        Value::List(self.iter().map(|t| t.write().into()).collect())
    }
}

/// Adds the fault that `node` is not `expected`.
pub fn mismatch<T>(node: &Node, found: &Value, expected: &str, faults: &mut Faults) -> Option<T> {
    faults.add(
        node.at,
        format!("found {}, expected {expected}", found.describe()),
    );
    None
}

/// The entries of a mapping, taken key by key; what is not taken is a fault.
pub struct Fields<'a> {
    what: &'a str,
    at: Mark,
    entries: &'a [Entry],
    known: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    /// Starts to read `node` as the mapping that `what` takes.
    pub fn of(node: &'a Node, what: &'a str, faults: &mut Faults) -> Option<Self> {
        match &node.value {
            Value::Map(entries) => Some(Fields {
                what,
                at: node.at,
                entries,
                known: vec![],
            }),
            // `norm:` with nothing behind it takes all defaults.
            Value::Null => Some(Fields {
                what,
                at: node.at,
                entries: &[],
                known: vec![],
            }),
            other => mismatch(node, other, &format!("a mapping for {what}"), faults),
        }
    }

    /// The value under a key, if it is there and not null.
    pub fn node(&mut self, key: &'static str) -> Option<&'a Node> {
        self.known.push(key);
        let entry = self.entries.iter().find(|e| e.key == key)?;
        (entry.value.value != Value::Null).then_some(&entry.value)
    }

    /// A value that must be there.
    pub fn required<T: Param>(&mut self, key: &'static str, faults: &mut Faults) -> Option<T> {
        match self.node(key) {
            Some(node) => T::read(node, faults),
            None => {
                // A key whose value is null is there: the fault stands at it.
                faults.add(self.at(key), format!("{} needs `{key}`", self.what));
                None
            }
        }
    }

    /// A value that may be left out.
    pub fn optional<T: Param>(
        &mut self,
        key: &'static str,
        or: T,
        faults: &mut Faults,
    ) -> Option<T> {
        match self.node(key) {
            Some(node) => T::read(node, faults),
            None => Some(or),
        }
    }

    /// Where a key's value stands, or the mapping if it is not there.
    pub fn at(&self, key: &str) -> Mark {
        self.entries
            .iter()
            .find(|e| e.key == key)
            .map_or(self.at, |e| e.value.at)
    }

    /// Adds a fault for every key that nobody asked for.
    pub fn finish(&self, faults: &mut Faults) {
        for entry in self.entries {
            if !self.known.contains(&entry.key.as_str()) {
                faults.add(
                    entry.at,
                    format!(
                        "{} has no `{}`; it takes {}",
                        self.what,
                        entry.key,
                        list_of(self.known.iter().copied())
                    ),
                );
            }
        }
    }
}

/// "a, b and c".
pub fn list_of<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.into_iter().collect();
    match names.split_last() {
        None => "nothing".into(),
        Some((last, [])) => (*last).into(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
    }
}

/// Declares a struct of parameters and how it is read and written, from one list of fields.
/// A field without `= default` must be given; one that has its default is not written. `check` may add faults once all fields are read.
#[macro_export]
macro_rules! params {
    ($(#[$meta:meta])* pub struct $name:ident as $what:literal {
        $($(#[$doc:meta])* $field:ident: $type:ty $(= $default:expr)?,)*
    }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $name {
            $($(#[$doc])* pub $field: $type,)*
        }

        impl $crate::param::Param for $name {
            fn read(node: &$crate::yaml::Node, faults: &mut $crate::yaml::Faults) -> Option<Self> {
                #[allow(unused_mut)] // where there are no fields
                let mut fields = $crate::param::Fields::of(node, $what, faults)?;
                $(let $field = $crate::params!(@read fields, faults, $field, $type $(, $default)?);)*
                fields.finish(faults);
                let value = $name { $($field: $field?,)* };
                let before = faults.list().len();
                $crate::param::Check::check(&value, &fields, faults);
                (faults.list().len() == before).then_some(value)
            }

            fn write(&self) -> $crate::yaml::Value {
                $crate::yaml::Node::map([
                    $((
                        stringify!($field),
                        $crate::params!(@write &self.$field, $type $(, $default)?),
                    ),)*
                ])
            }
        }
    };
    (@write $value:expr, $type:ty) => {
        $crate::param::Param::write($value)
    };
    (@write $value:expr, $type:ty, $default:expr) => {{
        // What is as by default is left out, so that a printed plan is as short as a written one.
        let default: $type = $default;
        let value = $crate::param::Param::write($value);
        if value == $crate::param::Param::write(&default) {
            $crate::yaml::Value::Null
        } else {
            value
        }
    }};
    (@read $fields:ident, $faults:ident, $field:ident, $type:ty) => {
        $fields.required::<$type>(stringify!($field), $faults)
    };
    (@read $fields:ident, $faults:ident, $field:ident, $type:ty, $default:expr) => {
        $fields.optional::<$type>(stringify!($field), $default, $faults)
    };
}

/// Declares how an enum is read from and written as a word.
#[macro_export]
macro_rules! words {
    ($name:ty as $what:literal { $($variant:ident = $word:literal,)* }) => {
        impl $crate::param::Param for $name {
            fn read(node: &$crate::yaml::Node, faults: &mut $crate::yaml::Faults) -> Option<Self> {
                match &node.value {
                    $($crate::yaml::Value::Text(t) if t == $word => Some(<$name>::$variant),)*
                    other => $crate::param::mismatch(
                        node,
                        other,
                        &format!("{}: one of {}", $what, $crate::param::list_of([$($word),*])),
                        faults,
                    ),
                }
            }

            fn write(&self) -> $crate::yaml::Value {
                $crate::yaml::Value::Text(match self { $(<$name>::$variant => $word,)* }.into())
            }
        }
    };
}

/// What must hold among the parameters of one mapping.
pub trait Check {
    /// Adds a fault for all that does not hold.
    fn check(&self, _fields: &Fields<'_>, _faults: &mut Faults) {}
}

impl Fields<'_> {
    /// Faults every size of the list that is zero.
    pub fn positive(&self, sizes: &[(&str, usize)], faults: &mut Faults) {
        for (key, size) in sizes {
            if *size == 0 {
                faults.add(
                    self.at(key),
                    format!("{}: `{key}` must be at least 1", self.what),
                );
            }
        }
    }
}
