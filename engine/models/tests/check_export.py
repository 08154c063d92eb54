"""Loads what `export_samples` wrote into timm and open_clip, strictly, and compares the embeddings.

    cargo run -p mcpipe-models --example export_samples -- DIRECTORY
    python check_export.py DIRECTORY        # torch, timm, open_clip_torch, safetensors

Also loads one timm file: `python check_export.py FILE MODEL NUM_CLASSES`, and compares a folded one with the file that
`mcpipe export --reparam` made it from: `python check_export.py FILE MODEL NUM_CLASSES FOLDED`.
"""

import pathlib
import sys

import open_clip
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file


def load_timm(file, model, num_classes, **kwargs):
    model = timm.create_model(model, num_classes=num_classes, **kwargs)
    model.load_state_dict(load_file(file))  # strict
    return model.eval()


def gap(a, b):
    return (a - b).abs().max().item()


@torch.no_grad()
def check(directory):
    expected = load_file(directory / "expected.safetensors")
    pixels = expected["pixels"].permute(0, 3, 1, 2)
    clip = open_clip.create_model(f"local-dir:{directory}")
    clip.load_state_dict(load_file(directory / "open_clip_model.safetensors"))  # strict
    clip.eval()
    worst = gap(clip.encode_image(pixels), expected["image"]), gap(clip.encode_text(expected["ids"]), expected["text"])
    line = f"{directory.name}: open_clip image {worst[0]:.1e} text {worst[1]:.1e}"
    file = directory / "timm.safetensors"
    if file.exists():
        with safe_open(file, "pt") as f:
            name = f.metadata()["mcpipe.backbone"]
            head = timm.models.get_pretrained_cfg(name).classifier
            key = f"{head}.weight"
            classes = f.get_slice(key).get_shape()[0] if key in f.keys() else 0
        model = load_timm(file, name, classes)
        out = model(pixels)
        if classes:
            worst += (gap(out, expected["image"]),)
            line += f", timm {worst[2]:.1e}"
        else:
            line += f", timm gives features {list(out.shape)}"
    print(line)
    assert max(worst) < 1e-4, "embeddings differ"


@torch.no_grad()
def check_folded(file, model, num_classes, folded):
    """The folded file against timm's own folding, tensors and outputs."""
    branches = load_timm(file, model, num_classes)
    ours = load_timm(folded, model, num_classes, inference_mode=True)
    theirs = timm.utils.reparameterize_model(branches).state_dict()
    tensors = max(gap(t, theirs[name]) for name, t in ours.state_dict().items() if t.is_floating_point())
    x = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    expected = branches(x)
    outputs = gap(ours(x), expected) / expected.abs().max().item()
    print(f"loaded strictly; tensors differ from timm's by {tensors:.1e}, outputs by {outputs:.1e} relative")
    assert max(tensors, outputs) < 1e-5


if __name__ == "__main__":
    if len(sys.argv) == 5:
        check_folded(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
    elif len(sys.argv) == 4:
        load_timm(sys.argv[1], sys.argv[2], int(sys.argv[3]))
        print("loaded strictly")
    else:
        for directory in sorted(p for p in pathlib.Path(sys.argv[1]).resolve().iterdir() if p.is_dir()):
            check(directory)
