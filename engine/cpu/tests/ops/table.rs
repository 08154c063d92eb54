//! The cases: every op, at small sizes (for finite differences) and at ragged larger ones.

use mcpipe_cpu::activation::Activation;
use mcpipe_cpu::attention::Attention;
use mcpipe_cpu::attention_pool::AttentionPool;
use mcpipe_cpu::bridge::Op;
use mcpipe_cpu::conv::Conv2d;
use mcpipe_cpu::gemm::Gemm;
use mcpipe_cpu::layout::Patches;
use mcpipe_cpu::linear::Linear;
use mcpipe_cpu::loss::Contrastive;
use mcpipe_cpu::norm::{GroupNorm, Norm};
use mcpipe_cpu::pooling::Pool2d;
use mcpipe_cpu::relational::Relational;
use mcpipe_cpu::resize::Resize;
use mcpipe_cpu::separable::SeparableAttention;
use mcpipe_cpu::sigmoid_loss::SigmoidLoss;
use mcpipe_cpu::token_conv::TokenConv;

use crate::harness::{Case, Fill};

const U: Fill = Fill::Uniform(1.0, 0.0);
const WIDE: Fill = Fill::Uniform(4.0, 0.0);

fn case(name: &'static str, op: Op<'static>, inputs: &[(usize, Fill)]) -> Case {
    Case { name, op, inputs: inputs.to_vec(), tolerance: 1e-5 }
}

/// One table; `large` picks ragged sizes that reach past one chunk of work, else sizes for finite differences.
pub fn cases(large: bool) -> Vec<Case> {
    let size = |small: usize, big: usize| if large { big } else { small };
    let mut all = Vec::new();
    for act in Activation::ALL {
        let n = size(19, 40_003);
        all.push(case("activation", Op::Activation(act), &[(n, WIDE)]));
        let (rows, c) = (size(5, 2_501), size(3, 19));
        let dims = Norm { rows, c, eps: 1e-5 };
        let (x, g, b) = ((rows * c, Fill::Uniform(2.0, 0.5)), (c, Fill::Uniform(1.0, 1.5)), (c, U));
        all.push(case("batch_norm", Op::BatchNorm { dims, act }, &[x, g, b]));
        let (mean, var) = ((c, U), (c, Fill::Uniform(0.5, 1.0)));
        all.push(case("batch_norm_eval", Op::BatchNormEval { dims, act }, &[x, g, b, mean, var]));
    }
    for (rows, c) in if large { vec![(700, 64), (3, 1), (1_100, 35)] } else { vec![(4, 5), (1, 3)] } {
        let inputs = [(rows * c, Fill::Uniform(2.0, 0.5)), (c, Fill::Uniform(1.0, 1.5)), (c, U)];
        all.push(case("layer_norm", Op::LayerNorm(Norm { rows, c, eps: 1e-5 }), &inputs));
        let dims = Norm { rows: rows + 1, c, eps: 1e-3 };
        let inputs = [((rows + 1) * c, U), (c, U), (c, U)];
        all.push(case("batch_norm", Op::BatchNorm { dims, act: Activation::Silu }, &inputs));
    }
    for (batch, rows, c) in if large { vec![(3, 700, 37), (2, 1, 5)] } else { vec![(2, 3, 4), (3, 1, 3)] } {
        let d = GroupNorm { batch, rows, c, eps: 1e-5 };
        let inputs = [(batch * rows * c, Fill::Uniform(2.0, 0.5)), (c, Fill::Uniform(1.0, 1.5)), (c, U)];
        all.push(case("group_norm", Op::GroupNorm(d), &inputs));
    }
    // A large common offset: the variance has to survive it. x itself carries a rounding of 1e-7·1000.
    let dims = Norm { rows: size(6, 3_000), c: 4, eps: 1e-5 };
    let offset = [(dims.rows * 4, Fill::Uniform(1.0, 1000.0)), (4, Fill::Uniform(1.0, 1.5)), (4, U)];
    all.push(Case {
        tolerance: 2e-4,
        ..case("batch_norm offset", Op::BatchNorm { dims, act: Activation::Identity }, &offset)
    });

    let attentions: &[(usize, usize, usize, usize)] = if large {
        &[(3, 16, 4, 20), (37, 4, 2, 24), (2, 65, 3, 16), (1, 77, 2, 64), (2, 1, 1, 8)]
    } else {
        &[(2, 3, 2, 2)]
    };
    for &(batch, tokens, heads, head_dim) in attentions {
        for causal in [false, true] {
            let d = Attention { batch, tokens, heads, head_dim, causal };
            let n = batch * tokens * 3 * heads * head_dim;
            all.push(case("attention", Op::Attention(d), &[(n, Fill::Uniform(2.0, 0.0))]));
            // Most entries see their first token alone, one sees three.
            const LAST: [i32; 37] = {
                let mut last = [0; 37];
                last[1] = 2;
                last
            };
            if batch <= LAST.len() && tokens >= 3 {
                let op = Op::MaskedAttention { dims: d, last: &LAST[..batch] };
                all.push(case("masked_attention", op, &[(n, Fill::Uniform(2.0, 0.0))]));
            }
            all.push(case("attention_map", Op::AttentionMap(d), &[(n, Fill::Uniform(2.0, 0.0))]));
        }
    }
    for (batch, tokens, heads, head_dim) in if large { [(3, 49, 3, 20), (1, 5, 2, 64)] } else { [(2, 3, 2, 2); 2] } {
        let d = AttentionPool { batch, tokens, heads, head_dim };
        let (q, kv) = (heads * head_dim, 2 * batch * tokens * heads * head_dim);
        all.push(case("attention_pool", Op::AttentionPool(d), &[(q, Fill::Uniform(2.0, 0.0)), (kv, U)]));
    }
    for (tokens, kernel) in [(size(4, 77), 3), (size(3, 6), size(5, 11)), (1, 1)] {
        let d = TokenConv { batch: size(2, 5), tokens, channels: size(3, 37), kernel };
        let inputs = [(d.batch * tokens * d.channels, U), (d.channels * kernel, U)];
        all.push(case("token_conv", Op::TokenConv(d), &inputs));
    }
    for (scale, bias) in [(10.0, -10.0), (100.0, 3.0)] {
        let d = SigmoidLoss { rows: size(3, 37), cols: size(4, 41), dim: size(5, 67) };
        let (a, b) = ((d.rows * d.dim, Fill::Unit(d.dim)), (d.cols * d.dim, Fill::Unit(d.dim)));
        for t in [Fill::OneHot(d.cols), Fill::Probabilities(d.cols)] {
            let inputs = [a, b, (1, Fill::Uniform(0.0, scale)), (1, Fill::Uniform(0.0, bias)), (d.rows * d.cols, t)];
            all.push(case("sigmoid_loss", Op::SigmoidLoss(d), &inputs));
        }
    }
    for (batch, tokens, dim) in if large { vec![(5, 64, 48), (3, 17, 21), (1, 1, 3)] } else { vec![(2, 4, 3)] } {
        let d = SeparableAttention { batch, tokens, dim };
        all.push(case("separable_attention", Op::SeparableAttention(d), &[(batch * tokens * (1 + 2 * dim), WIDE)]));
    }
    let (samples, len) = (3, size(5, 20_001));
    all.push(case("scale_samples", Op::ScaleSamples { batch: samples, len }, &[(samples * len, U), (samples, U)]));
    let (rows, c) = (size(5, 1_301), size(3, 37));
    all.push(case("layer_scale", Op::ChannelScale { batch: 1, hw: rows, c }, &[(rows * c, U), (c, U)]));
    let (batch, hw, c) = (2, size(6, 130), size(3, 37));
    all.push(case("global_avg_pool", Op::GlobalAvgPool { batch, hw, c }, &[(batch * hw * c, U)]));
    all.push(case("channel_scale", Op::ChannelScale { batch, hw, c }, &[(batch * hw * c, U), (batch * c, U)]));
    all.push(case("attention_transfer_map", Op::AttentionTransferMap { batch, hw, c }, &[(batch * hw * c, U)]));
    for (k, stride, pad) in [(2, 2, 0), (3, 2, 1), (3, 1, 1)] {
        let d = Pool2d { batch: 2, h: size(4, 9), w: size(3, 11), c: size(2, 17), k, stride, pad };
        let n = d.batch * d.h * d.w * d.c;
        all.push(case("max_pool", Op::MaxPool(d), &[(n, U)]));
        all.push(case("avg_pool", Op::AvgPool(d), &[(n, U)]));
    }
    for (h, w, oh, ow) in [(3, 2, 5, 4), (5, 6, 2, 3), (4, 4, 8, 8), (1, 3, 4, 1)] {
        let (batch, c) = (2, size(2, 21));
        for aligned in [false, true] {
            let d = Resize { batch, h, w, c, oh, ow, aligned };
            all.push(case("resize", Op::Resize(d), &[(batch * h * w * c, U)]));
        }
    }
    for (h, w, ph, pw) in [(4, 4, 2, 2), (6, 4, 3, 2), (2, 3, 1, 3)] {
        let d = Patches { batch: 3, h, w, c: size(2, 23), ph, pw };
        let n = d.batch * h * w * d.c;
        all.push(case("unfold", Op::Unfold(d), &[(n, U)]));
        all.push(case("fold", Op::Fold(d), &[(n, U)]));
    }
    let width = size(3, 33);
    all.push(case("embedding", Op::Embedding { width, ids: &[4, 0, 4, 17, 4, 2, 0] }, &[(18 * width, U)]));
    let gather = Op::GatherRows { tokens: 5, width, index: &[4, 0, 2] };
    all.push(case("gather_rows", gather, &[(15 * width, U)]));
    let (rows, ca, cb) = (size(3, 203), size(2, 19), size(4, 32));
    all.push(case("concat_last", Op::ConcatLast { rows, ca, cb }, &[(rows * ca, U), (rows * cb, U)]));
    let prepend = Op::PrependToken { batch: 3, tokens: 4, width };
    all.push(case("prepend_token", prepend, &[(width, U), (12 * width, U)]));
    let slice = Op::SliceRows { outer: 3, rows: 5, width, start: 1, count: 3 };
    all.push(case("slice_rows", slice, &[(15 * width, U)]));
    all.push(case("permute", Op::Permute { shape: &[2, 3, 4, 5], perm: &[0, 2, 3, 1] }, &[(120, U)]));
    all.push(case("permute", Op::Permute { shape: &[7, 3], perm: &[1, 0] }, &[(21, U)]));
    all.push(case("permute", Op::Permute { shape: &[2, 3, 5], perm: &[1, 0, 2] }, &[(30, U)]));

    let n = size(11, 33_001);
    all.push(case("add", Op::Add, &[(n, U), (n, U)]));
    all.push(case("mul", Op::Mul, &[(n, U), (n, U)]));
    all.push(case("scale", Op::Scale(-2.5), &[(n, U)]));
    all.push(case("exp", Op::Exp, &[(n, WIDE)]));
    all.push(case("mse", Op::Mse, &[(n, U), (n, U)]));
    let (rows, c) = (size(4, 307), size(5, 67));
    all.push(case("add_broadcast", Op::AddBroadcast, &[(rows * c, U), (c, U)]));
    all.push(case("l2_normalize", Op::L2Normalize { rows, c }, &[(rows * c, U)]));
    all.push(case("cosine", Op::Cosine { rows, c }, &[(rows * c, U), (rows * c, U)]));
    let probabilities = Fill::Probabilities(c);
    all.push(case("kl_rows", Op::KlRows { rows, c }, &[(rows * c, probabilities), (rows * c, probabilities)]));
    all.push(case(
        "kl_rows one-hot",
        Op::KlRows { rows, c },
        &[(rows * c, Fill::OneHot(c)), (rows * c, probabilities)],
    ));
    for temperature in [1.0, 0.07, 4.0] {
        all.push(case("softmax", Op::Softmax { rows, c, temperature }, &[(rows * c, U)]));
        all.push(case("log_softmax", Op::LogSoftmax { rows, c, temperature }, &[(rows * c, U)]));
    }

    let d = Linear { rows: size(3, 61), c_in: size(4, 50), c_out: size(2, 35) };
    let (x, w, b) = ((d.rows * d.c_in, U), (d.c_out * d.c_in, U), (d.c_out, U));
    all.push(case("linear", Op::Linear(d), &[x, w]));
    all.push(case("linear", Op::Linear(d), &[x, w, b]));
    for (trans_a, trans_b) in [(false, false), (true, false), (false, true), (true, true)] {
        let dims = Gemm { m: size(3, 33), n: size(2, 21), k: size(4, 45), trans_a, trans_b };
        let inputs = [(dims.m * dims.k, U), (dims.k * dims.n, U)];
        all.push(case("matmul", Op::MatMul { dims, alpha: 0.5 }, &inputs));
    }
    for (kh, stride, pad, groups) in [(1, 1, 0, 1), (3, 2, 1, 1), (3, 1, 1, 4), (3, 2, 1, 2)] {
        let c = 4;
        let d = Conv2d { batch: 2, h: size(3, 7), w: size(4, 6), c_in: c, c_out: c, kh, kw: kh, stride, pad, groups };
        let (x, w, b) = ((2 * d.h * d.w * c, U), (d.weights(), U), (c, U));
        all.push(case("conv2d", Op::Conv2d(d), &[x, w]));
        all.push(case("conv2d", Op::Conv2d(d), &[x, w, b]));
    }

    let d = Conv2d { batch: 2, h: 5, w: 6, c_in: 3, c_out: 6, kh: 3, kw: 3, stride: 2, pad: 1, groups: 3 };
    all.push(case("conv2d multiplied", Op::Conv2d(d), &[(2 * 5 * 6 * 3, U), (d.weights(), U), (6, U)]));

    for (w_row, w_col, subtract_entropy, scale) in
        [(0.5, 0.5, false, 14.3), (0.3, 0.9, true, 100.0), (1.0, 0.0, true, 1.0), (0.0, 1.0, false, 50.0)]
    {
        let (rows, cols, dim) = if large { (37, 41, 67) } else { (3, 4, 5) };
        let d = Contrastive { rows, cols, dim, w_row, w_col, subtract_entropy };
        let inputs = |how: Fill, row: Fill, col: Fill| {
            [
                (rows * dim, how),
                (cols * dim, how),
                (1, Fill::Uniform(0.0, scale)),
                (rows * cols, row),
                (rows * cols, col),
            ]
        };
        // Logits of ±100 in f32 carry an absolute error of 1e-5, which exponentials turn into a relative one.
        let tolerance = 1e-5 * f64::from(scale.max(5.0)) / 5.0;
        let soft = inputs(Fill::Unit(dim), Fill::Probabilities(cols), Fill::Probabilities(rows));
        all.push(Case { tolerance, ..case("contrastive", Op::Contrastive(d), &soft) });
        let hard = inputs(Fill::Unit(dim), Fill::OneHot(cols), Fill::OneHot(rows));
        all.push(Case { tolerance, ..case("contrastive one-hot", Op::Contrastive(d), &hard) });
        let opposed = inputs(Fill::Opposed(dim), Fill::OneHot(cols), Fill::Probabilities(rows));
        all.push(Case { tolerance, ..case("contrastive cosines of 1 and -1", Op::Contrastive(d), &opposed) });
    }
    for (widths, scale, embeddings) in [
        (&[][..], 14.3, Fill::Unit as fn(usize) -> Fill),
        (&[5], 1.0, Fill::Unit),
        (&[4], 100.0, Fill::Unit),
        (&[3], 100.0, Fill::Opposed),
        (&[3, 6], 14.3, Fill::Unit),
    ] {
        let (batch, dim) = if large { (37, 67) } else { (6, 5) };
        let dims: &'static Relational = Box::leak(Box::new(Relational::whole(batch, dim, widths)));
        // Captions 0 and 3 are equal; images 1 and 2 are mixed, 4 shows nothing of its own caption.
        let leak = |ids: Vec<i32>| -> &'static [i32] { Box::leak(ids.into_boxed_slice()) };
        let group: Vec<i32> = (0..batch as i32).map(|j| if j == 3 { 0 } else { j }).collect();
        let other: Vec<i32> =
            group.iter().map(|&g| [0, 2, 1, 0, 5][g.clamp(0, 4) as usize].max(if g > 4 { g } else { 0 })).collect();
        let op = Op::Relational { dims, own: leak(group.clone()), other: leak(other), group: leak(group) };
        let [mut keep, mut share, mut total] = [0; 3].map(|_| vec![1.0f32; batch]);
        (keep[1], keep[2], keep[4]) = (0.75, 0.3, 0.0);
        (share[0], share[3]) = (0.5, 0.5);
        // Σ_i p_row[i, j]: column 1 has ¾ of image 1 and 0.7 of image 2; column 4 nothing; column 5 image 4 too.
        (total[1], total[2], total[4], total[5]) = (0.75 + 0.7, 0.25 + 0.3, 0.0, 2.0);
        let given = |v: Vec<f32>| Fill::Given(Box::leak(v.into_boxed_slice()));
        let mut inputs = vec![
            (batch * dim, embeddings(dim)),
            (batch * dim, embeddings(dim)),
            (1, Fill::Uniform(0.0, scale)),
            (batch, given(keep)),
            (batch, given(share)),
            (batch, given(total)),
        ];
        inputs
            .extend(widths.iter().flat_map(|&k| [(batch * k, Fill::Uniform(scale, 0.0)), (batch * k, Fill::Unit(k))]));
        let tolerance = 1e-5 * f64::from(scale.max(5.0)) / 5.0;
        all.push(Case { tolerance, ..case("relational", op, &inputs) });
    }
    all
}
