//! JPEG, PNG and WebP to RGB8, height x width x channel, as PIL's `Image.open(..).convert("RGB")` gives them.
//!
//! Alpha is dropped, grey is repeated, palettes are looked up, CMYK is multiplied out. One deliberate difference:
//! 16-bit grey keeps its high byte, where PIL saturates everything above 255 to white.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

use crate::error::ImageFault;

/// Default pixel budget: 8192 x 8192. A header that declares more is refused before anything is allocated.
pub const DEFAULT_MAX_PIXELS: u64 = 1 << 26;

/// An RGB8 image, `[height, width, 3]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RgbImage {
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// `height * width * 3` bytes, row-major.
    pub pixels: Vec<u8>,
}

/// Format of an encoded image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageFormat {
    /// JPEG, baseline or progressive.
    Jpeg,
    /// PNG.
    Png,
    /// WebP, lossy or lossless; of an animation the first frame.
    Webp,
}

impl ImageFormat {
    /// The format by the first bytes; names of files are not trusted.
    pub fn sniff(bytes: &[u8]) -> Option<Self> {
        if bytes.starts_with(b"\xff\xd8\xff") {
            Some(Self::Jpeg)
        } else if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
            Some(Self::Png)
        } else if bytes.len() >= 12 && bytes.starts_with(b"RIFF") && &bytes[8..12] == b"WEBP" {
            Some(Self::Webp)
        } else {
            None
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Jpeg => "JPEG",
            Self::Png => "PNG",
            Self::Webp => "WebP",
        }
    }
}

/// Decodes an image of at most `max_pixels` pixels.
///
/// # Errors
/// [`ImageFault`]; a truncated file is an error, not a half-grey image. A panic inside a decoder counts as a corrupt
/// image.
pub fn decode(bytes: &[u8], max_pixels: u64) -> Result<RgbImage, ImageFault> {
    let format = ImageFormat::sniff(bytes).ok_or(ImageFault::UnknownFormat)?;
    let decoded = catch_unwind(AssertUnwindSafe(|| match format {
        ImageFormat::Jpeg => decode_jpeg(bytes, max_pixels),
        ImageFormat::Png => decode_png(bytes, max_pixels),
        ImageFormat::Webp => decode_webp(bytes, max_pixels),
    }));
    decoded.unwrap_or_else(|_| Err(corrupt(format, "the decoder gave up")))
}

fn corrupt(format: ImageFormat, reason: impl std::fmt::Display) -> ImageFault {
    ImageFault::Corrupt { format: format.name(), reason: reason.to_string() }
}

/// Number of pixels within the budget, or the fault.
fn budget(width: usize, height: usize, max_pixels: u64) -> Result<usize, ImageFault> {
    if width == 0 || height == 0 {
        return Err(ImageFault::NoPixels { width, height });
    }
    let pixels = width as u64 * height as u64;
    if pixels > max_pixels {
        return Err(ImageFault::TooLarge { width, height, max_pixels });
    }
    Ok(pixels as usize)
}

fn decode_jpeg(bytes: &[u8], max_pixels: u64) -> Result<RgbImage, ImageFault> {
    let fail = |e: &dyn std::fmt::Display| corrupt(ImageFormat::Jpeg, e);
    let options = DecoderOptions::default()
        .set_max_width(usize::from(u16::MAX))
        .set_max_height(usize::from(u16::MAX))
        // Otherwise the missing part of a truncated file is filled with grey.
        .set_strict_mode(true)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(|e| fail(&e))?;
    let (width, height) = decoder.dimensions().ok_or_else(|| fail(&"no size in its header"))?;
    let pixels = budget(width, height, max_pixels)?;
    // CMYK is taken as stored inverted, Adobe's convention, with or without Adobe's marker: PIL does the same.
    let rgb = decoder.decode().map_err(|e| fail(&e))?;
    let rgb = match rgb.len() / pixels {
        3 => rgb,
        1 => repeat_grey(&rgb, 1),
        _ => return Err(fail(&"decoder gave another number of pixels")),
    };
    if rgb.len() != pixels * 3 {
        return Err(fail(&"decoder gave another number of pixels"));
    }
    Ok(RgbImage { width, height, pixels: rgb })
}

/// Grey (with `channels - 1` bytes to drop after each value) to RGB.
fn repeat_grey(grey: &[u8], channels: usize) -> Vec<u8> {
    grey.chunks_exact(channels).flat_map(|p| [p[0]; 3]).collect()
}

fn drop_alpha(rgba: &[u8]) -> Vec<u8> {
    rgba.as_chunks::<4>().0.iter().flat_map(|&[r, g, b, _]| [r, g, b]).collect()
}

fn decode_png(bytes: &[u8], max_pixels: u64) -> Result<RgbImage, ImageFault> {
    let fail = |e: &dyn std::fmt::Display| corrupt(ImageFormat::Png, e);
    let mut decoder = png::Decoder::new(Cursor::new(bytes));
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    decoder.set_transformations(png::Transformations::EXPAND | png::Transformations::STRIP_16);
    let header = decoder.read_header_info().map_err(|e| fail(&e))?;
    let (width, height) = (header.width as usize, header.height as usize);
    let pixels = budget(width, height, max_pixels)?;
    let mut reader = decoder.read_info().map_err(|e| fail(&e))?;
    let (color, depth) = reader.output_color_type();
    if depth != png::BitDepth::Eight {
        return Err(fail(&"unexpected bit depth"));
    }
    let size = reader.output_buffer_size().ok_or_else(|| fail(&"its size overflows"))?;
    let channels = color.samples();
    if size != pixels * channels {
        return Err(fail(&"decoder gave another number of pixels"));
    }
    let mut raw = vec![0; size];
    reader.next_frame(&mut raw).map_err(|e| fail(&e))?;
    let pixels = match color {
        png::ColorType::Rgb => raw,
        png::ColorType::Rgba => drop_alpha(&raw),
        png::ColorType::Grayscale | png::ColorType::GrayscaleAlpha => repeat_grey(&raw, channels),
        png::ColorType::Indexed => return Err(fail(&"a palette image without a palette")),
    };
    Ok(RgbImage { width, height, pixels })
}

fn decode_webp(bytes: &[u8], max_pixels: u64) -> Result<RgbImage, ImageFault> {
    let fail = |e: &dyn std::fmt::Display| corrupt(ImageFormat::Webp, e);
    let mut decoder = image_webp::WebPDecoder::new(Cursor::new(bytes)).map_err(|e| fail(&e))?;
    let (width, height) = decoder.dimensions();
    let (width, height) = (width as usize, height as usize);
    let pixels = budget(width, height, max_pixels)?;
    // The frame buffer of an animation and chunks of metadata count too.
    decoder.set_memory_limit(pixels * 16 + (1 << 20));
    let channels = if decoder.has_alpha() { 4 } else { 3 };
    if decoder.output_buffer_size() != Some(pixels * channels) {
        return Err(fail(&"decoder gave another number of pixels"));
    }
    let mut raw = vec![0; pixels * channels];
    decoder.read_image(&mut raw).map_err(|e| fail(&e))?;
    let pixels = if channels == 4 { drop_alpha(&raw) } else { raw };
    Ok(RgbImage { width, height, pixels })
}
