//! Threads that compute numbered items in any order and hand them out in order, a bounded number ahead.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::error::{DataError, Result};

/// What a worker asks between two samples: whether nobody waits for the result any more.
#[derive(Debug, Clone)]
pub(crate) struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// The job of one thread: makes item `number`.
pub(crate) type Job<T> = Box<dyn FnMut(u64, &StopFlag) -> Result<T> + Send>;

/// Items `start..end`, made by threads.
///
/// At most `ahead` items are made or waiting at a time. Dropping it stops the threads and waits for them.
pub(crate) struct Ordered<T> {
    tickets: Option<Sender<u64>>,
    results: Receiver<(u64, Result<T>)>,
    waiting: BTreeMap<u64, Result<T>>,
    threads: Vec<JoinHandle<()>>,
    stop: StopFlag,
    issued: u64,
    next: u64,
    end: u64,
    ahead: u64,
}

impl<T: Send + 'static> Ordered<T> {
    /// Starts one thread per job.
    pub(crate) fn start(jobs: Vec<Job<T>>, ahead: usize, start: u64, end: u64) -> Result<Self> {
        // Unbounded channels never block a worker; the number of tickets bounds what they hold.
        let (tickets, ticket_source) = unbounded::<u64>();
        let (result_sink, results) = unbounded();
        let stop = StopFlag(Arc::new(AtomicBool::new(false)));
        let ahead = (ahead.max(jobs.len()).max(1)) as u64;
        let mut ordered = Self {
            tickets: Some(tickets),
            results,
            waiting: BTreeMap::new(),
            threads: Vec::with_capacity(jobs.len()),
            stop: stop.clone(),
            issued: start,
            next: start,
            end,
            ahead,
        };
        for (i, mut job) in jobs.into_iter().enumerate() {
            let (source, sink, stop) = (ticket_source.clone(), result_sink.clone(), stop.clone());
            let thread = std::thread::Builder::new()
                .name(format!("mcpipe-data-{i}"))
                .spawn(move || {
                    for number in source {
                        if stop.is_set() {
                            return;
                        }
                        let result = catch_unwind(AssertUnwindSafe(|| job(number, &stop)))
                            .unwrap_or_else(|panic| Err(DataError::Worker(message(&*panic))));
                        if sink.send((number, result)).is_err() {
                            return;
                        }
                    }
                })
                .map_err(|e| DataError::Worker(format!("cannot start: {e}")))?;
            ordered.threads.push(thread);
        }
        ordered.issue();
        Ok(ordered)
    }

    fn issue(&mut self) {
        let Some(tickets) = &self.tickets else { return };
        while self.issued < self.end && self.issued - self.next < self.ahead {
            if tickets.send(self.issued).is_err() {
                return;
            }
            self.issued += 1;
        }
    }

    /// Number of the item that [`Self::next`] gives.
    pub(crate) fn position(&self) -> u64 {
        self.next
    }

    /// The next item; `None` after the last one and after an error.
    pub(crate) fn next(&mut self) -> Option<Result<T>> {
        if self.next >= self.end || self.tickets.is_none() {
            return None;
        }
        let result = loop {
            if let Some(result) = self.waiting.remove(&self.next) {
                break result;
            }
            match self.results.recv() {
                Ok((number, result)) => {
                    self.waiting.insert(number, result);
                }
                Err(_) => break Err(DataError::Worker("all threads ended early".into())),
            }
        };
        match &result {
            Ok(_) => {
                self.next += 1;
                self.issue();
            }
            Err(_) => self.shut_down(),
        }
        Some(result)
    }

    /// Stops the threads and waits for them; they look at the flag between samples.
    fn shut_down(&mut self) {
        self.stop.0.store(true, Ordering::Relaxed);
        self.tickets = None;
        for thread in self.threads.drain(..) {
            // A worker catches panics of its job; there is nothing left to report.
            let _ = thread.join();
        }
    }
}

impl<T> Drop for Ordered<T> {
    fn drop(&mut self) {
        self.stop.0.store(true, Ordering::Relaxed);
        self.tickets = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text =
        panic.downcast_ref::<&str>().map(|s| (*s).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
    format!("panicked: {}", text.unwrap_or_else(|| "no message".into()))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    use super::*;

    fn jobs<T>(n: usize, f: impl Fn(u64) -> Result<T> + Send + Clone + 'static) -> Vec<Job<T>> {
        (0..n)
            .map(|_| {
                let f = f.clone();
                Box::new(move |i: u64, _: &StopFlag| f(i)) as Job<T>
            })
            .collect()
    }

    #[test]
    fn items_come_in_order() {
        for threads in [1, 3] {
            let work = |i: u64| {
                std::thread::sleep(Duration::from_micros((i * 7919) % 500));
                Ok(i)
            };
            let mut items = Ordered::start(jobs(threads, work), 4, 5, 60).unwrap();
            for i in 5..60 {
                assert_eq!(items.position(), i);
                assert_eq!(items.next().unwrap().unwrap(), i);
            }
            assert!(items.next().is_none());
        }
    }

    #[test]
    fn no_more_than_asked_is_made_ahead() {
        let made = Arc::new(AtomicUsize::new(0));
        let count = made.clone();
        let mut items = Ordered::start(
            jobs(2, move |i| {
                count.fetch_add(1, Ordering::SeqCst);
                Ok(i)
            }),
            3,
            0,
            u64::MAX,
        )
        .unwrap();
        items.next().unwrap().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(made.load(Ordering::SeqCst), 4);
    }

    #[test]
    fn errors_and_panics_end_the_stream() {
        let fail = |i: u64| if i == 3 { Err(DataError::Option("three".into())) } else { Ok(i) };
        let mut items = Ordered::start(jobs(2, fail), 4, 0, 100).unwrap();
        for _ in 0..3 {
            items.next().unwrap().unwrap();
        }
        assert!(matches!(items.next(), Some(Err(DataError::Option(_)))));
        assert!(items.next().is_none());

        let panics = |i: u64| -> Result<u64> { if i == 1 { panic!("one") } else { Ok(i) } };
        let mut items = Ordered::start(jobs(1, panics), 4, 0, 100).unwrap();
        items.next().unwrap().unwrap();
        match items.next() {
            Some(Err(DataError::Worker(text))) => assert_eq!(text, "panicked: one"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn drop_does_not_wait_for_unread_items() {
        let slow = |i: u64| {
            std::thread::sleep(Duration::from_millis(5));
            Ok(i)
        };
        let start = std::time::Instant::now();
        drop(Ordered::start(jobs(2, slow), 1000, 0, u64::MAX).unwrap());
        assert!(start.elapsed() < Duration::from_secs(1));
    }
}
