"""Download everything that a config needs, and check it by loading it.

    python scripts/prefetch.py --config=config/sdxl.py

Afterwards the run works offline (HF_HUB_OFFLINE=1).
"""

import sys
from pathlib import Path

from absl import app

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from spo.flags import define_config, exit_on_user_error, parse_flags

CONFIG = define_config("config/sd15.py")


def main(_) -> None:
    with exit_on_user_error():
        prefetch(CONFIG.value)


def prefetch(config) -> None:
    """Load, one after the other, the prompts, the base model, the scorer and the LoRA to start from."""
    import torch

    from spo import backbone, preflight, scorers, settings
    from spo.lora_files import find_lora

    settings.check(config)
    print(preflight.read_training_prompts(config).describe())
    print(f"{len(preflight.read_validation_prompts(config))} validation prompts")
    source = settings.model_source(config)
    backbone.check_source(source, config.family)
    pipe = backbone.load_pipeline(source, config.family, backbone.DTYPES[config.mixed_precision])
    size = sum(p.numel() for p in pipe.unet.parameters())
    print(f"base model: {source.model}, UNet of {size / 1e6:.1f} M parameters")
    del pipe
    scorers.load_scorer(settings.scorer_source(config), torch.device("cpu"))
    print(f"preference model: {config.preference.scorer}")
    if config.lora.init_from:
        print(f"LoRA: {find_lora(config.lora.init_from, 'lora.init_from')}")
    print("Everything is there.")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
