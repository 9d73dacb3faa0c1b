"""What is no text-to-image model of SD1.5 or SDXL, or not whole, is refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import MODELS, model_folder, save_tiny_decoder
from safetensors.torch import load_file, save_file

from spo.errors import UserError
from spo.models.backbone import Backbone
from spo.models.decoder import load_decoder
from spo.models.loading import ModelSource, check_source

CPU = torch.device("cpu")
DATA = Path(__file__).parent / "data"


def edited(folder, family, part, changes):
    """A copy of a tiny model whose config of a part has changes; None removes a key."""
    target = folder / "model"
    shutil.copytree(model_folder(family), target)
    (file,) = (target / part).glob("*config.json") if part else [target / "model_index.json"]
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "removed"}))
    return str(target)


FLOW = json.loads((DATA / "scheduler_flow.json").read_text())
KINDS = {
    "flow matching": ("sdxl", "scheduler", FLOW, "a flow matching model, by its FlowMatchEuler"),
    "flow sigmas": (
        "sdxl",
        "scheduler",
        {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
        "a flow matching model",
    ),
    "flow prediction": (
        "sd15",
        "scheduler",
        {"prediction_type": "flow_prediction"},
        "a flow matching model",
    ),
    "EDM": ("sdxl", "scheduler", {"_class_name": "EDMEulerScheduler"}, "an EDM model"),
    "EDM of Euler": (
        "sdxl",
        "scheduler",
        {"timestep_type": "continuous"},
        "an EDM model: its EulerDiscrete",
    ),
    "LCM": ("sd15", "scheduler", {"_class_name": "LCMScheduler"}, "a consistency model .LCM."),
    "TCD": ("sdxl", "scheduler", {"_class_name": "TCDScheduler"}, "a consistency model .TCD."),
    "unknown scheduler": ("sd15", "scheduler", {"_class_name": "Odd"}, "another kind of model"),
    "no scheduler": ("sd15", "scheduler", {"_class_name": "removed"}, "another kind of model"),
    "unknown prediction": ("sd15", "scheduler", {"prediction_type": "x"}, "prediction_type is 'x'"),
    "unknown spacing": (
        "sd15",
        "scheduler",
        {"timestep_spacing": "os:x"},
        "timestep_spacing is 'os",
    ),
    "unknown betas": (
        "sd15",
        "scheduler",
        {"beta_schedule": "laplace"},
        "no noise schedule: laplace",
    ),
    "no betas": ("sd15", "scheduler", {"beta_end": "many"}, "no noise schedule"),
    "epsilon at no signal": (
        "sd15",
        "scheduler",
        {"rescale_betas_zero_snr": True},
        "rescale_betas_zero_snr, but it predicts epsilon",
    ),
    "inpainting": ("sd15", "unet", {"in_channels": 9}, "an inpainting model: its UNet has 9"),
    "inpainting of SDXL": ("sdxl", "unet", {"in_channels": 9}, "an inpainting model"),
    "editing": ("sd15", "unet", {"in_channels": 8}, "a model that edits images"),
    "distilled": (
        "sdxl",
        "unet",
        {"time_cond_proj_dim": 256},
        "a consistency model .LCM.: its UNet",
    ),
    "refiner": (
        "sdxl",
        "unet",
        {"projection_class_embeddings_input_dim": 32 + 5 * 8, "cross_attention_dim": 32},
        "it is SDXL's refiner",
    ),
    "refiner without a text encoder": (
        "sdxl",
        "",
        {"text_encoder": [None, None]},
        "it is SDXL's refiner",
    ),
    "upscaler": ("sd15", "unet", {"num_class_embeds": 1000}, "num_class_embeds=1000"),
    "another text encoder": ("sd15", "unet", {"cross_attention_dim": 24}, "text of width 24, but"),
    "no text_time": ("sdxl", "unet", {"addition_embed_type": None}, "addition_embed_type=None"),
    "no size": ("sd15", "unet", {"sample_size": None}, "sample_size None; set it in unet/config"),
    "sizes": ("sd15", "unet", {"sample_size": [8, 8, 8]}, "sample_size .8, 8, 8"),
    "another VAE": ("sd15", "vae", {"latent_channels": 16}, "VAE's have 16; set pretrained.vae"),
    "normalised latents": (
        "sd15",
        "vae",
        {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
        "latents_mean and latents_std",
    ),
    "quantized": ("sd15", "unet", {"quantization_config": {"load_in_4bit": True}}, "unet is quant"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_refused_before_anything_loads(tmp_path, kind):
    family, part, changes, message = KINDS[kind]
    folder = edited(tmp_path, family, part, changes)
    for weights in Path(folder).rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(UserError, match=f"^pretrained.model: .*{message}") as error:
        check_source(ModelSource(folder), family)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "scheduler",
    [
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
        {"_class_name": "DDIMParallelScheduler", "beta_schedule": "squaredcos_cap_v2"},
        json.loads((DATA / "scheduler_linspace.json").read_text()),
    ],
)
def test_schedulers_of_betas_pass(tmp_path, scheduler):
    check_source(ModelSource(edited(tmp_path, "sd15", "scheduler", scheduler)), "sd15")


def test_a_folder_of_another_pipeline_class(tmp_path):
    index = {"_class_name": "StableDiffusionXLInpaintPipeline"}
    with pytest.raises(UserError, match="is a StableDiffusionXLInpaintPipeline, but family='sdxl'"):
        check_source(ModelSource(edited(tmp_path, "sdxl", "", index)), "sdxl")


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        (["diffusers", "Odd"], "unknown unet, Odd"),
        (["torch.hub", "load"], "a unet of .torch.hub."),
        ("x", "no unet"),
    ],
)
def test_an_index_of_unknown_parts(tmp_path, unet, message):
    with pytest.raises(UserError, match=message):
        check_source(ModelSource(edited(tmp_path, "sd15", "", {"unet": unet})), "sd15")


def change_weights(folder, change):
    (file,) = Path(folder).glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


PARTS = {
    "unet": ("UNet", "conv_out.bias"),
    "vae": ("VAE", "decoder.conv_in.bias"),
    "text_encoder": ("text encoder", "text_model.final_layer_norm.bias"),
    "text_encoder_2": ("second text encoder", "text_projection.weight"),
}


def load(folder):
    return Backbone(ModelSource(str(folder)), "sdxl", "no", CPU)


@pytest.mark.parametrize("part", PARTS)
def test_weights_that_do_not_fit(tmp_path, part):
    folder = shutil.copytree(model_folder("sdxl"), tmp_path / "model")
    name, tensor = PARTS[part]
    short = tensor.removeprefix("text_model.")

    def refused(change, message):
        shutil.copytree(model_folder("sdxl"), folder, dirs_exist_ok=True)
        change_weights(folder / part, change)
        with pytest.raises(UserError, match=f"pretrained: .*{name}: .*{message}") as error:
            load(folder)
        assert "\n" not in str(error.value)

    refused(lambda tensors: tensors.pop(tensor), f"lack (text_model.)?{short}")
    refused(lambda tensors: tensors.update({"odd.x": torch.ones(1)}), "they have odd.x")
    refused(lambda tensors: tensors.update({tensor: torch.ones(3, 3)}), f"{short}")

    def add_prefix(tensors):
        for key in list(tensors):
            tensors[f"module.{key}"] = tensors.pop(key)

    refused(add_prefix, "lack .* and .* more")


def test_weights_that_are_left_over_are_no_fault(tmp_path):
    folder = shutil.copytree(model_folder("sdxl"), tmp_path / "model")

    def whole_clip(tensors):
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        tensors["vision_model.embeddings.class_embedding"] = torch.ones(3)
        tensors["logit_scale"] = torch.ones(())

    change_weights(folder / "text_encoder", whole_clip)
    load(folder)


def test_a_unet_that_was_saved_with_its_lora(tmp_path):
    folder = shutil.copytree(model_folder("sdxl"), tmp_path / "model")
    backbone = load(folder)
    from helpers import add_tiny_lora

    add_tiny_lora(backbone)
    shutil.rmtree(folder / "unet")
    backbone.unet.save_pretrained(folder / "unet")
    with pytest.raises(UserError, match=r"UNet: saved with a LoRA .* merge it .* save it again"):
        load(folder)


def test_a_tiny_decoder_that_lacks_a_tensor(tmp_path):
    folder = save_tiny_decoder(tmp_path)
    change_weights(folder, lambda tensors: tensors.pop("decoder.layers.0.weight"))
    with pytest.raises(UserError, match="sample.decoder: .* lack decoder.layers.0.weight"):
        load_decoder(folder, torch.float32)


def test_another_vae_and_unet_are_checked_too(tmp_path):
    vae = json.loads((MODELS / "tiny-sd15" / "vae" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(vae | {"latent_channels": 16}))
    with pytest.raises(UserError, match=r"VAE's have 16"):
        check_source(ModelSource(model_folder("sd15"), vae=str(tmp_path)), "sd15")
    unet = edited(tmp_path, "sd15", "unet", {"in_channels": 9})
    # The model's own files are not looked at where others take their places.
    own = shutil.copytree(model_folder("sd15"), tmp_path / "own")
    for part in ("vae", "unet"):
        shutil.rmtree(own / part)
    vae = str(MODELS / "tiny-sd15" / "vae")
    check_source(ModelSource(str(own), vae=vae, unet=model_folder("sd15")), "sd15")
    Backbone(ModelSource(str(own), vae=vae, unet=model_folder("sd15")), "sd15", "no", CPU)
    with pytest.raises(UserError, match="models: .* inpainting"):
        check_source(ModelSource(model_folder("sd15"), unet=unet), "sd15", "models")
