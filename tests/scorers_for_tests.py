"""Scorers that tests name in configs by their dotted path."""

import os
import signal

import numpy as np
import torch

from spo.errors import UserError
from spo.scorers import ImageScorer, Scorer


class Brightness(Scorer):
    """The mean of an image times `sign`, or NaN for one prompt after `good_calls` calls."""

    def __init__(self, sign, bad_prompt, good_calls):
        self.sign, self.bad_prompt, self.good_calls = sign, bad_prompt, good_calls
        self.calls = 0

    def encode_prompts(self, prompts):
        return torch.tensor([prompt == self.bad_prompt for prompt in prompts])

    def score(self, images, is_bad, timestep):
        assert not torch.is_grad_enabled()  # or a scorer without no_grad of its own keeps its graph
        self.calls += 1
        scores = self.sign * 100 * images.mean(dim=(1, 2, 3))
        if self.calls > self.good_calls:
            scores[is_bad] = torch.nan
        return scores


def brightness(device, sign=1, bad_prompt="", good_calls=0):
    return Brightness(sign, bad_prompt, good_calls)


class ImageBrightness(ImageScorer):
    """The mean brightness of finished images, printed in percent."""

    title, scale = "Brightness", 100.0

    def score_images(self, images, prompts):
        return torch.tensor([float(np.asarray(image).mean()) / 255 for image in images])


def image_brightness(device):
    return ImageBrightness()


class ImageDarkness(ImageBrightness):
    """What dislikes all that `Brightness` likes; NaN for images of the prompt `bad_prompt`."""

    def __init__(self, device, bad_prompt=""):
        self.bad_prompt = bad_prompt

    def score_images(self, images, prompts):
        scores = 1 - super().score_images(images, prompts)
        return scores.where(torch.tensor([p != self.bad_prompt for p in prompts]), torch.nan)


def broken_judge(device):
    raise RuntimeError("no such weights\nanywhere")


class OnRanks(Brightness):
    """Brightness that writes down its prompts and fails on some ranks.

    From call `ties[rank]` on, all candidates score 0; `event` happens at call `at` of rank `rank`.
    """

    def __init__(self, notes, ties, event, rank, at):
        super().__init__(sign=1, bad_prompt="", good_calls=0)
        self.rank = int(os.environ.get("RANK", "0"))
        self.notes = notes
        self.ties_at = ties[self.rank] if ties else float("inf")
        self.event, self.event_at = event, at if rank == self.rank else -1

    def encode_prompts(self, prompts):
        with open(f"{self.notes}/prompts_{self.rank}.txt", "a") as file:
            file.writelines(f"{prompt}\n" for prompt in prompts)
        return super().encode_prompts(prompts)

    def score(self, images, is_bad, timestep):
        scores = super().score(images, is_bad, timestep)
        if self.calls == self.event_at and self.event == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.calls == self.event_at and self.event == "pause":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.calls == self.event_at and self.event == "raise":
            raise RuntimeError("out of luck")
        if self.calls == self.event_at and self.event == "refuse":
            raise UserError("data: of no use")
        return torch.zeros_like(scores) if self.calls >= self.ties_at else scores


def on_ranks(device, notes, ties=(), event="", rank=0, at=0):
    return OnRanks(notes, ties, event, rank, at)
