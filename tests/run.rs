//! Whole runs of a tiny pipeline: results, the store, what a change runs again, stopping and going on.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

mod common;
use common::Bench;

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).expect("a file")).expect("JSON")
}

fn results(bench: &Bench, args: &[&str]) -> Value {
    let args: Vec<&str> = ["run", "tiny.toml", "--format", "json", "-q"].iter().chain(args).copied().collect();
    let (code, out, err) = bench.output(&args);
    assert_eq!(code, 0, "{err}");
    serde_json::from_str(&out).expect("JSON")
}

#[test]
fn a_run_leaves_everything_and_the_next_takes_it_from_the_store() {
    let bench = Bench::new();
    let (code, out, err) = bench.output(&["run", "tiny.toml", "--out", "one"]);
    assert_eq!(code, 0, "{err}");
    for word in ["student, distilled", "student, not distilled", "teacher clip", "top-1", "of 2.1 %"] {
        assert!(out.contains(word), "`{word}` is not in\n{out}");
    }
    assert!(err.contains("train_student student: 3/3  loss "), "{err}");
    let one = bench.path().join("one");
    for file in [
        "spec.toml",
        "lock.json",
        "metrics.jsonl",
        "eval.jsonl",
        "report.html",
        "graph.svg",
        "graph.dot",
        "export/timm.safetensors",
        "export/open_clip/open_clip_model.safetensors",
        "export/open_clip/open_clip_config.json",
        "checkpoints/student/weights.safetensors",
        "checkpoints/student/step-000003/model.safetensors",
    ] {
        assert!(one.join(file).is_file(), "{file}");
    }
    let lock = json(&one.join("lock.json"));
    assert_eq!(lock["status"], "done");
    assert_eq!(lock["seed"], 0);
    assert!(lock["version"].as_str().is_some_and(|v| v.contains('+')));
    let report = fs::read_to_string(one.join("report.html")).expect("the report");
    assert!(report.contains("data:image/png;base64,") && report.contains("Confusion"));
    let outside = ["http://", "https://", "src=\"/", "url(h"]
        .iter()
        .filter(|t| report.replace("http://www.w3.org/2000/svg", "").contains(**t));
    assert_eq!(outside.count(), 0, "the report needs nothing from outside");
    let metrics = fs::read_to_string(one.join("metrics.jsonl")).expect("metrics");
    assert_eq!(metrics.lines().count(), 2 + 3 + 3);
    assert_eq!(fs::read_to_string(one.join("eval.jsonl")).expect("evaluations").lines().count(), 3);

    // The resolved pipeline is a pipeline.
    let (code, _, err) = bench.output(&["check", "one/spec.toml"]);
    assert_eq!(code, 0, "{err}");

    let again = results(&bench, &["--out", "two"]);
    assert_eq!(again["results"]["ran"], 0, "{again}");
    assert_eq!(
        fs::read(one.join("report.html")).expect("the report"),
        fs::read(bench.path().join("two/report.html")).expect("the report")
    );

    // Another template changes what is evaluated and reported, not what is trained.
    let other = results(&bench, &["--set", "eval[0].templates=[\"a {c}\"]"]);
    assert_eq!(other["results"]["ran"], 4, "three evaluations and the report: {other}");
    assert_eq!(other["directory"], "runs/tiny-1");

    // The weight of a term changes the distilled student alone: its evaluation, export and report follow.
    let weight = results(&bench, &["--set", "distill[0].weight=2.0"]);
    assert_eq!(weight["results"]["ran"], 4, "{weight}");

    // The name is a matter of the report.
    let renamed = results(&bench, &["--set", "name=other"]);
    assert_eq!(renamed["results"]["ran"], 1, "{renamed}");

    // Without distillation the student is what the baseline was; its result serves under the other name.
    let plain = results(&bench, &["--set", "distill=[]"]);
    assert_eq!(plain["results"]["ran"], 3, "evaluation, export and report: {plain}");
    assert_eq!(plain["results"]["rows"][0]["model"]["name"], "student");
    assert_eq!(plain["results"]["rows"][0]["scores"][0]["model"], "student");

    let fresh = results(&bench, &["--fresh", "--out", "fresh"]);
    assert_eq!(fresh["results"]["from_store"], 0, "{fresh}");
    assert_eq!(
        fs::read(one.join("checkpoints/student/weights.safetensors")).expect("weights"),
        fs::read(bench.path().join("fresh/checkpoints/student/weights.safetensors")).expect("weights"),
        "the same bits from a fresh run"
    );
}

/// A started `mcpipe run`.
#[cfg(unix)]
fn start(bench: &Bench, out: &str) -> Child {
    Command::new(snapbox::cmd::cargo_bin!("mcpipe"))
        .current_dir(bench.path())
        .args(["run", "tiny.toml", "--set", "training.steps=30", "--out", out])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("mcpipe starts")
}

/// Waits until a line of the student's metrics is there.
#[cfg(unix)]
fn wait_for_steps(path: &Path, child: &mut Child) {
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(120) {
        let lines = fs::read_to_string(path).unwrap_or_default();
        if lines.lines().filter(|line| line.contains("\"train_student student\"")).count() >= 3 {
            return;
        }
        assert!(child.try_wait().expect("a child").is_none(), "the run ended before it could be stopped");
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("no step within two minutes");
}

#[cfg(unix)]
#[test]
fn a_stopped_run_goes_on_to_the_same_bits() {
    let bench = Bench::new();
    let mut child = start(&bench, "stopped");
    wait_for_steps(&bench.path().join("stopped/metrics.jsonl"), &mut child);
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill");
    assert!(sent.success());
    let output = child.wait_with_output().expect("its end");
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{err}");
    assert!(err.contains("interrupted; the same command goes on"), "{err}");
    assert_eq!(json(&bench.path().join("stopped/lock.json"))["status"], "interrupted");

    let steps = ["--set", "training.steps=30"];
    let resumed = bench.output(&["run", "tiny.toml", steps[0], steps[1], "--out", "stopped"]);
    assert_eq!(resumed.0, 0, "{}", resumed.2);
    assert!(resumed.2.contains("train_student student: started, going on at step"), "{}", resumed.2);
    let whole = bench.output(&["run", "tiny.toml", steps[0], steps[1], "--out", "whole", "--store", "other", "-q"]);
    assert_eq!(whole.0, 0, "{}", whole.2);

    let read = |run: &str, file: &str| fs::read(bench.path().join(run).join(file)).expect("a file");
    for file in ["checkpoints/student/weights.safetensors", "export/timm.safetensors"] {
        assert!(read("stopped", file) == read("whole", file), "{file} differs after resuming");
    }
    // Every step is in the metrics once, with the same loss.
    let losses = |run: &str| -> Vec<(Value, Value)> {
        let text = String::from_utf8(read(run, "metrics.jsonl")).expect("UTF-8");
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        lines
            .filter(|l| l["stage"] == "train_student student")
            .map(|l| (l["step"].clone(), l["loss"].clone()))
            .collect()
    };
    assert_eq!(losses("stopped").len(), 30);
    assert_eq!(losses("stopped"), losses("whole"));
}
