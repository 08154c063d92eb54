//! The contrastive and relational loss against f64, whole and in blocks of rows. On a GPU where `MCPIPE_TEST_GPU` is set;
//! with the feature `shim` on the CPU.

#[path = "support/relational.rs"]
mod support;

use mcpipe_cuda::{Device, Element, Pairs};
use support::{Found, Kind, OnDevice, Prepared, Problem, errors, exact, floats, run, run_by};

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

const DL: [f32; 2] = [0.7, 1.3];

fn check(dev: &Device, p: &Problem, element: Element, rounded: bool, bar: f64, what: &str) {
    let want = exact(p, &Prepared::new(p), DL.map(f64::from));
    let got = run(dev, p, element, rounded, DL).expect("the device runs it");
    let found = errors(&got, &want);
    assert!(
        found.iter().all(|e| *e <= bar),
        "{what}: {found:?}, values {:?} for {:?}, scale {} for {}",
        got.value,
        want.value,
        got.dscale,
        want.dscale
    );
    println!("{what}: {}", found.map(|e| format!("{e:.1e}")).join(" "));
}

const SIZES: [usize; 8] = [1, 3, 7, 64, 127, 129, 1000, 4097];

fn sizes(rounded: bool, element: Element, bar: f64) {
    let Some(dev) = device() else { return };
    for (i, batch) in SIZES.into_iter().enumerate() {
        let dim = [24, 8, 5, 72, 16, 136, 40, 8][i];
        let widths: &[usize] = if batch == 4097 { &[16] } else { [&[][..], &[16], &[8, 30]][i % 3] };
        let p = Problem::new(batch, dim, widths, Kind::Random, 14.3, i as u64, rounded);
        check(&dev, &p, element, rounded, bar, &format!("{batch} pairs of {dim}, teachers {widths:?}"));
    }
}

#[test]
fn f32_matches_f64_at_ragged_sizes() {
    sizes(false, Element::F32, 1e-5);
}

#[test]
fn bf16_matches_f64_at_ragged_sizes() {
    sizes(true, Element::Bf16, 1e-2);
}

#[test]
fn kernels_for_every_device_match_f64() {
    let Some(dev) = device() else { return };
    for (batch, dim, widths, kind) in [
        (1, 24, &[16][..], Kind::Random),
        (129, 72, &[], Kind::Repeated),
        (300, 136, &[30, 8], Kind::Matched),
        (1000, 40, &[16], Kind::Random),
    ] {
        let p = Problem::new(batch, dim, widths, kind, 14.3, 7, true);
        let want = exact(&p, &Prepared::new(&p), DL.map(f64::from));
        let pairs = Pairs::new(&p.d, true).expect("fits").portable();
        let got = run_by(&dev, &p, &pairs, Element::Bf16, true, DL).expect("the device runs it");
        let found = errors(&got, &want);
        assert!(found.iter().all(|e| *e <= 1e-2), "{batch} pairs of {dim}, teachers {widths:?}: {found:?}");
    }
}

#[test]
fn all_kinds_of_embeddings_and_scales_match_f64() {
    let Some(dev) = device() else { return };
    for kind in [Kind::Random, Kind::Matched, Kind::Opposed, Kind::Repeated] {
        for scale in [1.0, 14.3, 100.0] {
            for (seed, widths) in [&[][..], &[24], &[8, 16]].into_iter().enumerate() {
                for rounded in [false, true] {
                    let p = Problem::new(131, 24, widths, kind, scale, seed as u64, rounded);
                    // f32 embeddings are rounded once: these are numbers of bf16 already.
                    let bar = if rounded { 1e-2 } else { 1e-5 };
                    let what = format!("{kind:?}, scale {scale}, teachers {widths:?}, rounded {rounded}");
                    check(&dev, &p, Element::F32, rounded, bar, &what);
                }
            }
        }
    }
}

#[test]
fn more_teachers_than_one_launch_takes_match_f64() {
    let Some(dev) = device() else { return };
    for rounded in [false, true] {
        let p = Problem::new(70, 16, &[8, 3, 16, 5, 24, 2], Kind::Matched, 14.3, 5, rounded);
        check(&dev, &p, Element::F32, rounded, if rounded { 1e-2 } else { 1e-5 }, "six teachers");
    }
}

#[test]
fn gradients_add_where_asked_and_only_wanted_ones_are_written() {
    let Some(dev) = device() else { return };
    for (rounded, element) in [(false, Element::F32), (true, Element::F32), (true, Element::Bf16)] {
        let p = Problem::new(150, 24, &[16], Kind::Random, 5.0, 3, rounded);
        let want = run(&dev, &p, element, rounded, DL).expect("the device runs it");
        let on = OnDevice::new(&dev, &p, element, rounded, DL, 0.25).expect("memory");
        let (pairs, saved) = (Pairs::new(&p.d, rounded).expect("fits"), on.saved());
        pairs.statistics(&dev, &on.ins, &saved).expect("runs");
        pairs.finish(&dev, &on.ins, &saved, on.out.view).expect("runs");
        pairs.backward(&dev, &on.ins, &saved, on.dout.view, on.grads(true)).expect("runs");
        let got = on.found(&dev).expect("comes back");
        let bar = if element == Element::Bf16 { 2e-3 } else { 1e-6 };
        for (got, want) in [(&got.da, &want.da), (&got.db, &want.db), (&vec![got.dscale], &vec![want.dscale])] {
            assert!(got.iter().zip(want).all(|(g, w)| (g - 0.25 - w).abs() <= bar), "{rounded} {element:?}");
        }
        for only in 0..3 {
            let on = OnDevice::new(&dev, &p, element, rounded, DL, 0.25).expect("memory");
            let mut grads = on.grads(false);
            (0..3).filter(|i| *i != only).for_each(|i| grads[i] = None);
            pairs.backward(&dev, &on.ins, &saved, on.dout.view, grads).expect("runs");
            let got = on.found(&dev).expect("comes back");
            let all = [got.da, got.db, vec![got.dscale]];
            let wanted = [&want.da, &want.db, &vec![want.dscale]];
            for i in 0..3 {
                let same = if i == only { all[i] == *wanted[i] } else { all[i].iter().all(|v| *v == 0.25) };
                assert!(same, "only gradient {only} wanted, {i} is off");
            }
        }
    }
}

#[test]
fn a_term_without_weight_gives_no_gradient() {
    let Some(dev) = device() else { return };
    for rounded in [false, true] {
        let p = Problem::new(140, 16, &[8, 8], Kind::Matched, 14.3, 9, rounded);
        for dl in [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]] {
            let want = exact(&p, &Prepared::new(&p), dl.map(f64::from));
            let got = run(&dev, &p, Element::F32, rounded, dl).expect("the device runs it");
            let found = errors(&got, &want);
            assert!(found.iter().all(|e| *e <= if rounded { 1e-2 } else { 1e-5 }), "{dl:?} {rounded}: {found:?}");
        }
    }
}

#[test]
fn nan_reaches_the_losses_and_the_gradients() {
    let Some(dev) = device() else { return };
    for rounded in [false, true] {
        for (which, at) in [(0, 0), (0, 16 * 139 + 15), (1, 16 * 70), (2, 0), (3, 8 * 139 + 7), (4, 0)] {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut p = Problem::new(140, 16, &[8], Kind::Random, 14.3, 9, rounded);
                match which {
                    0 => p.a[at] = bad,
                    1 => p.b[at] = bad,
                    2 => p.scale = bad,
                    3 => p.teachers[0].0[at] = bad,
                    _ => p.teachers[0].1[at] = bad,
                }
                let got = run(&dev, &p, Element::F32, rounded, DL).expect("the device runs it");
                let what = format!("{bad} in argument {which}, rounded {rounded}: {:?}", got.value);
                assert!(!got.value[1].is_finite() && (which > 2 || !got.value[0].is_finite()), "{what}");
                assert!(got.da.iter().chain(&got.db).any(|v| !v.is_finite()), "{what}");
                assert!(!got.dscale.is_finite(), "{what}");
            }
        }
    }
}

#[test]
fn blocks_of_rows_sum_to_the_whole() {
    let Some(dev) = device() else { return };
    for rounded in [false, true] {
        for (widths, blocks) in [(&[][..], vec![100, 200]), (&[16], vec![1, 130, 169]), (&[8, 16], vec![128, 44, 128])]
        {
            let p = Problem::new(300, 24, widths, Kind::Matched, 30.0, 4, rounded);
            let whole = run(&dev, &p, Element::F32, rounded, DL).expect("the device runs it");
            let (mut ranks, mut first) = (Vec::new(), 0);
            for &rows in &blocks {
                let part = p.block(first, rows);
                let on = OnDevice::new(&dev, &part, Element::F32, rounded, DL, f32::NAN).expect("memory");
                Pairs::new(&part.d, rounded).expect("fits").statistics(&dev, &on.ins, &on.saved()).expect("runs");
                dev.release_scratch();
                ranks.push((part, on));
                first += rows;
            }
            // What an all-gather of the columns' statistics does.
            let all: Vec<f32> =
                ranks.iter().flat_map(|(_, on)| dev.download(on.saved[1].view).expect("comes back")).collect();
            let gathered = floats(&dev, &all, Element::F32).expect("memory");
            let mut sum = Found { value: [0.0; 2], da: Vec::new(), db: vec![0.0; p.b.len()], dscale: 0.0 };
            for (part, on) in &ranks {
                let (pairs, saved) = (Pairs::new(&part.d, rounded).expect("fits"), on.saved());
                pairs.merge_ranks(&dev, gathered.view, ranks.len(), &saved).expect("runs");
                pairs.finish(&dev, &on.ins, &saved, on.out.view).expect("runs");
                dev.release_scratch();
                pairs.backward(&dev, &on.ins, &saved, on.dout.view, on.grads(false)).expect("runs");
                dev.release_scratch();
                let got = on.found(&dev).expect("comes back");
                (0..2).for_each(|i| sum.value[i] += got.value[i]);
                sum.da.extend(got.da);
                sum.db.iter_mut().zip(got.db).for_each(|(s, g)| *s += g);
                sum.dscale += got.dscale;
            }
            let found = errors(&sum, &whole);
            let bar = if rounded { 5e-3 } else { 2e-6 };
            assert!(found.iter().all(|e| *e <= bar), "{blocks:?} {widths:?} rounded {rounded}: {found:?}");
        }
    }
}

#[test]
fn the_same_arguments_give_the_same_bits() {
    let Some(dev) = device() else { return };
    for rounded in [false, true] {
        let p = Problem::new(300, 24, &[16, 8], Kind::Random, 14.3, 2, rounded);
        let bits = || {
            let f = run(&dev, &p, Element::F32, rounded, DL).expect("the device runs it");
            let all = f.value.into_iter().chain(f.da).chain(f.db).chain([f.dscale]);
            all.map(f64::to_bits).collect::<Vec<_>>()
        };
        assert_eq!(bits(), bits());
    }
}
