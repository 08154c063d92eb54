//! A DAG as SVG and as DOT.

use std::fmt::Write;

use super::layout::{Placed, layered};
use super::{COLORS, escape};

/// How a node is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeState {
    /// Without a mark.
    Plain,
    /// Its result is in the store.
    Cached,
    /// It has to run.
    ToRun,
}

/// A node of a drawing.
#[derive(Clone, Debug)]
pub struct Shape {
    /// First line.
    pub title: String,
    /// Smaller lines below.
    pub lines: Vec<String>,
    /// Mark.
    pub state: NodeState,
    /// Colour of the node's edge, an index into the series colours.
    pub color: usize,
}

/// An edge of a drawing.
#[derive(Clone, Debug)]
pub struct Arrow {
    /// Source node.
    pub from: usize,
    /// Target node.
    pub to: usize,
    /// What flows.
    pub label: String,
}

/// A DAG to be drawn.
#[derive(Clone, Debug, Default)]
pub struct Drawing {
    /// Title, for screen readers and DOT.
    pub title: String,
    /// Nodes.
    pub nodes: Vec<Shape>,
    /// Edges.
    pub arrows: Vec<Arrow>,
}

const PAD: f64 = 12.0;
const TITLE_HEIGHT: f64 = 18.0;
const LINE_HEIGHT: f64 = 15.0;
/// Between two layers; labels of edges stand here.
const CHANNEL: f64 = 72.0;
const GAP: f64 = 26.0;

impl Shape {
    fn width(&self) -> f64 {
        // Average advance of a sans-serif face at 13 and 11 px; the title is bold.
        let title = self.title.chars().count() as f64 * 8.3;
        let lines = self.lines.iter().map(|l| l.chars().count() as f64 * 6.1).fold(0.0, f64::max);
        title.max(lines).max(60.0) + 2.0 * PAD
    }

    fn height(&self) -> f64 {
        TITLE_HEIGHT + LINE_HEIGHT * self.lines.len() as f64 + 1.4 * PAD
    }
}

impl Drawing {
    /// The drawing as SVG, layers from left to right. `standalone` adds the name space and the colours that a page
    /// around it would bring.
    pub fn svg(&self, standalone: bool) -> String {
        let sizes: Vec<f64> = self.nodes.iter().map(Shape::height).collect();
        let edges: Vec<(usize, usize)> = self.arrows.iter().map(|a| (a.from, a.to)).collect();
        let layout = layered(&sizes, &edges, GAP);
        let mut widths = vec![0.0_f64; layout.layers];
        for (node, placed) in self.nodes.iter().zip(&layout.nodes) {
            widths[placed.layer] = widths[placed.layer].max(node.width());
        }
        let mut left = Vec::with_capacity(widths.len());
        let mut x = PAD;
        for width in &widths {
            left.push(x);
            x += width + CHANNEL;
        }
        let (width, height) = ((x - CHANNEL + PAD).max(2.0 * PAD), layout.extent + 2.0 * PAD);
        let mut svg = String::new();
        let title = escape(&self.title);
        let space = if standalone { " xmlns=\"http://www.w3.org/2000/svg\"" } else { "" };
        let _ = write!(
            svg,
            "<svg{space} class=\"dag\" role=\"img\" aria-label=\"{title}\" viewBox=\"0 0 {width:.0} {height:.0}\" \
             width=\"{width:.0}\" height=\"{height:.0}\" font-family=\"system-ui,sans-serif\">"
        );
        if standalone {
            let _ = write!(svg, "<style>{COLORS}</style><rect width=\"100%\" height=\"100%\" fill=\"var(--bg)\"/>");
        }
        svg.push_str(
            "<defs><marker id=\"tip\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"7\" markerHeight=\"7\" \
             orient=\"auto\"><path d=\"M0 .8 7 4 0 7.2z\" fill=\"var(--muted)\"/></marker></defs>",
        );
        for (arrow, path) in self.arrows.iter().zip(&layout.edges) {
            self.edge(&mut svg, arrow, path, &left, &widths);
        }
        for (node, placed) in self.nodes.iter().zip(&layout.nodes) {
            let x = left[placed.layer] + (widths[placed.layer] - node.width()) / 2.0;
            node.draw(&mut svg, x, placed.at + PAD - node.height() / 2.0);
        }
        svg.push_str("</svg>");
        svg
    }

    fn edge(&self, svg: &mut String, arrow: &Arrow, path: &[Placed], left: &[f64], widths: &[f64]) {
        let side = |node: usize, layer: usize| (widths[layer] - self.nodes[node].width()) / 2.0;
        let (Some(first), Some(last)) = (path.first(), path.last()) else { return };
        let start = left[first.layer] + widths[first.layer] - side(arrow.from, first.layer);
        let end = left[last.layer] + side(arrow.to, last.layer) - 1.0;
        let mut d = format!("M{start:.1} {:.1}", first.at + PAD);
        let (mut x, mut y) = (start, first.at + PAD);
        // Straight across the layers that the edge passes, a curve in each channel.
        for pair in path.windows(2) {
            let (a, b) = (pair[0], pair[1]);
            let (out, into) = (left[a.layer] + widths[a.layer], left[b.layer]);
            let to_y = b.at + PAD;
            if out > x {
                let _ = write!(d, "L{out:.1} {y:.1}");
            }
            let bend = (into - out) * 0.5;
            let _ = write!(d, "C{:.1} {y:.1} {:.1} {to_y:.1} {into:.1} {to_y:.1}", out + bend, into - bend);
            (x, y) = (into, to_y);
        }
        if end > x {
            let _ = write!(d, "L{end:.1} {y:.1}");
        }
        let _ = write!(
            svg,
            "<path d=\"{d}\" fill=\"none\" stroke=\"var(--muted)\" stroke-width=\"1.3\" opacity=\".75\" \
             marker-end=\"url(#tip)\"><title>{} → {}: {}</title></path>",
            escape(&self.nodes[arrow.from].title),
            escape(&self.nodes[arrow.to].title),
            escape(&arrow.label)
        );
    }

    /// The drawing in Graphviz's language.
    pub fn dot(&self) -> String {
        let quote = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let mut dot = format!(
            "digraph \"{}\" {{\n  rankdir=LR;\n  node [shape=box, style=rounded, fontname=\"sans-serif\"];\n  \
             edge [fontname=\"sans-serif\", fontsize=10];\n",
            quote(&self.title)
        );
        for (i, node) in self.nodes.iter().enumerate() {
            let label: Vec<String> = std::iter::once(&node.title).chain(&node.lines).map(|line| quote(line)).collect();
            let style = if node.state == NodeState::Cached { ", style=\"rounded,dashed\"" } else { "" };
            let _ = writeln!(dot, "  n{i} [label=\"{}\"{style}];", label.join("\\n"));
        }
        for arrow in &self.arrows {
            let _ = writeln!(dot, "  n{} -> n{} [label=\"{}\"];", arrow.from, arrow.to, quote(&arrow.label));
        }
        dot.push_str("}\n");
        dot
    }
}

impl Shape {
    fn draw(&self, svg: &mut String, x: f64, y: f64) {
        let (width, height) = (self.width(), self.height());
        let dash = if self.state == NodeState::Cached { " stroke-dasharray=\"5 3\"" } else { "" };
        let _ = write!(
            svg,
            "<g><rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" rx=\"9\" \
             fill=\"var(--card)\" stroke=\"var(--s{})\" stroke-width=\"1.6\"{dash}/>",
            self.color % 6
        );
        let mut base = y + 0.7 * PAD + TITLE_HEIGHT - 5.0;
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{base:.1}\" font-size=\"13\" font-weight=\"600\" fill=\"var(--fg)\">{}</text>",
            x + PAD,
            escape(&self.title)
        );
        for line in &self.lines {
            base += LINE_HEIGHT;
            let _ = write!(
                svg,
                "<text x=\"{:.1}\" y=\"{base:.1}\" font-size=\"11\" fill=\"var(--muted)\">{}</text>",
                x + PAD,
                escape(line)
            );
        }
        svg.push_str("</g>");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawing() -> Drawing {
        let node = |title: &str| Shape {
            title: title.into(),
            lines: vec!["x < y".into()],
            state: NodeState::Cached,
            color: 0,
        };
        Drawing {
            title: "t\"q".into(),
            nodes: vec![node("a"), node("b"), node("c")],
            arrows: vec![
                Arrow { from: 0, to: 1, label: "m".into() },
                Arrow { from: 1, to: 2, label: "m".into() },
                Arrow { from: 0, to: 2, label: "m".into() },
            ],
        }
    }

    #[test]
    fn svg_and_dot_are_well_formed() {
        let svg = drawing().svg(true);
        assert!(svg.starts_with("<svg xmlns") && svg.ends_with("</svg>"));
        assert_eq!(svg.matches("<rect").count(), 4);
        assert!(svg.contains("x &lt; y") && svg.contains("t&quot;q"));
        let dot = drawing().dot();
        assert!(dot.contains("digraph \"t\\\"q\"") && dot.contains("n0 -> n2"));
    }
}
