"""Whole trainings of preference models: files, resuming, and agreement between processes."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from helpers import MODELS, scorer_source
from labelled_pairs import make_row, write_splits
from safetensors.torch import load_file

from config import lrm_tiny, spm_tiny
from scripts.prefetch import prefetch
from spo.command_line.config_files import leaves
from spo.errors import RunError, Stopped, UserError
from spo.launch.__main__ import SCRIPTS, load_script_config
from spo.preference import pair_learner, pair_metrics
from spo.preference.pair_recipe import FIXED_KEYS, check_training
from spo.preference.pair_trainer import train_preference_model
from spo.preference.preparation import SPMPreparation
from spo.run.checkpoint_folder import _seal, checkpoints, read_state
from spo.run.folder import locked
from spo.scorers import load_scorer
from spo.scorers.clip import clip_config
from spo.scorers.step_aware_clip import load_step_aware_clip

ROOT = Path(__file__).resolve().parent.parent
SPM = "step_aware_preference_model.safetensors"
LRM = "latent_reward_model"
TIMING = ("pairs_per_second", "peak_memory_gib")
CHANGES = {
    "run_name": "run",
    "max_train_steps": 4,
    "save_steps": 2,
    "eval_steps": 4,
    "log_steps": 3,
    "pretrained.model": str(MODELS / "tiny-sd15"),
    "preference.backbone": str(MODELS / "tiny-clip"),
    "preference.processor": str(MODELS / "tiny-clip"),
    "labels.backbone": str(MODELS / "tiny-clip"),
    "labels.processor": str(MODELS / "tiny-clip"),
    "data.image_size": 16,
    "train.batch_size": 2,
    "train.global_batch_size": 4,
    "train.warmup_steps": 1,
}
LRM_CHANGES = {
    key: value for key, value in CHANGES.items() if not key.startswith("preference.")
} | {
    "preference.text_projection": str(MODELS / "tiny-clip"),
    "eval_steps": 1,
    "train.learning_rate": 1e-2,
}
BOTH = {"spm": (spm_tiny, CHANGES), "lrm": (lrm_tiny, LRM_CHANGES)}
both = pytest.mark.parametrize("kind", BOTH)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Writes 24 training rows, one of them damaged, and 6 validation rows, one of them a tie."""
    train_rows = [make_row(i) for i in range(23)] + [make_row(99, jpg_1=b"broken")]
    folder = tmp_path_factory.mktemp("pairs")
    return write_splits(folder, train_rows, [make_row(i) for i in range(30, 36)])


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        # Seconds that datasets waits at the end of a stream.
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
        yield


def make_config(logdir, data, kind="spm"):
    module, changes = BOTH[kind]
    config = module.get_config()
    config.update_from_flattened_dict(changes | {"logdir": str(logdir), "data.source": str(data)})
    return config


@pytest.fixture
def kind():
    """The model that is trained, an SPM unless a test is of both."""
    return "spm"


@pytest.fixture
def config(tmp_path, data, kind):
    return make_config(tmp_path, data, kind)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """A function from a kind to its run from start to end, with every checkpoint."""

    @functools.cache
    def make(kind):
        config = make_config(tmp_path_factory.mktemp("whole"), data, kind)
        return run(config, checkpoint_limit=0)

    return make


@pytest.fixture
def whole(runs, kind):
    """A run from start to end, with every checkpoint; tests must not change it."""
    return runs(kind)


def run(config, **changes):
    """Trains with a copy of `config` with `changes`; the keys have __ for a dot."""
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    train_preference_model(changed)
    return Path(changed.logdir) / changed.run_name


def read_metrics(run_dir):
    """Returns the lines of metrics.jsonl without timing and memory."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


@pytest.mark.parametrize(
    "edited",
    [
        *({"step": -1}, {"step": 1.5}, {"step": None}, {"skipped_in_a_row": "1"}, {"totals": 5}),
        *(
            {"totals": {"loss": "1"}},
            {"left_out": {"damaged": -1}},
            {"learning_rate": float("nan")},
        ),
        *({"plan": {"num_processes": 0}}, {"scaler": {"scale": None}}, {"versions": []}),
    ],
)
def test_a_checkpoint_that_was_edited_is_refused_at_the_start(whole, tmp_path, data, edited):
    folder = shutil.copytree(whole, tmp_path / "run")
    newest = checkpoints(folder)[-1]
    (newest / "training_state.json").write_text(json.dumps(read_state(newest) | edited))
    (newest / "manifest.json").unlink()
    _seal(newest)
    config = make_config(tmp_path, data)
    config.resume_from = "auto"
    with pytest.raises(UserError, match="^resume_from: .* is not a checkpoint of this c") as error:
        check_training(config, 1)
    assert "\n" not in str(error.value)


def test_a_run_that_lives_is_left_alone(config):
    folder = Path(config.logdir) / config.run_name
    with locked(folder), pytest.raises(UserError, match="^run_name: .* is in use by process"):
        run(config)
    assert list(folder.iterdir()) == []


def weights_of(folder):
    """Returns the model that a run ends with, or that of a checkpoint."""
    if (folder / SPM).exists():
        return load_file(folder / SPM)
    if not (folder / LRM).is_dir():
        return load_file(folder / f"{LRM}.safetensors")
    heads = torch.load(folder / LRM / "state_dict.pt", weights_only=True)
    found = {"visual_projection": heads["visual_projection"]["weight"]}
    for file in (folder / LRM).rglob("*.safetensors"):
        found |= {f"{file.parent.name}.{name}": t for name, t in load_file(file).items()}
    return found | {"logit_scale": torch.tensor(heads["logit_scale"])}


def equal_weights(one, other):
    one, other = weights_of(one), weights_of(other)
    assert set(one) == set(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def distance(one, other):
    one, other = weights_of(one), weights_of(other)
    return max((one[name] - other[name]).abs().max().item() for name in one)


def files_of(run_dir):
    return {p.relative_to(run_dir).as_posix() for p in run_dir.rglob("*") if p.is_file()}


RUN_FILES = {SPM, "accuracy.png", "config.json", "metrics.jsonl", "starts.jsonl"}
STATE_FILES = (SPM, "training_state.json", "optimizer.safetensors", "manifest.json")


def checkpoint_files(*steps):
    return {f"checkpoints/step_{step:07d}/{name}" for step in steps for name in STATE_FILES}


def test_what_a_run_leaves_behind(config, whole):
    run_dir = whole
    assert files_of(run_dir) == RUN_FILES | checkpoint_files(2, 4)
    lines = read_metrics(run_dir)
    # Every third step, every checkpoint, and the accuracy before and after.
    assert [line["step"] for line in lines] == [0, 2, 3, 4]
    assert [line["step"] for line in lines if "accuracy" in line] == [0, 4]
    assert set(lines[0]["accuracy"]) == {"0", "251", "501", "701", "951"}
    assert lines[0]["validation_pairs"] == 5 and lines[0]["validation_ties"] == 1
    assert lines[2]["learning_rate"] == pytest.approx(config.train.learning_rate * 2 / 3)
    assert sum(line.get("pairs", 0) for line in lines) in (15, 16)  # one row is damaged

    # The published key layout, which the trainer takes.
    spm = load_step_aware_clip(run_dir / SPM, clip_config(config.preference.backbone))
    published = torch.load(MODELS / "tiny-spm.bin", weights_only=True)
    names = {name for name in published if not name.endswith("position_ids")}
    assert set(spm.state_dict()) == names
    source = scorer_source("step_aware_clip", checkpoint=str(run_dir / SPM))
    scorer = load_scorer(source, torch.device("cpu"))
    score = scorer.score(torch.zeros(1, 3, 32, 32), scorer.encode_prompts(["a fox"]), 501)
    assert score.isfinite().all()


@both
def test_resumed_run_is_the_run_that_was_not_interrupted(config, whole, tmp_path, capsys, kind):
    # As after an interruption: the first checkpoint, and metrics that went on.
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_0000004")
    model = SPM if kind == "spm" else LRM
    (resumed / model).rename(tmp_path / model)
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    run(config, run_name="resumed", resume_from="auto", checkpoint_limit=1)
    assert equal_weights(whole, resumed)
    out = capsys.readouterr().out
    assert "24 of 24 rows usable" in out and str(resumed / model) in out
    assert "4 pairs per update = minibatch 2 x processes 1 x accumulation 2" in out
    assert [folder.name for folder in checkpoints(resumed)] == ["step_0000004"]
    assert equal_weights(*(checkpoints(folder)[-1] for folder in (whole, resumed)))
    assert read_metrics(whole) == read_metrics(resumed)
    states = [
        load_file(folder / "checkpoints/step_0000004/optimizer.safetensors")
        for folder in (whole, resumed)
    ]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 0
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    # From its folder, under another name.
    branch = run(config, run_name="branch", resume_from=str(whole / "checkpoints" / "step_0000002"))
    assert equal_weights(whole, branch)
    lines = [line for line in read_metrics(whole) if line["step"] > 2]
    assert read_metrics(branch) == lines
    assert not equal_weights(*(whole / "checkpoints" / f"step_000000{step}" for step in (2, 4)))
    other = run(config, run_name="other", seed=43, eval_steps=0, keep_best=False)
    assert not equal_weights(whole, other) and not (other / "accuracy.png").exists()


@pytest.mark.parametrize(
    ("where", "call", "step"),
    [("pair_losses", 5, 3), ("scores", 4, 0), ("scores", 18, 4)],
    ids=["training", "first validation", "last validation"],
)
def test_a_signal_loses_nothing(config, whole, monkeypatch, where, call, step):
    """The sums for the next line survive, and an interrupted accuracy is measured again."""
    owner = pair_learner if where == "pair_losses" else pair_learner.PreferenceLearner
    own, calls = getattr(owner, where), []

    def signalled(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"step_000000{step}:"):
        patch.setattr(owner, where, signalled)
        run(config, save_steps=4)
    resumed = run(config, save_steps=4, resume_from="auto")
    assert equal_weights(whole, resumed)
    # `whole` also has a line for its checkpoint at step 2.
    lines = [line for line in read_metrics(resumed) if line["step"] != 3]
    wanted = [line for line in read_metrics(whole) if line["step"] not in (2, 3)]
    assert lines == wanted
    both = [line for line in read_metrics(whole) if line["step"] in (2, 3)]
    (line,) = (line for line in read_metrics(resumed) if line["step"] == 3)
    assert line["pairs"] == sum(part["pairs"] for part in both)


def test_a_damaged_checkpoint_is_passed_over_and_a_changed_key_told(
    config, whole, tmp_path, capsys
):
    damaged = shutil.copytree(whole, tmp_path / "damaged")
    os.truncate(damaged / "checkpoints" / "step_0000004" / SPM, 100)
    run(config, run_name="damaged", resume_from="auto", save_steps=1)
    assert equal_weights(whole, damaged)
    out = capsys.readouterr().out
    assert f"step_0000004 is damaged ({SPM} has 100 of" in out
    assert "resume: save_steps was 2, and is 1 from here on" in out
    for key, value in (("preference.backbone", "laion/other"), ("seed", 7)):
        changed = config.copy_and_resolve_references()
        own = {"run_name": "damaged", "resume_from": "auto", key: value}
        changed.update_from_flattened_dict(own)
        with pytest.raises(UserError, match=f"^{key}: .*, but the checkpoint was trained with"):
            check_training(changed, 1)


def test_a_resumed_run_may_not_change_its_weights_or_rows():
    rows = {"seed", "data.train_split", "data.streaming", "data.shuffle_buffer"}
    rows |= {"data.filter", "data.filter_strategy"}
    models = {"pretrained.model", "preference.model", "preference.backbone"}
    assert FIXED_KEYS.keys() == rows | models | {"family"}
    assert FIXED_KEYS.keys() <= leaves(spm_tiny.get_config()).keys()


def test_a_run_that_stopped_before_its_first_checkpoint_starts_anew(config, whole, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints")
    run(config, run_name="again", resume_from="auto")
    assert equal_weights(whole, again) and read_metrics(again) == read_metrics(whole)


def test_streaming_resumes_exactly_too(config, whole):
    changes = {"data__streaming": True, "data__num_workers": 2, "data__shuffle_buffer": 5}
    table, whole = whole, run(config, **changes)
    checkpoint = str(whole / "checkpoints" / "step_0000002")
    branch = run(config, run_name="branch", resume_from=checkpoint, **changes)
    assert equal_weights(whole, branch)
    # Validation has one order: before training both ways measure the same.
    assert read_metrics(table)[0] == read_metrics(whole)[0]


def launch(config, tmp_path, processes, kind, **changes):
    arguments = {**BOTH[kind][1], "logdir": tmp_path, "data.source": config.data.source, **changes}
    command = ["bash", "launch_spm.sh", "--cpu", f"--num_processes={processes}"]
    command += [f"--config=config/{kind}_tiny.py"]
    command += [f"--config.{key}={value}" for key, value in arguments.items()]
    environment = os.environ | {
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(datasets.config.HF_DATASETS_CACHE),
    }
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
@both
def test_two_processes_train_as_one_does(config, tmp_path, kind):
    """Pairs, weights and noise do not depend on the number of processes."""
    changes = {"max_train_steps": 6, "save_steps": 1, "checkpoint_limit": 0, "eval_steps": 6}
    # Close to plain gradient descent: Adam blows the rounding of tiny gradients up.
    changes |= {"train.adam_epsilon": 1.0, "train.learning_rate": 2e-3}
    result = launch(config, tmp_path, 2, kind, run_name="two", **changes)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "4 pairs per update = minibatch 2 x processes 2 x accumulation 1" in result.stdout
    # 6 steps of 4 are all 24 rows, with the damaged one.
    assert result.stdout.count("rows left out:     (left out: 1 damaged image)") == 1
    changes = {key.replace(".", "__"): value for key, value in changes.items()}
    one, two = run(config, **changes, train__batch_size=4), tmp_path / "two"
    start = one / "checkpoints" / "step_0000001"  # warm-up begins at 0
    last = [folder / "checkpoints" / "step_0000006" for folder in (one, two)]
    assert distance(*last) < 1e-3 * distance(last[0], start)
    for a, b in zip(read_metrics(one), read_metrics(two), strict=True):
        assert a["step"] == b["step"] and a.get("pairs") == b.get("pairs")
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=1e-4)
    assert read_metrics(one)[0] == read_metrics(two)[0]


@both
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_mixed_precision_keeps_the_weights_in_fp32(config, family, precision):
    run_dir = run(
        config,
        family=family,
        mixed_precision=precision,
        pretrained__model=str(MODELS / f"tiny-{family}"),
        max_train_steps=2,
        eval_steps=0,
        keep_best=False,
    )
    weights = weights_of(run_dir)
    assert {t.dtype for t in weights.values()} == {torch.float32}
    assert all(t.isfinite().all() for t in weights.values())
    state = json.loads((run_dir / "checkpoints/step_0000002/training_state.json").read_text())
    assert bool(state["scaler"]) == (precision == "fp16")
    assert all(line["loss"] > 0 for line in read_metrics(run_dir))


@pytest.mark.parametrize("kind", ["lrm"])
def test_the_model_of_the_best_accuracy_is_exported(config, monkeypatch):
    """Ties keep the earlier; a resumed run keeps what the run before it found."""
    found = iter([0.4, 0.6, 0.7, 0.7, 0.1])
    metrics = pair_metrics.validation_metrics

    def measured(sums):
        value = next(found)
        # The mean over the timesteps counts, not the best of them.
        return metrics(sums) | {"accuracy": {"1": value - 0.1, "951": value + 0.1}}

    monkeypatch.setattr(pair_metrics, "validation_metrics", measured)
    run_dir = run(config, save_steps=1, checkpoint_limit=0)
    lines = read_metrics(run_dir)
    assert [line["best_step"] for line in lines] == [0, 1, 2, 2, 2]
    assert not (run_dir / "best.safetensors").exists()
    steps = {step: run_dir / f"checkpoints/step_000000{step}" for step in (2, 3)}
    found = iter([0.1])
    resumed = run(config, run_name="resumed", resume_from=str(steps[3]))
    assert equal_weights(run_dir, resumed)
    kept, exported = load_file(steps[2] / f"{LRM}.safetensors"), weights_of(run_dir)
    assert torch.equal(kept["visual_projection.weight"], exported["visual_projection"])
    assert torch.equal(kept["unet.conv_in.weight"], exported["unet.conv_in.weight"])
    later = load_file(steps[3] / f"{LRM}.safetensors")
    assert not torch.equal(later["unet.conv_in.weight"], exported["unet.conv_in.weight"])


@both
def test_relabelling_with_pickscore(config):
    run_dir = run(config, labels__source="pickscore", labels__margin=0.0, max_train_steps=2)
    lines = read_metrics(run_dir)
    # The data has ties, PickScore has none.
    assert all(line["ties"] == 0 < line["pairs"] for line in lines[1:])
    assert lines[0]["validation_ties"] == 0 and lines[0]["validation_pairs"] == 6


def test_ties_alone_can_be_trained_on(config, tmp_path):
    rows = [make_row(i, label_0=0.5, label_1=0.5) for i in range(6)]
    config.data.source = str(write_splits(tmp_path / "d", rows, rows))
    lines = read_metrics(run(config, max_train_steps=2))
    assert all(line["ties"] == line["pairs"] > 0 for line in lines[1:])
    assert all(0 <= line["loss"] < 10 for line in lines[1:])
    assert lines[-1]["training_accuracy"] is None
    assert lines[0]["validation_ties"] == 6 and lines[0]["accuracy"]["501"] is None


@both
def test_warm_start_begins_where_the_given_model_is(config, whole, kind):
    model = whole / (SPM if kind == "spm" else LRM)
    changes = {"preference__init_from": str(model), "train__learning_rate": 1e-12}
    warm = run(config, run_name="warm", **changes)
    assert distance(whole, warm) < 1e-6
    measured = {line["step"]: line.get("accuracy") for line in read_metrics(whole)}
    step = read_metrics(whole)[-1].get("best_step", 4)
    assert read_metrics(warm)[0]["accuracy"] == measured[step]


def test_training_learns_what_the_labels_say(config, monkeypatch):
    """The base model, whose weights are random here, is replaced by a perfect one."""
    monkeypatch.setattr(SPMPreparation, "predicted_images", lambda self, images, *others: images)
    run_dir = run(
        config,
        max_train_steps=40,
        save_steps=40,
        eval_steps=40,
        train__batch_size=12,
        train__global_batch_size=12,
        train__learning_rate=2e-3,
        train__warmup_steps=5,
        log_steps=10,
    )
    lines = read_metrics(run_dir)
    assert lines[-1]["training_accuracy"] > 0.9
    assert lines[-1]["loss"] < 0.6 * lines[1]["loss"]


@both
def test_a_loss_that_is_not_finite_stops_the_run(config, monkeypatch):
    own = pair_learner.pair_losses

    def broken(scores, labels):
        losses = own(scores, labels)
        return torch.where(torch.arange(len(losses)) == 1, torch.nan, losses)

    monkeypatch.setattr(pair_learner, "pair_losses", broken)
    with pytest.raises(RunError, match="gradient is not finite at step 1; the last"):
        run(config)
    checkpoints = Path(config.logdir) / "run" / "checkpoints"
    assert not checkpoints.exists()


@pytest.mark.parametrize(
    ("owner", "method", "keys"),
    [
        (SPMPreparation, "training_pairs", "prediction .*: lower train.predict_batch_size;"),
        (pair_learner.PreferenceLearner, "backward", "a minibatch .*: lower train.batch_size, or"),
        (SPMPreparation, "validation_images", "validation .*: lower train.predict_batch_size or"),
    ],
)
def test_full_memory_is_one_line_that_names_the_key(config, monkeypatch, owner, method, keys):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    monkeypatch.setattr(owner, method, full)
    with pytest.raises(RunError, match=keys):
        run(config, eval_steps=1)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("name", [SPM, "optimizer.safetensors", "training_state.json"])
def test_a_pickle_in_a_checkpoint_executes_nothing(config, whole, tmp_path, name):
    shutil.copytree(whole, tmp_path / "run")
    newest = checkpoints(tmp_path / "run")[-1]
    torch.save(Malicious(), newest / name)
    (newest / "manifest.json").unlink()
    _seal(newest)
    with pytest.raises(UserError, match="is not a checkpoint of this config"):
        run(config, resume_from="auto")
    assert not (ROOT / "executed").exists()


def test_many_skipped_updates_in_a_row_stop_a_run(config, monkeypatch):
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**120)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    changes = {"mixed_precision": "fp16", "train__max_skipped_updates": 3, "eval_steps": 0}
    for _ in range(2):  # from the start, then from the checkpoint
        with pytest.raises(RunError, match="gradients of 3 updates in a row overflowed"):
            run(config, **changes)
        (checkpoint,) = checkpoints(Path(config.logdir) / "run")
        assert read_state(checkpoint)["skipped_in_a_row"] == 2
        config.resume_from = "auto"


def test_an_update_without_a_sound_pair_does_no_harm(config, tmp_path):
    rows = [make_row(i, jpg_0=b"broken") for i in range(7)] + [make_row(7)]
    config.data.source = str(write_splits(tmp_path / "d", rows, rows))
    changes = {"max_train_steps": 8, "save_steps": 8, "eval_steps": 0, "log_steps": 1}
    lines = read_metrics(run(config, train__global_batch_size=1, **changes))
    assert [line["pairs"] for line in lines].count(1) == 1
    assert sum(line["left_out"]["damaged image"] for line in lines) == 7
    for name in ("grad_norm", "loss"):
        assert sum(line[name] > 0 for line in lines) == 1


CASES = {
    "no such source": ({"data.source": "no/such/data"}, "data.source: no folder"),
    "no such split": ({"data.train_split": "test"}, "data.source: .* split 'test'"),
    "warm-up": ({"train.warmup_steps": 4}, "train.warmup_steps: 4 must be below max_train_steps"),
    "labels": ({"labels.source": "people"}, "labels.source: 'people' is none of data, pickscore"),
    "labels' CLIP": (
        {"labels.source": "pickscore", "labels.backbone": "./no"},
        "labels.backbone: './no' is neither",
    ),
    "processor": ({"preference.processor": "assets"}, "preference.processor: no file"),
    "init_from": ({"preference.init_from": "no.bin"}, "preference.init_from: no file 'no.bin'"),
    "steps": ({"max_train_steps": 0}, "max_train_steps: 0 must be a whole number from 1"),
    "margin": ({"labels.margin": 1.0}, "labels.margin: 1.0 must be from 0 to below 1"),
    "rate": ({"train.learning_rate": 0.0}, "train.learning_rate: 0.0 must be above 0"),
    "decay": ({"train.adam_weight_decay": -1.0}, "train.adam_weight_decay: -1.0 must be 0 or more"),
    "precision": ({"mixed_precision": "fp8"}, "mixed_precision: 'fp8' is none of"),
    "tracker": ({"tracker.name": "paper"}, "tracker.name: 'paper' is none of"),
    "family": ({"family": "sdxl"}, "family='sdxl' needs a StableDiffusionXLPipe"),
    "resume": ({"resume_from": "nowhere"}, "resume_from: nowhere is not a checkpoint"),
    "processes": (
        {"num_processes": 3},
        "train.global_batch_size = 4 .* process counts that work: 1, 2, 4; without the constraint: "
        "--config.train.global_batch_size=None",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_told_before_any_model_loads(config, name):
    changes, message = CASES[name]
    processes = changes.get("num_processes", 1)
    config.update_from_flattened_dict({k: v for k, v in changes.items() if k != "num_processes"})
    with pytest.raises(UserError, match=message):
        check_training(config, processes)
    assert not (Path(config.logdir) / "run").exists()


@pytest.mark.parametrize(
    "rows", [[make_row(0, label_0=None), make_row(1, jpg_0=b"broken")], [make_row(0, caption="")]]
)
@pytest.mark.parametrize("streaming", [False, True])
def test_data_without_a_usable_row_is_an_error(config, tmp_path, rows, streaming):
    config.data.source = str(write_splits(tmp_path / "d", rows, [make_row(0)]))
    config.data.streaming = streaming
    with pytest.raises(UserError, match=r"split 'train', has no usable row \(left out: 1 "):
        check_training(config, 1)


def test_the_launcher_checks_by_the_scripts_own_config():
    arguments = ["--config=config/spm_tiny.py", "--config.labels.margin=2"]
    path = "scripts/train_preference_model.py"
    script = SCRIPTS[Path(path).name]
    config = load_script_config(path, script, arguments)
    plan = "32 pairs per update = minibatch 16 x processes 2 x accumulation 1"
    assert script.plan(config, 2).describe() == plan
    with pytest.raises(UserError, match="^labels.margin: 2.0 must be from 0 to below 1.$"):
        check_training(config, 2)


@pytest.mark.parametrize("streaming", [False, True])
def test_prefetch_loads_everything_and_tells_of_the_rows(config, streaming):
    config.update_from_flattened_dict({"data.streaming": streaming, "labels.source": "pickscore"})
    out = "\n".join(prefetch(config))
    for line in ("preference model: ", "labels: ", "base model: "):
        assert line in out
    assert ("24 of 24 rows usable" in out) == ("6 of 6 rows usable" in out) == (not streaming)
    assert ("The rows are not kept" in out) == streaming
    config.preference.init_from = "no.bin"
    with pytest.raises(UserError, match="preference.init_from: no file"):
        list(prefetch(config))


@pytest.mark.parametrize(
    ("script", "file", "base"),
    [
        ("scripts/train_preference_model.py", "config/sd15.py", "config/spm_base.py"),
        ("train_sd15.py", "config/spm_sd15.py", "config/base.py"),
    ],
)
def test_a_config_of_the_other_script_is_refused(script, file, base):
    command = [sys.executable, script, f"--config={file}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: {file}: unknown key ") and base in result.stderr
