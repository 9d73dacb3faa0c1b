"""Whole runs through the launcher and the scripts that users type, at tiny size."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from spo.gpu_check.checks import Place
from spo.run.checkpoint_folder import checkpoints

LINES = ("quality", "difference", "win", "faithful")  # of scripts/evaluate_tiny.py
LORA = "pytorch_lora_weights.safetensors"
LAUNCHER = ("-m", "spo.launch", "--num_processes", "1")
RANDOM = "tests/data/random_models.py"  # tiny models without anything to learn
# Four rollouts of two prompts, of a second or two.
SHORT = {
    "prompts.num": 8,
    "save_every_rollouts": 1,
    "eval_interval": 0,
    "sample.batch_size": 2,
    "sample.num_steps": 6,
    "sample.branch_from": 2,
    "train.batch_size": 2,
    "sample.threshold": 0.0,
}
SDXL = {"family": "sdxl", "pretrained.model": "tests/data/golden/models/tiny-sdxl"}


class Failed(RuntimeError):
    """A command that ended with a status other than 0; the message has the end of its output."""


def command(place: Place, name: str, config: str, *launcher: str, **changes: Any) -> list[str]:
    """Returns the command of a new training run named `name`, in the folder of the checks' runs."""
    shutil.rmtree(place.runs / name, ignore_errors=True)  # of the last time
    changes = {"logdir": place.runs, "run_name": name, "estimate_costs": False} | changes
    settings = [f"--config.{key}={value}" for key, value in changes.items()]
    return [
        sys.executable,
        *(launcher or start(place)),
        "train_sd15.py",
        f"--config={config}",
        *settings,
    ]


def start(place: Place) -> tuple[str, ...]:
    return (*LAUNCHER, "--cpu") if place.small else LAUNCHER


def call(arguments: list[str], **environment: str) -> str:
    """Runs a command and returns what it printed; raises Failed."""
    done = subprocess.run(
        arguments,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | environment,
    )
    if done.returncode:
        raise Failed(f"status {done.returncode}: {done.stdout[-1500:]}")
    return done.stdout


def tiny_world(place: Place, precision: str) -> dict[str, Any]:
    """Trains config/tiny.py, on half of its prompts, and compares the result with the base model."""
    name, began = f"tiny_{precision}", time.time()
    few = {"prompts.num": 16 if place.small else 64, "eval.num_images": 2}
    call(command(place, name, "config/tiny.py", mixed_precision=precision, **few))
    trained = time.time()
    run_dir, images = place.runs / name, "16" if place.small else "100"
    lines = call([sys.executable, "scripts/evaluate_tiny.py", str(run_dir), "--num_images", images])
    verdict = json.loads((run_dir / "tiny_world.json").read_text())
    gain = verdict["difference"]
    # Sixteen prompts teach next to nothing.
    failures = [] if place.small or gain["low"] > 0 else [f"no gain in quality: {gain}"]
    return {
        "summary": f"quality {gain['mean']:+.2f}, trained in {trained - began:.0f} s",
        "verdict": verdict,
        "lines": [line for line in lines.splitlines() if line.startswith(LINES)],
        "seconds_of_training": trained - began,
        "failures": failures,
    }


def killed_and_resumed(place: Place) -> dict[str, Any]:
    """Kills a run after its first checkpoint, resumes it, and compares it with one left alone."""
    changes = SHORT | {"mixed_precision": "no" if place.small else "fp16"}
    changes["deterministic"] = True
    call(command(place, "whole", RANDOM, **changes))
    killed = command(place, "killed", RANDOM, **changes, resume_from="auto")
    process = subprocess.Popen(killed, stdout=subprocess.DEVNULL, start_new_session=True)
    folder = place.runs / "killed"
    while process.poll() is None and not checkpoints(folder):
        time.sleep(0.02)
    was_running = process.poll() is None
    if was_running:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    call(killed)
    compared = compare(place.runs / "whole", folder)
    failures = unequal(compared)
    failures += [] if was_running else ["the run ended before it could be killed"]
    return {"summary": f"equal: {compared['equal']}", **compared, "failures": failures}


def repeated(place: Place, deterministic: str) -> dict[str, Any]:
    """Compares two runs of one seed bit for bit."""
    precision = "no" if place.small else "fp16"
    changes = SHORT | {"mixed_precision": precision, "deterministic": deterministic}
    names = [f"repeat_{deterministic}_{i}" for i in (1, 2)]
    for name in names:
        call(command(place, name, RANDOM, **changes))
    compared = compare(*(place.runs / name for name in names))
    failures = unequal(compared) if place.small or deterministic == "true" else []
    summary = f"equal: {compared['equal']}, largest difference {compared['difference']:.1e}"
    return {"summary": summary, **compared, "failures": failures}


def compare(one: Path, other: Path) -> Mapping[str, Any]:
    """Returns whether the LoRAs of two runs are equal, and their largest difference."""
    mine, theirs = (load_file(folder / LORA) for folder in (one, other))
    differences = [(mine[name] - theirs[name]).abs().max().item() for name in mine]
    return {"equal": max(differences) == 0, "difference": max(differences)}


def unequal(compared: Mapping[str, Any]) -> list[str]:
    return [] if compared["equal"] else [f"the LoRAs differ by {compared['difference']:.1e}"]


def recorded(place: Place) -> dict[str, Any]:
    """Compares a run whose passes over minibatches are CUDA graphs with one that runs as written."""
    changes = SHORT | SDXL | {"deterministic": True, "mixed_precision": low(place)}
    for graphs in (True, False):
        call(command(place, f"graphs_{graphs}", RANDOM, **changes, cuda_graphs=graphs))
    compared = compare(*(place.runs / f"graphs_{graphs}" for graphs in (True, False)))
    return {"summary": f"equal: {compared['equal']}", **compared, "failures": unequal(compared)}


def world_of_one(place: Place) -> dict[str, Any]:
    """Trains with DDP, NCCL and gloo in a group of one process, and compares with a run without."""
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"
    cpu = {"ACCELERATE_USE_CPU": "true"} if place.small else {}
    changes = SHORT | {"deterministic": True}
    call(command(place, "nccl", RANDOM, *launcher, **changes), **cpu)
    call(command(place, "alone", RANDOM, **changes))
    compared = compare(*(place.runs / name for name in ("nccl", "alone")))
    return {"summary": f"equal: {compared['equal']}", **compared, "failures": unequal(compared)}


def small_sdxl(place: Place) -> dict[str, Any]:
    """Trains SPO on a tiny SDXL in fp16, with a preference model in fp16."""
    kind = {"fp16": "float16", "bf16": "bfloat16"}[low(place)]
    changes = SHORT | SDXL | {"mixed_precision": low(place), "preference.dtype": kind}
    call(command(place, "sdxl_spo", RANDOM, algorithm="spo", **changes))
    return {"summary": "trained", "failures": []}


def low(place: Place) -> str:
    return "bf16" if place.small else "fp16"
