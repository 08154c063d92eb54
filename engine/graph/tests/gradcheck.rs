//! Every op through the executor: gradients against central finite differences, own kernels against the reference
//! formulations, and gradients that add up where a value is read twice.
//!
//! Finite differences are of `f32` forwards, so the tolerance is 2e-2 of the gradient's scale; the kernels' tighter
//! bounds, against `f64`, are tested in `mcpipe-cpu`.

mod support;

use mcpipe_graph::{Cpu, Executor, Grads, GraphBuilder, GraphError, Kernels};
use support::{Built, CASES, Found, difference, noise, norm};

/// The value, and the gradients of `Σ seed ∘ y` for every input, then every parameter.
fn gradients(built: &Built, kernels: Kernels, seed: &[f32]) -> Found {
    let mut grads = Grads::zeros_like(&built.store);
    let (value, mut found) = built.run(&built.store, Cpu::new(kernels), seed, &mut grads);
    found.extend(grads.all().iter().cloned());
    (value, found)
}

#[test]
fn gradients_match_finite_differences() {
    for case in CASES {
        let mut built = Built::new(case);
        let mut executor = built.executor(&built.store, Cpu::new(Kernels::Native));
        let seed = noise(17, built.numel());
        let (_, found) = gradients(&built, Kernels::Native, &seed);
        let objective = |built: &Built, executor: &mut Executor| -> f64 {
            built.forward(&built.store, executor).iter().zip(&seed).map(|(y, s)| f64::from(*y) * f64::from(*s)).sum()
        };
        let step = 4e-3f32;
        let inputs = built.values.len();
        for (k, grad) in found.iter().enumerate() {
            let mut numeric = vec![0.0; grad.len()];
            for (i, slope) in numeric.iter_mut().enumerate() {
                let mut at = |delta: f32| {
                    let v = if k < inputs {
                        &mut built.values[k][i]
                    } else {
                        &mut built.store.params_mut()[k - inputs].data[i]
                    };
                    let held = *v;
                    *v += delta;
                    let value = objective(&built, &mut executor);
                    let v = if k < inputs {
                        &mut built.values[k][i]
                    } else {
                        &mut built.store.params_mut()[k - inputs].data[i]
                    };
                    *v = held;
                    value
                };
                *slope = ((at(step) - at(-step)) / (2.0 * f64::from(step))) as f32;
            }
            let error = difference(grad, &numeric) / (norm(&numeric) + 1e-2);
            assert!(error < 2e-2, "{} argument {k}: {error:.2e}\n{grad:?}\n{numeric:?}", case.name);
        }
    }
}

#[test]
fn own_kernels_match_the_reference() {
    for case in CASES {
        let built = Built::new(case);
        let seed = noise(17, built.numel());
        let (value, own) = gradients(&built, Kernels::Native, &seed);
        let (expected, reference) = gradients(&built, Kernels::Reference, &seed);
        let error = difference(&value, &expected) / (norm(&expected) + 1e-6);
        assert!(error < 1e-5, "{} value: {error:.2e}", case.name);
        for (k, (a, b)) in own.iter().zip(&reference).enumerate() {
            let error = difference(a, b) / (norm(b) + 1e-4);
            assert!(error < 5e-5, "{} gradient {k}: {error:.2e}", case.name);
        }
    }
}

#[test]
fn the_same_step_gives_the_same_bits() {
    for case in CASES {
        let built = Built::new(case);
        let seed = noise(17, built.numel());
        let bits = |(value, grads): (Vec<f32>, Vec<Vec<f32>>)| -> Vec<u32> {
            value.iter().chain(grads.iter().flatten()).map(|v| v.to_bits()).collect()
        };
        let once = bits(gradients(&built, Kernels::Native, &seed));
        assert_eq!(once, bits(gradients(&built, Kernels::Native, &seed)), "{}", case.name);
    }
}

#[test]
fn stochastic_depth_is_an_input_of_training_graphs_alone() -> Result<(), GraphError> {
    let build = |train: bool, rate: f32| {
        let mut g = GraphBuilder::new(train);
        let x = g.input("x", &[4, 2, 3]);
        let y = g.drop_path(&x, rate)?;
        let z = g.drop_path(&y, rate)?;
        g.output("z", &z);
        Ok::<_, GraphError>(g.finish())
    };
    let graph = build(true, 0.2)?;
    let found: Vec<(&str, usize)> = graph.stochastic().iter().map(|s| (s.name.as_str(), s.samples)).collect();
    assert_eq!(found, [("drop_path.0", 4), ("drop_path.1", 4)]);
    assert!(graph.stochastic().iter().all(|s| s.keep == 0.8));
    assert!(build(false, 0.2)?.stochastic().is_empty());
    assert!(build(true, 0.0)?.stochastic().is_empty());
    assert!(build(true, 1.0).is_err());
    Ok(())
}
