//! Images as data URIs.

use crate::error::RunError;

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Base64 with padding (RFC 4648).
pub fn base64(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().enumerate().fold(0u32, |w, (i, &b)| w | u32::from(b) << (16 - 8 * i));
        for i in 0..4 {
            let digit = ALPHABET[(word >> (18 - 6 * i)) as usize & 63];
            out.push(if i <= chunk.len() { digit as char } else { '=' });
        }
    }
    out
}

/// An image of `width`×`height` RGB pixels as a PNG in a data URI.
///
/// # Errors
/// `rgb` does not have `3·width·height` bytes.
pub fn png_data_uri(width: usize, height: usize, rgb: &[u8]) -> Result<String, RunError> {
    let mut bytes = Vec::new();
    let fail = |e: String| RunError::Report(format!("a sample's picture can't be encoded: {e}"));
    let side = |n: usize| u32::try_from(n).map_err(|e| fail(e.to_string()));
    let mut encoder = png::Encoder::new(&mut bytes, side(width)?, side(height)?);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header().map_err(|e| fail(e.to_string()))?;
    writer.write_image_data(rgb).map_err(|e| fail(e.to_string()))?;
    writer.finish().map_err(|e| fail(e.to_string()))?;
    Ok(format!("data:image/png;base64,{}", base64(&bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_has_the_rfcs_vectors() {
        let encoded: Vec<String> =
            ["", "f", "fo", "foo", "foob", "fooba", "foobar"].iter().map(|t| base64(t.as_bytes())).collect();
        assert_eq!(encoded, ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy"]);
    }

    #[test]
    fn an_image_of_the_wrong_size_is_an_error() {
        assert!(png_data_uri(2, 2, &[0; 12]).is_ok_and(|uri| uri.starts_with("data:image/png;base64,iVBOR")));
        assert!(png_data_uri(2, 2, &[0; 11]).is_err());
    }
}
