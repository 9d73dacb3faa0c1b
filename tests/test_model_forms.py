"""Base models are read as they are found: variants, pickles, shards, single files, precisions."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from fake_hub import serve
from helpers import MODELS, PROMPTS, add_tiny_lora, model_folder, randn, unet_output
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file
from single_files import write_single_file
from transformers import CLIPTextModelWithProjection

from spo.costs.unloaded_scorers import local_folder
from spo.errors import UserError
from spo.lora_io.convert import _stored_dtype, merged_pipeline
from spo.lora_io.model_spec import read_specs
from spo.lora_io.read import read_lora_file
from spo.lora_io.write import save_lora
from spo.models.backbone import Backbone
from spo.models.loading import ModelSource, check_source, family_of, load_pipeline
from spo.models.single_file import clip_tokenizer

CPU = torch.device("cpu")


def copy_of(family, folder):
    return shutil.copytree(model_folder(family), folder / f"my-{family}")


def load(source, family, precision="no"):
    source = source if isinstance(source, ModelSource) else ModelSource(str(source))
    check_source(source, family)
    return Backbone(source, family, precision, CPU)


def outputs(backbone):
    text = backbone.encode_prompts(PROMPTS)
    return unet_output(backbone), backbone.decode(randn(1, *backbone.latent_shape, seed=1)), text


def assert_same(found, expected):
    *found, text = outputs(found)
    *expected, wanted = outputs(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(text.prompt_embeds, wanted.prompt_embeds)


def rewrite(folder, change, name=lambda path: path):
    """Passes the tensors of all weight files through `change`, into files of other names."""
    for path in folder.rglob("*.safetensors"):
        tensors = {key: change(value) for key, value in load_file(path).items()}
        path.unlink()
        new = name(path)
        if new.suffix == ".bin":
            torch.save(tensors, new)
        else:
            save_file(tensors, new, metadata={"format": "pt"})


def as_bin(path):
    return path.with_name("pytorch_model.bin" if path.stem == "model" else f"{path.stem}.bin")


def as_variant(path):
    return path.with_suffix(".fp16.safetensors")


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("name", [as_bin, as_variant, lambda p: p.with_suffix(".ema.safetensors")])
def test_files_of_other_names(tmp_path, family, name):
    folder, plain = copy_of(family, tmp_path), load(model_folder(family), family)
    rewrite(folder, lambda value: value, name)
    assert_same(load(folder, family), plain)


def test_the_form_in_which_sd15_is_published(tmp_path):
    """Its VAE's attention layers under their names of 2022, PNDM, a safety checker, position_ids."""
    folder = copy_of("sd15", tmp_path)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    file = next((folder / "vae").glob("*.safetensors"))
    old = {}
    for key, value in load_file(file).items():
        for new, before in names.items():
            key = key.replace(f".{new}.", f".{before}.")
        old[key] = value
    assert sum(".proj_attn." in key for key in old) == 4
    save_file(old, file)
    file = next((folder / "text_encoder").glob("*.safetensors"))
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(load_file(file) | positions, file)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "scheduler": ["diffusers", "PNDMScheduler"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    file = folder / "scheduler" / "scheduler_config.json"
    pndm = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "trained_betas": None}
    file.write_text(json.dumps(json.loads(file.read_text()) | pndm))
    assert_same(load(folder, "sd15"), load(model_folder("sd15"), "sd15"))


def test_a_variant_by_name_and_by_itself(tmp_path):
    folder = copy_of("sd15", tmp_path)
    rewrite(folder, torch.Tensor.half, as_variant)
    by_itself, by_name = (
        load(folder, "sd15"),
        load(ModelSource(str(folder), variant="fp16"), "sd15"),
    )
    assert_same(by_itself, by_name)
    with pytest.raises(UserError, match=r"pretrained\.variant: its UNet has fp16, not bf16"):
        load(ModelSource(str(folder), variant="bf16"), "sd15")
    # Beside plain weights it is taken only by name.
    for file in Path(model_folder("sd15")).rglob("*.safetensors"):
        shutil.copy(file, folder / file.parent.name)
    assert_same(load(folder, "sd15"), load(model_folder("sd15"), "sd15"))
    assert_same(load(ModelSource(str(folder), variant="fp16"), "sd15"), by_name)


def test_variants_among_which_none_stands_out(tmp_path):
    folder = copy_of("sd15", tmp_path)
    rewrite(folder / "unet", lambda value: value, lambda path: path.with_suffix(".a.safetensors"))
    (unet,) = (folder / "unet").glob("*.safetensors")
    shutil.copy(unet, str(unet).replace(".a.", ".b."))
    with pytest.raises(UserError, match=r"unet: name one of a, b by pretrained\.variant"):
        load(folder, "sd15")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(tmp_path, variant):
    plain = load_pipeline(ModelSource(model_folder("sdxl")), "sdxl", torch.float32)
    plain.save_pretrained(tmp_path, max_shard_size="40KB", variant=variant)
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 2
    assert_same(load(tmp_path, "sdxl"), load(model_folder("sdxl"), "sdxl"))
    assert _stored_dtype(str(tmp_path)) == torch.float32


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_text_encoders_in_other_precisions(tmp_path, stored):
    folder, exact = copy_of("sdxl", tmp_path), copy_of("sdxl", tmp_path / "exact")
    for part in ("text_encoder", "text_encoder_2"):
        rewrite(folder / part, lambda value: value.to(stored))
        rewrite(exact / part, lambda value: value.to(stored).float())
        config = json.loads((folder / part / "config.json").read_text())
        name = str(stored).removeprefix("torch.")
        (folder / part / "config.json").write_text(json.dumps(config | {"torch_dtype": name}))
    found = load(folder, "sdxl")
    assert found.encode_prompts(PROMPTS).prompt_embeds.dtype == torch.float32
    assert_same(found, load(exact, "sdxl"))


def test_a_model_of_an_evaluation_is_read_as_found(tmp_path):
    folder, base = copy_of("sd15", tmp_path), ModelSource(model_folder("sd15"))
    rewrite(folder, torch.Tensor.half, as_variant)
    (model,) = read_specs([f"x={folder}"], base, "sd15", "models")
    assert_same(load(model.source, "sd15"), load(folder, "sd15"))
    (folder / "model_index.json").unlink()
    (unet,) = read_specs([f"x={folder}"], base, "sd15", "models")
    assert unet.source.unet == str(folder)
    assert (
        torch.equal(unet_output(load(unet.source, "sd15")), unet_output(load(base, "sd15")))
        is False
    )


@pytest.mark.parametrize("name", [as_bin, as_variant])
def test_merging_into_a_base_as_found(tmp_path, name):
    base, folder = load(model_folder("sd15"), "sd15"), copy_of("sd15", tmp_path)
    lora = add_tiny_lora(base)
    save_lora(tmp_path / "lora.safetensors", lora, lora.snapshot(), {})
    rewrite(folder, torch.Tensor.bfloat16, name)
    pipe = merged_pipeline(read_lora_file(tmp_path / "lora.safetensors", "SOURCE"), str(folder))
    assert pipe.unet.dtype == torch.bfloat16


def pipeline_of(family):
    pipe = load_pipeline(ModelSource(model_folder(family)), family, torch.float32)
    if family == "sd15":
        return pipe
    # diffusers tells SDXL's text encoders apart by their widths, which are equal in the tiny model.
    torch.manual_seed(0)
    config = pipe.text_encoder_2.config
    config.update({"hidden_size": 48, "num_attention_heads": 4})
    parts = pipe.components | {"text_encoder_2": CLIPTextModelWithProjection(config).eval()}
    parts["unet"] = UNet2DConditionModel.from_config(
        pipe.unet.config, cross_attention_dim=80
    ).eval()
    parts = {name: part for name, part in parts.items() if part is not None}
    return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=True)


@pytest.fixture(params=["sd15", "sdxl"])
def checkpoint(request, tmp_path):
    """The family, the folder of a tiny model without weights, and a single file beside its configs."""
    pipe, whole, folder = pipeline_of(request.param), tmp_path / "whole", tmp_path / "configs"
    pipe.save_pretrained(whole)
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return request.param, pipe, whole, folder / "model.safetensors"


def test_a_single_file(checkpoint):
    family, pipe, whole, path = checkpoint
    write_single_file(pipe, path)
    assert family_of(str(path), "--base") == family
    assert_same(load(path, family), load(whole, family))
    (model,) = read_specs([f"x={path}"], ModelSource(str(whole)), family, "models")
    assert model.source == ModelSource(str(path)) and not model.loras
    assert _stored_dtype(str(path)) == torch.float32
    other = {"sd15": "sdxl", "sdxl": "sd15"}[family]
    with pytest.raises(UserError, match=r"pretrained\.model: .* but family"):
        check_source(ModelSource(str(path)), other)


def test_a_single_file_says_that_it_predicts_v(checkpoint):
    family, pipe, _, path = checkpoint
    write_single_file(pipe, path, v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    schedule = load(path, family).noise_schedule()
    assert schedule.prediction_type == "v_prediction" and schedule.alphas_cumprod[-1] == 0
    write_single_file(pipe, path, {"modelspec.prediction_type": "v"})
    schedule = load(path, family).noise_schedule()
    assert schedule.prediction_type == "v_prediction" and schedule.alphas_cumprod[-1] > 0


def without(path, *beginnings):
    tensors = load_file(path)
    kept = {name: value for name, value in tensors.items() if not name.startswith(beginnings)}
    assert len(kept) < len(tensors)
    save_file(kept, path, metadata={"format": "pt"})


def test_a_single_file_without_a_vae(checkpoint):
    family, pipe, whole, path = checkpoint
    write_single_file(pipe, path)
    without(path, "first_stage_model.")
    with pytest.raises(UserError, match=r"it has no VAE; name one with pretrained\.vae"):
        load(path, family)
    assert_same(load(ModelSource(str(path), vae=str(whole / "vae")), family), load(whole, family))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("model.diffusion_model.out.2.bias", "unet: its weights lack conv_out.bias"),
        ("first_stage_model.decoder.conv_in.bias", "vae: its weights lack decoder.conv_in.bias"),
        (
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            "text_encoder: its weights lack final_layer_norm.bias",
        ),
    ],
)
def test_a_single_file_that_lacks_a_tensor(tmp_path, tensor, message):
    folder = copy_of("sd15", tmp_path)
    path = write_single_file(pipeline_of("sd15"), folder / "x.safetensors")
    without(path, tensor)
    with pytest.raises(UserError, match=message) as error:
        load(path, "sd15")
    assert "\n" not in str(error.value)


def test_a_single_file_of_another_size(tmp_path):
    """Without configs beside it a file is held against SD1.5 itself."""
    path = write_single_file(pipeline_of("sd15"), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"position_embedding.weight expected .* but got") as error:
        load(path, "sd15")
    assert "ignore_mismatched_sizes" not in str(error.value)
    # Its costs are counted all the same.
    assert local_folder(path, "sd15", "pretrained.model").endswith("assets/architectures/sd15")


def test_single_files_of_other_kinds(tmp_path):
    pipe, path = pipeline_of("sd15"), tmp_path / "x.safetensors"
    first = "model.diffusion_model.input_blocks.0.0.weight"
    write_single_file(pipe, path, **{first: torch.zeros(8, 9, 3, 3)})
    with pytest.raises(UserError, match="it is an inpainting model"):
        check_source(ModelSource(str(path)), "sd15")
    cases = {
        "cond_stage_model.model.x": "a Stable Diffusion 2 checkpoint",
        "conditioner.embedders.0.model.x": "SDXL's refiner",
        "lora_unet_x": "no checkpoint of Stable Diffusion",
    }
    for name, message in cases.items():
        save_file({first: torch.zeros(8, 4, 3, 3), name: torch.zeros(1)}, path)
        with pytest.raises(UserError, match=f"pretrained.model: .* is .*{message}"):
            check_source(ModelSource(str(path)), "sd15")
    path.write_bytes(b"no such thing")
    with pytest.raises(UserError, match=r"pretrained\.model: .* cannot be read"):
        check_source(ModelSource(str(path)), "sd15")
    with pytest.raises(UserError, match=r"--base: 'a\.ckpt' is a pickle"):
        family_of("a.ckpt", "--base")


def test_the_tokenizer_of_single_files_is_clips():
    # As openai/clip-vit-large-patch14's tokenizer has it.
    tokenizer = clip_tokenizer(pad="!")
    ids = tokenizer(["a photo of a cat", ""], padding="max_length").input_ids
    assert ids[0][:8] == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    assert ids[1][:3] == [49406, 49407, 0] and len(ids[1]) == 77


def test_latents_of_sdxl_are_normalised_as_in_diffusers(tmp_path):
    folder = copy_of("sdxl", tmp_path)
    file = folder / "vae" / "config.json"
    normal = {"latents_mean": [-1.6, 1.8, -1.3, 2.5], "latents_std": [8.4, 5.9, 6.5, 5.2]}
    file.write_text(json.dumps(json.loads(file.read_text()) | normal))
    backbone = load(folder, "sdxl")
    noise = randn(2, *backbone.latent_shape, seed=3)
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    latents = backbone._pipe(
        list(PROMPTS[:2]), latents=noise, num_inference_steps=3, output_type="latent"
    ).images
    expected = pipe(
        list(PROMPTS[:2]), latents=noise, num_inference_steps=3, output_type="pt"
    ).images
    found = (backbone.decode(latents) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # What goes in comes back: encoding undoes the normalisation.
    images = randn(2, 3, 16, 16, seed=5)
    latents = backbone.encode_images(images, torch.zeros(2, 4, 8, 8))
    mean = backbone.vae.encode(images).latent_dist.mean
    mean = (mean - torch.tensor(normal["latents_mean"]).view(4, 1, 1)) / torch.tensor(
        normal["latents_std"]
    ).view(4, 1, 1)
    torch.testing.assert_close(latents, mean * backbone.vae.config.scaling_factor)


def test_tokenizers_without_a_limit(tmp_path):
    folder = copy_of("sdxl", tmp_path)
    for part in ("tokenizer", "tokenizer_2"):
        file = folder / part / "tokenizer_config.json"
        config = json.loads(file.read_text())
        del config["model_max_length"]
        file.write_text(json.dumps(config))
    assert_same(load(folder, "sdxl"), load(model_folder("sdxl"), "sdxl"))


def test_tokenizers_without_a_vocabulary(tmp_path):
    folder = copy_of("sd15", tmp_path)
    (folder / "tokenizer" / "vocab.json").unlink()
    (folder / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(UserError, match="no vocabulary in its tokenizer"):
        load(folder, "sd15")


@pytest.mark.parametrize("size", [[8, 8], [4, 8]])
def test_sample_sizes_that_are_lists(tmp_path, size):
    folder = copy_of("sdxl", tmp_path)
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": size}))
    backbone = load(folder, "sdxl")
    assert backbone.latent_shape == (4, *size)
    factor = backbone.vae_scale_factor
    height, width = (side * factor for side in size)
    expected = [[height, width, 0, 0, height, width]]
    assert backbone.encode_prompts(PROMPTS).time_ids.tolist() == expected
    assert unet_output(backbone).shape == (2, 4, *size)


def test_a_vae_that_overflows_in_fp16_is_that_of_sdxl(tmp_path):
    vae = AutoencoderKL.from_pretrained(MODELS / "tiny-sdxl" / "vae")
    vae.register_to_config(force_upcast=True)
    vae.save_pretrained(tmp_path)
    source = ModelSource(model_folder("sdxl"), vae=str(tmp_path))
    assert load(source, "sdxl", "fp16").vae.dtype == torch.float32


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serve() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(HfApi, "list_repo_files", lambda _, repo, **__: served.files(repo))
        template = f"{served.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield served


@pytest.mark.parametrize("form", ["fp16", "bin", "shards"])
def test_a_hub_repo_and_its_cache(tmp_path, monkeypatch, hub, form):
    folder = copy_of("sd15", tmp_path)
    if form == "shards":
        pipe = load_pipeline(ModelSource(str(folder)), "sd15", torch.float32)
        shutil.rmtree(folder)
        pipe.save_pretrained(folder, max_shard_size="40KB")
    else:
        rewrite(folder, lambda value: value, as_bin if form == "bin" else as_variant)
    files = [path for path in folder.rglob("*") if path.is_file()]
    other = {"unet/flax_model.msgpack": b"", "unet/diffusion_pytorch_model.ema.safetensors": b""}
    named = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    hub.create("user/model", files=other | named)
    assert_same(load("user/model", "sd15"), load(folder, "sd15"))
    assert not any("flax" in path or ".ema." in path for path in hub.asked)
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same(load("user/model", "sd15"), load(folder, "sd15"))
