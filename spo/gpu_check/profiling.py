"""What the GPU does in an iteration: its largest operations, and how long it waits for the host."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from spo.gpu_check.card import synchronize

ROWS = 20


def profile(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, Any]:
    """Returns, for each call, the share of its time in which the GPU is idle and its largest kernels.

    One stream: kernels do not overlap, so their times add up. On a CPU: its operations.
    """
    return {name: _one(call, device) for name, call in calls.items()}


def _one(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    call()
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    seconds = time.perf_counter() - began
    kinds = [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=kinds, acc_events=True) as profiler:
        call()
        synchronize(device)
    wanted = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    averages = [
        e for e in profiler.key_averages() if e.device_type == wanted and not e.is_user_annotation
    ]
    times = {e.key: (_self_seconds(e, device), e.count) for e in averages}
    busy = sum(each for each, _ in times.values())
    largest = sorted(times.items(), key=lambda item: -item[1][0])[:ROWS]
    rows = [{"name": n[:90], "calls": c, "seconds": s, "share": s / busy} for n, (s, c) in largest]
    return {
        "seconds": seconds,
        "idle_share": 1 - busy / seconds,
        "kernels": len(times),
        "largest": rows,
    }


def _self_seconds(event: Any, device: torch.device) -> float:
    kind = "device" if device.type == "cuda" else "cpu"
    return getattr(event, f"self_{kind}_time_total") / 1e6
