"""Writes latent reward models in their published layout, which latent_reward_folder.py reads."""

import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from spo.atomic import PARTIAL, sync_file, sync_folder
from spo.scorers.latent_reward import LatentRewardModel
from spo.scorers.latent_reward_folder import HEADS


def save_latent_reward(
    folder: Path, model: LatentRewardModel, whole_unet: UNet2DConditionModel
) -> None:
    """Writes a model as `folder`, which appears under its name once all of it is on the disk.

    `whole_unet`, on the CPU, gives the up path and gets the model's weights for the rest.
    """
    whole_unet.load_state_dict(model.unet.state_dict(), strict=False)
    heads = {
        name: {"weight": layer.weight.detach().cpu()}
        for name in ("visual_projection", "text_projection")
        if (layer := getattr(model, name)) is not None
    }
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        whole_unet.save_pretrained(partial / "unet")
        for name in ("text_encoder", "text_encoder_2"):
            if (encoder := getattr(model, name)) is not None:
                encoder.save_pretrained(partial / name)
        torch.save(heads | {"logit_scale": model.logit_scale.item()}, partial / HEADS)
        for path in partial.rglob("*"):
            (sync_folder if path.is_dir() else sync_file)(path)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync_folder(folder.parent)
