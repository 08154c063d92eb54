//! The run directory: what was asked for, with what it ran, what came out.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use mcpipe_spec::Spec;
use serde_json::{Value, json};

use crate::components::components;
use crate::error::RunError;
use crate::hash::code_version;
use crate::pipeline::{Pipeline, Resolved};
use crate::plan::StageId;
use crate::records::{METRICS, SCORES};
use crate::schedule::Outcome;
use crate::settings::Settings;
use crate::store::{link_or_copy, read_json, write_file, write_json};

const LOCK: &str = "lock.json";
/// The pipeline with every default written out and absolute paths.
pub const SPEC: &str = "spec.toml";
const EVAL: &str = "eval.jsonl";

/// A run's directory.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    metrics: Mutex<File>,
    lock: Mutex<Value>,
}

impl RunDir {
    /// Makes the directory: `out`, or the next free `<name>-<n>` in the pipeline's folder for runs, and writes down
    /// what the run starts from. An `out` that exists must be empty or the directory of an earlier run, whose files
    /// are replaced.
    ///
    /// # Errors
    /// The directory can't be written to, or holds something else.
    pub fn create(pipeline: &Pipeline, settings: &Settings, out: Option<&Path>) -> Result<Self, RunError> {
        let spec = pipeline.resolved.spec();
        let path = match out {
            Some(out) => take(out)?,
            None => next(spec.run.dir.as_deref().unwrap_or(Path::new("runs")), &spec.name)?,
        };
        let resolved = anywhere(&resolved_toml(&pipeline.resolved)?)?;
        write_file(&path.join(SPEC), resolved.as_bytes())?;
        let metrics_path = path.join(METRICS);
        let metrics = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .open(&metrics_path)
            .map_err(|e| RunError::write(&metrics_path, e))?;
        let lock = lock(pipeline, settings, &resolved)?;
        write_json(&path.join(LOCK), &lock)?;
        Ok(Self { path, metrics: Mutex::new(metrics), lock: Mutex::new(lock) })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends a line of metrics of a running stage, for whoever watches the run. The whole file is written at the
    /// end, so that a failure here is left for then.
    pub fn metric(&self, stage: &StageId, line: &Value) {
        let mut file = self.metrics.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = writeln!(file, "{}", with_stage(stage, line.clone()));
    }

    /// Records how the run ended where it did not end well.
    pub fn close(&self, status: &str) {
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        lock["status"] = json!(status);
        lock["ended"] = json!(now());
        // The run's own error is the one to report.
        let _ = write_json(&self.path.join(LOCK), &*lock);
    }

    /// Brings the results together: metrics and evaluations of all stages, checkpoints, exports, report.
    ///
    /// # Errors
    /// The directory can't be written to.
    pub fn finish(&self, outcomes: &[Outcome]) -> Result<(), RunError> {
        let mut metrics = String::new();
        let mut scores = String::new();
        for outcome in outcomes {
            let Some(stored) = &outcome.stored else { continue };
            let own = stored.dir.join(METRICS);
            if own.is_file() {
                let text = fs::read_to_string(&own).map_err(|e| RunError::read(&own, e))?;
                for line in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
                    metrics.push_str(&format!("{}\n", with_stage(&outcome.id, line)));
                }
            }
            if stored.dir.join(SCORES).is_file() {
                let line: Value = read_json(&stored.dir.join(SCORES))?;
                scores.push_str(&format!("{line}\n"));
            }
            for file in &stored.done.files {
                if let Some(target) = published(&outcome.id, &file.path) {
                    link_or_copy(&stored.dir.join(&file.path), &self.path.join(target))?;
                }
            }
        }
        write_file(&self.path.join(METRICS), metrics.as_bytes())?;
        write_file(&self.path.join(EVAL), scores.as_bytes())?;
        let stages: Vec<Value> = outcomes
            .iter()
            .map(|o| {
                let done = o.stored.as_ref().map(|s| &s.done);
                json!({
                    "stage": o.id.to_string(),
                    "hash": done.map(|d| &d.hash),
                    "from_store": o.cached,
                    "seconds": done.map(|d| d.seconds),
                })
            })
            .collect();
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        lock["stages"] = json!(stages);
        lock["status"] = json!("done");
        lock["ended"] = json!(now());
        write_json(&self.path.join(LOCK), &*lock)
    }
}

/// Where a file of a stage's result stands in the run directory; nothing for a file that has no place there.
fn published(stage: &StageId, file: &str) -> Option<PathBuf> {
    let subject = stage.subject.replace(' ', "-");
    let target = match stage.kind {
        "train_student" | "train_teacher" => match file.strip_prefix("checkpoints/") {
            Some(rest) => format!("checkpoints/{subject}/{rest}"),
            None if file.ends_with(".safetensors") => format!("checkpoints/{subject}/{file}"),
            None => return None,
        },
        "export" => format!("export/{file}"),
        "report" => file.to_owned(),
        _ => return None,
    };
    Some(PathBuf::from(target))
}

fn with_stage(stage: &StageId, line: Value) -> Value {
    let mut object = serde_json::Map::new();
    object.insert("stage".into(), json!(stage.to_string()));
    if let Value::Object(fields) = line {
        object.extend(fields);
    }
    Value::Object(object)
}

/// A directory that the user names.
fn take(out: &Path) -> Result<PathBuf, RunError> {
    fs::create_dir_all(out).map_err(|e| RunError::write(out, e))?;
    let mut entries = fs::read_dir(out).map_err(|e| RunError::read(out, e))?;
    if entries.next().is_some() && !out.join(LOCK).is_file() {
        return Err(RunError::Usage(format!(
            "{} holds files of something else; give an empty or a new folder, or one of an earlier run",
            out.display()
        )));
    }
    for name in [EVAL, "report.html", "graph.svg", "graph.dot"] {
        remove(&out.join(name))?;
    }
    for name in ["checkpoints", "export"] {
        let dir = out.join(name);
        match fs::remove_dir_all(&dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(RunError::write(&dir, e)),
            _ => {}
        }
    }
    Ok(out.to_owned())
}

fn remove(path: &Path) -> Result<(), RunError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(RunError::write(path, e)),
        _ => Ok(()),
    }
}

/// The next free `<name>-<n>`.
fn next(parent: &Path, name: &str) -> Result<PathBuf, RunError> {
    fs::create_dir_all(parent).map_err(|e| RunError::write(parent, e))?;
    let taken = fs::read_dir(parent).map_err(|e| RunError::read(parent, e))?.flatten().filter_map(|entry| {
        let file = entry.file_name().into_string().ok()?;
        file.strip_prefix(name)?.strip_prefix('-')?.parse::<u64>().ok()
    });
    let mut n = taken.max().unwrap_or(0) + 1;
    loop {
        let path = parent.join(format!("{name}-{n}"));
        match fs::create_dir(&path) {
            Ok(()) => return Ok(path),
            // Another run took the number between the listing and now.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => n += 1,
            Err(e) => return Err(RunError::write(&path, e)),
        }
    }
}

/// The pipeline with every default written out.
///
/// # Errors
/// A path that is no UTF-8.
pub fn resolved_toml(resolved: &Resolved) -> Result<String, RunError> {
    spec_toml(resolved.spec())
}

/// The resolved pipeline with absolute paths, so that the file means the same wherever it lies and is read from.
fn anywhere(resolved: &str) -> Result<String, RunError> {
    let here = std::env::current_dir().map_err(|e| RunError::read(Path::new("."), e))?;
    let document = mcpipe_spec::load_text(&here.join(SPEC), resolved, &[], &components()).map_err(RunError::Spec)?;
    spec_toml(&document.spec)
}

fn spec_toml(spec: &Spec) -> Result<String, RunError> {
    spec.to_toml().map_err(|e| RunError::Usage(format!("the resolved pipeline can't be written as TOML: {e}")))
}

fn lock(pipeline: &Pipeline, settings: &Settings, resolved: &str) -> Result<Value, RunError> {
    let spec = pipeline.resolved.spec();
    let data = pipeline.resolved.train.identity()?;
    let evals: Vec<Value> =
        pipeline.resolved.evals.iter().map(|(_, data)| data.identity()).collect::<Result<_, _>>()?;
    let digest = |value: &Value| blake3::hash(value.to_string().as_bytes()).to_hex().to_string();
    let make = pipeline.plan.stages().find(|p| p.id.kind == "make_data").map(|p| p.hash.hex());
    let stages: Vec<Value> =
        pipeline.plan.stages().map(|p| json!({ "stage": p.id.to_string(), "hash": p.hash.hex() })).collect();
    Ok(json!({
        "status": "running",
        "started": now(),
        "ended": null,
        "version": code_version(),
        "spec": blake3::hash(resolved.as_bytes()).to_hex().to_string(),
        "data": {
            "made": make,
            "train": if data.is_null() { Value::Null } else { json!(digest(&data)) },
            "eval": evals.iter().map(digest).collect::<Vec<_>>(),
        },
        "seed": spec.seed,
        "student_seed": pipeline.resolved.student_seed(),
        "threads": settings.threads,
        "kernels": settings.kernels_id(),
        "device": settings.device.to_string(),
        "machine": machine(),
        "stages": stages,
    }))
}

fn machine() -> Value {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu =
        cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':')).map(|(_, name)| name.trim());
    json!({
        "os": std::env::consts::OS,
        "arch": std::env::consts::ARCH,
        "cpu": cpu,
        "cores": crate::settings::all_threads(),
    })
}

/// The time as RFC 3339 in UTC, to the second.
fn now() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    rfc3339(seconds)
}

/// Civil date of a day number (Hinnant, "chrono-compatible low-level date algorithms").
fn rfc3339(seconds: u64) -> String {
    let (days, rest) = ((seconds / 86_400) as i64 + 719_468, seconds % 86_400);
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest % 3600 / 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_civil() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(rfc3339(1_790_000_000), "2026-09-21T14:13:20Z");
    }

    #[test]
    fn numbers_of_runs_go_up_and_a_foreign_folder_is_refused() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        assert!(next(dir.path(), "a")?.ends_with("a-1"));
        assert!(next(dir.path(), "a")?.ends_with("a-2"));
        assert!(next(dir.path(), "a-b")?.ends_with("a-b-1"));
        fs::write(dir.path().join("x"), "")?;
        assert!(matches!(take(dir.path()), Err(RunError::Usage(_))));
        Ok(())
    }
}
