"""The GPUs of this machine: whether torch can use them, and what memory they have left."""

import contextlib
import os
import subprocess
import time
import warnings
from collections.abc import Iterator

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import check_cuda_p2p_ib_support, parse_flag_from_env

from spo.errors import RunError, UserError, first_line

_DRIVERS = {"12": "525", "13": "580"}  # the oldest for each CUDA, of NVIDIA's release notes
TRAINING_KEYS = "lower train.batch_size, or set train.gradient_checkpointing=true"


def pick_device() -> torch.device:
    """Returns the device of this process; raises the error of `check_driver`."""
    check_driver()
    return PartialState().device


def check_driver() -> None:
    """Raises UserError for GPUs that torch counts but cannot use: accelerate would take the CPU.

    torch counts GPUs without starting CUDA, so also under a driver that is too old. GPUs that cannot
    talk directly under an old driver will talk through the CPU, as `accelerate launch` lets them.
    """
    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.device_count():
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason, which torch.cuda.init raises again
        usable = torch.cuda.is_available()
    if usable:
        if not check_cuda_p2p_ib_support():  # several GeForce RTX 40: accelerate would refuse them
            for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
                os.environ.setdefault(name, "1")
        return
    try:
        torch.cuda.init()
    except RuntimeError as error:
        cuda = torch.version.cuda or ""
        oldest = _DRIVERS.get(cuda.partition(".")[0])
        raise UserError(
            f"torch {torch.__version__}, built for CUDA {cuda}, cannot use the GPU under driver "
            f"{_ask_nvidia_smi('driver_version') or 'unknown'} ({first_line(error)}); install driver "
            f"{oldest or 'of that CUDA'} or newer, or a torch for an older CUDA: pip install torch "
            "torchvision --index-url https://download.pytorch.org/whl/cu126"
        ) from error


def now(device: torch.device) -> float:
    """Returns the seconds on a clock, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_memory(device: str, processes: int) -> tuple[float, float]:
    """Returns bytes of memory: those that each process can have, and those that others hold.

    `processes` share a CPU's free memory, or have a GPU each: the numbers of the fullest.
    """
    if device == "cuda":
        return min(map(_gpu_memory, range(processes)))
    return psutil.virtual_memory().available / processes, 0


def _gpu_memory(index: int) -> tuple[int, int]:
    # torch.cuda.mem_get_info would start CUDA on the GPU, which takes memory itself.
    gpu = torch.cuda.get_device_properties(index)
    free = _ask_nvidia_smi("memory.free", f"--id=GPU-{gpu.uuid}")  # in MiB
    free = int(free) * 2**20 if free.isdecimal() else gpu.total_memory
    return free, gpu.total_memory - free


def _ask_nvidia_smi(field: str, *options: str) -> str:
    """Returns a field of the first GPU that `options` leave, "" if nvidia-smi does not tell."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", *options]
    with contextlib.suppress(OSError):
        told = subprocess.run(command, capture_output=True, text=True)
        return "" if told.returncode else told.stdout.partition("\n")[0].strip()
    return ""


@contextlib.contextmanager
def memory_hint(work: str, keys: str) -> Iterator[None]:
    """Turns a GPU's lack of memory within the context into a RunError that names `keys` to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = first_line(error).partition(" If reserved")[0]  # torch's advice, which is taken
        raise RunError(
            f"{work} did not fit into the GPU's memory: {keys}; everything saved stays, and "
            f"resume_from=auto goes on from it ({reason})"
        ) from error
