//! The backend that executors walk with.

use std::borrow::Cow;
use std::cell::RefCell;
use std::rc::Rc;

use mcpipe_cpu::norm::Norm;
use mcpipe_graph::backend::{Arg, BackendError, Forward as ForwardIo, Vjp as VjpIo};
use mcpipe_graph::op::Needs;
use mcpipe_graph::{Backend, Dtype, Layout, Node, Op, Part, Source, StepGraph, ValueId};

use crate::device::{Device, Memory};
use crate::error::CudaError;
use crate::ops;
use crate::view::{Element, Forward, Grad, View, Vjp};

/// What products and activations are rounded to. Parameters, their gradients, statistics and losses are always f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// f32 throughout.
    #[default]
    F32,
    /// f32 in memory; products round their operands to tf32 (10 bits of mantissa).
    Tf32,
    /// Activations and products' operands in bf16 (7 bits of mantissa), accumulated in f32.
    Bf16,
}

/// A range of device memory. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Buffer {
    memory: Option<Rc<Memory>>,
    start: usize,
    bytes: usize,
}

impl Buffer {
    /// All of `memory`.
    pub fn new(memory: Memory) -> Self {
        let bytes = memory.bytes();
        Buffer { memory: Some(Rc::new(memory)), start: 0, bytes }
    }

    /// `bytes` of it from `start` on.
    pub fn slice(&self, start: usize, bytes: usize) -> Self {
        assert!(start + bytes <= self.bytes, "{start} + {bytes} of {}", self.bytes);
        Buffer { memory: self.memory.clone(), start: self.start + start, bytes }
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its first `len` elements.
    pub fn view(&self, len: usize, element: Element) -> View {
        assert!(len * element.bytes() <= self.bytes, "{len} elements of {element:?} in {} bytes", self.bytes);
        let address = self.memory.as_ref().map_or(0, |m| m.view(0, Element::U8).address + self.start as u64);
        View::new(address, len, element)
    }
}

/// Runs nodes on a CUDA device.
#[derive(Clone, Debug)]
pub struct Cuda {
    device: Device,
    precision: Precision,
    /// The first failure of a copy; told at the next node.
    failed: Rc<RefCell<Option<CudaError>>>,
}

impl Cuda {
    /// A backend on `device`.
    pub fn new(device: Device, precision: Precision) -> Self {
        Cuda { device, precision, failed: Rc::default() }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Where the values of `part` lie.
    pub fn place(part: &Part<'_, Self>) -> View {
        whole(part)
    }

    fn layout(&self) -> DeviceLayout {
        DeviceLayout { precision: self.precision }
    }

    fn note(&self, ran: Result<(), CudaError>) {
        if let Err(e) = ran {
            self.failed.borrow_mut().get_or_insert(e);
        }
    }

    /// Ends an op: its scratch memory is free again, and a copy that failed before it is told here.
    fn end(&self, op: &'static str, label: &str, ran: Result<(), CudaError>) -> Result<(), BackendError> {
        self.device.release_scratch();
        let earlier = self.failed.borrow_mut().take();
        earlier.map_or(ran, Err).map_err(|e| BackendError { op, label: label.to_owned(), reason: e.to_string() })
    }
}

fn arg(arg: &Arg<'_, Cuda>) -> View {
    match arg {
        // What a VJP does not need may be gone.
        Arg::Values { buffer, len, .. } if buffer.bytes() == 0 && *len > 0 => View::none(),
        Arg::Values { buffer, len, dtype } => buffer.view(*len, (*dtype).into()),
        Arg::Ids(ids) => ids.view(ids.bytes() / 4, Element::I32),
    }
}

/// How the backend lays out values in a precision; known without a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceLayout {
    /// The precision.
    pub precision: Precision,
}

impl Layout for DeviceLayout {
    /// In bf16: values of three dimensions and more (activations, taps) are bf16; embeddings, scalars, statistics and
    /// whatever losses are made of stay f32.
    fn dtype(&self, graph: &StepGraph, id: ValueId) -> Dtype {
        let node = graph.node(id);
        let narrow = self.precision == Precision::Bf16 && node.shape.len() >= 3;
        match &node.source {
            Source::Param(_) | Source::IntInput(_) | Source::Fused => Dtype::F32,
            Source::Input(_) if narrow => Dtype::Bf16,
            Source::Op(op) if narrow && !keeps_f32(op) => Dtype::Bf16,
            Source::Input(_) | Source::Op(_) => Dtype::F32,
        }
    }

    fn overlaps(&self) -> bool {
        true
    }

    fn needs(&self, op: &Op) -> Needs {
        match op {
            // The sum over a row of P∘dP is that of O∘dO.
            Op::Attention(_) | Op::MaskedAttention(_) => Needs { output: true, ..op.needs() },
            // The target is in what the forward saves.
            Op::TransferLoss { .. } | Op::MapLoss { .. } => Needs { inputs: 0b1, output: false },
            _ => op.needs(),
        }
    }

    fn saved(&self, op: &Op) -> Vec<usize> {
        match op {
            // The log-sum-exp of each row; probabilities are computed again.
            Op::Attention(d) | Op::MaskedAttention(d) => vec![d.batch * d.heads * d.tokens],
            Op::Relational(d) => ops::relational::saved(d),
            _ => ops::levels::saved(op).unwrap_or_else(|| op.saved()),
        }
    }
}

impl Layout for Cuda {
    fn dtype(&self, graph: &StepGraph, id: ValueId) -> Dtype {
        self.layout().dtype(graph, id)
    }

    fn overlaps(&self) -> bool {
        self.device.one_arena()
    }

    fn needs(&self, op: &Op) -> Needs {
        self.layout().needs(op)
    }

    fn saved(&self, op: &Op) -> Vec<usize> {
        self.layout().saved(op)
    }
}

/// Ops whose value is a probability or a normalised row: bf16 would cost the loss its digits.
fn keeps_f32(op: &Op) -> bool {
    matches!(op, Op::L2Normalize { .. } | Op::Softmax { .. } | Op::AttentionMap(_) | Op::AttentionTransferMap { .. })
}

impl Backend for Cuda {
    type Buffer = Buffer;
    type Ints = Buffer;

    fn fuses(&self) -> bool {
        true
    }

    fn fuses_losses(&self) -> bool {
        true
    }

    fn allocate(&mut self, bytes: &[usize]) -> Result<Vec<Buffer>, BackendError> {
        if !self.device.one_arena() {
            // Each in memory of its own, so that its end is guarded.
            let alone = |&b: &usize| Ok(Buffer::new(self.device.alloc(b)?).slice(0, b));
            return bytes.iter().map(alone).collect::<Result<_, _>>().map_err(refused);
        }
        let mut total = 0;
        let range = |&b: &usize| {
            let start = total;
            total += b.next_multiple_of(ALIGN);
            (start, b)
        };
        let ranges: Vec<(usize, usize)> = bytes.iter().map(range).collect();
        self.allocate_ranges(total, &ranges)
    }

    fn allocate_ranges(&mut self, total: usize, ranges: &[(usize, usize)]) -> Result<Vec<Buffer>, BackendError> {
        let arena = Buffer::new(self.device.alloc(total).map_err(refused)?);
        Ok(ranges.iter().map(|&(start, size)| arena.slice(start, size)).collect())
    }

    fn settle(&self) {
        self.note(self.device.synchronize());
    }

    fn begin(&mut self, graph: &StepGraph) -> Result<(), BackendError> {
        let folded = graph.nodes().any(|(_, n)| matches!(n.op(), Some(Op::FusedConv(f)) if f.norm.is_some()));
        let ran = ops::dense::refresh_weights(&self.device, folded);
        self.end("weights", "", ran)
    }

    fn upload(&mut self, values: &[f32], dtype: Dtype, buffer: &mut Buffer) {
        let to = buffer.view(values.len(), dtype.into());
        let ran = match dtype {
            Dtype::F32 => self.device.upload(values, to),
            Dtype::Bf16 => {
                let narrow: Vec<u16> = values.iter().map(|v| half::bf16::from_f32(*v).to_bits()).collect();
                self.device.upload(&narrow, to)
            }
        };
        self.note(ran);
    }

    fn upload_ints(&mut self, values: &[i32], ids: &mut Buffer) {
        let bytes = size_of_val(values);
        if ids.bytes() != bytes {
            match self.device.alloc(bytes) {
                Ok(memory) => *ids = Buffer::new(memory).slice(0, bytes),
                Err(e) => return self.note(Err(e)),
            }
        }
        self.note(self.device.upload(values, ids.view(values.len(), Element::I32)));
    }

    fn view<'a>(&self, part: Part<'a, Self>) -> Cow<'a, [f32]> {
        match self.device.download(whole(&part)) {
            Ok(values) => Cow::Owned(values),
            Err(e) => {
                self.note(Err(e));
                Cow::Owned(vec![f32::NAN; part.len])
            }
        }
    }

    fn copy(&mut self, from: Part<'_, Self>, to: &mut Buffer, dtype: Dtype, start: usize, add: bool) {
        let to = to.view(start + from.len, dtype.into()).slice(start, from.len);
        self.note(ops::elementwise::copy(&self.device, whole(&from), to, add));
    }

    fn forward(&mut self, _: ValueId, node: &Node, io: ForwardIo<'_, Self>) -> Result<(), BackendError> {
        let Some(op) = node.op() else { return Ok(()) };
        let ins: Vec<View> = io.ins.iter().map(arg).collect();
        let saved: Vec<View> =
            self.saved(op).iter().zip(io.saved.iter()).map(|(&len, b)| b.view(len, Element::F32)).collect();
        let out = io.out.view(node.numel(), io.dtype.into());
        self.device.set_tf32(self.precision == Precision::Tf32);
        self.device.set_bf16(self.precision == Precision::Bf16);
        let ran = ops::forward(&self.device, op, Forward { ins: &ins, out, saved: &saved });
        self.end(op.name(), &node.label, ran)
    }

    fn vjp(&mut self, _: ValueId, node: &Node, io: VjpIo<'_, Self>) -> Result<(), BackendError> {
        let Some(op) = node.op() else { return Ok(()) };
        let ins: Vec<View> = io.ins.iter().map(arg).collect();
        let saved: Vec<View> =
            self.saved(op).iter().zip(io.saved.iter()).map(|(&len, b)| b.view(len, Element::F32)).collect();
        let element = io.dtype.into();
        let grad = |g: &Option<mcpipe_graph::backend::GradOut<'_, Self>>| {
            let g = g.as_ref()?;
            Some(Grad { view: g.buffer.view(g.len, g.dtype.into()), accumulate: g.accumulate })
        };
        let grads: Vec<Option<Grad>> = io.grads.iter().map(grad).collect();
        let io = Vjp {
            ins: &ins,
            out: io.out.map(|b| b.view(node.numel(), element)),
            saved: &saved,
            dout: io.dout.view(node.numel(), element),
            grads: &grads,
        };
        self.device.set_tf32(self.precision == Precision::Tf32);
        self.device.set_bf16(self.precision == Precision::Bf16);
        let ran = ops::vjp(&self.device, op, io);
        self.end(op.name(), &node.label, ran)
    }

    fn running_statistics(&mut self, dims: &Norm, momentum: f32, batch: [&Buffer; 2], running: [&mut Buffer; 2]) {
        let view = |b: &Buffer| b.view(dims.c, Element::F32);
        let [running_mean, running_var] = running;
        let ran = ops::norm::running_statistics(
            &self.device,
            dims,
            momentum,
            view(batch[0]),
            view(batch[1]),
            view(running_mean),
            view(running_var),
        );
        // Weights that they are folded into follow.
        self.device.weights_changed(view(running_mean));
        self.device.weights_changed(view(running_var));
        self.device.release_scratch();
        self.note(ran);
    }
}

/// Memory that the device does not have.
fn refused(e: CudaError) -> BackendError {
    BackendError { op: "memory", label: "the step's arena".into(), reason: e.to_string() }
}

/// Bytes that slots of an arena start at multiples of.
const ALIGN: usize = 256;

fn whole(part: &Part<'_, Cuda>) -> View {
    part.buffer.view(part.start + part.len, part.dtype.into()).slice(part.start, part.len)
}
