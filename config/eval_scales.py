"""Evaluation of the strength of a LoRA on SD1.5: the scorer of the training, and judges beside it.

python scripts/evaluate.py --config=config/eval_scales.py --config.models=base \
    --config.models=runs/NAME

Six models (base, and five strengths) draw 100 prompts each: 600 images, 21 PFLOP, which is 4 minutes
at 100 TFLOP/s. The same for SDXL and for the tiny world:

    --config=config/eval_sdxl.py --config.prompts.num=100 --config.lora_scales=0.25,0.5,0.75,1,1.25
    --config=config/eval_tiny.py --config.lora_scales=0.25,0.5,0.75,1,1.25
"""

from config import eval_base


def get_config():
    config = eval_base.get_config()
    config.lora_scales = (0.25, 0.5, 0.75, 1, 1.25)
    config.prompts.num = 100
    config.scorers = ("step_aware_clip", "hpsv2.1", "aesthetic")
    return config
