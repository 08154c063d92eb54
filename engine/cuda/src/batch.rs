//! From decoded images to the models' inputs: `kernels/batch.cu`.

use crate::device::Device;
use crate::error::CudaError;
use crate::launch::{Argument, Shape, launch};
use crate::staging::Staging;
use crate::view::{Element, View};

/// Most inputs made in one launch.
pub const MOST_INPUTS: usize = 4;

/// What happens to one image of a batch: `Sample` of `kernels/batch.cu`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct Sample {
    /// Row of the batch that is mixed in.
    pub partner: i32,
    /// 1: the view is mirrored left to right.
    pub flip: i32,
    /// First row of the view in the image.
    pub top: i32,
    /// First column of the view in the image.
    pub left: i32,
    /// CutMix: cells a side of the grid that the box is counted in; 0 for Mixup or nothing.
    pub grid: i32,
    /// The pasted box in cells: first row, first column, one past the last row, one past the last column.
    pub cells: [i32; 4],
    /// Mixup: share of the own image; 1 leaves it as it is. CutMix does not read it.
    pub lambda: f32,
}

impl Sample {
    /// Row `row` of a batch, whole and unmixed.
    pub fn plain(row: usize) -> Self {
        let cells = [0; 4];
        Sample { partner: row as i32, flip: 0, top: 0, left: 0, grid: 0, cells, lambda: 1.0 }
    }
}

/// A model's input: a part of the view, normalised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Input {
    /// Where it goes, `[batch, h, w, channels]`, f32 or bf16.
    pub to: View,
    /// First row in the view.
    pub top: usize,
    /// First column in the view.
    pub left: usize,
    /// Height.
    pub h: usize,
    /// Width.
    pub w: usize,
    /// 3, or 8 of which the last five are zeros (tensor cores want multiples of 8).
    pub channels: usize,
    /// Mean per channel, on values scaled to 0..1.
    pub mean: [f32; 3],
    /// Standard deviation per channel.
    pub std: [f32; 3],
}

/// `Output` of `kernels/batch.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Output {
    to: View,
    top: i32,
    left: i32,
    h: i32,
    w: i32,
    factor: [f32; 3],
    offset: [f32; 3],
    channels: i32,
    pad: i32,
}

/// `Outputs` of `kernels/batch.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Outputs {
    of: [Output; MOST_INPUTS],
    count: i32,
    pad: i32,
}

// SAFETY: repr(C), the same fields as in kernels/batch.cu.
unsafe impl Argument for Outputs {}

/// Images of a batch and the part of each that is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Images {
    /// Number.
    pub batch: usize,
    /// Height.
    pub h: usize,
    /// Width.
    pub w: usize,
    /// Height of the view.
    pub view_h: usize,
    /// Width of the view.
    pub view_w: usize,
}

impl Images {
    /// `batch` images of `size` x `size`, of which all is used.
    pub fn whole(batch: usize, size: usize) -> Self {
        Images { batch, h: size, w: size, view_h: size, view_w: size }
    }
}

/// Device memory for the samples of a batch.
///
/// # Errors
/// [`CudaError::OutOfMemory`].
pub fn sample_memory(dev: &Device, batch: usize) -> Result<crate::Memory, CudaError> {
    dev.alloc(batch * size_of::<Sample>())
}

/// Refuses a view outside its image and a partner outside the batch.
fn check(images: &Images, samples: &[Sample]) -> Result<(), CudaError> {
    let inside = |at: i32, len: usize, most: usize| usize::try_from(at).is_ok_and(|at| at + len <= most);
    for (i, s) in samples.iter().enumerate() {
        let crop = inside(s.top, images.view_h, images.h) && inside(s.left, images.view_w, images.w);
        if !crop || !inside(s.partner, 1, images.batch) || s.grid < 0 {
            return Err(CudaError::Unsupported(format!("sample {i} of a batch lies outside its image: {s:?}")));
        }
    }
    if samples.len() == images.batch {
        return Ok(());
    }
    Err(CudaError::Unsupported(format!("{} samples for {} images", samples.len(), images.batch)))
}

/// Checks `samples` and brings them to the device.
///
/// # Errors
/// [`CudaError::Unsupported`] for a view outside its image or a partner outside the batch.
pub fn upload_samples(dev: &Device, images: &Images, samples: &[Sample], to: View) -> Result<(), CudaError> {
    check(images, samples)?;
    dev.upload(samples, to)
}

/// Makes all models' inputs of the images (bytes `[batch, h, w, 3]`) as the samples say.
///
/// # Errors
/// What the device refuses; [`CudaError::Unsupported`] for inputs outside the view or more than [`MOST_INPUTS`].
pub fn model_inputs(
    dev: &Device,
    images: &Images,
    bytes: View,
    samples: View,
    inputs: &[Input],
) -> Result<(), CudaError> {
    let Images { batch, h, w, view_h, view_w } = *images;
    let fits = |i: &Input| {
        let part = i.top + i.h <= view_h && i.left + i.w <= view_w;
        part && matches!(i.channels, 3 | 8) && i.to.len == batch * i.h * i.w * i.channels
    };
    if inputs.len() > MOST_INPUTS || !inputs.iter().all(fits) || bytes.len != batch * h * w * 3 {
        return Err(CudaError::Unsupported(format!("{} inputs from {images:?}", inputs.len())));
    }
    let output = |i: &Input| Output {
        to: i.to,
        top: i.top as i32,
        left: i.left as i32,
        h: i.h as i32,
        w: i.w as i32,
        factor: i.std.map(|s| 1.0 / (255.0 * s)),
        offset: std::array::from_fn(|c| -i.mean[c] / i.std[c]),
        channels: i.channels as i32,
        pad: 0,
    };
    let none = Output {
        to: View::new(0, 0, Element::F32),
        top: 0,
        left: 0,
        h: 0,
        w: 0,
        factor: [0.0; 3],
        offset: [0.0; 3],
        channels: 3,
        pad: 0,
    };
    let of = std::array::from_fn(|k| inputs.get(k).map_or(none, output));
    let outputs = Outputs { of, count: inputs.len() as i32, pad: 0 };
    let [h, w, view_h, view_w] = [h, w, view_h, view_w].map(|n| n as i32);
    let shape = Shape::row(batch * images.view_h, 256);
    launch!(dev, "batch", "model_inputs", shape, bytes, samples, outputs, h, w, view_h, view_w)
}

/// A batch's square images in one or more sizes, with what happens to each, on their way to the device.
#[derive(Debug)]
pub struct ImageStaging {
    staging: Staging,
    batch: usize,
    sizes: Vec<usize>,
}

/// Bytes that images of a size and samples start at multiples of.
const ALIGN: usize = 256;

impl ImageStaging {
    fn bytes(batch: usize, size: usize) -> usize {
        batch * size * size * 3
    }

    /// Where the images of each size start, and the samples behind them.
    fn starts(batch: usize, sizes: &[usize]) -> (Vec<usize>, usize) {
        let mut end = 0;
        let start = |&size: &usize| {
            let at = end;
            end += Self::bytes(batch, size).next_multiple_of(ALIGN);
            at
        };
        (sizes.iter().map(start).collect(), end)
    }

    /// Room for `batch` images in each of `sizes`.
    ///
    /// # Errors
    /// Memory that is refused.
    pub fn new(dev: &Device, batch: usize, sizes: &[usize]) -> Result<Self, CudaError> {
        let (_, end) = Self::starts(batch, sizes);
        let staging = Staging::new(dev, end + batch * size_of::<Sample>())?;
        Ok(ImageStaging { staging, batch, sizes: sizes.to_vec() })
    }

    /// Whether it is for such batches.
    pub fn fits(&self, batch: usize, sizes: impl IntoIterator<Item = usize>) -> bool {
        self.batch == batch && self.sizes.iter().copied().eq(sizes)
    }

    /// Sends images (bytes `[batch, size, size, 3]`, in the order of the sizes) and what happens to each.
    ///
    /// # Errors
    /// Images of other sizes, samples that are not of this batch, what the driver refuses.
    pub fn send(&mut self, images: &[&[u8]], samples: &[Sample]) -> Result<(), CudaError> {
        let (batch, sizes) = (self.batch, &self.sizes);
        let right = |(bytes, size): (&&[u8], &usize)| bytes.len() == Self::bytes(batch, *size);
        if images.len() != sizes.len() || !images.iter().zip(sizes).all(right) {
            return Err(CudaError::Unsupported(format!("images of other sizes than {batch} of {sizes:?}")));
        }
        for &size in sizes {
            check(&Images::whole(batch, size), samples)?;
        }
        // SAFETY: 32-bit fields without gaps between them.
        let samples = unsafe { std::slice::from_raw_parts(samples.as_ptr().cast::<u8>(), size_of_val(samples)) };
        let (starts, end) = Self::starts(batch, sizes);
        self.staging.send(|host| {
            for (bytes, start) in images.iter().zip(starts) {
                host[start..][..bytes.len()].copy_from_slice(bytes);
            }
            host[end..][..samples.len()].copy_from_slice(samples);
        })
    }

    /// Makes inputs of what was sent: each of the images at a position among the sizes.
    ///
    /// # Errors
    /// As [`model_inputs`].
    pub fn make(&self, dev: &Device, inputs: &[(usize, Input)]) -> Result<(), CudaError> {
        let (starts, end) = Self::starts(self.batch, &self.sizes);
        self.staging.read(|all| {
            let samples = all.slice(end, self.batch * size_of::<Sample>());
            for (k, (&size, start)) in self.sizes.iter().zip(starts).enumerate() {
                let bytes = all.slice(start, Self::bytes(self.batch, size));
                let own: Vec<Input> = inputs.iter().filter(|(of, _)| *of == k).map(|(_, input)| *input).collect();
                for own in own.chunks(MOST_INPUTS) {
                    model_inputs(dev, &Images::whole(self.batch, size), bytes, samples, own)?;
                }
            }
            Ok(())
        })
    }
}
