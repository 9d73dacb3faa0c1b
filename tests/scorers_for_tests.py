"""Scorers that runs in the tests name by their dotted path."""

import numpy as np
import torch


class Brightness:
    """Mean of the image times `sign`; not a number for one prompt after `good_calls` calls."""

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


class ImageBrightness:
    """Mean brightness of finished images, printed in percent."""

    title, scale = "Brightness", 100.0

    def score(self, images, prompts):
        return torch.tensor([float(np.asarray(image).mean()) / 255 for image in images])


def image_brightness(device):
    return ImageBrightness()
