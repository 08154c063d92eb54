"""PyTorch's side of `tests/bench/run`: timm's model, one training step (forward, backward, AdamW) and one eval forward.

Prints one line of JSON per layout: {"mode": ..., "train": images/s, "eval": images/s}.
Needs torch and timm. Arguments: model, image size, batch, threads, seconds per figure, modes (comma-separated).
"""
import json
import sys
import time

import timm
import torch

name, size, batch, threads, seconds = sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5])
modes = sys.argv[6].split(",")
torch.set_num_threads(threads)


def rate(step):
    """Images/s from the median time of a step, over `seconds`, after three warm-up steps."""
    for _ in range(3):
        step()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return round(batch / sorted(times)[len(times) // 2], 2)


for mode in modes:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=512).train()
    x = torch.randn(batch, 3, size, size)
    if mode != "nchw":
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    run = torch.compile(model) if mode == "compile" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def train():
        run(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def evaluate():
        with torch.no_grad():
            run(x)

    trained = rate(train)
    model.eval()
    print(json.dumps({"mode": mode, "train": trained, "eval": rate(evaluate)}), flush=True)
