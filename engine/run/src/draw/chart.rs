//! Line charts as SVG.

use std::fmt::Write;

use super::{escape, short_number};

/// A line of a chart.
#[derive(Clone, Debug)]
pub struct Series {
    /// Name in the legend.
    pub name: String,
    /// Index into the series colours.
    pub color: usize,
    /// Index of the dash pattern; 0 is a full line.
    pub dash: usize,
    /// Points (x, y), by rising x; points that are not finite are left out.
    pub points: Vec<(f64, f64)>,
}

/// A horizontal line with a label, such as chance.
#[derive(Clone, Debug)]
pub struct Mark {
    /// Label.
    pub label: String,
    /// Height.
    pub y: f64,
}

/// A line chart.
#[derive(Clone, Debug, Default)]
pub struct Chart {
    /// Title, above the chart.
    pub title: String,
    /// Label of the x axis.
    pub x_label: String,
    /// Label of the y axis.
    pub y_label: String,
    /// Whether y values are shares, shown in percent on an axis from 0 to at most 1.
    pub percent: bool,
    /// Lines.
    pub series: Vec<Series>,
    /// Horizontal marks.
    pub marks: Vec<Mark>,
}

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 46.0;
const DASHES: [&str; 7] = ["7 4", "2 3", "9 3 2 3", "1 5", "12 3", "5 2 1 2 1 2", "4 7"];
const LEGEND_ROW: f64 = 19.0;

/// The dash pattern of a line; only 0 is a full line.
fn dash(index: usize) -> &'static str {
    match index {
        0 => "",
        i => DASHES[(i - 1) % DASHES.len()],
    }
}

/// About `count` round values that span `low..high`.
fn ticks(low: f64, high: f64, count: f64) -> Vec<f64> {
    let span = (high - low).max(f64::MIN_POSITIVE);
    let raw = span / count;
    let magnitude = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|m| m * magnitude).find(|s| *s >= raw).unwrap_or(raw);
    let first = (low / step).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    (first..=last.min(first.saturating_add(50))).map(|i| i as f64 * step).collect()
}

impl Chart {
    fn shown(&self, y: f64) -> String {
        if self.percent { format!("{} %", short_number(100.0 * y)) } else { short_number(y) }
    }

    /// The chart as SVG for a page that brings the colours; with a sentence instead where there is nothing to draw.
    pub fn svg(&self) -> String {
        let finite = |s: &Series| {
            let points = s.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite());
            Series { points: points.collect(), ..s.clone() }
        };
        let series: Vec<Series> = self.series.iter().map(finite).filter(|s| !s.points.is_empty()).collect();
        if series.is_empty() {
            return "<p class=\"muted\">Nothing was logged.</p>".to_owned();
        }
        let points = || series.iter().flat_map(|s| &s.points);
        // A little room, so that a mark at the last step is not cut.
        let x_max = 1.015 * points().map(|p| p.0).fold(1.0, f64::max);
        let x_min = points().map(|p| p.0).fold(x_max, f64::min).min(0.0);
        let ys = || points().map(|p| p.1).chain(self.marks.iter().map(|m| m.y));
        let (mut low, mut high) = (ys().fold(f64::INFINITY, f64::min), ys().fold(f64::NEG_INFINITY, f64::max));
        if self.percent || (low > 0.0 && low < 0.5 * high) {
            low = low.min(0.0);
        }
        let margin = 0.05 * (high - low).max(1e-3 * high.abs()).max(1e-9);
        high += margin;
        if self.percent {
            high = high.min(1.0).max(low + margin);
        }
        if low != 0.0 {
            low -= margin;
        }
        let px = |x: f64| LEFT + (x - x_min) / (x_max - x_min).max(1e-12) * (WIDTH - LEFT - RIGHT);
        let py = |y: f64| TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM);

        let rows = self.legend_rows(&series);
        let total = HEIGHT + LEGEND_ROW * rows.len() as f64;
        let mut svg = format!(
            "<svg class=\"chart\" role=\"img\" aria-label=\"{}\" viewBox=\"0 0 {WIDTH} {total}\" \
             font-family=\"system-ui,sans-serif\" font-size=\"11.5\">",
            escape(&self.title)
        );
        for y in ticks(low, high, 5.0) {
            let _ = write!(
                svg,
                "<path d=\"M{LEFT} {0:.1}H{1}\" stroke=\"var(--line)\"/><text x=\"{2}\" y=\"{3:.1}\" \
                 text-anchor=\"end\" fill=\"var(--muted)\">{4}</text>",
                py(y),
                WIDTH - RIGHT,
                LEFT - 7.0,
                py(y) + 4.0,
                self.shown(y)
            );
        }
        let floor = HEIGHT - BOTTOM;
        for x in ticks(x_min, x_max, 8.0) {
            let _ = write!(
                svg,
                "<path d=\"M{0:.1} {floor}v4\" stroke=\"var(--muted)\"/><text x=\"{0:.1}\" y=\"{1}\" \
                 text-anchor=\"middle\" fill=\"var(--muted)\">{2}</text>",
                px(x),
                floor + 17.0,
                short_number(x)
            );
        }
        let _ = write!(
            svg,
            "<path d=\"M{LEFT} {floor}H{}\" stroke=\"var(--muted)\"/><text x=\"{}\" y=\"{}\" text-anchor=\"middle\" \
             fill=\"var(--fg)\">{}</text><text transform=\"translate(14 {:.1})rotate(-90)\" text-anchor=\"middle\" \
             fill=\"var(--fg)\">{}</text>",
            WIDTH - RIGHT,
            (LEFT + WIDTH - RIGHT) / 2.0,
            floor + 36.0,
            escape(&self.x_label),
            (TOP + floor) / 2.0,
            escape(&self.y_label)
        );
        for mark in &self.marks {
            let _ = write!(
                svg,
                "<path d=\"M{LEFT} {0:.1}H{1}\" stroke=\"var(--muted)\" stroke-dasharray=\"3 3\"/><text x=\"{2}\" \
                 y=\"{3:.1}\" text-anchor=\"end\" fill=\"var(--muted)\">{4}</text>",
                py(mark.y),
                WIDTH - RIGHT,
                WIDTH - RIGHT - 4.0,
                py(mark.y) - 4.0,
                escape(&mark.label)
            );
        }
        for line in &series {
            self.line(&mut svg, line, &px, &py);
        }
        for (r, row) in rows.iter().enumerate() {
            let y = HEIGHT + LEGEND_ROW * r as f64;
            for (x, line) in row {
                let _ = write!(
                    svg,
                    "<path d=\"M{x:.1} {0:.1}h24\" stroke=\"var(--s{1})\" stroke-width=\"2\" \
                     stroke-dasharray=\"{2}\"/><text x=\"{3:.1}\" y=\"{4:.1}\" fill=\"var(--fg)\">{5}</text>",
                    y + 4.0,
                    line.color % 6,
                    dash(line.dash),
                    x + 30.0,
                    y + 8.0,
                    escape(&line.name)
                );
            }
        }
        svg.push_str("</svg>");
        svg
    }

    fn line(&self, svg: &mut String, line: &Series, px: &dyn Fn(f64) -> f64, py: &dyn Fn(f64) -> f64) {
        let color = line.color % 6;
        let mut d = String::new();
        for (i, &(x, y)) in line.points.iter().enumerate() {
            let _ = write!(d, "{}{:.1} {:.1}", if i == 0 { 'M' } else { 'L' }, px(x), py(y));
        }
        let _ = write!(
            svg,
            "<path d=\"{d}\" fill=\"none\" stroke=\"var(--s{color})\" stroke-width=\"1.8\" stroke-linejoin=\"round\" \
             stroke-dasharray=\"{}\"><title>{}</title></path>",
            dash(line.dash),
            escape(&line.name)
        );
        // Few points are marked, so that a single one can be seen at all.
        if line.points.len() <= 12 {
            for &(x, y) in &line.points {
                let _ = write!(
                    svg,
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.6\" fill=\"var(--s{color})\"><title>{}: {} at {}</title>\
                     </circle>",
                    px(x),
                    py(y),
                    escape(&line.name),
                    self.shown(y),
                    short_number(x)
                );
            }
        }
    }

    /// The legend's entries with their places, row by row.
    fn legend_rows<'a>(&self, series: &'a [Series]) -> Vec<Vec<(f64, &'a Series)>> {
        let mut rows = vec![Vec::new()];
        let mut x = LEFT;
        for line in series {
            let width = 30.0 + line.name.chars().count() as f64 * 6.6 + 20.0;
            if x > LEFT && x + width > WIDTH - RIGHT {
                rows.push(Vec::new());
                x = LEFT;
            }
            if let Some(row) = rows.last_mut() {
                row.push((x, line));
            }
            x += width;
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round() {
        assert_eq!(ticks(0.0, 1.0, 5.0), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        assert_eq!(ticks(0.0, 400.0, 8.0), [0.0, 50.0, 100.0, 150.0, 200.0, 250.0, 300.0, 350.0, 400.0]);
    }

    #[test]
    fn a_chart_survives_odd_numbers() {
        let line = |points: Vec<(f64, f64)>| Series { name: "a".into(), color: 0, dash: 0, points };
        for points in [vec![], vec![(0.0, f64::NAN)], vec![(3.0, 2.0)], vec![(0.0, 0.0), (1.0, 0.0)]] {
            let chart = Chart { series: vec![line(points)], ..Chart::default() };
            assert!(!chart.svg().contains("NaN") && !chart.svg().contains("inf"), "{}", chart.svg());
        }
    }
}
