"""What the GPU does in an iteration: its largest operations, and how long it waits for the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from spo.gpu_check.card import median_seconds
from spo.models.gpu import now

ROWS = 20


def profile(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, Any]:
    """Returns, for each call, the share of its time in which the GPU is idle and its largest kernels.

    One stream: kernels do not overlap, so their times add up. On a CPU: its operations.
    """
    return {name: _one(call, device) for name, call in calls.items()}


def _one(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    seconds = median_seconds(call, device, repeats=1, warm_up=1)
    # The host's side would slow the kernels down.
    kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        call()
        now(device)  # waits
    times = {e.key: (_self_seconds(e, device), e.count) for e in profiler.key_averages()}
    busy = sum(each for each, _ in times.values())
    largest = sorted(times.items(), key=lambda item: -item[1][0])[:ROWS]
    return {
        "seconds": seconds,
        "idle_share": 1 - busy / seconds,
        "kernels": sum(count for _, count in times.values()),
        "largest": [
            {"name": name[:120], "calls": count, "seconds": each, "share": each / busy}
            for name, (each, count) in largest
        ],
    }


def _self_seconds(event: Any, device: torch.device) -> float:
    kind = "device" if device.type == "cuda" else "cpu"
    return getattr(event, f"self_{kind}_time_total") / 1e6
