//! Sums over rows: `kernels/columns.cuh`.

use crate::device::Device;
use crate::error::CudaError;
use crate::launch::{Argument, Shape, launch};
use crate::view::{Element, Grad, View};

/// Threads of a block that sums.
const THREADS: usize = 256;

/// `Columns` of `kernels/columns.cuh`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Columns {
    sums: View,
    rows: i64,
    c: i64,
    batch_pitch: i64,
    row_pitch: i64,
    chunk: i64,
    factor: f32,
    lanes: i32,
    wide: i32,
    accumulate: i32,
}

// SAFETY: repr(C), the same fields as in kernels/columns.cuh.
unsafe impl Argument for Columns {}

/// A sum over the rows of `[batch, rows, c]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sum {
    /// Sums of their own.
    pub batch: usize,
    /// Rows of each.
    pub rows: usize,
    /// Columns.
    pub c: usize,
    /// Elements between rows.
    pub row_pitch: usize,
    /// Elements between batch entries.
    pub batch_pitch: usize,
    /// What the sum is multiplied by.
    pub factor: f32,
}

impl Sum {
    /// Over contiguous `[batch, rows, c]`.
    pub fn new(batch: usize, rows: usize, c: usize) -> Self {
        Sum { batch, rows, c, row_pitch: c, batch_pitch: rows * c, factor: 1.0 }
    }

    /// Runs `kernel` with the shape and the description that make it leave the sums in `out`.
    pub fn run(
        &self,
        dev: &Device,
        out: Grad,
        kernel: impl FnOnce(Shape, Columns) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        if self.batch * self.c == 0 {
            return Ok(());
        }
        let wide = [self.c, self.row_pitch, self.batch_pitch].iter().all(|n| n.is_multiple_of(8));
        let columns = if wide { self.c / 8 } else { self.c };
        // Equal tiles, rather than full ones and a rest.
        let lanes = columns.div_ceil(columns.div_ceil(32));
        let (tiles, high) = (columns.div_ceil(lanes), THREADS / lanes);
        // Enough blocks to fill the device, each with enough rows that its partial sums cost little.
        let wanted = (4 * dev.processors()).div_ceil(tiles * self.batch);
        let chunks = wanted.min(self.rows.div_ceil(16 * high)).max(1);
        let chunk = self.rows.div_ceil(chunks).max(1);
        let chunks = self.rows.div_ceil(chunk).max(1);
        let sums = if chunks == 1 { out.view } else { dev.scratch(self.batch * chunks * self.c, Element::F32)? };
        let d = Columns {
            sums,
            rows: self.rows as i64,
            c: self.c as i64,
            batch_pitch: self.batch_pitch as i64,
            row_pitch: self.row_pitch as i64,
            chunk: chunk as i64,
            factor: self.factor,
            lanes: lanes as i32,
            wide: i32::from(wide),
            accumulate: i32::from(chunks == 1 && out.accumulate),
        };
        kernel(Shape::grid([tiles, chunks, self.batch], THREADS as u32), d)?;
        if chunks == 1 {
            return Ok(());
        }
        let shape = Shape::grid([self.c.div_ceil(32), self.batch, 1], 1024);
        let (chunks, c, accumulate) = (chunks as i64, self.c as i64, i32::from(out.accumulate));
        launch!(dev, "columns", "merge_columns", shape, sums, out.view, chunks, c, accumulate)
    }

    /// The sums of `x`.
    pub fn of(&self, dev: &Device, x: View, out: Grad) -> Result<(), CudaError> {
        self.run(dev, out, |shape, d| launch!(dev, "columns", "column_sums", shape, x, d))
    }
}
