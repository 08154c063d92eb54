//! The shim itself: kernels of `kernels/elementwise.cu`, and those of `tests/kernels/cases/shim_test.cu` that use or break
//! what it promises.

use half::bf16;

use crate::device::{Device, Memory};
use crate::driver::{ConvPass, Driver, Product};
use crate::error::CudaError;
use crate::launch::{Shape, launch};
use crate::view::{Element, View};

fn device() -> Option<Device> {
    if std::env::var_os("MCPIPE_SHIM").is_none() {
        eprintln!("skipped: MCPIPE_SHIM is not set");
        return None;
    }
    Some(Device::shim().expect("the library loads"))
}

fn noise(seed: u32, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / u32::MAX as f32 * 4.0 - 2.0
    };
    (0..n).map(|_| next()).collect()
}

fn rounded(x: &[f32], element: Element) -> Vec<f32> {
    x.iter().map(|x| if element == Element::Bf16 { bf16::from_f32(*x).to_f32() } else { *x }).collect()
}

/// Memory that ends where the elements end.
fn put(dev: &Device, x: &[f32], element: Element) -> (Memory, View) {
    let memory = dev.alloc(x.len() * element.bytes()).expect("memory");
    let view = memory.view(x.len(), element);
    match element {
        Element::Bf16 => dev.upload(&x.iter().map(|x| bf16::from_f32(*x).to_bits()).collect::<Vec<_>>(), view),
        _ => dev.upload(x, view),
    }
    .expect("an upload");
    (memory, view)
}

fn room(dev: &Device, n: usize, element: Element) -> (Memory, View) {
    let memory = dev.alloc(n * element.bytes()).expect("memory");
    let view = memory.view(n, element);
    (memory, view)
}

#[test]
fn element_wise_kernels_run_for_all_types_and_ragged_sizes() {
    let Some(dev) = device() else { return };
    for n in [1, 3, 8, 127, 129, 1000, 4096, 5001] {
        for (ea, eb, ey) in [
            (Element::F32, Element::F32, Element::F32),
            (Element::Bf16, Element::F32, Element::Bf16),
            (Element::Bf16, Element::Bf16, Element::F32),
        ] {
            let (a, b) = (noise(1, n), noise(2, n));
            let ((_ma, va), (_mb, vb), (_my, vy)) = (put(&dev, &a, ea), put(&dev, &b, eb), room(&dev, n, ey));
            launch!(dev, "elementwise", "add", Shape::eights(n), va, vb, vy, n as i64).expect("add runs");
            let sums: Vec<f32> = rounded(&a, ea).iter().zip(rounded(&b, eb)).map(|(a, b)| a + b).collect();
            assert_eq!(dev.download(vy).expect("a download"), rounded(&sums, ey), "{n} {ea:?} {eb:?} {ey:?}");

            launch!(dev, "elementwise", "activation", Shape::eights(n), va, vy, n as i64, 1i32).expect("relu runs");
            let relu: Vec<f32> = rounded(&a, ea).iter().map(|a| a.max(0.0)).collect();
            assert_eq!(dev.download(vy).expect("a download"), rounded(&relu, ey), "{n} {ea:?} {ey:?}");
        }
    }
}

#[test]
fn warp_products_match_plain_ones() {
    let Some(dev) = device() else { return };
    let (blocks, k) = (3, 64);
    let (a, b) = (noise(3, blocks * 16 * k), noise(4, k * 8));
    let (a, b) = (rounded(&a, Element::Bf16), rounded(&b, Element::Bf16));
    let transposed: Vec<f32> = (0..8 * k).map(|i| b[i % k * 8 + i / k]).collect();
    let (_ma, va) = put(&dev, &a, Element::Bf16);
    for (stored, nk) in [(&b, 0i32), (&transposed, 1)] {
        let ((_mb, vb), (_md, vd)) = (put(&dev, stored, Element::Bf16), room(&dev, blocks * 16 * 8, Element::F32));
        launch!(dev, "shim_test", "test_mma", Shape::row(blocks, 32), va, vb, vd, nk).expect("mma runs");
        for (i, got) in dev.download(vd).expect("a download").into_iter().enumerate() {
            let expected: f64 = (0..k).map(|j| f64::from(a[i / 8 * k + j]) * f64::from(b[j * 8 + i % 8])).sum();
            assert!((f64::from(got) - expected).abs() < 1e-4, "nk {nk}, {i}: {got} is not {expected}");
        }
    }
}

#[test]
fn blocks_reduce_and_exchange() {
    let Some(dev) = device() else { return };
    for (n, threads, blocks) in [(1, 32, 1), (1000, 1024, 2), (12345, 96, 5)] {
        let x = noise(5, n);
        let ((_mx, vx), (_my, vy)) = (put(&dev, &x, Element::F32), room(&dev, blocks, Element::F32));
        launch!(dev, "shim_test", "test_block_sum", Shape::row(blocks, threads), vx, vy, n as i64).expect("runs");
        let sum: f64 = dev.download(vy).expect("a download").into_iter().map(f64::from).sum();
        assert!((sum - x.iter().map(|x| f64::from(*x)).sum::<f64>()).abs() < 1e-3);
    }
    let (threads, blocks) = (160, 3);
    let x = noise(6, threads * blocks);
    let ((_mx, vx), (_my, vy)) = (put(&dev, &x, Element::F32), room(&dev, threads * blocks, Element::F32));
    let shape = Shape::row(blocks, threads as u32).shared(threads * 4);
    launch!(dev, "shim_test", "test_reverse", shape, vx, vy).expect("runs");
    let expected: Vec<f32> = x.chunks(threads).flat_map(|c| c.iter().rev().copied()).collect();
    assert_eq!(dev.download(vy).expect("a download"), expected);
}

#[test]
fn faults_are_found_and_named() {
    let Some(dev) = device() else { return };
    let x = noise(7, 64);
    let fault = |which: i32| -> Result<Vec<f32>, CudaError> {
        let ((_mx, vx), (_my, vy)) = (put(&dev, &x, Element::F32), room(&dev, 64, Element::F32));
        launch!(dev, "shim_test", "test_fault", Shape::row(1, 64).shared(1024), vx, vy, which)?;
        dev.download(vy)
    };
    let message = |which: i32| fault(which).expect_err("a fault").to_string();
    let has = |text: String, parts: &[&str]| assert!(parts.iter().all(|p| text.contains(p)), "{text} lacks {parts:?}");
    assert_eq!(fault(99), Ok(x.clone()));
    has(message(0), &["test_fault", "block (0,0,0), thread (", "v[", "it has 64 elements", "f32"]);
    assert!(fault(1).expect("runs").iter().all(|y| y.is_nan()), "shared memory starts as NaN");
    assert!(fault(2).expect("runs").iter().any(|y| y.is_nan()), "a missing barrier shows");
    has(message(3), &["disagree", "a shuffle", "a warp barrier"]);
    has(message(5), &["8 elements of v (f32)", "not aligned"]);
    has(message(6), &["can't go on", "57 wait at __syncthreads", "7 at a warp's"]);
    assert!(fault(8).expect("runs").iter().all(|y| y.is_nan()), "a copy that nobody waited for is not there");

    let ((_mx, vx), (my, vy)) = (put(&dev, &x, Element::F32), room(&dev, 64, Element::F32));
    let launch = |shape: Shape, which: i32| launch!(dev, "shim_test", "test_fault", shape, vx, vy, which);
    has(launch(Shape::row(1, 64).shared(64), 4).expect_err("a fault").to_string(), &["64 bytes of dynamic", "byte 64"]);
    has(launch(Shape::row(1, 96), 99).expect_err("a fault").to_string(), &["96 threads a block, at most 64"]);
    has(launch(Shape::row(1, 64), 7).expect_err("a fault").to_string(), &["wrote at byte 256"]);
    // The guard is broken now: giving the memory back says so.
    let given_back = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(my)));
    assert!(given_back.is_err());
}

#[test]
fn launches_are_checked() {
    let Some(dev) = device() else { return };
    let (_m, v) = put(&dev, &noise(8, 8), Element::F32);
    let shape = Shape::row(1, 32);
    let text = |r: Result<(), CudaError>| r.expect_err("refused").to_string();
    assert!(
        text(launch!(dev, "elementwise", "add", shape, v, v, v, 8i32)).contains("argument 3 is i4, the parameter i8")
    );
    assert!(text(launch!(dev, "elementwise", "add", shape, v, v, v)).contains("3 arguments, but it has 4 parameters"));
    assert!(text(launch!(dev, "elementwise", "nothing", shape, v)).contains("has no kernel nothing"));
    let long = View::new(v.address, 1 << 20, Element::F32);
    assert!(text(launch!(dev, "elementwise", "add", shape, v, v, long, 8i64)).contains("not within one range"));
    let odd = View::new(v.address + 4, 4, Element::F32);
    assert!(text(launch!(dev, "elementwise", "add", shape, v, v, odd, 4i64)).contains("16-byte aligned"));
    assert!(launch!(dev, "elementwise", "add", shape, View::none(), v, v, 8i64).is_err());
}

#[test]
fn memory_is_limited() {
    let Some(path) = std::env::var_os("MCPIPE_SHIM") else { return };
    let shim = super::Shim::open(std::path::Path::new(&path), 1000).expect("the library loads");
    let a = shim.alloc(600).expect("fits");
    assert_eq!(shim.alloc(600), Err(CudaError::OutOfMemory { wanted: 600, free: 400, total: 1000 }));
    shim.free(a);
    assert_eq!(shim.memory(), (1000, 1000));
}

#[test]
fn products_take_strides_types_and_bias() {
    let Some(dev) = device() else { return };
    let (m, n, k, batch) = (5, 7, 11, 2);
    for (element, out) in [(Element::F32, Element::F32), (Element::Bf16, Element::Bf16), (Element::Bf16, Element::F32)]
    {
        for (trans_a, trans_b) in [(false, false), (true, false), (false, true), (true, true)] {
            let mut p = Product::new(m, n, k, trans_a, trans_b);
            p.ld = p.ld.map(|l| l + 3);
            let rows = [if trans_a { k } else { m }, if trans_b { n } else { k }, m];
            p.stride = [0, 1, 2].map(|i| rows[i] * p.ld[i] + 8);
            (p.batch, p.alpha, p.beta) = (batch, 0.5, 2.0);
            let [a, b, d] = [0, 1, 2].map(|i| noise(9 + i as u32, batch * p.stride[i]));
            let (a, b, d) = (rounded(&a, element), rounded(&b, element), rounded(&d, out));
            let bias = rounded(&noise(13, n), out);
            let ((_ma, va), (_mb, vb)) = (put(&dev, &a, element), put(&dev, &b, element));
            let ((_md, vd), (_mbias, vbias)) = (put(&dev, &d, out), put(&dev, &bias, out));
            dev.product(&p, va, vb, vd, Some(vbias)).expect("a product");
            let mut expected = d.clone();
            for (i, r, c) in (0..batch * m * n).map(|x| (x / (m * n), x / n % m, x % n)) {
                let at =
                    |r: usize, j: usize| a[i * p.stride[0] + if trans_a { j * p.ld[0] + r } else { r * p.ld[0] + j }];
                let bt =
                    |j: usize, c: usize| b[i * p.stride[1] + if trans_b { c * p.ld[1] + j } else { j * p.ld[1] + c }];
                let sum: f32 = (0..k).map(|j| at(r, j) * bt(j, c)).sum();
                let place = &mut expected[i * p.stride[2] + r * p.ld[2] + c];
                *place = 0.5 * sum + 2.0 * *place + bias[c];
            }
            let bar = if out == Element::Bf16 { 0.05 } else { 1e-4 };
            for (got, want) in dev.download(vd).expect("a download").iter().zip(&expected) {
                assert!((got - want).abs() <= bar, "{element:?} {out:?} {trans_a} {trans_b}: {got} {want}");
            }
        }
    }
}

#[test]
fn convolutions_take_taps_first_weights() {
    let Some(dev) = device() else { return };
    for (groups, kh, kw, stride) in [(1, 3, 2, 2), (2, 3, 3, 1), (1, 1, 1, 1)] {
        let pad = kh / 2;
        let d = mcpipe_cpu::Conv2d { batch: 2, h: 5, w: 6, c_in: 4, c_out: 6, kh, kw, stride, pad, groups };
        let (ci, co) = (d.c_in / groups, d.c_out / groups);
        let (xs, ys) = (d.batch * d.h * d.w * d.c_in, d.batch * d.out_h() * d.out_w() * d.c_out);
        let (x, w, dy) = (noise(20, xs), noise(21, d.weights()), noise(22, ys));
        // The product of every input, weight and output that meet, summed into one of the three.
        let (mut y, mut dx, mut dw) = (vec![0.0f32; ys], vec![0.0f32; xs], vec![0.0f32; w.len()]);
        for i in 0..ys {
            let (b, r, c, o) = (
                i / (d.out_h() * d.out_w() * d.c_out),
                i / (d.out_w() * d.c_out) % d.out_h(),
                i / d.c_out % d.out_w(),
                i % d.c_out,
            );
            for (u, v, q) in (0..kh * kw * ci).map(|t| (t / (kw * ci), t / ci % kw, t % ci)) {
                let (h, s) = ((r * stride + u).wrapping_sub(pad), (c * stride + v).wrapping_sub(pad));
                if h >= d.h || s >= d.w {
                    continue;
                }
                let at = ((b * d.h + h) * d.w + s) * d.c_in + o / co * ci + q;
                let tap = ((o * kh + u) * kw + v) * ci + q;
                y[i] += x[at] * w[tap];
                dx[at] += dy[i] * w[tap];
                dw[tap] += dy[i] * x[at];
            }
        }
        let ((_mx, vx), (_mw, vw), (_my, vy)) =
            (put(&dev, &x, Element::F32), put(&dev, &w, Element::F32), put(&dev, &dy, Element::F32));
        let close = |v: View, want: &[f32]| {
            let got = dev.download(v).expect("a download");
            got.iter().zip(want).for_each(|(g, w)| assert!((g - w).abs() < 1e-3, "groups {groups}: {g} {w}"));
        };
        let ((_m1, o1), (_m2, o2), (_m3, o3)) =
            (room(&dev, ys, Element::F32), room(&dev, xs, Element::F32), room(&dev, w.len(), Element::F32));
        dev.convolution(ConvPass::Forward, &d, vx, vw, o1).expect("forward");
        close(o1, &y);
        dev.convolution(ConvPass::Data, &d, o2, vw, vy).expect("data");
        close(o2, &dx);
        dev.convolution(ConvPass::Filter, &d, vx, o3, vy).expect("filter");
        close(o3, &dw);
    }
}
