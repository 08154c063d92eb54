//! Decoding and transforms against PIL and torchvision (`fixtures/make_images.py`), and against hostile bytes.
#![allow(clippy::unwrap_used)]

mod common;

use common::fixture;
use mcpipe_data::{DEFAULT_MAX_PIXELS, EvalTransform, Filter, ImageFault, ImageForm, Resize, RgbImage, View, decode};
use proptest::prelude::*;

/// Greatest and mean difference of two byte strings.
fn difference(a: &[u8], b: &[u8]) -> (u8, f64) {
    assert_eq!(a.len(), b.len());
    let each = || a.iter().zip(b).map(|(a, b)| a.abs_diff(*b));
    (each().max().unwrap_or(0), each().map(f64::from).sum::<f64>() / a.len() as f64)
}

#[test]
fn images_equal_pils() {
    // (name, greatest difference, mean difference): lossless formats are exact; JPEG decoders differ in rounding and in
    // how chroma is spread, lossy WebP in rounding.
    let cases = [
        ("jpeg420.jpg", 40, 1.5),
        ("jpeg444.jpg", 3, 0.6),
        ("jpeg_progressive.jpg", 40, 1.5),
        ("jpeg_grey.jpg", 2, 0.3),
        ("jpeg_cmyk.jpg", 4, 0.8),
        ("jpeg_cmyk_plain.jpg", 4, 0.8),
        ("png_rgb.png", 0, 0.0),
        ("png_rgba.png", 0, 0.0),
        ("png_grey.png", 0, 0.0),
        ("png_grey_alpha.png", 0, 0.0),
        ("png_palette.png", 0, 0.0),
        ("png_palette_transparent.png", 0, 0.0),
        ("png_bit.png", 0, 0.0),
        ("webp_lossy.webp", 2, 0.3),
        ("webp_lossless.webp", 0, 0.0),
        ("webp_alpha.webp", 0, 0.0),
    ];
    let mut wrong = Vec::new();
    for (name, greatest, mean) in cases {
        let image =
            decode(&fixture(&format!("images/{name}")), DEFAULT_MAX_PIXELS).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!((image.width, image.height), (36, 28), "{name}");
        let stem = name.split('.').next().unwrap();
        let found = difference(&image.pixels, &fixture(&format!("images/{stem}.rgb")));
        if found.0 > greatest || found.1 > mean {
            wrong.push((name, found));
        }
    }
    assert!(wrong.is_empty(), "greatest and mean difference: {wrong:?}");
}

#[test]
fn sixteen_bit_grey_keeps_its_high_byte() {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, 2, 1);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.set_depth(png::BitDepth::Sixteen);
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(&[0x12, 0x34, 0xfe, 0xdc]).unwrap();
    writer.finish().unwrap();
    let image = decode(&bytes, DEFAULT_MAX_PIXELS).unwrap();
    assert_eq!(image.pixels, [0x12, 0x12, 0x12, 0xfe, 0xfe, 0xfe]);
}

#[derive(serde::Deserialize)]
struct Case {
    name: String,
    size: usize,
    crop: Option<[usize; 4]>,
    #[serde(default)]
    flip: bool,
    crop_pct: Option<f64>,
    #[serde(default)]
    bilinear: bool,
}

#[test]
fn views_equal_torchvisions() {
    let source = decode(&fixture("images/photo.png"), DEFAULT_MAX_PIXELS).unwrap();
    let cases: Vec<Case> = serde_json::from_slice(&fixture("views.json")).unwrap();
    assert_eq!(cases.len(), 9);
    let mut resize = Resize::default();
    for case in cases {
        let mut out = vec![0; case.size * case.size * 3];
        let filter = if case.bilinear { Filter::Bilinear } else { Filter::Bicubic };
        match (case.crop, case.crop_pct) {
            (Some([left, top, width, height]), _) => {
                let view = View { left, top, width, height, flip: case.flip };
                resize.view(&source, &view, ImageForm { size: case.size, filter }, &mut out).unwrap();
            }
            (None, Some(crop_pct)) => {
                let transform = EvalTransform { size: case.size, crop_pct, filter };
                resize.eval(&source, &transform, &mut out).unwrap();
            }
            (None, None) => panic!("{}: no view", case.name),
        }
        // Both round after each of the two passes; where they clip an overshoot depends on the order of the passes.
        let (greatest, mean) = difference(&out, &fixture(&format!("images/{}.rgb", case.name)));
        assert!(greatest <= 4 && mean < 0.3, "{}: greatest {greatest}, mean {mean}", case.name);
    }
}

#[test]
fn views_outside_the_image_are_errors() {
    let image = RgbImage { width: 4, height: 4, pixels: vec![0; 48] };
    let mut resize = Resize::default();
    let view = View { left: 2, top: 0, width: 3, height: 4, flip: false };
    assert!(resize.view(&image, &view, 8, &mut [0; 192]).is_err());
    let view = View { left: 0, top: 0, width: 4, height: 4, flip: false };
    assert!(resize.view(&image, &view, 8, &mut [0; 191]).is_err());
    assert!(resize.view(&image, &view, 8, &mut [0; 192]).is_ok());
    let broken = RgbImage { width: 4, height: 5, pixels: vec![0; 48] };
    assert!(resize.view(&broken, &view, 8, &mut [0; 192]).is_err());
}

/// One-pixel strips, panoramas, tiny images: any image gives an evaluation view, in little memory.
#[test]
fn evaluation_of_odd_images() {
    let mut resize = Resize::default();
    for (width, height) in [(1, 1), (1, 20_000), (20_000, 1), (3, 2), (2, 3), (1000, 7)] {
        let image = RgbImage { width, height, pixels: vec![77; width * height * 3] };
        for crop_pct in [1.0, 0.9, 0.33] {
            let mut out = vec![0; 64 * 64 * 3];
            resize.eval(&image, &EvalTransform { crop_pct, ..EvalTransform::new(64) }, &mut out).unwrap();
            assert!(out.iter().all(|&v| v == 77), "{width}x{height} {crop_pct}");
        }
    }
}

/// A JPEG header that declares 65500 x 65500 pixels in some hundred bytes.
fn huge_jpeg() -> Vec<u8> {
    let mut bytes = common::jpeg();
    let at = bytes.windows(2).position(|w| w == [0xff, 0xc0]).unwrap();
    bytes[at + 5..at + 9].copy_from_slice(&[0xff, 0xdc, 0xff, 0xdc]);
    bytes.truncate(700);
    bytes
}

fn huge_png() -> Vec<u8> {
    let mut bytes = common::png(1, 1, [0; 3]);
    bytes[16..24].copy_from_slice(&[0, 0, 0x75, 0x30, 0, 0, 0x75, 0x30]);
    // The header's checksum covers the size.
    let crc = crc32(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&crc.to_be_bytes());
    bytes
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
        }
    }
    !crc
}

fn huge_webp() -> Vec<u8> {
    let mut bytes = fixture("images/webp_lossy.webp");
    let at = bytes.windows(3).position(|w| w == [0x9d, 0x01, 0x2a]).unwrap();
    bytes[at + 3..at + 7].copy_from_slice(&[0xff, 0x3f, 0xff, 0x3f]);
    bytes
}

#[test]
fn pixel_budget_is_checked_from_the_header() {
    for (bytes, size) in [(huge_jpeg(), 65500), (huge_png(), 30_000), (huge_webp(), 16383)] {
        match decode(&bytes, DEFAULT_MAX_PIXELS) {
            Err(ImageFault::TooLarge { width, height, .. }) => assert_eq!((width, height), (size, size)),
            other => panic!("{size}: {other:?}"),
        }
    }
    let image = common::png(10, 10, [1, 2, 3]);
    assert!(decode(&image, 100).is_ok());
    assert!(matches!(decode(&image, 99), Err(ImageFault::TooLarge { .. })));
}

#[test]
fn corrupt_images_are_errors() {
    assert_eq!(decode(b"", 100), Err(ImageFault::UnknownFormat));
    assert_eq!(decode(b"GIF89a..............", 100), Err(ImageFault::UnknownFormat));
    for name in ["jpeg420.jpg", "jpeg_progressive.jpg", "png_rgb.png", "webp_lossy.webp", "webp_lossless.webp"] {
        let bytes = fixture(&format!("images/{name}"));
        for share in [0.95, 0.7, 0.5, 0.2] {
            let cut = &bytes[..(bytes.len() as f64 * share) as usize];
            assert!(decode(cut, DEFAULT_MAX_PIXELS).is_err(), "{name} cut to {share}");
        }
    }
    // A damaged pixel stream, found by PNG's checksum.
    let mut png = fixture("images/png_rgb.png");
    let middle = png.len() / 2;
    png[middle] ^= 0x10;
    assert!(matches!(decode(&png, DEFAULT_MAX_PIXELS), Err(ImageFault::Corrupt { format: "PNG", .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_bytes_panic(which in 0..6usize, flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in any::<prop::sample::Index>(), truncate in any::<bool>()) {
        let names = ["jpeg420.jpg", "jpeg_progressive.jpg", "jpeg_cmyk.jpg", "png_palette.png", "webp_lossy.webp", "webp_alpha.webp"];
        let mut bytes = fixture(&format!("images/{}", names[which]));
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= value;
        }
        if truncate {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(image) = decode(&bytes, 1 << 16) {
            prop_assert_eq!(image.pixels.len(), image.width * image.height * 3);
        }
    }
}
