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
/// Most dynamic shared memory of a block, which every device since sm_80 has.
const SHARED: usize = 96 << 10;
/// Threads of a block at most.
const THREADS: usize = 256;

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
        let counted = d.inputs().max(d.outputs()) / 8 < 1 << 31 && (d.ow as usize) * (d.oh as usize) * (d.batch as usize) < 1 << 30;
        let suits = d.stride == 1 && d.vector(8, tensors)? == Element::Bf16 && inside(d.pad_h) && inside(d.pad_w);
        let Conv { batch, h, w, oh, ow, c, pad_h, pad_w, .. } = *d;
        let strips = (ow + STRIP - 1) / STRIP;
        let sizes =
            Sizes { batch, h, w, oh, ow, c, pad_h, pad_w, strips, slots: 0, unit_bits: 0, tiles: 0, rows: 0 };
        (suits && counted && std::env::var_os("NOBAND").is_none()).then_some(Band { sizes, k: d.kh })
    }

    /// Groups of `width` strips of `images` images, by warps of `channels` channels; `bytes` of shared memory for so many
    /// slots and units.
    fn plan(
        &self,
        dev: &Device,
        width: i32,
        images: i32,
        channels: usize,
        bytes: impl Fn(usize, usize) -> usize,
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
        let all = sizes.c as usize / 8;
        let most = (THREADS / 32 * channels / 8).min(all.next_power_of_two());
        let mut units = most.next_power_of_two();
        while units > 1 && (units > most || bytes(sizes.slots as usize, units) > SHARED) {
            units /= 2;
        }
        let tiles = all.div_ceil(units);
        (sizes.unit_bits, sizes.tiles) = (units.trailing_zeros() as i32, tiles as i32);
        let threads = 8 * units / channels * 32;
        // Shares of rows such that the blocks fill the multiprocessors, once or a few times; every start costs a little.
        let (fits, rows) = (2 * THREADS / threads * dev.processors(), sizes.rows as usize);
        let (mut shares, mut best) = (1, f64::INFINITY);
        for waves in 1..=4 {
            let n = (waves * fits / tiles).clamp(1, rows.div_ceil(8));
            let rounds = (n * tiles).div_ceil(fits);
            let time = (rounds * rows.div_ceil(n)) as f64 + (rounds * 2 * self.k as usize) as f64;
            if time < best {
                (shares, best) = (n, time);
            }
        }
        let shape = Shape::row(shares * tiles, threads as u32).shared(bytes(sizes.slots as usize, units));
        Plan { sizes, shape, shares }
    }

    /// The convolution of the image read; `views`: that image, weights, bias, image written.
    pub fn correlate(&self, dev: &Device, views: [View; 4], flip: bool, accumulate: bool) -> Result<(), CudaError> {
        let channels = if self.k == 3 { 4 } else { 2 };
        let words = [pitch(128, channels), pitch(64, channels)].map(|p| 2 * 8 * channels * p);
        let bytes = |slots: usize, units: usize| 4 * (words[0] + words[1]) + 16 * AHEAD * slots * 8 * units;
        let plan = self.plan(dev, 16, self.sizes.batch, channels, bytes);
        let mut arguments = Arguments::default();
        views.into_iter().for_each(|view| arguments.push(view));
        arguments.push(plan.sizes);
        [flip, accumulate].into_iter().for_each(|value| arguments.push(i32::from(value)));
        let name = named(["depthwise_band_3", "depthwise_band_5", "depthwise_band_7"], self.k);
        dev.launch(Kernel { file: "depthwise_band", name }, plan.shape, arguments)
    }

    /// The gradients by weights and bias in parts, `[parts, taps + 1, c]`, and the parts; `views`: x, dy.
    pub fn filter(&self, dev: &Device, taps: usize, views: [View; 2]) -> Result<(View, usize), CudaError> {
        let words = [pitch(128, 2), pitch(64, 2)].map(|p| 2 * 8 * 2 * p);
        let bytes = |slots: usize, units: usize| 4 * (words[0] + words[1]) + 16 * AHEAD * 2 * (slots * 8 + 64) * units;
        let plan = self.plan(dev, 8, (self.sizes.batch + 1) / 2, 2, bytes);
        let partials = dev.scratch(plan.shares * (taps + 1) * self.sizes.c as usize, Element::F32)?;
        let mut arguments = Arguments::default();
        views.into_iter().chain([partials]).for_each(|view| arguments.push(view));
        arguments.push(plan.sizes);
        let names = ["depthwise_band_filter_3", "depthwise_band_filter_5", "depthwise_band_filter_7"];
        dev.launch(Kernel { file: "depthwise_band_filter", name: named(names, self.k) }, plan.shape, arguments)?;
        Ok((partials, plan.shares))
    }
}

/// `Pitch` of `depthwise_band.cuh`.
fn pitch(n: usize, most: usize) -> usize {
    n + if most == 4 { 1 } else { 2 }
}
