"""The training loop: prompts -> rollout -> scores -> pairs -> loss -> LoRA update -> EMA."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor
from tqdm import tqdm

from spo import backbone, scorers, settings, tracking
from spo.backbone import Backbone
from spo.batching import BatchPlan, fit_batches
from spo.checkpoint import Position, checkpoints, load_checkpoint, save_checkpoint, save_networks
from spo.collect import Collected, check_scores, collect_rollout, score_statistics
from spo.distributed import Workers
from spo.ema import distance
from spo.errors import RunError, UserError
from spo.learner import Learner, Step
from spo.lora import add_lora
from spo.pairs import concatenate_pairs, no_pairs
from spo.pictures import Cell, grid, to_pil
from spo.prompts import PromptSet, epoch_order, read_prompts
from spo.run_dir import open_run_dir
from spo.sampling import sample_images
from spo.seeding import derive_seed
from spo.types import PreferencePairs


def train(config: ConfigDict) -> None:
    """Train as `config` says, in one process or as one of several that accelerate started."""
    workers = Workers()
    try:
        Trainer(config, workers).run()
    finally:
        workers.close()
