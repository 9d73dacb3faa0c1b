"""The SPM's loss, labels and learning rate, by golden numbers, by hand and by transformers."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDEN, MODELS, randn
from safetensors.torch import load_file
from transformers import get_linear_schedule_with_warmup

from config import spm_base
from spo.command_line.values import fill
from spo.models.optimizers import ADAMW, OptimizerSettings
from spo.preference.pair_learner import SPMPairScorer, TrainSettings, pair_losses
from spo.preference.pair_metrics import is_right
from spo.preference.pair_recipe import SPMSource, build_spm
from spo.preference.preparation import labels_of_scores
from spo.scorers.clip import text_features


def test_loss_is_the_official_one():
    golden = load_file(GOLDEN / "spm_loss.safetensors")
    images = torch.stack([golden["image_0_features"], golden["image_1_features"]], dim=1)
    scores = golden["logit_scale"] * (images * golden["text_features"][:, None]).sum(dim=-1)
    weights = 1 / golden["num_examples_per_prompt"]
    losses = pair_losses(scores, golden["label_0"])
    loss = (losses * weights).sum() / weights.sum()
    torch.testing.assert_close(loss, golden["loss_in_batch_negatives_false"])


def test_pair_losses_by_hand():
    scores = torch.tensor([[2.0, 0.0], [2.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    losses = pair_losses(scores, torch.tensor([1.0, 0.0, 0.5, 0.5]))
    win, lose = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    expected = [win, lose, 0.0, (win + lose) / 2 - math.log(2)]
    torch.testing.assert_close(losses, torch.tensor(expected))


def test_scores_are_the_scaled_cosines():
    clip = str(MODELS / "tiny-clip")
    spm = build_spm(SPMSource(clip, clip, str(MODELS / "tiny-spm.bin")), 0, False)
    pixels, timesteps = randn(3, 2, 3, 32, 32, seed=1), torch.tensor([1, 501, 951])
    input_ids = torch.randint(500, (3, 77), generator=torch.Generator().manual_seed(2))
    scores = SPMPairScorer(spm)(pixels, timesteps, input_ids)
    text = text_features(spm.model, input_ids)
    for i in (0, 1):
        image = spm.image_features(pixels[:, i], timesteps)
        expected = spm.model.logit_scale.exp() * F.cosine_similarity(image, text)
        torch.testing.assert_close(scores[:, i], expected, atol=1e-4, rtol=1e-4)


def test_labels_of_scores():
    # softmax(0.2, 0) differs by tanh(0.1) = 0.0997, softmax(0.21, 0) by 0.1046.
    scores = torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.20, 0.0], [0.21, 0.0], [5.0, 5.21]])
    assert labels_of_scores(scores, margin=0.1).tolist() == [1.0, 0.0, 0.5, 1.0, 0.0]
    assert labels_of_scores(scores, margin=0.0).tolist() == [1.0, 0.0, 1.0, 1.0, 0.0]


def train_settings(**changes):
    train = spm_base.get_config().train
    adamw = fill(OptimizerSettings, train, optimizer=ADAMW, learning_rate=2.0)
    return fill(TrainSettings, train, optimizer=adamw, **changes)


def test_learning_rate_is_that_of_transformers():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 3, 10)
    settings = train_settings(warmup_steps=3, max_train_steps=10)
    for step in range(10):
        assert settings.learning_rate(step) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert train_settings(warmup_steps=0, max_train_steps=4).learning_rate(0) == 2.0


def test_equal_scores_are_not_right():
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    labels = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.5])
    assert is_right(scores, labels).tolist() == [True, False, False, True, False]
