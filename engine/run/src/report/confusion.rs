//! The confusion matrix as SVG.

use std::fmt::Write;

use crate::draw::escape;
use crate::records::Predictions;

/// Classes beyond which names are left out: they would not be readable.
const NAMED: usize = 64;

/// True class by row, predicted class by column; each row's share in the colour's strength.
pub(super) fn svg(predictions: &Predictions) -> String {
    let n = predictions.classes.len();
    if n == 0 || predictions.confusion.len() != n {
        return String::new();
    }
    let named = n <= NAMED;
    let cell = if n <= 12 { 34.0 } else { (620.0 / n as f64).clamp(3.0, 22.0) };
    let font = (cell * 0.8).clamp(6.0, 12.0);
    let longest = predictions.classes.iter().map(|c| c.chars().count().min(24)).max().unwrap_or(0) as f64;
    let margin = if named { longest * font * 0.56 + 12.0 } else { 8.0 };
    let head = if named { margin * 0.9 } else { 8.0 };
    let (width, height) = (margin + cell * n as f64 + head * 0.5 + 8.0, head + cell * n as f64 + 8.0);
    let mut svg = format!(
        "<svg class=\"confusion\" role=\"img\" aria-label=\"Confusion matrix\" viewBox=\"0 0 {width:.0} {height:.0}\" \
         style=\"max-width:{width:.0}px\" font-family=\"system-ui,sans-serif\" font-size=\"{font:.1}\">"
    );
    let short = |name: &str| escape(&name.chars().take(24).collect::<String>());
    for (row, counts) in predictions.confusion.iter().enumerate() {
        let total: u32 = counts.iter().sum();
        let y = head + cell * row as f64;
        if named {
            let _ = write!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"var(--fg)\">{}</text><text \
                 transform=\"translate({:.1} {:.1})rotate(-60)\" fill=\"var(--fg)\">{}</text>",
                margin - 5.0,
                y + cell * 0.5 + font * 0.35,
                short(&predictions.classes[row]),
                margin + cell * (row as f64 + 0.5) + font * 0.35,
                head - 4.0,
                short(&predictions.classes[row])
            );
        }
        for (column, &count) in counts.iter().enumerate().take(n) {
            let share = f64::from(count) / f64::from(total.max(1));
            let x = margin + cell * column as f64;
            let stroke = if row == column { "var(--muted)" } else { "var(--line)" };
            let _ = write!(
                svg,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{0:.1}\" height=\"{0:.1}\" fill=\"rgba(var(--heat),{share:.3})\" \
                 stroke=\"{stroke}\" stroke-width=\".5\">",
                cell - 1.0
            );
            if count > 0 {
                let _ = write!(
                    svg,
                    "<title>{} taken for {}: {count} of {total}</title>",
                    escape(&predictions.classes[row]),
                    escape(predictions.classes.get(column).map_or("", String::as_str))
                );
            }
            svg.push_str("</rect>");
            if cell >= 30.0 && count > 0 {
                let _ = write!(
                    svg,
                    "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" font-size=\"10.5\" fill=\"var(--fg)\">{count}</text>",
                    x + cell * 0.5,
                    y + cell * 0.5 + 4.0
                );
            }
        }
    }
    svg.push_str("</svg>");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_has_a_cell_for_each_pair() {
        let predictions = Predictions {
            classes: vec!["a<b".into(), "c".into()],
            confusion: vec![vec![3, 1], vec![0, 0]],
            gallery: Vec::new(),
        };
        let svg = svg(&predictions);
        assert_eq!(svg.matches("<rect").count(), 4);
        assert!(svg.contains("a&lt;b taken for c: 1 of 4") && !svg.contains("NaN"));
        assert!(super::svg(&Predictions::default()).is_empty());
    }
}
