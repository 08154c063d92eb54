//! Where an executor's time goes, by kind of op.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::Executor;
use crate::backend::Backend;
use crate::fuse::FusedConv;
use crate::graph::Node;
use crate::op::Op;

/// Time spent in one kind of op.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OpTime {
    /// Op name.
    pub op: &'static str,
    /// What tells it apart from others of its name (kernel size and stride), or nothing.
    pub detail: String,
    /// Time in forwards.
    pub forward: Duration,
    /// Time in VJPs.
    pub backward: Duration,
    /// Floating-point operations of the forwards that were timed.
    pub flops: u64,
}

impl<B: Backend> Executor<B> {
    /// Starts to count the time spent in each kind of op, from zero.
    pub fn start_profile(&mut self) {
        self.profile = Some(HashMap::new());
    }

    /// The times counted since [`start_profile`](Self::start_profile), longest first; ends the counting.
    pub fn take_profile(&mut self) -> Vec<OpTime> {
        let mut times: Vec<OpTime> = self.profile.take().unwrap_or_default().into_values().collect();
        times.sort_by_key(|t| std::cmp::Reverse(t.forward + t.backward));
        times
    }

    pub(super) fn count(&mut self, node: &Node, op: &Op, since: Instant, backward: bool) {
        let Some(profile) = &mut self.profile else { return };
        self.backend.settle();
        let detail = match op {
            Op::Conv2d(d) | Op::FusedConv(FusedConv { conv: d, .. }) => {
                format!("{}x{} stride {}", d.kh, d.kw, d.stride)
            }
            _ => String::new(),
        };
        let time = profile.entry((op.name(), detail)).or_insert_with_key(|(op, detail)| OpTime {
            op,
            detail: detail.clone(),
            ..OpTime::default()
        });
        if backward {
            time.backward += since.elapsed();
        } else {
            time.forward += since.elapsed();
            time.flops += op.flops(node.numel());
        }
    }
}
