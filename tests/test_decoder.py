"""A tiny decoder in the VAE's place: what it makes of latents, who uses it, and what does not fit."""

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from helpers import MODELS, PROMPTS, model_folder, randn, save_tiny_decoder
from small_runs import LORA, read_metrics, run, small_config

from spo.costs.meter import flop_counter
from spo.errors import UserError
from spo.method.build import read_recipe
from spo.method.collect import collect_rollout
from spo.models.backbone import Backbone
from spo.models.decoder import decode, load_decoder
from spo.models.loading import ModelSource, check_source
from spo.models.plain_images import ImageSettings, sample_images
from spo.scorers import Scorer
from spo.tiny_world.scenes import draw_scenes

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_decoder(tmp_path_factory.mktemp("decoder"), scaling_factor=0.5)


def load(folder, family="sd15", mixed_precision="no"):
    source = ModelSource(model_folder(family), decoder=folder)
    return Backbone(source, family, mixed_precision, CPU)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@torch.no_grad()
def test_images_are_those_of_diffusers_in_the_convention_of_the_vae(folder, family):
    model = load(folder, family)
    latents = 2 * randn(2, *model.latent_shape, seed=0)
    tiny = AutoencoderTiny.from_pretrained(folder)
    found = model.decode_candidates(latents)
    assert torch.equal(found, tiny.decode(latents / 0.5).sample)
    # Its layers make pixels in [0, 1], as in the code of TAESD.
    pixels = tiny.decoder.layers(torch.tanh(latents / 0.5 / 3) * 3)
    torch.testing.assert_close(found, 2 * pixels - 1)
    assert found.shape == model.decode(latents).shape == (2, 3, 16, 16)


def test_a_decoder_is_frozen_in_the_precision_of_the_run(folder):
    model = load(folder, mixed_precision="bf16")
    assert {p.dtype for p in model.decoder.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.decoder.parameters())
    assert not model.decoder.training
    images = model.decode_candidates(randn(1, *model.latent_shape, seed=0))
    assert images.dtype == torch.float32 and images.isfinite().all()


def refuse(*_, **__):
    raise AssertionError("not to be called here")


class SeenImages(Scorer):
    """A scorer that notes what it is shown."""

    def __init__(self):
        self.images = []

    def encode_prompts(self, prompts):
        return torch.zeros(len(prompts), 1)

    def score(self, images, prompt_features, timestep):
        self.images.append(images)
        return images.mean(dim=(1, 2, 3))


def test_a_rollout_decodes_with_it_slice_by_slice(folder, monkeypatch, tmp_path):
    model, scorer = load(folder), SeenImages()
    monkeypatch.setattr(model.vae, "decode", refuse)
    sizes, tiny = [], model.decoder.decode
    monkeypatch.setattr(
        model.decoder, "decode", lambda x, **options: sizes.append(len(x)) or tiny(x, **options)
    )
    config = small_config(tmp_path / "run", sample__decode_batch_size=3)
    collect_rollout(
        model,
        scorer,
        model.sampler(4, eta=1.0),
        read_recipe(config).collect,
        PROMPTS[:2],
        torch.arange(2),
        torch.Generator().manual_seed(0),
    )
    # Two comparisons of 2 candidates of 2 prompts: the final latents are decoded with it, too.
    assert sizes == [3, 1, 3, 1] == [len(images) for images in scorer.images]


def test_nothing_else_decodes_with_it(folder, sd15, monkeypatch):
    model = load(folder)
    monkeypatch.setattr(model.decoder, "decode", refuse)
    images = ImageSettings(2, 5.0, seed=0)
    found = sample_images(model, PROMPTS[:1], [0], images)
    assert torch.equal(found, sample_images(sd15, PROMPTS[:1], [0], images))
    noise, generators = randn(1, *model.latent_shape, seed=0), [torch.Generator().manual_seed(0)]
    drawn = model.draw(PROMPTS[:1], noise, "ddim", 2, 5.0, generators)
    generators = [torch.Generator().manual_seed(0)]
    assert torch.equal(drawn, sd15.draw(PROMPTS[:1], noise, "ddim", 2, 5.0, generators))


def test_without_one_the_vae_decodes_candidates(sd15):
    latents = randn(2, *sd15.latent_shape, seed=0)
    assert sd15.decoder is sd15.vae
    assert torch.equal(sd15.decode_candidates(latents), sd15.decode(latents))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_channels": 16}, "decodes latents of 16 channels, but those .* have 4"),
        ({"upsampling_scaling_factor": 4}, r"makes \(3, 4, 4\) of one latent, .* VAE \(3, 2, 2\)"),
        ({"out_channels": 4}, r"makes \(4, 2, 2\) of one latent"),
    ],
)
def test_a_decoder_that_does_not_fit(tmp_path, changes, message):
    source = ModelSource(model_folder("sd15"), decoder=save_tiny_decoder(tmp_path, **changes))
    with pytest.raises(UserError, match=f"sample.decoder: .*{message}") as error:
        check_source(source, "sd15")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"_class_name": "AutoencoderTiny", "latent_channels": "four"}']
)
def test_a_config_file_that_is_nonsense(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="sample.decoder: .*config.json does not describe") as error:
        check_source(ModelSource(model_folder("sd15"), decoder=str(tmp_path)), "sd15")
    assert "\n" not in str(error.value)


def test_a_decoder_is_held_against_the_vae_of_the_run(folder, tmp_path):
    check_source(ModelSource(model_folder("sd15"), decoder=folder), "sd15")
    vae = json.loads((Path(model_folder("sd15")) / "vae" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(vae | {"latent_channels": 6}))
    with pytest.raises(UserError, match="sample.decoder: .* base model have 6"):
        check_source(ModelSource(model_folder("sd15"), vae=str(tmp_path), decoder=folder), "sd15")


def test_damaged_weights(tmp_path):
    weights = Path(save_tiny_decoder(tmp_path)) / "diffusion_pytorch_model.safetensors"
    for content in (weights.read_bytes()[:1000], b""):
        weights.write_bytes(content)
        with pytest.raises(UserError, match="sample.decoder: .* cannot be loaded") as error:
            load_decoder(str(tmp_path), torch.float32)
        assert "\n" not in str(error.value)


def test_a_run_with_a_decoder_scores_other_images_and_draws_the_same(folder, tmp_path, capsys):
    with_tiny = run(tmp_path / "tiny", sample__decoder=folder, num_epochs=1)
    exact = run(tmp_path / "exact", num_epochs=1)
    first, other = (read_metrics(run_dir)[0] for run_dir in (with_tiny, exact))
    assert first["score_mean"] != other["score_mean"]
    assert (with_tiny / LORA).read_bytes() != (exact / LORA).read_bytes()
    pictures = [run_dir / "validation" / "epoch_0000_policy.png" for run_dir in (with_tiny, exact)]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert json.loads((with_tiny / "config.json").read_text())["sample"]["decoder"] == folder
    capsys.readouterr()
    run(tmp_path / "tiny", num_epochs=2)
    assert f"resume: sample.decoder was {folder!r}, and is None from here on" in (
        capsys.readouterr().out
    )


def test_the_committed_decoder_is_cheap_and_close_to_the_tiny_worlds_vae():
    committed = ROOT / "assets" / "tiny"
    source = ModelSource(str(committed / "sd15"), decoder=str(committed / "decoder"))
    check_source(source, "sd15")
    model = Backbone(source, "sd15", "no", CPU)
    _, images = draw_scenes(64, torch.Generator().manual_seed(7))
    latents = model.encode_images(images, torch.zeros(64, *model.latent_shape))
    flops, decoded = [], []
    for autoencoder in (model.vae, model.decoder):
        with flop_counter() as counter, torch.no_grad():
            decoded.append(decode(autoencoder, latents))
        flops.append(counter.get_total_flops())
    assert flops[1] < flops[0] / 5
    error = (decoded[1] - decoded[0]).square().mean().sqrt()
    assert 0 < error < 0.35 * decoded[0].std()  # measured: 0.29
    size = sum(os.path.getsize(file) for file in (committed / "decoder").iterdir())
    assert size < 300_000


def test_the_tiny_models_fit(folder):
    for family in ("sd15", "sdxl"):
        check_source(ModelSource(str(MODELS / f"tiny-{family}"), decoder=folder), family)
