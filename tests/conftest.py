"""Session-wide: one thread, no progress bars, the tiny models loaded once."""

import copy

import diffusers
import pytest
import torch
import transformers
from absl import flags
from helpers import load_backbone, scorer_source

from spo.scorers import load_scorer

# Tiny models run faster on one thread, and sum in the same order on every machine.
torch.set_num_threads(1)
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def own_flags():
    """Removes the flags that a script defined during a test."""
    yield
    for name in [name for name in flags.FLAGS if name.partition(".")[0] == "config"]:
        delattr(flags.FLAGS, name)


@pytest.fixture(scope="session")
def sd15():
    """The tiny SD1.5 in fp32, without LoRA: for tests that leave it as it is."""
    return load_backbone("sd15")


@pytest.fixture(scope="session")
def sdxl():
    """The tiny SDXL in fp32, without LoRA: for tests that leave it as it is."""
    return load_backbone("sdxl")


@pytest.fixture(params=["sd15", "sdxl"])
def backbone(request):
    """Both families in turn, not to be changed."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def own_backbone(request):
    """A function from a family to a backbone that the test may change."""
    return lambda family: copy.deepcopy(request.getfixturevalue(family))


@pytest.fixture(scope="session")
def spm_scorer():
    """The tiny step-aware preference model of the golden traces."""
    return load_scorer(scorer_source("step_aware_clip"), torch.device("cpu"))
