//! Fully connected layer: `y[r,o] = sum_i x[r,i] w[o,i] + b[o]`.

use crate::gemm::{Epilogue, Gemm, bf16, multiply};
use crate::reduce::add_column_sums;
use crate::workspace::{Precision, Workspace};

/// Sizes of a fully connected layer. `x` is `[rows, c_in]`, `w` is `[c_out, c_in]`, `y` is `[rows, c_out]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Linear {
    /// Rows of the input: batch times positions.
    pub rows: usize,
    /// Input channels.
    pub c_in: usize,
    /// Output channels.
    pub c_out: usize,
}

impl Linear {
    /// Floating-point operations of the forward pass.
    pub fn flops(&self) -> u64 {
        2 * self.rows as u64 * self.c_in as u64 * self.c_out as u64
    }

    fn check(&self, x: usize, w: usize, y: usize) {
        assert_eq!(x, self.rows * self.c_in, "x's length");
        assert_eq!(w, self.c_out * self.c_in, "w's length");
        assert_eq!(y, self.rows * self.c_out, "y's length");
    }
}

/// A layer's product in the workspace's precision.
fn layer_product(
    g: &Gemm,
    a: &[f32],
    b: &[f32],
    accumulate: bool,
    epilogue: &Epilogue,
    c: &mut [f32],
    ws: &mut Workspace,
) {
    match ws.precision() {
        Precision::F32 => multiply(g, 1.0, a, b, accumulate, epilogue, c, ws),
        Precision::Bf16 => bf16::multiply(g, a, b, accumulate, epilogue, c, ws),
    }
}

/// `y = x w^T + bias`. Panics if a slice's length is not what `d` says, as all functions here do.
pub fn linear_forward(d: &Linear, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32], ws: &mut Workspace) {
    linear_fused_forward(d, x, w, &Epilogue::bias(bias), y, ws);
}

/// `y = act(x w^T + bias + residual)` in one pass over `y`.
pub fn linear_fused_forward(d: &Linear, x: &[f32], w: &[f32], epilogue: &Epilogue, y: &mut [f32], ws: &mut Workspace) {
    d.check(x.len(), w.len(), y.len());
    let g = Gemm { m: d.rows, n: d.c_out, k: d.c_in, trans_a: false, trans_b: true };
    layer_product(&g, x, w, false, epilogue, y, ws);
}

/// `dx = dy w`, added to `dx` if `accumulate`.
pub fn linear_backward_data(d: &Linear, w: &[f32], dy: &[f32], dx: &mut [f32], accumulate: bool, ws: &mut Workspace) {
    d.check(dx.len(), w.len(), dy.len());
    let g = Gemm { m: d.rows, n: d.c_in, k: d.c_out, trans_a: false, trans_b: false };
    layer_product(&g, dy, w, accumulate, &Epilogue::default(), dx, ws);
}

/// `dw += dy^T x`, `dbias += column sums of dy`.
pub fn linear_backward_weights(
    d: &Linear,
    x: &[f32],
    dy: &[f32],
    dw: &mut [f32],
    dbias: Option<&mut [f32]>,
    ws: &mut Workspace,
) {
    d.check(x.len(), dw.len(), dy.len());
    let g = Gemm { m: d.c_out, n: d.c_in, k: d.rows, trans_a: true, trans_b: false };
    layer_product(&g, dy, x, true, &Epilogue::default(), dw, ws);
    if let Some(dbias) = dbias {
        assert_eq!(dbias.len(), d.c_out, "dbias's length");
        add_column_sums(dy, d.c_out, dbias, ws);
    }
}
