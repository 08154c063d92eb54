"""Loads what `export_samples` wrote into timm and open_clip, strictly, and compares the embeddings.

    cargo run -p mcpipe-models --example export_samples -- DIRECTORY
    python check_export.py DIRECTORY        # torch, timm, open_clip_torch, safetensors

Also loads one timm file: `python check_export.py FILE MODEL NUM_CLASSES`.
"""

import pathlib
import sys

import open_clip
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file


def load_timm(file, model, num_classes):
    model = timm.create_model(model, num_classes=num_classes)
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
            classes = f.get_slice("head.fc.weight").get_shape()[0] if "head.fc.weight" in f.keys() else 0
        model = load_timm(file, name, classes)
        out = model(pixels)
        if classes:
            worst += (gap(out, expected["image"]),)
            line += f", timm {worst[2]:.1e}"
        else:
            line += f", timm gives features {list(out.shape)}"
    print(line)
    assert max(worst) < 1e-4, "embeddings differ"


if __name__ == "__main__":
    if len(sys.argv) == 4:
        load_timm(sys.argv[1], sys.argv[2], int(sys.argv[3]))
        print("loaded strictly")
    else:
        for directory in sorted(p for p in pathlib.Path(sys.argv[1]).resolve().iterdir() if p.is_dir()):
            check(directory)
