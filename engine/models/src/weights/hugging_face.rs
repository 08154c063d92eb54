//! Hugging Face's names: `CLIPModel`'s, turned into open_clip's, and older forms of `BertModel`'s.

use super::rules::{Form, Rule, Slots, apply};

/// A tensor by which a `CLIPModel` is known, of either tower.
const CLIP: [&str; 2] = ["vision_model.embeddings.class_embedding", "text_model.embeddings.token_embedding.weight"];
/// A tensor by which a `BertModel` is known, by itself or within a model with a head.
const BERT: [&str; 2] = ["embeddings.word_embeddings.weight", "bert.embeddings.word_embeddings.weight"];

const fn of(from: &'static str, to: &'static str, form: Form) -> Rule {
    Rule { from, to, form }
}

const CLIP_RULES: &[Rule] = &[
    Rule::rename("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    Rule::rename("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
    Rule::rename("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    Rule::rename("vision_model.pre_layrnorm.**", "visual.ln_pre.**"),
    Rule::rename("vision_model.post_layernorm.**", "visual.ln_post.**"),
    of("visual_projection.weight", "visual.proj", Form::Transposed),
    Rule::rename("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    Rule::rename("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    Rule::rename("text_model.final_layer_norm.**", "ln_final.**"),
    of("text_projection.weight", "text_projection", Form::Transposed),
];

/// One tower's blocks: the tower's prefix there and here.
macro_rules! blocks {
    ($from:literal, $to:literal) => {
        [
            part(concat!($from, "*.self_attn.q_proj.weight"), concat!($to, "*.attn.in_proj_weight"), 0),
            part(concat!($from, "*.self_attn.k_proj.weight"), concat!($to, "*.attn.in_proj_weight"), 1),
            part(concat!($from, "*.self_attn.v_proj.weight"), concat!($to, "*.attn.in_proj_weight"), 2),
            part(concat!($from, "*.self_attn.q_proj.bias"), concat!($to, "*.attn.in_proj_bias"), 0),
            part(concat!($from, "*.self_attn.k_proj.bias"), concat!($to, "*.attn.in_proj_bias"), 1),
            part(concat!($from, "*.self_attn.v_proj.bias"), concat!($to, "*.attn.in_proj_bias"), 2),
            Rule::rename(concat!($from, "*.self_attn.out_proj.**"), concat!($to, "*.attn.out_proj.**")),
            Rule::rename(concat!($from, "*.layer_norm1.**"), concat!($to, "*.ln_1.**")),
            Rule::rename(concat!($from, "*.layer_norm2.**"), concat!($to, "*.ln_2.**")),
            Rule::rename(concat!($from, "*.mlp.fc1.**"), concat!($to, "*.mlp.c_fc.**")),
            Rule::rename(concat!($from, "*.mlp.fc2.**"), concat!($to, "*.mlp.c_proj.**")),
        ]
    };
}

const fn part(from: &'static str, to: &'static str, at: usize) -> Rule {
    of(from, to, Form::Part(at, 3))
}

const VISION_BLOCKS: [Rule; 11] = blocks!("vision_model.encoder.layers.", "visual.transformer.resblocks.");
const TEXT_BLOCKS: [Rule; 11] = blocks!("text_model.encoder.layers.", "transformer.resblocks.");

/// A model with a head holds its encoder under `bert.`; files converted from TensorFlow call a norm's scale and shift
/// gamma and beta.
const BERT_RULES: &[Rule] = &[
    Rule::rename("bert.**.LayerNorm.gamma", "**.LayerNorm.weight"),
    Rule::rename("bert.**.LayerNorm.beta", "**.LayerNorm.bias"),
    Rule::rename("bert.**", "**"),
    Rule::rename("**.LayerNorm.gamma", "**.LayerNorm.weight"),
    Rule::rename("**.LayerNorm.beta", "**.LayerNorm.bias"),
];

/// Whether the tensors are a `CLIPModel`'s, or one of its towers'.
pub(super) fn is_clip(tensors: &Slots) -> bool {
    CLIP.iter().any(|name| tensors.contains_key(*name))
}

/// The tensors under the names of open_clip's `CLIP`.
///
/// # Errors
/// A query, key or value that is missing, a projection that is no matrix.
pub(super) fn from_clip(tensors: Slots) -> Result<Slots, String> {
    let rules: Vec<Rule> = [CLIP_RULES, &VISION_BLOCKS, &TEXT_BLOCKS].concat();
    apply(&rules, tensors)
}

/// Whether the tensors are a `BertModel`'s.
pub(super) fn is_bert(tensors: &Slots) -> bool {
    BERT.iter().any(|name| tensors.contains_key(*name))
}

/// The tensors under the names of `BertModel` as it is written today.
///
/// # Errors
/// Two tensors of one name.
pub(super) fn from_bert(tensors: Slots) -> Result<Slots, String> {
    apply(BERT_RULES, tensors)
}
