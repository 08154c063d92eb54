//! Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
//! SC 2011), keyed by (seed, stream name, step, sample).
//!
//! There is no shared state to save: the numbers of a sample depend on its key alone, so neither the number of
//! threads nor a stop and resume can change them.

/// Ten rounds of Philox4x32 on one counter block.
pub fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    const M0: u64 = 0xD251_1F53;
    const M1: u64 = 0xCD9E_8D57;
    const W0: u32 = 0x9E37_79B9;
    const W1: u32 = 0xBB67_AE85;
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..10 {
        let p0 = M0 * u64::from(c0);
        let p1 = M1 * u64::from(c2);
        (c0, c1, c2, c3) = ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        k0 = k0.wrapping_add(W0);
        k1 = k1.wrapping_add(W1);
    }
    [c0, c1, c2, c3]
}

/// A stream of random numbers of one (seed, stream, step, sample).
#[derive(Debug, Clone)]
pub struct Rng {
    key: [u32; 2],
    /// Words 1..4 of the counter are part of the key; word 0 counts blocks.
    counter: [u32; 4],
    block: [u32; 4],
    used: usize,
    /// Second value of the last Box-Muller pair.
    spare: Option<f64>,
}

impl Rng {
    /// The stream of `stream` (such as "augment") at `step` for `sample`, under `seed`.
    ///
    /// A stream holds 2^34 words before it repeats.
    pub fn new(seed: u64, stream: &str, step: u64, sample: u64) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        hasher.update(&step.to_le_bytes());
        hasher.update(&sample.to_le_bytes());
        hasher.update(stream.as_bytes());
        let hash = hasher.finalize();
        let bytes = hash.as_bytes();
        let word = |i: usize| u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]]);
        Self { key: [word(0), word(1)], counter: [0, word(2), word(3), word(4)], block: [0; 4], used: 4, spare: None }
    }

    /// The next 32 bits.
    #[inline]
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.block = philox4x32_10(self.counter, self.key);
            self.counter[0] = self.counter[0].wrapping_add(1);
            self.used = 0;
        }
        let word = self.block[self.used];
        self.used += 1;
        word
    }

    /// The next 64 bits.
    #[inline]
    pub fn next_u64(&mut self) -> u64 {
        let low = u64::from(self.next_u32());
        low | u64::from(self.next_u32()) << 32
    }

    /// Uniform in [0, 1), 53 bits.
    #[inline]
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in [0, 1), 24 bits.
    #[inline]
    pub fn uniform_f32(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 * (1.0 / (1u32 << 24) as f32)
    }

    /// Uniform in [low, high).
    #[inline]
    pub fn range(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.uniform()
    }

    /// Uniform integer in [0, n), without bias (Lemire, "Fast random integer generation in an interval", 2019).
    /// 0 for n = 0.
    #[inline]
    pub fn below(&mut self, n: u64) -> u64 {
        if n == 0 {
            return 0;
        }
        let mut product = u128::from(self.next_u64()) * u128::from(n);
        if (product as u64) < n {
            let threshold = n.wrapping_neg() % n;
            while (product as u64) < threshold {
                product = u128::from(self.next_u64()) * u128::from(n);
            }
        }
        (product >> 64) as u64
    }

    /// True with probability `p`.
    #[inline]
    pub fn chance(&mut self, p: f64) -> bool {
        self.uniform() < p
    }

    /// Standard normal (Box-Muller).
    pub fn normal(&mut self) -> f64 {
        if let Some(value) = self.spare.take() {
            return value;
        }
        // 1 - u lies in (0, 1]: the logarithm is finite.
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * self.uniform()).sin_cos();
        self.spare = Some(radius * sin);
        radius * cos
    }

    /// Gamma(shape, 1) for shape > 0 (Marsaglia and Tsang, "A simple method for generating gamma variables", 2000).
    /// 0 for a shape that is not positive.
    pub fn gamma(&mut self, shape: f64) -> f64 {
        if shape.is_nan() || shape <= 0.0 {
            return 0.0;
        }
        if shape < 1.0 {
            // Gamma(a) = Gamma(a + 1) * U^(1/a).
            let boost = (1.0 - self.uniform()).powf(1.0 / shape);
            return self.gamma(shape + 1.0) * boost;
        }
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let x = self.normal();
            let v = (1.0 + c * x).powi(3);
            if v <= 0.0 {
                continue;
            }
            let u = 1.0 - self.uniform();
            if u.ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                return d * v;
            }
        }
    }

    /// Beta(a, b) in [0, 1].
    ///
    /// For very small parameters both gammas can underflow to zero; the distribution is then a coin between its two
    /// ends, with P(1) = a / (a + b).
    pub fn beta(&mut self, a: f64, b: f64) -> f64 {
        let x = self.gamma(a);
        let y = self.gamma(b);
        if x + y > 0.0 {
            x / (x + y)
        } else if self.chance(a / (a + b)) {
            1.0
        } else {
            0.0
        }
    }

    /// Fisher-Yates shuffle.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j = self.below(i as u64 + 1) as usize;
            items.swap(i, j);
        }
    }

    /// A permutation of 0..n.
    pub fn permutation(&mut self, n: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..n as u32).collect();
        self.shuffle(&mut order);
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known-answer vectors of the Random123 distribution (kat_vectors, philox 4x32 10).
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32_10([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32_10([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    /// The first words of one stream: a change here breaks resume of every existing run.
    #[test]
    fn stream_is_stable() {
        let mut rng = Rng::new(7, "augment", 3, 11);
        let words: Vec<u32> = (0..6).map(|_| rng.next_u32()).collect();
        assert_eq!(words, STREAM_WORDS);
    }
    const STREAM_WORDS: [u32; 6] =
        [1_798_325_641, 3_052_960_993, 979_140_395, 4_006_602_734, 1_637_854_660, 2_437_321_698];

    #[test]
    fn streams_differ_in_every_part_of_the_key() {
        let first = |seed, stream, step, sample| Rng::new(seed, stream, step, sample).next_u64();
        let base = first(0, "a", 0, 0);
        assert_eq!(base, first(0, "a", 0, 0));
        for other in [first(1, "a", 0, 0), first(0, "b", 0, 0), first(0, "a", 1, 0), first(0, "a", 0, 1)] {
            assert_ne!(base, other);
        }
    }

    fn moments(mut draw: impl FnMut() -> f64) -> (f64, f64) {
        let n = 40_000;
        let (mut sum, mut squares) = (0.0, 0.0);
        for _ in 0..n {
            let x = draw();
            sum += x;
            squares += x * x;
        }
        let mean = sum / f64::from(n);
        (mean, squares / f64::from(n) - mean * mean)
    }

    #[test]
    fn distributions_have_their_moments() {
        let mut rng = Rng::new(0, "moments", 0, 0);
        let near = |(mean, var): (f64, f64), (m, v): (f64, f64)| {
            assert!((mean - m).abs() < 0.02 * (1.0 + m.abs()), "mean {mean}, expected {m}");
            assert!((var - v).abs() < 0.06 * (0.2 + v), "variance {var}, expected {v}");
        };
        near(moments(|| rng.uniform()), (0.5, 1.0 / 12.0));
        near(moments(|| f64::from(rng.uniform_f32())), (0.5, 1.0 / 12.0));
        near(moments(|| rng.normal()), (0.0, 1.0));
        for shape in [0.3, 1.0, 4.5] {
            near(moments(|| rng.gamma(shape)), (shape, shape));
        }
        for (a, b) in [(0.2, 0.2), (1.0, 1.0), (2.0, 5.0)] {
            let sum = a + b;
            near(moments(|| rng.beta(a, b)), (a / sum, a * b / (sum * sum * (sum + 1.0))));
        }
        near(moments(|| rng.below(10) as f64), (4.5, 8.25));
    }

    #[test]
    fn edges() {
        let mut rng = Rng::new(0, "edges", 0, 0);
        assert_eq!(rng.below(0), 0);
        assert_eq!(rng.below(1), 0);
        assert_eq!(rng.gamma(-1.0), 0.0);
        assert_eq!(rng.gamma(f64::NAN), 0.0);
        for _ in 0..100 {
            let x = rng.beta(1e-300, 1e-300);
            assert!(x == 0.0 || x == 1.0);
        }
        let mut order = rng.permutation(100);
        assert_ne!(order, (0..100).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
        assert!(rng.permutation(0).is_empty());
    }
}
