"""The step-aware preference model of SD1.5 on HPDv3 (Ma et al., arXiv 2508.03789), from a folder.

hf download MizzenAI/HPDv3 --repo-type dataset --local-dir /data/HPDv3
cat /data/HPDv3/images.tar.gz.* | tar -xz -C /data/HPDv3
bash launch_spm.sh --config=config/spm_hpdv3.py --config.data.source=/data/HPDv3
"""

from config import spm_base


def get_config():
    config = spm_base.get_config()
    config.data.source = "HPDv3"
    config.data.validation_split = "test"
    config.data.columns = {
        "caption": "prompt",
        "jpg_0": "path1",  # relative to the folder; people prefer it to path2
        "jpg_1": "path2",
        "label_0": 1,
        "label_1": 0,
        "has_label": 1,
        "num_example_per_prompt": 1,  # not counted there: every pair weighs the same
    }
    return config
