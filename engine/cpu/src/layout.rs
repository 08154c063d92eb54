//! Ops that only move numbers: MobileViT's patches, concatenation, slices, the class token, permutations.
//! Each one's VJP is its inverse (or its adjoint), with `accumulate`.

use rayon::prelude::*;

/// Copies, or adds, a run of elements.
#[inline]
fn put(from: &[f32], to: &mut [f32], accumulate: bool) {
    if accumulate {
        for (to, from) in to.iter_mut().zip(from) {
            *to += from;
        }
    } else {
        to.copy_from_slice(from);
    }
}

/// MobileViT's division of an image into patches. With P = ph·pw positions inside a patch and
/// N = (H/ph)·(W/pw) patches, the sequences are [B·P, N, C]: one sequence per position, one token per patch
/// (timm's `MobileVitBlock`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patches {
    /// B.
    pub batch: usize,
    /// H, a multiple of `ph`.
    pub h: usize,
    /// W, a multiple of `pw`.
    pub w: usize,
    /// C.
    pub c: usize,
    /// Patch height.
    pub ph: usize,
    /// Patch width.
    pub pw: usize,
}

impl Patches {
    /// P, positions inside a patch.
    pub fn area(&self) -> usize {
        self.ph * self.pw
    }

    /// N, patches of an image.
    pub fn count(&self) -> usize {
        (self.h / self.ph) * (self.w / self.pw)
    }

    fn check(&self, a: &[f32], b: &[f32]) {
        assert!(
            self.ph > 0 && self.pw > 0 && self.h.is_multiple_of(self.ph) && self.w.is_multiple_of(self.pw),
            "{}x{} patches do not tile {}x{}",
            self.ph,
            self.pw,
            self.h,
            self.w
        );
        let len = self.batch * self.h * self.w * self.c;
        assert!(a.len() == len && b.len() == len, "the image is [B, H, W, C], the sequences [B*P, N, C]");
    }

    /// Calls `f(start in the image, start in the sequences)` for each token of image `b`, both counted
    /// from the image's own first element.
    fn each_token(&self, mut f: impl FnMut(usize, usize)) {
        let (columns, count) = (self.w / self.pw, self.count());
        for y in 0..self.h {
            for x in 0..self.w {
                let position = (y % self.ph) * self.pw + x % self.pw;
                let patch = (y / self.ph) * columns + x / self.pw;
                f((y * self.w + x) * self.c, (position * count + patch) * self.c);
            }
        }
    }
}

/// y [B·P, N, C] (+)= the patches of x [B, H, W, C]. Its VJP is [`fold_patches`] and the other way round.
pub fn unfold_patches(d: &Patches, x: &[f32], y: &mut [f32], accumulate: bool) {
    d.check(x, y);
    let image = (d.h * d.w * d.c).max(1);
    y.par_chunks_mut(image).zip(x.par_chunks(image)).for_each(|(y, x)| {
        d.each_token(|at, token| put(&x[at..at + d.c], &mut y[token..token + d.c], accumulate));
    });
}

/// y [B, H, W, C] (+)= the image whose patches are x [B·P, N, C]: the inverse of [`unfold_patches`].
pub fn fold_patches(d: &Patches, x: &[f32], y: &mut [f32], accumulate: bool) {
    d.check(y, x);
    let image = (d.h * d.w * d.c).max(1);
    y.par_chunks_mut(image).zip(x.par_chunks(image)).for_each(|(y, x)| {
        d.each_token(|at, token| put(&x[token..token + d.c], &mut y[at..at + d.c], accumulate));
    });
}

/// y [R, CA + CB] = rows of a [R, CA] followed by rows of b [R, CB].
pub fn concat_last_forward(rows: usize, ca: usize, cb: usize, a: &[f32], b: &[f32], y: &mut [f32]) {
    check_concat(rows, ca, cb, a, b, y);
    if y.is_empty() {
        return;
    }
    let task = rows_per_task(ca + cb);
    y.par_chunks_mut(task * (ca + cb)).enumerate().for_each(|(chunk, y)| {
        for (i, y) in y.chunks_exact_mut(ca + cb).enumerate() {
            let r = chunk * task + i;
            y[..ca].copy_from_slice(&a[r * ca..][..ca]);
            y[ca..].copy_from_slice(&b[r * cb..][..cb]);
        }
    });
}

/// VJP of [`concat_last_forward`] for operand `which` (0 for a, 1 for b).
pub fn concat_last_backward(
    rows: usize,
    ca: usize,
    cb: usize,
    which: usize,
    dy: &[f32],
    dx: &mut [f32],
    accumulate: bool,
) {
    let (start, count) = if which == 0 { (0, ca) } else { (ca, cb) };
    slice_rows_forward_or_add(rows, ca + cb, 1, start, count, dy, dx, accumulate);
}

fn check_concat(rows: usize, ca: usize, cb: usize, a: &[f32], b: &[f32], y: &[f32]) {
    assert_eq!(a.len(), rows * ca, "a is [R, CA]");
    assert_eq!(b.len(), rows * cb, "b is [R, CB]");
    assert_eq!(y.len(), rows * (ca + cb), "y is [R, CA + CB]");
}

fn rows_per_task(width: usize) -> usize {
    (crate::activation::CHUNK / width.max(1)).max(1)
}

/// y [O, count, width] = x[:, start..start + count, :] of x [O, rows, width]: a range of tokens (O = batch)
/// or, with width 1, of channels.
pub fn slice_rows_forward(
    outer: usize,
    rows: usize,
    width: usize,
    start: usize,
    count: usize,
    x: &[f32],
    y: &mut [f32],
) {
    slice_rows_forward_or_add(outer, rows, width, start, count, x, y, false);
}

/// [`slice_rows_forward`] that adds to y where `accumulate`.
pub fn slice_rows_forward_or_add(
    outer: usize,
    rows: usize,
    width: usize,
    start: usize,
    count: usize,
    x: &[f32],
    y: &mut [f32],
    accumulate: bool,
) {
    check_slice(outer, rows, width, start, count, x, y);
    if y.is_empty() {
        return;
    }
    let (n, task) = (count * width, rows_per_task(rows * width));
    y.par_chunks_mut(task * n).zip(x.par_chunks(task * rows * width)).for_each(|(y, x)| {
        for (y, x) in y.chunks_exact_mut(n).zip(x.chunks_exact(rows * width)) {
            put(&x[start * width..][..n], y, accumulate);
        }
    });
}

/// VJP of [`slice_rows_forward`]: dx is dy inside the range and zero outside.
pub fn slice_rows_backward(
    outer: usize,
    rows: usize,
    width: usize,
    start: usize,
    count: usize,
    dy: &[f32],
    dx: &mut [f32],
    accumulate: bool,
) {
    check_slice(outer, rows, width, start, count, dx, dy);
    if dx.is_empty() {
        return;
    }
    let n = count * width;
    for (o, dx) in dx.chunks_exact_mut(rows * width).enumerate() {
        if !accumulate {
            dx.fill(0.0);
        }
        put(&dy[o * n..(o + 1) * n], &mut dx[start * width..][..n], accumulate);
    }
}

fn check_slice(outer: usize, rows: usize, width: usize, start: usize, count: usize, x: &[f32], y: &[f32]) {
    assert!(start + count <= rows, "rows {start}..{} of {rows}", start + count);
    assert_eq!(x.len(), outer * rows * width, "x is [O, rows, width]");
    assert_eq!(y.len(), outer * count * width, "y is [O, count, width]");
}

/// y [B, N + 1, C] = the token \[C\] followed by x [B, N, C].
pub fn prepend_token_forward(batch: usize, tokens: usize, width: usize, token: &[f32], x: &[f32], y: &mut [f32]) {
    assert_eq!(token.len(), width, "the token is [C]");
    assert_eq!(x.len(), batch * tokens * width, "x is [B, N, C]");
    assert_eq!(y.len(), batch * (tokens + 1) * width, "y is [B, N + 1, C]");
    if y.is_empty() {
        return;
    }
    let n = tokens * width;
    y.par_chunks_mut(n + width).enumerate().for_each(|(b, y)| {
        y[..width].copy_from_slice(token);
        y[width..].copy_from_slice(&x[b * n..(b + 1) * n]);
    });
}

/// VJP of [`prepend_token_forward`] for the token, a parameter: `dtoken` is added to. The VJP for x is
/// [`slice_rows_forward_or_add`] of rows `1..N + 1`.
pub fn prepend_token_backward_token(batch: usize, tokens: usize, width: usize, dy: &[f32], dtoken: &mut [f32]) {
    assert_eq!(dtoken.len(), width, "the token is [C]");
    assert_eq!(dy.len(), batch * (tokens + 1) * width, "dy is [B, N + 1, C]");
    for dy in dy.chunks_exact(((tokens + 1) * width).max(1)) {
        put(&dy[..width], dtoken, true);
    }
}

/// y [cols, rows] = xᵀ of x [rows, cols].
pub fn transpose_2d(rows: usize, cols: usize, x: &[f32], y: &mut [f32]) {
    transpose_2d_backward(cols, rows, x, y, false);
}

/// VJP of [`transpose_2d`]: dx [rows, cols] (+)= dyᵀ of dy [cols, rows].
pub fn transpose_2d_backward(rows: usize, cols: usize, dy: &[f32], dx: &mut [f32], accumulate: bool) {
    const TILE: usize = 16;
    assert!(dy.len() == rows * cols && dx.len() == rows * cols, "matrices are rows x cols");
    if dx.is_empty() {
        return;
    }
    dx.par_chunks_mut(TILE * cols).enumerate().for_each(|(block, dx)| {
        for first in (0..cols).step_by(TILE) {
            for (i, row) in dx.chunks_exact_mut(cols).enumerate() {
                let r = block * TILE + i;
                for col in first..(first + TILE).min(cols) {
                    let value = dy[col * rows + r];
                    row[col] = if accumulate { row[col] + value } else { value };
                }
            }
        }
    });
}

/// Most axes of a permuted tensor.
pub const MAX_AXES: usize = 8;

/// y (+)= x with its axes reordered: y's axis i is x's axis `perm[i]`; `shape` is x's. Its VJP is the inverse
/// permutation.
///
/// # Panics
/// If `perm` is no permutation of the axes, or there are more than [`MAX_AXES`].
pub fn permute(shape: &[usize], perm: &[usize], x: &[f32], y: &mut [f32], accumulate: bool) {
    each_permuted(shape, perm, x.len(), y.len(), |from, at, count, stride| {
        let y = &mut y[at..at + count];
        if stride == 1 {
            return put(&x[from..from + count], y, accumulate);
        }
        for (i, y) in y.iter_mut().enumerate() {
            let value = x[from + i * stride];
            *y = if accumulate { *y + value } else { value };
        }
    });
}

/// Calls `f(start in x, start in y, elements, stride in x)` for each run along y's last axis.
fn each_permuted(shape: &[usize], perm: &[usize], x: usize, y: usize, mut f: impl FnMut(usize, usize, usize, usize)) {
    let axes = shape.len();
    assert!(axes == perm.len() && (1..=MAX_AXES).contains(&axes), "{perm:?} does not permute {axes} axes");
    let (mut strides, mut seen) = ([0; MAX_AXES], [false; MAX_AXES]);
    let mut len = 1;
    for axis in (0..axes).rev() {
        strides[axis] = len;
        len *= shape[axis];
    }
    assert!(x == len && y == len, "x and y have the shape's elements");
    for axis in perm {
        assert!(*axis < axes && !std::mem::replace(&mut seen[*axis], true), "{perm:?} is no permutation");
    }
    if len == 0 {
        return;
    }
    let last = perm[axes - 1];
    let (count, stride) = (shape[last], strides[last]);
    let mut index = [0; MAX_AXES];
    for at in (0..len).step_by(count) {
        let from = (0..axes - 1).map(|i| index[i] * strides[perm[i]]).sum();
        f(from, at, count, stride);
        for i in (0..axes - 1).rev() {
            index[i] += 1;
            if index[i] < shape[perm[i]] {
                break;
            }
            index[i] = 0;
        }
    }
}
