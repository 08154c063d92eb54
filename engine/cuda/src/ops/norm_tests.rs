use mcpipe_cpu::norm::{
    GroupNorm, Norm, batch_norm_eval_backward, batch_norm_eval_forward, batch_norm_train_backward,
    batch_norm_train_forward, batch_norm_update_running, group_norm_backward, group_norm_forward, layer_norm_backward,
    layer_norm_forward,
};
use mcpipe_cpu::workspace::Workspace;
use mcpipe_graph::{Activation, Op, ParamId};

use crate::ops::testing::{Held, Ran, close, device, noise, rounded, run};
use crate::view::Element;

const TYPES: [Element; 2] = [Element::F32, Element::Bf16];

/// x, gamma, beta, dy; x has `mean` added.
fn tensors(rows: usize, c: usize, mean: f32, element: Element) -> [Vec<f32>; 4] {
    let mut x = noise(1, rows * c);
    x.iter_mut().for_each(|v| *v += mean);
    let gamma = noise(2, c).iter().map(|v| v + 1.5).collect();
    [rounded(&x, element), gamma, noise(3, c), rounded(&noise(4, rows * c), element)]
}

fn compare(what: &str, got: &Ran, y: &[f32], grads: [&[f32]; 3], element: Element) {
    close(&format!("{what} y"), &got.value, y, element);
    for (name, (own, expected)) in ["dx", "dgamma", "dbeta"].iter().zip(got.grads.iter().zip(grads)) {
        close(&format!("{what} {name}"), own, expected, element);
    }
}

fn batch_norm(rows: usize, c: usize, act: Activation, mean: f32, accumulate: bool) {
    let Some(dev) = device() else { return };
    let (d, mut ws) = (Norm { rows, c, eps: 1e-5 }, Workspace::default());
    for element in TYPES {
        let [x, gamma, beta, dy] = tensors(rows, c, mean, element);
        let op = Op::BatchNorm { dims: d, act, momentum: 0.1, running: [ParamId(0), ParamId(1)] };
        let got = run(&dev, &op, &[&x, &gamma, &beta], 3, rows * c, &dy, element, accumulate);
        let start = if accumulate { 1.0 } else { 0.0 };
        let (mut y, mut dx) = (vec![0.0; rows * c], vec![start; rows * c]);
        let [mut mean, mut rstd, mut dgamma, mut dbeta] = [0.0, 0.0, start, start].map(|v| vec![v; c]);
        batch_norm_train_forward(&d, act, &x, &gamma, &beta, &mut y, &mut mean, &mut rstd, &mut ws);
        batch_norm_train_backward(
            &d,
            act,
            &x,
            &gamma,
            &beta,
            &mean,
            &rstd,
            &dy,
            &mut dx,
            true,
            &mut dgamma,
            &mut dbeta,
            &mut ws,
        );
        let what = format!("batch norm {rows}x{c} {act:?}");
        close(&format!("{what} mean"), &got.saved[0], &mean, Element::F32);
        close(&format!("{what} rstd"), &got.saved[1], &rstd, Element::F32);
        compare(&what, &got, &y, [&dx, &dgamma, &dbeta], element);

        let (running_mean, running_var) = (noise(5, c), noise(6, c).iter().map(|v| v + 1.5).collect::<Vec<_>>());
        let held = [&mean, &rstd, &running_mean, &running_var].map(|v| Held::new(&dev, v, Element::F32));
        let [m, r, rm, rv] = held.each_ref().map(Held::view);
        super::running_statistics(&dev, &d, 0.1, m, r, rm, rv).expect("running statistics");
        let (mut expected_mean, mut expected_var) = (running_mean.clone(), running_var.clone());
        batch_norm_update_running(&d, 0.1, &mean, &rstd, &mut expected_mean, &mut expected_var);
        close(&format!("{what} running mean"), &held[2].get(&dev), &expected_mean, Element::F32);
        close(&format!("{what} running variance"), &held[3].get(&dev), &expected_var, Element::F32);

        let op = Op::BatchNormEval { dims: d, act };
        let inputs: [&[f32]; 5] = [&x, &gamma, &beta, &running_mean, &running_var];
        let got = run(&dev, &op, &inputs, 3, rows * c, &dy, element, accumulate);
        batch_norm_eval_forward(&d, act, &x, &gamma, &beta, &running_mean, &running_var, &mut y);
        dx.fill(start);
        dgamma.fill(start);
        dbeta.fill(start);
        batch_norm_eval_backward(
            &d,
            act,
            &x,
            &gamma,
            &beta,
            &running_mean,
            &running_var,
            &dy,
            &mut dx,
            true,
            &mut dgamma,
            &mut dbeta,
            &mut ws,
        );
        compare(&format!("{what} eval"), &got, &y, [&dx, &dgamma, &dbeta], element);
    }
}

#[test]
fn batch_norm_matches_the_cpu() {
    // Of few rows dx, of one channel a sum may be what cancellation leaves.
    for (i, rows) in [7, 12, 49, 225, 1000].into_iter().enumerate() {
        for c in [3, 8, 16, 24, 100, 129, 520] {
            batch_norm(rows, c, [Activation::Identity, Activation::Silu][i % 2], 0.5, i % 2 == 1);
        }
    }
    for act in Activation::ALL {
        batch_norm(100, 24, act, 0.3, true);
    }
}

#[test]
fn one_row_is_its_own_mean() {
    let Some(dev) = device() else { return };
    let d = Norm { rows: 1, c: 16, eps: 1e-5 };
    let [x, gamma, beta, dy] = tensors(1, 16, 3.0, Element::F32);
    let op = Op::BatchNorm { dims: d, act: Activation::Identity, momentum: 0.1, running: [ParamId(0), ParamId(1)] };
    let got = run(&dev, &op, &[&x, &gamma, &beta], 3, 16, &dy, Element::F32, false);
    assert_eq!((&got.value, &got.saved[0], &got.grads[2]), (&beta, &x, &dy));
    assert!(got.grads[0].iter().all(|v| v.abs() < 1e-4), "{:?}", got.grads[0]);
    assert!(got.grads[1].iter().all(|v| *v == 0.0));
}

#[test]
fn statistics_hold_far_from_zero() {
    let Some(dev) = device() else { return };
    let d = Norm { rows: 5000, c: 8, eps: 1e-5 };
    let x: Vec<f32> = noise(1, d.rows * d.c).iter().map(|v| 1000.0 + v).collect();
    let ones = vec![1.0; d.c];
    let op = Op::BatchNorm { dims: d, act: Activation::Identity, momentum: 0.1, running: [ParamId(0), ParamId(1)] };
    let got = run(&dev, &op, &[&x, &ones, &ones], 3, x.len(), &x, Element::F32, false);
    for c in 0..d.c {
        let of = || x.iter().skip(c).step_by(d.c).map(|v| f64::from(*v));
        let mean = of().sum::<f64>() / d.rows as f64;
        let rstd = 1.0 / (of().map(|v| (v - mean).powi(2)).sum::<f64>() / d.rows as f64 + 1e-5).sqrt();
        assert!((f64::from(got.saved[0][c]) / mean - 1.0).abs() < 1e-6);
        assert!((f64::from(got.saved[1][c]) / rstd - 1.0).abs() < 1e-5, "{} {rstd}", got.saved[1][c]);
    }
}

#[test]
fn nan_stays_in_its_channel() {
    let Some(dev) = device() else { return };
    for element in TYPES {
        let [mut x, gamma, beta, dy] = tensors(50, 16, 0.0, element);
        x[20 * 16 + 5] = f32::NAN;
        let d = Norm { rows: 50, c: 16, eps: 1e-5 };
        for act in Activation::ALL {
            let op = Op::BatchNorm { dims: d, act, momentum: 0.1, running: [ParamId(0), ParamId(1)] };
            let got = run(&dev, &op, &[&x, &gamma, &beta], 3, x.len(), &dy, element, false);
            for values in [&got.value, &got.grads[0], &got.grads[1], &got.saved[0], &got.saved[1]] {
                assert!(values.iter().enumerate().all(|(i, v)| v.is_nan() == (i % 16 == 5)), "{act:?}");
            }
        }
        let got = run(&dev, &Op::LayerNorm(d), &[&x, &gamma, &beta], 3, x.len(), &dy, element, false);
        assert!(got.value.iter().enumerate().all(|(i, v)| v.is_nan() == (i / 16 == 20)));
        assert!(got.grads[0].iter().enumerate().all(|(i, v)| v.is_nan() == (i / 16 == 20)));
    }
}

#[test]
fn layer_norm_matches_the_cpu() {
    let Some(dev) = device() else { return };
    let mut ws = Workspace::default();
    for (i, rows) in [1, 3, 15, 130].into_iter().enumerate() {
        for c in [1, 3, 8, 24, 96, 100, 129, 264, 768, 1024, 1032] {
            let (d, accumulate) = (Norm { rows, c, eps: 1e-5 }, i % 2 == 1);
            for element in TYPES {
                // A constant row has no digits: one channel is all rounding.
                let [x, gamma, beta, dy] = tensors(rows, c, if c == 1 { 0.0 } else { 3.0 }, element);
                let got = run(&dev, &Op::LayerNorm(d), &[&x, &gamma, &beta], 3, rows * c, &dy, element, accumulate);
                let start = if accumulate { 1.0 } else { 0.0 };
                let (mut y, mut dx) = (vec![0.0; rows * c], vec![start; rows * c]);
                let [mut mean, mut rstd] = [vec![0.0; rows], vec![0.0; rows]];
                let [mut dgamma, mut dbeta] = [vec![start; c], vec![start; c]];
                layer_norm_forward(&d, &x, &gamma, &beta, &mut y, &mut mean, &mut rstd);
                layer_norm_backward(&d, &x, &gamma, &mean, &rstd, &dy, &mut dx, true, &mut dgamma, &mut dbeta, &mut ws);
                let what = format!("layer norm {rows}x{c}");
                close(&format!("{what} mean"), &got.saved[0], &mean, Element::F32);
                close(&format!("{what} rstd"), &got.saved[1], &rstd, Element::F32);
                compare(&what, &got, &y, [&dx, &dgamma, &dbeta], element);
            }
        }
    }
}

#[test]
fn group_norm_matches_the_cpu() {
    let Some(dev) = device() else { return };
    let mut ws = Workspace::default();
    for [batch, rows, c] in [[1, 1, 8], [3, 7, 3], [2, 50, 24], [1, 600, 64], [3, 49, 129], [5, 4, 520]] {
        let d = GroupNorm { batch, rows, c, eps: 1e-5 };
        for (element, accumulate) in TYPES.into_iter().zip([false, true]) {
            let [x, gamma, beta, dy] = tensors(batch * rows, c, 0.5, element);
            let n = x.len();
            let got = run(&dev, &Op::GroupNorm(d), &[&x, &gamma, &beta], 3, n, &dy, element, accumulate);
            let start = if accumulate { 1.0 } else { 0.0 };
            let (mut y, mut dx) = (vec![0.0; n], vec![start; n]);
            let [mut mean, mut rstd] = [vec![0.0; batch], vec![0.0; batch]];
            let [mut dgamma, mut dbeta] = [vec![start; c], vec![start; c]];
            group_norm_forward(&d, &x, &gamma, &beta, &mut y, &mut mean, &mut rstd, &mut ws);
            group_norm_backward(&d, &x, &gamma, &mean, &rstd, &dy, &mut dx, true, &mut dgamma, &mut dbeta, &mut ws);
            compare(&format!("{d:?}"), &got, &y, [&dx, &dgamma, &dbeta], element);
        }
    }
}
