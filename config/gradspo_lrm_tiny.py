"""GradSPO on the latent reward model of the embedded tiny world, at all timesteps.

bash launch_tiny.sh --config=config/gradspo_lrm_tiny.py
"""

from config import tiny


def get_config():
    config = tiny.get_config()
    config.preference.scorer = "latent_reward"
    config.preference.kwargs = {
        "checkpoint": "assets/tiny/lrm",
        "base": "assets/tiny/sd15",
        "guidance_scale": 1.0,
    }
    config.sample.branch_from = 0
    config.sample.score_batch_size = 32
    return config
