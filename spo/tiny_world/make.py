"""Makes the tiny world from nothing: base model, tiny decoder, preference data, preference models."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from spo.atomic import PARTIAL
from spo.command_line.config_files import SPM_BASE, load_config
from spo.preference.pair_trainer import train_preference_model
from spo.run.folder import LRM_FOLDER, SPM_FILE
from spo.scorers.latent_reward import UP_PATH
from spo.tiny_world.base_model import train_decoder, train_denoiser, train_vae
from spo.tiny_world.clip import train_clip, train_pickscore
from spo.tiny_world.fitting import Rounds
from spo.tiny_world.preferences import draw_labelled_pairs, split_captions, write_parquet

SAMPLE = 400  # pairs of each split that users start from
PARQUET = ("train-00000-of-00001.parquet", "validation_unique-00000-of-00001.parquet")


def make_world(out: Path, shorten: int = 1) -> None:
    """Runs every stage whose result is missing in `out`; `shorten` divides all steps and data."""

    def rounds(*steps_and_rates: tuple[int, float]) -> Rounds:
        return [(max(1, steps // shorten), rate) for steps, rate in steps_and_rates]

    vae, clip, sd15, pickscore = (out / name for name in ("vae", "clip", "sd15", "pickscore"))
    stage(vae, train_vae, rounds((1800, 2e-3)))
    stage(clip, train_clip, rounds((800, 1e-3)))
    # The first round learns to draw the colours and large shapes, the second the small ones.
    fits, images = rounds((3000, 1e-3), (2000, 7e-4)), max(500, 40_000 // shorten)
    stage(sd15, train_denoiser, vae, clip, fits, images)
    stage(pickscore, train_pickscore, clip, rounds((1200, 5e-4), (2000, 5e-4)))
    fits, images = rounds((2800, 3e-3)), max(250, 5000 // shorten)
    stage(out / "decoder", train_decoder, sd15, pickscore, fits, images)
    stage(out / "prompts", write_prompts)
    stage(out / "pickapic", write_pairs, shorten)
    start = str(pickscore)
    train_judge(
        out, "spm", {f"preference.{key}": start for key in ("backbone", "processor")}, shorten
    )
    train_judge(out, "lrm", {"preference.text_projection": start}, shorten)


def train_judge(out: Path, name: str, changes: Mapping[str, str], shorten: int) -> None:
    """Trains the preference model of config/`name`_tiny.py on the world in `out`, as its run `name`."""
    config = load_config(f"config/{name}_tiny.py", SPM_BASE)
    changes |= {
        "pretrained.model": str(out / "sd15"),
        "data.source": str(out / "pickapic"),
        "logdir": str(out),
        "run_name": name,
        "resume_from": "auto",
        "max_train_steps": max(2, config.max_train_steps // shorten),
        "train.warmup_steps": config.train.warmup_steps // shorten,
    }
    config.update_from_flattened_dict(changes)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    train_preference_model(config)


def stage(folder: Path, make: Callable[..., None], *arguments: object) -> None:
    """Lets `make(folder, *arguments)` fill `folder`, which appears once complete, or exists."""
    if folder.exists():
        return
    print(f"{folder.name} ...", flush=True)
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    make(partial, *arguments)
    partial.rename(folder)


def write_prompts(folder: Path) -> None:
    """Writes the training captions and the held-out captions, one per line."""
    folder.mkdir()
    for name, captions in zip(("train.txt", "held_out.txt"), split_captions(), strict=True):
        (folder / name).write_text("".join(f"{caption}\n" for caption in captions))


def write_pairs(folder: Path, shorten: int) -> None:
    """Writes labelled pairs of the training captions and of the held-out captions."""
    sizes = (20_000, 1_000)
    for split, (file, captions, n) in enumerate(zip(PARQUET, split_captions(), sizes, strict=True)):
        pairs = draw_labelled_pairs(captions, max(64, n // shorten), seed=split + 1)
        write_parquet(pairs, folder / file)


def install(out: Path, assets: Path) -> None:
    """Copies the start of users into `assets`: fp16 weights, a sample of the pairs, the prompts."""
    for folder in ("sd15", "clip", "decoder", "prompts"):
        shutil.rmtree(assets / folder, ignore_errors=True)
        made = "pickscore" if folder == "clip" else folder
        shutil.copytree(out / made, assets / folder)
    (assets / "pickapic").mkdir(exist_ok=True)
    for name in PARQUET:
        rows = pq.read_table(out / "pickapic" / name)
        pq.write_table(rows.slice(0, SAMPLE), assets / "pickapic" / name)
    shutil.copy(out / "spm" / SPM_FILE, assets / "spm.safetensors")
    install_lrm(out / "lrm" / LRM_FOLDER, assets / "lrm")
    drop_origin(assets / "sd15" / "vae" / "config.json")
    for file in assets.rglob("*.safetensors"):
        halve(file)


def install_lrm(made: Path, folder: Path) -> None:
    """Copies a latent reward model without the up path of its UNet, which nothing reads."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder)
    drop_origin(folder / "unet" / "config.json")
    for file in folder.rglob("*.safetensors"):
        halve(file, without=UP_PATH)


def drop_origin(config: Path) -> None:
    """Removes the folder that a network was loaded from, which is of this machine, from its config."""
    settings = json.loads(config.read_text())
    settings.pop("_name_or_path", None)
    config.write_text(json.dumps(settings, indent=2) + "\n")


def halve(file: Path, without: tuple[str, ...] = ()) -> None:
    """Rounds weights to fp16, and leaves out those whose names begin with one of `without`."""
    kept = {n: t.to(torch.float16) for n, t in load_file(file).items() if not n.startswith(without)}
    save_file(kept, file, metadata={"format": "pt"})
