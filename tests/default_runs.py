"""Runs default configs against a fake Hub, each case in a process of its own with an empty cache.

Started with HF_ENDPOINT and HF_HOME set; reads a case per line of stdin, as JSON, and answers by
{"status": exit status, "output": what the run printed}. Libraries load once, then each case forks.
"""

import json
import os
import shutil
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import huggingface_hub
import open_clip
from huggingface_hub.utils import _http

from scripts.prefetch import base_of, prefetch
from spo.command_line.config_files import load_config
from spo.command_line.flags import exit_on_user_error
from spo.data import prompt_sets
from spo.evaluation.evaluator import evaluate
from spo.method.start import train
from spo.preference.pair_trainer import train_preference_model

SMALL = {
    "mixed_precision": "no",
    "tracker.name": "none",
    "num_epochs": 1,
    "eval_interval": 0,
    "sample.num_steps": 2,
    "sample.branch_from": 0,
    "sample.num_inner_steps": 0,
    "sample.batch_size": 2,
    "sample.global_batch_size": None,
    "train.batch_size": 2,
    "train.global_batch_size": None,
    "max_train_steps": 2,
    "train.warmup_steps": 1,
    "data.image_size": 16,
    "data.num_workers": 0,
    "eval_steps": 0,
    "keep_best": False,
}


def run(case):
    """Runs one case in this process; raises SystemExit with its status."""
    for name, architecture in case.get("architectures", {}).items():
        open_clip.factory._MODEL_CONFIGS[name] = architecture  # tiny weights behind the real name
    for name, named in prompt_sets.PROMPT_SETS.items():
        places = tuple(
            replace(p, source=case["addresses"].get(p.source, p.source)) for p in named.places
        )
        prompt_sets.PROMPT_SETS[name] = replace(named, places=places)
    config = load_config(case["config"], base_of)
    known = dict(SMALL, **case.get("changes", {}))
    with config.unlocked():
        for key, value in known.items():
            section, _, name = key.rpartition(".")
            target = config
            for part in filter(None, section.split(".")):
                target = target.get(part) if target is not None else None
            if target is not None and name in target:
                target[name] = value
    config.logdir, config.run_name = case["logdir"], "run"
    start = (
        evaluate if "models" in config else train_preference_model if "data" in config else train
    )
    with exit_on_user_error():
        if case.get("prefetch", False):
            print(*prefetch(config), sep="\n")
        else:
            start(config)


def main():
    home = Path(os.environ["HF_HOME"])
    _http.time = SimpleNamespace(**vars(time) | {"sleep": lambda _: None})  # between retries
    for line in sys.stdin:
        case = json.loads(line)
        if case.get("fresh", True):
            shutil.rmtree(home, ignore_errors=True)
        huggingface_hub.constants.HF_HUB_OFFLINE = case.get("offline", False)
        with TemporaryDirectory() as folder:
            output = Path(folder) / "output"
            child = os.fork()
            if child == 0:
                with output.open("w") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                status = 0
                try:
                    run(case)
                except SystemExit as exit:
                    status = exit.code or 0
                except BaseException:
                    traceback.print_exc()
                    status = 70
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            answer = {"status": status, "output": output.read_text(errors="replace")}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
