"""LPO on Stable Diffusion 2.1 base, judged by the latent reward model of SD1.5, as in LPO's code.

bash launch_sd15.sh --config=config/lpo_sd21.py

The two models' latents and noise are alike; the reward model reads prompts by SD1.5's text encoder.
"""

from config import lpo_sd15


def get_config():
    config = lpo_sd15.get_config()
    config.pretrained.model = "stabilityai/stable-diffusion-2-1-base"
    return config
