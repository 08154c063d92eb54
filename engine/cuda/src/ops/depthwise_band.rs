//! Depthwise convolutions of stride 1 in bf16 on tensor cores: `kernels/depthwise_band.cu` and
//! `kernels/depthwise_band_filter.cu`.

use super::depthwise::{Conv, named};
use crate::device::Device;
use crate::error::CudaError;
use crate::launch::{Argument, Arguments, Kernel, Kind, Shape};
use crate::view::{Element, View};

/// `Band` of `depthwise_band.cuh`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Sizes {
    batch: i32,
    h: i32,
    w: i32,
    oh: i32,
    ow: i32,
    c: i32,
    pad_h: i32,
    pad_w: i32,
    strips: i32,
    slots: i32,
    unit_bits: i32,
    tiles: i32,
    rows: i32,
}

// SAFETY: repr(C), the fields of the C++ struct in order.
unsafe impl Argument for Sizes {
    const KIND: Kind = Kind::Struct;
}

/// Columns of a strip.
const STRIP: i32 = 8;
/// Rows under way (`ROWS_AHEAD`).
const AHEAD: usize = 4;
/// Registers of a thread at most, and of a multiprocessor.
const REGISTERS: [usize; 2] = [128, 65536];

/// A convolution that these kernels take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Band {
    sizes: Sizes,
    k: i32,
}

/// How a kernel is launched.
struct Plan {
    sizes: Sizes,
    shape: Shape,
    shares: usize,
}

impl Band {
    /// Where sizes and element types suit: squares of 3, 5, 7 at stride 1, bf16, channels in whole groups of eight.
    pub fn new(d: &Conv, tensors: [View; 2]) -> Option<Self> {
        let inside = |pad: i32| (0..d.kh).contains(&pad);
        let counted = d.inputs().max(d.outputs()) / 8 < 1 << 31
            && (d.ow as usize) * (d.oh as usize) * (d.batch as usize) < 1 << 30;
        let suits = d.stride == 1 && d.vector(8, tensors)? == Element::Bf16 && inside(d.pad_h) && inside(d.pad_w);
        let Conv { batch, h, w, oh, ow, c, pad_h, pad_w, .. } = *d;
        let strips = (ow + STRIP - 1) / STRIP;
        let sizes = Sizes { batch, h, w, oh, ow, c, pad_h, pad_w, strips, slots: 0, unit_bits: 0, tiles: 0, rows: 0 };
        (suits && counted).then_some(Band { sizes, k: d.kh })
    }

    /// Groups of `width` strips of `images` images, by blocks of `most` units at most and warps of `channels` channels;
    /// `bytes` of a row on its way for so many slots.
    fn plan(
        &self,
        dev: &Device,
        [width, images]: [i32; 2],
        most: usize,
        channels: usize,
        bytes: impl Fn(usize) -> usize,
    ) -> Plan {
        let mut sizes = self.sizes;
        // Groups start at multiples of what both counts are multiples of; each image that one meets takes a slot more.
        let (mut start, mut rest) = (width, sizes.strips);
        while rest > 0 {
            (start, rest) = (rest, start % rest);
        }
        sizes.slots = width + (sizes.strips - start + width - 1) / sizes.strips + 1;
        let groups = (images * sizes.strips + width - 1) / width;
        sizes.rows = groups * sizes.oh;
        let parted = 4 * 2 * 8 * (pitch(128, most) + pitch(64, most));
        let shared = |units: usize| units * (parted + AHEAD * bytes(sizes.slots as usize));
        let (block, processor) = shared_memory(dev.capability());
        let all = sizes.c as usize / 8;
        let mut units = most.min(all.next_power_of_two());
        while units > 1 && shared(units) > block {
            units /= 2;
        }
        let tiles = all.div_ceil(units);
        (sizes.unit_bits, sizes.tiles) = (units.trailing_zeros() as i32, tiles as i32);
        let threads = 8 * units / channels * 32;
        // Shares of rows such that the blocks fill the multiprocessors, once or a few times; every start costs a little.
        let resident = (REGISTERS[1] / REGISTERS[0] / threads).min(processor / shared(units)).max(1);
        let (fits, rows) = (resident * dev.processors(), sizes.rows as usize);
        let (mut shares, mut best) = (1, f64::INFINITY);
        for waves in 1..=4 {
            let n = (waves * fits / tiles).clamp(1, rows.div_ceil(8));
            let rounds = (n * tiles).div_ceil(fits);
            let time = (rounds * (rows.div_ceil(n) + 2 * self.k as usize)) as f64;
            if time < best {
                (shares, best) = (n, time);
            }
        }
        Plan { sizes, shape: Shape::row(shares * tiles, threads as u32).shared(shared(units)), shares }
    }

    /// The convolution of the image read; `views`: that image, weights, bias, image written.
    pub fn correlate(&self, dev: &Device, views: [View; 4], flip: bool, accumulate: bool) -> Result<(), CudaError> {
        let (most, channels) = if self.k == 3 { (4, 4) } else { (2, 2) };
        let plan = self.plan(dev, [16, self.sizes.batch], most, channels, |slots| 16 * slots * 8);
        let mut arguments = Arguments::default();
        views.into_iter().for_each(|view| arguments.push(view));
        arguments.push(plan.sizes);
        [flip, accumulate].into_iter().for_each(|value| arguments.push(i32::from(value)));
        let name = named(["depthwise_band_3", "depthwise_band_5", "depthwise_band_7"], self.k);
        dev.launch(Kernel { file: "depthwise_band", name }, plan.shape, arguments)
    }

    /// The gradients by weights and bias in parts, `[parts, taps + 1, c]`, and the parts; `views`: x, dy.
    pub fn filter(&self, dev: &Device, taps: usize, views: [View; 2]) -> Result<(View, usize), CudaError> {
        let images = (self.sizes.batch + 1) / 2;
        let plan = self.plan(dev, [8, images], 2, 2, |slots| 16 * 2 * (slots * 8 + 64));
        let partials = dev.scratch(plan.shares * (taps + 1) * self.sizes.c as usize, Element::F32)?;
        let mut arguments = Arguments::default();
        views.into_iter().chain([partials]).for_each(|view| arguments.push(view));
        arguments.push(plan.sizes);
        let names = ["depthwise_band_filter_3", "depthwise_band_filter_5", "depthwise_band_filter_7"];
        dev.launch(Kernel { file: "depthwise_band_filter", name: named(names, self.k) }, plan.shape, arguments)?;
        Ok((partials, plan.shares))
    }
}

/// Bytes of shared memory of a block and of a multiprocessor of a compute capability, less what the driver keeps.
fn shared_memory(capability: u32) -> (usize, usize) {
    match capability {
        90 | 100 | 103 => (224 << 10, 224 << 10),
        80 | 87 => (160 << 10, 160 << 10),
        _ => (96 << 10, 96 << 10),
    }
}

/// `Pitch` of `depthwise_band.cuh`.
fn pitch(n: usize, most: usize) -> usize {
    n + if most == 4 { 1 } else { 2 }
}
