//! The optimiser and the making of model inputs, against the CPU's.

use mcpipe_cpu::optim::{adamw_step, ema_update, scale_in_place, sgd_step, sum_of_squares};
use mcpipe_cuda::batch::{self, Images, Input, Sample};
use mcpipe_cuda::optim::{Copies, Rule, StepValues, Tensor, Updater};
use mcpipe_cuda::{Device, Element, Memory, View};
use mcpipe_graph::Init;

fn device() -> Option<Device> {
    #[cfg(feature = "shim")]
    if std::env::var_os("MCPIPE_SHIM").is_some() {
        return Some(Device::shim().expect("the library of kernels loads"));
    }
    if std::env::var_os("MCPIPE_TEST_GPU").is_some() {
        return Some(Device::open(0).expect("a GPU answers"));
    }
    eprintln!("skipped: neither MCPIPE_SHIM nor MCPIPE_TEST_GPU is set");
    None
}

fn noise(seed: u64, len: usize) -> Vec<f32> {
    Init::Uniform(1.0).sample(seed, "noise", &[len])
}

/// Values in device memory.
struct Held {
    _memory: Memory,
    view: View,
}

fn held(dev: &Device, values: &[f32]) -> Held {
    let memory = dev.alloc(4 * values.len()).expect("memory");
    let view = memory.view(values.len(), Element::F32);
    dev.upload(values, view).expect("an upload");
    Held { _memory: memory, view }
}

fn empty(dev: &Device, len: usize, element: Element) -> Held {
    let memory = dev.alloc(len * element.bytes()).expect("memory");
    let view = memory.view(len, element);
    dev.fill(view, 0xff).expect("a fill");
    Held { _memory: memory, view }
}

fn close(dev: &Device, view: View, expected: &[f32], bar: f32, what: &str) {
    let found = dev.download(view).expect("a download");
    assert_eq!(found.len(), expected.len());
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= bar * (e.abs() + 1e-2), "{what}[{i}]: {f}, expected {e}");
    }
}

const LENGTHS: [usize; 5] = [1, 3, 129, 5000, 8192];

fn steps(rule: Rule, slots: usize) {
    let Some(dev) = device() else { return };
    // The last tensor is not trained: its averages alone move.
    let n = LENGTHS.len();
    let mut params: Vec<Vec<f32>> = LENGTHS.iter().enumerate().map(|(i, &l)| noise(i as u64, l)).collect();
    let mut state: Vec<Vec<Vec<f32>>> = LENGTHS.iter().map(|&l| vec![vec![0.0; l]; slots]).collect();
    let mut averages: Vec<[Vec<f32>; 2]> = params.iter().map(|p| [p.clone(), vec![0.5; p.len()]]).collect();
    let on = |v: &[f32]| held(&dev, v);
    let d_params: Vec<Held> = params.iter().map(|p| on(p)).collect();
    let d_grads: Vec<Held> = params.iter().map(|p| on(p)).collect();
    let d_slots: Vec<Vec<Held>> = state.iter().map(|s| s.iter().map(|s| on(s)).collect()).collect();
    let d_averages: Vec<[Held; 2]> = averages.iter().map(|a| [on(&a[0]), on(&a[1])]).collect();
    let shadows: Vec<Held> = LENGTHS.iter().map(|&l| empty(&dev, l, Element::Bf16)).collect();
    let loss = on(&[1.0]);
    let trained = |i: usize| i + 1 < n;
    let tensors: Vec<Tensor> = (0..n)
        .map(|i| Tensor {
            param: d_params[i].view,
            grad: trained(i).then_some(d_grads[i].view),
            slots: if trained(i) { d_slots[i].iter().map(|s| s.view).collect() } else { Vec::new() },
            averages: vec![Some(d_averages[i][0].view), (i != 1).then_some(d_averages[i][1].view)],
            shadow: trained(i).then_some(shadows[i].view),
            decay: i % 2 == 0,
            most: (i == 1).then_some(0.2),
        })
        .collect();
    let updater = Updater::new(&dev, &tensors, rule, Some(loss.view)).expect("memory");
    let mut done = 0;
    for k in 0..6u64 {
        let clip_norm = if k < 3 { Some(0.7) } else { None };
        let grads: Vec<Vec<f32>> = (0..n).map(|i| noise(100 * k + i as u64, LENGTHS[i])).collect();
        for (i, g) in grads.iter().enumerate() {
            dev.upload(g, d_grads[i].view).expect("an upload");
        }
        // A gradient, then a loss that is not finite: nothing changes.
        let bad = match k {
            1 => {
                let mut g = grads[3].clone();
                g[4999] = f32::NAN;
                dev.upload(&g, d_grads[3].view).expect("an upload");
                true
            }
            4 => true,
            _ => false,
        };
        dev.upload(&[if k == 4 { f32::INFINITY } else { 1.0f32 }], loss.view).expect("an upload");
        let values = StepValues { lr: 0.01 + 0.01 * k as f32, step: done + 1, clip_norm, momenta: vec![0.9, 0.99] };
        updater.set(&values).expect("an upload");
        updater.run().expect("launches");
        let result = updater.result().expect("a download");
        assert_eq!(result.finite, !bad, "step {k}");
        if bad {
            continue;
        }
        done += 1;
        let norm = grads[..n - 1].iter().map(|g| sum_of_squares(g)).sum::<f64>().sqrt();
        assert!((f64::from(result.norm) - norm).abs() < 1e-5 * norm, "{} and {norm}", result.norm);
        for i in 0..n {
            if trained(i) {
                let mut g = grads[i].clone();
                if let Some(most) = clip_norm {
                    scale_in_place(&mut g, (f64::from(most) / (norm + 1e-6)) as f32);
                }
                let decay = i % 2 == 0;
                match (rule, &mut state[i][..]) {
                    (Rule::Adamw { betas: [b1, b2], eps, weight_decay }, [m, v]) => {
                        let wd = if decay { weight_decay } else { 0.0 };
                        adamw_step(&mut params[i], &g, m, v, values.lr, b1, b2, eps, wd, done);
                    }
                    (Rule::Sgd { momentum, nesterov, weight_decay }, [v]) => {
                        let wd = if decay { weight_decay } else { 0.0 };
                        sgd_step(&mut params[i], &g, v, values.lr, momentum, nesterov, wd, done);
                    }
                    _ => unreachable!("slots fit the rule"),
                }
                if i == 1 {
                    params[i].iter_mut().for_each(|p| *p = p.min(0.2));
                }
            }
            for (j, average) in averages[i].iter_mut().enumerate() {
                if !(i == 1 && j == 1) {
                    ema_update(average, &params[i], values.momenta[j]);
                }
            }
        }
    }
    for i in 0..n {
        close(&dev, d_params[i].view, &params[i], 1e-5, "parameter");
        for j in 0..2 {
            close(&dev, d_averages[i][j].view, &averages[i][j], 1e-5, "average");
        }
        if trained(i) {
            for (slot, expected) in d_slots[i].iter().zip(&state[i]) {
                close(&dev, slot.view, expected, 1e-5, "slot");
            }
            close(&dev, shadows[i].view, &params[i], 1e-2, "shadow");
        }
    }
}

#[test]
fn adamw_matches_the_cpu() {
    steps(Rule::Adamw { betas: [0.9, 0.98], eps: 1e-8, weight_decay: 0.1 }, 2);
}

#[test]
fn sgd_matches_the_cpu() {
    steps(Rule::Sgd { momentum: 0.9, nesterov: false, weight_decay: 0.1 }, 1);
    steps(Rule::Sgd { momentum: 0.9, nesterov: true, weight_decay: 0.0 }, 1);
    steps(Rule::Sgd { momentum: 0.0, nesterov: false, weight_decay: 0.1 }, 1);
}

#[test]
fn copies_convert_and_can_depend_on_a_skipped_step() {
    let Some(dev) = device() else { return };
    let values: Vec<Vec<f32>> = [1, 4097, 300].iter().map(|&n| noise(n as u64, n)).collect();
    let from: Vec<Held> = values.iter().map(|v| held(&dev, v)).collect();
    let to: Vec<Held> = values.iter().map(|v| empty(&dev, v.len(), Element::Bf16)).collect();
    let pairs: Vec<(View, View)> = from.iter().zip(&to).map(|(f, t)| (f.view, t.view)).collect();
    let copies = Copies::new(&dev, &pairs).expect("memory");
    let param = held(&dev, &[1.0]);
    let grad = held(&dev, &[0.5]);
    let tensor = Tensor {
        param: param.view,
        grad: Some(grad.view),
        slots: vec![held(&dev, &[0.0]).view],
        averages: Vec::new(),
        shadow: None,
        decay: false,
        most: None,
    };
    let velocity = held(&dev, &[0.0]);
    let tensor = Tensor { slots: vec![velocity.view], ..tensor };
    let rule = Rule::Sgd { momentum: 0.0, nesterov: false, weight_decay: 0.0 };
    let updater = Updater::new(&dev, &[tensor], rule, None).expect("memory");
    updater.set(&StepValues { lr: 0.1, step: 1, clip_norm: None, momenta: Vec::new() }).expect("an upload");
    updater.run().expect("launches");
    copies.run_if_skipped(&updater).expect("a launch");
    assert!(dev.download(to[1].view).expect("a download").iter().all(|v| v.is_nan()), "a finite step restores nothing");
    dev.upload(&[f32::NAN], grad.view).expect("an upload");
    updater.run().expect("launches");
    copies.run_if_skipped(&updater).expect("a launch");
    for (t, v) in to.iter().zip(&values) {
        close(&dev, t.view, v, 1e-2, "copy");
    }
    close(&dev, param.view, &[0.95], 1e-6, "parameter");
}

/// The picture that a sample's view shows, before normalising, as the host makes it: cropped and mirrored.
fn picture(bytes: &[u8], images: &Images, row: usize, s: &Sample, y: usize, x: usize, c: usize) -> f32 {
    let x = if s.flip == 1 { images.view_w - 1 - x } else { x };
    let (y, x) = (y + s.top as usize, x + s.left as usize);
    f32::from(bytes[((row * images.h + y) * images.w + x) * 3 + c])
}

fn inputs(kind: &str, element: Element, bar: f32) {
    let Some(dev) = device() else { return };
    let images = Images { batch: 3, h: 30, w: 29, view_h: 24, view_w: 26 };
    let bytes: Vec<u8> = noise(5, 3 * 30 * 29 * 3).iter().map(|v| ((v + 1.0) * 127.5) as u8).collect();
    let d_bytes = empty(&dev, bytes.len(), Element::U8);
    dev.upload(&bytes, d_bytes.view).expect("an upload");
    let samples: Vec<Sample> = (0..3)
        .map(|i| {
            let mut s = Sample { flip: (i % 2) as i32, top: 2 * i as i32, left: i as i32, ..Sample::plain(i) };
            if kind != "plain" {
                s.partner = ((i + 1) % 3) as i32;
            }
            match kind {
                "mixup" => s.lambda = 0.3,
                "cutmix" => (s.grid, s.cells) = (8, [1, 2, 5, 8]),
                _ => {}
            }
            s
        })
        .collect();
    let memory = batch::sample_memory(&dev, 3).expect("memory");
    let d_samples = memory.view(3 * size_of::<Sample>(), Element::U8);
    batch::upload_samples(&dev, &images, &samples, d_samples).expect("samples inside");
    let (mean, std) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
    let shape = |top, left, h, w, channels, mean, std| {
        let to = empty(&dev, 3 * h * w * channels, element);
        (Input { to: to.view, top, left, h, w, channels, mean, std }, to)
    };
    let made = [
        shape(0, 0, 24, 24, 3, mean, std),
        shape(0, 2, 24, 24, 8, [0.0; 3], [1.0; 3]),
        shape(3, 5, 17, 19, 3, [0.5; 3], [0.5; 3]),
    ];
    let list: Vec<Input> = made.iter().map(|m| m.0).collect();
    batch::model_inputs(&dev, &images, d_bytes.view, d_samples, &list).expect("a launch");
    for input in &list {
        let mut expected = Vec::new();
        for (b, s) in samples.iter().enumerate() {
            for (y, x) in (0..input.h).flat_map(|y| (0..input.w).map(move |x| (y, x))) {
                for c in 0..3 {
                    let at =
                        |row: usize| picture(&bytes, &images, row, &samples[row], y + input.top, x + input.left, c);
                    let other = at(s.partner as usize);
                    let edge = |cells: i32, size: usize| (cells as usize * size + 4) / 8;
                    let inside = kind == "cutmix"
                        && (edge(1, input.h)..edge(5, input.h)).contains(&y)
                        && (edge(2, input.w)..edge(8, input.w)).contains(&x);
                    let v = if inside { other } else { s.lambda * at(b) + (1.0 - s.lambda) * other };
                    expected.push((v / 255.0 - input.mean[c]) / input.std[c]);
                }
                expected.extend(std::iter::repeat_n(0.0, input.channels - 3));
            }
        }
        close(&dev, input.to, &expected, bar, kind);
    }
    let outside = Input { top: 10, ..list[0] };
    assert!(batch::model_inputs(&dev, &images, d_bytes.view, d_samples, &[outside]).is_err());
    let lost = [Sample { partner: 3, ..samples[0] }, samples[1], samples[2]];
    assert!(batch::upload_samples(&dev, &images, &lost, d_samples).is_err());
}

#[test]
fn model_inputs_match_the_host() {
    for kind in ["plain", "mixup", "cutmix"] {
        inputs(kind, Element::F32, 1e-4);
        inputs(kind, Element::Bf16, 1e-2);
    }
}
