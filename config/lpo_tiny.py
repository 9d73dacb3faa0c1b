"""LPO on the embedded tiny world: SPO's loss on pairs that the latent reward model chose.

bash launch_tiny.sh --config=config/lpo_tiny.py
"""

from config import gradspo_lrm_tiny, tiny


def get_config():
    config = tiny.get_config()
    config.algorithm = "lpo"
    gradspo_lrm_tiny.use_latent_reward(config)
    config.train.beta = 500.0  # as in the paper (arXiv 2502.01051)
    return config
