//! Typed views of device memory, as kernels take them.

use mcpipe_graph::Dtype;

/// A device address.
pub type Address = u64;

/// Element type codes, as `kernels/common.cuh` numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Element {
    /// 32-bit float.
    F32 = 0,
    /// Upper half of a 32-bit float.
    Bf16 = 1,
    /// 32-bit integer.
    I32 = 2,
    /// Byte.
    U8 = 3,
}

impl Element {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Element::F32 | Element::I32 => 4,
            Element::Bf16 => 2,
            Element::U8 => 1,
        }
    }
}

impl From<Dtype> for Element {
    fn from(d: Dtype) -> Self {
        match d {
            Dtype::F32 => Element::F32,
            Dtype::Bf16 => Element::Bf16,
        }
    }
}

/// `len` elements of one type at a 16-byte aligned address: `View` of `kernels/common.cuh`. It does not own the memory;
/// whoever makes one answers for the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct View {
    /// Where it starts.
    pub address: Address,
    /// Number of elements.
    pub len: usize,
    /// Element type.
    pub element: Element,
    pad: u32,
}

impl View {
    /// A view.
    pub fn new(address: Address, len: usize, element: Element) -> Self {
        View { address, len, element, pad: 0 }
    }

    /// What a kernel gets for an argument that isn't there.
    pub fn none() -> Self {
        View::new(0, 0, Element::F32)
    }

    /// `len` elements from `start` on.
    pub fn slice(self, start: usize, len: usize) -> Self {
        debug_assert!(start + len <= self.len, "{start} + {len} of {}", self.len);
        View::new(self.address + (start * self.element.bytes()) as u64, len, self.element)
    }

    /// Bytes.
    pub fn bytes(self) -> usize {
        self.len * self.element.bytes()
    }
}

/// Where an argument's gradient goes.
#[derive(Clone, Copy, Debug)]
pub struct Grad {
    /// The memory.
    pub view: View,
    /// Add to what is there instead of overwriting.
    pub accumulate: bool,
}

/// What a forward reads and writes.
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a> {
    /// Arguments in order; ids are [`Element::I32`].
    pub ins: &'a [View],
    /// The value.
    pub out: View,
    /// Tensors saved for the VJP.
    pub saved: &'a [View],
}

/// What a VJP reads and writes.
#[derive(Clone, Copy, Debug)]
pub struct Vjp<'a> {
    /// Arguments in order; those that the op does not need hold anything.
    pub ins: &'a [View],
    /// The value, where the op needs it.
    pub out: Option<View>,
    /// What the forward saved.
    pub saved: &'a [View],
    /// Gradient of the value.
    pub dout: View,
    /// Gradients of the arguments; none where none is wanted.
    pub grads: &'a [Option<Grad>],
}
