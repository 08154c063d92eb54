//! The register blocks of depthwise convolution.

use crate::simd::{Level, Simd};
use crate::simd_fn;

/// One row of a correlation's output, or of its transpose's.
pub(super) struct Line<'a> {
    /// The image read, `[h, w, channels]`.
    pub image: &'a [f32],
    pub h: usize,
    pub w: usize,
    pub channels: usize,
    pub kh: usize,
    pub kw: usize,
    pub stride: usize,
    /// Forward: image row under the kernel's first row. Transposed: the padded row that is written.
    pub top: isize,
    /// Columns of padding on the left.
    pub pad: usize,
    /// `[kh, kw, channels]`.
    pub weights: &'a [f32],
    pub bias: Option<&'a [f32]>,
    /// Add to the row instead of overwriting it.
    pub accumulate: bool,
}

impl Line<'_> {
    /// Index of the image row under kernel row `ky`, forward.
    #[inline(always)]
    fn row(&self, ky: usize) -> Option<usize> {
        usize::try_from(self.top + ky as isize).ok().filter(|y| *y < self.h)
    }

    /// Index of the image row that kernel row `ky` connects with the row written, transposed.
    #[inline(always)]
    fn row_transposed(&self, ky: usize) -> Option<usize> {
        let at = usize::try_from(self.top - ky as isize).ok()?;
        (at.is_multiple_of(self.stride) && at / self.stride < self.h).then_some(at / self.stride)
    }

    /// Panics unless the arrays are as long as the kernels read and write.
    fn check(&self, y: &[f32]) {
        assert_eq!(self.image.len(), self.h * self.w * self.channels);
        assert_eq!(self.weights.len(), self.kh * self.kw * self.channels);
        assert!(self.channels > 0 && y.len().is_multiple_of(self.channels));
        assert!(self.bias.is_none_or(|bias| bias.len() == self.channels));
    }
}

/// Loads a vector, or its first `n` lanes if `TAIL`.
///
/// # Safety
/// `LANES` elements are readable, or `n` if `TAIL`.
#[inline(always)]
unsafe fn get<S: Simd, const TAIL: bool>(s: S, p: *const f32, n: usize) -> S::V {
    // SAFETY: the caller's contract.
    unsafe { if TAIL { s.load_partial_ptr(p, n) } else { s.load_ptr(p) } }
}

/// Stores a vector, or its first `n` lanes if `TAIL`, on top of what is there if `add`.
///
/// # Safety
/// `LANES` elements are writable, or `n` if `TAIL`.
#[inline(always)]
unsafe fn put<S: Simd, const TAIL: bool>(s: S, p: *mut f32, n: usize, v: S::V, add: bool) {
    // SAFETY: the caller's contract.
    unsafe {
        let v = if add { s.add(get::<S, TAIL>(s, p, n), v) } else { v };
        if TAIL { s.store_partial_ptr(p, n, v) } else { s.store_ptr(p, v) }
    }
}

/// Columns `ox..ox + N` of a forward row, channels from `c` on. `EDGE`: some columns may lie in the padding.
///
/// # Safety
/// The line was checked, the columns lie in `y`, `n` channels (or `LANES`) follow `c`; without `EDGE` all columns
/// read lie in the image.
#[inline(always)]
unsafe fn forward_block<
    S: Simd,
    const K: usize,
    const ST: usize,
    const N: usize,
    const TAIL: bool,
    const EDGE: bool,
>(
    s: S,
    line: &Line,
    y: *mut f32,
    ox: usize,
    c: usize,
    n: usize,
) {
    let channels = line.channels;
    // SAFETY: the caller's contract.
    unsafe {
        let start = match line.bias {
            Some(bias) => get::<S, TAIL>(s, bias.as_ptr().add(c), n),
            None => s.zero(),
        };
        let mut acc = [start; N];
        let left = (ox * ST).wrapping_sub(line.pad);
        for ky in 0..K {
            let Some(row) = line.row(ky) else { continue };
            let mut taps = [s.zero(); K];
            for kx in 0..K {
                taps[kx] = get::<S, TAIL>(s, line.weights.as_ptr().add((ky * K + kx) * channels + c), n);
            }
            let row = line.image.as_ptr().add(row * line.w * channels + c);
            for j in 0..(N - 1) * ST + K {
                let ix = left.wrapping_add(j);
                if EDGE && ix >= line.w {
                    continue;
                }
                let v = get::<S, TAIL>(s, row.add(ix * channels), n);
                for o in 0..N {
                    if j >= o * ST && j - o * ST < K {
                        acc[o] = s.fma(v, taps[j - o * ST], acc[o]);
                    }
                }
            }
        }
        for o in 0..N {
            put::<S, TAIL>(s, y.add((ox + o) * channels + c), n, acc[o], line.accumulate);
        }
    }
}

/// Columns outside, channels inside: memory is then read and written in order.
#[inline(always)]
fn forward_row<S: Simd, const K: usize, const ST: usize>(s: S, line: &Line, y: &mut [f32]) {
    line.check(y);
    assert!(line.kh == K && line.kw == K && line.stride == ST);
    let channels = line.channels;
    let whole = channels - channels % S::LANES;
    let out_w = y.len() / channels;
    let y = y.as_mut_ptr();
    let inside = |ox: usize, n: usize| ox * ST >= line.pad && (ox + n - 1) * ST + K <= line.w + line.pad;
    let mut ox = 0;
    // SAFETY: columns `ox..ox + N` exist, the line was checked, blocks without EDGE are inside.
    unsafe {
        while ox < out_w {
            if S::LANES == 16 && out_w - ox >= 8 && inside(ox, 8) {
                for c in (0..whole).step_by(S::LANES) {
                    forward_block::<S, K, ST, 8, false, false>(s, line, y, ox, c, 0);
                }
                if whole < channels {
                    for o in [ox, ox + 4] {
                        forward_block::<S, K, ST, 4, true, true>(s, line, y, o, whole, channels - whole);
                    }
                }
                ox += 8;
            } else if out_w - ox >= 4 {
                for c in (0..whole).step_by(S::LANES) {
                    forward_block::<S, K, ST, 4, false, true>(s, line, y, ox, c, 0);
                }
                if whole < channels {
                    forward_block::<S, K, ST, 4, true, true>(s, line, y, ox, whole, channels - whole);
                }
                ox += 4;
            } else {
                for c in (0..channels).step_by(S::LANES) {
                    forward_block::<S, K, ST, 1, true, true>(s, line, y, ox, c, S::LANES.min(channels - c));
                }
                ox += 1;
            }
        }
    }
}

/// Any size, one column at a time.
#[inline(always)]
fn forward_any<S: Simd>(s: S, line: &Line, y: &mut [f32]) {
    line.check(y);
    let channels = line.channels;
    for (ox, pixel) in y.chunks_exact_mut(channels).enumerate() {
        for c in (0..channels).step_by(S::LANES) {
            let end = channels.min(c + S::LANES);
            let mut acc = line.bias.map_or(s.zero(), |bias| s.load_partial(&bias[c..end]));
            for ky in 0..line.kh {
                let Some(row) = line.row(ky) else { continue };
                for kx in 0..line.kw {
                    let Some(ix) = (ox * line.stride + kx).checked_sub(line.pad).filter(|ix| *ix < line.w) else {
                        continue;
                    };
                    let (at, tap) = ((row * line.w + ix) * channels, (ky * line.kw + kx) * channels);
                    let v = s.load_partial(&line.image[at + c..at + end]);
                    acc = s.fma(v, s.load_partial(&line.weights[tap + c..tap + end]), acc);
                }
            }
            let out = &mut pixel[c..end];
            let acc = if line.accumulate { s.add(s.load_partial(out), acc) } else { acc };
            s.store_partial(out, acc);
        }
    }
}

/// Columns `ix..ix + N` (`ix` even) of a row of a stride-2 transpose with padding `K / 2`, channels from `c` on.
///
/// # Safety
/// As for [`forward_block`].
#[inline(always)]
unsafe fn transposed_block<S: Simd, const K: usize, const N: usize, const TAIL: bool>(
    s: S,
    line: &Line,
    dx: *mut f32,
    ix: usize,
    c: usize,
    n: usize,
) {
    let (channels, pad) = (line.channels, K / 2);
    // Output column `ix / 2 + j - before` for j from 0 reaches the block.
    let before = pad / 2;
    // SAFETY: the caller's contract.
    unsafe {
        let mut acc = [s.zero(); N];
        let left = (ix / 2).wrapping_sub(before);
        for ky in 0..K {
            let Some(row) = line.row_transposed(ky) else { continue };
            let mut taps = [s.zero(); K];
            for kx in 0..K {
                taps[kx] = get::<S, TAIL>(s, line.weights.as_ptr().add((ky * K + kx) * channels + c), n);
            }
            let row = line.image.as_ptr().add(row * line.w * channels + c);
            for j in 0..(N - 1 + pad) / 2 + before + 1 {
                let ox = left.wrapping_add(j);
                if ox >= line.w {
                    continue;
                }
                let v = get::<S, TAIL>(s, row.add(ox * channels), n);
                for i in 0..N {
                    // kx = ix + i + pad - 2 ox.
                    let up = i + pad + 2 * before;
                    if up >= 2 * j && up - 2 * j < K {
                        acc[i] = s.fma(v, taps[up - 2 * j], acc[i]);
                    }
                }
            }
        }
        for i in 0..N {
            put::<S, TAIL>(s, dx.add((ix + i) * channels + c), n, acc[i], line.accumulate);
        }
    }
}

/// The stride-2 transpose with padding `K / 2`; see [`forward_row`].
#[inline(always)]
fn transposed_row<S: Simd, const K: usize>(s: S, line: &Line, dx: &mut [f32]) {
    line.check(dx);
    assert!(line.kh == K && line.kw == K && line.stride == 2 && line.pad == K / 2);
    let channels = line.channels;
    let whole = channels - channels % S::LANES;
    let width = dx.len() / channels;
    let dx = dx.as_mut_ptr();
    let mut ix = 0;
    // SAFETY: columns `ix..ix + N` exist and the line was checked.
    unsafe {
        while ix < width {
            let left = width - ix;
            for c in (0..channels).step_by(S::LANES) {
                match (left, c < whole) {
                    (4.., true) => transposed_block::<S, K, 4, false>(s, line, dx, ix, c, 0),
                    (4.., false) => transposed_block::<S, K, 4, true>(s, line, dx, ix, c, channels - whole),
                    (2.., _) => transposed_block::<S, K, 2, true>(s, line, dx, ix, c, S::LANES.min(channels - c)),
                    _ => transposed_block::<S, K, 1, true>(s, line, dx, ix, c, S::LANES.min(channels - c)),
                }
            }
            ix += match left {
                4.. => 4,
                2.. => 2,
                _ => 1,
            };
        }
    }
}

/// Any size, one column at a time.
#[inline(always)]
fn transposed_any<S: Simd>(s: S, line: &Line, dx: &mut [f32]) {
    line.check(dx);
    let channels = line.channels;
    for (ix, pixel) in dx.chunks_exact_mut(channels).enumerate() {
        for c in (0..channels).step_by(S::LANES) {
            let end = channels.min(c + S::LANES);
            let mut acc = s.zero();
            for ky in 0..line.kh {
                let Some(row) = line.row_transposed(ky) else { continue };
                for kx in 0..line.kw {
                    let Some(at) = (ix + line.pad).checked_sub(kx).filter(|at| at.is_multiple_of(line.stride)) else {
                        continue;
                    };
                    let ox = at / line.stride;
                    if ox >= line.w {
                        continue;
                    }
                    let (at, tap) = ((row * line.w + ox) * channels, (ky * line.kw + kx) * channels);
                    let v = s.load_partial(&line.image[at + c..at + end]);
                    acc = s.fma(v, s.load_partial(&line.weights[tap + c..tap + end]), acc);
                }
            }
            let out = &mut pixel[c..end];
            let acc = if line.accumulate { s.add(s.load_partial(out), acc) } else { acc };
            s.store_partial(out, acc);
        }
    }
}

/// Some output rows of one image, for the weight gradient.
pub(super) struct Strip<'a> {
    /// `[h, w, channels]`.
    pub image: &'a [f32],
    /// `[rows, out_w, channels]`.
    pub dy: &'a [f32],
    pub h: usize,
    pub w: usize,
    pub out_w: usize,
    pub channels: usize,
    pub kh: usize,
    pub kw: usize,
    pub stride: usize,
    /// Image row under the kernel's first row at the strip's first output row.
    pub top: isize,
    /// Columns of padding on the left.
    pub pad: usize,
}

impl Strip<'_> {
    fn rows(&self) -> usize {
        self.dy.len() / (self.out_w * self.channels)
    }

    /// Index of the image row under kernel row `ky` at output row `r` of the strip.
    #[inline(always)]
    fn row(&self, r: usize, ky: usize) -> Option<usize> {
        usize::try_from(self.top + (r * self.stride + ky) as isize).ok().filter(|y| *y < self.h)
    }

    fn check(&self, sum: &[f32]) {
        assert!(self.channels > 0 && self.out_w > 0);
        assert_eq!(self.image.len(), self.h * self.w * self.channels);
        assert!(self.dy.len().is_multiple_of(self.out_w * self.channels));
        assert_eq!(sum.len(), self.kh * self.kw * self.channels);
    }
}

/// Adds columns `ox..ox + N` of output row `r` to the sums of kernel rows `ky0..ky0 + KB`.
///
/// # Safety
/// As for [`forward_block`], for the strip.
#[inline(always)]
unsafe fn weights_block<
    S: Simd,
    const K: usize,
    const KB: usize,
    const ST: usize,
    const N: usize,
    const TAIL: bool,
    const EDGE: bool,
>(
    s: S,
    strip: &Strip,
    acc: &mut [[S::V; K]; KB],
    r: usize,
    ky0: usize,
    ox: usize,
    c: usize,
    n: usize,
) {
    let channels = strip.channels;
    // SAFETY: the caller's contract.
    unsafe {
        let dy = strip.dy.as_ptr().add((r * strip.out_w + ox) * channels + c);
        let mut g = [s.zero(); N];
        for o in 0..N {
            g[o] = get::<S, TAIL>(s, dy.add(o * channels), n);
        }
        let left = (ox * ST).wrapping_sub(strip.pad);
        for k in 0..KB {
            let Some(row) = strip.row(r, ky0 + k) else { continue };
            let row = strip.image.as_ptr().add(row * strip.w * channels + c);
            for j in 0..(N - 1) * ST + K {
                let ix = left.wrapping_add(j);
                if EDGE && ix >= strip.w {
                    continue;
                }
                let v = get::<S, TAIL>(s, row.add(ix * channels), n);
                for o in 0..N {
                    if j >= o * ST && j - o * ST < K {
                        acc[k][j - o * ST] = s.fma(v, g[o], acc[k][j - o * ST]);
                    }
                }
            }
        }
    }
}

/// All kernel rows, `KB` at a time: all three of a 3x3 kernel; of the larger ones, whose sums would not leave registers
/// for the rest, one.
#[inline(always)]
fn weights_strip<S: Simd, const K: usize, const KB: usize, const ST: usize>(s: S, strip: &Strip, sum: &mut [f32]) {
    strip.check(sum);
    assert!(strip.kh == K && strip.kw == K && strip.stride == ST && K.is_multiple_of(KB));
    let (channels, out_w, pad) = (strip.channels, strip.out_w, strip.pad);
    let whole = channels - channels % S::LANES;
    let sum = sum.as_mut_ptr();
    for c in (0..channels).step_by(S::LANES) {
        let n = S::LANES.min(channels - c);
        for ky0 in (0..K).step_by(KB) {
            let mut acc = [[s.zero(); K]; KB];
            for r in 0..strip.rows() {
                let mut ox = 0;
                // SAFETY: columns `ox..ox + N` exist, the strip was checked, blocks without EDGE are inside.
                unsafe {
                    while out_w - ox >= 4 {
                        let inside = ox * ST >= pad && (ox + 3) * ST + K <= strip.w + pad;
                        match (c < whole, inside) {
                            (true, true) => {
                                weights_block::<S, K, KB, ST, 4, false, false>(s, strip, &mut acc, r, ky0, ox, c, n);
                            }
                            (true, false) => {
                                weights_block::<S, K, KB, ST, 4, false, true>(s, strip, &mut acc, r, ky0, ox, c, n);
                            }
                            (false, _) => {
                                weights_block::<S, K, KB, ST, 4, true, true>(s, strip, &mut acc, r, ky0, ox, c, n);
                            }
                        }
                        ox += 4;
                    }
                    while ox < out_w {
                        weights_block::<S, K, KB, ST, 1, true, true>(s, strip, &mut acc, r, ky0, ox, c, n);
                        ox += 1;
                    }
                }
            }
            for k in 0..KB {
                for kx in 0..K {
                    // SAFETY: tap `(ky0 + k, kx)` and `n` channels from `c` lie in the checked sums.
                    unsafe { put::<S, true>(s, sum.add(((ky0 + k) * K + kx) * channels + c), n, acc[k][kx], true) };
                }
            }
        }
    }
}

/// Any size, one tap at a time.
#[inline(always)]
fn weights_any<S: Simd>(s: S, strip: &Strip, sum: &mut [f32]) {
    strip.check(sum);
    let channels = strip.channels;
    for ky in 0..strip.kh {
        for kx in 0..strip.kw {
            let own = &mut sum[(ky * strip.kw + kx) * channels..][..channels];
            for r in 0..strip.rows() {
                let Some(row) = strip.row(r, ky) else { continue };
                for ox in 0..strip.out_w {
                    let Some(ix) = (ox * strip.stride + kx).checked_sub(strip.pad).filter(|ix| *ix < strip.w) else {
                        continue;
                    };
                    let (at, from) = ((row * strip.w + ix) * channels, (r * strip.out_w + ox) * channels);
                    for c in (0..channels).step_by(S::LANES) {
                        let end = channels.min(c + S::LANES);
                        let v = s.load_partial(&strip.image[at + c..at + end]);
                        let g = s.load_partial(&strip.dy[from + c..from + end]);
                        let old = s.load_partial(&own[c..end]);
                        s.store_partial(&mut own[c..end], s.fma(v, g, old));
                    }
                }
            }
        }
    }
}

// One function for each size: a compiler's time grows faster than a function.
simd_fn! {
    fn forward_3_1(line: &Line, y: &mut [f32]) = forward_row::<_, 3, 1>;
    fn forward_3_2(line: &Line, y: &mut [f32]) = forward_row::<_, 3, 2>;
    fn forward_5_1(line: &Line, y: &mut [f32]) = forward_row::<_, 5, 1>;
    fn forward_5_2(line: &Line, y: &mut [f32]) = forward_row::<_, 5, 2>;
    fn forward_7_1(line: &Line, y: &mut [f32]) = forward_row::<_, 7, 1>;
    fn forward_7_2(line: &Line, y: &mut [f32]) = forward_row::<_, 7, 2>;
    fn forward_other(line: &Line, y: &mut [f32]) = forward_any;
    fn transposed_3(line: &Line, dx: &mut [f32]) = transposed_row::<_, 3>;
    fn transposed_5(line: &Line, dx: &mut [f32]) = transposed_row::<_, 5>;
    fn transposed_7(line: &Line, dx: &mut [f32]) = transposed_row::<_, 7>;
    fn transposed_other(line: &Line, dx: &mut [f32]) = transposed_any;
    fn weights_3_1(strip: &Strip, sum: &mut [f32]) = weights_strip::<_, 3, 3, 1>;
    fn weights_3_2(strip: &Strip, sum: &mut [f32]) = weights_strip::<_, 3, 3, 2>;
    fn weights_5_1(strip: &Strip, sum: &mut [f32]) = weights_strip::<_, 5, 1, 1>;
    fn weights_5_2(strip: &Strip, sum: &mut [f32]) = weights_strip::<_, 5, 1, 2>;
    fn weights_7_1(strip: &Strip, sum: &mut [f32]) = weights_strip::<_, 7, 1, 1>;
    fn weights_7_2(strip: &Strip, sum: &mut [f32]) = weights_strip::<_, 7, 1, 2>;
    fn weights_other(strip: &Strip, sum: &mut [f32]) = weights_any;
}

/// One output row of a correlation.
pub(super) fn forward(level: Level, line: &Line, y: &mut [f32]) {
    match (line.kh, line.kw, line.stride) {
        (3, 3, 1) => forward_3_1(level, line, y),
        (3, 3, 2) => forward_3_2(level, line, y),
        (5, 5, 1) => forward_5_1(level, line, y),
        (5, 5, 2) => forward_5_2(level, line, y),
        (7, 7, 1) => forward_7_1(level, line, y),
        (7, 7, 2) => forward_7_2(level, line, y),
        _ => forward_other(level, line, y),
    }
}

/// One row of the transpose of a strided correlation.
pub(super) fn transposed(level: Level, line: &Line, dx: &mut [f32]) {
    match (line.kh, line.kw, line.stride, line.pad) {
        (3, 3, 2, 1) => transposed_3(level, line, dx),
        (5, 5, 2, 2) => transposed_5(level, line, dx),
        (7, 7, 2, 3) => transposed_7(level, line, dx),
        _ => transposed_other(level, line, dx),
    }
}

/// `sum[ky, kx, c] +=` the strip's share of the weight gradient.
pub(super) fn weights(level: Level, strip: &Strip, sum: &mut [f32]) {
    match (strip.kh, strip.kw, strip.stride) {
        (3, 3, 1) => weights_3_1(level, strip, sum),
        (3, 3, 2) => weights_3_2(level, strip, sum),
        (5, 5, 1) => weights_5_1(level, strip, sum),
        (5, 5, 2) => weights_5_2(level, strip, sum),
        (7, 7, 1) => weights_7_1(level, strip, sum),
        (7, 7, 2) => weights_7_2(level, strip, sum),
        _ => weights_other(level, strip, sum),
    }
}
