//! Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019) on a batch of image-text pairs.
//!
//! Kind, λ and box are drawn once per step for the whole batch, as timm's batch mode does: with one λ for all rows
//! the targets are a distribution in the text direction too (a text gets λ from its own image and 1-λ from the one
//! that it is mixed into). The partner of row i is row (i + r) mod B with a random r: no row is its own partner, and
//! the rows of a batch are shuffled already.

use crate::error::{DataError, Result};
use crate::rng::Rng;
use crate::transform::Normalize;

/// Parameters of Mixup or of CutMix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MixOptions {
    /// λ ~ Beta(alpha, alpha).
    pub alpha: f64,
    /// Probability that a step uses it.
    pub probability: f64,
}

/// Which of the two a step uses; at most one.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct MixPolicy {
    /// Mixup.
    pub mixup: Option<MixOptions>,
    /// CutMix.
    pub cutmix: Option<MixOptions>,
}

impl MixPolicy {
    /// Checks ranges.
    ///
    /// # Errors
    /// [`DataError::Option`].
    pub fn check(&self) -> Result<()> {
        let mut sum = 0.0;
        for (name, options) in [("mixup", &self.mixup), ("cutmix", &self.cutmix)] {
            let Some(o) = options else { continue };
            if !(o.alpha > 0.0 && o.alpha.is_finite()) {
                return Err(DataError::Option(format!("{name}.alpha {}: expected more than 0", o.alpha)));
            }
            if !(0.0..=1.0).contains(&o.probability) {
                return Err(DataError::Option(format!("{name}.probability {}: expected 0 to 1", o.probability)));
            }
            sum += o.probability;
        }
        if sum > 1.0 + 1e-9 {
            return Err(DataError::Option(format!(
                "mixup.probability + cutmix.probability = {sum}: a step uses at most one, so at most 1"
            )));
        }
        Ok(())
    }

    /// What the step does to its batch of `batch` rows for models of these image sizes; `None` for nothing.
    ///
    /// The first size is the student's.
    pub fn draw(&self, seed: u64, step: u64, batch: usize, sizes: &[usize]) -> Option<Mix> {
        if batch < 2 {
            return None;
        }
        let mut rng = Rng::new(seed, "mix", step, 0);
        let u = rng.uniform();
        let mixup = self.mixup.map_or(0.0, |o| o.probability);
        let offset = 1 + rng.below(batch as u64 - 1) as usize;
        if let Some(options) = self.mixup.filter(|_| u < mixup) {
            let lambda = rng.beta(options.alpha, options.alpha) as f32;
            return Some(Mix { offset, lambda, cut: None });
        }
        let options = self.cutmix.filter(|o| u < mixup + o.probability)?;
        let area = rng.beta(options.alpha, options.alpha);
        let cut = CutBox::draw(area, sizes, &mut rng);
        Some(Mix { offset, lambda: cut.kept() as f32, cut: Some(cut) })
    }
}

/// A pasted box in cells of a grid of `grid` x `grid` over the image: columns `left..right`, rows `top..bottom`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CutBox {
    /// Cells a side.
    pub grid: usize,
    /// First row.
    pub top: usize,
    /// First column.
    pub left: usize,
    /// One past the last row.
    pub bottom: usize,
    /// One past the last column.
    pub right: usize,
}

/// With fewer cells than this a common grid would quantise λ too much.
const LEAST_GRID: usize = 8;

impl CutBox {
    /// A box with about `1 - lambda` of the area around a uniform centre, clipped at the border.
    ///
    /// Its edges lie on the finest grid that all image sizes share (their greatest common divisor), so that every
    /// model gets the same picture and the same λ. Sizes with no usable common grid (below 8 cells) use the first
    /// size's pixels; the others round to their nearest pixel, and λ is that of the first.
    fn draw(lambda: f64, sizes: &[usize], rng: &mut Rng) -> Self {
        let common = sizes.iter().copied().fold(0, gcd);
        let first = sizes.first().copied().unwrap_or(1).max(1);
        let grid = if common >= LEAST_GRID { common } else { first };
        let side = (1.0 - lambda).max(0.0).sqrt() * grid as f64;
        let mut interval = || {
            let centre = rng.uniform() * grid as f64;
            let edge = |x: f64| x.round_ties_even().clamp(0.0, grid as f64) as usize;
            (edge(centre - side / 2.0), edge(centre + side / 2.0))
        };
        let (top, bottom) = interval();
        let (left, right) = interval();
        Self { grid, top, left, bottom, right }
    }

    /// Share of the image outside the box: λ.
    pub fn kept(&self) -> f64 {
        let cut = (self.bottom - self.top) * (self.right - self.left);
        1.0 - cut as f64 / (self.grid * self.grid) as f64
    }

    /// The box in pixels of an image of `size` x `size`: `(top, left, bottom, right)`.
    pub fn pixels(&self, size: usize) -> (usize, usize, usize, usize) {
        let edge = |cells: usize| (cells * size + self.grid / 2) / self.grid;
        (edge(self.top), edge(self.left), edge(self.bottom), edge(self.right))
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// What one step does to its batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Mix {
    /// Row i is mixed with row `(i + offset) % B`.
    pub offset: usize,
    /// Share of a row's own image (and caption) that it keeps.
    pub lambda: f32,
    /// CutMix's box; without it Mixup.
    pub cut: Option<CutBox>,
}

/// The target of each row: `lambda[i]` on its own caption, `1 - lambda[i]` on that of row `partner[i]`.
#[derive(Debug, Clone, PartialEq)]
pub struct MixTargets {
    /// Partner of each row.
    pub partner: Vec<usize>,
    /// Share of each row's own caption.
    pub lambda: Vec<f32>,
}

impl Mix {
    /// Partner of row `i` in a batch of `batch` rows.
    pub fn partner(&self, i: usize, batch: usize) -> usize {
        (i + self.offset) % batch.max(1)
    }

    /// Targets of a batch of `batch` rows.
    pub fn targets(&self, batch: usize) -> MixTargets {
        MixTargets { partner: (0..batch).map(|i| self.partner(i, batch)).collect(), lambda: vec![self.lambda; batch] }
    }
}

/// Turns a batch of RGB bytes `[batch, size, size, 3]` into a model's input of the same shape: mixed as `mix` says,
/// then normalised. The same `mix` gives every model the same picture.
///
/// # Errors
/// [`DataError::Option`] when lengths and sizes disagree.
pub fn model_input(
    bytes: &[u8],
    batch: usize,
    size: usize,
    mix: Option<&Mix>,
    normalize: &Normalize,
    out: &mut [f32],
) -> Result<()> {
    let image = size * size * 3;
    if bytes.len() != batch * image || out.len() != bytes.len() {
        return Err(DataError::Option(format!(
            "model input: {} bytes and {} values for {batch} images of {size}x{size}",
            bytes.len(),
            out.len()
        )));
    }
    let Some(mix) = mix else { return normalize.apply(bytes, out) };
    for (i, (own, out)) in bytes.chunks_exact(image).zip(out.chunks_exact_mut(image)).enumerate() {
        let other = &bytes[mix.partner(i, batch) * image..][..image];
        match &mix.cut {
            None => normalize.apply_mixed(own, other, mix.lambda, out)?,
            Some(cut) => {
                normalize.apply(own, out)?;
                let (top, left, bottom, right) = cut.pixels(size);
                for row in top..bottom {
                    let span = (row * size + left) * 3..(row * size + right) * 3;
                    normalize.apply(&other[span.clone()], &mut out[span])?;
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(mixup: f64, cutmix: f64) -> MixPolicy {
        MixPolicy {
            mixup: Some(MixOptions { alpha: 0.4, probability: mixup }),
            cutmix: Some(MixOptions { alpha: 1.0, probability: cutmix }),
        }
    }

    #[test]
    fn kinds_come_as_often_as_asked() {
        let policy = policy(0.3, 0.5);
        let (mut mixup, mut cutmix) = (0, 0);
        for step in 0..2000 {
            match policy.draw(0, step, 16, &[64]) {
                Some(Mix { cut: None, .. }) => mixup += 1,
                Some(Mix { cut: Some(_), .. }) => cutmix += 1,
                None => {}
            }
        }
        assert!((550..650).contains(&mixup), "{mixup}");
        assert!((940..1060).contains(&cutmix), "{cutmix}");
        assert_eq!(policy.draw(1, 5, 16, &[64]), policy.draw(1, 5, 16, &[64]));
        assert_eq!(policy.draw(1, 5, 1, &[64]), None);
    }

    #[test]
    fn partners_are_a_permutation_without_fixed_points() {
        for step in 0..50 {
            let mix = policy(1.0, 0.0).draw(0, step, 7, &[64]).unwrap();
            let targets = mix.targets(7);
            let mut seen = targets.partner.clone();
            assert!(seen.iter().enumerate().all(|(i, &p)| i != p));
            seen.sort_unstable();
            assert_eq!(seen, (0..7).collect::<Vec<_>>());
            assert!(targets.lambda.iter().all(|&l| l == mix.lambda && (0.0..=1.0).contains(&l)));
        }
    }

    /// λ is the kept area at every size when the sizes share a grid.
    #[test]
    fn lambda_agrees_between_sizes() {
        for step in 0..200 {
            let mix = policy(0.0, 1.0).draw(3, step, 4, &[256, 224]).unwrap();
            let cut = mix.cut.unwrap();
            assert_eq!(cut.grid, 32);
            for size in [256, 224] {
                let (top, left, bottom, right) = cut.pixels(size);
                let kept = 1.0 - ((bottom - top) * (right - left)) as f64 / (size * size) as f64;
                assert!((kept - f64::from(mix.lambda)).abs() < 1e-6);
            }
        }
        // No common grid: the first size decides.
        let mix = policy(0.0, 1.0).draw(3, 0, 4, &[63, 64]).unwrap();
        assert_eq!(mix.cut.unwrap().grid, 63);
        let (_, _, bottom, right) = CutBox { grid: 63, top: 0, left: 0, bottom: 63, right: 63 }.pixels(64);
        assert_eq!((bottom, right), (64, 64));
    }

    #[test]
    fn pixels_are_mixed_and_pasted() {
        let (batch, size) = (3, 8);
        let image = size * size * 3;
        let bytes: Vec<u8> = (0..batch * image).map(|i| (i / image * 100) as u8).collect();
        let mut out = vec![0.0; bytes.len()];
        let mix = Mix { offset: 1, lambda: 0.75, cut: None };
        model_input(&bytes, batch, size, Some(&mix), &Normalize::UNIT, &mut out).unwrap();
        for (i, expected) in [25.0, 125.0, 150.0].into_iter().enumerate() {
            assert!((out[i * image] * 255.0 - expected).abs() < 1e-3);
        }
        let cut = CutBox { grid: 8, top: 1, left: 2, bottom: 3, right: 8 };
        let mix = Mix { offset: 2, lambda: cut.kept() as f32, cut: Some(cut) };
        assert!((mix.lambda - (1.0 - 12.0 / 64.0)).abs() < 1e-6);
        model_input(&bytes, batch, size, Some(&mix), &Normalize::UNIT, &mut out).unwrap();
        for row in 0..8 {
            for col in 0..8 {
                let inside = (1..3).contains(&row) && col >= 2;
                let value = out[(row * 8 + col) * 3] * 255.0;
                assert!((value - if inside { 200.0 } else { 0.0 }).abs() < 1e-3);
            }
        }
        assert!(model_input(&bytes, 2, size, None, &Normalize::UNIT, &mut out).is_err());
    }

    #[test]
    fn options_are_checked() {
        assert!(policy(0.5, 0.5).check().is_ok());
        assert!(policy(0.6, 0.5).check().is_err());
        let bad = |alpha, probability| MixPolicy { mixup: Some(MixOptions { alpha, probability }), cutmix: None };
        assert!(bad(0.0, 0.5).check().is_err());
        assert!(bad(f64::NAN, 0.5).check().is_err());
        assert!(bad(1.0, 1.5).check().is_err());
    }
}
