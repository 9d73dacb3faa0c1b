"""GradSPO on the latent reward model of the embedded tiny world, at all timesteps.

bash launch_tiny.sh --config=config/gradspo_lrm_tiny.py
"""

from config import tiny


def use_latent_reward(config):
    """The judge, from the first step on."""
    config.preference.scorer = "latent_reward"
    config.preference.kwargs = {
        "checkpoint": "assets/tiny/lrm",
        "base": "assets/tiny/sd15",
        "guidance_scale": 1.0,  # as in its training
    }
    config.sample.branch_from = 0
    config.sample.score_batch_size = 32


def get_config():
    config = tiny.get_config()
    use_latent_reward(config)
    # At 0.1 twice as many pairs are kept, and in 16 rollouts images come to ignore their prompts.
    config.sample.threshold = 0.2
    return config
