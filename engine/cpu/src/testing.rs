//! Helpers of this crate's tests.

use crate::simd::Level;
use crate::workspace::Workspace;

/// `len` values in `-1..1` from a counter-based generator (SplitMix64), different for each `seed`.
pub(crate) fn random(len: usize, seed: u64) -> Vec<f32> {
    (0..len as u64)
        .map(|i| {
            let mut z = (seed << 32 | i).wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// The values in f64.
pub(crate) fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|v| f64::from(*v)).collect()
}

/// Asserts that each value is within `tolerance` of `want`, relative to the largest magnitude of `want` (at least 1).
pub(crate) fn assert_close(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let scale = want.iter().fold(1.0f64, |m, v| m.max(v.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*g) - w).abs();
        assert!(error <= tolerance * scale, "{what}: element {i} is {g}, expected {w}, scale {scale}");
    }
}

/// Runs `body` at every level of the machine with a fresh workspace.
pub(crate) fn at_each_level(body: impl Fn(Level, &mut Workspace)) {
    for level in Level::available() {
        body(level, &mut Workspace::with_level(level));
    }
}

/// Runs `body` in a pool of `threads` threads, so that tests meet the parallel paths on any machine.
pub(crate) fn with_threads<R: Send>(threads: usize, body: impl FnOnce() -> R + Send) -> R {
    match rayon::ThreadPoolBuilder::new().num_threads(threads).build() {
        Ok(pool) => pool.install(body),
        Err(_) => body(),
    }
}
