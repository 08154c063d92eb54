//! What a pickle's globals, calls and persistent values stand for: tensors, storages and dicts, made here.

use super::super::globals::Callable;
use super::{Fault, Id, MAX_AXES, Machine, Node, Storage, Tensor};

impl<'a> Machine<'a> {
    pub(super) fn global(&mut self, module: &str, name: &str) -> Result<(), Fault> {
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

    pub(super) fn call(&mut self, callable: Id, arguments: Id) -> Result<(), Fault> {
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
    pub(super) fn persistent(&mut self, id: Id) -> Result<(), Fault> {
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
