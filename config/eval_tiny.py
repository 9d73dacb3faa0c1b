"""Evaluation on the embedded tiny world: a minute on a CPU.

python scripts/evaluate.py --config=config/eval_tiny.py --config.models=base \
    --config.models=gradspo=runs/NAME
"""

from config import eval_base


def get_config():
    config = eval_base.get_config()
    config.mixed_precision = "no"
    config.pretrained.model = "assets/tiny/sd15"
    config.prompts.source = "assets/tiny/prompts/held_out.txt"
    config.sample.guidance_scale = 2.0  # as config/tiny.py
    config.sample.batch_size = 50
    config.score_batch_size = 50
    # The hidden quality, and whether an image shows what was asked for, are read off the pixels.
    config.scorers = (
        "spo.tiny_world.quality:quality",
        "spo.tiny_world.quality:faithfulness",
        "pickscore",
        "step_aware_clip",
    )
    clip = {"backbone": "assets/tiny/clip", "processor": "assets/tiny/clip"}
    config.scorer_options.pickscore = clip
    config.scorer_options.step_aware_clip = {"checkpoint": "assets/tiny/spm.safetensors", **clip}
    return config
