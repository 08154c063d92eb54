//! Activations that are computed a second time instead of being kept.

use mcpipe_cuda::DeviceLayout;
use mcpipe_graph::backend::Plain;
use mcpipe_graph::{MemoryPlan, Mode, StepGraph, fuse_losses};

use super::device::{bits, device};
use super::*;

/// Residual blocks with batch norm, attention and stochastic depth; the last block is a tap.
#[derive(Clone, Debug)]
pub(super) struct Deep {
    pub blocks: usize,
}

impl ImageTower for Deep {
    fn image_size(&self) -> usize {
        SIDE
    }

    fn dim(&self) -> usize {
        6
    }

    fn taps(&self) -> Result<Vec<TapInfo>, ModelError> {
        let shape = TapShape::Image { height: SIDE / 2, width: SIDE / 2, channels: 4 };
        Ok(vec![TapInfo { name: "conv".into(), shape }])
    }

    fn build(&self, g: &mut GraphBuilder, x_bhwc: &Tensor, taps: &[String]) -> Result<Encoded, ModelError> {
        let path = Path::new("visual");
        let mut x = g.conv2d(&path.at("stem"), x_bhwc, ConvArgs::new(4, 3).stride(2))?;
        let mut found = Vec::new();
        for i in 0..self.blocks {
            let p = path.at(i);
            let y = g.conv2d(&p.at("conv"), &x, ConvArgs::new(8, 3))?;
            let y = g.batch_norm(&p.at("bn"), &y, BatchNormArgs::new(Activation::Silu))?;
            let y = g.conv2d(&p.at("out"), &y, ConvArgs::new(4, 1))?;
            let y = g.drop_path(&y, 0.4)?;
            x = g.add(&x, &y)?;
            if taps.iter().any(|t| t == "conv") && i == self.blocks / 2 {
                let shape = self.taps()?[0].shape;
                found.push(("conv".to_owned(), Tap { value: x.clone(), shape }));
            }
            let tokens = g.unfold_patches(&x, [2, 2])?;
            let y = g.layer_norm(&p.at("norm"), &tokens, 1e-5)?;
            let qkv = g.linear(&p.at("qkv"), &y, 12, true, Init::Normal(0.5))?;
            let y = g.attention(&qkv, 2, false)?;
            let y = g.add(&tokens, &y)?;
            x = g.fold_patches(&y, SIDE / 2, SIDE / 2, [2, 2])?;
        }
        let pooled = g.global_avg_pool(&x)?;
        let embedding_bd = g.linear(&path.at("proj"), &pooled, 6, false, Init::Normal(0.7))?;
        Ok(Encoded { embedding_bd, taps: found })
    }
}

fn deep(accumulate: usize, recompute: bool, compute: &Compute) -> TrainSetup {
    let mut s = setup(Arc::new(Deep { blocks: 6 }), Training { recompute, ..training(5, 8, accumulate) });
    s.teachers = vec![frozen("images", conv(5, false), None, 22)];
    let features = "loss = 'mse'\ntaps = [{ student = 'conv', teacher = 'conv' }]";
    s.objective.terms = vec![term("features", "features", features, &[0], 1.0)];
    s.average = Some(AverageSetup { momentum: 0.9, evaluate: false });
    s.compute = compute.clone();
    s
}

#[test]
fn the_bits_are_those_of_activations_that_are_kept() {
    let mut computes = vec![Compute::default(), Compute::Cpu(Kernels::Reference)];
    computes.extend(device());
    #[cfg(feature = "shim")]
    if let Some(Compute::Cuda(device)) = device() {
        // Values as ranges of one memory that overlap where their lives don't meet.
        computes.push(Compute::Cuda(device.in_one_arena()));
    }
    for compute in &computes {
        for (accumulate, precision) in
            [(1, mcpipe_spec::Precision::F32), (2, mcpipe_spec::Precision::F32), (1, mcpipe_spec::Precision::Bf16)]
        {
            let run = |recompute| {
                let mut s = deep(accumulate, recompute, compute);
                s.training.precision = precision;
                let mut log = Log::default();
                let mut trainer = Trainer::new(s).unwrap();
                trainer.run(&mut Random::new(8, true), &mut NoEval, &mut log, None, &Stop::default()).unwrap();
                let losses: Vec<(u64, u64)> =
                    log.steps.iter().map(|s| (s.loss.to_bits(), s.grad_norm.to_bits())).collect();
                // Running statistics are among the parameters.
                (bits(&trainer), losses)
            };
            let (kept, again) = (run(false), run(true));
            assert_eq!(kept.1, again.1, "{} {accumulate} {precision:?}", compute.name());
            assert!(kept.0 == again.0, "{} {accumulate} {precision:?}", compute.name());
        }
    }
}

fn bytes(graph: &StepGraph, mode: Mode, gpu: bool) -> usize {
    match gpu {
        true => {
            let layout = DeviceLayout { precision: mcpipe_cuda::Precision::Bf16 };
            MemoryPlan::new(&fuse_losses(graph), mode, &layout).bytes()
        }
        false => MemoryPlan::new(graph, mode, &Plain).bytes(),
    }
}

#[test]
fn the_plan_counts_less_memory_and_more_work() {
    let plan = |recompute| StepPlan::new(&deep(1, recompute, &Compute::default()), false).unwrap();
    let (kept, again) = (plan(false), plan(true));
    let (a, b) = (&kept.parts[0], &again.parts[0]);
    assert!(b.activation_bytes * 2 < a.activation_bytes, "{a:?} {b:?}");
    assert!(b.flops > a.flops && b.flops * 3 < a.flops * 4, "{a:?} {b:?}");
    assert_eq!(kept.parts[1..], again.parts[1..]);
}

#[test]
fn published_trunks_need_less_than_half() {
    for (name, side) in [("mobilevit_s", 256), ("convnext_tiny", 224), ("efficientnet_b0", 224)] {
        let backbone = Arc::from(mcpipe_models::backbone(name, &Default::default()).unwrap());
        let path = Path::new("visual");
        let tower = BackboneTower { backbone, path, image_size: side, head: Some(512), projection: None };
        let mut g = GraphBuilder::new(true);
        let x_bhwc = g.input("images", &[32, side, side, 3]);
        let encoded = tower.build(&mut g, &x_bhwc, &[]).unwrap();
        g.output("image", &encoded.embedding_bd);
        let graph = g.finish();
        for gpu in [false, true] {
            let [kept, again] = [Mode::Train, Mode::Recompute].map(|mode| bytes(&graph, mode, gpu));
            assert!(again * 2 < kept, "{name}: {again} of {kept}");
        }
    }
}
