"""Minibatches of pairs -> LoRA updates and EMA, on the tiny models."""

import contextlib
import hashlib
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    add_tiny_lora,
    load_backbone,
    model_folder,
    randn,
    random_pairs,
    random_weights,
    unet_output,
)

from spo.errors import UserError
from spo.method.learner import Learner, UpdateSettings, distance, update_ema
from spo.method.losses import LOSSES, make_loss
from spo.models.backbone import Backbone
from spo.models.loading import ModelSource

TIMESTEPS = [751, 301, 51, 1]


def make_learner(
    backbone,
    algorithm="gradspo",
    optimizer=torch.optim.AdamW,
    learning_rate=1e-3,
    guidance_scale=5.0,
    clip_eps=0.1,
    beta=10.0,
    wrapper=None,
    **updates,
):
    lora = add_tiny_lora(backbone)
    settings = {
        "accumulation_steps": 1,
        "guidance_scale": guidance_scale,
        "merge": True,
        "max_grad_norm": 1.0,
        "max_skipped_updates": 50,
        "clip_eps": clip_eps,
        "ema_decay": 0.9,
        "ema_every": "optimizer_step",
        "ema_prediction": "fresh",
    }
    train = {"beta": beta, "clip_eps": clip_eps, "grad_scale": 0.5}
    return Learner(
        backbone=backbone,
        unet=wrapper(backbone.unet) if wrapper else backbone.unet,
        lora=lora,
        optimizer=optimizer(lora.parameters.values(), lr=learning_rate),
        loss=make_loss(algorithm, train, {}),
        sampler=backbone.sampler(20, eta=1.0),
        settings=UpdateSettings(**(settings | updates)),
    )


def frozen_hash(backbone):
    digest = hashlib.sha256()
    for module in (backbone.unet, backbone.vae):
        for name, tensor in module.state_dict().items():
            if "lora_" not in name:
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def moved(before, after):
    return math.sqrt(sum((after[k] - v).double().square().sum().item() for k, v in before.items()))


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize(("algorithm", "latents_each"), [("gradspo", 1), ("spo", 1), ("spo", 2)])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_training_moves_the_lora_alone(request, own_backbone, family, algorithm, latents_each):
    backbone = own_backbone(family)
    learner = make_learner(backbone, algorithm)
    pairs = random_pairs(backbone, TIMESTEPS, seed=0, latents_each=latents_each)
    start, frozen = learner.lora.snapshot(), frozen_hash(backbone)
    before = learner.predict(pairs)
    assert before.policy.requires_grad and not before.reference.requires_grad
    first = learner.train_minibatch(pairs, 0)
    assert first.output.loss.item() == pytest.approx(math.log(2))  # the policy is the reference
    assert not first.output.loss.requires_grad
    second = learner.train_minibatch(pairs, 1)
    # Each pair at its own timestep, in the order of the sampler's.
    for step, moves in ((first, False), (second, True)):
        kl = torch.stack([step.kl_at[t] for t in TIMESTEPS])
        assert (kl.diag() > 0).tolist() == [moves] * 4 and kl.diag().isfinite().all()
        kl_of_others = [v for t, v in step.kl_at.items() if t not in TIMESTEPS]
        assert kl.isnan().sum() == 12 and torch.stack(kl_of_others).isnan().all()
    after = learner.predict(pairs)
    assert moved(start, learner.lora.parameters) > 1e-3
    assert frozen_hash(backbone) == frozen
    assert torch.equal(after.reference, before.reference)
    assert not torch.equal(after.policy, before.policy)
    # That reference is what a UNet says that never had a LoRA: win and lose, each its own rows.
    base = request.getfixturevalue(family)
    for own in range(latents_each):
        with torch.no_grad():
            expected = base.predict(
                base.unet, pairs.latents[:, own], pairs.timesteps, pairs.conditioning, 5.0
            )
        torch.testing.assert_close(after.reference[:, own], expected, rtol=1e-4, atol=1e-4)
    if algorithm == "spo":
        assert after.ema is None and learner.ema is None
    else:
        assert not after.ema.requires_grad and not torch.equal(after.ema, after.policy)


@pytest.mark.parametrize("algorithm", LOSSES)
def test_training_lowers_the_loss(own_backbone, algorithm):
    backbone = own_backbone("sd15")
    learner = make_learner(backbone, algorithm, learning_rate=1e-4)
    pairs = random_pairs(backbone, TIMESTEPS, seed=0)
    losses = [learner.train_minibatch(pairs, i).output.loss.item() for i in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 1e-4


@pytest.mark.parametrize("merge", [False, True])
def test_the_sampler_is_the_ema_or_the_policy(own_backbone, merge):
    for algorithm in LOSSES:
        learner = make_learner(own_backbone("sd15"), algorithm, merge=merge)
        policy = random_weights(learner.lora, seed=1)
        learner.lora.assign(policy)
        if learner.ema is not None:
            learner.ema.update(random_weights(learner.lora, seed=2))
        with learner.drawing_network():
            sampled = unet_output(learner.backbone)
        learner.lora.assign(policy if learner.ema is None else learner.ema)
        expected = unet_output(learner.backbone)
        assert torch.equal(sampled, expected) != merge  # merged, it rounds otherwise
        torch.testing.assert_close(sampled, expected, rtol=1e-4, atol=1e-4)


def test_the_sampler_moves_with_the_updates(own_backbone):
    """What was merged once must not be drawn with for ever."""
    for algorithm in LOSSES:
        learner = make_learner(own_backbone("sd15"), algorithm, learning_rate=1e-1)
        pairs = random_pairs(learner.backbone, TIMESTEPS, seed=0)
        for index in range(3):
            learner.train_minibatch(pairs, index)
            with learner.drawing_network():
                sampled = unet_output(learner.backbone)
            with learner.lora.using(learner.ema or learner.lora.snapshot()):
                expected = unet_output(learner.backbone)
            torch.testing.assert_close(sampled, expected, rtol=1e-4, atol=1e-4)


def test_where_the_ema_prediction_comes_from(own_backbone):
    """A fresh pass, the rollout, or nowhere, where nothing is clipped and it makes no difference."""
    results = {}
    for name in ("fresh", "rollout", "none"):
        backbone = own_backbone("sd15")
        learner = make_learner(backbone, clip_eps=None, ema_prediction=name)
        learner.lora.assign(random_weights(learner.lora, seed=1))
        pairs = random_pairs(backbone, TIMESTEPS, seed=0)
        calls = []
        backbone.unet.register_forward_hook(lambda *_, calls=calls: calls.append(0))
        if name == "rollout":
            # Another one than the EMA would make now.
            pairs = replace(pairs, sampler_epsilon=pairs.latents.clone())
        predictions = learner.predict(pairs)
        assert len(calls) == (3 if name == "fresh" else 2)
        if name == "rollout":
            assert torch.equal(predictions.ema, pairs.sampler_epsilon)
        learner.train_minibatch(pairs, 0)
        results[name] = learner.lora.snapshot()
    for name in ("rollout", "none"):
        for key, value in results["fresh"].items():
            torch.testing.assert_close(results[name][key], value, rtol=0, atol=1e-4)


def test_a_lora_as_the_reference(own_backbone):
    backbone = own_backbone("sd15")
    learner = make_learner(backbone)
    learner.reference = random_weights(learner.lora, seed=1)
    pairs = random_pairs(backbone, TIMESTEPS, seed=0)
    reference = learner.predict(pairs).reference
    learner.lora.assign(learner.reference)
    assert torch.equal(reference, learner.predict(pairs).policy)
    assert not torch.equal(reference, learner.predict(pairs).ema)


@pytest.mark.parametrize("algorithm", LOSSES)
def test_accumulated_halves_are_one_batch(own_backbone, algorithm):
    options = {"optimizer": torch.optim.SGD, "learning_rate": 0.1, "max_grad_norm": None}
    whole = make_learner(own_backbone("sd15"), algorithm, **options)
    halves = make_learner(own_backbone("sd15"), algorithm, accumulation_steps=2, **options)
    start = whole.lora.snapshot()
    pairs = random_pairs(whole.backbone, TIMESTEPS, seed=0)
    whole_step = whole.train_minibatch(pairs, 0)
    first = halves.train_minibatch(pairs.select(slice(0, 2)), 0)
    assert first.update is None and not first.is_update and equal(halves.lora.parameters, start)
    second = halves.train_minibatch(pairs.select(slice(2, 4)), 1)
    norms = second.update.grad_norm, whole_step.update.grad_norm
    torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-6)
    assert (whole.updates, halves.updates, halves.minibatches) == (1, 1, 2)
    expected = moved(start, whole.lora.parameters)
    assert moved(whole.lora.snapshot(), halves.lora.parameters) < 1e-4 * expected


@pytest.mark.parametrize("limit", [None, 1e-3])
def test_gradient_clipping(own_backbone, limit):
    sgd = {"optimizer": torch.optim.SGD, "learning_rate": 1.0}
    learner = make_learner(own_backbone("sd15"), max_grad_norm=limit, beta=1e4, **sgd)
    start = learner.lora.snapshot()
    step = learner.train_minibatch(random_pairs(learner.backbone, TIMESTEPS, seed=0), 0)
    assert step.update.grad_norm > 10  # reported before clipping
    expected = step.update.grad_norm.item() if limit is None else limit
    assert moved(start, learner.lora.parameters) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("ema_every", "moves"),
    [("optimizer_step", [2, 4, 6]), ("window", [2, 5])],
)
def test_when_the_ema_moves(own_backbone, ema_every, moves):
    """Two rollouts of three minibatches, two accumulated: updates at 2, 4, 6; windows at 2, 3 + 2."""
    learner = make_learner(own_backbone("sd15"), accumulation_steps=2, ema_every=ema_every)
    pairs = random_pairs(learner.backbone, TIMESTEPS[:2], seed=0)
    seen, updated = [], []
    for minibatch in range(1, 7):
        ema = {name: tensor.clone() for name, tensor in learner.ema.items()}
        policy = learner.lora.snapshot()
        learner.train_minibatch(pairs, index_in_rollout=(minibatch - 1) % 3)
        updated += [] if equal(learner.lora.parameters, policy) else [minibatch]
        if equal(learner.ema, ema):
            continue
        seen.append(minibatch)
        for name, average in learner.ema.items():
            expected = 0.9 * ema[name] + 0.1 * learner.lora.parameters[name]
            torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-7)
    assert (updated, seen) == ([2, 4, 6], moves)


@pytest.mark.parametrize(
    ("family", "precision", "algorithm"),
    [("sd15", "fp16", "gradspo"), ("sd15", "bf16", "spo"), ("sdxl", "bf16", "gradspo")],
)
def test_mixed_precision(family, precision, algorithm):
    backbone = load_backbone(family, precision)
    learner = make_learner(backbone, algorithm)
    start, frozen = learner.lora.snapshot(), frozen_hash(backbone)
    reference = learner.predict(random_pairs(backbone, TIMESTEPS, seed=0)).reference
    for index in range(4):
        step = learner.train_minibatch(random_pairs(backbone, TIMESTEPS, seed=0), index)
        assert step.output.loss.isfinite()
    assert learner.updates >= 1  # the first fp16 ones may overflow until the scale fits
    assert learner.scaler.is_enabled() == (precision == "fp16")
    assert moved(start, learner.lora.parameters) > 1e-3
    tensors = [*learner.lora.parameters.values(), *(learner.ema or {}).values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in tensors)
    assert frozen_hash(backbone) == frozen
    again = learner.predict(random_pairs(backbone, TIMESTEPS, seed=0)).reference
    assert torch.equal(again, reference)


def test_an_fp16_overflow_leaves_the_update_out():
    backbone = load_backbone("sd15", "fp16")
    learner = make_learner(backbone, clip_eps=None)
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    pairs = random_pairs(backbone, TIMESTEPS, seed=0)
    learner.lora.assign(random_weights(learner.lora, seed=1))  # apart from the EMA
    start, ema = learner.lora.snapshot(), {k: v.clone() for k, v in learner.ema.items()}
    step = learner.train_minibatch(pairs, 0)
    assert step.update.skipped and not step.is_update and learner.updates == 0
    assert equal(learner.lora.parameters, start) and equal(learner.ema, ema)
    assert learner.scaler.get_scale() == 2.0**99
    assert all(p.grad is None for p in learner.lora.parameters.values())


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_prediction_types(tmp_path, sd15, prediction_type, guidance_scale):
    folder = tmp_path / "model"
    shutil.copytree(model_folder("sd15"), folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": prediction_type}))
    backbone = Backbone(ModelSource(str(folder)), "sd15", "no", torch.device("cpu"))
    learner = make_learner(backbone, guidance_scale=guidance_scale)
    pairs = random_pairs(backbone, TIMESTEPS, seed=0)
    latents = pairs.latents[:, 0]
    with torch.no_grad():
        output = sd15.predict(
            sd15.unet, latents, pairs.timesteps, pairs.conditioning, guidance_scale
        )
    abar = learner.sampler.alphas_cumprod[TIMESTEPS].view(-1, 1, 1, 1)
    if prediction_type == "v_prediction":
        x0 = abar.sqrt() * latents - (1 - abar).sqrt() * output
    else:
        x0 = output
    epsilon = (latents - abar.sqrt() * x0) / (1 - abar).sqrt()
    found = learner.predict(pairs).reference[:, 0]
    torch.testing.assert_close(found, epsilon, rtol=1e-3, atol=1e-3)
    start = learner.lora.snapshot()
    learner.train_minibatch(pairs, 0)
    assert moved(start, learner.lora.parameters) > 1e-3


def test_recomputed_activations_are_the_policys(own_backbone):
    sgd = {
        "optimizer": torch.optim.SGD,
        "learning_rate": 1.0,
        "max_grad_norm": None,
        "clip_eps": None,
    }
    plain, recomputing = (make_learner(own_backbone("sd15"), **sgd) for _ in range(2))
    recomputing.backbone.unet.enable_gradient_checkpointing()
    pairs = random_pairs(plain.backbone, TIMESTEPS, seed=0)
    for learner in (plain, recomputing):
        learner.lora.assign(random_weights(learner.lora, seed=1))
        learner.ema.update(random_weights(learner.lora, seed=2))
        learner.train_minibatch(pairs, 0)
    assert moved(random_weights(plain.lora, seed=1), plain.lora.parameters) > 1e-3
    assert equal(plain.lora.parameters, recomputing.lora.parameters)


class SyncingUNet(torch.nn.Module):
    """Stands in for DDP: notes the calls of `forward` inside and outside of `no_sync`."""

    def __init__(self, unet):
        super().__init__()
        self.unet, self.local, self.calls = unet, False, []

    def forward(self, *args, **kwargs):
        self.calls.append("local" if self.local else "synced")
        return self.unet(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self):
        self.local = True
        yield
        self.local = False


def test_the_wrapper_sees_the_policy_alone_and_syncs_once_per_update(own_backbone):
    learner = make_learner(own_backbone("sd15"), accumulation_steps=3, wrapper=SyncingUNet)
    pairs = random_pairs(learner.backbone, TIMESTEPS[:1], seed=0)
    for index in range(6):
        learner.train_minibatch(pairs, index)
    assert learner.unet.calls == ["local", "local", "synced"] * 2


def test_the_skipped_ema_prediction_needs_a_loss_without_clips(own_backbone):
    with pytest.raises(UserError, match="train.ema_prediction: without the EMA's prediction"):
        make_learner(own_backbone("sd15"), ema_prediction="none", clip_eps=0.1)


# ---- the moving average against its closed form -------------------------------------------------

MU = 0.9


def tensors(seed):
    return {"a": randn(3, 4, seed=seed), "b": randn(5, seed=seed + 1)}


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_a_policy_that_stands_still(n):
    start, policy, ema = tensors(0), tensors(2), tensors(0)
    for _ in range(n):
        update_ema(ema, policy, MU)
    for name in ema:
        expected = MU**n * start[name].double() + (1 - MU**n) * policy[name].double()
        torch.testing.assert_close(ema[name], expected.float(), rtol=1e-5, atol=1e-6)


def test_a_policy_that_moves():
    ema, n = tensors(0), 6
    policies = [tensors(100 + 10 * i) for i in range(n)]
    for policy in policies:
        update_ema(ema, policy, MU)
    weights = (1 - MU) * MU ** np.arange(n - 1, -1, -1)  # the latest weighs most
    for name, start in tensors(0).items():
        path = np.stack([policy[name].numpy() for policy in policies]).astype(np.float64)
        expected = MU**n * start.numpy() + np.tensordot(weights, path, axes=1)
        np.testing.assert_allclose(ema[name].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_moves_in_place_and_leaves_the_policy_alone():
    ema, policy = tensors(0), {k: torch.nn.Parameter(v) for k, v in tensors(2).items()}
    storage = {name: tensor.data_ptr() for name, tensor in ema.items()}
    update_ema(ema, policy, 0.0)
    assert all(torch.equal(ema[name], policy[name]) for name in ema)
    assert all(torch.equal(policy[name], value) for name, value in tensors(2).items())
    assert {name: tensor.data_ptr() for name, tensor in ema.items()} == storage
    assert not any(tensor.requires_grad for tensor in ema.values())


def test_distance():
    zero = {"a": torch.zeros(2), "b": torch.zeros(1, 1)}
    other = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[12.0]])}
    assert distance(zero, other).item() == 13.0  # sqrt(9 + 16 + 144)
