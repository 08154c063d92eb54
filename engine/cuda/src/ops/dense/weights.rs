//! Copies of parameters in the type and layout that products take: made at first use, brought up to date after the
//! parameters change.

use std::collections::HashMap;

use crate::device::{Device, Memory};
use crate::error::CudaError;
use crate::launch::{Shape, launch};
use crate::view::{Address, Element, View};

/// Batch norm with running statistics, to be folded into the weights before it: one value an output channel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fold {
    /// γ, β, running mean, running variance.
    pub norm: [View; 4],
    /// Epsilon.
    pub eps: f32,
}

/// How weights lie in memory: from `[rows, channels, taps]` to `[rows, ld]`, a row holding `[taps, channels]` and zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Layout {
    channels: usize,
    taps: usize,
    ld: usize,
}

impl Layout {
    /// As they are, with rows of `row` elements.
    pub(crate) fn plain(row: usize) -> Self {
        Layout { channels: row, taps: 1, ld: row }
    }

    /// Channels last.
    pub(crate) fn channels_last(channels: usize, taps: usize) -> Self {
        if channels == 1 { Layout::plain(taps) } else { Layout { channels, taps, ld: channels * taps } }
    }

    /// The same with rows of `ld` elements.
    pub(crate) fn padded(self, ld: usize) -> Self {
        Layout { ld, ..self }
    }

    fn is_plain(self) -> bool {
        self.taps == 1 && self.ld == self.channels
    }
}

/// One copy, as `kernels/dense.cu` knows it (`WeightCopy`).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Copy {
    from: View,
    to: View,
    bias: View,
    norm: [View; 4],
    first: i64,
    channels: i64,
    taps: i64,
    ld: i64,
    eps: f32,
    pad: u32,
}

/// Elements of a copy that a block writes.
const COPY_BLOCK: usize = 2048;

impl Copy {
    fn new(from: View, fold: Option<(Fold, View)>, layout: Layout, to: View) -> Self {
        let (norm, eps, bias) =
            fold.map_or(([View::none(); 4], 0.0, View::none()), |(fold, bias)| (fold.norm, fold.eps, bias));
        let [channels, taps, ld] = [layout.channels, layout.taps, layout.ld].map(|n| n as i64);
        Copy { from, to, bias, norm, first: 0, channels, taps, ld, eps, pad: 0 }
    }

    fn blocks(&self) -> usize {
        self.to.len.div_ceil(COPY_BLOCK)
    }

    fn sources(&self) -> [View; 6] {
        let [gamma, beta, mean, var] = self.norm;
        [self.from, self.bias, gamma, beta, mean, var]
    }

    fn key(&self) -> Key {
        Key {
            sources: self.sources().map(|v| (v.address, v.len)),
            eps: self.eps.to_bits(),
            element: self.to.element as u32,
            layout: [self.channels, self.taps, self.ld],
        }
    }

    /// Makes the copy in a launch of its own.
    fn run(&self, dev: &Device) -> Result<(), CudaError> {
        let [gamma, beta, mean, var] = self.norm;
        launch!(
            dev,
            "dense",
            "dense_weight",
            Shape::row(self.blocks(), 256),
            self.from,
            self.to,
            self.bias,
            gamma,
            beta,
            mean,
            var,
            self.channels,
            self.taps,
            self.ld,
            self.eps,
        )
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    sources: [(Address, usize); 6],
    eps: u32,
    element: u32,
    layout: [i64; 3],
}

/// Addresses from the first to behind the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range(Address, Address);

impl Range {
    fn of(v: View) -> Self {
        Range(v.address, v.address + v.bytes() as u64)
    }

    fn holds(self, v: View) -> bool {
        let v = Range::of(v);
        self.0 <= v.0 && v.1 <= self.1
    }

    fn meets(self, other: Range) -> bool {
        self.0 < other.1 && other.0 < self.1
    }
}

/// Copies of one store's parameters that are refreshed together.
#[derive(Debug)]
struct Group {
    store: Range,
    /// Copies with a batch norm folded in: evaluation reads them, training does not.
    folded: bool,
    copies: Vec<Copy>,
    index: HashMap<Key, usize>,
    memory: Vec<Memory>,
    table: Option<Memory>,
    /// Shorter tables of before: recorded launches may read them.
    retired: Vec<Memory>,
    blocks: usize,
    stale: bool,
}

impl Group {
    fn new(store: Range, folded: bool) -> Self {
        Group {
            store,
            folded,
            copies: Vec::new(),
            index: HashMap::new(),
            memory: Vec::new(),
            table: None,
            retired: Vec::new(),
            blocks: 0,
            stale: false,
        }
    }

    fn refresh(&mut self, dev: &Device) -> Result<(), CudaError> {
        if let Some(table) = self.table.as_ref().filter(|_| self.stale) {
            let count = self.copies.len();
            let table = table.view(count * size_of::<Copy>(), Element::U8);
            launch!(dev, "dense", "dense_weights", Shape::row(self.blocks, 256), table, count as i32, 0i64)?;
        }
        self.stale = false;
        Ok(())
    }

    /// A new copy, made at once.
    fn add(&mut self, dev: &Device, copy: Copy, key: Key) -> Result<View, CudaError> {
        let memory = dev.alloc(copy.to.bytes())?;
        let to = memory.view(copy.to.len, copy.to.element);
        let copy = Copy { to, first: self.blocks as i64, ..copy };
        copy.run(dev)?;
        let (count, bytes) = (self.copies.len(), size_of::<Copy>());
        if self.table.as_ref().is_none_or(|t| t.bytes() < (count + 1) * bytes) {
            let table = dev.alloc((2 * count).max(64) * bytes)?;
            dev.upload(&self.copies, table.view(count * bytes, Element::U8))?;
            self.retired.extend(self.table.replace(table));
        }
        if let Some(table) = &self.table {
            dev.upload(&[copy], table.view((count + 1) * bytes, Element::U8).slice(count * bytes, bytes))?;
        }
        self.blocks += copy.blocks();
        self.copies.push(copy);
        self.index.insert(key, count);
        self.memory.push(memory);
        Ok(to)
    }
}

/// Copies of weights as products take them.
#[derive(Debug, Default)]
pub(crate) struct Weights {
    /// Memory that is known to hold parameters: it was said once that they changed.
    stores: Vec<Range>,
    groups: Vec<Group>,
}

impl Weights {
    /// Notes that the parameters in `range` changed. What is never named here is no parameter, and not kept a copy of.
    pub(crate) fn changed(&mut self, range: View) {
        if !self.stores.iter().any(|s| s.holds(range)) {
            self.stores.push(Range::of(range));
        }
        let range = Range::of(range);
        for group in self.groups.iter_mut().filter(|g| !g.stale && g.store.meets(range)) {
            let reads = |c: &Copy| c.sources().iter().any(|v| range.meets(Range::of(*v)));
            group.stale = group.copies.iter().any(reads);
        }
    }

    /// Forgets parameters in memory that is given back.
    pub(crate) fn forget(&mut self, memory: View) {
        let memory = Range::of(memory);
        if self.stores.iter().any(|s| s.meets(memory)) {
            self.stores.retain(|s| !s.meets(memory));
            self.groups.retain(|g| !g.store.meets(memory));
        }
    }

    /// The copies that changed, in one launch for each store.
    fn refresh(&mut self, dev: &Device, folded: bool) -> Result<(), CudaError> {
        self.groups.iter_mut().filter(|g| folded || !g.folded).try_for_each(|g| g.refresh(dev))
    }

    /// The memory of `copy`: kept, if all that it is made of are one store's parameters.
    fn kept(&mut self, dev: &Device, copy: Copy) -> Result<Option<View>, CudaError> {
        let held = |s: &&Range| copy.sources().iter().all(|v| v.len == 0 || s.holds(*v));
        let Some(&store) = self.stores.iter().find(held) else { return Ok(None) };
        let folded = copy.norm[0].len > 0;
        let group = self.groups.iter().position(|g| g.store == store && g.folded == folded);
        let group = group.unwrap_or_else(|| {
            self.groups.push(Group::new(store, folded));
            self.groups.len() - 1
        });
        let (group, key) = (&mut self.groups[group], copy.key());
        group.refresh(dev)?;
        match group.index.get(&key) {
            Some(&i) => Ok(Some(group.copies[i].to)),
            None => group.add(dev, copy, key).map(Some),
        }
    }
}

/// Brings the copies of weights that changed up to date; those with a batch norm folded in where `folded` says so (they
/// are otherwise at their next use).
pub(crate) fn refresh_weights(dev: &Device, folded: bool) -> Result<(), CudaError> {
    dev.weights.borrow_mut().refresh(dev, folded)
}

fn copy_of(dev: &Device, copy: Copy) -> Result<View, CudaError> {
    if let Some(view) = dev.weights.borrow_mut().kept(dev, copy)? {
        return Ok(view);
    }
    // A value, new in each walk.
    let copy = Copy { to: dev.scratch(copy.to.len, copy.to.element)?, ..copy };
    copy.run(dev)?;
    Ok(copy.to)
}

/// Weights `[rows, channels, taps]` in another type or layout; themselves, where they have both already.
pub(crate) fn weights(
    dev: &Device,
    from: View,
    fold: Option<Fold>,
    element: Element,
    layout: Layout,
) -> Result<View, CudaError> {
    if fold.is_none() && layout.is_plain() && from.element == element {
        return Ok(from);
    }
    let rows = from.len / (layout.channels * layout.taps).max(1);
    // What would be kept has no address yet.
    let to = View::new(0, rows * layout.ld, element);
    copy_of(dev, Copy::new(from, fold.map(|f| (f, View::none())), layout, to))
}

/// A bias, where there is one after folding, in another type.
pub(crate) fn offset(
    dev: &Device,
    bias: Option<View>,
    fold: Option<Fold>,
    element: Element,
) -> Result<Option<View>, CudaError> {
    let Some(fold) = fold else {
        return bias.map(|b| weights(dev, b, None, element, Layout::plain(b.len))).transpose();
    };
    let to = View::new(0, fold.norm[0].len, element);
    let copy = Copy::new(View::none(), Some((fold, bias.unwrap_or(View::none()))), Layout::plain(1), to);
    copy_of(dev, copy).map(Some)
}
