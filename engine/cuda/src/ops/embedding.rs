//! The gradient of embedding tables: `kernels/embedding.cu`.

use crate::device::Device;
use crate::error::CudaError;
use crate::launch::{Shape, launch};
use crate::view::{Element, View};

/// Positions of a block that sorts, and of one that sums; as in `kernels/embedding.cu`.
const SORTED: usize = 1024;
const CHUNK: usize = 32;

/// `dtable[ids[i]] += dy[i]`, equal ids in their order.
pub(super) fn vjp(dev: &Device, width: usize, ids: View, dy: View, dtable: View) -> Result<(), CudaError> {
    let n = ids.len;
    if n == 0 || width == 0 || dtable.len == 0 {
        return Ok(());
    }
    let rows = dtable.len / width;
    let ints = |len: usize| dev.scratch(len, Element::I32);
    let blocks = n.div_ceil(SORTED);
    let counts = ints(256 * blocks)?;
    let [mut keys, mut positions] = [ids, View::none()];
    let mut spare = [[ints(n)?, ints(n)?], [ints(n)?, ints(n)?]];
    let bits = usize::BITS - rows.leading_zeros();
    let (len, most) = (n as i64, rows as i32);
    for shift in (0..bits.max(1) as i32).step_by(8) {
        let [to_keys, to_positions] = spare[0];
        let first = i32::from(shift == 0);
        let all = counts.len as i64;
        launch!(dev, "embedding", "sort_count", Shape::row(blocks, 256), keys, counts, len, most, shift)?;
        launch!(dev, "embedding", "sort_scan", Shape::row(1, 1024), counts, all)?;
        let shape = Shape::row(blocks, 256);
        launch!(
            dev,
            "embedding",
            "sort_place",
            shape,
            keys,
            positions,
            counts,
            to_keys,
            to_positions,
            len,
            most,
            shift,
            first
        )?;
        [keys, positions] = [to_keys, to_positions];
        spare.swap(0, 1);
    }
    let chunks = n.div_ceil(CHUNK);
    let shape = Shape::grid([chunks, width.div_ceil(256), 1], 256);
    let (heads, tails) = (dev.scratch(chunks * width, Element::F32)?, dev.scratch(chunks * width, Element::F32)?);
    let w = width as i64;
    launch!(dev, "embedding", "embedding_sums", shape, keys, positions, dy, dtable, heads, tails, len, w, most)?;
    launch!(dev, "embedding", "embedding_merge", shape, keys, dtable, heads, tails, len, w, most)
}
