//! Parameter initialisation. Every draw is a function of (seed, parameter name, element), so that a model's weights
//! depend neither on the order in which it is built nor on what else the graph holds.

/// How a parameter starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All zeros.
    Zeros,
    /// All ones.
    Ones,
    /// One value throughout.
    Constant(f32),
    /// Normal with mean 0 and the given standard deviation.
    Normal(f32),
    /// Normal with mean 0, cut at ±2 standard deviations (redrawn), as timm's `trunc_normal_tf_`.
    TruncNormal(f32),
    /// Uniform in ±bound.
    Uniform(f32),
    /// He et al. 2015, normal, gain √2, over the fan-out of a convolution `[out, in/groups, kh, kw]`.
    KaimingFanOut {
        /// Groups of the convolution.
        groups: usize,
    },
    /// He et al. 2015 as PyTorch's default for linear and convolution layers: uniform in ±1/√fan_in.
    FanInUniform,
    /// Glorot & Bengio 2010, uniform.
    XavierUniform,
}

/// 64 mixed bits of a counter (SplitMix64's finaliser; Steele et al. 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

struct Draws {
    key: u64,
    counter: u64,
}

impl Draws {
    fn new(seed: u64, name: &str) -> Self {
        // FNV-1a keeps different names apart; `mix` spreads the result.
        let hash =
            name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        Draws { key: mix(hash ^ mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15))), counter: 0 }
    }

    /// Uniform in (0, 1).
    fn uniform(&mut self) -> f64 {
        self.counter = self.counter.wrapping_add(1);
        let bits = mix(self.key.wrapping_add(self.counter.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        ((bits >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Standard normal (Box & Muller 1958).
    fn normal(&mut self) -> f64 {
        let (u, v) = (self.uniform(), self.uniform());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }
}

impl Init {
    /// The initial values of parameter `name` with `shape`.
    pub fn sample(&self, seed: u64, name: &str, shape: &[usize]) -> Vec<f32> {
        let len = shape.iter().product();
        let receptive: usize = shape.iter().skip(2).product();
        let fan_in = shape.get(1).copied().unwrap_or(1) * receptive;
        let fan_out = shape.first().copied().unwrap_or(1) * receptive;
        let mut draws = Draws::new(seed, name);
        let mut fill = |f: &mut dyn FnMut(&mut Draws) -> f64| (0..len).map(|_| f(&mut draws) as f32).collect();
        let mut uniform = |bound: f64| fill(&mut |d| (2.0 * d.uniform() - 1.0) * bound);
        match *self {
            Init::Zeros => vec![0.0; len],
            Init::Ones => vec![1.0; len],
            Init::Constant(v) => vec![v; len],
            Init::Uniform(bound) => uniform(f64::from(bound)),
            Init::FanInUniform => uniform(1.0 / (fan_in.max(1) as f64).sqrt()),
            Init::XavierUniform => uniform((6.0 / (fan_in + fan_out).max(1) as f64).sqrt()),
            Init::Normal(std) => fill(&mut |d| d.normal() * f64::from(std)),
            Init::TruncNormal(std) => fill(&mut |d| {
                loop {
                    let z = d.normal();
                    if z.abs() <= 2.0 {
                        return z * f64::from(std);
                    }
                }
            }),
            Init::KaimingFanOut { groups } => {
                let std = (2.0 / (fan_out / groups.max(1)).max(1) as f64).sqrt();
                fill(&mut |d| d.normal() * std)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(v: &[f32]) -> (f64, f64) {
        let n = v.len() as f64;
        let mean = v.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        (mean, (v.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n).sqrt())
    }

    #[test]
    fn draws_have_the_stated_moments() {
        let shape = [128, 64, 3, 3];
        let (mean, std) = moments(&Init::KaimingFanOut { groups: 1 }.sample(1, "w", &shape));
        assert!(mean.abs() < 1e-3 && (std / (2.0f64 / 1152.0).sqrt() - 1.0).abs() < 0.01, "{mean} {std}");
        let (_, std) = moments(&Init::FanInUniform.sample(1, "w", &shape));
        assert!((std / ((1.0f64 / 576.0).sqrt() / 3f64.sqrt()) - 1.0).abs() < 0.01);
        let cut = Init::TruncNormal(0.02).sample(1, "w", &[100_000]);
        assert!(cut.iter().all(|x| x.abs() <= 0.04));
    }

    #[test]
    fn a_name_and_a_seed_fix_the_draw() {
        let a = Init::Normal(1.0).sample(3, "a", &[64]);
        assert_eq!(a, Init::Normal(1.0).sample(3, "a", &[64]));
        assert_ne!(a, Init::Normal(1.0).sample(3, "b", &[64]));
        assert_ne!(a, Init::Normal(1.0).sample(4, "a", &[64]));
    }
}
