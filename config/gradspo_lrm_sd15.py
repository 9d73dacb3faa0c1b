"""GradSPO on SD1.5, its candidates judged by a latent reward model at every timestep.

bash launch_sd15.sh --config=config/gradspo_lrm_sd15.py

GradSPO's loss and EMA sampler with LPO's judge and thresholds: no paper has this.
"""

from config import lpo_sd15, sd15


def get_config():
    config = sd15.get_config()
    lpo_sd15.use_latent_reward(config)
    return config
