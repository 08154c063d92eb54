//! Weights of a larger model of the same family for a smaller one: layers and channels of it.
//!
//! After TinyCLIP (Wu et al. 2023), section 3.2, "manual inheritance", with these choices: of a row of layers those at
//! even distances are taken, the first and the last always among them; of channels, heads and hidden units the leading
//! ones, in every tensor alike, so that what one layer writes the next one reads.

use std::collections::{BTreeMap, BTreeSet};

/// The numbers that follow a prefix in names, by the prefix.
#[derive(Debug)]
pub(super) struct Layers(BTreeMap<String, BTreeSet<usize>>);

impl Layers {
    pub fn of<'a>(names: impl Iterator<Item = &'a str>) -> Layers {
        let mut layers: BTreeMap<String, BTreeSet<usize>> = BTreeMap::new();
        for name in names {
            let mut at = 0;
            for segment in name.split('.') {
                if let Ok(n) = segment.parse() {
                    layers.entry(name[..at].to_owned()).or_default().insert(n);
                }
                at += segment.len() + 1;
            }
        }
        Layers(layers)
    }

    /// The name in the larger model, `self`, whose tensor `name` of the smaller one inherits; none where a row of
    /// layers is shorter there.
    pub fn source(&self, name: &str, smaller: &Layers) -> Option<String> {
        let mut source: Vec<String> = Vec::new();
        let mut at = 0;
        for segment in name.split('.') {
            let part = match segment.parse::<usize>() {
                Ok(n) => {
                    let prefix: String = source.iter().flat_map(|s| [s.as_str(), "."]).collect();
                    let (ours, theirs) = (smaller.0.get(&name[..at])?, self.0.get(&prefix)?);
                    let from = evenly(ours.iter().position(|&o| o == n)?, ours.len(), theirs.len())?;
                    theirs.iter().nth(from)?.to_string()
                }
                Err(_) => segment.to_owned(),
            };
            at += segment.len() + 1;
            source.push(part);
        }
        Some(source.join("."))
    }
}

/// Position among `many` of the `i`-th of `few` that are taken at even distances.
fn evenly(i: usize, few: usize, many: usize) -> Option<usize> {
    match few {
        _ if few > many => None,
        0 | 1 => Some(0),
        // Rounded to the nearest.
        _ => Some((2 * i * (many - 1) + few - 1) / (2 * (few - 1))),
    }
}

/// Lengths of the blocks that an axis of a packed tensor consists of: query, key and value; the scores, keys and values
/// of separable attention; the two maps that a fusion joins. Each block keeps its own leading channels.
fn blocks(name: &str, axis: usize, len: usize) -> Vec<usize> {
    let module = name.strip_suffix(".weight").or(name.strip_suffix(".bias")).unwrap_or(name);
    let module = module.rsplit('.').next().unwrap_or_default();
    let inner = |end: &str| name.rsplit('.').any(|segment| segment == end);
    match (module, axis) {
        ("in_proj_weight" | "in_proj_bias" | "qkv", 0) if len.is_multiple_of(3) => vec![len / 3; 3],
        (_, 0) if inner("qkv_proj") && len % 2 == 1 => vec![1, len / 2, len / 2],
        (_, 1) if inner("conv_fusion") && len.is_multiple_of(2) => vec![len / 2; 2],
        _ => vec![len],
    }
}

/// For each axis the positions in the larger tensor that the smaller one takes; none where it is no part of it. The
/// axes of a convolution's window must agree.
pub(super) fn kept(name: &str, larger: &[usize], smaller: &[usize]) -> Option<Vec<Vec<usize>>> {
    if larger.len() != smaller.len() || larger.iter().skip(2).ne(smaller.iter().skip(2)) {
        return None;
    }
    let axis = |(axis, (&from, &to)): (usize, (&usize, &usize))| {
        let (from, to) = (blocks(name, axis, from), blocks(name, axis, to));
        if from.len() != to.len() || from.iter().zip(&to).any(|(f, t)| t > f) {
            return None;
        }
        let mut start = 0;
        let mut places = Vec::new();
        for (f, t) in from.iter().zip(&to) {
            places.extend(start..start + t);
            start += f;
        }
        Some(places)
    };
    larger.iter().zip(smaller).enumerate().map(axis).collect()
}

/// The elements of a tensor of `shape` at the places kept of each axis.
pub(super) fn select(values: &[f32], shape: &[usize], kept: &[Vec<usize>]) -> Vec<f32> {
    let Some((places, rest)) = kept.split_first() else { return values.to_vec() };
    let stride: usize = shape[1..].iter().product();
    places.iter().flat_map(|&p| select(&values[p * stride..][..stride], &shape[1..], rest)).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use super::*;

    #[test]
    fn layers_are_taken_evenly_with_both_ends() {
        let taken = |few: usize, many: usize| (0..few).map(|i| evenly(i, few, many).unwrap()).collect::<Vec<_>>();
        assert_eq!(taken(4, 12), [0, 4, 7, 11]);
        assert_eq!(taken(3, 6), [0, 3, 5]);
        assert_eq!(taken(5, 5), [0, 1, 2, 3, 4]);
        assert_eq!(taken(1, 9), [0]);
        assert_eq!(taken(2, 9), [0, 8]);
        assert_eq!(evenly(0, 3, 2), None);
    }

    #[test]
    fn rows_within_rows_follow_each_other() {
        let larger = ["a.0.b.0.w", "a.0.b.1.w", "a.1.b.0.w", "a.1.b.1.w", "a.1.b.2.w", "a.2.b.0.w", "a.2.b.3.w"];
        let smaller = ["a.0.b.0.w", "a.1.b.0.w", "a.1.b.1.w", "c.w"];
        let (large, small) = (Layers::of(larger.into_iter()), Layers::of(smaller.into_iter()));
        let source = |name: &str| large.source(name, &small);
        assert_eq!(source("a.0.b.0.w").as_deref(), Some("a.0.b.0.w"));
        assert_eq!(source("a.1.b.0.w").as_deref(), Some("a.2.b.0.w"));
        assert_eq!(source("a.1.b.1.w").as_deref(), Some("a.2.b.3.w"));
        assert_eq!(source("c.w").as_deref(), Some("c.w"));
        assert_eq!(small.source("a.2.b.3.w", &large), None);
    }

    #[test]
    fn packed_tensors_keep_the_leading_channels_of_each_part() {
        let places = |name: &str, larger: &[usize], smaller: &[usize]| kept(name, larger, smaller);
        assert_eq!(places("x.qkv.weight", &[9, 3], &[6, 2]), Some(vec![vec![0, 1, 3, 4, 6, 7], vec![0, 1]]));
        assert_eq!(places("x.qkv_proj.conv.weight", &[7], &[5]), Some(vec![vec![0, 1, 2, 4, 5]]));
        assert_eq!(places("x.conv_fusion.conv.weight", &[2, 6, 3, 3], &[2, 4, 3, 3]).unwrap()[1], [0, 1, 3, 4]);
        assert_eq!(places("x.conv.weight", &[4, 4, 5, 5], &[4, 4, 3, 3]), None);
        assert_eq!(places("x.conv.weight", &[4, 4], &[5, 4]), None);
        assert_eq!(places("x.conv.weight", &[4, 4], &[4]), None);
        let values: Vec<f32> = (0..12).map(|v| v as f32).collect();
        assert_eq!(select(&values, &[3, 4], &[vec![0, 2], vec![1, 3]]), [1.0, 3.0, 9.0, 11.0]);
        assert_eq!(select(&[5.0], &[], &[]), [5.0]);
    }
}
