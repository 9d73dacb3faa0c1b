"""The latent reward model in training: its start, its input, what it exports."""

import io
import shutil
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import GOLDEN, MODELS, model_folder, randn
from labelled_pairs import make_row, write_splits
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from config import lrm_tiny
from spo.command_line.values import fill
from spo.errors import UserError
from spo.models.loading import ModelSource
from spo.models.optimizers import ADAMW, OptimizerSettings
from spo.preference.batches import RawBatch, decode_batch, decode_image
from spo.preference.lrm import LatentBase, LRMPairScorer, LRMPreparation, LRMSource
from spo.preference.pair_learner import PreferenceLearner, TrainSettings
from spo.preference.pair_recipe import check_training
from spo.scorers.latent_reward import tokenize
from spo.scorers.latent_reward_folder import LatentRewardFolder
from spo.scorers.latent_reward_scorer import load_latent_reward_scorer

CPU = torch.device("cpu")


def base_of(family, precision="no"):
    return LatentBase(ModelSource(model_folder(family)), family, precision, CPU)


def make(family, init_from="", checkpointing=False, dtype=torch.float32):
    """Returns the preparation and the learner of an LRM: a fresh one, or that of the traces."""
    clip = str(MODELS / "tiny-clip")
    source = LRMSource(init_from, clip, guidance_scale=7.5, guide_stages=False)
    base = base_of(family)
    model = source.build(base, 0, checkpointing)
    scorer = LRMPairScorer(
        model, base, lambda: source.whole_unet(ModelSource(model_folder(family)), family)
    )
    train = lrm_tiny.get_config().train
    adamw = fill(OptimizerSettings, train, optimizer=ADAMW)
    settings = fill(TrainSettings, train, optimizer=adamw, max_train_steps=100)
    preparation = LRMPreparation(base, 16, 20, 0, 8)
    return preparation, PreferenceLearner(scorer, scorer, settings, CPU, dtype)


def gradients(learner):
    return {name: p.grad.clone() for name, p in learner.scorer.learned().items()}


def batch_of(n):
    return decode_batch(RawBatch([make_row(i) for i in range(n)], range(n)), 16, stretch=True)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_fresh_model_starts_from_the_base_and_learns_with_all_that_scores_read(family):
    base, (preparation, learner) = base_of(family), make(family)
    unet, encoders = base.hand_over()
    model = learner.scorer.model
    for own, given in zip((model.unet, model.text_encoder), (unet, encoders[0]), strict=True):
        assert all(map(torch.equal, own.parameters(), given.parameters()))
    assert model.logit_scale.item() == pytest.approx(2.6592)
    assert model.visual_projection.weight.std().item() == pytest.approx(0.02, rel=0.2)
    if family == "sd15":
        clip = load_file(MODELS / "tiny-clip" / "model.safetensors")["text_projection.weight"]
        assert torch.equal(model.text_projection.weight, clip)
    learner.backward(preparation.training_pairs(batch_of(4), 1.0), last=True)
    # Biases that shift all keys alike have no effect on a softmax.
    learned = learner.scorer.learned()
    assert all(p.grad is not None for p in learned.values())
    assert all(p.grad.abs().max() > 0 for n, p in learned.items() if "k_proj.bias" not in n)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    last = f"layers.{model.text_encoder.config.num_hidden_layers - 1}."
    assert all(last in name or "final_layer_norm" in name for name in frozen)
    assert bool(frozen) == (family == "sdxl")
    assert {p.dtype for p in learned.values()} == {torch.float32}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_gradient_checkpointing_changes_nothing(family):
    found = []
    for checkpointing in (False, True):
        preparation, learner = make(family, checkpointing=checkpointing)
        learner.backward(preparation.training_pairs(batch_of(3), 1.0), last=True)
        found.append(gradients(learner))
    assert all(torch.allclose(found[0][k], found[1][k], rtol=1e-4, atol=1e-6) for k in found[0])


def test_mixed_precision_leaves_the_scores_in_fp32(monkeypatch):
    preparation, learner = make("sd15", dtype=torch.bfloat16)
    _, exact = make("sd15")
    seen = []
    own = learner.scorer.model.visual_projection
    own.register_forward_hook(
        lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype))
    )
    pairs = preparation.training_pairs(batch_of(3), 1.0)
    _, scores = learner.backward(pairs, last=True)
    assert seen == [(torch.float32, torch.float32)] and scores.dtype == torch.float32
    _, wanted = exact.backward(pairs, last=True)
    assert not torch.equal(scores, wanted)  # the networks run in bf16
    torch.testing.assert_close(scores, wanted, atol=0.5, rtol=0)


def test_timesteps_and_noise_of_training_and_validation():
    preparation, _ = make("sd15")
    drawn = preparation.draw_noise("training", range(2000))
    timesteps, counts = drawn.timesteps.unique(return_counts=True)
    assert timesteps.tolist() == list(range(1, 1000, 50))
    assert (counts - 100).abs().max() < 50
    numbers = torch.cat([drawn.posterior, drawn.noise], dim=1)
    assert abs(numbers.mean()) < 0.01 and abs(numbers.std() - 1) < 0.01
    correlation = torch.corrcoef(numbers.transpose(0, 1).flatten(1))
    assert (correlation - torch.eye(4)).abs().max() < 0.02
    batch = batch_of(2)
    seen, again = (dict(preparation.validation_images(batch)) for _ in range(2))
    assert list(seen) == [1, 251, 501, 701, 951]
    assert all(torch.equal(seen[t], again[t]) for t in seen)
    noise = preparation.draw_noise("validation", batch.places)
    clean = preparation.latents(preparation.clean_images(batch), noise.posterior)
    # alphas_cumprod of SD1.5 at t = 1 and t = 951.
    for t, abar in ((1, 0.998296), (951, 0.008155)):
        wanted = abar**0.5 * clean + (1 - abar) ** 0.5 * noise.noise
        torch.testing.assert_close(seen[t], wanted, atol=1e-3, rtol=0)
    all_of_them, _ = make("sd15")
    all_of_them = replace(all_of_them, num_timesteps=1000)
    assert torch.equal(all_of_them.timesteps, torch.arange(1000))


def test_logarithmic_warm_up_by_hand():
    adamw = fill(OptimizerSettings, lrm_tiny.get_config().train, optimizer=ADAMW)
    adamw = replace(adamw, learning_rate=2.0)
    train = lrm_tiny.get_config().train
    changes = {"optimizer": adamw, "max_train_steps": 12, "warmup": "logarithmic"}
    settings = fill(TrainSettings, train, warmup_steps=8, **changes)
    # log 2 / log 8 = 1/3, log 4 / log 8 = 2/3; then a quarter less at each step.
    wanted = {0: 0.0, 1: 2 / 3, 3: 4 / 3, 7: 2.0, 8: 2.0, 9: 1.5, 10: 1.0, 11: 0.5}
    for step, rate in wanted.items():
        assert settings.learning_rate(step) == pytest.approx(rate)
    assert fill(TrainSettings, train, warmup_steps=1, **changes).learning_rate(0) == 0


def test_images_are_stretched():
    # Red, green and blue stripes, 60 x 10: a crop would show the green one alone.
    stripes = np.eye(3, dtype=np.uint8).repeat(20, 0)[None].repeat(10, 0) * 255
    buffer = io.BytesIO()
    Image.fromarray(stripes).save(buffer, "PNG")
    stretched = decode_image(buffer.getvalue(), 12, stretch=True)
    assert stretched.shape == (12, 12, 3)
    assert (stretched[:, [1, 6, 10]] == np.eye(3, dtype=np.uint8) * 255).all()
    assert (decode_image(buffer.getvalue(), 12)[:, :, 1] == 255).all()


@pytest.mark.parametrize("init_from", ["", "trace"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_export_is_the_published_layout_and_scores_alike(tmp_path, family, init_from):
    given = MODELS / f"tiny-lrm-{family}"
    preparation, learner = make(family, init_from and str(given))
    for parameter in learner.scorer.learned().values():  # a step of training
        parameter.data += 0.01
    learner.scorer.export(tmp_path)
    folder = tmp_path / "latent_reward_model"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {
        path.relative_to(given).as_posix() for path in given.rglob("*") if path.is_file()
    }
    assert not list(tmp_path.glob("*.partial"))
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    CLIPTextModel.from_pretrained(folder / "text_encoder")
    if family == "sdxl":
        CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
    source = given if init_from else MODELS / f"tiny-{family}"
    base = UNet2DConditionModel.from_pretrained(source / "unet")
    same = {n for n, p in unet.named_parameters() if torch.equal(p, base.get_parameter(n))}
    up = {
        n for n, _ in unet.named_parameters() if n.startswith(("up_blocks", "conv_norm", "conv_o"))
    }
    assert same == up
    published = torch.load(given / "state_dict.pt", weights_only=True)
    assert torch.load(folder / "state_dict.pt", weights_only=True).keys() == published.keys()
    scorer = load_latent_reward_scorer(
        CPU, "preference", checkpoint=str(folder), base=model_folder(family)
    )
    latents, t, prompts = randn(2, 2, 4, 8, 8, seed=3), 501, ["a fox", "an owl on a roof"]
    ids = tokenize(preparation.backbone.tokenizers.values(), prompts)
    wanted = learner.scores(latents, torch.tensor([t, t]), *ids)
    # Both images of a prompt in one batch, as in training: a batch of another size rounds differently.
    text = scorer.encode_prompts(prompts)[torch.tensor([0, 0, 1, 1])]
    found = scorer.score(latents.flatten(0, 1), text, t).view(2, 2)
    torch.testing.assert_close(found, wanted)
    assert (wanted - wanted.flip(1)).abs().min() > 1e-3
    # Again, over the first.
    learner.scorer.export(tmp_path)
    LatentRewardFolder(str(folder), "key").check()


def lrm_folder(tmp_path, lacks="", **heads):
    """Returns a copy of the tiny LRM without a part, or with other heads."""
    folder = shutil.copytree(MODELS / "tiny-lrm-sd15", tmp_path / "lrm")
    if lacks:
        shutil.rmtree(folder / lacks)
    saved = torch.load(folder / "state_dict.pt", weights_only=True)
    torch.save(saved | heads, folder / "state_dict.pt")
    return str(folder)


FAULTS = {
    "preference.init_from: no folder or file 'no'|preference.init_from: 'no' is neither": {
        "preference.init_from": "no"
    },
    "preference.init_from: .*tiny-lrm-sdxl' is of sdxl, but family is 'sd15'": {
        "preference.init_from": str(MODELS / "tiny-lrm-sdxl")
    },
    "preference.init_from: .*tiny-sd15' lacks state_dict.pt": {
        "preference.init_from": str(MODELS / "tiny-sd15")
    },
    "preference.init_from: .*tiny-spm.bin": {"preference.init_from": str(MODELS / "tiny-spm.bin")},
    "preference.text_projection: .* of width 64, but the text encoder .* makes 32": {
        "preference.text_projection": "assets/tiny/clip"
    },
    "preference.text_projection: 'no' is neither": {"preference.text_projection": "no"},
    "data.image_size: 32, but the images of pretrained.model, .*, are of 16 pixels": {
        "data.image_size": 32
    },
    "preference.guidance_scale: 0.5 must be 1 .off. or above": {"preference.guidance_scale": 0.5},
    "train.guidance_scale: 3.0 has no effect with preference.model=latent_reward, only with step_": {
        "train.guidance_scale": 3.0
    },
    "preference.guidance_scale: 1.0 has no effect with preference.model=step_aware_clip, only": {
        "preference.model": "step_aware_clip",
        "preference.text_projection": "openai/clip-vit-large-patch14",
    },
    "preference.model: 'pickscore' is none of step_aware_clip, latent_reward": {
        "preference.model": "pickscore"
    },
    "data.resize: 'squeeze' is none of crop, stretch": {"data.resize": "squeeze"},
    "train.warmup: 'cosine' is none of linear, logarithmic": {"train.warmup": "cosine"},
    "train.num_timesteps: 1001 must be a whole number from 1 to 1000": {
        "train.num_timesteps": 1001
    },
    "keep_best: True needs the accuracy that eval_steps": {"eval_steps": 0},
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(GOLDEN.parents[2])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    rows = [make_row(i) for i in range(2)]
    config = lrm_tiny.get_config()
    config.pretrained.model = model_folder("sd15")
    config.preference.text_projection = str(MODELS / "tiny-clip")
    config.data.update(source=str(write_splits(tmp_path / "d", rows, rows)), image_size=16)
    config.logdir = str(tmp_path / "runs")
    return config


@pytest.mark.parametrize("message", FAULTS)
def test_bad_input_is_one_line_before_any_model_loads(config, message):
    config.update_from_flattened_dict(FAULTS[message])
    with pytest.raises(UserError, match=f"^({message})") as error:
        check_training(config, 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"lacks": "text_encoder"}, "lacks text_encoder/config.json"),
        (
            {"logit_scale": torch.ones(2)},
            "does not hold visual_projection, text_projection and log",
        ),
        (
            {"visual_projection": {"weight": torch.ones(24, 95)}},
            r"visual_projection in state_dict.pt is \(24, 95\), but its networks need \(24, 96\)",
        ),
    ],
)
def test_a_damaged_start_is_told_before_any_model_loads(config, tmp_path, damage, message):
    config.preference.init_from = lrm_folder(tmp_path, **damage)
    with pytest.raises(UserError, match=f"^preference.init_from: .*{message}"):
        check_training(config, 1)
