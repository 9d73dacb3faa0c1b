"""The step-aware preference model against the CLIP that it starts from, and its checkpoints."""

import os

import numpy as np
import pytest
import torch
from helpers import MODELS, randn
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from spo.errors import UserError
from spo.scorers.clip import text_features
from spo.scorers.step_aware_clip import (
    StepAwareEncoderLayer,
    TimestepEmbedder,
    fresh_step_aware_clip,
    load_step_aware_clip,
)

CHECKPOINT = MODELS / "tiny-spm.bin"


@pytest.fixture(scope="module")
def clip():
    return CLIPModel.from_pretrained(MODELS / "tiny-clip").eval()


@pytest.fixture(scope="module")
def pixels():
    return randn(4, 3, 32, 32, seed=0)


@pytest.fixture(scope="module")
def tokens():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 512, (4, 77), generator=generator)
    ids[:, 0] = 512
    ids[torch.arange(4), torch.tensor([3, 9, 20, 76])] = 513  # ends of text
    return ids


@pytest.fixture
def checkpoint():
    return torch.load(CHECKPOINT, weights_only=True)


def tiny_config():
    return CLIPConfig.from_pretrained(MODELS / "tiny-clip")


def scores(spm, pixels, tokens, timestep):
    with torch.no_grad():
        timesteps = torch.full((len(pixels),), timestep)
        return spm.score(pixels, timesteps, text_features(spm.model, tokens))


def test_a_fresh_one_scores_as_its_clip_at_every_timestep(clip, pixels, tokens):
    spm = fresh_step_aware_clip(clip, seed=0).eval()
    with torch.no_grad():
        plain = clip(input_ids=tokens, pixel_values=pixels)
        features = clip.visual_projection(clip.vision_model(pixels).pooler_output)
        unit = features / features.norm(dim=-1, keepdim=True)
        for timestep in (0, 1, 251, 951):
            timesteps = torch.full((4,), timestep)
            assert torch.equal(spm.image_features(pixels, timesteps), unit)
            # transformers sums norms and dot products in another order.
            expected = plain.logits_per_image.diag()
            torch.testing.assert_close(
                scores(spm, pixels, tokens, timestep), expected, rtol=1e-6, atol=2e-6
            )
        torch.testing.assert_close(text_features(spm.model, tokens), plain.text_embeds)
    assert (expected - expected.mean()).abs().max() > 0.1


def test_a_fresh_one_can_learn_the_timestep(clip, pixels, tokens):
    """Gates and timestep embedding are in place: a step on the modulation makes the scores part."""
    spm = fresh_step_aware_clip(clip, seed=0)
    embedder = torch.cat([p.flatten() for n, p in spm.named_parameters() if "t_embedder" in n])
    weights = embedder[embedder != 0]
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)
    timesteps = torch.full((4,), 501)
    spm.score(pixels, timesteps, text_features(spm.model, tokens)).sum().backward()
    layers = [m for m in spm.modules() if isinstance(m, StepAwareEncoderLayer)]
    with torch.no_grad():
        for layer in layers:
            weight = layer.adaLN_modulation[1].weight
            assert all(part.any() for part in weight.grad.chunk(6))  # every shift, scale and gate
            weight -= 10 * weight.grad
    assert len(layers) == 2
    assert not torch.equal(scores(spm, pixels, tokens, 1), scores(spm, pixels, tokens, 951))


def test_modulation_by_hand(clip):
    """One layer, its modulation set by hand: shift, scale, gate of attention, then of the MLP."""
    config = clip.vision_model.config
    layer = StepAwareEncoderLayer(config).eval()
    plain = clip.vision_model.encoder.layers[0]
    layer.load_state_dict(plain.state_dict(), strict=False)
    values = torch.tensor([0.3, -0.2, 0.5, -0.1, 0.4, 2.0]).repeat_interleave(config.hidden_size)
    hidden = randn(2, 17, config.hidden_size, seed=3)
    with torch.no_grad():
        layer.adaLN_modulation[1].weight.zero_()
        layer.adaLN_modulation[1].bias.copy_(values)
        attended = plain.self_attn(plain.layer_norm1(hidden) * 0.8 + 0.3, attention_mask=None)[0]
        expected = hidden + 0.5 * attended
        expected = expected + 2.0 * plain.mlp(plain.layer_norm2(expected) * 1.4 - 0.1)
        found = layer(hidden, torch.zeros(2, config.hidden_size))
    torch.testing.assert_close(found, expected)


def test_sinusoidal_embedding_of_the_timestep():
    embedder, seen = TimestepEmbedder(8), []
    embedder.mlp[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    timesteps = [0, 1, 251, 951]
    assert embedder(torch.tensor(timesteps)).shape == (4, 8)
    frequencies = 10_000.0 ** (-np.arange(128) / 128)
    angles = np.array(timesteps)[:, None] * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(seen[0].numpy(), expected, atol=2e-4)  # fp32 angles up to 951


def test_the_tiny_checkpoint_depends_on_the_timestep(pixels, tokens):
    spm = load_step_aware_clip(CHECKPOINT, tiny_config())
    by_time = torch.stack([scores(spm, pixels, tokens, t) for t in (0, 1, 501, 951)])
    assert not torch.isclose(by_time[1:], by_time[:-1], atol=1e-5).all(dim=1).any()
    # Rows with timesteps of their own.
    with torch.no_grad():
        mixed = spm.score(pixels, torch.tensor([0, 1, 501, 951]), text_features(spm.model, tokens))
    torch.testing.assert_close(mixed, by_time.diag(), rtol=1e-5, atol=1e-5)
    assert not spm.training and not any(p.requires_grad for p in spm.parameters())


def test_safetensors_and_old_buffers_load_alike(tmp_path, checkpoint, pixels, tokens):
    expected = scores(load_step_aware_clip(CHECKPOINT, tiny_config()), pixels, tokens, 501)
    save_file(checkpoint, tmp_path / "spm.safetensors")
    old = dict(checkpoint)
    for tower, length in (("text", 77), ("vision", 17)):
        old[f"model.{tower}_model.embeddings.position_ids"] = torch.arange(length)[None]
    torch.save(old, tmp_path / "old.bin")
    for name in ("spm.safetensors", "old.bin"):
        spm = load_step_aware_clip(tmp_path / name, tiny_config())
        assert torch.equal(scores(spm, pixels, tokens, 501), expected)


def extra_key(weights):
    return weights | {"model.extra.weight": torch.zeros(1)}


def missing_key(weights):
    return {k: v for k, v in weights.items() if k != "model.t_embedder.mlp.2.bias"}


def wrong_shape(weights):
    return weights | {"model.t_embedder.mlp.2.bias": torch.zeros(3)}


def other_buffer(weights):
    return weights | {"model.vision_model.embeddings.position_ids_2": torch.zeros(1)}


def not_tensors(weights):
    return weights | {"epoch": 3}


@pytest.mark.parametrize("change", [extra_key, missing_key, wrong_shape, other_buffer, not_tensors])
def test_loading_is_strict(tmp_path, checkpoint, change):
    path = tmp_path / "spm.bin"
    torch.save(change(checkpoint), path)
    with pytest.raises(UserError, match=r"preference\.checkpoint: .*spm\.bin"):
        load_step_aware_clip(path, tiny_config())


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_truncated_file_is_an_error(tmp_path, checkpoint, suffix):
    path = tmp_path / f"spm{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(checkpoint, path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"preference\.checkpoint: .*cannot be read"):
        load_step_aware_clip(path, tiny_config())


class _Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_malicious_pickle_runs_nothing(tmp_path):
    path, trace = tmp_path / "spm.bin", tmp_path / "was_here"
    torch.save({"weight": _Evil(f"touch {trace}")}, path)
    torch.load(path, weights_only=False)
    assert trace.exists()  # the file would do it
    trace.unlink()
    with pytest.raises(UserError, match=r"preference\.checkpoint: .*cannot be read"):
        load_step_aware_clip(path, tiny_config())
    assert not trace.exists()
