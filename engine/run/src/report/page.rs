//! The page.

use std::fmt::Write;

use super::{Report, confusion, label};
use crate::draw::{COLORS, escape, short_number};
use crate::records::{GalleryItem, Predictions, Role, Scores};

const STYLE: &str = "*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 \
system-ui,-apple-system,'Segoe UI',sans-serif}main{max-width:1060px;margin:0 auto;padding:32px 24px 64px}h1{font-size:\
28px;margin:0 0 4px;letter-spacing:-.01em}h2{font-size:19px;margin:44px 0 12px}.muted{color:var(--muted)}.lead{font-size\
:16px;margin:0 0 20px}.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px;\
overflow-x:auto;margin-bottom:16px}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}th{text-\
align:left;font-weight:600;color:var(--muted);font-size:13px}td,th{padding:6px 14px 6px 0;border-bottom:1px solid \
var(--line);vertical-align:top}tr:last-child td{border-bottom:0}td.n,th.n{text-align:right}.bars{display:grid;\
grid-template-columns:max-content 1fr max-content;gap:8px 14px;align-items:center}.bar{position:relative;height:16px;\
border-radius:4px;background:var(--line)}.bar i{position:absolute;inset:0 auto 0 0;border-radius:4px;opacity:.9}.bar b{\
position:absolute;top:-4px;bottom:-4px;width:2px;background:var(--fg)}svg.chart{width:100%;height:auto;display:block}\
svg.dag{max-width:none;display:block}svg.confusion{width:100%;height:auto;display:block;margin:0 auto}.gallery{display:\
grid;grid-template-columns:repeat(auto-fill,minmax(148px,1fr));gap:12px}.shot{background:var(--card);border:1px solid \
var(--line);border-radius:10px;padding:8px;font-size:12.5px;line-height:1.35}.shot img{width:100%;border-radius:6px;\
display:block;image-rendering:pixelated;margin-bottom:6px}.shot.right{border-color:var(--good)}.shot.wrong{border-color:\
var(--bad)}.mark{font-weight:700}.right .mark{color:var(--good)}.wrong .mark{color:var(--bad)}.shot p{margin:0 0 4px}\
.guess{display:grid;grid-template-columns:1fr max-content;gap:0 6px;color:var(--muted)}.guess .t{color:var(--fg);\
font-weight:600}details summary{cursor:pointer;font-weight:600;padding:2px 0}code{font:12.5px ui-monospace,monospace;\
overflow-wrap:anywhere}.settings td:first-child{width:38%}footer{margin-top:40px;color:var(--muted);font-size:13px}";

/// The report as one HTML file that needs nothing from outside.
pub fn html(report: &Report) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width,initial-scale=1\"><title>{0} · mcpipe</title><style>{COLORS}{STYLE}</style></head>\
         <body><main><h1>{0}</h1><p class=\"lead muted\">{1}</p>",
        escape(&report.name),
        escape(&lead(report))
    );
    results(&mut page, report);
    let _ = write!(page, "<h2>Training</h2><div class=\"card\">{}</div>", report.loss_chart().svg());
    for chart in report.accuracy_charts() {
        let _ = write!(page, "<div class=\"card\">{}</div>", chart.svg());
    }
    if let Some(predictions) = &report.predictions {
        samples(&mut page, predictions);
        let matrix = confusion::svg(predictions);
        if !matrix.is_empty() {
            let _ = write!(
                page,
                "<h2>Confusion</h2><p class=\"muted\">Of the student: true class by row, predicted class by column; \
                 the colour is the share of the row.</p><div class=\"card\">{matrix}</div>"
            );
        }
    }
    let _ = write!(page, "<h2>Stages</h2><div class=\"card\">{}</div>", report.dag);
    settings(&mut page, report);
    let _ = writeln!(page, "<footer>mcpipe {}</footer></main></body></html>", escape(&report.version));
    page
}

fn percent(value: f64) -> String {
    format!("{:.1} %", 100.0 * value)
}

/// The result in a sentence.
fn lead(report: &Report) -> String {
    let of = |role: Role| report.scores.iter().find(|s| s.role == role);
    let Some(student) = of(Role::Student) else { return "A run of mcpipe".into() };
    let mut text = format!("{} {}", student.headline.label, percent(student.headline.value));
    if let Some(baseline) = of(Role::Baseline) {
        let _ = write!(text, " with distillation, {} without", percent(baseline.headline.value));
    }
    if let Some(teacher) = of(Role::Teacher) {
        let _ = write!(text, "; teacher {}", percent(teacher.headline.value));
    }
    let _ = write!(text, "; chance {}", percent(student.headline.chance));
    text
}

fn color(role: Role) -> usize {
    match role {
        Role::Student => 0,
        Role::Baseline => 1,
        Role::Teacher => 2,
    }
}

fn results(page: &mut String, report: &Report) {
    page.push_str("<h2>Results</h2>");
    let mut evaluations: Vec<&str> = Vec::new();
    for scores in &report.scores {
        if !evaluations.contains(&scores.evaluation.as_str()) {
            evaluations.push(&scores.evaluation);
        }
    }
    for evaluation in evaluations {
        let rows: Vec<&Scores> = report.scores.iter().filter(|s| s.evaluation == evaluation).collect();
        let Some(first) = rows.first() else { continue };
        let _ = write!(
            page,
            "<div class=\"card\"><p><strong>{}</strong> <span class=\"muted\">{}, {} samples; the stroke marks chance \
             ({})</span></p><div class=\"bars\">",
            escape(evaluation),
            escape(&first.headline.label),
            first.samples,
            percent(first.headline.chance)
        );
        for scores in &rows {
            let _ = write!(
                page,
                "<span>{}</span><span class=\"bar\"><i style=\"width:{:.2}%;background:var(--s{})\"></i><b \
                 style=\"left:{:.2}%\"></b></span><strong>{}</strong>",
                escape(&label(&scores.model, scores.role, report.distils())),
                100.0 * scores.headline.value.clamp(0.0, 1.0),
                color(scores.role),
                100.0 * scores.headline.chance.clamp(0.0, 1.0),
                percent(scores.headline.value)
            );
        }
        page.push_str("</div></div>");
        metrics_table(page, report, &rows);
    }
    models_table(page, report);
}

fn metrics_table(page: &mut String, report: &Report, rows: &[&Scores]) {
    let mut names: Vec<&String> = rows.iter().flat_map(|s| s.metrics.keys()).collect();
    names.sort_unstable();
    names.dedup();
    page.push_str("<div class=\"card\"><table><tr><th>model</th>");
    for name in &names {
        let _ = write!(page, "<th class=\"n\">{}</th>", escape(name));
    }
    page.push_str("<th class=\"n\">images/s</th></tr>");
    for scores in rows {
        let _ = write!(page, "<tr><td>{}</td>", escape(&label(&scores.model, scores.role, report.distils())));
        for name in &names {
            let shown = scores.metrics.get(*name).map_or_else(|| "–".to_owned(), |&v| percent(v));
            let _ = write!(page, "<td class=\"n\">{shown}</td>");
        }
        let _ = write!(page, "<td class=\"n\">{}</td></tr>", short_number(scores.images_per_second.round()));
    }
    page.push_str("</table></div>");
}

fn models_table(page: &mut String, report: &Report) {
    page.push_str(
        "<div class=\"card\"><table><tr><th>model</th><th>backbone</th><th class=\"n\">image parameters</th><th \
         class=\"n\">FLOPs/image</th><th class=\"n\">steps × batch</th><th class=\"n\">images/s</th><th \
         class=\"n\">time</th></tr>",
    );
    for model in &report.models {
        let backbone = model.backbone.as_deref().unwrap_or("–");
        let size = model.image_size.map_or_else(String::new, |s| format!(" @{s}"));
        let _ = write!(
            page,
            "<tr><td>{}</td><td>{}{size}</td><td class=\"n\">{}</td><td class=\"n\">{}</td>",
            escape(&label(&model.name, model.role, report.distils())),
            escape(backbone),
            short_number(model.image_parameters as f64),
            short_number(model.flops_per_image as f64)
        );
        match &model.training {
            Some(t) => {
                let _ = write!(
                    page,
                    "<td class=\"n\">{} × {}</td><td class=\"n\">{}</td><td class=\"n\">{:.0} s</td></tr>",
                    t.steps,
                    t.batch_size,
                    short_number(t.images_per_second.round()),
                    t.seconds
                );
            }
            None => page.push_str("<td class=\"n\">loaded</td><td class=\"n\">–</td><td class=\"n\">–</td></tr>"),
        }
    }
    page.push_str("</table></div>");
}

fn samples(page: &mut String, predictions: &Predictions) {
    if predictions.gallery.is_empty() {
        return;
    }
    page.push_str(
        "<h2>Samples</h2><p class=\"muted\">Evaluation samples with the student's likeliest classes.</p><div \
         class=\"gallery\">",
    );
    let class = |index: usize| escape(predictions.classes.get(index).map_or("?", String::as_str));
    for GalleryItem { key, picture, class: truth, top } in &predictions.gallery {
        let right = top.first().is_some_and(|(guess, _)| guess == truth);
        let (style, mark) = if right { ("right", "✓") } else { ("wrong", "✗") };
        let _ = write!(
            page,
            "<div class=\"shot {style}\"><img src=\"{}\" alt=\"sample {}\"><p><span class=\"mark\">{mark}</span> \
             {}</p><div class=\"guess\">",
            escape(picture),
            escape(key),
            class(*truth)
        );
        for (guess, p) in top {
            let style = if guess == truth { " class=\"t\"" } else { "" };
            let _ = write!(page, "<span{style}>{}</span><span{style}>{:.0} %</span>", class(*guess), 100.0 * p);
        }
        page.push_str("</div></div>");
    }
    page.push_str("</div>");
}

fn settings(page: &mut String, report: &Report) {
    page.push_str("<h2>Settings</h2><div class=\"card settings\">");
    for (group, lines) in &report.settings {
        let _ = write!(page, "<details><summary>{}</summary><table>", escape(group));
        for (key, value) in lines {
            let _ =
                write!(page, "<tr><td><code>{}</code></td><td><code>{}</code></td></tr>", escape(key), escape(value));
        }
        page.push_str("</table></details>");
    }
    page.push_str("</div>");
}
