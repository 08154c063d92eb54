//! Position embeddings for another number of tokens.

/// Grid positions behind `prefix` others (class token), resized from `old`×`old` to `new`×`new` as timm's
/// `resample_abs_pos_embed` and open_clip's `resize_pos_embed` do: bicubic, with the filter widened where the grid
/// shrinks (PyTorch's `interpolate(mode="bicubic", antialias=True)`). `x_nc` holds `prefix + old²` rows of `width`.
pub(super) fn resize_grid(x_nc: &[f32], prefix: usize, old: usize, new: usize, width: usize) -> Vec<f32> {
    let taps = cubic_taps(old, new);
    let (head, grid) = x_nc.split_at(prefix * width);
    // Along x, then along y; rows of the grid are `old` tokens.
    let mut wide = vec![0f64; old * new * width];
    for (row, out) in grid.chunks_exact(old * width).zip(wide.chunks_exact_mut(new * width)) {
        for ((first, weights), out) in taps.iter().zip(out.chunks_exact_mut(width)) {
            for (weight, token) in weights.iter().zip(row[first * width..].chunks_exact(width)) {
                out.iter_mut().zip(token).for_each(|(o, &t)| *o += weight * f64::from(t));
            }
        }
    }
    let mut out = head.to_vec();
    for (first, weights) in &taps {
        let mut row = vec![0f64; new * width];
        for (weight, token) in weights.iter().zip(wide[first * new * width..].chunks_exact(new * width)) {
            row.iter_mut().zip(token).for_each(|(o, t)| *o += weight * t);
        }
        out.extend(row.iter().map(|&v| v as f32));
    }
    out
}

/// For each output the first input and the weights of it and those behind it.
fn cubic_taps(old: usize, new: usize) -> Vec<(usize, Vec<f64>)> {
    let scale = old as f64 / new as f64;
    let stretch = scale.max(1.0);
    let support = 2.0 * stretch;
    let taps = |i: usize| {
        let centre = scale * (i as f64 + 0.5);
        let first = ((centre - support + 0.5) as i64).max(0) as usize;
        let end = ((centre + support + 0.5) as usize).min(old);
        let weights: Vec<f64> = (first..end).map(|j| cubic((j as f64 - centre + 0.5) / stretch)).collect();
        let sum: f64 = weights.iter().sum();
        (first, weights.into_iter().map(|w| w / sum).collect())
    };
    (0..new).map(taps).collect()
}

/// Keys' cubic kernel with a = −½.
fn cubic(x: f64) -> f64 {
    let x = x.abs();
    match x {
        _ if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
        _ if x < 2.0 => ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0,
        _ => 0.0,
    }
}

/// Positions of a text, resized from `old` to `new` as open_clip's `resize_text_pos_embed` does: linear between the two
/// nearest.
pub(super) fn resize_line(x_nc: &[f32], old: usize, new: usize, width: usize) -> Vec<f32> {
    let scale = old as f64 / new as f64;
    let mut out = Vec::with_capacity(new * width);
    for i in 0..new {
        let at = (scale * (i as f64 + 0.5) - 0.5).max(0.0);
        let low = (at as usize).min(old - 1);
        let high = (low + 1).min(old - 1);
        let share = at - low as f64;
        let rows = x_nc[low * width..][..width].iter().zip(&x_nc[high * width..][..width]);
        out.extend(rows.map(|(&a, &b)| (f64::from(a) * (1.0 - share) + f64::from(b) * share) as f32));
    }
    out
}

/// How many tokens stand before the grids, where both numbers of tokens are those of a square grid behind as many.
pub(super) fn grid_prefix(old: usize, new: usize) -> Option<usize> {
    let square = |n: usize| n > 0 && n.isqrt().pow(2) == n;
    (0..=1).rev().find(|p| square(old.saturating_sub(*p)) && square(new.saturating_sub(*p)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use std::path::Path;

    use super::super::Checkpoint;
    use super::*;

    /// Against `interpolate` of PyTorch, through timm's function.
    #[test]
    fn positions_are_resized_as_by_timm_and_open_clip() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints/position.safetensors");
        let file = Checkpoint::open(&file).unwrap();
        let mut compared = 0;
        for name in file.names().filter(|n| n.ends_with(".in")) {
            let parts: Vec<&str> = name.split('.').collect();
            let number = |i: usize| parts[i].parse::<usize>().unwrap();
            let (prefix, old, new) = (number(1), number(2), number(3));
            let x = file.values(name).unwrap().unwrap();
            let expected = file.values(&name.replace(".in", ".out")).unwrap().unwrap();
            let out = match parts[0] {
                "grid" => {
                    assert_eq!(grid_prefix(prefix + old * old, prefix + new * new), Some(prefix));
                    resize_grid(&x, prefix, old, new, 4)
                }
                _ => resize_line(&x, old, new, 4),
            };
            assert_eq!(out.len(), expected.len(), "{name}");
            let worst = out.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 2e-6, "{name}: {worst}");
            compared += 1;
        }
        assert_eq!(compared, 7);
    }

    #[test]
    fn prefixes_are_told_from_grids() {
        for (old, new, prefix) in
            [(197, 50, Some(1)), (196, 49, Some(0)), (197, 49, None), (77, 32, None), (1, 4, Some(0))]
        {
            assert_eq!(grid_prefix(old, new), prefix, "{old} {new}");
        }
    }
}
