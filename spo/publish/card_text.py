"""The parts of a run's section in the model card: facts, a snippet, citations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from spo.hub import Destination
from spo.lora_io.diffusers_file import LORA_FILE
from spo.publish.record import RunRecord

_TITLES = {"gradspo": "GradSPO", "spo": "SPO"}
_PIPELINES = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
_GRADSPO = """\
@inproceedings{tee2025gradspo,
  title     = {A Gradient Guidance Perspective on Stepwise Preference Optimization for
               Diffusion Models},
  author    = {Tee and Yoon and Syarubany and Yoon and Yoo},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2025}
}"""
_SPO = """\
@inproceedings{liang2025spo,
  title     = {Aesthetic Post-Training Diffusion Models from Generic Preferences with
               Step-by-step Preference Optimization},
  author    = {Liang, Zhanhao and others},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2025},
  note      = {arXiv:2406.04314}
}"""


def title(record: RunRecord) -> str:
    """What the LoRA is, in a few words."""
    return f"{_algorithm(record)} on {record.config.pretrained.model.rpartition('/')[2]}"


def citations(record: RunRecord) -> str:
    """BibTeX of the papers that the run builds on."""
    return _SPO if record.config.algorithm == "spo" else f"{_GRADSPO}\n\n{_SPO}"


def markdown_table(rows: Mapping[str, object]) -> str:
    """A table of two columns without a heading; rows without a value are left out."""
    known = [f"| {name} | {value} |" for name, value in rows.items() if value not in (None, "")]
    return "\n".join(["| | |", "|---|---|", *known])


def facts(record: RunRecord) -> dict[str, object]:
    """How the LoRA was trained, as far as the run recorded it."""
    config = record.config
    sample, train, lora = config.sample, config.train, config.lora
    start = record.starts[-1] if record.starts else {}
    alpha = lora.rank if lora.alpha is None else lora.alpha
    return {
        "algorithm": _algorithm(record),
        "base model": config.pretrained.model,
        "VAE": config.pretrained.vae,
        "preference model": _preference_model(config.preference),
        "prompts": start.get("prompts"),
        "epochs": f"{record.epochs} of {config.num_epochs}" if record.epochs else None,
        "rollouts": record.reached.get("rollout"),
        "updates": record.updates,
        "pairs per update": _pairs_per_update(start),
        "processes": ", then ".join(dict.fromkeys(_processes(start) for start in record.starts)),
        "LoRA": f"rank {lora.rank}, alpha {alpha}",
        "learning rate": f"{train.learning_rate:g}",
        "beta": f"{train.beta:g}",
        "grad_scale": None if config.algorithm == "spo" else f"{train.grad_scale:g}",
        "EMA decay": f"{train.ema_decay:g}" if _has_ema(record) else None,
        "threshold": f"{sample.threshold:g}",
        "rollout": f"{sample.num_candidates} candidates per step, {sample.num_steps} DDIM steps, "
        f"guidance {sample.guidance_scale:g}",
        "mixed precision": config.mixed_precision,
        "seed": config.seed,
        "versions": ", ".join(f"{n} {v}" for n, v in start.get("versions", {}).items()),
    }


def snippet(record: RunRecord, to: Destination) -> str:
    """Python that draws an image with the LoRA, from the Hub, on a GPU or without one."""
    pretrained, images = record.config.pretrained, record.config.eval
    pipeline = _PIPELINES[record.config.family]
    lines = [
        "import torch",
        f"from diffusers import {'AutoencoderKL, ' * bool(pretrained.vae)}DDIMScheduler, {pipeline}",
        "",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        'dtype = torch.float16 if device == "cuda" else torch.float32',
    ]
    if pretrained.vae:
        load = _call("AutoencoderKL.from_pretrained", _quoted(pretrained.vae), "torch_dtype=dtype")
        lines += [f"vae = {load}"]
    load = _call(
        f"{pipeline}.from_pretrained",
        _quoted(pretrained.model),
        "torch_dtype=dtype",
        "vae=vae" * bool(pretrained.vae),
        _option("revision", pretrained.revision),
        _option("variant", pretrained.variant),
    )
    lines += [f"pipe = {load}.to(device)"]
    lines += ["pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)"]
    lines += [
        _call(
            "pipe.load_lora_weights",
            _quoted(to.repo_id),
            _option("subfolder", to.subfolder),
            _option("revision", to.branch),
            _option("weight_name", LORA_FILE),
        )
    ]
    draw = _call(
        "pipe",
        _quoted(next(iter(record.samples.values()), "a fox reading a map, watercolour")),
        f"num_inference_steps={images.num_steps}",
        f"guidance_scale={images.guidance_scale:g}",
        "generator=torch.Generator().manual_seed(0)",
    )
    lines += [f"image = {draw}.images[0]", 'image.save("image.png")']
    return "\n".join(lines)


def _call(function: str, *arguments: str) -> str:
    """A call with every argument on a line of its own; empty ones are left out."""
    return "\n".join([f"{function}(", *(f"    {each}," for each in arguments if each), ")"])


def _option(name: str, value: str | None) -> str:
    return f"{name}={_quoted(value)}" if value else ""


def _quoted(text: str) -> str:
    """`text` as a Python literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _algorithm(record: RunRecord) -> str:
    return _TITLES.get(record.config.algorithm, record.config.algorithm)


def _preference_model(preference: ConfigDict) -> str:
    known = {"step_aware_clip": preference.checkpoint, "pickscore": preference.backbone}
    return known.get(preference.scorer, preference.scorer)


def _has_ema(record: RunRecord) -> bool:
    return (record.run_dir / "ema" / LORA_FILE).is_file()


def _pairs_per_update(start: Mapping[str, Any]) -> int | None:
    if "plan" not in start:
        return None
    plan = start["plan"]
    return plan["minibatch_size"] * plan["num_processes"] * plan["accumulation_steps"]


def _processes(start: Mapping[str, Any]) -> str:
    kind = {"cuda": "GPU", "cpu": "CPU process"}.get(start.get("device"), "process")
    return f"{start['plan']['num_processes']} x {kind}" if "plan" in start else "unknown"
