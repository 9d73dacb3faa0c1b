"""LPO on SD1.5 as the official code runs it, where that departs from the paper."""

from config import lpo_sd15


def get_config():
    config = lpo_sd15.get_config()
    config.train.max_grad_norm = None
    return config
