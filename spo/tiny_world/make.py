"""Makes the tiny world from nothing: base model, tiny decoder, preference data, preference model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from spo.command_line.config_files import REPO_ROOT, SPM_BASE, load_config
from spo.run.folder import SPM_FILE
from spo.tiny_world.base_model import train_denoiser, train_vae
from spo.tiny_world.clip import train_clip, train_pickscore
from spo.tiny_world.fitting import Fit
from spo.tiny_world.preferences import draw_labelled_pairs, split_captions, write_parquet
from spo.tiny_world.tiny_decoder import train_decoder

TRAINING_PAIRS, VALIDATION_PAIRS, SAMPLE = 20_000, 1_000, 400
PARQUET = ("train-00000-of-00001.parquet", "validation_unique-00000-of-00001.parquet")


def make_world(out: Path, shorten: int = 1) -> None:
    """Runs every stage whose result is missing in `out`; `shorten` divides all steps and data."""

    def rounds(*steps_and_rates: tuple[int, float]) -> list[Fit]:
        return [Fit(max(1, steps // shorten), rate) for steps, rate in steps_and_rates]

    vae, clip, sd15, pickscore = (out / name for name in ("vae", "clip", "sd15", "pickscore"))
    stage(vae, lambda to, state: train_vae(to, rounds((1800, 2e-3)), state))
    stage(clip, lambda to, state: train_clip(to, rounds((800, 1e-3)), state))
    # The first round learns to draw the colours and large shapes, the second the small ones.
    fits = rounds((3000, 1e-3), (2000, 7e-4))
    images = max(500, 40_000 // shorten)
    stage(sd15, lambda to, state: train_denoiser(to, vae, clip, fits, state, images))
    more = rounds((1200, 5e-4), (2000, 5e-4))
    stage(pickscore, lambda to, state: train_pickscore(to, clip, more, state))
    fits, images = rounds((2800, 3e-3)), max(250, 5000 // shorten)
    decoder = out / "decoder"
    stage(decoder, lambda to, state: train_decoder(to, sd15, pickscore, fits, state, images))
    training, held_out = split_captions()
    write_prompts(out / "prompts" / "train.txt", training)
    write_prompts(out / "prompts" / "held_out.txt", held_out)

    def write_pairs(to: Path, _) -> None:
        for name, captions, n, seed in (
            (PARQUET[0], training, TRAINING_PAIRS, 1),
            (PARQUET[1], held_out, VALIDATION_PAIRS, 2),
        ):
            write_parquet(draw_labelled_pairs(captions, max(64, n // shorten), seed), to / name)

    stage(out / "pickapic", write_pairs)
    train_preference_model(out, shorten)


def stage(folder: Path, make: Callable[[Path, Path], None]) -> None:
    """Lets `make` fill `folder`, which appears once it is complete; does nothing if it exists.

    `make` takes the folder to fill, and a file to keep its state in.
    """
    if folder.exists():
        return
    print(f"{folder.name} ...", flush=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    make(partial, folder.with_suffix(".state"))
    partial.rename(folder)


def write_prompts(file: Path, captions: Iterable[object]) -> None:
    """Writes one caption per line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{caption}\n" for caption in captions))


def train_preference_model(out: Path, shorten: int) -> None:
    """Trains the world's preference model by the script that trains the real ones."""
    config = load_config("config/spm_tiny.py", SPM_BASE)
    command = [
        *(sys.executable, REPO_ROOT / "scripts" / "train_preference_model.py"),
        f"--config={REPO_ROOT / 'config' / 'spm_tiny.py'}",
        f"--config.pretrained.model={out / 'sd15'}",
        f"--config.preference.backbone={out / 'pickscore'}",
        f"--config.preference.processor={out / 'pickscore'}",
        f"--config.data.source={out / 'pickapic'}",
        f"--config.logdir={out}",
        "--config.run_name=spm",
        "--config.resume_from=auto",
        f"--config.max_train_steps={max(2, config.max_train_steps // shorten)}",
        f"--config.train.warmup_steps={config.train.warmup_steps // shorten}",
    ]
    subprocess.run(command, check=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"})


def install(out: Path, assets: Path) -> None:
    """Copies the start of users into `assets`: fp16 weights, a sample of the pairs, the prompts."""
    for folder in ("sd15", "clip", "decoder", "pickapic", "prompts"):
        shutil.rmtree(assets / folder, ignore_errors=True)
    for folder in ("sd15", "decoder", "prompts"):
        shutil.copytree(out / folder, assets / folder)
    shutil.copytree(out / "pickscore", assets / "clip")
    (assets / "pickapic").mkdir()
    for name in PARQUET:
        rows = pq.read_table(out / "pickapic" / name)
        pq.write_table(rows.slice(0, SAMPLE), assets / "pickapic" / name)
    shutil.copy(out / "spm" / SPM_FILE, assets / "spm.safetensors")
    vae = assets / "sd15" / "vae" / "config.json"
    settings = json.loads(vae.read_text())
    settings.pop("_name_or_path", None)  # a folder of this machine
    vae.write_text(json.dumps(settings, indent=2) + "\n")
    for file in assets.rglob("*.safetensors"):
        half = {name: tensor.to(torch.float16) for name, tensor in load_file(file).items()}
        save_file(half, file, metadata={"format": "pt"})
