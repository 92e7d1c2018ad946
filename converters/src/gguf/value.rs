//! The values of a GGUF file's metadata. Texts and lists stay in the file, and are read when asked for.

use std::ops::Range;

use strata_layers::Node;
use strata_layers::yaml::Value as Plain;

/// The type of a value, by its number in files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // the names say it
pub enum Kind {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    Text = 8,
    List = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

/// A value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A whole number. Those beyond i64 are its largest.
    Int(i64),
    /// A number with a fraction.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// A text: its bytes in the file, perhaps no UTF-8.
    Text(Range<usize>),
    /// A list of values of one type.
    List(Kind, Elements),
}

/// Where the elements of a list are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Elements {
    /// How many there are.
    pub count: usize,
    /// Their bytes in the file.
    pub bytes: Range<usize>,
}

impl Kind {
    /// The type of this number.
    pub fn numbered(number: u32) -> Option<Kind> {
        use Kind::*;
        let all = [
            U8, I8, U16, I16, U32, I32, F32, Bool, Text, List, U64, I64, F64,
        ];
        all.into_iter().find(|k| *k as u32 == number)
    }

    /// Bytes of one value; none (0) of texts and lists, which differ.
    pub fn bytes(self) -> usize {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => 1,
            Kind::U16 | Kind::I16 => 2,
            Kind::U32 | Kind::I32 | Kind::F32 => 4,
            Kind::U64 | Kind::I64 | Kind::F64 => 8,
            Kind::Text | Kind::List => 0,
        }
    }

    /// The value of a number or truth value.
    pub(super) fn scalar(self, b: &[u8]) -> Option<Value> {
        let mut wide = [0; 8];
        wide[..b.len()].copy_from_slice(b);
        let bits = u64::from_le_bytes(wide);
        // Shifted up and down again, so that the sign is kept.
        let signed = |bytes: usize| bits.cast_signed() << (64 - 8 * bytes) >> (64 - 8 * bytes);
        Some(match self {
            Kind::U8 | Kind::U16 | Kind::U32 => Value::Int(bits.cast_signed()),
            Kind::U64 => Value::Int(i64::try_from(bits).unwrap_or(i64::MAX)),
            Kind::I8 | Kind::I16 | Kind::I32 | Kind::I64 => Value::Int(signed(self.bytes())),
            Kind::F32 => Value::Float(decimal(f32::from_bits(bits as u32))),
            Kind::F64 => Value::Float(f64::from_bits(bits)),
            Kind::Bool if bits < 2 => Value::Bool(bits == 1),
            _ => return None,
        })
    }
}

/// The f64 that is written as the f32 is: 0.22 of what 0.22 was rounded to, so that a number of a
/// config.json comes back as it was.
fn decimal(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

/// Reads the elements of a list of a file that was walked over before.
pub(super) struct Items<'a> {
    file: &'a [u8],
    kind: Kind,
    left: usize,
    at: usize,
}

impl<'a> Items<'a> {
    pub fn new(file: &'a [u8], kind: Kind, elements: &Elements) -> Self {
        Items {
            file,
            kind,
            left: elements.count,
            at: elements.bytes.start,
        }
    }

    fn take(&mut self, bytes: usize) -> Option<&'a [u8]> {
        let found = self.file.get(self.at..self.at.checked_add(bytes)?)?;
        self.at += bytes;
        Some(found)
    }

    fn number(&mut self, kind: Kind) -> Option<u64> {
        match kind.scalar(self.take(kind.bytes())?)? {
            Value::Int(n) => u64::try_from(n).ok(),
            _ => None,
        }
    }

    /// The next text's bytes, if the elements are texts.
    pub fn text(&mut self) -> Option<&'a [u8]> {
        if self.kind != Kind::Text || self.left == 0 {
            return None;
        }
        self.left -= 1;
        let length = self.number(Kind::U64)?;
        self.take(usize::try_from(length).ok()?)
    }
}

impl Iterator for Items<'_> {
    type Item = Value;

    /// The next number or truth value; texts have their own reader, and lists in lists are of no use.
    fn next(&mut self) -> Option<Value> {
        if self.left == 0 || matches!(self.kind, Kind::Text | Kind::List) {
            return None;
        }
        self.left -= 1;
        let bytes = self.take(self.kind.bytes())?;
        // A truth value that is neither 0 nor 1 ends the list.
        self.kind.scalar(bytes)
    }
}

/// Longest list that expressions see: values for each block of a model.
const SHOWN: usize = 1 << 14;

impl Value {
    /// The value as expressions see it; none for texts that are no UTF-8 and for long lists.
    pub(super) fn plain(&self, file: &[u8]) -> Option<Plain> {
        Some(match self {
            Value::Int(n) => Plain::Int(*n),
            Value::Float(f) => Plain::Float(*f),
            Value::Bool(b) => Plain::Bool(*b),
            Value::Text(range) => {
                Plain::Text(std::str::from_utf8(file.get(range.clone())?).ok()?.into())
            }
            Value::List(_, elements) if elements.count > SHOWN => return None,
            Value::List(Kind::Text, elements) => {
                let mut items = Items::new(file, Kind::Text, elements);
                let texts = std::iter::from_fn(|| items.text());
                let nodes: Option<Vec<Node>> = texts
                    .map(|t| Some(Plain::Text(std::str::from_utf8(t).ok()?.into()).into()))
                    .collect();
                Plain::List(nodes?)
            }
            Value::List(kind, elements) => {
                let items = Items::new(file, *kind, elements);
                Plain::List(items.filter_map(|v| Some(v.plain(file)?.into())).collect())
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_with_their_signs_and_decimals() {
        let check = |kind: Kind, bytes: &[u8], expected: Option<Value>| {
            assert_eq!(kind.scalar(bytes), expected, "{kind:?} {bytes:?}");
        };
        check(Kind::I8, &[0xff], Some(Value::Int(-1)));
        check(Kind::U8, &[0xff], Some(Value::Int(255)));
        check(Kind::I16, &[0xfe, 0xff], Some(Value::Int(-2)));
        check(Kind::I32, &(-3i32).to_le_bytes(), Some(Value::Int(-3)));
        check(
            Kind::I64,
            &i64::MIN.to_le_bytes(),
            Some(Value::Int(i64::MIN)),
        );
        check(
            Kind::U64,
            &u64::MAX.to_le_bytes(),
            Some(Value::Int(i64::MAX)),
        );
        check(Kind::F32, &0.22f32.to_le_bytes(), Some(Value::Float(0.22)));
        check(Kind::F32, &1e-6f32.to_le_bytes(), Some(Value::Float(1e-6)));
        check(Kind::Bool, &[1], Some(Value::Bool(true)));
        check(Kind::Bool, &[2], None);
        for number in 0..13 {
            assert_eq!(Kind::numbered(number).map(|k| k as u32), Some(number));
        }
        assert_eq!(Kind::numbered(13), None);
    }
}
