//! Runs the stages of a plan: those whose result the store lacks, each after what it needs, side by side where the
//! DAG and the machine allow.

use std::collections::HashMap;
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use serde_json::Value;

use crate::error::RunError;
use crate::plan::{Context, Load, Plan, Planned, StageId};
use crate::progress::{Event, FAILED, Interrupt, Observer};
use crate::settings::Settings;
use crate::store::{Store, Stored};

/// Light stages that run at the same time.
const LIGHT_JOBS: usize = 2;

/// Whether a stage has to run.
#[derive(Clone, Debug)]
pub enum Status {
    /// Its result is in the store.
    Cached(Box<Stored>),
    /// It has to run.
    ToRun,
    /// Nobody asks for its result: all that would take it is in the store.
    NotNeeded,
}

/// How a stage ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Which stage.
    pub id: StageId,
    /// Its result; none where nobody asked for it.
    pub stored: Option<Stored>,
    /// Whether the result was in the store already.
    pub cached: bool,
}

/// Which stages have to run, in the plan's order.
pub fn statuses(plan: &Plan, settings: &Settings) -> Vec<Status> {
    let store = Store::new(&settings.store);
    let planned: Vec<&Planned> = plan.stages().collect();
    let mut wanted: Vec<bool> = planned.iter().map(|p| p.stage.is_goal()).collect();
    let mut statuses = vec![Status::NotNeeded; planned.len()];
    for index in (0..planned.len()).rev() {
        if !wanted[index] {
            continue;
        }
        let stage = planned[index];
        let found = if settings.fresh { None } else { store.get(stage.id.kind, &stage.hash) };
        statuses[index] = match found {
            Some(stored) => Status::Cached(Box::new(stored)),
            None => {
                plan.needs(index).into_iter().for_each(|need| wanted[need] = true);
                Status::ToRun
            }
        };
    }
    statuses
}

/// Runs what has to run. After a failure or an interrupt no further stage starts; those that run are asked to stop at
/// their next safe point and waited for.
///
/// # Errors
/// The first stage's that failed, or [`RunError::Interrupted`].
pub fn execute(
    plan: &Plan,
    settings: &Settings,
    observer: &dyn Observer,
    metrics: &(dyn Fn(&StageId, &Value) + Sync),
    interrupt: &Interrupt,
) -> Result<Vec<Outcome>, RunError> {
    let planned: Vec<&Planned> = plan.stages().collect();
    let names: Vec<String> = planned.iter().map(|p| p.id.to_string()).collect();
    let mut results: Vec<Option<Stored>> = vec![None; planned.len()];
    let mut cached = vec![false; planned.len()];
    let mut waiting: Vec<usize> = Vec::new();
    for (index, status) in statuses(plan, settings).into_iter().enumerate() {
        match status {
            Status::Cached(stored) => {
                let event = Event::Finished {
                    cached: true,
                    seconds: stored.done.seconds,
                    summary: stored.done.summary.clone(),
                };
                observer.event(index, &names[index], &event);
                results[index] = Some(*stored);
                cached[index] = true;
            }
            Status::ToRun => waiting.push(index),
            Status::NotNeeded => {}
        }
    }
    let mut failure: Option<RunError> = None;
    let (sender, receiver) = mpsc::channel();
    thread::scope(|scope| {
        let mut running: Vec<usize> = Vec::new();
        loop {
            let mut at = 0;
            while failure.is_none() && interrupt.signal().is_none() && at < waiting.len() {
                let index = waiting[at];
                let load = planned[index].stage.load();
                let slots = if load == Load::Heavy { settings.jobs.max(1) } else { LIGHT_JOBS };
                let busy = running.iter().filter(|&&r| planned[r].stage.load() == load).count();
                let ready = plan.needs(index).iter().all(|&need| results[need].is_some());
                if !ready || busy >= slots {
                    at += 1;
                    continue;
                }
                waiting.remove(at);
                running.push(index);
                let inputs: HashMap<StageId, Stored> = plan
                    .needs(index)
                    .into_iter()
                    .filter_map(|need| Some((planned[need].id.clone(), results[need].clone()?)))
                    .collect();
                let (sender, stage, name) = (sender.clone(), planned[index], names[index].as_str());
                scope.spawn(move || {
                    // A panic must not leave the others waiting for a message that never comes.
                    let run = || one(stage, index, name, &inputs, settings, observer, metrics, interrupt);
                    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run))
                        .unwrap_or_else(|_| Err(RunError::Plan("it panicked; this is a bug in mcpipe".into())));
                    // The receiver lives until all stages have ended.
                    let _ = sender.send((index, result));
                });
            }
            if running.is_empty() {
                break;
            }
            let Ok((index, result)) = receiver.recv() else { break };
            running.retain(|&r| r != index);
            match result {
                Ok((stored, was_cached)) => {
                    results[index] = Some(stored);
                    cached[index] = was_cached;
                }
                Err(error) => {
                    let stopped = matches!(error, RunError::Interrupted { signal: FAILED });
                    if failure.is_none() && !stopped {
                        interrupt.raise(FAILED);
                        failure = Some(error.in_stage(&names[index]));
                    }
                }
            }
        }
    });
    if let Some(error) = failure {
        return Err(error);
    }
    if waiting.iter().any(|&index| planned[index].stage.is_goal()) || results_missing(&planned, &results) {
        interrupt.check()?;
    }
    let outcome = |((stage, stored), cached): ((&&Planned, Option<Stored>), bool)| Outcome {
        id: stage.id.clone(),
        stored,
        cached,
    };
    Ok(planned.iter().zip(results).zip(cached).map(outcome).collect())
}

fn results_missing(planned: &[&Planned], results: &[Option<Stored>]) -> bool {
    planned.iter().zip(results).any(|(stage, result)| stage.stage.is_goal() && result.is_none())
}

fn one(
    planned: &Planned,
    index: usize,
    name: &str,
    inputs: &HashMap<StageId, Stored>,
    settings: &Settings,
    observer: &dyn Observer,
    metrics: &(dyn Fn(&StageId, &Value) + Sync),
    interrupt: &Interrupt,
) -> Result<(Stored, bool), RunError> {
    let store = Store::new(&settings.store);
    let stage = &planned.stage;
    let keep = stage.resumes() && !settings.fresh;
    let work = store.work(planned.id.kind, &planned.hash, keep, interrupt)?;
    // Another process, or an equal stage of this plan, may have finished it meanwhile.
    if !settings.fresh
        && let Some(stored) = store.get(planned.id.kind, &planned.hash)
    {
        let event =
            Event::Finished { cached: true, seconds: stored.done.seconds, summary: stored.done.summary.clone() };
        observer.event(index, name, &event);
        work.discard();
        return Ok((stored, true));
    }
    let tell = |event: Event| observer.event(index, name, &event);
    let record = |line: &Value| metrics(&planned.id, line);
    let started = Instant::now();
    let context =
        Context { dir: &work.dir, hash: planned.hash, inputs, settings, tell: &tell, metrics: &record, interrupt };
    // Inside the pool a kernel's fork hands no work to a sleeping thread and back. Two heavy stages at once stay outside:
    // one that waits for its kernels could pick up the other as a whole.
    let summary = if stage.load() == Load::Heavy && settings.jobs <= 1 {
        rayon::scope(|_| stage.run(&context))?
    } else {
        stage.run(&context)?
    };
    let seconds = started.elapsed().as_secs_f64();
    let stored = work.finish(seconds, summary.clone())?;
    observer.event(index, name, &Event::Finished { cached: false, seconds, summary });
    Ok((stored, false))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::plan::tests::stages;
    use crate::progress::Silent;

    fn settings(dir: &tempfile::TempDir, fresh: bool) -> Settings {
        Settings { store: dir.path().join("store"), fresh, jobs: 2, ..Settings::default() }
    }

    fn run(
        list: &[(&'static str, &[&'static str], u64)],
        settings: &Settings,
    ) -> Result<Vec<(&'static str, bool, bool)>, RunError> {
        let plan = Plan::link(stages(list), settings).map_err(|e| RunError::Plan(format!("{e:?}")))?;
        let outcomes = execute(&plan, settings, &Silent, &|_, _| {}, &Interrupt::default())?;
        Ok(outcomes.iter().map(|o| (o.id.kind, o.cached, o.stored.is_some())).collect())
    }

    #[test]
    fn a_second_run_takes_all_from_the_store_and_a_change_runs_what_depends_on_it()
    -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let s = settings(&dir, false);
        let list = |b| [("a", &[][..], 1), ("b", &["a"][..], b), ("c", &["a"][..], 1), ("d", &["b", "c"][..], 1)];
        assert_eq!(
            run(&list(1), &s)?,
            [("a", false, true), ("b", false, true), ("c", false, true), ("d", false, true)]
        );
        // `a` is no goal: with all others in the store nobody asks for it.
        assert_eq!(run(&list(1), &s)?, [("a", false, false), ("b", true, true), ("c", true, true), ("d", true, true)]);
        assert_eq!(run(&list(2), &s)?, [("a", true, true), ("b", false, true), ("c", true, true), ("d", false, true)]);
        assert_eq!(run(&list(2), &settings(&dir, true))?.iter().filter(|(_, cached, _)| *cached).count(), 0);
        Ok(())
    }

    #[test]
    fn a_failure_keeps_what_was_done_and_names_the_stage() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let s = settings(&dir, false);
        let failed = run(&[("a", &[], 1), ("b", &["a"], 666), ("c", &["b"], 1)], &s);
        assert_eq!(failed.err().map(|e| e.to_string()).as_deref(), Some("stage b: fails as asked"));
        assert_eq!(run(&[("a", &[], 1), ("b", &["a"], 1), ("c", &["b"], 1)], &s)?[0], ("a", true, true));
        Ok(())
    }

    #[test]
    fn an_interrupt_before_the_first_stage_runs_nothing() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let s = settings(&dir, false);
        let plan = Plan::link(stages(&[("b", &[], 1)]), &s).map_err(|e| format!("{e:?}"))?;
        let interrupt = Interrupt::default();
        interrupt.raise(2);
        let lines = Mutex::new(0);
        let result =
            execute(&plan, &s, &Silent, &|_, _| *lines.lock().unwrap_or_else(|e| e.into_inner()) += 1, &interrupt);
        assert!(matches!(result, Err(RunError::Interrupted { signal: 2 })));
        Ok(())
    }
}
