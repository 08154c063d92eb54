"""PyTorch's side of `tests/bench/run`: timm's model, one training step (forward, backward, AdamW) and one eval forward.

Prints one line of JSON: {"mode": ..., "train": images/s, "eval": images/s, "peak_mb": ...}. Needs torch and timm.
Arguments: model, image size, batch, threads, seconds per figure, mode (nchw, channels_last, compile), then `bf16`
(autocast) and `eval` (no training) as asked.
"""
import contextlib
import json
import resource
import sys
import time

import timm
import torch

name, size, batch, threads, seconds, mode = sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5]), sys.argv[6]
words = sys.argv[7:]
torch.set_num_threads(threads)
torch.manual_seed(0)


def precision():
    return torch.autocast("cpu", dtype=torch.bfloat16) if "bf16" in words else contextlib.nullcontext()


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


model = timm.create_model(name, num_classes=512)
x = torch.randn(batch, 3, size, size)
if mode != "nchw":
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
run = torch.compile(model) if mode == "compile" else model


def train():
    with precision():
        loss = run(x).float().square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def evaluate():
    with torch.no_grad(), precision():
        run(x)


evaluated = rate(evaluate) if model.eval() else None
trained = None
if "eval" not in words:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trained = rate(train)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
print(json.dumps({"mode": mode, "train": trained, "eval": evaluated, "peak_mb": round(peak, 1)}), flush=True)
