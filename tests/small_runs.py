"""Runs of seconds, in this process or in several: what the tests of resuming need."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from spo.command_line.config_files import load_config
from spo.errors import UserError
from spo.method import start
from spo.method.losses import GradSPO
from spo.method.start import train
from spo.models.minibatch_unet import MinibatchUNet
from tests.pretend_cuda import make_graphed_callables

ROOT = Path(__file__).resolve().parent.parent
LORA = "pytorch_lora_weights.safetensors"
UNEQUAL = ("seconds_rollout", "seconds_train", "images_per_second", "peak_memory_gib")
UNEQUAL += ("seconds_evaluation", "seconds_judging")
# Two epochs of two rollouts of 4 pairs and minibatches, of which 3 make an update.
SIZES = {
    "algorithm": "tests.small_runs:SignallingGradSPO",
    "prompts.num": 4,
    "num_epochs": 2,
    "checkpoint_limit": 0,
    "eval.num_images": 2,
    "eval.batch_size": 1,
    "eval.num_steps": 2,
    "sample.batch_size": 2,
    "sample.num_steps": 4,
    "sample.branch_from": 2,
    "sample.num_candidates": 2,
    "sample.threshold": 0.0,
    "train.batch_size": 1,
    "train.gradient_accumulation_steps": 3,
}
# On top of these: candidates judged by a latent reward model as they are drawn.
_MODELS = "tests/data/golden/models"
OF_SDXL = {"family": "sdxl", "pretrained.model": f"{_MODELS}/tiny-sdxl"}


def judged(family, **changes):
    """Changes of a small run, judged by the tiny latent reward model of a family."""
    kwargs = {name: f"{_MODELS}/{kind}-{family}" for name, kind in _KINDS.items()}
    judge = {"preference.scorer": "latent_reward", "preference.kwargs": kwargs}
    return judge | (OF_SDXL if family == "sdxl" else {}) | changes


_KINDS = {"checkpoint": "tiny-lrm", "base": "tiny"}
LPO = {"algorithm": "lpo", "train.beta": 500.0, "sample.threshold": None} | {
    "sample.threshold_schedule": "sigma",
    "sample.threshold_min": 0.0,
    "sample.threshold_max": 0.1,
}
JUDGED = {
    "lpo_sd15": judged("sd15", **LPO),
    "lpo_sdxl": judged("sdxl", **LPO),
    "gradspo_lrm_sd15": judged("sd15"),
    "gradspo_lrm_sdxl": judged("sdxl"),
}
minibatches = 0


@dataclass(frozen=True)
class SignallingGradSPO(GradSPO):
    """GradSPO, which sends this process the signal of SIGNAL before the minibatch of SIGNAL_AT.

    The loss of minibatch NAN_AT is not a number; for minibatch FULL_AT a GPU's memory is full.
    """

    def __call__(self, predictions, pairs, sampler):
        global minibatches
        minibatches += 1
        if minibatches == int(os.environ.get("SIGNAL_AT", 0)):
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
        if minibatches == int(os.environ.get("FULL_AT", 0)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        output = super().__call__(predictions, pairs, sampler)
        if minibatches == int(os.environ.get("NAN_AT", 0)):
            output = replace(output, loss=output.loss * torch.nan)
        return output


def small_config(folder: Path, **changes):
    """The config of a small run in `folder`; the keys of `changes` have __ for a dot."""
    config = load_config(str(ROOT / "tests" / "data" / "random_models.py"))
    own = {"logdir": str(folder.parent), "run_name": folder.name, "resume_from": "auto"}
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    with config.unlocked():  # preference.kwargs takes any name
        config.update_from_flattened_dict(SIZES | own | changes)
    return config


def run(folder: Path, **changes) -> Path:
    """Train a small run in this process, from its newest checkpoint if there is one."""
    train(small_config(folder, **changes))
    return folder


def run_in_processes(
    folder: Path, count: int, environments: Mapping[int, Mapping[str, str]] | None = None, **changes
) -> list[int]:
    """Train a small run in `count` processes, and return their exit statuses.

    `environments` has further environment variables for some of the processes, by rank; with GRAPHS
    they pretend to record CUDA graphs.
    """
    # A server that has loaded the libraries once forks the processes.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.small_runs"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(count):
        environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        if count > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        environment |= (environments or {}).get(rank, {})
        process = context.Process(target=_process, args=(folder, environment, changes))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(timeout=300)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _process(folder: Path, environment: Mapping[str, str], changes: dict) -> None:
    os.environ |= environment
    os.chdir(ROOT)
    output = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if environment.get("GRAPHS"):
        torch.cuda.graph_pool_handle = object
        torch.cuda.make_graphed_callables = make_graphed_callables
        start.minibatch_unet = lambda backbone, _: MinibatchUNet(backbone.unet, record=True)
    try:
        run(folder, **changes)
    except UserError as error:
        print(f"{error.label}: {error}", flush=True)
        os._exit(error.exit_status)


def read_metrics(run_dir: Path) -> list[dict]:
    """Lines of metrics.jsonl without what no two runs share."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in UNEQUAL} for line in lines]


def differences(whole: Path, other: Path) -> list[str]:
    """The results in which two complete runs differ."""
    names = [p.relative_to(whole) for p in whole.glob("validation/*.png")]
    names += [name for name in (Path(LORA), Path("ema", LORA)) if (whole / name).exists()]
    different = [
        str(n)
        for n in names
        if not (other / n).exists() or (whole / n).read_bytes() != (other / n).read_bytes()
    ]
    if read_metrics(whole) != read_metrics(other):
        different.append("metrics.jsonl")
    return different
