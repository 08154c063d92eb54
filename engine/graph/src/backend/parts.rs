//! Ops that are several in one ([`Op::parts`]), on the CPU: part by part, by the kernels of the parts.

use super::cpu::Cpu;
use super::{Arg, Backend, BackendError, Dtype, Forward, GradOut, Vjp};
use crate::fuse::{Operand, Part};
use crate::graph::{Node, Source, ValueId};
use crate::op::{Op, Runner};

/// A part that ran.
pub(super) struct Ran {
    node: Node,
    op: Op,
    inputs: Vec<Operand>,
    pub(super) value: Vec<f32>,
    saved: Vec<Vec<f32>>,
}

fn args<'a>(inputs: &[Operand], ins: &'a [Arg<'a, Cpu>], ran: &'a [Ran]) -> Vec<Arg<'a, Cpu>> {
    let arg = |from: &Operand| -> Arg<'a, Cpu> {
        match *from {
            Operand::Input(i) => match &ins[i] {
                Arg::Values { buffer, len, dtype } => Arg::Values { buffer: *buffer, len: *len, dtype: *dtype },
                Arg::Ids(ids) => Arg::Ids(*ids),
            },
            Operand::Part(i) => Arg::Values { buffer: &ran[i].value, len: ran[i].value.len(), dtype: Dtype::F32 },
        }
    };
    inputs.iter().map(arg).collect()
}

impl Cpu {
    /// Runs every part forward.
    pub(super) fn run_parts(&mut self, node: &Node, op: &Op, ins: &[Arg<'_, Cpu>]) -> Result<Vec<Ran>, BackendError> {
        let mut ran: Vec<Ran> = Vec::new();
        for Part { op, inputs, numel } in op.parts() {
            let node = Node {
                source: Source::Op(op.clone()),
                inputs: Vec::new(),
                shape: vec![numel],
                requires_grad: node.requires_grad,
                label: node.label.clone(),
                runner: Runner::Kernel,
            };
            let (mut value, mut saved) = (vec![0.0; numel], Vec::new());
            saved.extend(op.saved().iter().map(|&len| vec![0.0; len]));
            let args = args(&inputs, ins, &ran);
            let io = Forward { ins: &args, out: &mut value, dtype: Dtype::F32, saved: &mut saved, keep: true };
            // Own kernels keep nothing by a node's id.
            self.forward(ValueId::default(), &node, io)?;
            drop(args);
            ran.push(Ran { node, op, inputs, value, saved });
        }
        Ok(ran)
    }

    /// Runs every part again and goes back through them.
    pub(super) fn parts_vjp(&mut self, node: &Node, op: &Op, io: Vjp<'_, Cpu>) -> Result<(), BackendError> {
        let ran = self.run_parts(node, op, io.ins)?;
        // Each part's value is read once, so that its gradient is written once.
        let mut inner: Vec<Vec<f32>> = ran.iter().map(|r| vec![0.0; r.value.len()]).collect();
        if let Some(last) = inner.last_mut() {
            last.copy_from_slice(&io.dout[..node.numel()]);
        }
        for (i, part) in ran.iter().enumerate().rev() {
            let (before, own) = inner.split_at_mut(i);
            let mut buffers: Vec<Option<Vec<f32>>> = Vec::new();
            for (a, from) in part.inputs.iter().enumerate() {
                buffers.push(match *from {
                    Operand::Part(j) if part.op.differentiable(a) => Some(std::mem::take(&mut before[j])),
                    Operand::Input(j) if part.op.differentiable(a) => {
                        io.grads[j].as_mut().map(|g| std::mem::take(g.buffer))
                    }
                    _ => None,
                });
            }
            {
                let mut outs: Vec<Option<GradOut<'_, Cpu>>> = Vec::new();
                for (buffer, from) in buffers.iter_mut().zip(&part.inputs) {
                    let (len, accumulate) = match *from {
                        Operand::Part(j) => (ran[j].value.len(), false),
                        Operand::Input(j) => io.grads[j].as_ref().map_or((0, false), |g| (g.len, g.accumulate)),
                    };
                    outs.push(buffer.as_mut().map(|buffer| GradOut { buffer, len, dtype: Dtype::F32, accumulate }));
                }
                let args = args(&part.inputs, io.ins, &ran);
                let (out, saved, dout) = (Some(&part.value), &part.saved[..], &own[0]);
                let part_io = Vjp { ins: &args, out, saved, dout, dtype: Dtype::F32, grads: &mut outs };
                self.vjp(ValueId::default(), &part.node, part_io)?;
            }
            for (buffer, from) in buffers.into_iter().zip(&part.inputs) {
                match (buffer, *from) {
                    (Some(buffer), Operand::Part(j)) => before[j] = buffer,
                    (Some(buffer), Operand::Input(j)) => {
                        if let Some(g) = io.grads[j].as_mut() {
                            *g.buffer = buffer;
                        }
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}
