"""The default configs against a fake Hub and web server: from an empty cache to the first rollout.

Tiny weights stand behind the real ids and file names. Then each source in turn answers wrongly.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fake_hub import serve
from finished_images import tiny_open_clip
from helpers import MODELS, tiny_sd21
from labelled_pairs import make_row, write_rows
from safetensors.torch import load

from spo.data.prompt_sets import PICKAPIC, PROMPT_SETS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
SD21 = "stabilityai/stable-diffusion-2-1-base"
LRM = "casiatao/LRM"
SPM = "SPO-Diffusion-Models/Step-Aware_Preference_Models"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_L = "openai/clip-vit-large-patch14"
PAIRS, OLD_PAIRS = PICKAPIC
LIST = json.dumps([{"caption": c, "trainset_idx": i} for i, c in enumerate(("a fox", "a whale"))])
TEST_LIST = json.dumps([{"prompt": "a fox"}, {"prompt": "an owl"}])


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def saved(weights) -> bytes:
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A fake Hub that holds everything that the default configs name."""
    folder = tmp_path_factory.mktemp("hub")
    clip, spm = files_of(MODELS / "tiny-clip"), (MODELS / "tiny-spm.bin").read_bytes()
    open_clip = tiny_open_clip(folder / "open_clip")
    recorded = files_of(ROOT / "tests/data/imagereward")
    row = make_row(0)
    write_rows(folder / "pairs" / "train.parquet", [row])
    write_rows(folder / "pairs" / "validation_unique.parquet", [row])
    pairs = {
        f"data/{n.stem}-00000-of-00001.parquet": n.read_bytes()
        for n in (folder / "pairs").iterdir()
    }
    pq.write_table(pa.table({"caption": ["a fox", "an owl"]}), folder / "test_unique.parquet")
    test_prompts = {
        "data/test_unique-00000-of-00001.parquet": (folder / "test_unique.parquet").read_bytes()
    }
    weights = (open_clip / "open_clip_model.safetensors").read_bytes()
    halved = {"state_dict": load(weights)}
    small, bert = ("tokenizer_config.json", "vocab.txt"), {"config.json": b'{"model_type": "bert"}'}
    with serve() as hub:
        for name, files in {
            SD15: files_of(MODELS / "tiny-sd15"),
            SDXL: files_of(MODELS / "tiny-sdxl"),
            SD21: files_of(tiny_sd21(folder / "sd21")),
            LRM: {
                f"lrm_{family}/{name}": content
                for family in ("sd15", "sdxl")
                for name, content in files_of(MODELS / f"tiny-lrm-{family}").items()
            },
            "madebyollin/sdxl-vae-fp16-fix": files_of(MODELS / "tiny-sdxl" / "vae"),
            SPM: {f"{n}_step-aware_preference_model.bin": spm for n in ("sd-v1-5", "sdxl")},
            "yuvalkirstain/PickScore_v1": clip,
            CLIP_H: clip,
            CLIP_L: clip,
            "xswu/HPSv2": {"HPS_v2_compressed.pt": saved(halved)},
            "zai-org/ImageReward": {"ImageReward.pt": recorded["ImageReward.pt"]},
            "google-bert/bert-base-uncased": {n: recorded[n] for n in small} | bert,
            "timm/vit_large_patch14_clip_224.openai": {"open_clip_model.safetensors": weights},
            "trl-lib/ddpo-aesthetic-predictor": {
                "aesthetic-model.pth": saved({"weight": torch.ones(1, 16), "bias": torch.zeros(1)})
            },
            f"datasets/{PAIRS}": pairs,
            f"datasets/{OLD_PAIRS}": pairs,
            "datasets/yuvalkirstain/pickapic_v2": test_prompts,
        }.items():
            hub.create(name, files=files)
        hub.architecture = json.loads((open_clip / "open_clip_config.json").read_text())[
            "model_cfg"
        ]
        hub.addresses = {}
        for named in PROMPT_SETS.values():
            for place in named.places:
                url, checksum, _ = place.source.partition("#sha256=")
                if checksum:
                    path = "/web/" + url.removeprefix("https://")
                    content = (LIST if place.column == "caption" else TEST_LIST).encode()
                    hub.web[path] = content
                    digest = hashlib.sha256(content).hexdigest()
                    hub.addresses[place.source] = f"{hub.url}{path}#sha256={digest}"
        yield hub


@pytest.fixture(scope="module")
def worker(hub, tmp_path_factory):
    """A process that runs cases; libraries load once."""
    home = tmp_path_factory.mktemp("home")
    env = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_ETAG_TIMEOUT": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(ROOT / "tests" / "default_runs.py")]
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run(hub, worker, tmp_path):
    """A function that runs a config, with sources broken, and returns status, output and start."""

    def run_case(config, broken=None, **case):
        hub.broken = broken or {}
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        case |= {"config": config, "addresses": hub.addresses, "logdir": str(folder)}
        case["architectures"] = dict.fromkeys(("ViT-H-14", "ViT-L-14-quickgelu"), hub.architecture)
        print(json.dumps(case), file=worker.stdin, flush=True)
        answer = json.loads(worker.stdout.readline())
        starts = folder / "run" / "starts.jsonl"
        start = json.loads(starts.read_text().splitlines()[-1]) if starts.is_file() else {}
        return answer["status"], answer["output"], start

    yield run_case
    hub.broken = {}


TRAINING = ["config/sd15.py", "config/sdxl.py", "config/spo_sd15.py", "config/spo_sdxl.py"]
SPMS = ["config/spm_sd15.py", "config/spm_sdxl.py", "config/lrm_sd15.py", "config/lrm_sdxl.py"]
EVALUATIONS = ["config/eval_base.py", "config/eval_sdxl.py"]
JUDGED = [
    *("config/lpo_sd15.py", "config/lpo_sd21.py", "config/lpo_sdxl.py"),
    *("config/gradspo_lrm_sd15.py", "config/gradspo_lrm_sdxl.py"),
]
HEAD = {"scorer_options": {"imagereward": {"head_width": 8}}}


@pytest.mark.parametrize("config", [*TRAINING, *JUDGED, *SPMS, *EVALUATIONS])
def test_from_nothing_and_then_offline(run, hub, config):
    changes = HEAD if config in EVALUATIONS else {}
    status, output, start = run(config, changes=changes)
    assert status == 0, output
    if config in (*TRAINING, *JUDGED):
        assert start["prompts"].startswith("2 prompts from official-4k (mit), http")
        base = SDXL if "sdxl" in config else SD21 if "sd21" in config else SD15
        judge = {LRM} if config in JUDGED else {SPM, "yuvalkirstain/PickScore_v1", CLIP_H}
        vae = {"madebyollin/sdxl-vae-fp16-fix"} if base == SDXL else set()
        assert start["commits"].keys() == {base, *judge, *vae}
        assert start["commits"][base] == hub.tip(base, "main").sha
    status, output, _ = run(config, changes=changes, fresh=False, offline=True)
    assert status == 0, output


@pytest.mark.parametrize(
    "config", ["config/sdxl.py", "config/spm_sdxl.py", "config/lrm_sd15.py", "config/eval_sdxl.py"]
)
def test_prefetch_is_all_that_a_run_needs(run, config):
    changes = HEAD if config in EVALUATIONS else {}
    status, output, _ = run(config, changes=changes, prefetch=True)
    assert status == 0, output
    status, output, _ = run(config, changes=changes, fresh=False, offline=True)
    assert status == 0, output


def test_prefetch_of_the_latent_reward_model(run):
    test_prefetch_is_all_that_a_run_needs(run, "config/lpo_sd15.py")


# What is broken: config that reads it, part of the paths that break, key that errors name.
OPTIONS = "scorer_options"
WEIGHTS = {
    "base model": ("config/sd15.py", SD15, "pretrained.model"),
    "VAE": ("config/sdxl.py", "madebyollin/sdxl-vae-fp16-fix", "pretrained.vae"),
    "preference model": ("config/sd15.py", SPM, "preference.checkpoint"),
    "its CLIP": ("config/sd15.py", "yuvalkirstain/PickScore_v1", "preference.backbone"),
    "its processor": ("config/sd15.py", CLIP_H, "preference.processor"),
    "LRM": ("config/lpo_sd15.py", LRM, "preference.kwargs.checkpoint"),
    "base of the LRM": ("config/lpo_sd21.py", SD15, "preference.kwargs.base"),
    "base model of SDXL": ("config/sdxl.py", SDXL, "pretrained.model"),
    "preference model of SDXL": ("config/sdxl.py", SPM, "preference.checkpoint"),
    "SPM's labels": ("config/spm_sdxl.py", "yuvalkirstain/PickScore_v1", "preference.backbone"),
    "LRM's projection": ("config/lrm_sd15.py", CLIP_L, "preference.text_projection"),
    "PickScore": (
        "config/eval_base.py",
        "yuvalkirstain/PickScore_v1",
        f"{OPTIONS}.pickscore.backbone",
    ),
    "HPSv2": ("config/eval_base.py", "xswu/HPSv2", f"{OPTIONS}.hpsv2.checkpoint"),
    "ImageReward": (
        "config/eval_base.py",
        "zai-org/ImageReward",
        f"{OPTIONS}.imagereward.checkpoint",
    ),
    "its tokenizer": (
        "config/eval_base.py",
        "google-bert/bert-base-uncased",
        f"{OPTIONS}.imagereward.tokenizer",
    ),
    "CLIP": (
        "config/eval_base.py",
        "timm/vit_large_patch14_clip_224.openai",
        f"{OPTIONS}.aesthetic.checkpoint",
    ),
    "aesthetic head": (
        "config/eval_base.py",
        "trl-lib/ddpo-aesthetic-predictor",
        f"{OPTIONS}.aesthetic.head",
    ),
}
SAID = {
    404: "not found (404): there is no such public repo at ",
    403: "gated: accept the terms at ",
    "timeout": "not in the local cache, and no answer from the Hub (",
    "changed": "cut off or changed on its way (",
}


@pytest.mark.parametrize("fault", SAID)
@pytest.mark.parametrize("source", WEIGHTS)
def test_weights_that_do_not_come_are_one_line(run, source, fault):
    config, part, key = WEIGHTS[source]
    changes = HEAD if config in EVALUATIONS else {}
    status, output, _ = run(config, broken={part: fault}, changes=changes)
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert status == 2 and line.startswith(f"error: {key}: ") and part in line
    assert SAID[fault] in line
    assert "Traceback" not in output
    if fault != "changed":  # told before any work
        assert "base: images" not in output


@pytest.mark.parametrize("source", WEIGHTS)
def test_weights_that_have_moved_are_read_and_that_is_said(run, source):
    config, part, _ = WEIGHTS[source]
    changes = HEAD if config in EVALUATIONS else {}
    status, output, _ = run(config, broken={part: "moved"}, changes=changes)
    assert status == 0, output
    assert output.count(f"{part} has moved to moved/repo on the Hub; name that instead") == 1


# For what there is another place: config, part of the paths, what is said instead of the address.
PLACES = {
    "training prompts": ("config/sd15.py", "RockeyCoss/SPO"),
    "evaluation prompts": ("config/eval_base.py", "AIDC-AI/Diffusion-SDPO"),
    "pairs": ("config/spm_sd15.py", PAIRS),
}
REASONS = {
    404: "not found",
    403: ("refused (403)", "gated"),
    "timeout": "no answer",
    "changed": ("changed content", "cut off or changed"),
}


@pytest.mark.parametrize("fault", REASONS)
@pytest.mark.parametrize("source", PLACES)
def test_another_place_is_tried_and_that_is_said_and_recorded(run, hub, source, fault):
    config, part = PLACES[source]
    changes = HEAD if config in EVALUATIONS else {}
    status, output, start = run(config, broken={part: fault}, changes=changes)
    assert status == 0, output
    (line,) = {line for line in output.splitlines() if "tried before" in line or "instead" in line}
    reasons = REASONS[fault] if isinstance(REASONS[fault], tuple) else (REASONS[fault],)
    assert part in line and any(reason in line for reason in reasons)
    if config not in EVALUATIONS:
        assert line in (start.get("prompts"), *start.get("data", {}).get("unavailable", ()))


@pytest.mark.parametrize("source", PLACES)
def test_a_place_that_has_moved_is_read_and_that_is_said(run, source):
    config, part = PLACES[source]
    changes = HEAD if config in EVALUATIONS else {}
    status, output, _ = run(config, broken={part: "moved"}, changes=changes)
    assert status == 0, output
    assert "moved to " in output


def test_prefetch_tries_another_place_for_pairs(run):
    status, output, _ = run("config/spm_sd15.py", broken={PAIRS: 404}, prefetch=True)
    assert status == 0, output
    assert f"{OLD_PAIRS} is read instead" in output


def test_no_place_answers(run):
    status, output, _ = run("config/sd15.py", broken={"4k_training_prompts": 404})
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert status == 2 and line.startswith("error: prompts.source: http")
    assert line.count("not found (404)") == 3
    assert "name another source: a file, an https address, a Hub dataset, or one of " in line
    status, output, _ = run("config/spm_sd15.py", broken={"pickapic_v1": 404})
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert status == 2 and line.startswith(f"error: data.source: {PAIRS}: not found")
    assert f"then data.source: {OLD_PAIRS}: not found" in line and "HPDv3" in line
