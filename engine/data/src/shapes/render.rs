//! Renders one scene: a coloured shape on a textured background, among smaller shapes, partly hidden, with noise.
//!
//! Shapes are signed distance functions, so that edges are anti-aliased at any size. Coordinates: the image is the
//! unit square, y down; a shape's own coordinates have circumradius 1.

use crate::rng::Rng;

/// Shapes, in the order of class indices.
pub(super) const SHAPES: [&str; 8] = ["circle", "square", "triangle", "hexagon", "star", "cross", "ring", "crescent"];

/// Colours with their hue and its jitter in degrees, in the order of class indices.
pub(super) const COLORS: [(&str, f32, f32); 6] = [
    ("red", 0.0, 11.0),
    ("yellow", 54.0, 9.0),
    ("green", 120.0, 20.0),
    ("cyan", 181.0, 11.0),
    ("blue", 222.0, 14.0),
    ("purple", 283.0, 16.0),
];

/// Background colours, 0..1.
const BACKGROUNDS: [(&str, [f32; 3]); 7] = [
    ("black", [0.07, 0.07, 0.08]),
    ("grey", [0.45, 0.46, 0.45]),
    ("white", [0.90, 0.90, 0.88]),
    ("brown", [0.43, 0.29, 0.17]),
    ("pink", [0.90, 0.66, 0.72]),
    ("navy", [0.10, 0.12, 0.30]),
    ("beige", [0.80, 0.74, 0.58]),
];

/// Number of classes.
pub(super) const CLASSES: usize = SHAPES.len() * COLORS.len();

/// Name of a class, such as "red circle".
pub(super) fn class_name(class: usize) -> String {
    format!("{} {}", COLORS[class % COLORS.len()].0, SHAPES[class / COLORS.len()])
}

/// What a scene shows; captions tell parts of it.
#[derive(Debug, Clone, serde::Serialize)]
pub(super) struct Scene {
    /// Class index.
    pub(super) class: usize,
    /// Name of the shape.
    pub(super) shape: &'static str,
    /// Name of its colour.
    pub(super) color: &'static str,
    /// Name of the background's colour.
    pub(super) background: &'static str,
    /// "small", "" or "large".
    pub(super) size: &'static str,
    /// Centre (x, y) in the unit square.
    pub(super) center: [f32; 2],
    /// Circumradius as a share of the image's side.
    pub(super) radius: f32,
    /// Smaller shapes around.
    pub(super) distractors: usize,
    /// Whether a bar hides a part of the shape.
    pub(super) occluded: bool,
    /// Standard deviation of the noise, on 0..1.
    pub(super) noise: f32,
}

/// A filled shape in the image.
struct Object {
    shape: usize,
    center: [f32; 2],
    radius: f32,
    /// Cosine and sine of its rotation.
    turn: [f32; 2],
    color: [f32; 3],
    /// Brightness change across the shape.
    shade: f32,
}

/// Signed distance to the edge of a shape in its own coordinates; negative inside.
fn distance(shape: usize, x: f32, y: f32) -> f32 {
    let rectangle = |w: f32, h: f32| (x.abs() - w).max(y.abs() - h);
    match shape {
        0 => x.hypot(y) - 0.88,
        1 => rectangle(0.72, 0.72),
        2 => polygon::<3>(x, y, 0.55),
        3 => polygon::<6>(x, y, 0.84),
        4 => star(x, y),
        5 => rectangle(0.92, 0.30).min(rectangle(0.30, 0.92)),
        6 => (x.hypot(y) - 0.68).abs() - 0.20,
        _ => (x.hypot(y) - 0.88).max(0.72 - (x - 0.42).hypot(y)),
    }
}

/// Regular polygon of N sides at distance `inner` from the centre: the greatest of the distances to its sides.
fn polygon<const N: usize>(x: f32, y: f32, inner: f32) -> f32 {
    let mut greatest = f32::MIN;
    for k in 0..N {
        let (sin, cos) = (std::f32::consts::TAU * k as f32 / N as f32 + 0.5).sin_cos();
        greatest = greatest.max(x * cos + y * sin);
    }
    greatest - inner
}

/// Five-pointed star: folded into one half of a point, then the distance to that side's line.
fn star(x: f32, y: f32) -> f32 {
    const FIFTH: f32 = std::f32::consts::TAU / 5.0;
    const OUTER: f32 = 1.0;
    const INNER: f32 = 0.42;
    let angle = y.atan2(x).rem_euclid(FIFTH);
    let angle = angle.min(FIFTH - angle);
    let radius = x.hypot(y);
    let (sin, cos) = angle.sin_cos();
    let (px, py) = (radius * cos, radius * sin);
    let (tip_sin, tip_cos) = (FIFTH / 2.0).sin_cos();
    // From the point (OUTER, 0) to the notch at angle FIFTH / 2.
    let (dx, dy) = (INNER * tip_cos - OUTER, INNER * tip_sin);
    let length = dx.hypot(dy);
    (dy * (px - OUTER) - dx * py) / length
}

/// Renders the scene of `class` as RGB bytes `[side, side, 3]`.
///
/// `difficulty` in 0..1 scales noise, occlusion, the number of distractors, colour jitter and how small shapes get.
pub(super) fn render(class: usize, side: usize, difficulty: f32, rng: &mut Rng) -> (Vec<u8>, Scene) {
    let (shape, color) = (class / COLORS.len(), class % COLORS.len());
    let uniform = |rng: &mut Rng, low: f32, high: f32| low + (high - low) * rng.uniform_f32();

    let (name, hue, jitter) = COLORS[color];
    let jitter = jitter * (0.4 + 1.2 * difficulty).min(1.0);
    let fill = hsv(
        hue + uniform(rng, -jitter, jitter),
        uniform(rng, 0.95 - 0.45 * difficulty, 1.0),
        uniform(rng, 0.95 - 0.5 * difficulty, 1.0),
    );
    let (background, ground) = contrasting(fill, rng);
    let least = 0.30 - 0.20 * difficulty;
    let radius = uniform(rng, least, 0.44);
    let margin = radius * 0.85;
    let center = [uniform(rng, margin, 1.0 - margin), uniform(rng, margin, 1.0 - margin)];

    let mut image = Canvas::new(side);
    image.background(ground, difficulty, rng);
    let distractors = rng.below((difficulty * 8.0) as u64 + 1) as usize;
    for _ in 0..distractors {
        let small = uniform(rng, 0.03, 0.40 * radius + 0.02);
        let hue = 360.0 * rng.uniform_f32();
        let object = Object {
            shape: rng.below(SHAPES.len() as u64) as usize,
            center: [rng.uniform_f32(), rng.uniform_f32()],
            radius: small,
            turn: turn(rng),
            color: hsv(hue, uniform(rng, 0.2, 1.0), uniform(rng, 0.3, 1.0)),
            shade: 0.0,
        };
        image.draw(&object);
    }
    let shade = uniform(rng, -0.25, 0.25) * difficulty.max(0.2);
    let object = Object { shape, center, radius, turn: turn(rng), color: fill, shade };
    image.draw(&object);
    let occluded = rng.chance(f64::from(0.7 * difficulty));
    if occluded {
        image.bar(&object, rng);
    }
    image.light(difficulty, rng);
    if rng.chance(f64::from(0.5 * difficulty)) {
        image.blur();
    }
    let noise = uniform(rng, 0.0, 0.24 * difficulty);
    let scene = Scene {
        class,
        shape: SHAPES[shape],
        color: name,
        background,
        size: match radius {
            r if r < least + (0.44 - least) / 3.0 => "small",
            r if r > 0.44 - (0.44 - least) / 3.0 => "large",
            _ => "",
        },
        center,
        radius,
        distractors,
        occluded,
        noise,
    };
    (image.finish(noise, rng), scene)
}

fn turn(rng: &mut Rng) -> [f32; 2] {
    let (sin, cos) = (std::f32::consts::TAU * rng.uniform_f32()).sin_cos();
    [cos, sin]
}

/// A background whose colour differs enough from `fill` for a person to see the shape.
fn contrasting(fill: [f32; 3], rng: &mut Rng) -> (&'static str, [f32; 3]) {
    let far = |ground: &[f32; 3]| {
        let squares: f32 = ground.iter().zip(&fill).map(|(a, b)| (a - b) * (a - b)).sum();
        squares.sqrt() > 0.45
    };
    let start = rng.below(BACKGROUNDS.len() as u64) as usize;
    let mut candidates = (0..BACKGROUNDS.len()).map(|i| BACKGROUNDS[(start + i) % BACKGROUNDS.len()]);
    candidates.find(|(_, ground)| far(ground)).unwrap_or(BACKGROUNDS[start])
}

/// Hue in degrees, saturation and value in 0..1, to RGB in 0..1.
fn hsv(hue: f32, saturation: f32, value: f32) -> [f32; 3] {
    let channel = |n: f32| {
        let k = (n + hue / 60.0).rem_euclid(6.0);
        value - value * saturation * k.min(4.0 - k).clamp(0.0, 1.0)
    };
    [channel(5.0), channel(3.0), channel(1.0)]
}

/// An RGB image in 0..1 under construction, `[side, side, 3]`.
struct Canvas {
    side: usize,
    pixels: Vec<[f32; 3]>,
}

impl Canvas {
    fn new(side: usize) -> Self {
        Self { side, pixels: vec![[0.0; 3]; side * side] }
    }

    /// Calls `paint` with each pixel's centre in the unit square.
    fn each(&mut self, mut paint: impl FnMut(f32, f32, &mut [f32; 3])) {
        let step = 1.0 / self.side as f32;
        for (row, line) in self.pixels.chunks_exact_mut(self.side).enumerate() {
            let y = (row as f32 + 0.5) * step;
            for (col, pixel) in line.iter_mut().enumerate() {
                paint((col as f32 + 0.5) * step, y, pixel);
            }
        }
    }

    /// A plain colour with a gradient and one of four textures: none, waves, checks, clouds.
    fn background(&mut self, ground: [f32; 3], difficulty: f32, rng: &mut Rng) {
        let kind = rng.below(4);
        let [cos, sin] = turn(rng);
        let slope = 0.3 * difficulty * (rng.uniform_f32() - 0.5);
        let strength = 0.25 * difficulty * rng.uniform_f32();
        let frequency = 3.0 + 12.0 * rng.uniform_f32();
        let phase = std::f32::consts::TAU * rng.uniform_f32();
        let cells = 3 + rng.below(6) as usize;
        let lattice: Vec<f32> = (0..(cells + 1) * (cells + 1)).map(|_| rng.uniform_f32() - 0.5).collect();
        let tint: [f32; 3] = std::array::from_fn(|_| 0.5 + rng.uniform_f32());
        self.each(|x, y, pixel| {
            let along = x * cos + y * sin;
            let texture = match kind {
                0 => 0.0,
                1 => (frequency * 3.0 * along + phase).sin(),
                2 => {
                    let parity = ((x * frequency).floor() + (y * frequency).floor()) as i32;
                    if parity & 1 == 0 { 0.8 } else { -0.8 }
                }
                _ => 2.5 * cloud(&lattice, cells, x, y),
            };
            for c in 0..3 {
                pixel[c] = ground[c] + slope * (along - 0.5) + strength * tint[c] * texture;
            }
        });
    }

    /// Draws a filled shape, its edge one pixel wide.
    fn draw(&mut self, object: &Object) {
        let Object { shape, center, radius, turn: [cos, sin], color, shade } = *object;
        let side = self.side as f32;
        let edge = |v: f32| (v * side).clamp(0.0, side) as usize;
        let reach = radius + 1.0 / side;
        let rows = edge(center[1] - reach)..edge(center[1] + reach + 1.0 / side);
        let cols = edge(center[0] - reach)..edge(center[0] + reach + 1.0 / side);
        for row in rows {
            let y = ((row as f32 + 0.5) / side - center[1]) / radius;
            for col in cols.clone() {
                let x = ((col as f32 + 0.5) / side - center[0]) / radius;
                let (u, v) = (x * cos + y * sin, y * cos - x * sin);
                let cover = (0.5 - distance(shape, u, v) * radius * side).clamp(0.0, 1.0);
                if cover > 0.0 {
                    let light = 1.0 + shade * x;
                    let pixel = &mut self.pixels[row * self.side + col];
                    for c in 0..3 {
                        pixel[c] += cover * (color[c] * light - pixel[c]);
                    }
                }
            }
        }
    }

    /// A bar of any colour across a part of `object` beside its centre.
    fn bar(&mut self, object: &Object, rng: &mut Rng) {
        let [cos, sin] = turn(rng);
        let offset = object.radius * (0.15 + 0.45 * rng.uniform_f32());
        let half = object.radius * (0.10 + 0.16 * rng.uniform_f32());
        let grey = 0.1 + 0.8 * rng.uniform_f32();
        let color: [f32; 3] = std::array::from_fn(|_| grey + 0.2 * (rng.uniform_f32() - 0.5));
        let side = self.side as f32;
        let [cx, cy] = object.center;
        self.each(|x, y, pixel| {
            let across = (x - cx) * cos + (y - cy) * sin - offset;
            let cover = (0.5 - (across.abs() - half) * side).clamp(0.0, 1.0);
            for c in 0..3 {
                pixel[c] += cover * (color[c] - pixel[c]);
            }
        });
    }

    /// Exposure, contrast and a tint over the whole image.
    fn light(&mut self, difficulty: f32, rng: &mut Rng) {
        let amount = 0.35 * difficulty;
        let mut around = |width: f32| 1.0 + width * (2.0 * rng.uniform_f32() - 1.0);
        let (contrast, bright) = (around(amount), around(amount) - 1.0);
        let tint: [f32; 3] = std::array::from_fn(|_| around(amount * 0.4));
        for pixel in &mut self.pixels {
            for c in 0..3 {
                pixel[c] = ((pixel[c] - 0.5) * contrast + 0.5 + 0.5 * bright) * tint[c];
            }
        }
    }

    /// 3x3 box blur; the border keeps its pixels.
    fn blur(&mut self) {
        let (n, source) = (self.side, self.pixels.clone());
        for row in 1..n.saturating_sub(1) {
            for col in 1..n - 1 {
                let mut sum = [0.0; 3];
                for r in row - 1..=row + 1 {
                    for pixel in &source[r * n + col - 1..=r * n + col + 1] {
                        for c in 0..3 {
                            sum[c] += pixel[c];
                        }
                    }
                }
                self.pixels[row * n + col] = sum.map(|s| s / 9.0);
            }
        }
    }

    /// Adds noise of standard deviation `noise` and rounds to bytes.
    fn finish(self, noise: f32, rng: &mut Rng) -> Vec<u8> {
        // The sum of four uniform bytes has deviation 147.8: close enough to a normal, and one word a value.
        let scale = noise / 147.8;
        let mut bytes = Vec::with_capacity(self.pixels.len() * 3);
        for pixel in &self.pixels {
            for value in pixel {
                let sum: u32 = rng.next_u32().to_le_bytes().into_iter().map(u32::from).sum();
                let noisy = value + (sum as f32 - 510.0) * scale;
                bytes.push((noisy * 255.0 + 0.5).clamp(0.0, 255.0) as u8);
            }
        }
        bytes
    }
}

/// Bilinear interpolation of a lattice of `cells + 1` values a side.
fn cloud(lattice: &[f32], cells: usize, x: f32, y: f32) -> f32 {
    let at = |v: f32| {
        let scaled = v.clamp(0.0, 0.999_9) * cells as f32;
        (scaled as usize, scaled.fract())
    };
    let ((col, fx), (row, fy)) = (at(x), at(y));
    let value = |r: usize, c: usize| lattice[r * (cells + 1) + c];
    let top = value(row, col) * (1.0 - fx) + value(row, col + 1) * fx;
    let bottom = value(row + 1, col) * (1.0 - fx) + value(row + 1, col + 1) * fx;
    top * (1.0 - fy) + bottom * fy
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours() {
        let near = |a: [f32; 3], b: [f32; 3]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
        assert!(near(hsv(0.0, 1.0, 1.0), [1.0, 0.0, 0.0]));
        assert!(near(hsv(120.0, 1.0, 0.5), [0.0, 0.5, 0.0]));
        assert!(near(hsv(-120.0, 1.0, 1.0), [0.0, 0.0, 1.0]));
        assert!(near(hsv(77.0, 0.0, 0.3), [0.3; 3]));
    }

    /// Every shape has its centre inside (the ring and the crescent outside) and stays in the circumcircle.
    #[test]
    fn shapes_fill_their_circle() {
        for shape in 0..SHAPES.len() {
            let hollow = matches!(SHAPES[shape], "ring" | "crescent");
            assert_eq!(distance(shape, 0.0, 0.0) < 0.0, !hollow, "{}", SHAPES[shape]);
            let (mut inside, n) = (0, 200);
            for i in 0..n {
                for j in 0..n {
                    let at = |k: i32| 2.4 * (k as f32 + 0.5) / n as f32 - 1.2;
                    let (x, y) = (at(i), at(j));
                    if distance(shape, x, y) < 0.0 {
                        inside += 1;
                        assert!(x.hypot(y) < 1.11, "{} reaches {x},{y}", SHAPES[shape]);
                    }
                }
            }
            let area = inside as f32 * (2.4 / n as f32).powi(2);
            assert!((0.5..2.6).contains(&area), "{}: area {area}", SHAPES[shape]);
        }
    }
}
