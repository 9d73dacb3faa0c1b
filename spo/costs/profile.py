"""Where the time of an iteration goes, operation by operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from spo.costs.measure import run_iteration
from spo.costs.meter import Meter, Models
from spo.launch.batch_plan import BatchPlan

_ROWS, _NAME = 30, 70  # operations in the table; letters of a name


def profile_iteration(models: Models, plan: BatchPlan) -> str:
    """A table of the operations that the device spends most time on, and where the rest goes.

    Meant for models that have warmed up. On a GPU an operation's time is that of its kernels.
    """
    device = models.backbone.device
    meter, on_gpu = Meter(device), device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        started = meter.now()
        run_iteration(models, plan, meter, apart=False)
        wall = meter.now() - started
    events = profiler.key_averages()
    operations = [e for e in events if e.device_type == DeviceType.CPU]
    kind = "self_device_time_total" if on_gpu else "self_cpu_time_total"  # without what it calls

    def seconds(events: Sequence[Any]) -> float:
        return sum(getattr(event, kind) for event in events) / 1e6

    # Compiled kernels belong to no operation: all of a GPU's are more than the operations' own.
    busy = seconds([e for e in events if e.device_type != DeviceType.CPU] if on_gpu else operations)
    operations = sorted(operations, key=lambda e: seconds([e]), reverse=True)[:_ROWS]
    rows = [(e.key[:_NAME], str(e.count), seconds([e])) for e in operations]
    rows += [("other operations and kernels", "", busy - seconds(operations))]
    rows += [("none: the device waits, or Python runs", "", wall - busy)]
    lines = [f"One iteration on {device}, profiled: {wall:.4g} s", ""]
    lines += [f"{'operation':<{_NAME}} {'calls':>8} {'seconds':>10} {'share':>7}"]
    lines += [f"{name:<{_NAME}} {n:>8} {s:>10.4g} {s / wall:>7.1%}" for name, n, s in rows]
    return "\n".join(lines) + "\n"
