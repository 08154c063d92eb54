//! Fixed division of work into tasks: the same thread count gives the same tasks, so the same bits.

use rayon::prelude::*;

/// Below this much arithmetic a call stays on its thread: waking another one costs as much.
const SERIAL_FLOPS: u64 = 1_000_000;

/// A pointer that tasks share. Each task derives its own disjoint part from it.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(pub *mut T);
// SAFETY: it only carries the address; whoever dereferences it answers for disjointness.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as for `Send`.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// The address, through a method so that closures capture the wrapper and not the bare pointer.
    #[inline(always)]
    pub fn ptr(&self) -> *mut T {
        self.0
    }
}

/// Tasks to make of a call with this many floating-point operations: 1 for a small one, else enough for the pool's
/// threads to even out.
pub(crate) fn tasks_for(flops: u64) -> usize {
    let threads = rayon::current_num_threads();
    if threads == 1 || flops < SERIAL_FLOPS {
        return 1;
    }
    ((flops / (SERIAL_FLOPS / 2)) as usize).min(threads * 4)
}

/// Runs `body(0..tasks)`, each index once, in parallel where there is more than one.
pub(crate) fn for_each_task(tasks: usize, body: impl Fn(usize) + Sync + Send) {
    if tasks <= 1 || rayon::current_num_threads() == 1 {
        for task in 0..tasks {
            body(task);
        }
    } else {
        (0..tasks).into_par_iter().with_max_len(1).for_each(body);
    }
}

/// The `task`-th of `tasks` nearly equal parts of `0..len`, cut at multiples of `unit`.
pub(crate) fn part(len: usize, unit: usize, tasks: usize, task: usize) -> std::ops::Range<usize> {
    let units = len.div_ceil(unit);
    let cut = |t: usize| (units * t / tasks * unit).min(len);
    cut(task)..cut(task + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_without_overlap() {
        for (len, unit, tasks) in [(0, 4, 3), (1, 8, 4), (100, 8, 3), (97, 16, 8), (64, 1, 64)] {
            let mut at = 0;
            for t in 0..tasks {
                let r = part(len, unit, tasks, t);
                assert_eq!(r.start, at);
                at = r.end;
            }
            assert_eq!(at, len);
        }
    }
}
