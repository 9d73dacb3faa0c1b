"""Images of prompts by any number of models, with diffusers' schedulers, and a grid of them."""

from __future__ import annotations

import contextlib
import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from spo.data.prompts import read_prompts
from spo.errors import UserError
from spo.lora_io.find import find_lora
from spo.lora_io.model_spec import ModelSpec, read_specs, use_loras
from spo.models.backbone import DTYPES, SCHEDULERS, Backbone
from spo.models.loading import ModelSource, check_source, family_of
from spo.run.folder import CONFIG
from spo.run.pictures import Cell, grid, write_png
from spo.scorers.pixels import to_pil

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@dataclass(frozen=True)
class SampleSettings:
    """How images are drawn; UserError where that is impossible."""

    seeds: tuple[int, ...]  # each draws every prompt
    scheduler: str  # one of spo.models.backbone.SCHEDULERS
    num_steps: int
    guidance_scale: float
    size: tuple[int, int] | None  # width and height in pixels; None: the base model's own
    mixed_precision: str | None  # None: fp16 on a GPU, fp32 on a CPU
    batch_size: int  # images drawn at once

    def __post_init__(self) -> None:
        for flag, table in (("scheduler", SCHEDULERS), ("mixed_precision", DTYPES)):
            value = getattr(self, flag)
            if value is not None and value not in table:
                raise UserError(f"--{flag}: {value!r} is none of {', '.join(table)}.")
        if self.num_steps < 1 or self.batch_size < 1:
            raise UserError("--steps and --batch_size must be at least 1.")


def read_size(text: str | None) -> tuple[int, int] | None:
    """Width and height of WIDTHxHEIGHT; UserError where they are not multiples of 8."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    size = tuple(map(int, match.groups())) if match else ()
    if not size or any(side == 0 or side % 8 for side in size):
        raise UserError(f"--size: {text!r} is not WIDTHxHEIGHT in multiples of 8, e.g. 768x512.")
    return size


def sample_prompts(prompts: Sequence[str], file: str | None) -> list[str]:
    """The prompts given one by one, then those of a file; UserError where there are none."""
    found = list(prompts)
    if file is not None:
        found += read_prompts(file, key="--prompts_file").prompts
    if not found:
        raise UserError("--prompts: there is none; give --prompts TEXT ... or --prompts_file FILE.")
    return found


def default_base(texts: Iterable[str]) -> str:
    """The base model that the first LoRA of ours among `texts` was trained on, or SD1.5."""
    for text in texts:
        path = Path(text.rpartition("=")[2].partition("+")[0].partition(":")[0]).expanduser()
        if not path.exists() or (path / "model_index.json").exists():
            continue
        # The config of the run tells the whole path of a local model, the file its last name alone.
        for folder in (path, *path.parents[:3]):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return json.loads((folder / CONFIG).read_text())["pretrained"]["model"]
        with (
            contextlib.suppress(OSError, SafetensorError, UserError, KeyError, TypeError),
            safe_open(find_lora(str(path), "--models"), framework="pt") as file,
        ):
            return file.metadata()["base_model"]
    return SD15


def read_models(
    texts: Sequence[str], base: str, vae: str | None, lora_scale: str | None
) -> list[ModelSpec]:
    """The models that draw, each with a LoRA once for every strength of `lora_scale`."""
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
    return [scaled for spec in specs for scaled in (_at(spec, scales) if spec.loras else [spec])]


def _at(spec: ModelSpec, scales: Iterable[float]) -> Iterator[ModelSpec]:
    for scale in scales:
        loras = tuple(replace(lora, weight=scale * lora.weight) for lora in spec.loras)
        yield replace(spec, name=f"{spec.name}_{scale:g}", loras=loras)


def draw_samples(
    models: Sequence[ModelSpec], prompts: Sequence[str], settings: SampleSettings, out: Path
) -> Path:
    """Write OUT/MODEL/NUMBER_seedSEED.png for all of them, and the grid, whose path this returns."""
    device = PartialState().device
    precision = settings.mixed_precision or ("fp16" if device.type == "cuda" else "no")
    jobs = [(prompt, seed) for prompt in prompts for seed in settings.seeds]
    rows: list[list[Cell]] = [[] for _ in jobs]
    backbone, loaded = None, None
    with tqdm(total=len(jobs) * len(models), unit=" images") as bar:
        for spec in models:
            if loaded != spec.source:
                backbone = None  # the one before goes first
                family = family_of(spec.source.model, "--models")
                backbone, loaded = Backbone(spec.source, family, precision, device), spec.source
            use_loras(backbone, spec, "--models")
            bar.set_description(spec.name)
            for start in range(0, len(jobs), settings.batch_size):
                part = jobs[start : start + settings.batch_size]
                for i, image in enumerate(_draw(backbone, part, settings), start):
                    prompt, seed = jobs[i]
                    path = out / spec.name / f"{i // len(settings.seeds):05d}_seed{seed}.png"
                    write_png(path, image, _facts(spec, prompt, seed, image, settings))
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
    """One image per prompt and seed; its noise is that of an image with this seed anywhere here."""
    channels, height, width = backbone.latent_shape
    if settings.size is not None:
        width, height = (side // backbone.vae_scale_factor for side in settings.size)
    generators = [torch.Generator().manual_seed(seed) for _, seed in jobs]
    noise = torch.stack([torch.randn(channels, height, width, generator=g) for g in generators])
    prompts = [prompt for prompt, _ in jobs]
    return to_pil(
        backbone.draw(
            prompts,
            noise,
            settings.scheduler,
            settings.num_steps,
            settings.guidance_scale,
            generators,
        )
    )


def _facts(
    spec: ModelSpec, prompt: str, seed: int, image: Image.Image, settings: SampleSettings
) -> dict[str, str]:
    """How an image was made, for its PNG text."""
    loras = ", ".join(f"{lora.path}:{lora.weight:g}" for lora in spec.loras)
    return {
        "prompt": prompt,
        "seed": str(seed),
        "model": spec.text,
        "base": spec.source.model,
        "loras": loras,
        "scheduler": settings.scheduler,
        "steps": str(settings.num_steps),
        "guidance": f"{settings.guidance_scale:g}",
        "size": f"{image.width}x{image.height}",
    }
