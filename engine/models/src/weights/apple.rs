//! Apple's names of MobileCLIP and FastViT, turned into timm's and open_clip's.
//!
//! The renames are those that timm's FastViT and open_clip's MobileCLIP loaders make, so that a file of Apple's gives
//! here what it gives there.

use super::element::Element;
use super::rules::{Form, Rule, Slots, apply};
use super::slot::Slot;

/// Prefix of the image tower in a MobileCLIP file.
const IMAGE: &str = "image_encoder.model.";
/// A tensor by which Apple's FastViT is known.
const STEM: &str = "patch_embed.0.rbr_conv.0.conv.weight";

/// Names of the text towers: a plain transformer (MobileCLIP-S1, -S2), and one between two RepMixer blocks (-S0), whose
/// names within a block stay Apple's.
const TEXT: &[Rule] = &[
    Rule::rename("text_encoder.embedding_layer.**", "text.token_embedding.**"),
    Rule {
        from: "text_encoder.positional_embedding.pos_embed.pos_embed",
        to: "text.positional_embedding",
        form: Form::Squeezed,
    },
    Rule::rename("text_encoder.final_layer_norm.**", "text.ln_final.**"),
    Rule::rename("text_encoder.projection_layer", "text.text_projection"),
    Rule::rename("text_encoder.transformer.*.token_mixer.**", "text.transformer.resblocks.*.token_mixer.**"),
    Rule::rename("text_encoder.transformer.*.convffn.**", "text.transformer.resblocks.*.convffn.**"),
    Rule::rename("text_encoder.transformer.*.layer_scale", "text.transformer.resblocks.*.layer_scale"),
    Rule::rename("text_encoder.transformer.*.pre_norm_mha.0.**", "text.transformer.resblocks.*.ln_1.**"),
    Rule::rename(
        "text_encoder.transformer.*.pre_norm_mha.1.qkv_proj.weight",
        "text.transformer.resblocks.*.attn.in_proj_weight",
    ),
    Rule::rename(
        "text_encoder.transformer.*.pre_norm_mha.1.qkv_proj.bias",
        "text.transformer.resblocks.*.attn.in_proj_bias",
    ),
    Rule::rename(
        "text_encoder.transformer.*.pre_norm_mha.1.out_proj.**",
        "text.transformer.resblocks.*.attn.out_proj.**",
    ),
    Rule::rename("text_encoder.transformer.*.pre_norm_ffn.0.**", "text.transformer.resblocks.*.ln_2.**"),
    Rule::rename("text_encoder.transformer.*.pre_norm_ffn.1.**", "text.transformer.resblocks.*.mlp.c_fc.**"),
    Rule::rename("text_encoder.transformer.*.pre_norm_ffn.4.**", "text.transformer.resblocks.*.mlp.c_proj.**"),
];

/// Whether the tensors are Apple's.
pub(super) fn is_apple(tensors: &Slots) -> bool {
    tensors.contains_key(STEM) || tensors.contains_key(&format!("{IMAGE}{STEM}"))
}

/// The tensors under `visual.trunk.`, `text.` and `logit_scale` of open_clip, or, of an image tower by itself, under
/// timm's names.
///
/// # Errors
/// Two tensors of one name, or a projection that is no matrix.
pub(super) fn from_apple(tensors: Slots) -> Result<Slots, String> {
    let (file, ours) = if tensors.contains_key(STEM) { ("", "") } else { (IMAGE, "visual.trunk.") };
    let clip = !file.is_empty();
    let ends = stage_ends(tensors.keys().filter_map(|name| name.strip_prefix(file)));
    let mut out = Slots::new();
    let mut rest = Slots::new();
    for (name, slot) in tensors {
        let Some(trunk) = name.strip_prefix(file) else {
            rest.insert(name, slot);
            continue;
        };
        let (new, slot) = if trunk == "head.proj" {
            // CLIP's projection x·W becomes a linear layer's Wᵀ with a bias of zeros.
            let slot = slot.transposed().map_err(|e| format!("`{name}`: {e}"))?;
            let bias = Slot::zeros(Element::F32, slot.shape[..1].to_vec());
            out.insert(format!("{ours}head.fc.bias"), bias);
            ("head.fc.weight".to_owned(), slot)
        } else {
            (timm_name(trunk, &ends), slot)
        };
        let new = format!("{ours}{new}");
        if out.insert(new.clone(), slot).is_some() {
            return Err(format!("two tensors would be called `{new}`"));
        }
    }
    if clip {
        rest = apply(TEXT, rest)?;
    }
    out.extend(rest);
    Ok(out)
}

/// Positions in Apple's flat `network` that end a stage: those of the downsampling layers, in order.
fn stage_ends<'a>(names: impl Iterator<Item = &'a str>) -> Vec<usize> {
    let end = |name: &str| {
        let (at, inner) = name.strip_prefix("network.")?.split_once('.')?;
        inner.starts_with("proj.").then(|| at.parse().ok()).flatten()
    };
    let mut ends: Vec<usize> = names.filter_map(end).collect();
    ends.sort_unstable();
    ends.dedup();
    ends
}

/// timm's name of a tensor of the trunk.
fn timm_name(name: &str, ends: &[usize]) -> String {
    let mut segments: Vec<String> = Vec::new();
    let mut parts = name.split('.').peekable();
    if parts.peek() == Some(&"network") {
        parts.next();
        let at: usize = parts.next().and_then(|n| n.parse().ok()).unwrap_or_default();
        // A downsampling layer belongs to the stage that it leads to.
        segments.extend(["stages".to_owned(), ends.partition_point(|&end| end <= at).to_string()]);
        match parts.peek() {
            Some(&"proj") => segments.push("downsample".into()),
            Some(&"pe") => {
                parts.next();
                segments.extend(["pos_emb".to_owned(), "pos_enc".to_owned()]);
            }
            _ => segments.push("blocks".into()),
        }
    }
    let (mut in_se, mut first) = (false, segments.is_empty());
    for part in parts {
        let new = match part {
            "patch_embed" => "stem",
            "rbr_conv" => "conv_kxk",
            "rbr_scale" => "conv_scale",
            "rbr_skip" => "identity",
            "conv_exp" => "final_conv",
            "lkb_origin" => "large_conv",
            "convffn" => "mlp",
            "reduce" if in_se => "fc1",
            "expand" if in_se => "fc2",
            "layer_scale" | "layer_scale_1" | "layer_scale_2" => {
                segments.extend([part.to_owned(), "gamma".to_owned()]);
                (in_se, first) = (false, false);
                continue;
            }
            "dist_head" => "head_dist",
            "head" if first => {
                segments.extend(["head".to_owned(), "fc".to_owned()]);
                first = false;
                continue;
            }
            other => other,
        };
        (in_se, first) = (part == "se", false);
        segments.push(new.to_owned());
    }
    segments.join(".")
}
