"""Measures that policy, EMA and reference cost no second copy of the UNet.

    python scripts/measure_memory.py

Runs the same forward passes twice, each in a process of its own: with the base pipeline only, and with
all three in use after an optimizer step. Exits with status 1 if peak memory (a GPU's, on a CPU the
process's) grows by 0.2 of the UNet's bytes or more, not counting LoRAs, optimizer and the weights that
the EMA is merged into. The UNet has random weights and the shape of SD1.5's, at 0.4 of its width.
"""

import json
import multiprocessing
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from spo.command_line.config_files import load_config
from spo.costs.count import tensor_bytes
from spo.costs.load import UnloadedBackbone
from spo.costs.unloaded_scorers import ARCHITECTURES
from spo.method.build import build_learner, read_recipe
from spo.method.metrics import peak_memory_gib
from spo.models.gpu import pick_device
from spo.models.loading import ModelSource
from spo.types import PreferencePairs

LIMIT = 0.2


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        shutil.copytree(ARCHITECTURES / "small", model)
        unet = json.loads((ARCHITECTURES / "sd15" / "unet" / "config.json").read_text())
        unet |= {"block_out_channels": (128, 256, 512, 512), "cross_attention_dim": 64}
        (model / "unet" / "config.json").write_text(json.dumps(unet | {"sample_size": 16}))
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            base, ours = pool.starmap(measure, [(model, False), (model, True)], chunksize=1)
    share = (ours["peak"] - ours["known"] - base["peak"]) / base["UNet"]
    print(f"UNet                                      {base['UNet']:.3f} GiB")
    print(f"peak, base pipeline alone                 {base['peak']:.3f} GiB")
    print(f"peak, policy + EMA + reference            {ours['peak']:.3f} GiB")
    print(f"of that LoRAs, optimizer, merged weights  {ours['known']:.3f} GiB")
    print(f"the rest of the difference                {share:.3f} of the UNet (limit {LIMIT})")
    return 0 if share < LIMIT else 1


def measure(model: Path, networks: bool) -> dict[str, float]:
    """Returns GiB after three forward passes: of the base model, or of policy, EMA and reference."""
    device = pick_device()
    backbone = UnloadedBackbone(ModelSource(str(model)), "sd15", "no", device)
    sizes = {"UNet": gib(backbone.unet.parameters()), "known": 0.0}
    text, t = backbone.encode_prompts(["one", "two"]), torch.tensor([701, 301], device=device)
    latents = torch.randn(2, 1, *backbone.latent_shape, device=device)
    if networks:
        recipe = read_recipe(load_config("config/small.py"))
        lora = recipe.lora.add_to(backbone.unet, seed=0)
        learner = build_learner(recipe, backbone, backbone.unet, lora, 1)
        for parameter in lora.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        learner.optimizer.step()
        both = latents.expand(-1, 2, -1, -1, -1)
        with torch.no_grad():
            learner.predict(PreferencePairs(t, latents, both, both, t, text))
        # Policy, its gradient, EMA, and AdamW's two moments; then weights that a LoRA is merged into.
        merged = gib(layer.weight for layer in lora.layers.values())
        sizes["known"] = 5 * gib(lora.parameters.values()) + merged
    for _ in range(0 if networks else 3):
        with torch.no_grad():
            backbone.predict(backbone.unet, latents[:, 0], t, text, 5.0)
    return sizes | {"peak": peak_memory_gib(device)}


def gib(tensors: Iterable[torch.Tensor]) -> float:
    return tensor_bytes(tensors) / 2**30


if __name__ == "__main__":
    sys.exit(main())
