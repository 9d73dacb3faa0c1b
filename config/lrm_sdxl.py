"""The latent reward model of SDXL 1.0, as in LPO: 8 GPUs.

bash launch_spm.sh --config=config/lrm_sdxl.py
"""

from config import lrm_sd15


def get_config():
    config = lrm_sd15.get_config()
    config.family = "sdxl"
    config.max_train_steps = 8000
    config.pretrained.model = "stabilityai/stable-diffusion-xl-base-1.0"
    config.pretrained.vae = "madebyollin/sdxl-vae-fp16-fix"
    config.data.image_size = 1024
    config.train.batch_size = 4
    config.train.global_batch_size = 32
    # 8 images of 1024 pixels have 2^31 activations in the VAE, too many for some GPU kernels.
    config.train.predict_batch_size = 4
    config.train.warmup_steps = 1000
    return config
