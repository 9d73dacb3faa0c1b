"""Both families behind one interface, against diffusers' own modules."""

import json
import shutil

import pytest
import torch
from helpers import MODELS, PROMPTS, load_backbone, model_folder, randn

from spo.errors import UserError
from spo.models.loading import ModelSource, check_source, load_pipeline


@torch.no_grad()
def single_pass(backbone, latents, timesteps, embeds, pooled, time_ids):
    """The UNet itself on the given rows."""
    added = {"text_embeds": pooled, "time_ids": time_ids}
    return backbone.unet(
        latents,
        timesteps,
        encoder_hidden_states=embeds,
        added_cond_kwargs=added if backbone.family == "sdxl" else None,
    ).sample


def conditional(backbone, latents, timesteps, conditioning):
    c, n = conditioning, len(latents)
    time_ids = None if c.time_ids is None else c.time_ids.repeat(n, 1)
    return single_pass(
        backbone, latents, timesteps, c.prompt_embeds, c.pooled_prompt_embeds, time_ids
    )


def unconditional(backbone, latents, timesteps, conditioning):
    c, n = conditioning, len(latents)
    pooled = time_ids = None
    if c.time_ids is not None:
        pooled = c.negative_pooled_prompt_embeds.repeat(n, 1)
        time_ids = c.time_ids.repeat(n, 1)
    negative = c.negative_prompt_embeds.repeat(n, 1, 1)
    return single_pass(backbone, latents, timesteps, negative, pooled, time_ids)


@torch.no_grad()
def predict(backbone, latents, timesteps, conditioning, guidance_scale):
    return backbone.predict(backbone.unet, latents, timesteps, conditioning, guidance_scale)


class CountingUNet(torch.nn.Module):
    """A wrapper, as DDP is one, that counts the rows of every call."""

    def __init__(self, unet):
        super().__init__()
        self.unet, self.rows = unet, []

    def forward(self, latents, *args, **kwargs):
        self.rows.append(len(latents))
        return self.unet(latents, *args, **kwargs)


@pytest.fixture
def case(backbone):
    conditioning = backbone.encode_prompts(PROMPTS)
    return conditioning, randn(3, *backbone.latent_shape, seed=0), torch.tensor([951, 501, 1])


def test_without_guidance_one_conditional_pass(backbone, case):
    conditioning, latents, timesteps = case
    counting = CountingUNet(backbone.unet)
    with torch.no_grad():
        found = backbone.predict(counting, latents, timesteps, conditioning, 1.0)
        assert counting.rows == [3]
        backbone.predict(counting, latents, timesteps, conditioning, 1.5)
        assert counting.rows == [3, 6]
    assert torch.equal(found, conditional(backbone, latents, timesteps, conditioning))


@pytest.mark.parametrize("scale", [0.0, 0.5, 5.0])
def test_guidance_is_u_plus_w_times_v_minus_u(backbone, case, scale):
    conditioning, latents, timesteps = case
    u = unconditional(backbone, latents, timesteps, conditioning)
    v = conditional(backbone, latents, timesteps, conditioning)
    found = predict(backbone, latents, timesteps, conditioning, scale)
    torch.testing.assert_close(found, u + scale * (v - u), rtol=1e-5, atol=1e-5)
    assert (u - v).abs().max() > 1e-3


def test_rows_with_timesteps_of_their_own(backbone, case):
    conditioning, latents, timesteps = case
    together = predict(backbone, latents, timesteps, conditioning, 5.0)
    for i, timestep in enumerate(timesteps.tolist()):
        row = slice(i, i + 1)
        alone = predict(backbone, latents[row], timestep, conditioning.select(row), 5.0)
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(
        together, predict(backbone, latents, 501, conditioning, 5.0), atol=1e-3
    )


def test_unconditional_embeddings_of_sd15(sd15):
    conditioning = sd15.encode_prompts([*PROMPTS, ""])
    assert conditioning.prompt_embeds.shape[0] == 4
    assert conditioning.negative_prompt_embeds.shape[0] == 1
    torch.testing.assert_close(conditioning.negative_prompt_embeds, conditioning.prompt_embeds[3:])
    assert conditioning.pooled_prompt_embeds is None and conditioning.time_ids is None


def test_conditioning_of_sdxl(sdxl):
    conditioning = sdxl.encode_prompts(PROMPTS)
    assert not conditioning.negative_prompt_embeds.any()
    assert not conditioning.negative_pooled_prompt_embeds.any()
    assert conditioning.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]]  # 8 latents x VAE factor 2
    assert conditioning.pooled_prompt_embeds.shape[0] == 3
    # Two text encoders side by side; the second is the one that pools.
    assert conditioning.prompt_embeds.shape[2] == sdxl.unet.config.cross_attention_dim
    alone = sdxl.encode_prompts(PROMPTS[1:2])
    torch.testing.assert_close(alone.prompt_embeds, conditioning.prompt_embeds[1:2])
    torch.testing.assert_close(alone.pooled_prompt_embeds, conditioning.pooled_prompt_embeds[1:2])


def test_sdxl_without_forced_zeros_encodes_the_empty_prompt(own_backbone):
    backbone = own_backbone("sdxl")
    backbone._pipe.register_to_config(force_zeros_for_empty_prompt=False)
    conditioning = backbone.encode_prompts(["a fox", ""])
    torch.testing.assert_close(conditioning.negative_prompt_embeds, conditioning.prompt_embeds[1:])
    torch.testing.assert_close(
        conditioning.negative_pooled_prompt_embeds, conditioning.pooled_prompt_embeds[1:]
    )


def test_long_prompts_are_cut(backbone):
    words = "a very long prompt " * 40
    longer = backbone.encode_prompts([words, words + "that goes on"])
    assert torch.equal(longer.prompt_embeds[0], longer.prompt_embeds[1])


def test_decoding(backbone):
    latents = 3 * randn(2, *backbone.latent_shape, seed=0)
    with torch.no_grad():
        expected = backbone.vae.decode(latents / backbone.vae.config.scaling_factor).sample
    assert torch.equal(backbone.decode(latents), expected)
    assert expected.shape == (2, 3, 16, 16)
    assert backbone.latent_shape == (4, 8, 8)


@pytest.mark.parametrize(
    ("mixed_precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_low_precision_is_decided_at_loading(sd15, mixed_precision, dtype):
    low = load_backbone("sd15", mixed_precision)
    assert {p.dtype for p in low.unet.parameters()} == {dtype}
    assert not any(p.requires_grad for p in low.unet.parameters())
    latents = randn(2, *low.latent_shape, seed=0)
    exact, found = (
        predict(b, latents, 501, b.encode_prompts(PROMPTS[:2]), 5.0) for b in (sd15, low)
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.2)
    assert low.decode(latents).dtype == torch.float32


def test_another_vae(tmp_path, sdxl):
    vae = sdxl.vae
    other = type(vae).from_config(vae.config)
    other.save_pretrained(tmp_path / "vae")
    source = ModelSource(model_folder("sdxl"), vae=str(tmp_path / "vae"))
    pipe = load_pipeline(source, "sdxl", torch.float32)
    for name, weight in other.state_dict().items():
        assert torch.equal(pipe.vae.state_dict()[name], weight)
    assert not torch.equal(pipe.vae.post_quant_conv.weight, vae.post_quant_conv.weight)


@pytest.mark.parametrize(("family", "upcast"), [("sdxl", True), ("sd15", False)])
def test_only_sdxls_own_vae_stays_in_fp32(tmp_path, family, upcast):
    folder = tmp_path / "model"
    shutil.copytree(model_folder(family), folder)
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": True}))
    pipe = load_pipeline(ModelSource(str(folder)), family, torch.float16)
    assert pipe.vae.dtype == (torch.float32 if upcast else torch.float16)
    assert pipe.unet.dtype == torch.float16


@pytest.mark.parametrize(
    ("model", "family", "message"),
    [
        ("tiny-sd15", "sdxl", r"pretrained\.model: .* is a StableDiffusionPipeline, but family"),
        ("tiny-sdxl", "sd15", r"pretrained\.model: .* is a StableDiffusionXLPipeline, but family"),
        ("tiny-sd15", "sd3", r"family: 'sd3' is none of sd15, sdxl"),
        ("no-such", "sd15", r"pretrained\.model: .*no-such"),
        ("tiny-clip", "sd15", r"pretrained\.model: .*tiny-clip"),
    ],
)
def test_a_source_that_does_not_fit(model, family, message):
    with pytest.raises(UserError, match=message) as error:
        check_source(ModelSource(str(MODELS / model)), family)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_source_that_fits(family):
    check_source(ModelSource(model_folder(family)), family)


def test_weights_that_are_missing(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder("sd15"), folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    check_source(ModelSource(str(folder)), "sd15")
    with pytest.raises(UserError, match=r"pretrained: .* cannot be loaded") as error:
        load_pipeline(ModelSource(str(folder)), "sd15", torch.float32)
    assert "\n" not in str(error.value)
