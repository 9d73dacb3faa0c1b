"""Scorers that runs in the tests name by their dotted path."""

import torch


class Brightness:
    """Mean of the image, made not a number for one prompt from its `after`-th comparison on."""

    def __init__(self, bad_prompt: str, after: int):
        self.bad_prompt, self.after, self.calls = bad_prompt, after, 0

    def encode_prompts(self, prompts):
        return torch.tensor([prompt == self.bad_prompt for prompt in prompts])

    def score(self, images, is_bad, timestep):
        assert not torch.is_grad_enabled()  # or a scorer without no_grad of its own keeps its graph
        self.calls += 1
        scores = 100 * images.mean(dim=(1, 2, 3))
        if self.calls > self.after:
            scores[is_bad] = torch.nan
        return scores


def brightness(device, bad_prompt="", after=0):
    return Brightness(bad_prompt, after)
