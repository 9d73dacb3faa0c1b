"""Every setting of an evaluation: several models, the same prompts and seeds, scores, who wins.

python scripts/evaluate.py --config.models=base --config.models=gradspo=runs/NAME

The defaults are the protocol of the SPO paper (Liang et al., arXiv 2406.04314) on SD1.5; eval_sdxl.py,
eval_tiny.py and eval_scales.py are overlays.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()

    # ---- what is compared ----------------------------------------------------------------------
    # Each [NAME=]MODEL, given one by one on the command line; the others are compared with the first.
    # MODEL is one of
    #   base                                 the base model below
    #   runs/NAME, runs/NAME/ema, a checkpoint folder, a .safetensors file, user/repo[/folder or file]
    #                                        the base model with that LoRA; LORA:0.5 at half strength,
    #                                        LORA+LORA both
    #   a diffusers folder or Hub id, or a   that pipeline; where it holds a UNet alone, the base
    #   .safetensors file of all weights     model with that UNet
    #   a folder of images                   one per prompt, in the order of their names
    config.models = ("base",)
    # Strengths: every LoRA among the models is drawn at each of them, and the report shows the scores
    # over the strength; --config.lora_scales=0.5,1. Empty: as `models` says, 1 unless it says another.
    config.lora_scales = ()
    config.family = "sd15"  # "sd15" or "sdxl", of all models
    config.pretrained = pretrained = ConfigDict()  # the base model, as in config/base.py
    pretrained.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    pretrained.revision = placeholder(str)
    pretrained.variant = placeholder(str)
    pretrained.vae = placeholder(str)

    # ---- the prompts ---------------------------------------------------------------------------
    config.prompts = prompts = ConfigDict()
    # "pickapic_v2" (its test prompts, 487), "hpdv2" (3,200), "partiprompts" (1,632), or a file, address
    # or dataset as in config/base.py.
    prompts.source = "pickapic_v2"
    prompts.split = "train"  # of a dataset; the named sets know their own
    prompts.column = "caption"  # likewise
    prompts.num = 0  # so many, drawn with prompts.seed; 0 takes all, in order
    prompts.seed = 42

    # ---- the images: one per prompt, DDIM with eta 0 -------------------------------------------
    config.sample = sample = ConfigDict()
    sample.num_steps = 20
    sample.guidance_scale = 5.0
    sample.seed = (
        0  # image i starts from noise seeded with (sample.seed, i), the same for all models
    )
    sample.batch_size = 4  # images drawn at once on one GPU
    config.mixed_precision = "fp16"  # "no", "fp16" or "bf16"; of the models that draw

    # ---- the scores ----------------------------------------------------------------------------
    # "pickscore", "hpsv2", "hpsv2.1", "imagereward", "aesthetic", "clipscore", "step_aware_clip" (at
    # t = 0), or "module:factory" (see spo/scorers/__init__.py), one by one on the command line;
    # --config.scorers="()" draws the images and leaves the scores to another call.
    config.scorers = ("pickscore", "hpsv2", "imagereward", "aesthetic")
    # Options of a scorer's factory by its name: config.scorer_options["hpsv2.1"] = {"backbone": "x"}.
    config.scorer_options = ConfigDict(allow_dotted_keys=True)
    config.score_batch_size = 16  # images scored at once on one GPU

    # ---- where the results go ------------------------------------------------------------------
    config.logdir = "runs"
    config.run_name = (
        ""  # folder there; empty: eval, family and time. One that exists is completed.
    )
    # Seconds after which a collective fails that a process does not answer; the main process may have
    # to download while the others wait.
    config.rank_timeout = 1800

    return config
