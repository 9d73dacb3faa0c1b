"""GradSPO on the embedded tiny Stable Diffusion: a minute on a CPU.

bash launch_tiny.sh
"""

from config import base


def get_config():
    config = base.get_config()
    config.mixed_precision = "no"
    config.num_epochs = 2
    config.pretrained.model = "assets/tiny/sd15"
    config.preference.checkpoint = "assets/tiny/spm.safetensors"
    config.preference.backbone = "assets/tiny/clip"
    config.preference.processor = "assets/tiny/clip"
    config.prompts.source = "assets/prompts/tiny.txt"
    config.prompts.num = 0
    config.sample.batch_size = 8
    config.sample.threshold = 0.05
    config.train.batch_size = 16
    config.train.learning_rate = 1e-3
    config.eval.num_images = 8
    config.tracker.name = "none"
    return config
