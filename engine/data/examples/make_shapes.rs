//! Makes the shapes data set: `cargo run --release -p mcpipe-data --example make_shapes DIR [TRAIN EVAL SIZE DIFFICULTY]`.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let dir = args.first().ok_or("usage: make_shapes DIR [TRAIN EVAL SIZE DIFFICULTY]")?;
    let mut params = mcpipe_data::ShapesParams::default();
    if let [_, train, eval, size, difficulty] = &args[..] {
        params.train = train.parse()?;
        params.eval = eval.parse()?;
        params.image_size = size.parse()?;
        params.difficulty = difficulty.parse()?;
    }
    let start = std::time::Instant::now();
    let manifest = mcpipe_data::make_shapes(Path::new(dir), &params, 0, &mut |_, _| {})?;
    let bytes: u64 = manifest.files.iter().map(|f| f.bytes).sum();
    let (samples, seconds) = (params.train + params.eval, start.elapsed().as_secs_f64());
    println!("{samples} samples, {:.1} MB in {seconds:.2} s, {}", bytes as f64 / 1e6, manifest.content_hash);
    Ok(())
}
