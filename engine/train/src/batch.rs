//! Batches as the trainer takes them, and the targets of their image–text pairs.

use std::borrow::Cow;
use std::collections::HashMap;

use mcpipe_data::{DataError, MixTargets, Normalize, model_input};

use crate::error::BoxError;

/// Mixup or CutMix within a batch: image i = `keep[i]` of sample i and the rest of sample `partner[i]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Mix {
    /// Position of the other sample.
    pub partner: Vec<usize>,
    /// Share of the sample itself: Mixup's blend factor, CutMix's kept area.
    pub keep: Vec<f32>,
}

impl From<MixTargets> for Mix {
    fn from(targets: MixTargets) -> Self {
        Mix { partner: targets.partner, keep: targets.lambda }
    }
}

/// A batch's images as bytes, cropped and flipped: what each model's view is made of.
#[derive(Clone, Debug, Default)]
pub struct ImageBytes {
    /// Each form (size and filter of the resize) once.
    pub forms: Vec<FormBytes>,
    /// The views, in the order that the models count them in.
    pub views: Vec<ByteView>,
    /// Mixup or CutMix, not done yet.
    pub mix: Option<mcpipe_data::Mix>,
}

/// Images in one form.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FormBytes {
    /// Side of an image.
    pub size: usize,
    /// RGB, `[B, size, size, 3]`.
    pub bytes: Vec<u8>,
}

/// A model's view: a form, normalised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ByteView {
    /// Position of the form.
    pub form: usize,
    /// Mean and standard deviation of the model.
    pub normalize: Normalize,
}

impl ImageBytes {
    /// Refuses what is not `batch` whole images in each form, and what names things that are not there.
    pub(crate) fn check(&self, batch: usize) -> Result<(), String> {
        for FormBytes { size, bytes } in &self.forms {
            if bytes.len() != batch * size * size * 3 {
                return Err(format!("{} bytes are not {batch} images of {size}x{size}", bytes.len()));
            }
        }
        if let Some(v) = self.views.iter().position(|v| v.form >= self.forms.len()) {
            return Err(format!("view {v} is of form {}, of {}", self.views[v].form, self.forms.len()));
        }
        match self.mix.as_ref().and_then(|m| m.cut.as_ref()) {
            Some(c) if c.top > c.bottom || c.left > c.right || c.bottom.max(c.right) > c.grid || c.grid == 0 => {
                Err(format!("the box {c:?} lies outside its grid"))
            }
            _ => Ok(()),
        }
    }

    /// The views as values: mixed and normalised.
    fn values(&self, batch: usize) -> Result<Vec<Vec<f32>>, DataError> {
        let values = |view: &ByteView| {
            let FormBytes { size, bytes } = &self.forms[view.form];
            let mut values = vec![0.0; bytes.len()];
            model_input(bytes, batch, *size, self.mix.as_ref(), &view.normalize, &mut values)?;
            Ok(values)
        };
        self.views.iter().map(values).collect()
    }
}

/// The samples of one optimiser step.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// The same pixels, augmented and mixed alike, in each model's own size and normalisation:
    /// `views[v]` is `[B, S_v, S_v, 3]`. Empty where there are `bytes`.
    pub views: Vec<Vec<f32>>,
    /// What the views are to be made of, where they aren't yet: on the CPU, or on the device that trains.
    pub bytes: Option<ImageBytes>,
    /// Captions, one a sample.
    pub captions: Vec<String>,
    /// Mixup or CutMix, where the batch is mixed.
    pub mix: Option<Mix>,
    /// Where the source stands after this batch, in the source's own form; kept in checkpoints.
    pub cursor: serde_json::Value,
}

impl Batch {
    /// A batch of bytes.
    pub fn of_bytes(bytes: ImageBytes, captions: Vec<String>, cursor: serde_json::Value) -> Self {
        let mix = bytes.mix.as_ref().map(|m| m.targets(captions.len()).into());
        Batch { views: Vec::new(), bytes: Some(bytes), captions, mix, cursor }
    }

    /// The side of the images of view `view` and the number of their values; none where there is no such view. The side is
    /// known of bytes alone.
    pub(crate) fn view_size(&self, view: usize) -> Option<(Option<usize>, usize)> {
        match &self.bytes {
            Some(bytes) => {
                let form = bytes.forms.get(bytes.views.get(view)?.form)?;
                Some((Some(form.size), form.bytes.len()))
            }
            None => Some((None, self.views.get(view)?.len())),
        }
    }

    /// The views' values, made where they are not there yet.
    ///
    /// # Errors
    /// Bytes of another number than forms and captions say.
    pub fn values(&self) -> Result<Cow<'_, [Vec<f32>]>, DataError> {
        match &self.bytes {
            Some(bytes) => Ok(Cow::Owned(bytes.values(self.captions.len())?)),
            None => Ok(Cow::Borrowed(&self.views)),
        }
    }
}

/// Gives one batch after another, from wherever it was started.
pub trait BatchSource {
    /// The next batch.
    ///
    /// # Errors
    /// Data that can't be read or too many bad samples.
    fn next_batch(&mut self) -> Result<Batch, BoxError>;
}

/// Target distributions of a batch's image–text pairs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SoftTargets {
    /// `[B, B]`: row i is image i's distribution over captions.
    pub image_to_text: Vec<f32>,
    /// `[B, B]`: row j is caption j's distribution over images.
    pub text_to_image: Vec<f32>,
    /// `[B, B]`: how much caption j is image i's, 0 to 1. Unlike in the distributions, equal captions share nothing.
    pub pairs: Vec<f32>,
}

impl SoftTargets {
    /// CLIP's targets with Mixup and CutMix: image i has `keep[i]` on its own caption and the rest on its partner's.
    /// Equal captions share their mass evenly. A caption's distribution over images is proportional to the mass that
    /// the images give it (for one blend factor in the whole batch: the transpose).
    pub fn new(captions: &[String], mix: Option<&Mix>) -> Self {
        let b = captions.len();
        let mut groups: HashMap<&str, Vec<usize>> = HashMap::new();
        for (i, caption) in captions.iter().enumerate() {
            groups.entry(caption.as_str()).or_default().push(i);
        }
        let (mut image_to_text, mut pairs) = (vec![0.0f32; b * b], vec![0.0f32; b * b]);
        let mut give = |row: usize, caption: usize, mass: f32| {
            if let Some(group) = groups.get(captions[caption].as_str()) {
                for &j in group {
                    image_to_text[row * b + j] += mass / group.len() as f32;
                    pairs[row * b + j] += mass;
                }
            }
        };
        for i in 0..b {
            match mix {
                Some(m) if m.partner[i] != i => {
                    give(i, i, m.keep[i]);
                    give(i, m.partner[i], 1.0 - m.keep[i]);
                }
                _ => give(i, i, 1.0),
            }
        }
        let mut text_to_image = vec![0.0f32; b * b];
        for j in 0..b {
            let total: f64 = (0..b).map(|i| f64::from(image_to_text[i * b + j])).sum();
            if total > 0.0 {
                for i in 0..b {
                    text_to_image[j * b + i] = (f64::from(image_to_text[i * b + j]) / total) as f32;
                }
            } else {
                // No image shows this caption: a box covered the whole picture. Its own image is the only candidate.
                text_to_image[j * b + j] = 1.0;
            }
        }
        SoftTargets { image_to_text, text_to_image, pairs }
    }
}

/// The distributions of [`SoftTargets`] in the sparse form that [`mcpipe_graph::Op::Relational`] reads.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SparseTargets {
    /// Group of the caption of each image: the first position where it occurs.
    pub own: Vec<i32>,
    /// Group of the caption of the image mixed into each; its own where none is.
    pub other: Vec<i32>,
    /// Share of the image itself; 1 where nothing is mixed in.
    pub keep: Vec<f32>,
    /// Group of each caption.
    pub group: Vec<i32>,
    /// One by the number of captions in the group.
    pub share: Vec<f32>,
    /// Mass that all images give each caption.
    pub column_total: Vec<f32>,
}

impl SparseTargets {
    /// The same targets as [`SoftTargets::new`].
    pub fn new(captions: &[String], mix: Option<&Mix>) -> Self {
        let mut first: HashMap<&str, usize> = HashMap::new();
        let group: Vec<usize> =
            captions.iter().enumerate().map(|(i, c)| *first.entry(c.as_str()).or_insert(i)).collect();
        let mut sizes = vec![0usize; captions.len()];
        group.iter().for_each(|&g| sizes[g] += 1);
        let (mut other, mut keep) = (group.clone(), vec![1.0; captions.len()]);
        if let Some(m) = mix {
            for i in (0..captions.len()).filter(|&i| m.partner[i] != i) {
                (other[i], keep[i]) = (group[m.partner[i]], m.keep[i]);
            }
        }
        let mut masses = vec![0.0f64; captions.len()];
        for i in 0..captions.len() {
            masses[group[i]] += f64::from(keep[i]);
            masses[other[i]] += f64::from(1.0 - keep[i]);
        }
        let ids = |groups: &[usize]| groups.iter().map(|&g| g as i32).collect();
        SparseTargets {
            own: ids(&group),
            other: ids(&other),
            keep,
            share: group.iter().map(|&g| 1.0 / sizes[g] as f32).collect(),
            column_total: group.iter().map(|&g| (masses[g] / sizes[g] as f64) as f32).collect(),
            group: ids(&group),
        }
    }
}

#[cfg(test)]
mod tests {
    use mcpipe_cpu::relational::PairTargets;

    use super::*;

    #[test]
    fn sparse_targets_are_the_dense_ones() {
        let lists: [&[&str]; 4] = [&["a"], &["a", "b", "a", "c"], &["x", "x", "x", "x"], &["d", "c", "b", "a"]];
        for list in lists {
            let b = list.len();
            let captions = captions(list);
            let mixes = [
                None,
                Some(Mix { partner: (0..b).rev().collect(), keep: vec![0.75; b] }),
                Some(Mix { partner: (0..b).map(|i| (i + 1) % b).collect(), keep: vec![0.0; b] }),
                Some(Mix { partner: vec![0; b], keep: (0..b).map(|i| i as f32 / b as f32).collect() }),
            ];
            for mix in mixes {
                let dense = SoftTargets::new(&captions, mix.as_ref());
                let sparse = SparseTargets::new(&captions, mix.as_ref());
                let pairs = PairTargets {
                    own: &sparse.own,
                    other: &sparse.other,
                    keep: &sparse.keep,
                    group: &sparse.group,
                    share: &sparse.share,
                    column_total: &sparse.column_total,
                };
                for (i, j) in (0..b * b).map(|n| (n / b, n % b)) {
                    let [row, column] = [pairs.row(i, j), pairs.column(0, i, j)];
                    let want = [dense.image_to_text[i * b + j], dense.text_to_image[j * b + i]];
                    let error = (row - want[0]).abs().max((column - want[1]).abs());
                    assert!(error < 1e-6, "{list:?} {mix:?} at ({i}, {j}): {row}, {column}, expected {want:?}");
                }
            }
        }
    }

    fn captions(list: &[&str]) -> Vec<String> {
        list.iter().map(|&c| c.to_owned()).collect()
    }

    #[test]
    fn plain_targets_are_the_identity() {
        let t = SoftTargets::new(&captions(&["a", "b"]), None);
        assert_eq!(t.image_to_text, [1.0, 0.0, 0.0, 1.0]);
        assert_eq!(t.text_to_image, [1.0, 0.0, 0.0, 1.0]);
        assert_eq!(t.pairs, [1.0, 0.0, 0.0, 1.0]);
    }

    #[test]
    fn equal_captions_share_their_mass() {
        let t = SoftTargets::new(&captions(&["a", "b", "a"]), None);
        assert_eq!(t.image_to_text, [0.5, 0.0, 0.5, 0.0, 1.0, 0.0, 0.5, 0.0, 0.5]);
        assert_eq!(t.text_to_image, t.image_to_text);
        assert_eq!(t.pairs, [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]);
    }

    #[test]
    fn mixed_images_aim_at_both_captions_both_ways() {
        let mix = Mix { partner: vec![2, 1, 0], keep: vec![0.75; 3] };
        let t = SoftTargets::new(&captions(&["a", "b", "c"]), Some(&mix));
        assert_eq!(t.image_to_text, [0.75, 0.0, 0.25, 0.0, 1.0, 0.0, 0.25, 0.0, 0.75]);
        assert_eq!(t.text_to_image, t.image_to_text);
        let same = Mix { partner: vec![1, 0], keep: vec![0.3, 0.9] };
        let t = SoftTargets::new(&captions(&["a", "a"]), Some(&same));
        assert_eq!(t.image_to_text, [0.5; 4]);
        assert!(t.pairs.iter().all(|p| (p - 1.0).abs() < 1e-6), "{t:?}");
    }

    #[test]
    fn own_factors_still_give_distributions() {
        let mix = Mix { partner: vec![1, 2, 0], keep: vec![0.0, 0.5, 1.0] };
        let t = SoftTargets::new(&captions(&["a", "b", "c"]), Some(&mix));
        for p in [&t.image_to_text, &t.text_to_image] {
            for row in p.chunks(3) {
                assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6, "{p:?}");
            }
        }
    }
}
