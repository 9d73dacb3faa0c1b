"""Evaluation of SDXL by the protocol of the SPO paper: 500 prompts, four scorers.

python scripts/evaluate.py --config=config/eval_sdxl.py --config.models=base \
    --config.models=gradspo=runs/NAME
"""

from config import eval_base


def get_config():
    config = eval_base.get_config()
    config.family = "sdxl"
    config.pretrained.model = "stabilityai/stable-diffusion-xl-base-1.0"
    config.pretrained.vae = "madebyollin/sdxl-vae-fp16-fix"
    config.sample.batch_size = 1
    return config
