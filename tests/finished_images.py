"""Pictures and tiny models for the tests of scorers."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from spo.scorers import Scorer, check_scorer, image_scorer, load_scorer

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
PROMPTS = ("a fox reading a map", "Tiny house, in a meadow", "blue whale " * 40)  # one is truncated
SIZES = ((96, 64), (40, 72), (64, 64))  # landscape, portrait, square


def pictures(sizes=SIZES, seed=0):
    """Returns smooth colourful RGB images with some grain, one of each (width, height)."""
    rng = np.random.default_rng(seed)
    found = []
    for width, height in sizes:
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
        grain = rng.normal(0, 12, smooth.shape)
        found.append(Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)))
    return found


def load(name, options) -> Scorer:
    """Returns a scorer of finished images, on the CPU."""
    return load_scorer(image_scorer(name, options), CPU)


def check(name, options):
    """Raises UserError for a wrong scorer of finished images."""
    check_scorer(image_scorer(name, options))


def score(name, options, images, prompts=PROMPTS):
    """Returns the scores of finished images by the named scorer."""
    return load(name, options).score_images(images, prompts)


def tiny_open_clip(folder: Path, **changes) -> Path:
    """Writes a random CLIP of 32 x 32 pixels in open_clip's format; `changes` go into its config."""
    import open_clip
    from safetensors.torch import save_file

    config = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 2,
        },
    } | changes
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}  # nobody's default
    folder.mkdir()
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    (folder / "open_clip_config.json").write_text(text)
    torch.manual_seed(6)  # with which scores of both signs come out
    clip = open_clip.CLIP(**config)
    with torch.no_grad():
        for parameter in clip.parameters():  # scores of fresh weights hardly differ
            parameter.add_(0.3 * torch.randn_like(parameter) * (parameter.ndim < 3))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def tiny_scorers(folder: Path) -> dict[str, dict]:
    """Returns options of each scorer of finished images that name tiny local models; writes some."""
    clip = tiny_open_clip(folder / "tiny")
    torch.save(
        {"weight": torch.linspace(-1, 1, 16)[None], "bias": torch.ones(1)}, folder / "head.pth"
    )
    open_clip = {"model": str(clip), "checkpoint": str(clip / "open_clip_model.safetensors")}
    recorded = ROOT / "tests" / "data" / "imagereward"
    tiny = ROOT / "assets" / "tiny"
    of_clip = {"backbone": str(tiny / "clip"), "processor": str(tiny / "clip")}
    return {
        "pickscore": of_clip,
        "hpsv2": open_clip,
        "hpsv2.1": open_clip,
        "aesthetic": open_clip | {"head": str(folder / "head.pth")},
        "clipscore": open_clip,
        "imagereward": {
            "checkpoint": str(recorded / "ImageReward.pt"),
            "tokenizer": str(recorded),
            "head_width": 8,
        },
        "step_aware_clip": of_clip | {"checkpoint": str(tiny / "spm.safetensors")},
    }
