"""LPO on SD2.1 as the official code runs it, where that departs from the paper."""

from config import lpo_sd21


def get_config():
    config = lpo_sd21.get_config()
    config.train.max_grad_norm = None
    return config
