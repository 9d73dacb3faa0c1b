"""Images of prompts by any number of models, with diffusers' schedulers, and a grid of them."""

import contextlib
import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from spo.atomic import check_output
from spo.command_line.values import expand, require_choice, require_whole
from spo.data.prompts import read_prompts
from spo.errors import UserError
from spo.hub import public_name
from spo.lora_io.model_spec import (
    ModelSpec,
    at_strengths,
    read_specs,
    split_spec,
    split_weight,
    use_loras,
)
from spo.models.backbone import DTYPES, SCHEDULERS, Backbone
from spo.models.device import set_up_device
from spo.models.families import FAMILIES
from spo.models.gpu import pick_device
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
        require_whole("--steps", self.num_steps)
        require_whole("--batch_size", self.batch_size)


def sample_prompts(prompts: Sequence[str], file: str | None) -> list[str]:
    """Returns the prompts given one by one, then those of a file; raises UserError without any."""
    read = () if file is None else read_prompts(file, key="--prompts_file").prompts
    if not (prompts or read):
        raise UserError("--prompts: there is none; give --prompts TEXT ... or --prompts_file FILE.")
    return [*prompts, *read]


def default_base(texts: Iterable[str]) -> str:
    """Returns the base model of the first run that has one of the LoRAs `texts`, or SD1.5."""
    for text in texts:
        path = Path(expand(split_weight(split_spec(text)[1][0])[0]))
        for folder in (path, *path.parents[:3]) if path.exists() else ():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return expand(json.loads((folder / CONFIG).read_text())["pretrained"]["model"])
    return FAMILIES["sd15"].base_model


def read_models(
    texts: Sequence[str], base: str, vae: str | None, strengths: Sequence[float] | None
) -> list[ModelSpec]:
    """Returns the models that draw, each with a LoRA once for every one of `strengths`."""
    family = family_of(base, "--base")
    source = ModelSource(base, vae=vae)
    check_source(source, family)
    specs = read_specs(texts, source, family, "--models")
    if images := [spec.text for spec in specs if spec.source is None]:
        raise UserError(f"--models: {images[0]} is a folder of images, not a model.")
    return at_strengths(specs, strengths or (), "--lora_scale")


def draw_samples(
    models: Sequence[ModelSpec], prompts: Sequence[str], settings: SampleSettings, out: Path
) -> Path:
    """Writes OUT/MODEL/NUMBER_seedSEED.png of every image, and the grid; returns the grid's path."""
    device = pick_device()
    set_up_device(device)
    precision = settings.mixed_precision or ("fp16" if device.type == "cuda" else "no")
    jobs = list(product(prompts, settings.seeds))
    rows: list[list[Cell]] = [[] for _ in jobs]
    backbone, loaded, path = None, None, out / "grid.png"
    check_output(path, "--out")
    for spec in models:
        if loaded != spec.source:
            backbone = None  # frees the last one before the next one loads
            family = family_of(spec.source.model, "--models")
            backbone, loaded = Backbone(spec.source, family, precision, device), spec.source
        use_loras(backbone, spec, "--models")
        for start in tqdm(range(0, len(jobs), settings.batch_size), desc=spec.name):
            part = jobs[start : start + settings.batch_size]
            for i, image in enumerate(_draw(backbone, part, settings), start):
                name = f"{i // len(settings.seeds):05d}_seed{jobs[i][1]}.png"
                text = _png_text(spec, *jobs[i], settings)
                write_png(out / spec.name / name, image, text)
                rows[i].append(Cell(image, spec.name))
    labels = ["\n".join([*textwrap.wrap(prompt, 24)[:6], f"seed {seed}"]) for prompt, seed in jobs]
    guidance = f"guidance {settings.guidance_scale:g}"
    title = f"{settings.scheduler}, {settings.num_steps} steps, {guidance}"
    write_png(path, grid(rows, title, labels))
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


def _png_text(spec: ModelSpec, prompt: str, seed: int, settings: SampleSettings) -> dict[str, str]:
    return {
        "prompt": prompt,
        "seed": str(seed),
        "model": public_name(spec.text),
        "base": public_name(spec.source.model),
        "loras": ", ".join(f"{public_name(str(path))}:{weight:g}" for path, weight in spec.loras),
        "scheduler": settings.scheduler,
        "steps": str(settings.num_steps),
        "guidance": f"{settings.guidance_scale:g}",
    }
