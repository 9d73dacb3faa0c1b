"""Faster execution of the same arithmetic; `config.compile` and its neighbours explain each."""

import ctypes
import os
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL

from spo.models.backbone import Backbone
from spo.models.minibatch_unet import MinibatchUNet
from spo.scorers import Scorer

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


@dataclass(frozen=True)
class SpeedSettings:
    """Layout, compilation and recording of the models."""

    channels_last: bool
    compile_unet: bool
    compile_vae: bool
    compile_scorer: bool
    cuda_graphs: bool


def set_up_device(
    device: torch.device, allow_tf32: bool = True, deterministic: bool = False
) -> None:
    """Chooses a GPU's kernels: with or without TF32, the fastest or those that repeat their bits.

    On a CPU, keeps freed memory for the next activation. Call it before any work on the device.
    """
    if device.type == "cuda":
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(deterministic)
        # Times all kernels for a shape once, and may choose others in the next run.
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32
        torch.backends.cudnn.allow_tf32 = allow_tf32
    elif device.type == "cpu":
        # Otherwise the kernel maps and zeroes each activation over 32 MiB page by page, and unmaps
        # it when it is freed. Only glibc has this switch.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, -1)


def speed_up(backbone: Backbone, scorer: Scorer, settings: SpeedSettings) -> None:
    """Lays out the models as `settings` say; those to be compiled are compiled at their first call.

    Raises UserError for a scorer that cannot be compiled.
    """
    if settings.channels_last:
        backbone.unet.to(memory_format=torch.channels_last)
        backbone.decoder.to(memory_format=torch.channels_last)
        scorer.channels_last()
    elif backbone.device.type == "cuda" and backbone.vae.decoder is not None:
        keep_contiguous(backbone.vae)
    if settings.compile_unet:
        backbone.unet.compile(dynamic=False)
    if settings.compile_vae:
        backbone.decoder.decoder.compile(dynamic=False)
    if settings.compile_scorer:
        scorer.compile()


def minibatch_unet(backbone: Backbone, settings: SpeedSettings) -> MinibatchUNet:
    """Returns the backbone's UNet for minibatches, as `settings` say."""
    record = settings.cuda_graphs and backbone.device.type == "cuda"
    return MinibatchUNet(backbone.unet, record)


def keep_contiguous(vae: AutoencoderKL) -> None:
    """Lets a VAE decode in contiguous memory on a GPU: the same bits sooner.

    Attention in the middle of the decoder leaves its output channels last; a GPU then copies each
    activation behind it to and fro for the group norms. On an H200 in fp16, SD1.5's VAE takes 0.81
    of the time without these copies, SDXL's 0.69. A CPU takes longer without them.
    """
    vae.decoder.mid_block.register_forward_hook(lambda _, inputs, output: output.contiguous())
