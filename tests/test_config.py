"""The configs say what the papers and the official code say."""

import json
from pathlib import Path

import pytest

from config import base, spm_base
from spo.command_line.config_files import BASE, EVAL_BASE, SPM_BASE, leaves, load_config
from spo.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "data" / "golden"
SPM = "hf://SPO-Diffusion-Models/Step-Aware_Preference_Models/"

SD15 = {"sample.global_batch_size": 40, "train.global_batch_size": 40}
SDXL = {
    "family": "sdxl",
    "pretrained.model": "stabilityai/stable-diffusion-xl-base-1.0",
    "pretrained.vae": "madebyollin/sdxl-vae-fp16-fix",
    "preference.checkpoint": SPM + "sdxl_step-aware_preference_model.bin",
    "lora.rank": 64,
    "sample.threshold": 0.4,
    "sample.batch_size": 2,
    "sample.global_batch_size": 8,
    "sample.decode_batch_size": 4,
    "train.learning_rate": 1e-5,
    "train.batch_size": 1,
    "train.global_batch_size": 16,
}
SPO_SDXL = {
    "algorithm": "spo",
    "sample.num_candidates": 2,
    "sample.num_inner_steps": 3,
    "train.batch_size": 2,
}
LRM = {  # the judge of LPO and what goes with it
    "preference.scorer": "latent_reward",
    "preference.kwargs.checkpoint": "hf://casiatao/LRM/lrm_sd15",
    "preference.kwargs.base": "",
    "preference.kwargs.guidance_scale": 7.5,
    "preference.kwargs.guide_stages": False,
    "preference.kwargs.dtype": "float16",
    "sample.branch_from": 0,
    "sample.score_batch_size": 20,
    "sample.threshold": None,
    "sample.threshold_schedule": "sigma",
    "sample.threshold_min": 0.35,
    "sample.threshold_max": 0.5,
}
LRM_SDXL = LRM | {
    "preference.kwargs.checkpoint": "hf://casiatao/LRM/lrm_sdxl",
    "sample.threshold_min": 0.45,
    "sample.threshold_max": 0.6,
}
del LRM_SDXL["sample.score_batch_size"]  # as in base.py
LPO = {"algorithm": "lpo", "num_epochs": 5, "train.beta": 500.0}
LPO_SD15 = (
    LRM
    | LPO
    | {
        "sample.batch_size": 5,
        "sample.global_batch_size": 20,
        "train.global_batch_size": 40,
    }
)
LPO_SD21 = LPO_SD15 | {"pretrained.model": "stabilityai/stable-diffusion-2-1-base"}
LPO_SDXL = (
    SDXL
    | LRM_SDXL
    | LPO
    | {
        "sample.batch_size": 4,
        "sample.global_batch_size": 16,
        "train.batch_size": 4,
        "train.gradient_checkpointing": True,
    }
)
SPM_SDXL = {
    "family": "sdxl",
    "max_train_steps": 7000,
    "pretrained.model": "stabilityai/stable-diffusion-xl-base-1.0",
    "pretrained.vae": "madebyollin/sdxl-vae-fp16-fix",
    "data.image_size": 1024,
    "labels.source": "pickscore",
    "train.predict_batch_size": 4,
    "train.learning_rate": 1e-6,
}
TRAINED_LRM_SD15 = {
    "max_train_steps": 4000,
    "eval_steps": 100,
    "keep_best": True,
    "preference.model": "latent_reward",
    "data.resize": "stretch",
    "train.global_batch_size": 128,
    "train.num_timesteps": 20,
    "train.learning_rate": 1e-5,
    "train.warmup": "logarithmic",
}
TRAINED_LRM_SDXL = {k: v for k, v in TRAINED_LRM_SD15.items() if k != "max_train_steps"} | {
    "family": "sdxl",
    "pretrained.model": "stabilityai/stable-diffusion-xl-base-1.0",
    "pretrained.vae": "madebyollin/sdxl-vae-fp16-fix",
    "data.image_size": 1024,
    "train.batch_size": 4,
    "train.global_batch_size": 32,
    "train.predict_batch_size": 4,
    "train.warmup_steps": 1000,
}
SPM_DIFFERENCES = {  # of each overlay from spm_base.py
    "spm_sd15": {},
    "spm_sdxl": SPM_SDXL,
    "lrm_sd15": TRAINED_LRM_SD15,
    "lrm_sdxl": TRAINED_LRM_SDXL,
}
DIFFERENCES = {  # of each overlay from base.py
    "sd15": SD15,
    "sdxl": SDXL,
    "spo_sd15": SD15 | {"algorithm": "spo"},
    "spo_sdxl": SDXL | SPO_SDXL,
    "official/sd15": SD15
    | {
        "train.max_grad_norm": None,
        "train.ema_every": "window",
        "sample.keep_all_final": True,
        "sample.final_score_timestep": "t",
    },
    "official/sdxl": SDXL
    | {
        "train.max_grad_norm": None,
        "train.ema_every": "window",
        "sample.final_step": "extend",
        "sample.final_direction": "last",
    },
    "official/spo_sd15": SD15 | {"algorithm": "spo", "train.max_grad_norm": None},
    "official/spo_sdxl": SDXL
    | SPO_SDXL
    | {"train.max_grad_norm": None, "sample.final_step": "extend"},
    "lpo_sd15": LPO_SD15,
    "lpo_sd21": LPO_SD21,
    "lpo_sdxl": LPO_SDXL,
    "official/lpo_sd15": LPO_SD15 | {"train.max_grad_norm": None},
    "official/lpo_sd21": LPO_SD21 | {"train.max_grad_norm": None},
    "official/lpo_sdxl": LPO_SDXL | {"train.max_grad_norm": None},
    "gradspo_lrm_sd15": SD15 | LRM,
    "gradspo_lrm_sdxl": SDXL | LRM_SDXL,
}
PAPER = {  # what both families share, and SD1.5
    "seed": 42,
    "num_epochs": 10,
    "mixed_precision": "fp16",
    "pretrained.model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "lora.rank": 4,
    "prompts.source": "official-4k",
    "prompts.num": 0,
    "preference.checkpoint": SPM + "sd-v1-5_step-aware_preference_model.bin",
    "sample.num_steps": 20,
    "sample.eta": 1.0,
    "sample.guidance_scale": 5.0,
    "sample.num_candidates": 4,
    "sample.branch_from": 4,
    "sample.threshold": 0.3,
    "train.learning_rate": 6e-5,
    "train.adam_beta1": 0.9,
    "train.adam_beta2": 0.999,
    "train.adam_weight_decay": 1e-4,
    "train.adam_epsilon": 1e-8,
    "train.max_grad_norm": 1.0,
    "train.beta": 10.0,
    "train.clip_eps": 0.1,
    "train.grad_scale": 0.5,
    "train.ema_decay": 0.9,
    # LPO's, too; what other papers have is in DIFFERENCES.
    "family": "sd15",
    "lora.alpha": None,
    "lora.target_modules": ("to_q", "to_k", "to_v", "to_out.0"),
    "sample.timesteps": "model",
    "sample.stop_at": 0,
    "sample.score_timestep": "t",
    "sample.num_inner_steps": 0,
    "train.batch_size": 10,
    "train.gradient_checkpointing": False,
}


SPM_PAPER = {  # what both families share, and SD1.5
    "max_train_steps": 8000,
    "mixed_precision": "bf16",
    "preference.backbone": "yuvalkirstain/PickScore_v1",
    "preference.processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "preference.model": "step_aware_clip",
    "preference.init_from": "",
    "preference.guidance_scale": 7.5,  # of LPO
    "preference.guide_stages": False,
    "data.source": "pickapic-anonymous/pickapic_v1",
    "data.validation_split": "validation_unique",
    "data.image_size": 512,
    "labels.source": "data",
    "labels.margin": 0.1,
    "train.batch_size": 16,
    "train.global_batch_size": 64,
    "train.num_timesteps": 1000,
    "train.guidance_scale": 5.0,
    "train.warmup": "linear",
    "train.learning_rate": 3e-6,
    "train.warmup_steps": 500,
    "train.adam_weight_decay": 0.3,
    "train.max_grad_norm": 1.0,
}


def test_spm_base_holds_spos_numbers():
    values = leaves(spm_base.get_config())
    assert {key: values[key] for key in SPM_PAPER} == SPM_PAPER


@pytest.mark.parametrize("name", SPM_DIFFERENCES)
def test_spm_overlays_hold_their_differences_and_nothing_else(name):
    default = leaves(spm_base.get_config())
    config = load_config(f"config/{name}.py", SPM_BASE)
    different = {key: value for key, value in leaves(config).items() if value != default[key]}
    assert different == SPM_DIFFERENCES[name]


@pytest.mark.parametrize(
    ("file", "key"), [("config/sdxl.py", "sample"), ("config/spm_sdxl.py", "data")]
)
def test_a_script_of_two_bases_chooses_by_the_keys(file, key):
    config = load_config(file, lambda keys: SPM_BASE if "data" in keys else BASE)
    assert key in config and config.family == "sdxl"


def test_no_base_is_guessed():
    with pytest.raises(UserError, match="key data; this script takes the keys of config/base.py"):
        load_config("config/spm_sdxl.py")


@pytest.mark.parametrize("base", [BASE, SPM_BASE, EVAL_BASE])
def test_a_base_says_which_keys_may_be_none(base):
    config = load_config(base, base)
    optional = {"pretrained.revision", "pretrained.variant", "pretrained.vae"}
    if base == SPM_BASE:
        optional |= {"data.revision", "train.global_batch_size", "train.max_grad_norm"}
    if base == BASE:
        optional |= {"lora.alpha", "sample.decoder", "sample.global_batch_size", "train.clip_eps"}
        optional |= {"train.max_grad_norm", "train.global_batch_size"}
        optional |= {"train.gradient_accumulation_steps", "sample.threshold"}
        optional |= {f"sample.threshold_{name}" for name in ("schedule", "min", "max")}
    assert set(leaves(config, only_optional=True)) == optional


def test_base_holds_the_papers_numbers():
    values = leaves(base.get_config())
    assert {key: values[key] for key in PAPER} == PAPER


def test_every_overlay_is_tested():
    found = {
        path.relative_to(ROOT / "config").with_suffix("").as_posix()
        for path in (ROOT / "config").rglob("*.py")
        if path.name != "__init__.py"
    }
    overlays = set(DIFFERENCES) | set(SPM_DIFFERENCES)
    evaluations = {"eval_base", "eval_sdxl", "eval_tiny", "eval_scales"}
    assert found == overlays | evaluations | {
        "base",
        "tiny",
        "small",
        "small_lrm",
        "spm_base",
        "spm_tiny",
        "spm_hpdv3",
        "lrm_tiny",
        "lpo_tiny",
        "gradspo_lrm_tiny",
    }


@pytest.mark.parametrize("name", DIFFERENCES)
def test_overlays_hold_their_differences_and_nothing_else(name):
    default = leaves(base.get_config())
    config = load_config(f"config/{name}.py")
    different = {k: v for k, v in leaves(config).items() if v != default.get(k, ...)}
    assert different == DIFFERENCES[name]


@pytest.mark.parametrize(
    ("trace", "overlay"),
    [
        ("gradspo_sd15", "official/sd15"),
        ("gradspo_sdxl", "official/sdxl"),
        ("spo_sd15", "official/spo_sd15"),
        ("spo_sdxl", "official/spo_sdxl"),
        ("lpo_sd15", "official/lpo_sd15"),
        ("lpo_sdxl", "official/lpo_sdxl"),
    ],
)
def test_official_overlays_are_the_settings_of_the_official_traces(trace, overlay):
    recorded = json.loads((GOLDEN / trace / "meta.json").read_text())["config"]
    config = load_config(f"config/{overlay}.py")
    assert (config.algorithm, config.family) == (recorded["algorithm"], recorded["family"])
    if "lrm" in recorded:
        judge = config.preference.kwargs
        names = {"guidance_scale": "guidance_scale", "multi_scale_cfg": "guide_stages"}
        assert {name: judge[own] for name, own in names.items()} == recorded["lrm"]
        recorded["sample"]["threshold"] = None  # which the official code ignores beside a schedule
    assert {key: config.sample[key] for key in recorded["sample"]} == recorded["sample"]
    # The traces were made with a higher rate and small minibatches, to see something.
    of_the_trace = ("batch_size", "gradient_accumulation_steps", "learning_rate")
    expected = {k: v for k, v in recorded["train"].items() if k not in of_the_trace}
    assert {key: config.train[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("file", "last_constants"),
    [
        ("base", ["train.adam_beta2", "train.adam_weight_decay", "train.adam_epsilon"]),
        ("spm_base", ["train.adam_beta2", "train.adam_epsilon"]),
    ],
)
def test_every_key_of_a_base_is_commented(file, last_constants):
    source = (ROOT / "config" / f"{file}.py").read_text()
    lines = source[source.index("def get_config") :].splitlines()
    undocumented = []
    for above, line in zip(lines, lines[1:], strict=False):
        is_key = "=" in line and line.startswith("    ") and "ConfigDict()" not in line
        if is_key and "#" not in line and not above.strip().startswith("#"):
            undocumented.append(line.strip())
    # Only AdamW's constants share one comment.
    assert [line.split()[0] for line in undocumented] == last_constants


def test_evaluation_overlays_fit_their_base():
    default = leaves(load_config(EVAL_BASE, EVAL_BASE))
    sdxl, tiny = (
        leaves(load_config(f"config/eval_{name}.py", EVAL_BASE)) for name in ("sdxl", "tiny")
    )
    changed = {key for key in default if sdxl[key] != default[key]}
    assert changed == {"family", "pretrained.model", "pretrained.vae", "sample.batch_size"}
    assert sdxl["pretrained.vae"] == "madebyollin/sdxl-vae-fp16-fix"
    assert tiny["pretrained.model"] == "assets/tiny/sd15" and len(tiny["scorers"]) == 4
