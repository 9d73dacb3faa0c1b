"""config/tiny.py on the random models of the golden traces: smaller, and nothing to learn."""

from config import tiny

MODELS = "tests/data/golden/models"


def get_config():
    config = tiny.get_config()
    config.pretrained.model = f"{MODELS}/tiny-sd15"
    config.preference.checkpoint = f"{MODELS}/tiny-spm.bin"
    config.preference.backbone = f"{MODELS}/tiny-clip"
    config.preference.processor = f"{MODELS}/tiny-clip"
    config.prompts.source = "assets/prompts/tiny.txt"
    config.lora.rank = 4
    config.sample.global_batch_size = None
    config.sample.guidance_scale = 5.0
    config.sample.decode_batch_size = 8
    config.sample.threshold = 0.05
    config.train.global_batch_size = None
    config.train.learning_rate = 1e-3
    config.eval.guidance_scale = 5.0
    config.eval.prompts = "assets/prompts/validation.txt"
    config.eval.num_judged = 0
    config.save_interval = 1
    config.estimate_costs = False
    return config
