"""What the machine is: versions, and the speed of its largest products and copies."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from typing import Any

import torch

from spo.gpu_check.checks import Place
from spo.models.gpu import now
from spo.run.folder import versions


def card(place: Place) -> dict[str, Any]:
    """Returns versions, the card's name and memory, and its peaks."""
    device = torch.device(place.device)
    found: dict[str, Any] = {"packages": versions()}
    found["name"] = platform.processor() or platform.machine()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["name"], found["memory_gib"] = properties.name, properties.total_memory / 2**30
        found["cuda"], found["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    found |= peaks(device, size=256 if place.small else 8192)
    text = f"{found['name']}, torch {found['packages']['torch']}, "
    text += (
        f"16-bit product {found['tflops_16_bit']:.0f} TFLOP/s, copy {found['copied_tb_s']:.2f} TB/s"
    )
    return {"summary": text, **found, "failures": []}


def peaks(device: torch.device, size: int) -> dict[str, float]:
    """Returns the TFLOP/s of (size, size) products and the TB/s of a copy, read and written."""
    found = {}
    kinds = {"16_bit": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
    for name, dtype in kinds.items():
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = median_seconds(lambda a=left, b=right: a @ b, device)
        found[f"tflops_{name}"] = 2 * size**3 / seconds / 1e12
    source = torch.empty(size * size, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), device)
    found["copied_tb_s"] = 2 * 4 * size * size / seconds / 1e12
    return found


def median_seconds(
    call: Callable[[], object], device: torch.device, repeats: int = 7, warm_up: int = 2
) -> float:
    """Returns the median seconds of a call, the device's work included."""
    seconds = []
    for _ in range(warm_up + repeats):
        began = now(device)
        call()
        seconds.append(now(device) - began)
    return statistics.median(seconds[warm_up:])
