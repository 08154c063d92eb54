use super::*;
use crate::testing::{assert_close, at_each_level, random, wide, with_threads};

/// Relative error allowed: f32 sums of up to a few thousand products of magnitude at most 1.
const TOLERANCE: f64 = 1e-5;

/// Forward and both gradients against the plain formulation in f64, at every level, twice.
fn check(d: &Conv2d, threads: usize) {
    let len_x = d.batch * d.h * d.w * d.c_in;
    let len_y = d.batch * d.out_h() * d.out_w() * d.c_out;
    let (x, w, b, dy) = (random(len_x, 1), random(d.weights(), 2), random(d.c_out, 3), random(len_y, 4));
    let (x64, w64, b64, dy64) = (wide(&x), wide(&w), wide(&b), wide(&dy));
    let mut y = vec![0.0; len_y];
    reference::conv2d_forward(d, &x64, &w64, Some(&b64), &mut y);
    let (mut dx, mut dw, mut db) = (vec![0.5; len_x], vec![0.5; w.len()], vec![0.5; d.c_out]);
    reference::conv2d_backward_data(d, &w64, &dy64, &mut dx, true);
    reference::conv2d_backward_weights(d, &x64, &dy64, &mut dw, Some(&mut db));
    with_threads(threads, || {
        at_each_level(|level, ws| {
            let what = |pass: &str| format!("{d:?} {pass} at {level}");
            let mut run = || {
                let mut got_y = vec![f32::NAN; len_y];
                conv2d_forward(d, &x, &w, Some(&b), &mut got_y, ws);
                let mut got_dx = vec![0.5; len_x];
                conv2d_backward_data(d, &w, &dy, &mut got_dx, true, ws);
                let mut plain = vec![f32::NAN; len_x];
                conv2d_backward_data(d, &w, &dy, &mut plain, false, ws);
                for (a, b) in got_dx.iter().zip(&plain) {
                    assert!((a - b - 0.5).abs() < 1e-4, "{}", what("accumulate"));
                }
                let (mut got_dw, mut got_db) = (vec![0.5; w.len()], vec![0.5; d.c_out]);
                conv2d_backward_weights(d, &x, &dy, &mut got_dw, Some(&mut got_db), ws);
                (got_y, got_dx, got_dw, got_db)
            };
            let got = run();
            assert_close(&got.0, &y, TOLERANCE, &what("forward"));
            assert_close(&got.1, &dx, TOLERANCE, &what("by data"));
            assert_close(&got.2, &dw, TOLERANCE, &what("by weights"));
            assert_close(&got.3, &db, TOLERANCE, &what("by bias"));
            assert!(got == run(), "{}", what("repeat"));
        });
    });
}

fn conv(batch: usize, (h, w): (usize, usize), (c_in, c_out): (usize, usize), k: usize, stride: usize) -> Conv2d {
    Conv2d { batch, h, w, c_in, c_out, kh: k, kw: k, stride, pad: k / 2, groups: 1 }
}

#[test]
fn dense_convolutions_agree_with_f64() {
    for (c_in, c_out) in [(1, 1), (3, 16), (17, 33), (16, 3)] {
        for (k, stride) in [(1, 1), (1, 2), (3, 1), (3, 2), (5, 1), (5, 3), (7, 2)] {
            check(&conv(2, (9, 7), (c_in, c_out), k, stride), 1);
        }
    }
    for pad in [0, 1, 2] {
        check(&Conv2d { pad, ..conv(1, (6, 5), (4, 20), 3, 1) }, 1);
        check(&Conv2d { pad, kh: 2, ..conv(1, (6, 5), (4, 20), 3, 2) }, 1);
    }
    // Padding beyond the kernel: the turned-kernel form of the gradient does not exist.
    check(&Conv2d { pad: 3, ..conv(1, (4, 5), (3, 5), 3, 1) }, 1);
    // Patches.
    check(&Conv2d { pad: 0, ..conv(2, (12, 16), (3, 40), 4, 4) }, 1);
    // The kernel covers more than the image.
    check(&conv(1, (2, 2), (3, 4), 5, 1), 1);
}

#[test]
fn large_dense_convolutions_agree_with_f64() {
    check(&conv(3, (20, 18), (24, 48), 3, 1), 3);
    check(&conv(2, (33, 40), (8, 16), 3, 2), 3);
    check(&conv(1, (6, 6), (8, 300), 3, 1), 2); // weights packed
    check(&conv(1, (150, 150), (12, 3), 3, 1), 2); // several strips per image
}

#[test]
fn depthwise_convolutions_agree_with_f64() {
    for c in [1, 3, 8, 16, 17, 33, 100] {
        for (k, stride) in [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (7, 2), (1, 1), (4, 1), (3, 3)] {
            check(&Conv2d { groups: c, ..conv(2, (9, 11), (c, c), k, stride) }, 1);
        }
    }
    for size in [(1, 1), (2, 3), (4, 4), (8, 8), (16, 17)] {
        for (k, stride) in [(3, 1), (3, 2), (5, 2), (7, 1)] {
            check(&Conv2d { groups: 20, ..conv(1, size, (20, 20), k, stride) }, 1);
        }
    }
    check(&Conv2d { groups: 12, pad: 0, ..conv(1, (9, 9), (12, 12), 3, 1) }, 1);
    check(&Conv2d { groups: 12, pad: 2, ..conv(1, (9, 9), (12, 12), 3, 2) }, 1);
    check(&Conv2d { groups: 40, ..conv(5, (30, 32), (40, 40), 3, 1) }, 3);
    check(&Conv2d { groups: 40, ..conv(5, (30, 32), (40, 40), 3, 2) }, 3);
}

#[test]
fn grouped_convolutions_agree_with_f64() {
    check(&Conv2d { groups: 2, ..conv(2, (5, 6), (6, 8), 3, 1) }, 1);
    check(&Conv2d { groups: 3, ..conv(1, (5, 6), (6, 9), 3, 2) }, 1);
}

#[test]
fn depthwise_convolutions_with_a_multiplier_agree_with_f64() {
    for (c, m) in [(3, 2), (20, 2), (5, 3), (9, 4)] {
        for (k, stride) in [(3, 1), (3, 2), (7, 2), (1, 1)] {
            check(&Conv2d { groups: c, ..conv(2, (9, 8), (c, m * c), k, stride) }, 1);
        }
    }
    check(&Conv2d { groups: 48, ..conv(3, (30, 26), (48, 96), 7, 2) }, 3);
}

#[test]
fn empty_sizes_do_nothing() {
    check(&conv(0, (5, 5), (3, 4), 3, 1), 1);
    check(&Conv2d { pad: 0, ..conv(1, (2, 2), (3, 4), 3, 1) }, 1);
    check(&Conv2d { groups: 3, pad: 0, ..conv(1, (2, 2), (3, 3), 3, 1) }, 1);
}
