//! Pickles, read by an interpreter of whitelisted opcodes that calls nothing: tensors, containers, numbers and strings
//! come out. A callable that the whitelist lacks is refused by its name, an opcode by its number.
//!
//! Opcodes as in CPython's `Lib/pickletools.py`: all of protocols 2 to 5 but those of extensions, of out-of-band
//! buffers and of the text protocol 0.

use std::collections::HashMap;

use super::element::Element;
use super::globals::Callable;

/// Why a pickle is not read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    /// Byte of the opcode, from the start of the pickle.
    pub at: usize,
    pub message: String,
    /// Whether the pickle is whole, but asks for something that is not done.
    pub refused: bool,
}

/// A value, by its position in [`Pickle::nodes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Id(u32);

#[derive(Clone, Debug)]
pub(super) enum Node<'a> {
    None,
    Bool(bool),
    Int(i64),
    /// An integer beyond 64 bits, two's complement, little-endian.
    Long(&'a [u8]),
    Text(&'a str),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Callable(Callable),
    Storage(Box<Storage<'a>>),
    Tensor(Box<Tensor<'a>>),
    /// A value that no weight depends on: a float, bytes, a date, options of a training.
    Inert,
}

/// A storage that the file holds under a key.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Storage<'a> {
    pub element: Element,
    pub key: &'a str,
    /// First element of this view of it, and elements in all.
    pub offset: usize,
    pub len: usize,
    /// Elements of the whole.
    pub whole: usize,
}

/// A view of a storage.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tensor<'a> {
    pub storage: Storage<'a>,
    pub offset: usize,
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
}

/// What a pickle holds.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    nodes: Vec<Node<'a>>,
    pub root: Id,
    /// Bytes read.
    pub end: usize,
}

/// Greatest number of values and of memo entries. A checkpoint of a thousand tensors with its optimiser's state has
/// some 10⁵.
const MAX_NODES: usize = 1 << 22;
/// Greatest number of axes.
const MAX_AXES: usize = 16;

impl<'a> Pickle<'a> {
    /// Reads the pickle at the start of `bytes`, up to its STOP.
    pub fn read(bytes: &'a [u8]) -> Result<Pickle<'a>, Fault> {
        let mut machine = Machine {
            bytes,
            at: 0,
            opcode_at: 0,
            nodes: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            copied: 0,
        };
        let root = machine.run()?;
        Ok(Pickle { nodes: machine.nodes, root, end: machine.at })
    }

    pub fn node(&self, id: Id) -> &Node<'a> {
        &self.nodes[id.0 as usize]
    }

    /// The storages that tensors view.
    pub fn storages(&self) -> impl Iterator<Item = &Storage<'a>> {
        self.nodes.iter().filter_map(|n| if let Node::Storage(s) = n { Some(&**s) } else { None })
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    opcode_at: usize,
    nodes: Vec<Node<'a>>,
    stack: Vec<Id>,
    /// Heights of the stack at the marks.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    /// Values copied rather than read, which the pickle's length does not bound.
    copied: usize,
}

impl<'a> Machine<'a> {
    fn broken<T>(&self, message: impl Into<String>) -> Result<T, Fault> {
        Err(Fault { at: self.opcode_at, message: message.into(), refused: false })
    }

    fn refuse<T>(&self, message: impl Into<String>) -> Result<T, Fault> {
        Err(Fault { at: self.opcode_at, message: message.into(), refused: true })
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], Fault> {
        match self.at.checked_add(n).and_then(|end| self.bytes.get(self.at..end)) {
            Some(bytes) => {
                self.at += n;
                Ok(bytes)
            }
            None => self.broken("the pickle ends in the middle of a value"),
        }
    }

    fn number<const N: usize>(&mut self) -> Result<u64, Fault> {
        let mut le = [0; 8];
        le[..N].copy_from_slice(self.take(N)?);
        Ok(u64::from_le_bytes(le))
    }

    fn length<const N: usize>(&mut self) -> Result<usize, Fault> {
        let n = self.number::<N>()?;
        usize::try_from(n).or_else(|_| self.broken(format!("a length of {n}")))
    }

    fn counted<const N: usize>(&mut self) -> Result<&'a [u8], Fault> {
        let n = self.length::<N>()?;
        self.take(n)
    }

    fn line(&mut self) -> Result<&'a str, Fault> {
        let rest = &self.bytes[self.at..];
        let Some(n) = rest.iter().position(|&b| b == b'\n') else {
            return self.broken("a name without end");
        };
        self.at += n + 1;
        std::str::from_utf8(&rest[..n]).or_else(|_| self.broken("a name that is no text"))
    }

    fn push(&mut self, node: Node<'a>) -> Result<(), Fault> {
        if self.nodes.len() >= MAX_NODES {
            return self.broken(format!("more than {MAX_NODES} values"));
        }
        self.stack.push(Id(self.nodes.len() as u32));
        self.nodes.push(node);
        Ok(())
    }

    fn copy(&mut self, values: usize) -> Result<(), Fault> {
        self.copied += values;
        if self.copied > MAX_NODES { self.broken(format!("more than {MAX_NODES} values")) } else { Ok(()) }
    }

    fn pop(&mut self) -> Result<Id, Fault> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.pop() {
            Some(id) if self.stack.len() >= floor => Ok(id),
            _ => self.broken("a value is taken from an empty stack"),
        }
    }

    fn top(&self) -> Result<Id, Fault> {
        self.stack.last().copied().map_or_else(|| self.broken("an empty stack"), Ok)
    }

    /// The values above the last mark.
    fn to_mark(&mut self) -> Result<Vec<Id>, Fault> {
        match self.marks.pop() {
            Some(height) => Ok(self.stack.split_off(height)),
            None => self.broken("a mark is missing"),
        }
    }

    fn node(&self, id: Id) -> &Node<'a> {
        &self.nodes[id.0 as usize]
    }

    fn text(&mut self, bytes: &'a [u8]) -> Result<(), Fault> {
        match std::str::from_utf8(bytes) {
            Ok(text) => self.push(Node::Text(text)),
            Err(_) => self.push(Node::Inert),
        }
    }

    fn remember(&mut self, key: u64) -> Result<(), Fault> {
        let top = self.top()?;
        if self.memo.len() >= MAX_NODES {
            return self.broken(format!("more than {MAX_NODES} remembered values"));
        }
        match u32::try_from(key) {
            Ok(key) => {
                self.memo.insert(key, top);
                Ok(())
            }
            Err(_) => self.broken("a memo index beyond 32 bits"),
        }
    }

    fn recall(&mut self, key: u64) -> Result<(), Fault> {
        match u32::try_from(key).ok().and_then(|key| self.memo.get(&key)) {
            Some(&id) => {
                self.stack.push(id);
                Ok(())
            }
            None => self.broken(format!("memo {key} is empty")),
        }
    }

    fn run(&mut self) -> Result<Id, Fault> {
        loop {
            self.opcode_at = self.at;
            let opcode = self.take(1)?[0];
            match opcode {
                b'.' => return self.pop(),
                0x80 => {
                    let protocol = self.number::<1>()?;
                    if protocol > 5 {
                        return self.refuse(format!("pickle protocol {protocol}; up to 5 is read"));
                    }
                }
                // A frame's length: an aid to reading from a stream.
                0x95 => {
                    self.take(8)?;
                }
                b'(' => {
                    if self.marks.len() >= MAX_NODES {
                        return self.broken("too many marks");
                    }
                    self.marks.push(self.stack.len());
                }
                b'0' => {
                    // POP takes a mark where no value lies above it.
                    if self.marks.last() == Some(&self.stack.len()) {
                        self.marks.pop();
                    } else {
                        self.pop()?;
                    }
                }
                b'1' => {
                    self.to_mark()?;
                }
                b'2' => {
                    let top = self.top()?;
                    self.stack.push(top);
                }
                b'N' => self.push(Node::None)?,
                0x88 => self.push(Node::Bool(true))?,
                0x89 => self.push(Node::Bool(false))?,
                b'K' => {
                    let n = self.number::<1>()?;
                    self.push(Node::Int(n as i64))?;
                }
                b'M' => {
                    let n = self.number::<2>()?;
                    self.push(Node::Int(n as i64))?;
                }
                b'J' => {
                    let n = self.number::<4>()? as u32 as i32;
                    self.push(Node::Int(i64::from(n)))?;
                }
                0x8a => {
                    let bytes = self.counted::<1>()?;
                    self.long(bytes)?;
                }
                0x8b => {
                    let bytes = self.counted::<4>()?;
                    self.long(bytes)?;
                }
                b'G' => {
                    self.take(8)?;
                    self.push(Node::Inert)?;
                }
                b'X' | b'T' => {
                    let bytes = self.counted::<4>()?;
                    self.text(bytes)?;
                }
                0x8c | b'U' => {
                    let bytes = self.counted::<1>()?;
                    self.text(bytes)?;
                }
                0x8d => {
                    let bytes = self.counted::<8>()?;
                    self.text(bytes)?;
                }
                b'C' => {
                    self.counted::<1>()?;
                    self.push(Node::Inert)?;
                }
                b'B' => {
                    self.counted::<4>()?;
                    self.push(Node::Inert)?;
                }
                0x8e | 0x96 => {
                    self.counted::<8>()?;
                    self.push(Node::Inert)?;
                }
                b')' => self.push(Node::Tuple(Vec::new()))?,
                b']' => self.push(Node::List(Vec::new()))?,
                b'}' => self.push(Node::Dict(Vec::new()))?,
                0x8f => self.push(Node::Inert)?,
                0x85..=0x87 => {
                    let mut items = Vec::with_capacity(3);
                    for _ in 0..opcode - 0x84 {
                        items.push(self.pop()?);
                    }
                    items.reverse();
                    self.push(Node::Tuple(items))?;
                }
                b't' => {
                    let items = self.to_mark()?;
                    self.push(Node::Tuple(items))?;
                }
                b'l' => {
                    let items = self.to_mark()?;
                    self.push(Node::List(items))?;
                }
                b'd' => {
                    let items = self.to_mark()?;
                    self.push(Node::Dict(Vec::new()))?;
                    self.set_items(items)?;
                }
                b'a' => {
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                b'e' => {
                    let items = self.to_mark()?;
                    self.append(items)?;
                }
                b's' => {
                    let value = self.pop()?;
                    let key = self.pop()?;
                    self.set_items(vec![key, value])?;
                }
                b'u' => {
                    let items = self.to_mark()?;
                    self.set_items(items)?;
                }
                // ADDITEMS to a set, a frozen set: no weight lies in one.
                0x90 => {
                    self.to_mark()?;
                }
                0x91 => {
                    self.to_mark()?;
                    self.push(Node::Inert)?;
                }
                b'h' => {
                    let key = self.number::<1>()?;
                    self.recall(key)?;
                }
                b'j' => {
                    let key = self.number::<4>()?;
                    self.recall(key)?;
                }
                b'q' => {
                    let key = self.number::<1>()?;
                    self.remember(key)?;
                }
                b'r' => {
                    let key = self.number::<4>()?;
                    self.remember(key)?;
                }
                0x94 => self.remember(self.memo.len() as u64)?,
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.global(module, name)?;
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let (&Node::Text(name), &Node::Text(module)) = (self.node(name), self.node(module)) else {
                        return self.broken("a global whose name is no text");
                    };
                    self.global(module, name)?;
                }
                // REDUCE and NEWOBJ: a callable or class, and its arguments.
                b'R' | 0x81 => {
                    let (arguments, callable) = (self.pop()?, self.pop()?);
                    self.call(callable, arguments)?;
                }
                0x92 => {
                    let (_, arguments, callable) = (self.pop()?, self.pop()?, self.pop()?);
                    self.call(callable, arguments)?;
                }
                b'b' => {
                    self.pop()?;
                    let object = self.top()?;
                    // Attributes of a container or tensor, such as a state dict's `_metadata`, hold no weights.
                    if !matches!(self.node(object), Node::Dict(_) | Node::Inert | Node::Tensor(_)) {
                        return self.broken("attributes of a value that has none");
                    }
                }
                b'Q' => {
                    let id = self.pop()?;
                    self.persistent(id)?;
                }
                _ => return self.refuse(format!("opcode {opcode:#04x} is none of those that are read")),
            }
        }
    }

    fn long(&mut self, bytes: &'a [u8]) -> Result<(), Fault> {
        if bytes.len() > 8 {
            return self.push(Node::Long(bytes));
        }
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let mut le = [if negative { 0xff } else { 0 }; 8];
        le[..bytes.len()].copy_from_slice(bytes);
        self.push(Node::Int(i64::from_le_bytes(le)))
    }

    fn append(&mut self, items: Vec<Id>) -> Result<(), Fault> {
        let list = self.top()?;
        match &mut self.nodes[list.0 as usize] {
            Node::List(held) => held.extend(items),
            Node::Inert => {}
            _ => return self.broken("items for a value that is no list"),
        }
        Ok(())
    }

    fn set_items(&mut self, items: Vec<Id>) -> Result<(), Fault> {
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return self.broken("a key without a value");
        }
        let dict = self.top()?;
        match &mut self.nodes[dict.0 as usize] {
            Node::Dict(held) => held.extend(pairs.iter().map(|&[k, v]| (k, v))),
            Node::Inert => {}
            _ => return self.broken("keys and values for a value that is no dict"),
        }
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str) -> Result<(), Fault> {
        match Callable::known(module, name) {
            Some(callable) => self.push(Node::Callable(callable)),
            None => self.refuse(format!(
                "the file asks for `{}.{}`; nothing of a checkpoint is executed, and only tensors and plain values \
                 are read",
                module.escape_debug(),
                name.escape_debug()
            )),
        }
    }

    fn items(&self, id: Id, of: &str) -> Result<&[Id], Fault> {
        match self.node(id) {
            Node::Tuple(items) => Ok(items),
            _ => self.broken(format!("{of} without arguments")),
        }
    }

    fn call(&mut self, callable: Id, arguments: Id) -> Result<(), Fault> {
        let what = match self.node(callable) {
            Node::Callable(what) => *what,
            // What an inert class gives may be called; it stays inert.
            Node::Inert => return self.push(Node::Inert),
            _ => return self.broken("a value that is called is no function"),
        };
        let items = self.items(arguments, "a call")?.to_vec();
        match (what, &items[..]) {
            (Callable::Inert, _) => self.push(Node::Inert),
            (Callable::Dict, []) => self.push(Node::Dict(Vec::new())),
            (Callable::Dict, &[pairs, ..]) => {
                let pairs = self.pairs(pairs)?;
                self.copy(pairs.len())?;
                self.push(Node::Dict(pairs))
            }
            (Callable::RebuildTensor, &[storage, offset, shape, strides, ..]) => {
                self.copy(MAX_AXES)?;
                let tensor = self.tensor(storage, offset, shape, strides)?;
                self.push(Node::Tensor(Box::new(tensor)))
            }
            // A parameter is its tensor; a subclass's tensor is made by the function that comes first.
            (Callable::RebuildParameter, &[tensor, ..]) => {
                self.stack.push(tensor);
                Ok(())
            }
            (Callable::RebuildFromType, &[function, _, arguments, ..]) => match self.node(function) {
                Node::Callable(Callable::RebuildFromType) => self.broken("a tensor's type within a tensor's type"),
                _ => self.call(function, arguments),
            },
            _ => self.broken(format!("{what:?} with {} arguments", items.len())),
        }
    }

    /// The keys and values of `OrderedDict([[key, value], …])`.
    fn pairs(&self, id: Id) -> Result<Vec<(Id, Id)>, Fault> {
        let list = match self.node(id) {
            Node::List(list) | Node::Tuple(list) => list,
            Node::Dict(pairs) => return Ok(pairs.clone()),
            _ => return self.broken("a dict of something that is no list"),
        };
        let pair = |&id: &Id| match self.node(id) {
            Node::List(pair) | Node::Tuple(pair) if pair.len() == 2 => Ok((pair[0], pair[1])),
            _ => self.broken("a dict of items that are no pairs"),
        };
        list.iter().map(pair).collect()
    }

    fn size(&self, id: Id) -> Result<usize, Fault> {
        match self.node(id) {
            Node::Int(n) => usize::try_from(*n).or_else(|_| self.broken(format!("a size of {n}"))),
            _ => self.broken("a size that is no integer"),
        }
    }

    fn sizes(&self, id: Id) -> Result<Vec<usize>, Fault> {
        let items = self.items(id, "a shape")?;
        if items.len() > MAX_AXES {
            return self.broken(format!("a tensor of {} axes", items.len()));
        }
        items.iter().map(|&id| self.size(id)).collect()
    }

    fn tensor(&self, storage: Id, offset: Id, shape: Id, strides: Id) -> Result<Tensor<'a>, Fault> {
        let Node::Storage(storage) = self.node(storage) else {
            return self.broken("a tensor without a storage");
        };
        Ok(Tensor {
            storage: (**storage).clone(),
            offset: self.size(offset)?,
            shape: self.sizes(shape)?,
            strides: self.sizes(strides)?,
        })
    }

    /// `("storage", type, key, location, length)`, with `(key, offset, length)` or None behind it in old files.
    fn persistent(&mut self, id: Id) -> Result<(), Fault> {
        let items = self.items(id, "a persistent value")?;
        let &[kind, class, key, _, len, ref view @ ..] = items else {
            return self.broken(format!("a persistent value of {} parts", items.len()));
        };
        match self.node(kind) {
            Node::Text("storage") => {}
            Node::Text(kind) => return self.refuse(format!("a persistent `{}`", kind.escape_debug())),
            _ => return self.broken("a persistent value of no kind"),
        }
        let (&Node::Callable(Callable::Storage(element)), &Node::Text(key)) = (self.node(class), self.node(key)) else {
            return self.broken("a storage without type or key");
        };
        let whole = self.size(len)?;
        let mut storage = Storage { element, key, offset: 0, len: whole, whole };
        if let Some(&view) = view.first()
            && !matches!(self.node(view), Node::None)
        {
            let &[_, offset, len] = self.items(view, "a view of a storage")? else {
                return self.broken("a view of a storage is no triple");
            };
            (storage.offset, storage.len) = (self.size(offset)?, self.size(len)?);
            if storage.offset.checked_add(storage.len).is_none_or(|end| end > whole) {
                return self.broken("a view reaches beyond its storage");
            }
        }
        self.push(Node::Storage(Box::new(storage)))
    }
}
