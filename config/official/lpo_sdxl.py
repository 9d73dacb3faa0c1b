"""LPO on SDXL as the official code runs it, where that departs from the paper."""

from config import lpo_sdxl


def get_config():
    config = lpo_sdxl.get_config()
    config.train.max_grad_norm = None
    return config
