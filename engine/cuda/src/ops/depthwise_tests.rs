use mcpipe_cpu::conv::{Conv2d, conv2d_backward_data, conv2d_backward_weights, conv2d_forward};
use mcpipe_cpu::token_conv::{TokenConv, token_conv_backward_data, token_conv_backward_weights, token_conv_forward};
use mcpipe_cpu::workspace::Workspace;
use mcpipe_graph::Op;

use crate::ops::testing::{close, device, noise, rounded, run};
use crate::view::Element;

fn check(d: &Conv2d, bias: bool, accumulate: bool) {
    let Some(dev) = device() else { return };
    let (xs, ys) = (d.batch * d.h * d.w * d.c_in, d.batch * d.out_h() * d.out_w() * d.c_out);
    let mut ws = Workspace::default();
    for element in [Element::F32, Element::Bf16] {
        let x = rounded(&noise(1, xs), element);
        let (w, b) = (noise(2, d.weights()), noise(3, d.c_out));
        let dy = rounded(&noise(4, ys), element);
        let inputs: &[&[f32]] = if bias { &[&x, &w, &b] } else { &[&x, &w] };
        let got = run(&dev, &Op::Conv2d(*d), inputs, inputs.len(), ys, &dy, element, accumulate);
        let start = if accumulate { 1.0 } else { 0.0 };
        let (mut y, mut dx) = (vec![0.0; ys], vec![start; xs]);
        let (mut dw, mut db) = (vec![start; w.len()], vec![start; b.len()]);
        conv2d_forward(d, &x, &w, bias.then_some(&b), &mut y, &mut ws);
        conv2d_backward_data(d, &w, &dy, &mut dx, true, &mut ws);
        conv2d_backward_weights(d, &x, &dy, &mut dw, bias.then_some(&mut db), &mut ws);
        let name = format!("{d:?}");
        close(&format!("{name} y"), &got.value, &y, element);
        close(&format!("{name} dx"), &got.grads[0], &dx, element);
        close(&format!("{name} dw"), &got.grads[1], &dw, element);
        if bias {
            close(&format!("{name} db"), &got.grads[2], &db, element);
        }
    }
}

fn sizes(batch: usize, h: usize, w: usize, c: usize, k: usize, stride: usize) -> Conv2d {
    Conv2d { batch, h, w, c_in: c, c_out: c, kh: k, kw: k, stride, pad: k / 2, groups: c }
}

#[test]
fn squares_match_the_cpu() {
    for (i, k) in [3, 5, 7].into_iter().enumerate() {
        for stride in [1, 2] {
            for (j, [h, w]) in [[1, 1], [3, 7], [7, 7], [14, 15], [15, 14], [8, 3]].into_iter().enumerate() {
                for c in [8, 16, 24, 100] {
                    check(&sizes(if c == 8 { 3 } else { 1 }, h, w, c, k, stride), (i + j) % 2 == 0, j % 2 == 0);
                }
            }
        }
    }
}

#[test]
fn large_squares_match_the_cpu() {
    check(&sizes(5, 11, 9, 40, 7, 1), true, true);
    check(&sizes(3, 30, 20, 24, 5, 1), false, false);
    check(&sizes(19, 7, 7, 16, 3, 1), true, false);
    check(&sizes(2, 17, 150, 72, 3, 1), false, true);
    check(&sizes(35, 5, 4, 8, 7, 1), true, false);
}

#[test]
fn other_sizes_match_the_cpu() {
    for c in [2, 3, 6, 129] {
        check(&sizes(2, 7, 5, c, 3, 1), true, false);
        check(&sizes(1, 6, 7, c, 5, 2), false, true);
    }
    check(&sizes(1, 9, 9, 8, 9, 1), true, false);
    check(&sizes(2, 9, 8, 8, 3, 3), true, true);
    check(&Conv2d { pad: 0, ..sizes(2, 9, 8, 8, 3, 2) }, false, false);
    check(&Conv2d { pad: 0, ..sizes(2, 9, 8, 8, 5, 1) }, false, false);
    check(&Conv2d { pad: 3, ..sizes(2, 4, 5, 8, 3, 1) }, false, false);
    check(&Conv2d { pad: 2, ..sizes(2, 4, 15, 8, 3, 1) }, true, false);
    check(&Conv2d { pad: 1, ..sizes(2, 9, 15, 16, 7, 1) }, true, true);
    check(&Conv2d { kw: 1, ..sizes(2, 4, 5, 8, 3, 1) }, false, false);
    for m in [2, 3] {
        let d = sizes(2, 7, 5, 8, 3, 2);
        check(&Conv2d { c_out: 8 * m, ..d }, true, m == 2);
    }
}

#[test]
fn nan_stays_where_it_reaches() {
    let Some(dev) = device() else { return };
    for element in [Element::F32, Element::Bf16] {
        let d = sizes(1, 9, 9, 8, 3, 1);
        let mut x = noise(1, 9 * 9 * 8);
        x[(4 * 9 + 4) * 8 + 2] = f32::NAN;
        let (w, dy) = (noise(2, 72), noise(3, x.len()));
        let got = run(&dev, &Op::Conv2d(d), &[&x, &w], 2, x.len(), &dy, element, false);
        for (i, v) in got.value.iter().enumerate() {
            let (row, column, c) = (i / 72, i / 8 % 9, i % 8);
            let reached = c == 2 && row.abs_diff(4) < 2 && column.abs_diff(4) < 2;
            // On tensor cores it reaches the columns beside it too.
            let may = reached || (element == Element::Bf16 && c == 2 && row.abs_diff(4) < 2);
            assert!(v.is_nan() || !reached, "{row} {column} {c}");
            assert!(!v.is_nan() || may, "{row} {column} {c}");
        }
        assert!(got.grads[0].iter().all(|v| v.is_finite()));
        assert!(got.grads[1].iter().enumerate().all(|(i, v)| v.is_nan() == (i / 9 == 2)));
    }
}

#[test]
fn tokens_match_the_cpu() {
    let Some(dev) = device() else { return };
    let mut ws = Workspace::default();
    for [batch, tokens, channels, kernel] in [[1, 1, 3, 3], [3, 7, 16, 11], [2, 77, 24, 11], [2, 15, 129, 5]] {
        let d = TokenConv { batch, tokens, channels, kernel };
        let n = batch * tokens * channels;
        for element in [Element::F32, Element::Bf16] {
            let (x, dy) = (rounded(&noise(1, n), element), rounded(&noise(2, n), element));
            let w = noise(3, channels * kernel);
            let got = run(&dev, &Op::TokenConv(d), &[&x, &w], 2, n, &dy, element, tokens == 7);
            let start = if tokens == 7 { 1.0 } else { 0.0 };
            let (mut y, mut dx, mut dw) = (vec![0.0; n], vec![start; n], vec![start; w.len()]);
            token_conv_forward(&d, &x, &w, &mut y, &mut ws);
            token_conv_backward_data(&d, &w, &dy, &mut dx, true, &mut ws);
            token_conv_backward_weights(&d, &x, &dy, &mut dw, &mut ws);
            close(&format!("{d:?} y"), &got.value, &y, element);
            close(&format!("{d:?} dx"), &got.grads[0], &dx, element);
            close(&format!("{d:?} dw"), &got.grads[1], &dw, element);
        }
    }
}
