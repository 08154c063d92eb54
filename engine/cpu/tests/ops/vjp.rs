//! Values and VJPs of every op: dfdx's formulation against finite differences in f64, the kernels against
//! dfdx in f64, at each SIMD level, overwriting and accumulating; NaN in, NaN out.

use crate::harness::{assert_close, backward, by_dfdx, forward, random, value_by_dfdx, wide};
use crate::table;
use mcpipe_cpu::Workspace;
use mcpipe_cpu::bridge::{self, BridgeError, Op};
use mcpipe_cpu::simd::Level;

/// Σ weight·value, the scalar whose gradient is compared.
fn weigh(value: &[f64], weights: &[f64]) -> f64 {
    value.iter().zip(weights).map(|(v, w)| v * w).sum()
}

#[test]
fn dfdx_formulations_match_finite_differences() {
    const STEP: f64 = 1e-6;
    for case in table::cases(false) {
        let inputs: Vec<Vec<f64>> = case.arguments().iter().map(|x| wide(x)).collect();
        let weights = wide(&random(value_by_dfdx(&case.op, &inputs).len(), 99));
        let (_, _, grads) = by_dfdx(&case.op, &inputs, &weights);
        for (argument, grad) in grads.iter().enumerate() {
            let scale = grad.iter().fold(1e-2f64, |m, g| m.max(g.abs()));
            for (i, g) in grad.iter().enumerate() {
                let at = |step: f64| {
                    let mut moved = inputs.clone();
                    moved[argument][i] += step;
                    weigh(&value_by_dfdx(&case.op, &moved), &weights)
                };
                let found = (at(STEP) - at(-STEP)) / (2.0 * STEP);
                let error = (g - found).abs();
                assert!(
                    error <= 1e-6 * scale,
                    "{} {:?}: d/d argument {argument}[{i}] is {g}, finite difference {found} (scale {scale})",
                    case.name,
                    case.op
                );
            }
        }
    }
}

#[test]
fn kernels_match_dfdx() {
    for case in table::cases(false).into_iter().chain(table::cases(true)) {
        let inputs = case.arguments();
        let exact: Vec<Vec<f64>> = inputs.iter().map(|x| wide(x)).collect();
        let dy = random(value_by_dfdx(&case.op, &exact).len(), 99);
        let (value, saved, grads) = by_dfdx(&case.op, &exact, &wide(&dy));
        for level in levels() {
            let what = |of: &str| format!("{level}: {of} of {} {:?}", case.name, case.op);
            let mut ws = Workspace::with_level(level);
            let (y, kept) = forward(&case.op, &inputs, &mut ws);
            assert_close(&y, &value, case.tolerance, &what("value"));
            for (kept, saved) in kept.iter().zip(&saved) {
                assert_close(kept, saved, case.tolerance, &what("saved"));
            }
            for accumulate in [false, true] {
                let start = 0.25;
                let found = backward(&case.op, &inputs, &y, &kept, &dy, accumulate, start, &mut ws);
                for (argument, (found, grad)) in found.iter().zip(&grads).enumerate() {
                    let Some((found, added)) = found else { continue };
                    let offset = if *added { f64::from(start) } else { 0.0 };
                    let want: Vec<f64> = grad.iter().map(|g| g + offset).collect();
                    assert_close(found, &want, case.tolerance, &what(&format!("gradient {argument}")));
                }
            }
        }
    }
}

/// Levels given by a workspace; the kernels without one follow `MCPIPE_SIMD`.
fn levels() -> Vec<Level> {
    match std::env::var_os("MCPIPE_SIMD") {
        Some(_) => vec![Level::active()],
        None => Level::available(),
    }
}

/// The active level is fixed once per process, so other levels run in processes of their own.
#[test]
fn kernels_match_dfdx_at_lower_simd_levels() {
    if std::env::var_os("MCPIPE_SIMD").is_some() {
        return;
    }
    let me = std::env::current_exe().expect("the test's own path");
    for level in Level::available().iter().filter(|level| **level != Level::active()) {
        let run = std::process::Command::new(&me)
            .args(["vjp::kernels_match_dfdx", "--exact"])
            .env("MCPIPE_SIMD", level.to_string())
            .output()
            .expect("the test runs itself");
        let text = String::from_utf8_lossy(&run.stdout);
        assert!(run.status.success(), "at {level}:\n{text}");
        assert!(text.contains("1 passed"), "at {level}:\n{text}");
    }
}

#[test]
fn nan_reaches_every_output_that_depends_on_it() {
    for case in table::cases(false) {
        // dfdx's additive mask, interpolation matrices and padding multiply NaN by 0; the kernels never read what a
        // mask hides or what has no weight.
        let reads_less = match case.op {
            Op::Attention(d) | Op::AttentionMap(d) => d.causal,
            Op::Resize(_) | Op::MaskedAttention { .. } | Op::TokenConv(_) => true,
            Op::Conv2d(d) => d.pad > 0,
            _ => false,
        };
        if reads_less {
            continue;
        }
        let inputs = case.arguments();
        for argument in 0..inputs.len() {
            let len = inputs[argument].len();
            for at in [0, len / 2, len - 1] {
                let mut poisoned = inputs.clone();
                poisoned[argument][at] = f32::NAN;
                let exact: Vec<Vec<f64>> = poisoned.iter().map(|x| wide(x)).collect();
                let want = value_by_dfdx(&case.op, &exact);
                let (got, _) = forward(&case.op, &poisoned, &mut Workspace::new());
                for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                    assert!(
                        got.is_nan() || !want.is_nan(),
                        "{} {:?}: NaN in argument {argument}[{at}] gives {got} at {i}",
                        case.name,
                        case.op
                    );
                }
            }
        }
    }
}

#[test]
fn same_bits_with_any_number_of_threads() {
    for case in table::cases(true) {
        // Products and column sums cut their work by the number of threads.
        let by_threads = ["linear", "matmul", "conv2d", "add_broadcast", "contrastive", "relational", "sigmoid_loss"];
        if by_threads.iter().any(|name| case.name.starts_with(name)) {
            continue;
        }
        let inputs = case.arguments();
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            pool.install(|| {
                let mut ws = Workspace::new();
                let (y, saved) = forward(&case.op, &inputs, &mut ws);
                let dy = random(y.len(), 99);
                let grads = backward(&case.op, &inputs, &y, &saved, &dy, true, 0.5, &mut ws);
                let grads = grads.into_iter().flatten().flat_map(|(g, _)| g);
                y.into_iter().chain(grads).map(f32::to_bits).collect::<Vec<_>>()
            })
        };
        assert!(run(1) == run(3), "{} {:?} depends on the number of threads", case.name, case.op);
    }
}

#[test]
fn dfdx_in_f32_is_close_to_f64() {
    for case in table::cases(false) {
        let inputs = case.arguments();
        let exact: Vec<Vec<f64>> = inputs.iter().map(|x| wide(x)).collect();
        let dy = random(value_by_dfdx(&case.op, &exact).len(), 99);
        let (value, _, grads) = by_dfdx(&case.op, &exact, &wide(&dy));
        let (value32, _, grads32) = by_dfdx(&case.op, &inputs, &dy);
        assert_close(&value32, &value, 10.0 * case.tolerance, case.name);
        for (g32, g) in grads32.iter().zip(&grads) {
            assert_close(g32, g, 10.0 * case.tolerance, case.name);
        }
    }
}

#[test]
fn bridge_refuses_what_does_not_fit() {
    let x = [1.0f32; 6];
    let refused = |op: Op<'_>, inputs: &[&[f32]]| bridge::run(&op, inputs, true).err();
    assert_eq!(refused(Op::Add, &[&x, &x[1..]]), Some(BridgeError::Length { argument: 1, expected: 6, got: 5 }));
    assert_eq!(refused(Op::Add, &[&x]), Some(BridgeError::Arguments { expected: 2, got: 1 }));
    let ids = Op::Embedding { width: 2, ids: &[0, 3] };
    assert_eq!(refused(ids, &[&x]), Some(BridgeError::Index { id: 3, rows: 3 }));
    assert!(matches!(refused(Op::Permute { shape: &[2, 3], perm: &[0, 0] }, &[&x]), Some(BridgeError::Dims(_))));
    let softmax = Op::Softmax { rows: 2, c: 3, temperature: 0.0 };
    assert!(matches!(refused(softmax, &[&x]), Some(BridgeError::Dims(_))));
}

#[test]
fn nothing_in_gives_nothing_out() {
    let run = bridge::run::<f32>(&Op::Add, &[&[], &[]], true).expect("empty slices fit");
    assert!(run.value.is_empty());
    let run = bridge::run::<f32>(&Op::Cosine { rows: 0, c: 4 }, &[&[], &[]], true).expect("empty slices fit");
    assert_eq!(run.value, [0.0]);
    assert_eq!(run.pullback.expect("asked for")(&[1.0]), [vec![], vec![]]);
    let (y, _) = forward(&Op::Cosine { rows: 0, c: 4 }, &[vec![], vec![]], &mut Workspace::new());
    assert_eq!(y, [0.0]);
}
