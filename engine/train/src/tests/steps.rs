//! The loop: golden losses, averages, evaluation in the loop, limits, the plan.

use super::*;

fn run(s: TrainSetup) -> (Trainer, Log) {
    let mut log = Log::default();
    let batch_size = s.training.batch_size;
    let mut trainer = Trainer::new(s).unwrap();
    trainer.run(&mut Random::new(batch_size, true), &mut NoEval, &mut log, None, &Stop::default()).unwrap();
    (trainer, log)
}

#[test]
fn golden_losses() {
    let mut s = everything(true, training(6, 6, 1));
    s.training.clip_norm = Some(1.0);
    s.schedule = LrConfig::Cosine(Cosine { warmup_steps: 2, final_factor: 0.0 });
    let (_, log) = run(s);
    // (loss, gradient norm); the tolerance leaves room for other vector widths and thread counts.
    #[allow(clippy::approx_constant)] // no π
    let golden = [(5.3806, 8.035), (4.3503, 6.421), (4.0799, 3.563), (4.0113, 3.142), (3.9439, 3.371), (4.3269, 6.701)];
    for (r, (loss, norm)) in log.steps.iter().zip(golden) {
        let close = |a: f64, b: f64| (a - b).abs() < 1e-3 * b;
        assert!(close(r.loss, loss) && close(r.grad_norm, norm), "step {}: {} {}", r.step, r.loss, r.grad_norm);
    }
    let names: Vec<&str> = log.steps[0].terms.iter().map(|(n, _)| n.as_str()).collect();
    assert_eq!(names[..3], ["clip", "logits", "logits.2"]);
    assert_eq!(log.steps[0].weights[..2], [0.4, 0.6]);
    assert_eq!(log.steps[0].lr, 0.005);
}

#[test]
fn the_dfdx_formulations_give_the_same_losses() {
    let run_with =
        |kernels| run(TrainSetup { compute: Compute::Cpu(kernels), ..everything(true, training(2, 4, 1)) }).1;
    let (own, reference) = (run_with(Kernels::Native), run_with(Kernels::Reference));
    for (a, b) in own.steps.iter().zip(&reference.steps) {
        assert!((a.loss - b.loss).abs() < 1e-4 && (a.grad_norm - b.grad_norm).abs() < 1e-3, "{a:?} {b:?}");
    }
}

/// bf16 rounds what the products read, and nothing else: losses move a little, and no more.
#[test]
fn bf16_training_is_f32_training_but_for_rounding() {
    let run_with = |precision| {
        let training = mcpipe_spec::Training { precision, ..training(6, 4, 1) };
        run(everything(true, training)).1
    };
    let (whole, rounded) = (run_with(mcpipe_spec::Precision::F32), run_with(mcpipe_spec::Precision::Bf16));
    assert!(whole.steps.iter().zip(&rounded.steps).any(|(a, b)| a.loss != b.loss), "nothing was rounded");
    for (a, b) in whole.steps.iter().zip(&rounded.steps) {
        assert!((a.loss - b.loss).abs() < 0.03 * a.loss, "step {}: {} {}", a.step, a.loss, b.loss);
    }
}

#[test]
fn two_runs_are_the_same_run() {
    let bits = || {
        let (trainer, _) = run(everything(true, training(3, 4, 2)));
        trainer.store().params().iter().flat_map(|p| p.data.iter().map(|v| v.to_bits())).collect::<Vec<_>>()
    };
    assert_eq!(bits(), bits());
}

#[test]
fn a_teacher_learns() {
    let mut s = setup(conv(6, true), training(60, 8, 1));
    s.model.text = ModelText::Trained { tower: Arc::new(BagOfTokens { dim: 6 }), tokenize: tokenize() };
    let (trainer, log) = run(s);
    let mean = |r: &[StepReport]| r.iter().map(|r| r.loss).sum::<f64>() / r.len() as f64;
    let (first, last) = (mean(&log.steps[..10]), mean(&log.steps[50..]));
    assert!(last < 0.85 * first, "{first} -> {last}");
    assert!(trainer.store().get("text.token_embedding.weight").is_some());
    assert!(log.steps[9].log && !log.steps[10].log && log.steps[0].log && log.steps[59].log);
}

#[test]
fn the_logit_scale_is_clamped_and_not_decayed() {
    let mut s = setup(conv(6, false), training(1, 4, 1));
    s.model.logit_scale = 99.9999;
    s.optimizer = Arc::new(AdamW { lr: 1.0, ..AdamW::default() });
    let (trainer, _) = run(s.clone());
    assert!(trainer.store().get(LOGIT_SCALE).unwrap().data[0] <= 100f32.ln());
    s.model.train_logit_scale = false;
    let (trainer, _) = run(s);
    assert_eq!(trainer.store().get(LOGIT_SCALE).unwrap().data[0], 99.9999f64.ln() as f32);
}

#[test]
fn the_average_follows_the_weights() {
    let mut s = everything(true, training(1, 4, 1));
    s.average = Some(AverageSetup { momentum: 0.75, evaluate: true });
    let mut trainer = Trainer::new(s).unwrap();
    let start = trainer.store().clone();
    trainer.one(&Random::new(4, false).batch(0)).unwrap();
    for name in ["visual.conv.weight", "visual.bn.running_mean", "distill.features.clip.regressor.0.bias"] {
        let at = |s: &ParamStore| s.get(name).unwrap().data[1];
        let expected = 0.75 * at(&start) + 0.25 * at(trainer.store());
        assert!((at(trainer.average().unwrap()) - expected).abs() < 1e-6, "{name}");
        assert_ne!(at(&start), at(trainer.store()), "{name}");
    }
    assert!(trainer.evaluated().averaged);
}

#[test]
fn without_distillation_no_teacher_runs() {
    let mut s = everything(false, training(2, 4, 1));
    s.objective.lambda = 0.0;
    let (trainer, log) = run(s);
    assert_eq!(log.steps[0].terms.len(), 1);
    assert_eq!(log.steps[0].weights, [1.0]);
    assert!(trainer.store().params().iter().all(|p| !p.name.starts_with("distill.")));
}

struct Every(u64, Vec<(u64, bool)>);

impl Evaluate for Every {
    fn due(&self, step: u64, _: u64) -> bool {
        step.is_multiple_of(self.0)
    }

    fn evaluate(&mut self, step: u64, weights: EvalWeights<'_>) -> Result<Vec<EvalReport>, BoxError> {
        self.1.push((step, weights.averaged));
        if step > 8 {
            return Err("no more".into());
        }
        let metrics = [("acc1".to_owned(), 0.5)].into();
        Ok(vec![EvalReport { step, name: "zero_shot".into(), metrics }])
    }
}

#[test]
fn evaluations_run_in_the_loop_and_lower_the_rate() {
    let mut s = setup(conv(6, false), training(8, 4, 1));
    s.schedule = LrConfig::Plateau(Plateau { metric: "zero_shot.acc1".into(), patience: 1, ..Plateau::default() });
    let mut eval = Every(2, Vec::new());
    let mut log = Log::default();
    let mut trainer = Trainer::new(s).unwrap();
    trainer.run(&mut Random::new(4, false), &mut eval, &mut log, None, &Stop::default()).unwrap();
    assert_eq!(eval.1, [(2, false), (4, false), (6, false), (8, false)]);
    assert_eq!((log.steps[5].lr, log.steps[6].lr), (1e-2, 5e-3));
    assert!(log.messages[0].contains("zero_shot.acc1"));
    let mut trainer = Trainer::new(setup(conv(6, false), training(12, 4, 1))).unwrap();
    let e = trainer.run(&mut Random::new(4, false), &mut eval, &mut log, None, &Stop::default()).unwrap_err();
    assert_eq!(e.to_string(), "the evaluation after step 10 failed: no more");
}

#[test]
fn a_stop_without_checkpoints_ends_after_the_step() {
    let stop = Stop::default();
    stop.request();
    let mut trainer = Trainer::new(setup(conv(6, false), training(5, 4, 1))).unwrap();
    let outcome = trainer.run(&mut Random::new(4, false), &mut NoEval, &mut NoObserver, None, &stop).unwrap();
    assert_eq!(outcome, Outcome::Interrupted { step: 0, checkpoint: None });
}

#[test]
fn batches_that_do_not_fit_are_refused() {
    let mut trainer = Trainer::new(setup(conv(6, false), training(5, 4, 1))).unwrap();
    let good = Random::new(4, false).batch(0);
    let refused = |b: Batch, trainer: &mut Trainer| trainer.one(&b).unwrap_err().to_string();
    let few = Batch { captions: good.captions[..3].to_vec(), ..good.clone() };
    assert!(refused(few, &mut trainer).contains("3 captions"));
    let small = Batch { views: vec![vec![0.0; 5]], ..good.clone() };
    assert!(refused(small, &mut trainer).contains("8x8"));
    let mix = Batch { mix: Some(Mix { partner: vec![9; 4], keep: vec![0.5; 4] }), ..good };
    assert!(refused(mix, &mut trainer).contains("mixing"));
}

#[test]
fn dimensions_must_be_joined() {
    let mut s = setup(conv(6, false), training(5, 4, 1));
    s.texts = vec![caption_encoder(7, 1)];
    let e = Trainer::new(s).unwrap_err().to_string();
    assert!(e.contains("dimension 6") && e.contains('7'), "{e}");
}

#[test]
fn the_plan_counts_what_a_step_needs() {
    let mut s = everything(true, training(5, 8, 1));
    s.average = Some(AverageSetup { momentum: 0.9, evaluate: false });
    let one = StepPlan::new(&s, false).unwrap();
    let names: Vec<&str> = one.parts.iter().map(|p| p.name.as_str()).collect();
    assert_eq!(
        names,
        ["student", "losses", "teacher clip", "teacher images", "teacher mean", "text encoder 0", "text encoder 1"]
    );
    let trainer = Trainer::new(s.clone()).unwrap();
    let trained: usize =
        trainer.store().params().iter().zip(trainer.trained()).filter(|(_, t)| **t).map(|(p, _)| p.data.len()).sum();
    assert_eq!((one.gradient_bytes, one.optimizer_bytes), (4 * trained, 8 * trained));
    let all: usize = trainer.store().params().iter().map(|p| p.data.len()).sum();
    assert_eq!(one.average_bytes, 2 * 4 * all);
    s.training.accumulate = 4;
    let four = StepPlan::new(&s, false).unwrap();
    assert!(four.parts[0].activation_bytes * 3 < one.parts[0].activation_bytes);
    assert!(four.flops() > one.flops() && four.bytes() < one.bytes());
}

#[test]
fn sgd_takes_the_gradient_s_way() {
    let mut s = setup(conv(6, false), training(30, 8, 1));
    s.optimizer = Arc::new(Sgd { lr: 0.2, nesterov: true, ..Sgd::default() });
    let (_, log) = run(s);
    assert!(log.steps[29].loss < log.steps[0].loss, "{} {}", log.steps[0].loss, log.steps[29].loss);
}
