//! Element types of tensors on disk, and their values as `f32`.

use std::fmt;

use safetensors::tensor::Dtype;

/// Type of a tensor's elements, little-endian on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// One byte, 0 or 1.
    Bool,
    /// Unsigned, 8 bits.
    U8,
    /// Signed, 8 bits.
    I8,
    /// Signed, 16 bits.
    I16,
    /// Signed, 32 bits.
    I32,
    /// Signed, 64 bits.
    I64,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of a single-precision number.
    Bf16,
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 double precision.
    F64,
}

impl Element {
    /// Bytes of one element.
    pub fn width(self) -> usize {
        match self {
            Element::Bool | Element::U8 | Element::I8 => 1,
            Element::I16 | Element::F16 | Element::Bf16 => 2,
            Element::I32 | Element::F32 => 4,
            Element::I64 | Element::F64 => 8,
        }
    }

    /// Whether it holds real numbers, as weights do.
    pub fn is_float(self) -> bool {
        matches!(self, Element::F16 | Element::Bf16 | Element::F32 | Element::F64)
    }

    /// Name in safetensors files.
    pub fn name(self) -> &'static str {
        match self {
            Element::Bool => "BOOL",
            Element::U8 => "U8",
            Element::I8 => "I8",
            Element::I16 => "I16",
            Element::I32 => "I32",
            Element::I64 => "I64",
            Element::F16 => "F16",
            Element::Bf16 => "BF16",
            Element::F32 => "F32",
            Element::F64 => "F64",
        }
    }

    /// The element type of a safetensors file, where it is one that is read.
    pub(super) fn of(dtype: Dtype) -> Option<Element> {
        Some(match dtype {
            Dtype::BOOL => Element::Bool,
            Dtype::U8 => Element::U8,
            Dtype::I8 => Element::I8,
            Dtype::I16 => Element::I16,
            Dtype::I32 => Element::I32,
            Dtype::I64 => Element::I64,
            Dtype::F16 => Element::F16,
            Dtype::BF16 => Element::Bf16,
            Dtype::F32 => Element::F32,
            Dtype::F64 => Element::F64,
            _ => return None,
        })
    }

    /// Values of `bytes` widened or rounded to `f32`; none for integers.
    pub fn decode(self, bytes: &[u8]) -> Option<Vec<f32>> {
        Some(match self {
            Element::F32 => each(bytes, f32::from_le_bytes),
            Element::F64 => each(bytes, |b| f64::from_le_bytes(b) as f32),
            Element::F16 => each(bytes, |b| f16_to_f32(u16::from_le_bytes(b))),
            Element::Bf16 => each(bytes, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
            _ => return None,
        })
    }

    /// `values` as bytes, rounded to the nearest (ties to even); none for integers and double precision.
    pub(super) fn encode(self, values: &[f32]) -> Option<Vec<u8>> {
        Some(match self {
            Element::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Element::F16 => values.iter().flat_map(|&x| f32_to_f16(x).to_le_bytes()).collect(),
            Element::Bf16 => values.iter().flat_map(|&x| f32_to_bf16(x).to_le_bytes()).collect(),
            _ => return None,
        })
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

fn each<const N: usize>(bytes: &[u8], decode: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    bytes.as_chunks::<N>().0.iter().map(|&b| decode(b)).collect()
}

/// IEEE 754 half to single precision, exactly.
fn f16_to_f32(h: u16) -> f32 {
    let (sign, exponent, mantissa) = (u32::from(h >> 15) << 31, u32::from(h >> 10 & 0x1f), u32::from(h & 0x3ff));
    match exponent {
        // Subnormal: mantissa · 2⁻²⁴, exact in f32.
        0 => f32::from_bits(sign | (mantissa as f32 / 16_777_216.0).to_bits()),
        0x1f => f32::from_bits(sign | 0x7f80_0000 | mantissa << 13),
        _ => f32::from_bits(sign | (exponent + 112) << 23 | mantissa << 13),
    }
}

/// Single to half precision, to the nearest, ties to even; what is too great becomes infinite.
fn f32_to_f16(x: f32) -> u16 {
    let bits = x.to_bits();
    let sign = (bits >> 16) as u16 & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return sign | 0x7e00;
    }
    // 65520, halfway between the greatest half and what would be the next.
    if magnitude >= 0x477f_f000 {
        return sign | 0x7c00;
    }
    // 2⁻¹⁴, the least normal half.
    if magnitude < 0x3880_0000 {
        // Adding ½ leaves a grid of 2⁻²⁴ in the sum's mantissa, so that the addition itself rounds.
        let sum = f32::from_bits(magnitude) + 0.5;
        return sign | (sum.to_bits() - 0.5f32.to_bits()) as u16;
    }
    let rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    sign | ((rounded >> 13) - (112 << 10)) as u16
}

/// Single precision to its upper half, to the nearest, ties to even.
fn f32_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_precision_is_exact() {
        for (bits, value) in [(0x0000, 0.0), (0x8000, -0.0), (0x3c00, 1.0), (0xc000, -2.0), (0x7bff, 65504.0)] {
            assert_eq!(f16_to_f32(bits).to_bits(), f32::to_bits(value), "{bits:#x}");
        }
        assert_eq!(f16_to_f32(0x0001), 2f32.powi(-24));
        assert_eq!(f16_to_f32(0x03ff), 1023.0 * 2f32.powi(-24));
        assert_eq!(f16_to_f32(0x0400), 2f32.powi(-14));
        assert_eq!(f16_to_f32(0xfc00), f32::NEG_INFINITY);
        assert!(f16_to_f32(0x7e00).is_nan());
    }

    #[test]
    fn every_half_survives_and_values_between_round_to_even() {
        for bits in (0..=u16::MAX).filter(|&b| !f16_to_f32(b).is_nan()) {
            assert_eq!(f32_to_f16(f16_to_f32(bits)), bits, "{bits:#x}");
        }
        for bits in 0..0x7bffu16 {
            let (low, high) = (f16_to_f32(bits), f16_to_f32(bits + 1));
            let middle = (low + high) / 2.0;
            let even = if bits % 2 == 0 { bits } else { bits + 1 };
            assert_eq!(f32_to_f16(middle), even, "{middle}");
            assert_eq!(f32_to_f16(middle.next_up()), bits + 1);
            assert_eq!(f32_to_f16(middle.next_down()), bits);
        }
        assert_eq!(f32_to_f16(65519.996), 0x7bff);
        assert_eq!(f32_to_f16(-65520.0), 0xfc00);
        assert!(f16_to_f32(f32_to_f16(f32::NAN)).is_nan());
    }

    #[test]
    fn upper_halves_round_to_even() {
        assert_eq!(f32_to_bf16(1.0), 0x3f80);
        assert_eq!(f32_to_bf16(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(f32_to_bf16(f32::from_bits(0x3f81_8000)), 0x3f82);
        assert_eq!(f32_to_bf16(f32::from_bits(0x3f80_8001)), 0x3f81);
        assert_eq!(f32_to_bf16(f32::MAX), 0x7f80);
        assert!(f32::from_bits(u32::from(f32_to_bf16(f32::NAN)) << 16).is_nan());
    }
}
