//! Stochastic depth's masks, drawn for each step from its number alone.

use mcpipe_data::rng::Rng;
use mcpipe_graph::StochasticInput;

/// The masks of `step` over a batch of `parts` equal parts, one for each stochastic input. A sample's draws depend on its
/// place in the batch alone: both forwards over a part, and any number of parts, see the same.
pub(crate) fn drop_masks(inputs: &[StochasticInput], parts: usize, seed: u64, step: u64) -> Vec<Vec<f32>> {
    let mut masks: Vec<Vec<f32>> = inputs.iter().map(|i| Vec::with_capacity(i.samples * parts)).collect();
    let samples = inputs.first().map_or(0, |i| i.samples * parts);
    for sample in 0..samples {
        let mut rng = Rng::new(seed, "drop_path", step, sample as u64);
        for (input, mask) in inputs.iter().zip(&mut masks) {
            mask.push(if rng.uniform_f32() < input.keep { 1.0 / input.keep } else { 0.0 });
        }
    }
    masks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_keep_their_share_and_depend_on_step_and_sample_alone() {
        let inputs = |samples| [0.9f32, 0.5].map(|keep| StochasticInput { name: format!("at {keep}"), keep, samples });
        let whole = drop_masks(&inputs(4000), 1, 7, 3);
        assert_eq!(whole, drop_masks(&inputs(1000), 4, 7, 3));
        assert_eq!(whole, drop_masks(&inputs(4000), 1, 7, 3));
        assert_ne!(whole, drop_masks(&inputs(4000), 1, 7, 4));
        assert_ne!(whole, drop_masks(&inputs(4000), 1, 8, 3));
        for (mask, keep) in whole.iter().zip([0.9f32, 0.5]) {
            assert!(mask.iter().all(|m| *m == 0.0 || *m == 1.0 / keep));
            let share = mask.iter().filter(|m| **m > 0.0).count() as f32 / 4000.0;
            assert!((share - keep).abs() < 0.03, "{share} of {keep}");
        }
        // The two inputs' draws differ: a sample that the first drops is kept by the second half of the time.
        let both = whole[0].iter().zip(&whole[1]).filter(|(a, b)| **a == 0.0 && **b > 0.0).count();
        assert!((100..300).contains(&both), "{both}");
    }
}
