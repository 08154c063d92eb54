use super::*;
use crate::linear::{Linear, linear_backward_data, linear_backward_weights, linear_forward};
use crate::testing::{assert_close, at_each_level, random, wide, with_threads};

/// Relative error allowed: f32 sums of up to a few thousand products of magnitude at most 1.
const TOLERANCE: f64 = 1e-5;

fn naive(d: &Gemm, alpha: f64, a: &[f64], b: &[f64], beta: f64, c: &[f64]) -> Vec<f64> {
    let mut out: Vec<f64> = c.iter().map(|v| if beta == 0.0 { 0.0 } else { beta * v }).collect();
    for i in 0..d.m {
        for j in 0..d.n {
            let mut sum = 0.0;
            for l in 0..d.k {
                let a = if d.trans_a { a[l * d.m + i] } else { a[i * d.k + l] };
                let b = if d.trans_b { b[j * d.k + l] } else { b[l * d.n + j] };
                sum += a * b;
            }
            out[i * d.n + j] += alpha * sum;
        }
    }
    out
}

fn check(m: usize, n: usize, k: usize, alpha: f32, beta: f32) {
    for (trans_a, trans_b) in [(false, false), (false, true), (true, false), (true, true)] {
        let d = Gemm { m, n, k, trans_a, trans_b };
        let (a, b, c) = (random(m * k, 1), random(k * n, 2), random(m * n, 3));
        let want = naive(&d, alpha.into(), &wide(&a), &wide(&b), beta.into(), &wide(&c));
        at_each_level(|level, ws| {
            let mut got = c.clone();
            gemm(&d, alpha, &a, &b, beta, &mut got, ws);
            assert_close(&got, &want, TOLERANCE, &format!("{d:?} at {level}"));
            let mut again = c.clone();
            gemm(&d, alpha, &a, &b, beta, &mut again, ws);
            assert!(got == again, "{d:?} at {level}: two runs differ");
        });
    }
}

#[test]
fn ragged_sizes_agree_with_f64() {
    for m in [1, 3, 17, 33] {
        for n in [1, 3, 16, 17, 33, 50, 64, 80] {
            for k in [0, 1, 3, 17, 33] {
                check(m, n, k, 1.0, 0.0);
            }
        }
    }
    check(13, 29, 7, 0.5, 1.0);
    check(13, 29, 7, -2.0, 0.25);
}

#[test]
fn parallel_paths_agree_with_f64() {
    with_threads(3, || {
        check(700, 33, 65, 1.0, 0.0); // by rows
        check(5, 1000, 130, 1.0, 1.0); // by columns
        check(17, 24, 5000, 1.0, 1.0); // along the inner dimension
        check(80, 300, 900, 0.5, 0.0); // several blocks of the inner dimension, B packed
    });
}

#[test]
fn zero_beta_ignores_old_contents() {
    let d = Gemm { m: 3, n: 5, k: 2, trans_a: false, trans_b: false };
    at_each_level(|_, ws| {
        let mut c = vec![f32::NAN; 15];
        gemm(&d, 1.0, &[1.0; 6], &[1.0; 10], 0.0, &mut c, ws);
        assert_eq!(c, vec![2.0; 15]);
    });
}

#[test]
fn batches_are_independent() {
    let d = Gemm { m: 9, n: 20, k: 6, trans_a: false, trans_b: true };
    let (a, b, c) = (random(5 * 54, 1), random(5 * 120, 2), random(5 * 180, 3));
    at_each_level(|level, ws| {
        let mut got = c.clone();
        batched_gemm(5, &d, 1.5, &a, &b, 1.0, &mut got, ws);
        for i in 0..5 {
            let (a, b) = (wide(&a[i * 54..][..54]), wide(&b[i * 120..][..120]));
            let want = naive(&d, 1.5, &a, &b, 1.0, &wide(&c[i * 180..][..180]));
            assert_close(&got[i * 180..][..180], &want, TOLERANCE, &format!("item {i} at {level}"));
        }
    });
}

#[test]
fn serial_product_keeps_what_lies_between_rows() {
    let (m, n, k) = (5, 7, 4);
    let (a, b) = (random(m * 9, 1), random(n * 11, 2));
    at_each_level(|level, _| {
        let mut c = vec![0.5; m * 10];
        gemm_serial(level, (m, n, k), 2.0, Mat::new(&a, 9), Mat::transposed(&b, 11), true, &mut c, 10);
        for i in 0..m {
            for j in 0..10.min(c.len() - i * 10) {
                let mut want = 0.5;
                if j < n {
                    want += 2.0 * (0..k).map(|l| f64::from(a[i * 9 + l]) * f64::from(b[j * 11 + l])).sum::<f64>();
                }
                assert!((f64::from(c[i * 10 + j]) - want).abs() < 1e-5, "({i},{j}) at {level}");
            }
        }
    });
}

#[test]
fn linear_layer_agrees_with_f64() {
    for (rows, c_in, c_out, threads) in [(1, 3, 17, 1), (33, 17, 5, 1), (2100, 40, 31, 3)] {
        let d = Linear { rows, c_in, c_out };
        let (x, w, b) = (random(rows * c_in, 1), random(c_out * c_in, 2), random(c_out, 3));
        let dy = random(rows * c_out, 4);
        let product = |m, n, k, trans_a, trans_b, a: &[f32], b: &[f32]| {
            naive(&Gemm { m, n, k, trans_a, trans_b }, 1.0, &wide(a), &wide(b), 0.0, &vec![0.0; m * n])
        };
        let mut y = product(rows, c_out, c_in, false, true, &x, &w);
        y.iter_mut().enumerate().for_each(|(i, v)| *v += f64::from(b[i % c_out]));
        let mut dx = product(rows, c_in, c_out, false, false, &dy, &w);
        dx.iter_mut().for_each(|v| *v += 1.0);
        let dw = product(c_out, c_in, rows, true, false, &dy, &x);
        let db: Vec<f64> =
            (0..c_out).map(|o| 1.0 + (0..rows).map(|r| f64::from(dy[r * c_out + o])).sum::<f64>()).collect();
        with_threads(threads, || {
            at_each_level(|level, ws| {
                let what = format!("{d:?} at {level}");
                let mut got = vec![f32::NAN; rows * c_out];
                linear_forward(&d, &x, &w, Some(&b), &mut got, ws);
                assert_close(&got, &y, TOLERANCE, &what);
                let mut got = vec![1.0; rows * c_in];
                linear_backward_data(&d, &w, &dy, &mut got, true, ws);
                assert_close(&got, &dx, TOLERANCE, &what);
                let (mut got, mut sums) = (vec![0.0; c_out * c_in], vec![1.0; c_out]);
                linear_backward_weights(&d, &x, &dy, &mut got, Some(&mut sums), ws);
                assert_close(&got, &dw, TOLERANCE, &what);
                assert_close(&sums, &db, TOLERANCE, &what);
            });
        });
    }
}
