//! Decode and augment rate of one thread: `cargo run --release -p mcpipe-data --example throughput [IMAGE..]`.
//!
//! Without arguments: the committed test images and a rendered 64-pixel PNG.

use std::time::Instant;

use mcpipe_data::{Augment, DEFAULT_MAX_PIXELS, Normalize, RandomCrop, Resize, Rng, decode};

/// Calls `work` for about a second; calls per second.
fn rate(mut work: impl FnMut(u64)) -> f64 {
    work(0);
    let start = Instant::now();
    let mut n = 0;
    while start.elapsed().as_secs_f64() < 1.0 {
        for _ in 0..8 {
            n += 1;
            work(n);
        }
    }
    n as f64 / start.elapsed().as_secs_f64()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut paths: Vec<String> = std::env::args().skip(1).collect();
    if paths.is_empty() {
        let images = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/images/");
        paths = ["jpeg420.jpg", "photo.png", "webp_lossy.webp"].map(|n| format!("{images}{n}")).to_vec();
    }
    let augment = Augment { crop: Some(RandomCrop { scale: (0.5, 1.0), ratio: (0.75, 1.333) }), flip: 0.5 };
    println!("images/s, one thread: decode | crop + resize + flip to 64, 224 | all three, to 64 and 224 in f32");
    for path in &paths {
        let bytes = std::fs::read(path)?;
        let image = decode(&bytes, DEFAULT_MAX_PIXELS)?;
        let mut resize = Resize::default();
        let mut pixels = [64usize, 224].map(|s| vec![0u8; s * s * 3]);
        let mut input = vec![0f32; 224 * 224 * 3];
        let decoded = rate(|_| {
            let _ = std::hint::black_box(decode(&bytes, DEFAULT_MAX_PIXELS));
        });
        let resized = [0, 1].map(|i| {
            let size = [64, 224][i];
            rate(|n| {
                let view = augment.view(image.width, image.height, &mut Rng::new(0, "augment", n, 0));
                let _ = resize.view(&image, &view, size, &mut pixels[i]);
            })
        });
        let all = rate(|n| {
            let Ok(image) = decode(&bytes, DEFAULT_MAX_PIXELS) else { return };
            let view = augment.view(image.width, image.height, &mut Rng::new(0, "augment", n, 0));
            for (pixels, size) in pixels.iter_mut().zip([64, 224]) {
                let _ = resize.view(&image, &view, size, pixels);
                let _ = Normalize::CLIP.apply(pixels, &mut input[..size * size * 3]);
            }
        });
        println!(
            "{path} ({}x{}): {decoded:.0} | {:.0}, {:.0} | {all:.0}",
            image.width, image.height, resized[0], resized[1]
        );
    }
    Ok(())
}
