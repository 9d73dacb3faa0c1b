"""Images of prompts by any number of models, with diffusers' schedulers, and a grid of them."""

from __future__ import annotations

import contextlib
import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from spo.command_line.values import require_choice
from spo.data.prompts import read_prompts
from spo.errors import UserError
from spo.lora_io.find import find_lora
from spo.lora_io.model_spec import ModelSpec, read_specs, use_loras
from spo.models.backbone import DTYPES, SCHEDULERS, Backbone
from spo.models.families import FAMILIES
from spo.models.loading import ModelSource, check_source, family_of
from spo.run.folder import CONFIG
from spo.run.pictures import Cell, grid, write_png
from spo.scorers.pixels import to_pil


@dataclass(frozen=True)
class SampleSettings:
    """The settings that images are drawn with; raises UserError for values that cannot work."""

    seeds: tuple[int, ...]  # each draws every prompt
    scheduler: str  # one of spo.models.backbone.SCHEDULERS
    num_steps: int
    guidance_scale: float
    size: tuple[int, int] | None  # width and height in pixels; None: the base model's own
    mixed_precision: str | None  # None: fp16 on a GPU, fp32 on a CPU
    batch_size: int  # images drawn at once

    def __post_init__(self) -> None:
        require_choice("--scheduler", self.scheduler, SCHEDULERS)
        require_choice("--mixed_precision", self.mixed_precision or "no", DTYPES)
        if self.num_steps < 1 or self.batch_size < 1:
            raise UserError("--steps and --batch_size must be at least 1.")


def read_size(text: str | None) -> tuple[int, int] | None:
    """Returns width and height of WIDTHxHEIGHT; raises UserError unless they are multiples of 8."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    size = tuple(map(int, match.groups())) if match else ()
    if not size or any(side == 0 or side % 8 for side in size):
        raise UserError(f"--size: {text!r} is not WIDTHxHEIGHT in multiples of 8, e.g. 768x512.")
    return size


def sample_prompts(prompts: Sequence[str], file: str | None) -> list[str]:
    """Returns the prompts given one by one, then those of a file; raises UserError without any."""
    found = list(prompts)
    if file is not None:
        found += read_prompts(file, key="--prompts_file").prompts
    if not found:
        raise UserError("--prompts: there is none; give --prompts TEXT ... or --prompts_file FILE.")
    return found


def default_base(texts: Iterable[str]) -> str:
    """Returns the base model that the first LoRA of ours among `texts` was trained on, or SD1.5."""
    for text in texts:
        path = Path(text.rpartition("=")[2].partition("+")[0].partition(":")[0]).expanduser()
        if not path.exists() or (path / "model_index.json").exists():
            continue
        # The config of the run has the whole path of a local model, the LoRA file only its last name.
        for folder in (path, *path.parents[:3]):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return json.loads((folder / CONFIG).read_text())["pretrained"]["model"]
        with (
            contextlib.suppress(OSError, SafetensorError, UserError, KeyError, TypeError),
            safe_open(find_lora(str(path), "--models"), framework="pt") as file,
        ):
            return file.metadata()["base_model"]
    return FAMILIES["sd15"].base_model


def read_models(
    texts: Sequence[str], base: str, vae: str | None, lora_scale: str | None
) -> list[ModelSpec]:
    """Returns the models that draw, those with a LoRA once for every strength in `lora_scale`."""
    family = family_of(base, "--base")
    source = ModelSource(base, vae=vae)
    check_source(source, family)
    specs = read_specs(texts, source, family, "--models")
    if images := [spec.text for spec in specs if spec.source is None]:
        raise UserError(f"--models: {images[0]} is a folder of images, not a model.")
    if lora_scale is None:
        return specs
    try:
        scales = [float(scale) for scale in lora_scale.split(",")]
    except ValueError:
        raise UserError(
            f"--lora_scale: {lora_scale!r} is no list of numbers like 0,0.5,1."
        ) from None
    if not any(spec.loras for spec in specs):
        raise UserError("--lora_scale: none of --models has a LoRA.")
    scaled = []
    for spec in specs:
        for scale in scales if spec.loras else ():
            loras = tuple((path, scale * weight) for path, weight in spec.loras)
            scaled.append(replace(spec, name=f"{spec.name}_{scale:g}", loras=loras))
        scaled += [] if spec.loras else [spec]
    return scaled


def draw_samples(
    models: Sequence[ModelSpec], prompts: Sequence[str], settings: SampleSettings, out: Path
) -> Path:
    """Writes OUT/MODEL/NUMBER_seedSEED.png of every image, and the grid; returns the grid's path."""
    device = PartialState().device
    precision = settings.mixed_precision or ("fp16" if device.type == "cuda" else "no")
    jobs = [(prompt, seed) for prompt in prompts for seed in settings.seeds]
    rows: list[list[Cell]] = [[] for _ in jobs]
    backbone, loaded = None, None
    with tqdm(total=len(jobs) * len(models), unit=" images") as bar:
        for spec in models:
            if loaded != spec.source:
                backbone = None  # frees the last one before the next one loads
                family = family_of(spec.source.model, "--models")
                backbone, loaded = Backbone(spec.source, family, precision, device), spec.source
            use_loras(backbone, spec, "--models")
            bar.set_description(spec.name)
            for start in range(0, len(jobs), settings.batch_size):
                part = jobs[start : start + settings.batch_size]
                for i, image in enumerate(_draw(backbone, part, settings), start):
                    path = f"{i // len(settings.seeds):05d}_seed{jobs[i][1]}.png"
                    text = _png_text(spec, *jobs[i], image, settings)
                    write_png(out / spec.name / path, image, text)
                    rows[i].append(Cell(image, spec.name))
                bar.update(len(part))
    labels = ["\n".join([*textwrap.wrap(prompt, 24)[:6], f"seed {seed}"]) for prompt, seed in jobs]
    title = (
        f"{settings.scheduler}, {settings.num_steps} steps, guidance {settings.guidance_scale:g}"
    )
    path = out / "grid.png"
    grid(rows, title, labels).save(path)
    return path


def _draw(
    backbone: Backbone, jobs: Sequence[tuple[str, int]], settings: SampleSettings
) -> list[Image.Image]:
    """Draws one image per prompt and seed; its noise depends on the seed alone."""
    channels, height, width = backbone.latent_shape
    if settings.size is not None:
        width, height = (side // backbone.vae_scale_factor for side in settings.size)
    generators = [torch.Generator().manual_seed(seed) for _, seed in jobs]
    noise = torch.stack([torch.randn(channels, height, width, generator=g) for g in generators])
    sampling = (settings.scheduler, settings.num_steps, settings.guidance_scale)
    return to_pil(backbone.draw([prompt for prompt, _ in jobs], noise, *sampling, generators))


def _png_text(
    spec: ModelSpec, prompt: str, seed: int, image: Image.Image, settings: SampleSettings
) -> dict[str, str]:
    """Returns what an image was made from, for its PNG text."""
    return {
        "prompt": prompt,
        "seed": str(seed),
        "model": spec.text,
        "base": spec.source.model,
        "loras": ", ".join(f"{path}:{weight:g}" for path, weight in spec.loras),
        "scheduler": settings.scheduler,
        "steps": str(settings.num_steps),
        "guidance": f"{settings.guidance_scale:g}",
        "size": f"{image.width}x{image.height}",
    }
