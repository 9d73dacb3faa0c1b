"""Measure that policy, EMA and reference cost no second copy of the UNet.

    python scripts/measure_memory.py

Runs the same forward passes twice, each in a process of its own: with the base pipeline alone, and
with policy, EMA and reference in use and an optimizer that has made a step. Prints both peaks of
resident memory, and exits with status 1 where the difference, less LoRA, EMA, optimizer and the
weights that the EMA is merged into, is 0.2 of the UNet's bytes or more. The UNet has random weights
and the shape of SD1.5's at `--width`.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
from spo.method.learner import Learner, UpdateSettings
from spo.method.losses import LOSSES, LossSettings
from spo.method.metrics import peak_memory_gib
from spo.models.backbone import Backbone, ModelSource
from spo.models.lora import add_lora
from spo.types import PreferencePairs

TINY = ROOT / "assets" / "tiny" / "sd15"
LIMIT = 0.2  # of the UNet's bytes


def make_model(folder: Path, width: int) -> None:
    """A pipeline folder with a UNet of SD1.5's shape, `width` wide (SD1.5: 320)."""
    from diffusers import UNet2DConditionModel

    config = json.loads((TINY / "unet" / "config.json").read_text())
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("unet"))
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        cross_attention_dim=config["cross_attention_dim"],
        attention_head_dim=8,
    ).save_pretrained(folder / "unet")


def measure(folder: Path, with_networks: bool) -> dict[str, float]:
    """Peak memory of three forward passes: of the base model, or of policy, EMA and reference."""
    backbone = Backbone(ModelSource(str(folder)), "sd15", "no", torch.device("cpu"))
    unet_gib = sum(p.numel() * p.element_size() for p in backbone.unet.parameters()) / 2**30
    conditioning = backbone.encode_prompts(["one", "two"])
    latents = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([701, 301])
    small_gib = merged_gib = 0.0
    if with_networks:
        learner = make_learner(backbone)
        for parameter in learner.lora.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        learner.optimizer.step()
        # policy, its gradient, EMA, and AdamW's two moments
        small_gib = 5 * sum(p.numel() * 4 for p in learner.lora.parameters.values()) / 2**30
        layers = learner.lora.layers.values()
        merged_gib = sum(layer.weight.numel() * 4 for layer in layers) / 2**30
        pairs = PreferencePairs(
            timesteps=timesteps,
            latents=latents[:, None],
            noises=latents[:, None].expand(-1, 2, -1, -1, -1),
            next_latents=latents[:, None].expand(-1, 2, -1, -1, -1),
            prompt_ids=torch.arange(2),
            conditioning=conditioning,
        )
        with torch.no_grad():
            learner.predict(pairs)
    else:
        with torch.no_grad():
            for _ in range(3):
                backbone.predict(backbone.unet, latents, timesteps, conditioning, 5.0)
    return {
        "peak_gib": peak_memory_gib(backbone.device),
        "unet_gib": unet_gib,
        "lora_ema_optimizer_gib": small_gib,
        "merged_gib": merged_gib,
    }


def make_learner(backbone: Backbone) -> Learner:
    lora = add_lora(backbone.unet, 4, 4, ("to_q", "to_k", "to_v", "to_out.0"), seed=0)
    return Learner(
        backbone=backbone,
        unet=backbone.unet,
        lora=lora,
        optimizer=torch.optim.AdamW(lora.parameters.values(), lr=1e-4),
        objective=LOSSES["gradspo"],
        schedule=backbone.schedule(20),
        loss_settings=LossSettings(beta=10.0, clip_eps=0.1, grad_scale=0.5, eta=1.0),
        settings=UpdateSettings(
            accumulation_steps=1,
            max_grad_norm=1.0,
            ema_decay=0.9,
            ema_every="optimizer_step",
            merge_lora=True,
            skip_ema_pass=False,
        ),
        guidance_scale=5.0,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=128, help="of the first UNet block")
    parser.add_argument("--measure", choices=("base", "networks"), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.model, options.measure == "networks")))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_model(model, options.width)
        base, ours = (run_measure(model, which) for which in ("base", "networks"))
    known = ours["lora_ema_optimizer_gib"] + ours["merged_gib"]
    extra = ours["peak_gib"] - base["peak_gib"] - known
    share = extra / base["unet_gib"]
    print(f"UNet                                      {base['unet_gib']:.3f} GiB")
    print(f"peak, base pipeline alone                 {base['peak_gib']:.3f} GiB")
    print(f"peak, policy + EMA + reference            {ours['peak_gib']:.3f} GiB")
    print(f"of that LoRA, gradient, EMA, optimizer    {ours['lora_ema_optimizer_gib']:.3f} GiB")
    print(f"and weights with the EMA LoRA merged in   {ours['merged_gib']:.3f} GiB")
    print(f"the rest of the difference                {share:.3f} of the UNet (limit {LIMIT})")
    return 0 if share < LIMIT else 1


def run_measure(model: Path, which: str) -> dict[str, float]:
    command = [sys.executable, __file__, f"--measure={which}", f"--model={model}"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
