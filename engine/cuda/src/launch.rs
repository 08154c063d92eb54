//! Kernel arguments as the driver takes them.

use std::ffi::c_void;

use crate::view::{Address, View};

/// What a kernel's parameter is, besides its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A struct by value.
    Struct = b's',
    /// A float.
    Float = b'f',
    /// An integer or an address.
    Integer = b'i',
}

/// A type that kernels take by value.
///
/// # Safety
/// The layout must be that of the C++ parameter.
pub unsafe trait Argument: Copy {
    /// What it is.
    const KIND: Kind = Kind::Struct;
}

macro_rules! arguments {
    ($($type:ty: $kind:ident),* $(,)?) => {$(
        // SAFETY: View is repr(C) and mirrors kernels/common.cuh; the rest are the same in both languages.
        unsafe impl Argument for $type {
            const KIND: Kind = Kind::$kind;
        }
    )*};
}
arguments!(View: Struct, Address: Integer, i64: Integer, i32: Integer, u32: Integer, f32: Float, f64: Float);

/// Longest argument list in bytes, each argument in a cell of its own.
const ROOM: usize = 4096;
/// Most arguments of a kernel.
const MOST: usize = 64;

/// The arguments of one launch, each 16-byte aligned.
pub struct Arguments {
    room: Box<[u128; ROOM / 16]>,
    offsets: [usize; MOST],
    types: [(Kind, usize); MOST],
    count: usize,
    used: usize,
}

impl Default for Arguments {
    fn default() -> Self {
        Arguments {
            room: Box::new([0; ROOM / 16]),
            offsets: [0; MOST],
            types: [(Kind::Integer, 0); MOST],
            count: 0,
            used: 0,
        }
    }
}

impl Arguments {
    /// Appends one.
    pub fn push<T: Argument>(&mut self, value: T) {
        let cells = size_of::<T>().div_ceil(16);
        assert!(self.count < MOST && self.used + cells <= self.room.len(), "a kernel has too many arguments");
        // SAFETY: the cells lie within the room, aligned to 16 bytes, and T is plain data.
        unsafe { self.room.as_mut_ptr().add(self.used).cast::<T>().write_unaligned(value) };
        self.offsets[self.count] = self.used;
        self.types[self.count] = (T::KIND, size_of::<T>());
        self.count += 1;
        self.used += cells;
    }

    /// Kind and bytes of each argument, in order.
    #[cfg(feature = "shim")]
    pub fn types(&self) -> &[(Kind, usize)] {
        &self.types[..self.count]
    }

    /// Addresses of the arguments, in order.
    pub fn pointers(&mut self) -> Vec<*mut c_void> {
        let base = self.room.as_mut_ptr();
        // SAFETY: every offset was pushed above, within the room.
        self.offsets[..self.count].iter().map(|&o| unsafe { base.add(o) }.cast()).collect()
    }
}

/// Which kernel runs: a `.cu` file of `kernels/` without its ending, and the name of a `__global__` function there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// File.
    pub file: &'static str,
    /// Function.
    pub name: &'static str,
}

/// Blocks, threads of a block, bytes of dynamic shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads in x, y, z.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

impl Shape {
    /// `blocks` blocks of `threads` threads in a row.
    pub fn row(blocks: usize, threads: u32) -> Self {
        Shape::grid([blocks, 1, 1], threads)
    }

    /// A grid of blocks of `threads` threads.
    pub fn grid(blocks: [usize; 3], threads: u32) -> Self {
        Shape { grid: blocks.map(|b| b as u32), block: [threads, 1, 1], shared: 0 }
    }

    /// One thread for each of `n` items, 256 threads a block.
    pub fn items(n: usize) -> Self {
        Shape::row(n.div_ceil(256), 256)
    }

    /// One thread for eight of `n` elements, 256 threads a block.
    pub fn eights(n: usize) -> Self {
        Shape::items(n.div_ceil(8))
    }

    /// The same with dynamic shared memory.
    pub fn shared(self, bytes: usize) -> Self {
        Shape { shared: bytes as u32, ..self }
    }
}

/// Launches a kernel: `launch!(device, "file", "kernel", shape, args...)`.
macro_rules! launch {
    ($device:expr, $file:literal, $name:literal, $shape:expr $(, $arg:expr)* $(,)?) => {{
        let mut arguments = $crate::launch::Arguments::default();
        $(arguments.push($arg);)*
        $device.launch($crate::launch::Kernel { file: $file, name: $name }, $shape, arguments)
    }};
}
pub(crate) use launch;
