"""A run that was stopped goes on as if it had not been; what would make nonsense is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import make_pairs
from safetensors.torch import load_file, save_file

from spo.errors import Stopped, UserError
from spo.method import rollout
from spo.method.checkpoint import load_share, rollout_of
from spo.method.metrics import Metrics
from spo.method.pairs import best_worst
from spo.method.position import RolloutInProgress
from spo.method.preflight import preflight, refusal
from spo.run import validation
from spo.run.checkpoint_folder import _seal, checkpoints, find_fault, link_best, read_state
from tests import small_runs
from tests.small_runs import (
    LORA,
    ROOT,
    differences,
    read_metrics,
    run,
    run_in_processes,
    small_config,
)


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


HANDLERS = handlers()  # a shell ignores SIGINT for what it runs in the background


@pytest.fixture(scope="module", autouse=True)
def surroundings():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed; not to be changed."""
    return run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped between two minibatches of its third rollout; not to be changed."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_before(patch, 10)
        with pytest.raises(Stopped) as caught:
            run(folder)
    folder.with_suffix(".message").write_text(str(caught.value))
    return folder


def stop_before(patch, minibatch, number=signal.SIGTERM):
    patch.setattr(small_runs, "minibatches", 0)
    patch.setenv("SIGNAL_AT", str(minibatch))
    patch.setenv("SIGNAL", str(int(number)))


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / folder.name)


def test_a_signal_between_minibatches_loses_nothing(whole, stopped, tmp_path):
    names = [folder.name for folder in checkpoints(stopped)]
    # 8 minibatches in the first epoch, 2 in the second, the last of them after the signal.
    assert names == ["epoch_0001", "epoch_0001_rollout_000002_pair_000002"]
    message = stopped.with_suffix(".message").read_text()
    assert names[-1] in message and "--config.run_name=run --config.resume_from=auto" in message
    assert handlers() == HANDLERS
    resumed = run(copy_of(stopped, tmp_path))
    assert differences(whole, resumed) == []
    assert len((resumed / "starts.jsonl").read_text().splitlines()) == 2
    # The second epoch's line counts its minibatches before and after the signal.
    assert [line["minibatches"] for line in read_metrics(resumed)] == [4, 4, 4, 4]


@pytest.mark.parametrize("judge", [None, *small_runs.JUDGED])
def test_a_signal_in_a_rollout_draws_it_again(request, tmp_path, monkeypatch, judge):
    changes = small_runs.JUDGED.get(judge, {})
    whole = run(tmp_path / "whole", **changes) if changes else request.getfixturevalue("whole")
    own, drawn = rollout._Walk.draw, []

    def signalled(*arguments):
        drawn.append(arguments)
        if len(drawn) == 5 + 4:  # of five draws of each rollout: the second one's first candidates
            os.kill(os.getpid(), signal.SIGINT)
        return own(*arguments)

    monkeypatch.setattr(rollout._Walk, "draw", signalled)
    folder = tmp_path / "run"
    with pytest.raises(Stopped, match="epoch_0000_rollout_000001:"):
        run(folder, **changes)
    assert differences(whole, run(folder, **changes)) == []
    assert len(read_metrics(whole)) == 4 and read_metrics(whole)[-1]["updates"] > 0
    assert (whole / "ema").exists() == (not (judge or "").startswith("lpo"))


def test_a_signal_between_validation_images(whole, tmp_path, monkeypatch):
    own, calls = validation.sample_images, []

    def signalled(*arguments):
        calls.append(arguments)
        if len(calls) == 3:  # the first image after the first epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return own(*arguments)

    monkeypatch.setattr(validation, "sample_images", signalled)
    folder = tmp_path / "run"
    with pytest.raises(Stopped, match="epoch_0001:"):
        run(folder)
    assert not (folder / "validation" / "epoch_0001_policy.png").exists()
    assert differences(whole, run(folder)) == []


def test_checkpoints_between_rollouts_and_their_limit(whole, tmp_path):
    folder = run(tmp_path / "run", save_every_rollouts=1, checkpoint_limit=3)
    names = [folder.name for folder in checkpoints(folder)]
    assert names == ["epoch_0001", "epoch_0001_rollout_000003", "epoch_0002"]
    assert [p.name for p in (folder / "checkpoints").iterdir() if p.suffix] == []
    assert differences(whole, folder) == []


def test_names_sort_by_progress(tmp_path):
    names = ["epoch_0003", "epoch_0003_rollout_000012", "epoch_0003_rollout_000012_pair_000040"]
    names += ["epoch_0003_rollout_000013", "epoch_0004", "epoch_10000"]
    for name in [*reversed(names), "epoch_0009.damaged", "epoch_0005.partial"]:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [folder.name for folder in checkpoints(tmp_path)] == names


def truncate(folder):
    os.truncate(folder / "optimizer.safetensors", 1000)


def flip(folder):
    path = folder / "ema" / LORA
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def lose(folder):
    (folder / "process_0000.safetensors").unlink()


def tear_manifest(folder):
    os.truncate(folder / "manifest.json", 20)


DAMAGES = {
    truncate: r"optimizer.safetensors has 1,000 of [\d,]+ bytes",
    flip: f"ema/{LORA} has another checksum",
    lose: "process_0000.safetensors is missing",
    tear_manifest: "manifest.json cannot be used",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(whole, stopped, tmp_path, damage):
    folder = copy_of(stopped, tmp_path)
    first, newest = checkpoints(folder)
    damage(newest)
    ready = preflight(small_config(folder), 1)
    assert ready.resume.checkpoint == first
    damaged, resumed = ready.resume.describe()
    pytest.raises(UserError, preflight, small_config(folder, resume_from=str(newest)), 1).match(
        DAMAGES[damage]
    )
    assert str(newest) in damaged and str(first) in resumed
    damage(first)
    with pytest.raises(UserError, match=f"no checkpoint of .* is whole .*{DAMAGES[damage]}"):
        preflight(small_config(folder), 1)


def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one(whole, stopped, tmp_path, capsys):
    folder = copy_of(stopped, tmp_path)
    truncate(checkpoints(folder)[-1])
    # The damaged one would be the only one left, if it counted.
    assert differences(whole, run(folder, checkpoint_limit=1)) == []
    assert "_pair_000002 is damaged (optimizer.safetensors has" in capsys.readouterr().out
    (left,) = checkpoints(folder)
    assert left.name == "epoch_0002" and find_fault(left) is None


def another_rule(scores, generator):
    return best_worst(scores, generator)


REFUSED = {
    "algorithm": "gradspo",
    "lora.rank": 8,
    "lora.alpha": 2,
    "lora.target_modules": ("to_q",),
    "lora.init_from": "checkpoints/epoch_0001",
    "seed": 7,
    "mixed_precision": "bf16",
    "sample.num_steps": 5,
    "sample.guidance_scale": 2.0,
    "sample.eta": 0.5,
    "sample.timesteps": "trailing",
    "sample.pairing": f"{__name__}:another_rule",
    "sample.num_candidates": 3,
    "sample.branch_from": 1,
    "sample.final_step": "extend",
    "sample.final_score_timestep": "t",
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_makes_nonsense_is_refused(stopped, key):
    changes = {key: REFUSED[key]}
    if key == "lora.init_from":
        changes = {key: str(stopped / REFUSED[key]), "lora.reference": "init"}
    with pytest.raises(UserError, match=f"^{key}: .*, but the checkpoint was trained with "):
        preflight(small_config(stopped, **changes), 1)


def test_a_rollout_in_progress_keeps_every_key_of_sample_but_a_few(whole, stopped):
    inside, between = (
        refusal(read_state(checkpoints(folder)[-1]), preflight(small_config(folder), 1).recipe)
        for folder in (stopped, whole)
    )
    keys = {f"sample.{name}" for name in small_config(stopped).sample} | {"sample.invented"}
    assert {key for key in keys if inside(key) is None} == {
        "sample.batch_size",
        "sample.global_batch_size",
        "sample.decode_batch_size",
        "sample.decoder",
        "sample.score_batch_size",
        *(f"sample.threshold{name}" for name in ("", "_schedule", "_min", "_max")),
        "sample.keep_all_final",
    }
    assert all(between(key) is None for key in keys)
    assert "a rollout is in progress" in inside("sample.invented")
    assert inside("train.invented") is None


def test_prompts_may_move_but_not_change_inside_an_epoch(stopped, tmp_path):
    lines = (ROOT / "assets" / "prompts" / "tiny.txt").read_text()
    moved = tmp_path / "moved.txt"
    moved.write_text(lines)
    (line,) = preflight(small_config(stopped, prompts__source=str(moved)), 1).notes
    assert line.startswith("resume: prompts.source was 'assets/prompts/tiny.txt', and is '/")
    moved.write_text("another\n" + lines)
    with pytest.raises(UserError, match="^prompts.source: not the prompts of epoch 2 "):
        preflight(small_config(stopped, prompts__source=str(moved)), 1)


def test_between_epochs_other_things_may_change_and_are_listed(whole, tmp_path):
    before = str(checkpoints(whole)[0])
    changes = {"seed": 7, "sample__num_steps": 5, "train__learning_rate": 2e-3}
    config = small_config(tmp_path / "branch", resume_from=before, **changes)
    assert [line.split(" was ")[0] for line in preflight(config, 1).notes] == [
        "resume: logdir",
        "resume: run_name",
        "resume: sample.num_steps",
        "resume: seed",
        "resume: train.learning_rate",
    ]


def test_the_best_checkpoint_goes_on_under_another_name(whole, tmp_path):
    folder = copy_of(whole, tmp_path)
    first = checkpoints(folder)[0]
    link_best(folder, first)
    chosen = {"resume_from": str(folder / "best")}
    ready = preflight(small_config(tmp_path / "branch", **chosen), 1)
    assert ready.resume.checkpoint == first  # and not what best/ links to later
    with pytest.raises(UserError, match="already went on from another point"):
        preflight(small_config(folder, **chosen), 1)
    preflight(small_config(tmp_path / "from", lora__init_from=chosen["resume_from"]), 1)


def test_other_processes_and_versions_are_told(stopped, tmp_path):
    folder = copy_of(stopped, tmp_path)
    newest = checkpoints(folder)[-1]
    state = json.loads((newest / "training_state.json").read_text())
    state["versions"]["torch"] = "1.0"
    (newest / "training_state.json").write_text(json.dumps(state))
    reseal(newest)
    lines = preflight(small_config(folder), 2).notes
    assert [line[:44] for line in lines] == [
        "resume: logdir was " + repr(str(stopped.parent))[:25],
        "resume: 1 processes before, 2 from here on: ",
        "resume: other versions than before: torch 1.",
    ]


def reseal(folder):
    """Make the manifest agree with files that a test has changed."""
    (folder / "manifest.json").unlink()
    _seal(folder)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "name",
    [
        *(LORA, f"ema/{LORA}", "optimizer.safetensors", "process_0000.safetensors"),
        *("training_state.json", "manifest.json"),
    ],
)
@pytest.mark.parametrize("sealed", [False, True])
def test_a_pickle_executes_nothing(stopped, tmp_path, monkeypatch, name, sealed):
    folder = copy_of(stopped, tmp_path)
    newest = checkpoints(folder)[-1]
    torch.save(Malicious(), newest / name)
    if sealed and name != "manifest.json":
        reseal(newest)
        with pytest.raises(UserError, match="is not a checkpoint of this config"):
            run(folder)
    else:
        assert preflight(small_config(folder), 1).resume.damaged
    assert not (ROOT / "executed").exists()


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(tmp_path):
    """Only one of them gets the signal; half an update is accumulated, differently on each."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert run_in_processes(whole, 2) == [0, 0]
    signalled = {1: {"SIGNAL": str(int(signal.SIGTERM)), "SIGNAL_AT": "5"}}
    # 8 pairs of one rollout an epoch: 4 minibatches on each process.
    assert run_in_processes(folder, 2, signalled) == [75, 75]
    newest = checkpoints(folder)[-1]
    assert newest.name == "epoch_0001_rollout_000001_pair_000002"
    alone = shutil.copytree(folder, tmp_path / "alone")
    assert run_in_processes(folder, 2) == [0, 0]
    assert differences(whole, folder) == []

    # The other 6 pairs are dealt to one process.
    assert run_in_processes(alone, 1) == [0]
    assert "resume: 2 processes before, 1 from here on" in alone.with_suffix(".log").read_text()
    lines = read_metrics(alone)
    assert [line["rollout"] for line in lines] == [1, 2]
    assert [line["pairs"] for line in lines] == [8, 8]
    assert [line["minibatches"] for line in lines] == [4, 1 + 6]


def test_one_process_goes_on_as_two(stopped, tmp_path):
    folder = copy_of(stopped, tmp_path)
    assert run_in_processes(folder, 2) == [0, 0]
    line = read_metrics(folder)[2]
    # Two minibatches of one process, then the last two pairs on two; then one rollout of the rest.
    assert line["minibatches"] == 2 + 1 and line["pairs_left_over"] == 0
    assert [line["epoch"] for line in read_metrics(folder)] == [1, 1, 2, 2]
    assert read_metrics(folder)[3]["comparisons"] == 4


def test_two_processes_end_together_where_a_checkpoint_cannot_be_written(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoints").write_text("in the way")
    assert run_in_processes(folder, 2, eval_interval=0) == [1, 1]
    told = re.findall(
        "error: cannot write .*/epoch_0001: File", folder.with_suffix(".log").read_text()
    )
    assert len(told) == 2


def write_shares(folder, count, each):
    """One file per process, with the pairs as `Workers.deal` deals them out: place p to p % count."""
    files = []
    for rank in range(count):
        places = torch.arange(each) * count + rank
        values = places.float().reshape(-1, 1, 1, 1, 1)
        pairs = make_pairs(values, values.clone(), values.clone(), places.tolist())
        pairs = replace(pairs, sampler_epsilon=values.clone())
        metrics = Metrics(torch.device("cpu"))
        metrics.total("images", 10 + rank)
        rollout = RolloutInProgress(pairs, metrics, prompts=4, left_over=0, seconds_rollout=1.0)
        gradients = {"gradient:w": torch.full((2,), float(rank))}
        files.append(folder / f"{rank}.safetensors")
        tensors = {name: t.contiguous() for name, t in rollout.tensors().items()}
        save_file(tensors | gradients, files[-1])
    return files


@pytest.mark.parametrize(("then", "now", "each"), [(2, 1, 3), (1, 2, 5), (2, 3, 4), (3, 2, 1)])
def test_what_is_left_is_dealt_out_anew_in_its_order(tmp_path, then, now, each):
    files = write_shares(tmp_path, then, each)
    total = then * each
    for rank in range(now):
        share, left = load_share(files, rank, now)
        assert left == total % now
        places = list(range(rank, total - left, now))
        numbers = {"prompts": 4, "used": 6, "left_over": 0, "seconds_rollout": 1.0}
        rollout = rollout_of(share, numbers, torch.device("cpu"))
        assert rollout.pairs.timesteps.tolist() == places
        assert rollout.pairs.latents.flatten().tolist() == places
        assert rollout.pairs.sampler_epsilon.flatten().tolist() == places
        assert len(rollout.pairs.conditioning) == len(places)
        assert rollout.pairs.conditioning.negative_prompt_embeds.shape == (1, 1, 1)
        mean = (then - 1) / 2
        assert share["gradient:w"].tolist() == [mean, mean]
        # Sums are sums over processes: the first takes them all.
        images = sum(10 + source for source in range(then)) if rank == 0 else 0
        assert rollout.metrics.sums["total:images"].item() == images


def test_the_same_processes_go_on_with_their_own(tmp_path):
    files = write_shares(tmp_path, 2, 3)
    share, left = load_share(files, 1, 2)
    assert left == 0 and share["gradient:w"].tolist() == [1.0, 1.0]
    assert share["pairs.timesteps"].tolist() == [1, 3, 5]
    assert share["metrics.total:images"].item() == 11


def change_process_file(folder, change):
    """Lets `change` alter the tensors of the newest checkpoint's only process."""
    newest = checkpoints(folder)[-1]
    tensors = load_file(newest / "process_0000.safetensors")
    change(tensors)
    save_file(tensors, newest / "process_0000.safetensors")
    reseal(newest)


def test_metrics_that_a_checkpoint_lacks_or_has_in_addition(whole, stopped, tmp_path):
    folder = copy_of(stopped, tmp_path)

    def change(tensors):
        for name in [name for name in tensors if ":win_ratio" in name or ":kl_at/" in name]:
            del tensors[name]
        tensors["metrics.total:of_before"] = torch.tensor(5.0, dtype=torch.float64)
        tensors["metrics.sum:old_mean"] = torch.tensor(6.0, dtype=torch.float64)
        tensors["metrics.count:old_mean"] = torch.tensor(4.0, dtype=torch.float64)

    change_process_file(folder, change)
    assert differences(whole, run(folder)) == ["metrics.jsonl"]
    expected, found = read_metrics(whole)[2], read_metrics(folder)[2]
    assert found.pop("of_before") == 5 and found.pop("old_mean") == 1.5
    # Only of the minibatches since.
    assert found.pop("win_ratio") != expected.pop("win_ratio")
    of_all, since = expected.pop("kl_at"), found.pop("kl_at")
    assert of_all.keys() >= since.keys() and of_all != since and since
    assert found == expected
    assert read_metrics(folder)[3] == read_metrics(whole)[3]


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("metrics.total:images"),
        lambda tensors: tensors.pop("metrics.count:loss"),
        lambda tensors: tensors.pop("metrics.sum:loss"),
        lambda tensors: tensors.update({"metrics.loss": torch.tensor(1.0)}),
        lambda tensors: tensors.update({"metrics.mean:loss": torch.tensor(1.0)}),
        lambda tensors: tensors.update({"metrics.total:pairs": torch.ones(2)}),
        lambda tensors: tensors.update({"metrics.total:pairs/1": torch.tensor(1.0)}),
        lambda tensors: tensors.pop("pairs.noises"),
        lambda tensors: tensors.update({"pairs.other": torch.ones(2)}),
    ],
)
def test_metrics_that_cannot_be_summed_up_are_refused_at_the_start(stopped, tmp_path, change):
    folder = copy_of(stopped, tmp_path)
    change_process_file(folder, change)
    with pytest.raises(UserError, match="^resume_from: .* is not a checkpoint of this c") as error:
        preflight(small_config(folder), 1)
    assert "\n" not in str(error.value)


EDITED = {
    "plan.accumulation_steps": (0, -1, 1.5, "3", None, True),
    "plan.num_processes": (0, 2, 10**9, 10**400),
    "position.prompts": (4, 5, -1, 10**12, "0", 0.5),
    "position.epochs": (-1, None, [1], True),
    "position.rollouts_in_epoch": (-3,),
    "position.other": (1,),
    "position": ([], 5, None),
    "rollout": ([1], "x", {"prompts": 2}),
    "rollout.prompts": (0, -2, 5, 1e300),
    "rollout.used": (-1, "2"),
    "rollout.seconds_rollout": (0.0, -1.0, float("nan"), float("inf"), "1"),
    "rollout.left_over": (None, -1),
    "accumulated": (-1, 3, 99, "1", 1.5),
    "updates": (-1, 2.5, "4"),
    "skipped_in_a_row": (-1, None),
    "scaler": ([1], {"scale": "x"}, {"scale": -1.0}, {"scale": float("inf")}),
    "plan": (None, [], {}),
    "config": ([1], 5),
    "versions": (None, [], 5),
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in EDITED.items() for value in values]
)
def test_a_checkpoint_that_was_edited_is_refused_at_the_start(stopped, tmp_path, key, value):
    folder = copy_of(stopped, tmp_path)
    newest = checkpoints(folder)[-1]
    state = read_state(newest)
    *sections, name = key.split(".")
    section = state[sections[0]] if sections else state
    section[name] = value
    (newest / "training_state.json").write_text(json.dumps(state))
    reseal(newest)
    with pytest.raises(UserError, match="^resume_from: .* is not a checkpoint of this c") as error:
        preflight(small_config(folder), 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/dev/zero", "/etc/hostname", "../epoch_0001/manifest.json", "."])
def test_a_manifest_names_only_files_of_its_folder(stopped, tmp_path, name):
    folder = copy_of(stopped, tmp_path)
    newest = checkpoints(folder)[-1]
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest = {name: {"size": 0, "sha256": ""}} | manifest
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert find_fault(newest) == f"{name} is missing"
    (newest / "training_state.json").unlink()
    (newest / "training_state.json").symlink_to("/dev/zero")
    (newest / "manifest.json").write_text(json.dumps({"training_state.json": {"size": 0}}))
    assert find_fault(newest) == "training_state.json is missing"


def test_a_logdir_that_is_no_utf8_is_refused_at_the_start(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff") / "run"
    with pytest.raises(UserError, match="^logdir: .*udcff.* cannot be a path") as error:
        preflight(small_config(folder), 1)
    assert str(error.value).isprintable()


def test_a_rollout_in_progress_of_an_older_format_is_refused(stopped, tmp_path):
    folder = copy_of(stopped, tmp_path)

    def change(tensors):
        for name in [name for name in tensors if name.startswith("metrics.")]:
            del tensors[name]
        tensors["steps"] = torch.zeros(3, 2)

    change_process_file(folder, change)
    newest = checkpoints(folder)[-1]
    state = read_state(newest)
    names = ("prompts", "used", "left_over", "seconds_rollout", "seconds_train")
    state["rollout"] = {"sums": {"images": 8.0}} | {name: state["rollout"][name] for name in names}
    (newest / "training_state.json").write_text(json.dumps(state))
    reseal(newest)
    with pytest.raises(UserError, match="^resume_from: .* is not a checkpoint of this c") as error:
        run(folder)
    assert "\n" not in str(error.value) and str(newest) in str(error.value)


@pytest.mark.slow
def test_kills_at_random_moments():
    """The short form of tests/kill_test.py."""
    command = [sys.executable, "-m", "tests.kill_test", "--kills=4", "--seed=3"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    assert re.search(r"^4 kills, \d+ runs, 0 of them different", result.stdout, re.M)
