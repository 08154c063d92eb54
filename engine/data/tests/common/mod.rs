//! Shards made on the spot.
#![allow(dead_code, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

pub fn tar_bytes(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, *bytes).unwrap();
    }
    tar.into_inner().unwrap()
}

pub fn write_tar(path: &Path, members: &[(&str, &[u8])]) -> PathBuf {
    std::fs::write(path, tar_bytes(members)).unwrap();
    path.to_owned()
}

/// A PNG of one colour.
pub fn png(width: u32, height: u32, rgb: [u8; 3]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(&rgb.repeat((width * height) as usize)).unwrap();
    writer.finish().unwrap();
    bytes
}

/// A JPEG of the fixtures.
pub fn jpeg() -> Vec<u8> {
    fixture("images/jpeg420.jpg")
}

pub fn fixture(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A shard of `n` samples whose image is a colour told by the class: 10 * class.
pub fn coloured_shard(path: &Path, keys: std::ops::Range<usize>) -> PathBuf {
    let mut members: Vec<(String, Vec<u8>)> = Vec::new();
    for k in keys {
        let class = k % 20;
        members.push((format!("k{k:04}.cls"), class.to_string().into_bytes()));
        members.push((format!("k{k:04}.png"), png(12, 10, [class as u8 * 10; 3])));
        members.push((format!("k{k:04}.txt"), format!("caption {k}").into_bytes()));
    }
    let borrowed: Vec<(&str, &[u8])> = members.iter().map(|(n, b)| (n.as_str(), b.as_slice())).collect();
    write_tar(path, &borrowed)
}
