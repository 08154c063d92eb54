//! Scratch memory that is reused from call to call.

use crate::simd::Level;

/// Elements of a cache line: every scratch slice starts at a multiple of this.
const LINE: usize = 16;

/// Scratch memory of the kernels: it grows to the largest need seen and never shrinks, so that a training step
/// allocates nothing after the first one. It also carries the SIMD level that the kernels run at.
///
/// A parallel kernel takes one slice for all its tasks and splits it with `par_chunks_mut`, by fixed chunk index.
#[derive(Debug)]
pub struct Workspace {
    level: Level,
    memory: Vec<f32>,
    /// What [`lend`](Workspace::lend) gives away.
    lent: Vec<f32>,
}

impl Default for Workspace {
    fn default() -> Self {
        Self::new()
    }
}

impl Workspace {
    /// An empty workspace at the machine's best level ([`Level::active`]).
    pub fn new() -> Self {
        Self::with_level(Level::active())
    }

    /// An empty workspace whose kernels run at `level`.
    pub fn with_level(level: Level) -> Self {
        Workspace { level, memory: Vec::new(), lent: Vec::new() }
    }

    /// The SIMD level that kernels given this workspace run at.
    pub fn level(&self) -> Level {
        self.level
    }

    /// A slice of `len` elements, aligned to 64 bytes. What it holds is unspecified (left from an earlier call).
    pub fn take(&mut self, len: usize) -> &mut [f32] {
        let [out] = self.split([len]);
        out
    }

    /// `N` disjoint slices of the given lengths, each aligned to 64 bytes; contents unspecified.
    pub fn split<const N: usize>(&mut self, lens: [usize; N]) -> [&mut [f32]; N] {
        let padded = |len: usize| len.div_ceil(LINE) * LINE;
        let need = lens.iter().map(|len| padded(*len)).sum::<usize>() + LINE;
        if self.memory.len() < need {
            // A fresh vector, not `resize`: the old contents need not be copied.
            self.memory = Vec::new();
            self.memory = vec![0.0; need];
        }
        let skip = self.memory.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
        let mut rest = &mut self.memory[skip..];
        lens.map(|len| {
            let (head, tail) = std::mem::take(&mut rest).split_at_mut(padded(len));
            rest = tail;
            &mut head[..len]
        })
    }

    /// A buffer of at least `len` elements for a kernel that calls another one with this workspace; contents
    /// unspecified. It comes back by [`give_back`](Self::give_back).
    pub(crate) fn lend(&mut self, len: usize) -> Vec<f32> {
        let mut buffer = std::mem::take(&mut self.lent);
        if buffer.len() < len {
            buffer = vec![0.0; len];
        }
        buffer
    }

    /// Takes a buffer of [`lend`](Self::lend) back, for the next call.
    pub(crate) fn give_back(&mut self, buffer: Vec<f32>) {
        self.lent = buffer;
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        (self.memory.capacity() + self.lent.capacity()) * size_of::<f32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_aligned_disjoint_and_kept() {
        let mut ws = Workspace::new();
        let [a, b, c] = ws.split([3, 0, 17]);
        assert_eq!((a.len(), b.len(), c.len()), (3, 0, 17));
        a.fill(1.0);
        c.fill(2.0);
        assert!(a.iter().all(|v| *v == 1.0));
        assert_eq!(a.as_ptr().align_offset(64), 0);
        assert_eq!(c.as_ptr().align_offset(64), 0);
        let held = ws.bytes();
        assert_eq!(ws.take(20)[19], 2.0);
        assert_eq!(ws.bytes(), held);
    }
}
