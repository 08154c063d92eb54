//! Rates of the bandwidth-bound kernels, in GB/s of the memory they must move, against a plain copy.
//!
//! `cargo run --release -p mcpipe-cpu --example pointwise [rounds]`

use std::time::Instant;

use mcpipe_cpu::Workspace;
use mcpipe_cpu::activation::{Activation, activation_backward, activation_forward};
use mcpipe_cpu::attention::{Attention, attention_backward, attention_forward};
use mcpipe_cpu::elementwise::{add, add_broadcast_backward, copy_or_add};
use mcpipe_cpu::layout::{Patches, unfold_patches};
use mcpipe_cpu::norm::{
    Norm, batch_norm_eval_forward, batch_norm_train_backward, batch_norm_train_forward, layer_norm_backward,
    layer_norm_forward,
};
use mcpipe_cpu::optim::adamw_step;
use mcpipe_cpu::simd::Level;
use mcpipe_cpu::softmax::softmax_rows_forward;

/// Seconds of the fastest of `rounds` calls, after one to warm up.
fn best(rounds: usize, mut f: impl FnMut()) -> f64 {
    f();
    let mut best = f64::INFINITY;
    for _ in 0..rounds {
        let start = Instant::now();
        f();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

struct Bench {
    rounds: usize,
}

impl Bench {
    /// `streams` times `len` floats are read or written at least once.
    fn run(&self, name: &str, len: usize, streams: f64, f: impl FnMut()) {
        let seconds = best(self.rounds, f);
        let rate = streams * len as f64 * 4.0 / seconds / 1e9;
        println!("{name:<44} {:>9.1} us {rate:>8.1} GB/s", seconds * 1e6);
    }
}

fn values(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919) % 1013) as f32 / 500.0 - 1.0).collect()
}

fn main() {
    let rounds = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(20);
    let bench = Bench { rounds };
    println!("{} SIMD, {} threads, best of {rounds}", Level::active(), rayon::current_num_threads());
    let mut ws = Workspace::new();
    // MobileViT-XXS at 128 px, batch 16: activations of the stem, of a middle and of a late layer.
    for (rows, c) in [(16 * 64 * 64, 16), (16 * 64 * 64, 64), (16 * 16 * 16, 96), (16 * 8 * 8, 320)] {
        let n = rows * c;
        println!("[{rows}, {c}]: {:.1} MB", n as f64 * 4.0 / 1e6);
        let (x, dy) = (values(n), values(n));
        let (mut y, mut dx) = (vec![0.0; n], vec![0.0; n]);
        let (gamma, beta) = (vec![1.0; c], vec![0.1; c]);
        let (mut dgamma, mut dbeta) = (vec![0.0; c], vec![0.0; c]);
        let (mut mean, mut rstd) = (vec![0.0; rows.max(c)], vec![0.0; rows.max(c)]);
        let d = Norm { rows, c, eps: 1e-5 };
        let silu = Activation::Silu;
        bench.run("copy", n, 2.0, || copy_or_add(&x, &mut y, false));
        bench.run("add", n, 3.0, || add(&x, &dy, &mut y));
        bench.run("bias gradient", n, 1.0, || add_broadcast_backward(&dy, &mut dbeta, &mut ws));
        for act in [silu, Activation::Gelu] {
            bench.run(&format!("{act:?} forward"), n, 2.0, || activation_forward(act, &x, &mut y));
            bench.run(&format!("{act:?} backward"), n, 3.0, || activation_backward(act, &x, &dy, &mut dx, false));
        }
        for act in [Activation::Identity, silu] {
            let (mean, rstd) = (&mut mean[..c], &mut rstd[..c]);
            bench.run(&format!("batch norm + {act:?} forward (3 streams)"), n, 3.0, || {
                batch_norm_train_forward(&d, act, &x, &gamma, &beta, &mut y, mean, rstd, &mut ws);
            });
            bench.run(&format!("batch norm + {act:?} eval forward"), n, 2.0, || {
                batch_norm_eval_forward(&d, act, &x, &gamma, &beta, mean, &gamma, &mut y);
            });
            bench.run(&format!("batch norm + {act:?} backward (5 streams)"), n, 5.0, || {
                batch_norm_train_backward(
                    &d,
                    act,
                    &x,
                    &gamma,
                    &beta,
                    mean,
                    rstd,
                    &dy,
                    &mut dx,
                    false,
                    &mut dgamma,
                    &mut dbeta,
                    &mut ws,
                );
            });
        }
        let (mean, rstd) = (&mut mean[..rows], &mut rstd[..rows]);
        bench.run("layer norm forward", n, 2.0, || layer_norm_forward(&d, &x, &gamma, &beta, &mut y, mean, rstd));
        bench.run("layer norm backward", n, 3.0, || {
            layer_norm_backward(&d, &x, &gamma, mean, rstd, &dy, &mut dx, false, &mut dgamma, &mut dbeta, &mut ws);
        });
        bench.run("softmax", n, 2.0, || softmax_rows_forward(rows, c, 1.0, &x, &mut y));
    }
    for (batch, tokens, heads, head_dim) in [(64, 64, 4, 16), (64, 16, 4, 20), (64, 4, 4, 24), (32, 65, 4, 32)] {
        let d = Attention { batch, tokens, heads, head_dim, causal: false };
        let n = batch * tokens * heads * head_dim;
        let (qkv, dout) = (values(3 * n), values(n));
        let (mut out, mut probs, mut dqkv) =
            (vec![0.0; n], vec![0.0; batch * heads * tokens * tokens], vec![0.0; 3 * n]);
        let flops = 4.0 * (batch * heads * tokens * tokens * head_dim) as f64;
        let forward = best(rounds, || attention_forward(&d, &qkv, &mut out, &mut probs, &mut ws));
        let backward = best(rounds, || attention_backward(&d, &qkv, &probs, &dout, &mut dqkv, false, &mut ws));
        println!(
            "attention {batch}x{tokens}x{heads}x{head_dim}: forward {:.0} us ({:.1} GFLOP/s), backward {:.0} us ({:.1} GFLOP/s)",
            forward * 1e6,
            flops / forward / 1e9,
            backward * 1e6,
            2.0 * flops / backward / 1e9
        );
    }
    let d = Patches { batch: 16, h: 16, w: 16, c: 64, ph: 2, pw: 2 };
    let n = 16 * 16 * 16 * 64;
    let (x, mut y) = (values(n), vec![0.0; n]);
    bench.run("unfold", n, 2.0, || unfold_patches(&d, &x, &mut y, false));
    let n = 1_000_000;
    let (g, mut p, mut m, mut v) = (values(n), values(n), vec![0.0; n], vec![0.0; n]);
    bench.run("AdamW", n, 7.0, || adamw_step(&mut p, &g, &mut m, &mut v, 1e-4, 0.9, 0.999, 1e-8, 0.1, 3));
}
