//! Plain formulations of convolution, generic over f32 and f64: every sum written as its definition says.
//!
//! They are the reference path (`--kernels reference`) for what dfdx cannot express on stable Rust, and the oracle of
//! the fast kernels' tests. Nothing here is parallel or vectorised by hand.

use crate::conv::Conv2d;
use std::ops::{Add, AddAssign, Mul};

/// What the reference formulations need of a number.
pub trait Float: Copy + Default + Add<Output = Self> + Mul<Output = Self> + AddAssign {}
impl Float for f32 {}
impl Float for f64 {}

/// One product of a convolution: `y[y] += x[x] * w[w]`, by flat index.
#[derive(Clone, Copy)]
struct Term {
    x: usize,
    w: usize,
    y: usize,
}

/// Calls `body` once for every product of the convolution, in a fixed order; taps in the padding are left out.
fn for_each_term(d: &Conv2d, mut body: impl FnMut(Term)) {
    let (out_h, out_w) = (d.out_h(), d.out_w());
    let (in_group, out_group) = (d.c_in / d.groups.max(1), d.c_out / d.groups.max(1));
    for n in 0..d.batch {
        for oy in 0..out_h {
            for ox in 0..out_w {
                for o in 0..d.c_out {
                    let first = o / out_group * in_group;
                    let y = ((n * out_h + oy) * out_w + ox) * d.c_out + o;
                    for ky in 0..d.kh {
                        let Some(iy) = (oy * d.stride + ky).checked_sub(d.pad).filter(|iy| *iy < d.h) else {
                            continue;
                        };
                        for kx in 0..d.kw {
                            let Some(ix) = (ox * d.stride + kx).checked_sub(d.pad).filter(|ix| *ix < d.w) else {
                                continue;
                            };
                            for i in 0..in_group {
                                body(Term {
                                    x: ((n * d.h + iy) * d.w + ix) * d.c_in + first + i,
                                    w: ((o * in_group + i) * d.kh + ky) * d.kw + kx,
                                    y,
                                });
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Convolution, any group count: see [`crate::conv2d_forward`] for the layout.
pub fn conv2d_forward<T: Float>(d: &Conv2d, x: &[T], w: &[T], bias: Option<&[T]>, y: &mut [T]) {
    d.check(x.len(), w.len(), y.len());
    for pixel in y.chunks_exact_mut(d.c_out.max(1)) {
        match bias {
            Some(bias) => pixel.copy_from_slice(bias),
            None => pixel.fill(T::default()),
        }
    }
    for_each_term(d, |t| y[t.y] += x[t.x] * w[t.w]);
}

/// Gradient by the input: see [`crate::conv2d_backward_data`].
pub fn conv2d_backward_data<T: Float>(d: &Conv2d, w: &[T], dy: &[T], dx: &mut [T], accumulate: bool) {
    d.check(dx.len(), w.len(), dy.len());
    if !accumulate {
        dx.fill(T::default());
    }
    for_each_term(d, |t| dx[t.x] += dy[t.y] * w[t.w]);
}

/// Gradient by the weights and bias, added: see [`crate::conv2d_backward_weights`].
pub fn conv2d_backward_weights<T: Float>(d: &Conv2d, x: &[T], dy: &[T], dw: &mut [T], dbias: Option<&mut [T]>) {
    d.check(x.len(), dw.len(), dy.len());
    for_each_term(d, |t| dw[t.w] += dy[t.y] * x[t.x]);
    if let Some(dbias) = dbias {
        for pixel in dy.chunks_exact(d.c_out.max(1)) {
            dbias.iter_mut().zip(pixel).for_each(|(sum, v)| *sum += *v);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{random, wide};

    /// Central differences of `L = sum(g * y)` in f64 with step 1e-3: exact up to rounding, for L is linear in each of
    /// x, w and b.
    #[test]
    fn gradients_agree_with_finite_differences() {
        for (groups, c_in, c_out, stride, pad, k) in
            [(1, 3, 2, 1, 1, 3), (1, 2, 3, 2, 1, 3), (4, 4, 4, 1, 2, 5), (3, 3, 3, 2, 1, 3), (2, 4, 6, 1, 0, 2)]
        {
            let d = Conv2d { batch: 2, h: 5, w: 4, c_in, c_out, kh: k, kw: k, stride, pad, groups };
            let len_y = d.batch * d.out_h() * d.out_w() * c_out;
            let mut x = wide(&random(d.batch * d.h * d.w * c_in, 1));
            let mut w = wide(&random(d.weights(), 2));
            let mut b = wide(&random(c_out, 3));
            let g = wide(&random(len_y, 4));
            let loss = |x: &[f64], w: &[f64], b: &[f64]| {
                let mut y = vec![0.0; len_y];
                conv2d_forward(&d, x, w, Some(b), &mut y);
                y.iter().zip(&g).map(|(y, g)| y * g).sum::<f64>()
            };
            let (mut dx, mut dw, mut db) = (vec![0.0; x.len()], vec![0.0; w.len()], vec![0.0; c_out]);
            conv2d_backward_data(&d, &w, &g, &mut dx, false);
            conv2d_backward_weights(&d, &x, &g, &mut dw, Some(&mut db));
            let step = 1e-3;
            macro_rules! compare {
                ($v:ident, $grad:ident) => {
                    for i in 0..$v.len() {
                        let at = $v[i];
                        $v[i] = at + step;
                        let up = loss(&x, &w, &b);
                        $v[i] = at - step;
                        let down = loss(&x, &w, &b);
                        $v[i] = at;
                        let want = (up - down) / (2.0 * step);
                        assert!(($grad[i] - want).abs() < 1e-9, "{d:?}: {} {i}: {} {want}", stringify!($v), $grad[i]);
                    }
                };
            }
            compare!(x, dx);
            compare!(w, dw);
            compare!(b, db);
        }
    }
}
