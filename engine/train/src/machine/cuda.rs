//! Steps on a device: parameters, gradients, averages and the optimiser's state live there; the host sends a batch and a
//! few scalars, and reads losses, norm and whether the step counted. The device's part of a step is recorded once and
//! replayed. While it runs, the host makes the next batch ready and sends its images, as bytes, on a stream of their own;
//! the next step begins by making the models' inputs of them.

use std::rc::Rc;

use mcpipe_cuda::batch::{ImageStaging, Input, Sample};
use mcpipe_cuda::optim::{Copies, StepValues, Tensor, Updater};
use mcpipe_cuda::{Buffer, Cuda, CudaError, Device, Element, Gradients, Parameters, Precision, Recording, View};
use mcpipe_graph::{Param, ParamKind, ParamStore};

use super::{Ahead, At, Done, Machine, State, memory};
use crate::batch::{Batch, ImageBytes};
use crate::error::{Origin, TrainError};
use crate::graphs::Graphs;
use crate::prepared::Prepared;
use crate::setup::{LOGIT_SCALE, MAX_LOGIT_SCALE, Teacher, TeacherModel, TrainSetup};
use crate::step::{Step, Values, Weights};

/// Steps that run before one is recorded: they allocate scratch memory and choose algorithms.
const STEPS_BEFORE_RECORDING: u32 = 2;

/// Compute capability that rounds products to tf32 and bf16.
const ROUNDING_CAPABILITY: u32 = 80;

/// A device with its copy of the training's state.
#[derive(Debug)]
pub(crate) struct CudaMachine {
    device: Device,
    step: Step<Cuda>,
    params: Parameters,
    grads: Gradients,
    /// In the order of the state's.
    averages: Vec<Parameters>,
    /// Frozen teachers' weights, by position in the setup.
    frozen: Vec<Option<Parameters>>,
    /// What the optimiser keeps, slot by slot, under the parameters' names.
    slots: Vec<Parameters>,
    updater: Updater,
    /// Running statistics aside, and back.
    keep: Copies,
    put_back: Copies,
    /// Memory that `put_back` reads.
    _kept: Parameters,
    recordings: Vec<Recorded>,
    /// Images on their way; none before the first batch of bytes.
    images: Option<ImageStaging>,
    /// What was made ready of the batch ahead.
    ready: Option<Ready>,
}

/// A batch on its way to the device.
#[derive(Debug)]
struct Ready {
    prepared: Prepared,
    /// Whether its images were sent as bytes.
    sent: bool,
}

/// The device's part of a step with these terms at work.
#[derive(Debug)]
struct Recorded {
    /// Which terms have a weight.
    used: Vec<bool>,
    /// Whether images are in the towers' own memory already.
    in_towers: bool,
    steps: u32,
    recording: Option<Recording>,
    /// It was tried, and can't be recorded.
    refused: bool,
}

/// The device's word for a precision.
pub(crate) fn precision(of: mcpipe_spec::Precision) -> Precision {
    match of {
        mcpipe_spec::Precision::F32 => Precision::F32,
        mcpipe_spec::Precision::Tf32 => Precision::Tf32,
        mcpipe_spec::Precision::Bf16 => Precision::Bf16,
    }
}

/// Refuses a precision that a device of compute capability `capability` lacks.
fn check_precision(name: &str, capability: u32, wanted: Precision) -> Result<(), CudaError> {
    if wanted == Precision::F32 || capability >= ROUNDING_CAPABILITY {
        return Ok(());
    }
    let precision = if wanted == Precision::Tf32 { "tf32" } else { "bf16" };
    let (have, need) = (f64::from(capability) / 10.0, f64::from(ROUNDING_CAPABILITY) / 10.0);
    Err(CudaError::Unavailable(format!(
        "{name} (compute capability {have:.1}) has no {precision}, which needs {need:.1}; set `precision = \"f32\"`"
    )))
}

/// Each teacher's weights, by position in the setup.
fn teachers<'a>(
    setup: &TrainSetup,
    names: &[String],
    frozen: &'a [Option<Parameters>],
    averages: &'a [Parameters],
) -> Vec<Option<&'a ParamStore<Buffer>>> {
    let weights = |(t, frozen): (&Teacher, &'a Option<Parameters>)| match &t.model {
        TeacherModel::Frozen { .. } => frozen.as_ref().map(|p| &p.store),
        TeacherModel::Average { .. } => names.iter().position(|n| *n == t.name).map(|i| &averages[i].store),
    };
    setup.teachers.iter().zip(frozen).map(weights).collect()
}

fn names(state: &State) -> Vec<String> {
    state.averages.iter().map(|a| a.name.clone()).collect()
}

/// What the optimiser keeps in slot `slot`, as a store.
fn slot_store(state: &State, slot: usize) -> ParamStore {
    let mut store = ParamStore::default();
    for (p, slots) in state.store.params().iter().zip(&state.optimizer.slots) {
        let data = slots.get(slot).cloned().unwrap_or_default();
        store.insert(Param { name: p.name.clone(), shape: vec![data.len()], kind: p.kind, data });
    }
    store
}

fn view(buffer: &Buffer, len: usize) -> View {
    buffer.view(len, Element::F32)
}

impl CudaMachine {
    /// Allocates everything on `device` and copies the state there.
    pub(crate) fn new(
        setup: Rc<TrainSetup>,
        graphs: Graphs,
        state: &State,
        device: &Device,
    ) -> Result<Self, TrainError> {
        let precision = precision(setup.training.precision);
        check_precision(&device.name(), device.capability(), precision)?;
        let optimizer = &setup.optimizer;
        let rule = optimizer
            .rule()
            .ok_or_else(|| TrainError::Setup(format!("the optimizer `{}` runs on the CPU alone", optimizer.name())))?;
        let upload = |what: &str, store: &ParamStore| Parameters::upload(device, store).map_err(memory::of(what));
        let params = upload("the student's weights", &state.store)?;
        let grads = Gradients::zeros_like(device, &state.store).map_err(memory::of("the gradients"))?;
        let averages = state.averages.iter().map(|a| upload("a running average", &a.store));
        let averages = averages.collect::<Result<Vec<_>, TrainError>>()?;
        let slots = (0..optimizer.slots().len()).map(|s| upload("the optimizer's state", &slot_store(state, s)));
        let slots = slots.collect::<Result<Vec<_>, TrainError>>()?;
        let mut frozen = Vec::new();
        for (t, teacher) in setup.teachers.iter().enumerate() {
            let graph = graphs.teachers.iter().find(|run| run.teacher == t).and_then(|run| run.graph.as_ref());
            frozen.push(match (&teacher.model, graph) {
                (TeacherModel::Frozen { image: Some(image), .. }, Some(graph)) => {
                    let what = format!("the weights of teacher {}", teacher.name);
                    Some(upload(&what, &image.store.subset(graph)?)?)
                }
                _ => None,
            });
        }
        let backend = Cuda::new(device.clone(), precision);
        let weights = teachers(&setup, &names(state), &frozen, &averages);
        let make = || backend.clone();
        let step = Step::new(Rc::clone(&setup), graphs, &params.store, &weights, make, make)?;
        let tensors = tensors(state, &params, &grads, &slots, &averages);
        let updater = Updater::new(device, &tensors, rule, Some(view(step.sum(), 1)))?;
        let (kept, pairs) = aside(device, state, &params)?;
        let back: Vec<(View, View)> = pairs.iter().map(|&(from, to)| (to, from)).collect();
        let (keep, put_back) = (Copies::new(device, &pairs)?, Copies::new(device, &back)?);
        let (device, recordings) = (device.clone(), Vec::new());
        Ok(CudaMachine {
            device,
            step,
            params,
            grads,
            averages,
            frozen,
            slots,
            updater,
            keep,
            put_back,
            _kept: kept,
            recordings,
            images: None,
            ready: None,
        })
    }

    /// Makes the batch of step `step` ready as far as that can be while the step before it runs.
    fn stage(&mut self, batch: &Batch, step: u64) -> Result<Ready, TrainError> {
        self.step.check(batch, step)?;
        let bytes = batch.bytes.as_ref().filter(|_| self.step.inputs.has_image_places());
        // Images first: they travel while the host makes the rest.
        if let Some(bytes) = bytes {
            self.send(bytes, batch.captions.len())?;
        }
        Ok(Ready { prepared: self.step.make(batch, step)?, sent: bytes.is_some() })
    }

    fn send(&mut self, images: &ImageBytes, batch: usize) -> Result<(), TrainError> {
        let sizes = || images.forms.iter().map(|f| f.size);
        if !self.images.as_ref().is_some_and(|held| held.fits(batch, sizes())) {
            self.images = None;
        }
        let staging = match &mut self.images {
            Some(staging) => staging,
            none => none.insert(ImageStaging::new(&self.device, batch, &sizes().collect::<Vec<_>>())?),
        };
        let bytes: Vec<&[u8]> = images.forms.iter().map(|f| f.bytes.as_slice()).collect();
        Ok(staging.send(&bytes, &samples(images.mix.as_ref(), batch))?)
    }

    /// Brings a batch that was made ready to where the step reads it.
    fn put(&mut self, ready: Ready, batch: &Batch, at: At<'_>) -> Result<(), TrainError> {
        let (Some(staging), Some(bytes), true) = (&self.images, &batch.bytes, ready.sent) else {
            let views = batch.values().map_err(|e| TrainError::Batch { step: at.step, reason: e.to_string() })?;
            return self.step.put(ready.prepared, Some(&views), at.weights);
        };
        self.step.put(ready.prepared, None, at.weights)?;
        let mut inputs = Vec::new();
        for (view, part) in self.step.image_places()? {
            let view = bytes.views[view];
            let side = bytes.forms[view.form].size;
            let (mean, std) = (view.normalize.mean, view.normalize.std);
            let to = Cuda::place(&part);
            inputs.push((view.form, Input { to, top: 0, left: 0, h: side, w: side, channels: 3, mean, std }));
        }
        Ok(staging.make(&self.device, &inputs)?)
    }

    /// The images of a batch as the step reads them, each with the number of its view.
    #[cfg(test)]
    pub(crate) fn images(&mut self, batch: &Batch, at: At<'_>) -> Result<Vec<(usize, Vec<f32>)>, TrainError> {
        let ready = self.stage(batch, at.step)?;
        self.put(ready, batch, at)?;
        let device = self.device.clone();
        let read = |(view, part)| Ok((view, device.download(Cuda::place(&part))?));
        self.step.image_places()?.into_iter().map(read).collect()
    }

    /// The device's part of a step.
    fn work(&mut self, names: &[String], weights: &[f64]) -> Result<(), TrainError> {
        self.keep.run()?;
        self.grads.zero(&self.device)?;
        let setup = Rc::clone(&self.step.setup);
        let teachers = teachers(&setup, names, &self.frozen, &self.averages);
        let mut w = Weights { store: &mut self.params.store, grads: &mut self.grads.grads, teachers };
        self.step.compute(&mut w, weights)?;
        self.step.sum_losses(weights);
        self.updater.run()?;
        self.put_back.run_if_skipped(&self.updater)?;
        self.changed();
        self.step.keep_logit_scale(&self.params.store);
        Ok(())
    }

    /// Copies of weights in other types are out of date.
    fn changed(&self) {
        self.device.weights_changed(self.params.all());
        self.averages.iter().for_each(|a| self.device.weights_changed(a.all()));
    }

    /// Runs the device's part of a step: from a recording where there is one.
    fn run(&mut self, names: &[String], weights: &[f64]) -> Result<(), TrainError> {
        let used: Vec<bool> = weights.iter().map(|w| *w != 0.0).collect();
        let in_towers = self.step.inputs.images_in_towers();
        let found = self.recordings.iter().position(|r| r.used == used && r.in_towers == in_towers);
        let at = found.unwrap_or(self.recordings.len());
        if found.is_none() {
            let refused = self.step.needs_host();
            self.recordings.push(Recorded { used, in_towers, steps: 0, recording: None, refused });
        }
        let held = &mut self.recordings[at];
        held.steps += 1;
        if let Some(recording) = &held.recording {
            recording.replay()?;
            self.changed();
            return Ok(());
        }
        if held.refused || held.steps <= STEPS_BEFORE_RECORDING {
            return self.work(names, weights);
        }
        let device = self.device.clone();
        // A text encoder that ran since the last step has brought all copies of weights up to date: without this, no
        // refresh would be recorded, and replays would go on with these copies.
        self.changed();
        let recorded = device.record(|| {
            self.work(names, weights).map_err(|e| match e {
                TrainError::Device(e) => e,
                other => CudaError::Unsupported(other.to_string()),
            })
        });
        // What was not done yet may have been noted as done.
        self.changed();
        match recorded {
            Ok(Some(recording)) => {
                recording.replay()?;
                self.recordings[at].recording = Some(recording);
                Ok(())
            }
            // A device without recordings, or a step that can't be recorded: as before.
            Ok(None) | Err(_) => {
                self.recordings[at].refused = true;
                self.work(names, weights)
            }
        }
    }
}

/// What happens to each image of a batch.
fn samples(mix: Option<&mcpipe_data::Mix>, batch: usize) -> Vec<Sample> {
    let sample = |i: usize| {
        let Some(mix) = mix else { return Sample::plain(i) };
        let mixed = Sample { partner: mix.partner(i, batch) as i32, ..Sample::plain(i) };
        match mix.cut {
            None => Sample { lambda: mix.lambda, ..mixed },
            Some(c) => {
                let cells = [c.top, c.left, c.bottom, c.right].map(|n| n as i32);
                Sample { grid: c.grid as i32, cells, ..mixed }
            }
        }
    };
    (0..batch).map(sample).collect()
}

/// What the updater works on.
fn tensors(
    state: &State,
    params: &Parameters,
    grads: &Gradients,
    slots: &[Parameters],
    averages: &[Parameters],
) -> Vec<Tensor> {
    let moving = state.moving();
    let tensor = |(i, p): (usize, &Param)| {
        let len = p.data.len();
        let of = |all: &[Parameters]| all.iter().map(|s| view(&s.store.params()[i].data, len)).collect::<Vec<_>>();
        Tensor {
            param: view(&params.store.params()[i].data, len),
            grad: state.trained[i].then(|| view(&grads.grads.all()[i], len)),
            slots: if state.trained[i] { of(slots) } else { Vec::new() },
            averages: of(averages).into_iter().map(|a| moving[i].then_some(a)).collect(),
            shadow: None,
            decay: p.kind == ParamKind::Decay,
            most: (p.name == LOGIT_SCALE).then_some(MAX_LOGIT_SCALE.ln() as f32),
        }
    };
    state.store.params().iter().enumerate().map(tensor).collect()
}

/// Room for running statistics, and the pairs of views from them to it.
fn aside(device: &Device, state: &State, params: &Parameters) -> Result<(Parameters, Vec<(View, View)>), CudaError> {
    let mut store = ParamStore::default();
    let mut own = Vec::new();
    for (i, p) in state.store.params().iter().enumerate().filter(|(i, _)| state.running[*i]) {
        store.insert(p.clone());
        own.push(view(&params.store.params()[i].data, p.data.len()));
    }
    let kept = Parameters::upload(device, &store)?;
    let pairs = own.into_iter().zip(kept.store.params()).map(|(from, to)| (from, view(&to.data, from.len))).collect();
    Ok((kept, pairs))
}

impl Machine for CudaMachine {
    fn step(
        &mut self,
        state: &mut State,
        batch: &Batch,
        at: At<'_>,
        ahead: &mut dyn Ahead,
    ) -> Result<Done, TrainError> {
        let ready = self.ready.take().filter(|_| at.taken_ahead);
        let momenta = at.momenta.iter().map(|m| *m as f32).collect();
        let clip_norm = self.step.setup.training.clip_norm.map(|m| m as f32);
        let update = state.optimizer.step + 1;
        self.updater.set(&StepValues { lr: at.lr as f32, step: update, clip_norm, momenta })?;
        let names = names(state);
        let ran = match ready {
            Some(ready) => Ok(ready),
            None => self.stage(batch, at.step),
        };
        let ran = ran.and_then(|ready| self.put(ready, batch, at)).and_then(|()| self.run(&names, at.weights));
        ran.map_err(|e| memory::explain(&self.step.setup, &self.device, e))?;
        // The device is at work. A batch that can't be made ready is refused when its own step begins.
        self.ready = ahead.batch().and_then(|next| self.stage(next, at.step + 1).ok());
        let values = self.step.values(at.weights);
        let found = self.updater.result()?;
        if found.finite {
            state.optimizer.step = update;
        }
        Ok(Done { values, grad_norm: f64::from(found.norm), updated: found.finite })
    }

    fn blame(&self, state: &State, values: &Values, weights: &[f64]) -> Origin {
        self.step.blame(values, weights, &state.store, &self.grads.grads)
    }

    fn diagnose(&mut self, state: &mut State, batch: &Batch, at: At<'_>) -> Result<Origin, TrainError> {
        self.sync(state)?;
        self.ready = None;
        let setup = Rc::clone(&self.step.setup);
        let (device, all) = (self.device.clone(), self.grads.clone());
        let teachers = teachers(&setup, &names(state), &self.frozen, &self.averages);
        let mut w = Weights { store: &mut self.params.store, grads: &mut self.grads.grads, teachers };
        let found = self.step.diagnose(&mut w, &state.store, batch, at, &mut |_| Ok(all.zero(&device)?));
        // It moved running statistics.
        self.params.update(&self.device, &state.store)?;
        found
    }

    fn sync(&mut self, state: &mut State) -> Result<(), TrainError> {
        self.params.download(&self.device, &mut state.store)?;
        for (on_device, average) in self.averages.iter().zip(&mut state.averages) {
            on_device.download(&self.device, &mut average.store)?;
        }
        for (s, on_device) in self.slots.iter().enumerate() {
            let mut store = slot_store(state, s);
            on_device.download(&self.device, &mut store)?;
            for (held, p) in state.optimizer.slots.iter_mut().zip(store.params_mut()) {
                if let Some(held) = held.get_mut(s) {
                    std::mem::swap(held, &mut p.data);
                }
            }
        }
        Ok(())
    }

    fn load(&mut self, state: &State) -> Result<(), TrainError> {
        self.params.update(&self.device, &state.store)?;
        for (on_device, average) in self.averages.iter().zip(&state.averages) {
            on_device.update(&self.device, &average.store)?;
        }
        for (s, on_device) in self.slots.iter().enumerate() {
            on_device.update(&self.device, &slot_store(state, s))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_precision_that_the_device_lacks_is_told() {
        let said = |wanted| check_precision("GPU 0: Tesla T4", 75, wanted).map_err(|e| e.to_string());
        assert_eq!(said(Precision::F32), Ok(()));
        assert_eq!(
            said(Precision::Bf16).unwrap_err(),
            "GPU 0: Tesla T4 (compute capability 7.5) has no bf16, which needs 8.0; set `precision = \"f32\"`"
        );
        assert!(said(Precision::Tf32).unwrap_err().contains("has no tf32"));
        assert_eq!(check_precision("GPU 0", 80, Precision::Bf16), Ok(()));
    }
}
