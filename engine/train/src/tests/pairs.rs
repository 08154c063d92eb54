//! The loss graph's two forms of losses over pairs.

use mcpipe_graph::StepGraph;

use super::device::device;
use super::*;
use crate::graphs::loss_name;
use crate::losses::{PairForm, pair_form};
use crate::machine::{At, State, machine};
use crate::optim::OptimizerState;
use crate::step::{Values, running, trained};

fn count(graph: &StepGraph, op: &str) -> usize {
    graph.nodes().filter(|(_, n)| n.op().is_some_and(|o| o.name() == op)).count()
}

fn logits(params: &str, teachers: &[usize]) -> Term {
    term("logits", "logits", params, teachers, 1.0)
}

/// Two teachers, one of them an average; both of the student's towers learn.
fn two_teachers(training: Training) -> TrainSetup {
    let mut s = everything(false, training);
    s.model.text = ModelText::Trained { tower: Arc::new(BagOfTokens { dim: 6 }), tokenize: tokenize() };
    s.objective.terms =
        vec![logits("", &[0, 3]), Term { name: "logits.2".into(), ..logits("temperature = 3.0", &[2]) }];
    s
}

#[test]
fn losses_hold_no_matrix_over_pairs() {
    let batch = 48;
    let setup = two_teachers(training(1, batch, 2));
    let graphs = Graphs::new(&setup).unwrap();
    // CLIP's loss and the first level share an op.
    assert_eq!((count(&graphs.loss, "relational"), count(&graphs.loss, "contrastive")), (2, 0));
    for (_, node) in graphs.loss.nodes() {
        assert!(node.numel() < batch * batch, "{:?} {:?}", node.source, node.shape);
    }
    let matrices = Graphs::with(&setup, PairForm::Matrices).unwrap().loss;
    assert_eq!((count(&matrices, "relational"), count(&matrices, "contrastive")), (0, 3));
    for slot in 0..3 {
        assert!(graphs.loss.output(&loss_name(&setup, slot)).is_ok());
    }
}

#[test]
fn other_objectives_keep_their_matrices() {
    let form = |change: &dyn Fn(&mut TrainSetup)| {
        let mut s = two_teachers(training(1, 4, 1));
        change(&mut s);
        pair_form(&s)
    };
    assert_eq!(form(&|_| ()), PairForm::Streamed);
    assert_eq!(form(&|s| s.objective.terms.clear()), PairForm::Streamed);
    assert_eq!(form(&|s| s.objective.contrast = Contrast::Sigmoid { bias: -1.0 }), PairForm::Matrices);
    assert_eq!(form(&|s| s.objective.terms = vec![logits("", &[0; 12])]), PairForm::Matrices);
}

/// The losses of some steps.
fn steps(s: TrainSetup, form: PairForm, mix: bool, weights: &[f64]) -> Vec<Values> {
    let setup = Rc::new(s);
    let graphs = Graphs::with(&setup, form).unwrap();
    assert_eq!(count(&graphs.loss, "relational") > 0, form == PairForm::Streamed);
    let mut store = ParamStore::default();
    graphs.trained().into_iter().for_each(|g| store.init(g, setup.seed).unwrap());
    let (trained, running) = (trained(&graphs, &store), running(&graphs, &store));
    let optimizer = OptimizerState::new(setup.optimizer.as_ref(), &store, &trained);
    let averages = vec![Average::new("mean", &store, 0.9, None)];
    let mut state = State { store, averages, optimizer, trained, running };
    let mut machine = machine(&setup, graphs, &state).unwrap();
    let source = Random::new(setup.training.batch_size, mix);
    let step = |step: u64| {
        let at = At { step, weights, lr: 0.02, momenta: &[0.9], taken_ahead: false };
        let done = machine.step(&mut state, &source.batch(step), at, &mut ()).unwrap();
        assert!(done.updated);
        done.values
    };
    (0..5).map(step).collect()
}

#[test]
fn streamed_losses_train_as_matrices_do() {
    for compute in [Some(Compute::default()), device()].into_iter().flatten() {
        streamed_as_matrices(&compute);
    }
}

fn streamed_as_matrices(compute: &Compute) {
    // A level whose weight is zero, and CLIP's own loss without one, take no part in the gradient.
    for weights in [[0.4, 1.0, 0.5], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]] {
        for (mix, accumulate) in [(false, 1), (true, 2), (true, 1)] {
            let s = || {
                let mut s = two_teachers(training(10, 8, accumulate));
                s.optimizer = Arc::new(Sgd { lr: 0.02, ..Sgd::default() });
                s.compute = compute.clone();
                s
            };
            let streamed = steps(s(), PairForm::Streamed, mix, &weights);
            let matrices = steps(s(), PairForm::Matrices, mix, &weights);
            for (step, (a, b)) in streamed.iter().zip(&matrices).enumerate() {
                for (x, y) in a.terms.iter().zip(&b.terms) {
                    assert!((x - y).abs() <= 2e-5 * y.abs().max(0.1), "step {step}: {a:?}\n{b:?}");
                }
                assert!((a.logit_scale - b.logit_scale).abs() < 1e-5 * b.logit_scale, "step {step}: {a:?}\n{b:?}");
            }
        }
    }
}
