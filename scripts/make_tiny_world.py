"""Make the tiny world from nothing: base model, preference data, preference model.

    python scripts/make_tiny_world.py [--out runs/tiny_world] [--install]

Two cores take about two hours at most. Every stage is kept in `--out`, and a stage that was
interrupted goes on from its last saved step when the command is given again. `--install` copies what
users start from to assets/tiny.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

TRAINING_PAIRS, VALIDATION_PAIRS, SAMPLE = 20_000, 1_000, 400
PARQUET = ("train-00000-of-00001.parquet", "validation_unique-00000-of-00001.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/tiny_world"))
    parser.add_argument("--install", action="store_true", help="copy the results to assets/tiny")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    make_world(options.out)
    if options.install:
        install(options.out, REPO / "assets" / "tiny")


def make_world(out: Path) -> None:
    """Run every stage whose result is not there yet."""
    from spo.tiny_world.base_model import train_denoiser, train_vae
    from spo.tiny_world.clip import train_clip, train_pickscore
    from spo.tiny_world.fitting import Fit
    from spo.tiny_world.preferences import draw_pairs, split_captions, write_parquet

    stage(out / "vae", lambda to: train_vae(to, (Fit(1800, 2e-3),), out / "vae.state"))
    stage(out / "clip", lambda to: train_clip(to, (Fit(800, 1e-3),), out / "clip.state"))
    stage(
        out / "sd15",
        lambda to: train_denoiser(
            to,
            out / "vae",
            out / "clip",
            # The first round draws the colours and large shapes, the second the small ones.
            (Fit(3000, 1e-3), Fit(2000, 7e-4)),
            out / "sd15.state",
        ),
    )
    stage(
        out / "pickscore",
        lambda to: train_pickscore(
            to, out / "clip", (Fit(1200, 5e-4), Fit(2000, 5e-4)), out / "pickscore.state"
        ),
    )
    training, held_out = split_captions()
    write_prompts(out / "prompts" / "train.txt", training)
    write_prompts(out / "prompts" / "held_out.txt", held_out)

    def write_pairs(to: Path) -> None:
        write_parquet(draw_pairs(training, TRAINING_PAIRS, seed=1), to / PARQUET[0])
        write_parquet(draw_pairs(held_out, VALIDATION_PAIRS, seed=2), to / PARQUET[1])

    stage(out / "pickapic", write_pairs)
    train_preference_model(out)


def stage(folder: Path, make) -> None:
    """Let `make` fill `folder`, which appears when it is complete; nothing where it is there."""
    if folder.exists():
        return
    print(f"{folder.name} ...", flush=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    make(partial)
    partial.rename(folder)


def write_prompts(file: Path, captions) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{caption}\n" for caption in captions))


def train_preference_model(out: Path) -> None:
    """The preference model of the world, by the script that trains the real ones."""
    command = [
        *(sys.executable, REPO / "scripts" / "train_preference_model.py"),
        f"--config={REPO / 'config' / 'spm_tiny.py'}",
        f"--config.pretrained.model={out / 'sd15'}",
        f"--config.preference.backbone={out / 'pickscore'}",
        f"--config.preference.processor={out / 'pickscore'}",
        f"--config.data.source={out / 'pickapic'}",
        f"--config.logdir={out}",
        "--config.run_name=spm",
        "--config.resume_from=auto",
    ]
    subprocess.run(command, check=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"})


def install(out: Path, assets: Path) -> None:
    """Copy what users start from: weights in fp16, a sample of the pairs, and the prompts."""
    import pyarrow.parquet as pq
    import torch
    from safetensors.torch import load_file, save_file

    from spo.preference.checkpoint import FILE_NAME

    for folder in ("sd15", "clip", "pickapic", "prompts"):
        shutil.rmtree(assets / folder, ignore_errors=True)
    for folder in ("sd15", "prompts"):
        shutil.copytree(out / folder, assets / folder)
    shutil.copytree(out / "pickscore", assets / "clip")
    (assets / "pickapic").mkdir()
    for name in PARQUET:
        rows = pq.read_table(out / "pickapic" / name)
        pq.write_table(rows.slice(0, SAMPLE), assets / "pickapic" / name)
    shutil.copy(out / "spm" / FILE_NAME, assets / "spm.safetensors")
    for file in assets.rglob("*.safetensors"):
        half = {name: tensor.to(torch.float16) for name, tensor in load_file(file).items()}
        save_file(half, file, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
