"""The checks of a machine with a GPU: they run on a CPU, and one that fails stops no other."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import load_backbone, randn

from spo.gpu_check.card import card
from spo.gpu_check.checks import Place, all_checks, trace
from spo.gpu_check.profiling import profile
from spo.models.device import keep_contiguous
from tests.small_runs import ROOT


@pytest.fixture
def place(tmp_path):
    return Place("cpu", tmp_path, "one")


@pytest.mark.slow
def test_one_that_fails_stops_no_other(tmp_path):
    command = [sys.executable, "-m", "tests.checks_for_tests", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    found = {name: result["status"] for name, result in report.items()}
    assert found == {"a": "failed", "b": "failed", "c": "timed out", "d": "passed"}
    assert report["a"]["summary"] == "half of it"
    lines = done.stdout.splitlines()
    assert "a kernel is missing" in lines[0] and "7 values are not finite" in lines[1]
    assert "as said" in lines[3]
    assert "| d     | passed    |" in (tmp_path / "gpu_report.md").read_text()


def test_the_checks_come_in_their_order_and_name_what_exists():
    names = [check.name for check in all_checks()]
    assert names[0] == "card" and names.index("trace gradspo_sd15") < names.index("tiny fp16")
    assert names.index("overflow") < names.index("sd15") < names.index("sdxl compiled")
    assert len(names) == len(set(names)) > 25


def test_a_trace_and_its_deviations(place):
    found = trace(place, "lrm_forward_sd15")
    assert found["failures"] == [] and 0 < found["worst"]["scores"] < 5e-3


def test_the_card(place):
    found = card(place)
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert found["tflops_16_bit"] > 0 and found["copied_tb_s"] > 0


def test_a_profile_finds_the_operation_that_takes_the_time():
    matrix = torch.randn(512, 512)
    found = profile({"product": lambda: matrix @ matrix}, torch.device("cpu"))["product"]
    assert found["largest"][0]["name"] in ("aten::mm", "aten::matmul")
    assert found["largest"][0]["share"] > 0.5 and found["kernels"] >= 1


def test_a_vae_decodes_alike_in_contiguous_memory():
    backbone = load_backbone("sd15")
    latents = randn(2, *backbone.latent_shape, seed=1)
    before, seen = backbone.decode(latents), []
    last = backbone.vae.decoder.up_blocks[0]
    last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    backbone.decode(latents)
    keep_contiguous(backbone.vae)
    torch.testing.assert_close(backbone.decode(latents), before, rtol=0, atol=1e-4)
    assert seen == [False, True]


@pytest.mark.slow
def test_the_command_on_a_cpu(tmp_path):
    command = ["bash", "scripts/check_gpu.sh", "--cpu", "--out", str(tmp_path)]
    command += ["--only", "card", "sd15", "sdxl spo", "nccl", "overflow", "repeat", "graphs"]
    python = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=python, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    assert {result["status"] for result in report.values()} == {"passed"}
    assert report["repeat"]["equal"]
    variants = report["sd15"]["variants"]
    assert list(variants) == ["exact", "official", "fast", "exact, channels last"]
    assert all(variant["seconds"]["rollout"] > 0 for variant in variants.values())
    assert report["sd15"]["costs"]["estimated_gib"] > 0
    assert all(call["share_of_peak"] > 0 for call in variants["exact"]["calls"].values())
    assert report["nccl"]["equal"] and report["graphs"]["equal"]
    again = [*command[:5], "--only", "sdxl spo"]  # over its own runs of the last time
    done = subprocess.run(again, cwd=ROOT, env=python, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_python_that_lacks_the_packages_is_one_line(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    done = subprocess.run(
        ["bash", "scripts/check_gpu.sh"],
        cwd=tmp_path,
        env=os.environ | {"PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        f"error: {python} lacks the packages: run `bash scripts/setup_env.sh`"
    )
    assert done.stderr.count("\n") == 1
