"""GradSPO on SDXL 1.0, its candidates judged by a latent reward model at every timestep.

bash launch_sdxl.sh --config=config/gradspo_lrm_sdxl.py

GradSPO's loss and EMA sampler with LPO's judge and thresholds: no paper has this.
"""

from config import lpo_sdxl, sdxl


def get_config():
    config = sdxl.get_config()
    lpo_sdxl.use_latent_reward(config)
    return config
