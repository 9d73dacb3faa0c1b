"""The SPM's input in training, and the gradient of its loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import MODELS, PROMPTS, official_scheduler, randn, scorer_source
from labelled_pairs import make_row

from config import spm_base
from spo.command_line.values import fill
from spo.errors import UserError
from spo.models.optimizers import ADAMW, OptimizerSettings
from spo.preference.batches import RawBatch, decode_batch
from spo.preference.pair_learner import PreferenceLearner, SPMPairScorer, TrainSettings
from spo.preference.pair_recipe import SPMSource, build_spm
from spo.preference.preparation import PairNoise, SPMPreparation, labels_of_scores
from spo.scorers import load_scorer
from spo.scorers.clip import CLIPInputs

CLIP = str(MODELS / "tiny-clip")
SIZE = 16  # pixels; the tiny VAEs halve them


def batch_of(n, **changes):
    rows = [make_row(i, **changes) for i in range(n)]
    return decode_batch(RawBatch(rows, range(n)), SIZE)


def preparation(backbone, *labels, seed=0, size=SIZE, at_once=8):
    own = {"inputs": CLIPInputs(CLIP), "guidance_scale": 5.0}
    return SPMPreparation(backbone, size, 1000, seed, at_once, *labels, **own)


def make_learner(gradient_checkpointing=False, dtype=torch.float32, **changes):
    source = SPMSource(CLIP, CLIP, str(MODELS / "tiny-spm.bin"))
    spm = build_spm(source, 0, gradient_checkpointing)
    train = spm_base.get_config().train
    changes |= {"max_train_steps": 10, "warmup_steps": 0}
    adamw = fill(OptimizerSettings, train, optimizer=ADAMW, learning_rate=1e-3)
    settings = fill(TrainSettings, train, optimizer=adamw, **changes)
    scorer = SPMPairScorer(spm)
    return PreferenceLearner(scorer, scorer, settings, torch.device("cpu"), dtype)


def noise_for(backbone, timesteps, seed):
    n, shape = len(timesteps), (backbone.latent_shape[0], SIZE // 2, SIZE // 2)
    posterior, noise = randn(n, 2, *shape, seed=seed), randn(n, 1, *shape, seed=seed + 1)
    return PairNoise(torch.tensor(timesteps), posterior, noise.expand_as(posterior))


def gradients_of(learner, *minibatches):
    judged = [learner.backward(pairs, last=pairs is minibatches[-1]) for pairs in minibatches]
    gradients = {name: p.grad.clone() for name, p in learner.scorer.learned().items()}
    learner.optimizer.zero_grad()
    return judged, gradients


def assert_same_gradients(found, expected):
    """Compares up to rounding, which the number of rows in a batch changes."""
    differences = torch.cat([(found[name] - expected[name]).flatten() for name in expected])
    total = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    assert differences.norm() < 1e-3 * total


def test_predictions_are_those_of_diffusers(backbone):
    """Predicts each image by itself, with the pipeline's own modules and diffusers' scheduler."""
    images = randn(3, 2, 3, SIZE, SIZE, seed=1).clamp(-1, 1)
    timesteps = [5, 501, 951]
    noise = noise_for(backbone, timesteps, seed=2)
    found = preparation(backbone).predicted_images(images, PROMPTS, noise)
    scheduler = official_scheduler(20, clip_sample=False)
    assert found.shape == images.shape
    for i, prompt in enumerate(PROMPTS):
        conditioning = backbone.encode_prompts([prompt])
        for j in (0, 1):
            posterior = backbone.vae.encode(images[i, j][None]).latent_dist
            latents = posterior.mean + posterior.std * noise.posterior[i, j][None]
            latents = latents * backbone.vae.config.scaling_factor
            t = torch.tensor([timesteps[i]])
            noisy = scheduler.add_noise(latents, noise.noise[i, j][None], t)
            with torch.no_grad():
                output = backbone.predict(backbone.unet, noisy, t, conditioning, 5.0)
                x0 = scheduler.step(output, timesteps[i], noisy).pred_original_sample
                expected = backbone.vae.decode(x0 / backbone.vae.config.scaling_factor).sample
            torch.testing.assert_close(found[i, j], expected[0], atol=1e-4, rtol=1e-4)


def test_the_posterior_is_sampled_as_diffusers_does(sd15):
    images = randn(2, 3, SIZE, SIZE, seed=3)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    sampled = sd15.vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(7))
    torch.testing.assert_close(
        sd15.encode_images(images, noise), sampled * sd15.vae.config.scaling_factor
    )


def test_equal_images_stay_equal_only_if_sampled_alike(sd15):
    """Both images get one noise, so equal latents make equal predictions."""
    image = randn(1, 1, 3, SIZE, SIZE, seed=4).expand(-1, 2, -1, -1, -1)
    noise = noise_for(sd15, [601], seed=5)
    alike = replace(noise, posterior=noise.posterior[:, :1].expand(-1, 2, -1, -1, -1))
    prepare = preparation(sd15)
    same = prepare.predicted_images(image, PROMPTS[:1], alike)
    torch.testing.assert_close(same[:, 0], same[:, 1], atol=1e-5, rtol=0)
    other = prepare.predicted_images(image, PROMPTS[:1], noise)
    assert (other[:, 0] - other[:, 1]).abs().max() > 1e-4


def test_no_more_images_at_once_than_told(backbone, monkeypatch):
    """The predictions stay the same, though a pair may be split between two parts."""
    images = randn(3, 2, 3, SIZE, SIZE, seed=1)
    noise = noise_for(backbone, [5, 501, 951], seed=2)
    whole = preparation(backbone, at_once=6).predicted_images(images, PROMPTS, noise)
    sizes = []
    for name in ("encode_images", "predict", "decode"):
        own = getattr(backbone, name)

        def counted(*arguments, own=own):
            output = own(*arguments)
            sizes.append(len(output))
            return output

        monkeypatch.setattr(backbone, name, counted)
    parts = preparation(backbone, at_once=5).predicted_images(images, PROMPTS, noise)
    assert sizes == [5, 1, 5, 5, 1, 1]
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)


def test_noise_depends_on_the_place_of_its_pair_alone(sd15):
    prepare = preparation(sd15)
    together, alone = (prepare.draw_noise("training", places) for places in ([1, 2, 3], [2]))
    for name in ("timesteps", "posterior", "noise"):
        assert torch.equal(getattr(together, name)[1:2], getattr(alone, name))
        assert not torch.equal(getattr(together, name)[:1], getattr(alone, name))
    assert not torch.equal(together.posterior[:, 0], together.posterior[:, 1])
    other = prepare.draw_noise("validation", [2])
    assert not torch.equal(other.noise, alone.noise)
    many = prepare.draw_noise("training", range(3000))
    assert many.timesteps.min() < 10 and 990 <= many.timesteps.max() < 1000
    assert abs(many.timesteps.float().mean() - 499.5) < 20
    normal = torch.cat([many.posterior, many.noise[:, :1]], dim=1)
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03


def test_swapping_images_and_labels_changes_neither_loss_nor_gradient(sd15, monkeypatch):
    batch = batch_of(5)
    swapped = replace(batch, images=batch.images.flip(1), labels=1 - batch.labels)
    prepare, noise = preparation(sd15), noise_for(sd15, [20, 251, 501, 751, 990], seed=6)

    def run(batch, noise):
        monkeypatch.setattr(prepare, "draw_noise", lambda use, places: noise)
        learner = make_learner()
        return gradients_of(learner, prepare.training_pairs(batch, batch.weights.sum()))

    (one,), gradients = run(batch, noise)
    (other,), others = run(swapped, replace(noise, posterior=noise.posterior.flip(1)))
    torch.testing.assert_close(one[0], other[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one[1], other[1].flip(1), atol=1e-4, rtol=1e-4)
    assert_same_gradients(gradients, others)
    (wrong,), _ = run(replace(batch, labels=1 - batch.labels), noise)
    assert (wrong[0] - one[0]).abs().max() > 1e-3


def test_every_weight_gets_a_gradient(sd15):
    learner, batch = make_learner(), batch_of(4)
    _, gradients = gradients_of(learner, preparation(sd15).training_pairs(batch, 1.0))
    assert set(gradients) == set(learner.scorer.learned())
    # A bias that shifts all keys alike has no effect on the softmax.
    assert all(g.abs().max() > 0 for name, g in gradients.items() if "k_proj.bias" not in name)


def test_gradient_checkpointing_changes_nothing(sd15):
    pairs = preparation(sd15).training_pairs(batch_of(3), 1.0)
    plain, checkpointed = (gradients_of(make_learner(on), pairs)[1] for on in (False, True))
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, checkpointed[name])


def test_accumulated_minibatches_are_one_batch(sd15):
    """1 / examples is normalised over the whole update, not within each minibatch."""
    prepare, learner, whole = preparation(sd15), make_learner(), batch_of(6)
    total = whole.weights.sum()
    assert total != 6
    (one,), expected = gradients_of(learner, prepare.training_pairs(whole, total))
    rows = [make_row(i) for i in range(6)]
    parts = [decode_batch(RawBatch(rows[a:b], range(a, b)), SIZE) for a, b in ((0, 2), (2, 6))]
    judged, found = gradients_of(learner, *(prepare.training_pairs(p, total) for p in parts))
    losses = torch.cat([losses for losses, _ in judged])
    torch.testing.assert_close(losses, one[0], atol=1e-3, rtol=0)
    assert_same_gradients(found, expected)
    # Minibatches normalised one by one make a different gradient.
    apart = [prepare.training_pairs(p, 2 * p.weights.sum()) for p in parts]
    with pytest.raises(AssertionError):
        assert_same_gradients(gradients_of(learner, *apart)[1], expected)


def test_a_pair_without_sound_images_teaches_nothing(sd15):
    prepare, learner = preparation(sd15), make_learner()
    rows = [make_row(0), make_row(1, jpg_0=b"broken"), make_row(2)]
    batch = decode_batch(RawBatch(rows, (0, 1, 2)), SIZE)
    sound = [decode_batch(RawBatch([rows[i]], (i,)), SIZE) for i in (0, 2)]
    total = batch.weights.sum()
    _, found = gradients_of(learner, prepare.training_pairs(batch, total))
    _, expected = gradients_of(learner, *(prepare.training_pairs(b, total) for b in sound))
    assert_same_gradients(found, expected)


def test_pixels_are_clamped_and_stretched_by_the_book(sd15):
    images = 1.5 * randn(2, 3, 20, 40, seed=8)
    prepare = CLIPInputs(CLIP).prepare
    expected = F.interpolate((images / 2 + 0.5).clamp(0, 1), (32, 32), mode="bicubic").clamp(0, 1)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    torch.testing.assert_close(prepare.stretched(images), (expected - mean) / std)


def test_validation_takes_the_clean_images_at_0_and_the_timestep_it_is_asked_for(sd15):
    prepare, batch = preparation(sd15), batch_of(2)
    clean = batch.images.float() / 127.5 - 1
    assert np.isclose(clean.min(), -1, atol=1) and clean.max() <= 1
    expected = CLIPInputs(CLIP).prepare.stretched(clean.flatten(0, 1)).unflatten(0, (2, 2))
    seen = dict(prepare.validation_images(batch))
    assert list(seen) == [0, 251, 501, 701, 951]
    torch.testing.assert_close(seen[0], expected)
    again, other = (
        dict(each.validation_images(batch)) for each in (prepare, preparation(sd15, seed=1))
    )
    assert torch.equal(seen[251], again[251]) and not torch.equal(seen[251], other[251])
    assert not torch.equal(seen[251], seen[951])


def test_pickscore_labels_replace_those_of_the_data(sd15):
    scorer = load_scorer(scorer_source("pickscore"), torch.device("cpu"))
    batch = batch_of(6)
    images = batch.images.float() / 127.5 - 1
    scores = torch.stack(
        [
            scorer.score(images[:, i], scorer.encode_prompts(batch.captions), timestep=0)
            for i in (0, 1)
        ],
        dim=1,
    )
    gaps = (scores.softmax(dim=1) @ torch.tensor([1.0, -1.0])).abs()
    margin = gaps.median().item()  # some pairs become ties
    pairs = preparation(sd15, scorer, margin).training_pairs(batch, 1.0)
    assert torch.equal(pairs.labels, labels_of_scores(scores, margin))
    assert (pairs.labels == 0.5).sum() == 3 and not torch.equal(pairs.labels, batch.labels)


def test_a_fresh_spm_is_pickscore_in_fp32_and_trains():
    spm = build_spm(SPMSource(CLIP, CLIP, ""), 0, False)
    assert spm.training and all(p.requires_grad for p in spm.parameters())
    assert {p.dtype for p in spm.parameters()} == {torch.float32}


def test_an_image_size_that_the_vae_cannot_halve(sd15):
    with pytest.raises(UserError, match="data.image_size: 15 is not a multiple of 2"):
        preparation(sd15, size=15)
