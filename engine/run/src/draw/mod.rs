//! Drawing without outside help: the layered layout of a DAG, line charts and images as inline SVG and data URIs.

mod chart;
mod dag;
mod image;
mod layout;

pub use chart::{Chart, Mark, Series};
pub use dag::{Arrow, Drawing, NodeState, Shape};
pub use image::{base64, png_data_uri};
pub use layout::{Layout, Placed, layered};

/// Escapes text for XML and HTML, attributes included.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // Control characters have no place in XML 1.0.
            c if c.is_control() && !matches!(c, '\n' | '\t') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// The colours of all drawings, for light and dark surroundings; the report page and stand-alone SVGs both carry them.
/// The series colours are those of Okabe & Ito (2008), lightened on dark ground, so that they stay apart for readers
/// with any colour vision.
pub const COLORS: &str = ":root{color-scheme:light dark;--bg:#fff;--card:#f7f8fa;--fg:#1b1f24;--muted:#59636e;\
--line:#d5dae1;--accent:#0072b2;--good:#00795b;--bad:#b4410a;--s0:#0072b2;--s1:#d55e00;--s2:#008a66;--s3:#b0588f;\
--s4:#8a6d00;--s5:#3c8fc0;--heat:0,114,178}\
@media(prefers-color-scheme:dark){:root{--bg:#14171c;--card:#1c2027;--fg:#e4e8ee;--muted:#98a2b0;--line:#343b46;\
--accent:#56b4e9;--good:#3fcf9f;--bad:#ff9054;--s0:#56b4e9;--s1:#ff9054;--s2:#3fcf9f;--s3:#e08cc0;--s4:#e6c14a;\
--s5:#8fd0f5;--heat:86,180,233}}";

/// A number for people: at most four significant digits, no trailing zeros, `k`/`M`/`G` beyond a thousand of them.
pub fn short_number(value: f64) -> String {
    let (scaled, unit) = match value.abs() {
        v if v >= 1e9 => (value / 1e9, "G"),
        v if v >= 1e6 => (value / 1e6, "M"),
        v if v >= 1e4 => (value / 1e3, "k"),
        _ => (value, ""),
    };
    if !scaled.is_finite() {
        return scaled.to_string();
    }
    if scaled != 0.0 && scaled.abs() < 1e-3 {
        return format!("{scaled:.1e}{unit}");
    }
    let whole = scaled.abs().max(1.0).log10().floor() as usize;
    let mut text = format!("{scaled:.*}", 3usize.saturating_sub(whole));
    if text.contains('.') {
        text.truncate(text.trim_end_matches('0').trim_end_matches('.').len());
    }
    text + unit
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let shown: Vec<String> =
            [0.0, 0.5, 1.23456, 400.0, 1234.0, 12345.0, 2.5e6, 3e-5, -0.25].iter().map(|&v| short_number(v)).collect();
        assert_eq!(shown, ["0", "0.5", "1.235", "400", "1234", "12.35k", "2.5M", "3.0e-5", "-0.25"]);
    }

    #[test]
    fn markup_is_escaped() {
        assert_eq!(escape("<a href='x'>&\u{1}"), "&lt;a href=&#39;x&#39;&gt;&amp;\u{fffd}");
    }
}
