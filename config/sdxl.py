"""GradSPO on SDXL 1.0, as in the paper: 4 x A100 80 GB.

bash launch_sdxl.sh
"""

from config import base


def get_config():
    config = base.get_config()
    config.family = "sdxl"
    config.pretrained.model = "stabilityai/stable-diffusion-xl-base-1.0"
    config.pretrained.vae = "madebyollin/sdxl-vae-fp16-fix"
    config.preference.checkpoint = (
        "hf://SPO-Diffusion-Models/Step-Aware_Preference_Models/"
        "sdxl_step-aware_preference_model.bin"
    )
    config.lora.rank = 64
    config.sample.threshold = 0.4
    config.sample.batch_size = 2
    config.sample.global_batch_size = 8  # 4 GPUs x 2
    config.sample.decode_batch_size = 4
    config.train.learning_rate = 1e-5
    config.train.batch_size = 1
    config.train.global_batch_size = 16  # 4 GPUs x 1 x 4 accumulation steps
    return config
