"""A base model whose scheduler has linspace spacing: GradSPO trains, SPO says what to change."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import model_folder
from small_runs import read_metrics, run

from spo.errors import UserError


@pytest.fixture
def model(tmp_path):
    folder = shutil.copytree(model_folder("sd15"), tmp_path / "model")
    file = Path(__file__).parent / "data" / "scheduler_linspace.json"
    shutil.copy(file, folder / "scheduler" / "scheduler_config.json")
    return str(folder)


SMALL = {"num_epochs": 1, "eval_interval": 0, "prompts__num": 2}


def test_gradspo_makes_no_pairs_at_t_0(model, tmp_path):
    changes = SMALL | {"pretrained__model": model, "sample__threshold": -1.0}
    with_0 = read_metrics(run(tmp_path / "linspace", **changes))
    without = read_metrics(run(tmp_path / "leading", **changes, sample__timesteps="leading"))
    assert [line["pairs_at"]["0"] for line in with_0] == [0]
    assert [line["pairs_at"]["1"] > 0 for line in without] == [True]


def test_spo_names_the_spacing(model, tmp_path):
    changes = SMALL | {"pretrained__model": model, "algorithm": "spo"}
    with pytest.raises(UserError, match=r"sigma is 0.*timestep_spacing"):
        run(tmp_path / "spo", **changes)


def test_spo_cannot_branch_where_nothing_is_left_of_the_image(model, tmp_path):
    file = Path(model) / "scheduler" / "scheduler_config.json"
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    config |= {"timestep_spacing": "trailing"}
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    changes = SMALL | {"pretrained__model": model, "algorithm": "spo"}
    with pytest.raises(UserError, match=r"sample\.branch_from: at t = 999"):
        run(tmp_path / "at_0", **changes, sample__branch_from=0)
    assert read_metrics(run(tmp_path / "later", **changes, sample__branch_from=1))
