//! Kernels against values known from elsewhere (torch's documentation and definitions) and plain loops.

use crate::harness::{random, wide};
use mcpipe_cpu::activation::{Activation, activation_backward, activation_forward};
use mcpipe_cpu::layout::{Patches, unfold_patches};
use mcpipe_cpu::norm::{Norm, batch_norm_train_forward, batch_norm_update_running};
use mcpipe_cpu::pooling::{Pool2d, max_pool_backward, max_pool_forward};
use mcpipe_cpu::resize::{Resize, resize_bilinear_forward};
use mcpipe_cpu::softmax::{log_softmax_rows_forward, softmax_rows_forward};
use mcpipe_cpu::{Workspace, loss, optim};

#[test]
fn resize_gives_torchs_values() {
    let sizes = |h, w, oh, ow| Resize { batch: 1, h, w, c: 1, oh, ow, aligned: false };
    let mut y = [0.0; 4];
    resize_bilinear_forward(&sizes(1, 2, 1, 4), &[1.0, 2.0], &mut y);
    assert_eq!(y, [1.0, 1.25, 1.75, 2.0]);
    let mut y = [0.0; 9];
    resize_bilinear_forward(&sizes(2, 2, 3, 3), &[1.0, 2.0, 3.0, 4.0], &mut y);
    for (got, want) in y.iter().zip([1.0, 1.5, 2.0, 2.0, 2.5, 3.0, 3.0, 3.5, 4.0]) {
        assert!((got - want).abs() < 1e-6, "{y:?}");
    }
    // Downscaling without antialiasing reads the two middle pixels.
    let mut y = [0.0; 1];
    resize_bilinear_forward(&sizes(1, 4, 1, 1), &[10.0, 1.0, 3.0, 10.0], &mut y);
    assert_eq!(y, [2.0]);
    // Corners aligned: evenly from the first centre to the last; one pixel is the first.
    let mut y = [0.0; 5];
    resize_bilinear_forward(&Resize { aligned: true, ..sizes(1, 3, 1, 5) }, &[1.0, 2.0, 6.0], &mut y);
    assert_eq!(y, [1.0, 1.5, 2.0, 4.0, 6.0]);
    resize_bilinear_forward(&Resize { aligned: true, ..sizes(1, 3, 1, 1) }, &[1.0, 2.0, 6.0], &mut y[..1]);
    assert_eq!(y[0], 1.0);
}

#[test]
fn unfold_orders_as_timms_mobilevit_block() {
    // A 4x4 image of its own pixel numbers, 2x2 patches: position in the patch first, then patch.
    let x: Vec<f32> = (0..16).map(|i| i as f32).collect();
    let mut y = [0.0; 16];
    unfold_patches(&Patches { batch: 1, h: 4, w: 4, c: 1, ph: 2, pw: 2 }, &x, &mut y, false);
    let want = [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15];
    assert_eq!(y, want.map(|i| i as f32));
}

#[test]
fn max_pool_takes_the_first_of_equals_and_keeps_nan() {
    let d = Pool2d { batch: 1, h: 2, w: 2, c: 1, k: 2, stride: 2, pad: 0 };
    let (mut y, mut arg, mut dx) = ([0.0], [0.0], [0.0; 4]);
    max_pool_forward(&d, &[1.0, 3.0, 3.0, 2.0], &mut y, &mut arg);
    max_pool_backward(&d, &arg, &[5.0], &mut dx, false);
    assert_eq!((y, dx), ([3.0], [0.0, 5.0, 0.0, 0.0]));
    max_pool_forward(&d, &[1.0, f32::NAN, 3.0, 2.0], &mut y, &mut arg);
    assert!(y[0].is_nan());
    let padded = Pool2d { h: 1, w: 1, k: 3, stride: 1, pad: 1, ..d };
    max_pool_forward(&padded, &[-7.0], &mut y, &mut arg);
    assert_eq!(y, [-7.0]);
}

#[test]
fn activations_keep_relative_precision_in_their_tails() {
    let x: Vec<f32> = (-400..=400).map(|i| i as f32 * 0.05).collect();
    let mut y = vec![0.0; x.len()];
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let exact: [(Activation, &dyn Fn(f64) -> f64); 4] = [
        (Activation::Sigmoid, &sigmoid),
        (Activation::Silu, &|x| x * sigmoid(x)),
        (Activation::QuickGelu, &|x| x * sigmoid(1.702 * x)),
        (Activation::Tanh, &f64::tanh),
    ];
    for (act, f) in exact {
        activation_forward(act, &x, &mut y);
        for (x, y) in x.iter().zip(&y) {
            let want = f(f64::from(*x));
            // The exponent's own rounding, up to 34·2^-24 at the far end, is part of it.
            assert!((f64::from(*y) - want).abs() <= 3e-6 * want.abs(), "{act:?}({x}) = {y}, expected {want}");
        }
    }
    // Known values of the exact GELU, to 9 digits.
    let x = [-5.0f32, -3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 12.0];
    let want = [
        -1.433_257_9e-6,
        -4.049_694_1e-3,
        -0.158_655_254,
        -0.154_268_769,
        0.0,
        0.345_731_231,
        0.841_344_746,
        2.995_950_31,
        12.0,
    ];
    let mut y = [0.0; 9];
    activation_forward(Activation::Gelu, &x, &mut y);
    for ((x, y), want) in x.iter().zip(y).zip(want) {
        let error: f64 = f64::from(y) - want;
        assert!(error.abs() <= 2e-6 * f64::abs(want), "gelu({x}) = {y}, expected {want}");
    }
}

#[test]
fn activations_at_the_extremes() {
    let x = [-1e30f32, -200.0, 200.0, 1e30];
    let dy = [1.0; 4];
    for act in Activation::ALL {
        let (mut y, mut dx) = ([f32::NAN; 4], [f32::NAN; 4]);
        activation_forward(act, &x, &mut y);
        activation_backward(act, &x, &dy, &mut dx, false);
        assert!(y.iter().chain(&dx).all(|v| v.is_finite()), "{act:?}: {y:?} {dx:?}");
        let mut y = [0.0; 2];
        activation_forward(act, &[f32::NAN, 1.0], &mut y);
        assert!(y[0].is_nan() && !y[1].is_nan(), "{act:?}: {y:?}");
    }
}

#[test]
fn softmax_of_large_and_masked_scores() {
    let (mut y, mut l) = ([0.0; 3], [0.0; 3]);
    softmax_rows_forward(1, 3, 1.0, &[1e4, 1e4, f32::NEG_INFINITY], &mut y);
    assert_eq!(y, [0.5, 0.5, 0.0]);
    softmax_rows_forward(1, 3, 1.0, &[-1e30, 0.0, -1e30], &mut y);
    assert_eq!(y, [0.0, 1.0, 0.0]);
    log_softmax_rows_forward(1, 3, 0.01, &[1.0, 0.0, -1.0], &mut l);
    assert_eq!(l, [0.0, -100.0, -200.0]);
    softmax_rows_forward(1, 3, 1.0, &[f32::NAN, 0.0, 0.0], &mut y);
    assert!(y.iter().all(|v| v.is_nan()));
}

#[test]
fn running_statistics_move_as_torchs() {
    let d = Norm { rows: 50, c: 2, eps: 1e-5 };
    let x = random(100, 3);
    let (mut y, mut mean, mut rstd) = (vec![0.0; 100], [0.0; 2], [0.0; 2]);
    let ones = [1.0; 2];
    batch_norm_train_forward(
        &d,
        Activation::Identity,
        &x,
        &ones,
        &[0.0; 2],
        &mut y,
        &mut mean,
        &mut rstd,
        &mut Workspace::new(),
    );
    let (mut running_mean, mut running_var) = ([1.0; 2], [2.0; 2]);
    batch_norm_update_running(&d, 0.1, &mean, &rstd, &mut running_mean, &mut running_var);
    for i in 0..2 {
        let column: Vec<f64> = wide(&x).into_iter().skip(i).step_by(2).collect();
        let m = column.iter().sum::<f64>() / 50.0;
        let v = column.iter().map(|x| (x - m).powi(2)).sum::<f64>() / 49.0;
        assert!((f64::from(running_mean[i]) - (0.9 + 0.1 * m)).abs() < 1e-6);
        assert!((f64::from(running_var[i]) - (1.8 + 0.1 * v)).abs() < 1e-6);
    }
}

#[test]
fn a_constant_channel_normalises_to_beta() {
    let d = Norm { rows: 4_000, c: 3, eps: 1e-5 };
    let x: Vec<f32> = (0..d.rows * 3).map(|i| [0.0, 1234.567, -1e6][i % 3]).collect();
    let (mut y, mut mean, mut rstd) = (vec![0.0; x.len()], [0.0; 3], [0.0; 3]);
    let (gamma, beta) = ([1.0; 3], [0.5; 3]);
    batch_norm_train_forward(
        &d,
        Activation::Identity,
        &x,
        &gamma,
        &beta,
        &mut y,
        &mut mean,
        &mut rstd,
        &mut Workspace::new(),
    );
    assert!(rstd.iter().all(|r| (r - 316.227_78).abs() < 1e-2), "{rstd:?}");
    assert!(y.iter().all(|y| y.is_finite()));
}

/// The kernel's result on a length past one chunk, against the formula in f64.
fn check_step(step: impl Fn(&mut [f32], &[f32], &mut [f32], &mut [f32], u64), want: impl Fn(&mut [f64; 3], f64, u64)) {
    let n = 20_001;
    let (mut p, mut m, mut v) = (random(n, 1), vec![0.0; n], vec![0.0; n]);
    let mut state: Vec<[f64; 3]> = p.iter().map(|p| [f64::from(*p), 0.0, 0.0]).collect();
    for t in 1..=5 {
        let g = random(n, 10 + t);
        step(&mut p, &g, &mut m, &mut v, t);
        for (state, g) in state.iter_mut().zip(&g) {
            want(state, f64::from(*g), t);
        }
    }
    for (p, [want, ..]) in p.iter().zip(&state) {
        assert!((f64::from(*p) - want).abs() < 1e-5, "{p} where {want} is expected");
    }
}

#[test]
fn adamw_follows_its_formula() {
    let (lr, b1, b2, eps, wd) = (1e-2, 0.9, 0.98, 1e-8, 0.1);
    check_step(
        |p, g, m, v, t| optim::adamw_step(p, g, m, v, lr, b1, b2, eps, wd, t),
        |[p, m, v], g, t| {
            let (lr, b1, b2) = (f64::from(lr), f64::from(b1), f64::from(b2));
            *p -= lr * f64::from(wd) * *p;
            *m = b1 * *m + (1.0 - b1) * g;
            *v = b2 * *v + (1.0 - b2) * g * g;
            let t = t as i32;
            let denominator = (*v / (1.0 - b2.powi(t))).sqrt() + f64::from(eps);
            *p -= lr * (*m / (1.0 - b1.powi(t))) / denominator;
        },
    );
}

#[test]
fn sgd_follows_its_formula() {
    for (momentum, nesterov) in [(0.0, false), (0.9, false), (0.9, true)] {
        check_step(
            |p, g, m, _, t| optim::sgd_step(p, g, m, 0.05, momentum, nesterov, 0.01, t),
            |[p, m, _], g, t| {
                let momentum = f64::from(momentum);
                let g = g + f64::from(0.01f32) * *p;
                *m = if t == 1 { g } else { momentum * *m + g };
                let d = if momentum == 0.0 {
                    g
                } else if nesterov {
                    g + momentum * *m
                } else {
                    *m
                };
                *p -= f64::from(0.05f32) * d;
            },
        );
    }
}

#[test]
fn reductions_over_parameters() {
    let x = random(100_003, 4);
    let want: f64 = wide(&x).iter().map(|v| v * v).sum();
    assert!((optim::sum_of_squares(&x) - want).abs() < 1e-6 * want);
    assert!(optim::all_finite(&x) && optim::all_finite(&[]));
    assert!(optim::all_finite(&[f32::MAX, f32::MIN, f32::MIN_POSITIVE]));
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in [0, 16_384, 100_002] {
            let mut x = x.clone();
            x[at] = bad;
            assert!(!optim::all_finite(&x));
            assert!(!optim::sum_of_squares(&x).is_finite());
        }
    }
    let mut target = vec![1.0; 5];
    optim::ema_update(&mut target, &[3.0; 5], 0.75);
    assert_eq!(target, [1.5; 5]);
    optim::scale_in_place(&mut target, 2.0);
    assert_eq!(target, [3.0; 5]);
}

#[test]
fn losses_at_their_minimum_and_at_the_largest_scale() {
    let mut ws = Workspace::new();
    let d = loss::Contrastive { rows: 2, cols: 2, dim: 2, w_row: 0.5, w_col: 0.5, subtract_entropy: true };
    let (a, b, p) = ([1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]);
    // Perfectly aligned at scale 100: ln(1 + e^-100), 0 in f32; the worst, opposed case is 200.
    assert_eq!(loss::contrastive_forward(&d, &a, &b, 100.0, &p, &p, &mut ws), 0.0);
    let (a, b) = ([1.0, 0.0, -1.0, 0.0], [-1.0, 0.0, 1.0, 0.0]);
    let worst = loss::contrastive_forward(&d, &a, &b, 100.0, &p, &p, &mut ws);
    assert!((worst - 200.0).abs() < 1e-4, "{worst}");
    assert_eq!(loss::kl_rows_forward(1, 2, &[0.5, 0.5], &[0.5, 0.5]), 0.0);
    assert!(loss::kl_rows_forward(1, 2, &[1.0, 0.0], &[0.0, 1.0]).is_finite());
    assert_eq!(loss::mse_forward(&[1.0, 2.0], &[1.0, 4.0]), 2.0);
    assert_eq!(loss::cosine_forward(1, 2, &[0.0, 0.0], &[1.0, 0.0]), 1.0);
}
