"""tests/data/random_models.py judged by the random latent reward model of the golden traces."""

from tests.data import random_models


def get_config():
    config = random_models.get_config()
    config.preference.scorer = "latent_reward"
    config.preference.kwargs = {
        "checkpoint": f"{random_models.MODELS}/tiny-lrm-sd15",
        "base": config.pretrained.model,
    }
    return config
