"""The step-aware preference model of the embedded tiny Stable Diffusion, on a CPU.

bash launch_spm.sh --cpu --config=config/spm_tiny.py
"""

from config import spm_base


def get_config():
    config = spm_base.get_config()
    config.mixed_precision = "no"
    config.max_train_steps = 400
    config.save_steps = 200
    config.eval_steps = 200
    config.pretrained.model = "assets/tiny/sd15"
    config.preference.backbone = "assets/tiny/clip"
    config.preference.processor = "assets/tiny/clip"
    config.data.source = "assets/tiny/pickapic"
    config.data.image_size = 32
    config.data.num_workers = 0
    config.data.max_validation = 400
    config.labels.backbone = "assets/tiny/clip"
    config.labels.processor = "assets/tiny/clip"
    config.train.batch_size = 32
    config.train.global_batch_size = 32
    config.train.learning_rate = 1e-4
    config.train.guidance_scale = 2.0  # as config/tiny.py
    config.train.warmup_steps = 50
    config.tracker.name = "none"
    return config
