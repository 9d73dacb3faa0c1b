"""The SPM's loss, labels and learning rate, by golden numbers, by hand and by transformers."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDEN, randn
from safetensors.torch import load_file
from transformers import get_linear_schedule_with_warmup

from spo.preference.loss import PairFeatures, in_batch_losses, learning_rate_factor, pair_losses
from spo.preference.preparation import labels_of_scores
from spo.preference.spm_metrics import bucket_names, is_right


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "spm_loss.safetensors")


def features_of(golden):
    images = torch.stack([golden["image_0_features"], golden["image_1_features"]], dim=1)
    return PairFeatures(images, golden["text_features"], golden["logit_scale"])


def weighted(losses, golden):
    weights = 1 / golden["num_examples_per_prompt"]
    return (losses * weights).sum() / weights.sum()


def test_loss_is_the_official_one(golden):
    loss = weighted(pair_losses(features_of(golden).scores, golden["label_0"]), golden)
    torch.testing.assert_close(loss, golden["loss_in_batch_negatives_false"])


def test_loss_with_in_batch_negatives_is_the_official_one(golden):
    features, labels = features_of(golden), golden["label_0"]
    valid = torch.ones(len(labels), dtype=torch.bool)
    losses = in_batch_losses(features, features, valid, 0, labels)
    torch.testing.assert_close(weighted(losses, golden), golden["loss_in_batch_negatives_true"])


def test_in_batch_losses_of_parts_are_those_of_the_whole(golden):
    features, labels = features_of(golden), golden["label_0"]
    valid = torch.ones(len(labels), dtype=torch.bool)
    whole = in_batch_losses(features, features, valid, 0, labels)
    part = replace(features, image=features.image[4:7], text=features.text[4:7])
    torch.testing.assert_close(in_batch_losses(part, features, valid, 4, labels[4:7]), whole[4:7])


def test_pairs_that_are_not_valid_are_no_negatives(golden):
    features, labels = features_of(golden), golden["label_0"]
    kept = torch.tensor([0, 1, 2, 4, 5, 6, 7, 8, 9, 10])
    valid = torch.ones(len(labels), dtype=torch.bool)
    valid[3] = False
    masked = in_batch_losses(features, features, valid, 0, labels)
    fewer = replace(features, image=features.image[kept], text=features.text[kept])
    alone = in_batch_losses(fewer, fewer, valid[kept], 0, labels[kept])
    torch.testing.assert_close(masked[kept], alone)
    assert masked.isfinite().all()


def test_pair_losses_by_hand():
    scores = torch.tensor([[2.0, 0.0], [2.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    losses = pair_losses(scores, torch.tensor([1.0, 0.0, 0.5, 0.5]))
    win, lose = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    expected = [win, lose, 0.0, (win + lose) / 2 - math.log(2)]
    torch.testing.assert_close(losses, torch.tensor(expected))


def test_scores_are_the_scaled_cosines():
    image, text = F.normalize(randn(3, 2, 5, seed=1), dim=-1), F.normalize(randn(3, 5, seed=2))
    scores = PairFeatures(image, text, torch.tensor(7.0)).scores
    expected = 7 * torch.stack([F.cosine_similarity(image[:, i], text) for i in (0, 1)], dim=1)
    torch.testing.assert_close(scores, expected)


def test_labels_of_scores():
    # softmax(0.2, 0) differs by tanh(0.1) = 0.0997, softmax(0.21, 0) by 0.1046.
    scores = torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.20, 0.0], [0.21, 0.0], [5.0, 5.21]])
    assert labels_of_scores(scores, margin=0.1).tolist() == [1.0, 0.0, 0.5, 1.0, 0.0]
    assert labels_of_scores(scores, margin=0.0).tolist() == [1.0, 0.0, 1.0, 1.0, 0.0]


def test_learning_rate_is_that_of_transformers():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 3, 10)
    for step in range(10):
        assert learning_rate_factor(step, 3, 10) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert learning_rate_factor(0, 0, 4) == 1.0


def test_equal_scores_are_not_right():
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    labels = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.5])
    assert is_right(scores, labels).tolist() == [True, False, False, True, False]


@pytest.mark.parametrize("total", [1000, 998])
def test_bucket_names_say_what_falls_into_them(total):
    bucket = torch.arange(total) * 5 // total
    found = [(bucket == i).nonzero().flatten() for i in range(5)]
    assert bucket_names(total) == [f"{part[0]}-{part[-1]}" for part in found]
