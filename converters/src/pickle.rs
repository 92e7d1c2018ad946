//! Pickles, read as data: nothing is imported and nothing is called.
//!
//! A pickle is a program for a small stack machine. The opcodes of protocols 2 to 5 that build values are
//! followed here; what a pickle asks to call is looked up in a list of the caller's and kept as data
//! ([`Value::Call`]), and whatever is not on the list is refused with its name and place. Values lie in
//! one list and name each other by number, so depth and cycles cost nothing; texts are slices of the file.
//!
//! Source of the opcodes: Python's `pickletools`.

use std::collections::HashMap;

/// A value's number.
pub(crate) type Id = u32;

/// Most values, and most memo entries. Checkpoints of forty thousand tensors have a million.
const MAX_VALUES: usize = 4 << 20;
/// Most marks that wait for their values.
const MAX_MARKS: usize = 1 << 16;
/// Most bytes of a pickle.
pub(crate) const MAX_BYTES: usize = 64 << 20;
/// Most refused calls that are kept; one is enough to refuse a file.
const MAX_REFUSED: usize = 64;

/// What a pickle may hold.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    /// A whole number beyond 64 bits: its bytes, the lowest first.
    Long(&'a [u8]),
    Float(f64),
    Text(&'a str),
    Bytes(&'a [u8]),
    List(Vec<Id>),
    Tuple(Vec<Id>),
    /// Entries in their order; of equal keys the last counts.
    Dict(Vec<(Id, Id)>),
    /// A name, which is looked up nowhere.
    Global {
        module: &'a str,
        name: &'a str,
    },
    /// What a known function would make of its arguments: two values' numbers.
    Call(Id, Id),
    /// What stands elsewhere in the file: a description of it.
    Persistent(Id),
    /// Something that does not matter: a set, an object with settings.
    Opaque,
}

/// What to do when a pickle asks for a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    /// It makes a mapping, whose entries follow.
    Mapping,
    /// The caller knows what it means.
    Call,
    /// It makes something that does not matter.
    Plain,
}

/// A call that was not made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refused {
    /// The opcode's place in the file.
    pub at: usize,
    /// What would have been called, as `module.name`.
    pub what: String,
}

/// A pickle that was read.
#[derive(Debug)]
pub(crate) struct Pickle<'a> {
    values: Vec<Value<'a>>,
    /// The value that it is of.
    pub root: Id,
    /// Where it ends in the file.
    pub end: usize,
    /// What it asks to call and what is not known.
    pub refused: Vec<Refused>,
}

impl<'a> Pickle<'a> {
    /// Reads the pickle that begins at byte `start` of `file`. `known` says what may be asked for, by
    /// module and name.
    pub fn read(
        file: &'a [u8],
        start: usize,
        known: fn(&str, &str) -> Option<Known>,
    ) -> Result<Self, String> {
        let end = file.len().min(start.saturating_add(MAX_BYTES));
        let mut machine = Machine {
            bytes: file.get(..end).unwrap_or_default(),
            cut: end < file.len(),
            at: start,
            op: start,
            values: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            copied: 0,
            refused: Vec::new(),
            known,
        };
        let root = machine
            .run()
            .map_err(|why| format!("pickle, byte {}: {why}", machine.op))?;
        Ok(Pickle {
            values: machine.values,
            root,
            end: machine.at,
            refused: machine.refused,
        })
    }

    /// All values' numbers.
    pub fn ids(&self) -> std::ops::Range<Id> {
        0..self.values.len() as Id
    }

    /// A value.
    pub fn get(&self, id: Id) -> &Value<'a> {
        self.values.get(id as usize).unwrap_or(&Value::None)
    }

    /// The value that the pickle is of.
    pub fn value(&self) -> &Value<'a> {
        self.get(self.root)
    }

    /// A text.
    pub fn text(&self, id: Id) -> Option<&'a str> {
        match self.get(id) {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A count, an offset.
    pub fn size(&self, id: Id) -> Option<usize> {
        match self.get(id) {
            Value::Int(n) => usize::try_from(*n).ok(),
            _ => None,
        }
    }

    /// The values of a tuple or of a list.
    pub fn items(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Value::Tuple(items) | Value::List(items) => Some(items),
            _ => None,
        }
    }

    /// Module and name.
    pub fn global(&self, id: Id) -> Option<(&'a str, &'a str)> {
        match self.get(id) {
            Value::Global { module, name } => Some((module, name)),
            _ => None,
        }
    }
}

struct Machine<'a> {
    /// The file up to the most that is read.
    bytes: &'a [u8],
    /// Whether the file goes on behind them.
    cut: bool,
    at: usize,
    /// Where the opcode stands that is followed now.
    op: usize,
    values: Vec<Value<'a>>,
    stack: Vec<Id>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u64, Id>,
    /// Entries that were copied from one mapping to another.
    copied: usize,
    refused: Vec<Refused>,
    known: fn(&str, &str) -> Option<Known>,
}

type Step<T> = Result<T, String>;

impl<'a> Machine<'a> {
    fn run(&mut self) -> Step<Id> {
        loop {
            self.op = self.at;
            let [op] = self.array()?;
            match op {
                b'.' => return self.pop(),
                0x80 => {
                    let [version] = self.array()?;
                    if version > 5 {
                        return Err(format!("protocol {version}; 2 to 5 are read"));
                    }
                }
                // A frame says only how much to fetch at once.
                0x95 => {
                    let length = u64::from_le_bytes(self.array()?);
                    let left = (self.bytes.len() - self.at) as u64;
                    if length > left && !self.cut {
                        return Err(format!("a frame of {length} bytes, but {left} follow"));
                    }
                }
                b'N' => self.push(Value::None)?,
                0x88 => self.push(Value::Bool(true))?,
                0x89 => self.push(Value::Bool(false))?,
                b'J' => {
                    let n = i32::from_le_bytes(self.array()?);
                    self.push(Value::Int(n.into()))?;
                }
                b'K' => {
                    let [n] = self.array()?;
                    self.push(Value::Int(n.into()))?;
                }
                b'M' => {
                    let n = u16::from_le_bytes(self.array()?);
                    self.push(Value::Int(n.into()))?;
                }
                0x8a | 0x8b => self.long(op)?,
                b'G' => {
                    let value = f64::from_be_bytes(self.array()?);
                    self.push(Value::Float(value))?;
                }
                b'X' | 0x8c | 0x8d => {
                    let text = self.counted(op, [0x8c, b'X', 0x8d])?;
                    let text = std::str::from_utf8(text)
                        .map_err(|e| format!("byte {} of a text is not UTF-8", e.valid_up_to()))?;
                    self.push(Value::Text(text))?;
                }
                // Texts of Python 2.
                b'T' | b'U' => {
                    let bytes = self.counted(op, [b'U', b'T', 0])?;
                    self.push(std::str::from_utf8(bytes).map_or(Value::Bytes(bytes), Value::Text))?;
                }
                b'B' | b'C' | 0x8e => {
                    let bytes = self.counted(op, [b'C', b'B', 0x8e])?;
                    self.push(Value::Bytes(bytes))?;
                }
                // Bytes that may be changed, and how Python hands them over: none matters.
                0x96 => {
                    self.counted(op, [0, 0, 0x96])?;
                    self.push(Value::Opaque)?;
                }
                b'(' => {
                    if self.marks.len() >= MAX_MARKS {
                        return Err(format!("more than {MAX_MARKS} marks"));
                    }
                    self.marks.push(self.stack.len());
                }
                b'0' => {
                    // The mark itself may be what is taken away.
                    if self.marks.last() == Some(&self.stack.len()) {
                        self.marks.pop();
                    } else {
                        self.pop()?;
                    }
                }
                b'1' => {
                    self.marked()?;
                }
                b'2' => {
                    let top = self.top()?;
                    self.again(top)?;
                }
                b']' => self.push(Value::List(Vec::new()))?,
                b')' => self.push(Value::Tuple(Vec::new()))?,
                b'}' => self.push(Value::Dict(Vec::new()))?,
                0x8f => self.push(Value::Opaque)?,
                b'l' => {
                    let items = self.marked()?;
                    self.push(Value::List(items))?;
                }
                b't' => {
                    let items = self.marked()?;
                    self.push(Value::Tuple(items))?;
                }
                0x91 => {
                    self.marked()?;
                    self.push(Value::Opaque)?;
                }
                b'd' => {
                    let items = self.marked()?;
                    self.push(Value::Dict(pairs(&items)?))?;
                }
                0x85..=0x87 => {
                    let count = usize::from(op - 0x84);
                    let mut items = Vec::with_capacity(count);
                    for _ in 0..count {
                        items.push(self.pop()?);
                    }
                    items.reverse();
                    self.push(Value::Tuple(items))?;
                }
                b'a' => {
                    let item = self.pop()?;
                    self.append(&[item])?;
                }
                b'e' | 0x90 => {
                    let items = self.marked()?;
                    self.append(&items)?;
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set(&[key, value])?;
                }
                b'u' => {
                    let items = self.marked()?;
                    self.set(&items)?;
                }
                b'q' => {
                    let [n] = self.array()?;
                    self.remember(n.into())?;
                }
                b'r' => {
                    let n = u32::from_le_bytes(self.array()?);
                    self.remember(n.into())?;
                }
                0x94 => self.remember(self.memo.len() as u64)?,
                b'h' => {
                    let [n] = self.array()?;
                    self.recall(n.into())?;
                }
                b'j' => {
                    let n = u32::from_le_bytes(self.array()?);
                    self.recall(n.into())?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.push(Value::Global { module, name })?;
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    match (self.value(module), self.value(name)) {
                        (Value::Text(module), Value::Text(name)) => {
                            let global = Value::Global { module, name };
                            self.push(global)?;
                        }
                        _ => return Err("a global's module and name are no texts".into()),
                    }
                }
                b'Q' => {
                    let id = self.pop()?;
                    self.push(Value::Persistent(id))?;
                }
                b'R' | 0x81 => {
                    let (args, what) = (self.pop()?, self.pop()?);
                    self.call(what, args)?;
                }
                0x92 => {
                    let (_, args, what) = (self.pop()?, self.pop()?, self.pop()?);
                    self.call(what, args)?;
                }
                b'o' => {
                    let items = self.marked()?;
                    let Some((what, args)) = items.split_first() else {
                        return Err("an object without a class".into());
                    };
                    let args = self.add(Value::Tuple(args.to_vec()))?;
                    self.call(*what, args)?;
                }
                b'i' => {
                    let (module, name) = (self.line()?, self.line()?);
                    let items = self.marked()?;
                    let what = self.add(Value::Global { module, name })?;
                    let args = self.add(Value::Tuple(items))?;
                    self.call(what, args)?;
                }
                b'b' => {
                    self.pop()?;
                    // Attributes of something that is data here are none of ours; those of a name
                    // would change what it means for all.
                    let on = self.top()?;
                    if let Value::Global { .. } = self.value(on) {
                        self.refuse(on, "the attributes of ");
                    }
                }
                0x82..=0x84 => {
                    self.op_refused("a name by its number in copyreg's registry");
                    let length = [1, 2, 4][usize::from(op - 0x82)];
                    self.take(length)?;
                    self.push(Value::Opaque)?;
                }
                0x97 | 0x98 => return Err("its bytes are in another file".into()),
                b'I' | b'L' | b'F' | b'S' | b'V' | b'p' | b'g' | b'P' => {
                    return Err("it is of protocol 0, and 2 to 5 are read".into());
                }
                other => return Err(format!("there is no opcode {other:#04x}")),
            }
        }
    }

    fn value(&self, id: Id) -> &Value<'a> {
        self.values.get(id as usize).unwrap_or(&Value::None)
    }

    fn take(&mut self, count: usize) -> Step<&'a [u8]> {
        let left = self.bytes.len() - self.at;
        if count > left {
            return Err(match self.cut {
                true => format!("more than the {MAX_BYTES} bytes that are read of a pickle"),
                false => format!("{count} bytes should follow, but {left} do"),
            });
        }
        let taken = &self.bytes[self.at..self.at + count];
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        let taken = self.take(N)?;
        taken.try_into().map_err(|_| String::new())
    }

    /// Bytes behind their count, whose own width the opcode tells: 1, 4 or 8 bytes.
    fn counted(&mut self, op: u8, widths: [u8; 3]) -> Step<&'a [u8]> {
        let count = if op == widths[0] {
            let [n] = self.array()?;
            n.into()
        } else if op == widths[1] {
            u32::from_le_bytes(self.array()?).into()
        } else {
            u64::from_le_bytes(self.array()?)
        };
        self.take(usize::try_from(count).unwrap_or(usize::MAX))
    }

    /// A text that ends with its line.
    fn line(&mut self) -> Step<&'a str> {
        const MAX_LINE: usize = 1024;
        let rest = &self.bytes[self.at..];
        let end = rest.iter().take(MAX_LINE).position(|b| *b == b'\n');
        let line = self.take(end.ok_or("a name without an end")?)?;
        self.take(1)?;
        std::str::from_utf8(line).map_err(|_| "a name that is not UTF-8".into())
    }

    fn long(&mut self, op: u8) -> Step<()> {
        let count = match op {
            0x8a => {
                let [n] = self.array()?;
                i32::from(n)
            }
            _ => i32::from_le_bytes(self.array()?),
        };
        let count = usize::try_from(count).map_err(|_| "a number of less than no bytes")?;
        let bytes = self.take(count)?;
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        self.push(match bytes.len() {
            0..=8 => {
                let mut whole = [if negative { 0xff } else { 0 }; 8];
                whole[..bytes.len()].copy_from_slice(bytes);
                Value::Int(i64::from_le_bytes(whole))
            }
            _ => Value::Long(bytes),
        })
    }

    fn add(&mut self, value: Value<'a>) -> Step<Id> {
        if self.values.len() >= MAX_VALUES {
            return Err(format!("more than {MAX_VALUES} values"));
        }
        self.values.push(value);
        Ok((self.values.len() - 1) as Id)
    }

    fn push(&mut self, value: Value<'a>) -> Step<()> {
        let id = self.add(value)?;
        self.stack.push(id);
        Ok(())
    }

    /// What is above the last mark.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Step<Id> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn top(&self) -> Step<Id> {
        match self.stack.last() {
            Some(top) if self.stack.len() > self.floor() => Ok(*top),
            _ => Err("the stack is empty".into()),
        }
    }

    fn marked(&mut self) -> Step<Vec<Id>> {
        let mark = self.marks.pop().ok_or("there is no mark")?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn append(&mut self, items: &[Id]) -> Step<()> {
        let on = self.top()?;
        match self.values.get_mut(on as usize) {
            Some(Value::List(list)) => list.extend_from_slice(items),
            Some(Value::Opaque | Value::Call(..)) => {}
            _ => return Err("items for what is no list".into()),
        }
        Ok(())
    }

    fn set(&mut self, items: &[Id]) -> Step<()> {
        let entries = pairs(items)?;
        let on = self.top()?;
        match self.values.get_mut(on as usize) {
            Some(Value::Dict(dict)) => dict.extend(entries),
            Some(Value::Opaque | Value::Call(..)) => {}
            _ => return Err("entries for what is no dictionary".into()),
        }
        Ok(())
    }

    fn remember(&mut self, place: u64) -> Step<()> {
        let top = self.top()?;
        if self.memo.len() >= MAX_VALUES {
            return Err(format!("more than {MAX_VALUES} memo entries"));
        }
        self.memo.insert(place, top);
        Ok(())
    }

    fn recall(&mut self, place: u64) -> Step<()> {
        let found = self.memo.get(&place).copied();
        self.again(found.ok_or_else(|| format!("the memo has no entry {place}"))?)
    }

    /// Puts a value on the stack once more.
    fn again(&mut self, id: Id) -> Step<()> {
        // Values are counted, and so bound the stack elsewhere; here none is made.
        if self.stack.len() >= 2 * MAX_VALUES {
            return Err(format!("more than {} values on the stack", 2 * MAX_VALUES));
        }
        self.stack.push(id);
        Ok(())
    }

    /// Keeps a known call as data, and refuses every other.
    fn call(&mut self, what: Id, args: Id) -> Step<()> {
        let known = match self.value(what) {
            Value::Global { module, name } => (self.known)(module, name),
            _ => None,
        };
        let made = match known {
            Some(Known::Mapping) => {
                let entries = self.entries(args);
                self.copied += entries.len();
                if self.copied > MAX_VALUES {
                    return Err(format!("more than {MAX_VALUES} entries are copied"));
                }
                Value::Dict(entries)
            }
            Some(Known::Call) => Value::Call(what, args),
            Some(Known::Plain) => Value::Opaque,
            None => {
                self.refuse(what, "");
                Value::Opaque
            }
        };
        self.push(made)
    }

    /// The entries that a mapping is made with: one list of pairs, or none.
    fn entries(&self, args: Id) -> Vec<(Id, Id)> {
        let list = |id: Id| match self.value(id) {
            Value::Tuple(items) | Value::List(items) => Some(items),
            _ => None,
        };
        let Some([only]) = list(args).map(Vec::as_slice) else {
            return Vec::new();
        };
        match self.value(*only) {
            Value::Dict(entries) => entries.clone(),
            Value::Tuple(items) | Value::List(items) => {
                let pair = |id: &Id| match list(*id)?[..] {
                    [key, value] => Some((key, value)),
                    _ => None,
                };
                items.iter().filter_map(pair).collect()
            }
            _ => Vec::new(),
        }
    }

    fn refuse(&mut self, what: Id, of: &str) {
        let name = match self.value(what) {
            Value::Global { module, name } => {
                let short = |s: &str| -> String { s.chars().take(80).collect() };
                format!("{of}{}.{}", short(module), short(name))
            }
            _ => "something that is no name".into(),
        };
        self.op_refused(&name);
    }

    fn op_refused(&mut self, what: &str) {
        if self.refused.len() < MAX_REFUSED {
            self.refused.push(Refused {
                at: self.op,
                what: what.into(),
            });
        }
    }
}

/// Keys and values that take turns.
fn pairs(items: &[Id]) -> Step<Vec<(Id, Id)>> {
    let (pairs, rest) = items.as_chunks::<2>();
    match rest {
        [] => Ok(pairs.iter().map(|[key, value]| (*key, *value)).collect()),
        _ => Err("a key without a value".into()),
    }
}
