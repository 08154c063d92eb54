//! From a decoded image to a model's input: crop, resize, flip, normalise.
//!
//! The crop is chosen once per sample and resized to each size that a model of the step wants, so that student and
//! teachers see the same pixels.

use fast_image_resize::images::{TypedCroppedImage, TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ImageView, ResizeAlg, ResizeOptions, Resizer};

use crate::decode::RgbImage;
use crate::error::{DataError, Result};
use crate::rng::Rng;

/// Random resized crop: the share of the area and the aspect ratio (width / height) that a crop may have.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RandomCrop {
    /// Least and greatest share of the image's area.
    pub scale: (f64, f64),
    /// Least and greatest aspect ratio.
    pub ratio: (f64, f64),
}

impl Default for RandomCrop {
    /// torchvision's `RandomResizedCrop`: scale 0.08 to 1, ratio 3/4 to 4/3.
    fn default() -> Self {
        Self { scale: (0.08, 1.0), ratio: (3.0 / 4.0, 4.0 / 3.0) }
    }
}

/// What training does to an image before its resize.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Augment {
    /// Random resized crop; without it the centred square of the shorter side.
    pub crop: Option<RandomCrop>,
    /// Probability of a horizontal flip.
    pub flip: f64,
}

impl Augment {
    /// Checks ranges.
    ///
    /// # Errors
    /// [`DataError::Option`].
    pub fn check(&self) -> Result<()> {
        if let Some(crop) = &self.crop {
            let (low, high) = crop.scale;
            if !(low > 0.0 && low <= high && high <= 1.0) {
                return Err(DataError::Option(format!("crop scale [{low}, {high}]: expected 0 < low <= high <= 1")));
            }
            let (low, high) = crop.ratio;
            if !(low > 0.0 && low <= high && high.is_finite()) {
                return Err(DataError::Option(format!("crop ratio [{low}, {high}]: expected 0 < low <= high")));
            }
        }
        if !(0.0..=1.0).contains(&self.flip) {
            return Err(DataError::Option(format!("flip {}: expected 0 to 1", self.flip)));
        }
        Ok(())
    }

    /// The view of one sample: a crop of an image of `width` x `height` pixels and whether it is flipped.
    pub fn view(&self, width: usize, height: usize, rng: &mut Rng) -> View {
        let (left, top, w, h) = match &self.crop {
            Some(crop) => crop.choose(width, height, rng),
            None => {
                let side = width.min(height);
                ((width - side) / 2, (height - side) / 2, side, side)
            }
        };
        View { left, top, width: w, height: h, flip: rng.chance(self.flip) }
    }
}

impl RandomCrop {
    /// `(left, top, width, height)`: ten tries at a random area and (log-uniform) ratio, then the largest centred
    /// crop whose ratio is in range, as torchvision's `RandomResizedCrop.get_params`.
    fn choose(&self, width: usize, height: usize, rng: &mut Rng) -> (usize, usize, usize, usize) {
        let area = width as f64 * height as f64;
        let (ratio_low, ratio_high) = self.ratio;
        for _ in 0..10 {
            let target = area * rng.range(self.scale.0, self.scale.1);
            let ratio = rng.range(ratio_low.ln(), ratio_high.ln()).exp();
            let w = (target * ratio).sqrt().round_ties_even() as usize;
            let h = (target / ratio).sqrt().round_ties_even() as usize;
            if (1..=width).contains(&w) && (1..=height).contains(&h) {
                let top = rng.below((height - h + 1) as u64) as usize;
                let left = rng.below((width - w + 1) as u64) as usize;
                return (left, top, w, h);
            }
        }
        let image_ratio = width as f64 / height as f64;
        let (w, h) = if image_ratio < ratio_low {
            (width, (width as f64 / ratio_low).round_ties_even() as usize)
        } else if image_ratio > ratio_high {
            ((height as f64 * ratio_high).round_ties_even() as usize, height)
        } else {
            (width, height)
        };
        // A strip of one pixel can round to nothing, or beyond the image.
        let (w, h) = (w.clamp(1, width), h.clamp(1, height));
        ((width - w) / 2, (height - h) / 2, w, h)
    }
}

/// The part of an image that every model of a step sees, in pixels, and whether it is mirrored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// Left edge.
    pub left: usize,
    /// Top edge.
    pub top: usize,
    /// Width.
    pub width: usize,
    /// Height.
    pub height: usize,
    /// Mirrored left to right.
    pub flip: bool,
}

/// The filter of a resize; it widens as the image shrinks (antialias), as PIL's does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Filter {
    /// Triangle, PIL's `BILINEAR`.
    Bilinear,
    /// Keys' cubic with a = -1/2, PIL's `BICUBIC`.
    #[default]
    Bicubic,
}

/// The form in which a model gets its images before they are normalised. A side alone stands for bicubic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageForm {
    /// Side, pixels.
    pub size: usize,
    /// Filter of the resize.
    pub filter: Filter,
}

impl From<usize> for ImageForm {
    fn from(size: usize) -> Self {
        Self { size, filter: Filter::default() }
    }
}

/// Evaluation's transform: the shorter side is resized to `size / crop_pct`, then the centre is cropped to `size`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EvalTransform {
    /// Side of the model's input, pixels.
    pub size: usize,
    /// Share of the resized shorter side that the crop keeps: 1 for CLIP, 0.9 or 0.95 for most timm models.
    pub crop_pct: f64,
    /// Filter of the resize.
    pub filter: Filter,
}

impl EvalTransform {
    /// A transform that keeps the whole shorter side, bicubic.
    pub fn new(size: usize) -> Self {
        Self { size, crop_pct: 1.0, filter: Filter::default() }
    }

    /// Checks ranges.
    ///
    /// # Errors
    /// [`DataError::Option`].
    pub fn check(&self) -> Result<()> {
        check_size(self.size)?;
        if !(self.crop_pct > 0.0 && self.crop_pct <= 1.0) {
            return Err(DataError::Option(format!("crop_pct {}: expected more than 0, at most 1", self.crop_pct)));
        }
        Ok(())
    }

    /// The source box `(left, top, width, height)`, in pixels of an image of `width` x `height`.
    ///
    /// Resizing the whole image and cropping the result reads the same source positions; going through the box
    /// saves the pixels that the crop would drop (all but a sliver of a panorama).
    fn source_box(&self, width: usize, height: usize) -> (f64, f64, f64, f64) {
        let size = self.size as f64;
        let short = ((size / self.crop_pct).floor()).max(size);
        let (w, h) = (width as f64, height as f64);
        // torchvision: the longer side is int(short * long / short side).
        let (resized_w, resized_h) =
            if width <= height { (short, (short * h / w).floor()) } else { ((short * w / h).floor(), short) };
        let left = ((resized_w - size) / 2.0).round_ties_even();
        let top = ((resized_h - size) / 2.0).round_ties_even();
        let (scale_x, scale_y) = (w / resized_w, h / resized_h);
        (left * scale_x, top * scale_y, size * scale_x, size * scale_y)
    }
}

/// Rejects sizes that no model has.
pub(crate) fn check_size(size: usize) -> Result<()> {
    if (1..=8192).contains(&size) {
        Ok(())
    } else {
        Err(DataError::Option(format!("image size {size}: expected 1 to 8192")))
    }
}

/// Resizing with buffers that are reused from image to image.
#[derive(Debug, Default)]
pub struct Resize {
    resizer: Resizer,
}

impl Resize {
    /// Writes `view` of `image`, resized to `form`, to `out` (`size * size * 3` bytes).
    ///
    /// # Errors
    /// [`DataError::Option`] for a view outside the image or an `out` of another length.
    pub fn view(&mut self, image: &RgbImage, view: &View, form: impl Into<ImageForm>, out: &mut [u8]) -> Result<()> {
        let ImageForm { size, filter } = form.into();
        let source = source(image)?;
        let inside = |v: usize| u32::try_from(v).unwrap_or(u32::MAX);
        // Cropping before the resize keeps pixels outside the view out of the filter, as torchvision does.
        let cropped = TypedCroppedImage::from_ref(
            &source,
            inside(view.left),
            inside(view.top),
            inside(view.width),
            inside(view.height),
        )
        .map_err(|e| DataError::Option(format!("crop outside the image: {e}")))?;
        self.run(&cropped, &options(filter), size, out)?;
        if view.flip {
            flip(out, size);
        }
        Ok(())
    }

    /// Writes the evaluation view of `image` to `out` (`size * size * 3` bytes).
    ///
    /// # Errors
    /// [`DataError::Option`] for an `out` of another length.
    pub fn eval(&mut self, image: &RgbImage, transform: &EvalTransform, out: &mut [u8]) -> Result<()> {
        let source = source(image)?;
        let (left, top, width, height) = transform.source_box(image.width, image.height);
        // Rounding may leave the box an epsilon outside.
        let left = left.clamp(0.0, image.width as f64);
        let top = top.clamp(0.0, image.height as f64);
        let width = width.min(image.width as f64 - left);
        let height = height.min(image.height as f64 - top);
        self.run(&source, &options(transform.filter).crop(left, top, width, height), transform.size, out)
    }

    fn run(
        &mut self,
        source: &impl ImageView<Pixel = U8x3>,
        options: &ResizeOptions,
        size: usize,
        out: &mut [u8],
    ) -> Result<()> {
        let fail = |e: &dyn std::fmt::Display| DataError::Option(format!("resize: {e}"));
        if out.len() != size * size * 3 {
            return Err(fail(&format!("{} bytes for {size}x{size} pixels", out.len())));
        }
        let mut target = TypedImage::<U8x3>::from_buffer(size as u32, size as u32, out).map_err(|e| fail(&e))?;
        // The typed call compiles the one pixel format that is used, not all.
        self.resizer.resize_typed(source, &mut target, options).map_err(|e| fail(&e))
    }
}

fn options(filter: Filter) -> ResizeOptions {
    let filter = match filter {
        Filter::Bilinear => FilterType::Bilinear,
        Filter::Bicubic => FilterType::CatmullRom,
    };
    ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter)).use_alpha(false)
}

fn source(image: &RgbImage) -> Result<TypedImageRef<'_, U8x3>> {
    TypedImageRef::from_buffer(image.width as u32, image.height as u32, &image.pixels)
        .map_err(|e| DataError::Option(format!("image buffer: {e}")))
}

/// Mirrors an RGB image of `size` x `size` left to right, in place.
fn flip(pixels: &mut [u8], size: usize) {
    for row in pixels.chunks_exact_mut(size * 3) {
        let (pixels, _) = row.as_chunks_mut::<3>();
        pixels.reverse();
    }
}

/// Mean and standard deviation that a model wants its input normalised with, on values scaled to 0..1, as RGB.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalize {
    /// Mean per channel.
    pub mean: [f32; 3],
    /// Standard deviation per channel.
    pub std: [f32; 3],
}

impl Normalize {
    /// Mean 0, deviation 1 (MobileViT, MobileCLIP's FastViT).
    pub const UNIT: Self = Self { mean: [0.0; 3], std: [1.0; 3] };
    /// OpenAI CLIP's.
    pub const CLIP: Self =
        Self { mean: [0.481_454_66, 0.457_827_5, 0.408_210_73], std: [0.268_629_54, 0.261_302_6, 0.275_777_1] };
    /// ImageNet's.
    pub const IMAGENET: Self = Self { mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225] };

    /// Factor and offset per channel: `value = byte * factor + offset` = (byte / 255 - mean) / std.
    fn affine(&self) -> ([f32; 3], [f32; 3]) {
        let factor = self.std.map(|s| 1.0 / (255.0 * s));
        let offset = std::array::from_fn(|c| -self.mean[c] / self.std[c]);
        (factor, offset)
    }

    /// `out = (bytes / 255 - mean) / std` over RGB pixels, `[.., 3]`.
    ///
    /// # Errors
    /// [`DataError::Option`] when the lengths differ or are no multiple of 3.
    pub fn apply(&self, bytes: &[u8], out: &mut [f32]) -> Result<()> {
        check_lengths(bytes, out)?;
        let (factor, offset) = pattern(self.affine());
        let (heads, tail) = bytes.as_chunks::<LANES>();
        let (out_heads, out_tail) = out.as_chunks_mut::<LANES>();
        for (o, b) in out_heads.iter_mut().zip(heads) {
            for i in 0..LANES {
                o[i] = f32::from(b[i]) * factor[i] + offset[i];
            }
        }
        for (i, (o, &b)) in out_tail.iter_mut().zip(tail).enumerate() {
            *o = f32::from(b) * factor[i] + offset[i];
        }
        Ok(())
    }

    /// As [`Self::apply`] on `lambda * a + (1 - lambda) * b`.
    ///
    /// # Errors
    /// [`DataError::Option`] when the lengths differ or are no multiple of 3.
    pub fn apply_mixed(&self, a: &[u8], b: &[u8], lambda: f32, out: &mut [f32]) -> Result<()> {
        check_lengths(a, out)?;
        check_lengths(b, out)?;
        let (factor, offset) = pattern(self.affine());
        let rest = 1.0 - lambda;
        let (a_heads, a_tail) = a.as_chunks::<LANES>();
        let (b_heads, b_tail) = b.as_chunks::<LANES>();
        let (out_heads, out_tail) = out.as_chunks_mut::<LANES>();
        for ((o, a), b) in out_heads.iter_mut().zip(a_heads).zip(b_heads) {
            for i in 0..LANES {
                let mixed = lambda * f32::from(a[i]) + rest * f32::from(b[i]);
                o[i] = mixed * factor[i] + offset[i];
            }
        }
        for (i, ((o, &a), &b)) in out_tail.iter_mut().zip(a_tail).zip(b_tail).enumerate() {
            let mixed = lambda * f32::from(a) + rest * f32::from(b);
            *o = mixed * factor[i] + offset[i];
        }
        Ok(())
    }
}

/// A whole number of RGB pixels and of SIMD registers, so that the loops vectorise without shuffles.
const LANES: usize = 48;

fn pattern((factor, offset): ([f32; 3], [f32; 3])) -> ([f32; LANES], [f32; LANES]) {
    (std::array::from_fn(|i| factor[i % 3]), std::array::from_fn(|i| offset[i % 3]))
}

fn check_lengths(bytes: &[u8], out: &[f32]) -> Result<()> {
    if bytes.len() == out.len() && bytes.len().is_multiple_of(3) {
        return Ok(());
    }
    Err(DataError::Option(format!(
        "normalise: {} bytes into {} values; expected equal multiples of 3",
        bytes.len(),
        out.len()
    )))
}
