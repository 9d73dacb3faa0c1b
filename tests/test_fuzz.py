"""Random settings and prompt files: a start that works or one line and status 2, no traceback.

SPO_FUZZ=3000 tries so many cases of each kind; the seed is fixed.
"""

import contextlib
import functools
import io
import json
import os
from collections import Counter
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spo.command_line.config_files import BASE, EVAL_BASE, SPM_BASE, leaves, load_config
from spo.command_line.flags import define_config, exit_on_user_error, parse_flags
from spo.data.prompts import read_prompts
from spo.evaluation.evaluator import plan_evaluation
from spo.method.preflight import preflight
from spo.method.start import train
from spo.preference.pair_recipe import check_training
from spo.scorers import clip

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
    "train": ("tests/data/random_models.py", BASE, preflight),
    "spm": ("config/spm_tiny.py", SPM_BASE, check_training),
    "lrm": ("config/lrm_tiny.py", SPM_BASE, check_training),
    "eval": ("config/eval_tiny.py", EVAL_BASE, plan_evaluation),
}
NUMBERS = [
    *("0", "1", "2", "3", "7", "20", "1000", "1001", "-1", "0.5", "1.0", "1e-3", "-0.0", "nan"),
    *("inf", "-inf", "1e400", "0x10", "1_000", "٣"),
]
ODD = [
    *(" ", "", "None", "true", "()", "('to_q',)", "(1, None)", "[]", "{}", "{'a': 1}", "{'.': 1}"),
    *("~", "~nobody-there/x", ".", "./no", "..", "a.txt", "b.json", "file/below", "x" * 300),
    *("a/" * 3000, "\0", "a\nb", "\udcff", "🦊", "قطة", "-", "a=b", "=", "hf://", "hf://a/b/c"),
    *(
        "user/name",
        "user/name:2",
        "a+b",
        "a:-.",
        ":",
        ".:x",
        "spo.method.losses:no",
        "os:path",
        "9" * 400,
    ),
    *("spo", "gradspo", "sdxl", "sd15", "fp16", "bf16", "no", "auto", "extend", "pickscore"),
    *("last", "ema", "init", "t", "window", "wandb", "tensorboard", "none", "{split}", "base"),
]
TEXT = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(ODD), st.text(max_size=20))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def fuzz(examples):
    return settings(
        max_examples=int(os.environ.get("SPO_FUZZ", examples)),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def outcome(start):
    """Whether `start` works, or ends as a script does that was given bad input."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), exit_on_user_error():
            start()
    except SystemExit as end:
        last = errors.getvalue().rstrip("\n").split("\n")[-1]
        assert end.code == 2 and last.startswith("error: ") and len(last) > len("error: x")
        assert last.isprintable() and len(last) < 2000, last
        return "refused"
    return "valid"


@pytest.fixture
def tell(capsys, request):
    """Prints how many cases were tried."""
    counts = Counter()
    yield counts
    with capsys.disabled():
        found = ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))
        print(f"\n{request.node.name}: {sum(counts.values())} cases ({found})")


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """A config file of each kind, in a folder with some files, out of reach of the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_ASSETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(clip, "CLIPInputs", functools.cache(clip.CLIPInputs))
    (tmp_path / "a.txt").write_text("a fox\na bear\n")
    (tmp_path / "b.json").write_text('["a fox"]')
    (tmp_path / "file").write_text("")
    found = {}
    for kind, (file, base, _) in KINDS.items():
        config = load_config(str(ROOT / file), base)
        if kind == "eval":  # without module:name, which no .json file may say alone
            config.scorers = ("pickscore", "step_aware_clip")
        values = config.to_json()
        for folder in ("assets", "tests"):
            values = values.replace(f'"{folder}/', f'"{ROOT}/{folder}/')
        found[kind] = tmp_path / f"{kind}.config.json"
        found[kind].write_text(values)
    return found


def start(kind, file, arguments, processes):
    """What a script does before it loads a model."""
    base, check = KINDS[kind][1:]
    before = set(flags.FLAGS)
    try:
        holder = define_config("config/sd15.py", base)
        parse_flags(["script", f"--config={file}", *arguments])
        check(holder.value, processes)
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)


LEAVES = {kind: leaves(load_config(str(ROOT / f), b)) for kind, (f, b, _) in KINDS.items()}


def override(kind):
    """A key, mostly one that there is, and a value, often of its type."""

    def with_value(key):
        value = LEAVES[kind].get(key)
        number = st.sampled_from(NUMBERS)
        fitting = number if isinstance(value, int | float) else st.sampled_from(ODD)
        return st.tuples(st.just(key), fitting | fitting | TEXT)

    return st.sampled_from([*LEAVES[kind], "train.lr"]).flatmap(with_value)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_on_the_command_line(configs, tell, kind):
    @fuzz(120)
    @given(st.lists(override(kind), min_size=1, max_size=2), st.sampled_from([1, 1, 1, 2, 8]))
    def case(overrides, processes):
        arguments = [f"--config.{key}={value}" for key, value in overrides]
        tell[outcome(lambda: start(kind, configs[kind], arguments, processes))] += 1

    case()
    assert tell["valid"] > 5 and tell["refused"] > 50


@pytest.mark.parametrize("kind", KINDS)
def test_settings_in_a_file(configs, tell, kind, tmp_path):
    def changed(change):
        values = json.loads(configs[kind].read_text())
        for key, value in change.items():
            section = values
            *sections, name = key.split(".")
            for part in sections:
                section = section[part] if isinstance(section.get(part), dict) else {}
            section[name] = value
        return json.dumps(values)

    plain = st.sampled_from([0, 1, 2, 0.5, 20.0, True, None, "no", "base", "sd15"])
    keys = st.sampled_from(list(LEAVES[kind]))
    change = st.dictionaries(keys | keys | TEXT, plain | JSON, min_size=1, max_size=2)
    contents = st.one_of(change.map(changed), change.map(changed), JSON.map(json.dumps), TEXT)

    @fuzz(80)
    @given(contents)
    def case(content):
        file = tmp_path / "changed.json"
        file.write_bytes(content.encode(errors="surrogateescape"))
        tell[outcome(lambda: start(kind, file, [], 1))] += 1

    case()
    assert tell["valid"] > 0 and tell["refused"] > 40


def test_config_files_that_are_none(configs, tell):
    for path in ODD:
        tell[outcome(lambda path=path: start("train", path, [], 1))] += 1
    assert tell == {"refused": len(ODD)}


def parquet(rows):
    sink = io.BytesIO()
    pq.write_table(pa.table({"caption": rows}), sink)
    return sink.getvalue()


ROWS = st.lists(st.text(max_size=9), max_size=3)
SOUND = st.one_of(
    JSON.map(json.dumps),
    st.lists(JSON.map(json.dumps), max_size=3).map("\n".join),
    ROWS.map(lambda rows: json.dumps([{"caption": row} for row in rows])),
    ROWS.map(lambda rows: "\n".join(["caption", *rows])),
    st.integers(1, 10**5).map(lambda depth: "[" * depth),
    st.just("caption\n" + "x" * 200_000),
)
SOUND = SOUND.map(lambda text: text.encode(errors="surrogatepass")) | ROWS.map(parquet)


def damaged(content, place, byte, cut):
    place %= len(content) + 1
    return content[:place] + byte + content[place + cut :]


BYTES = st.one_of(
    SOUND,
    st.builds(damaged, SOUND, st.integers(0), st.binary(max_size=3), st.integers(0, 9)),
    st.binary(max_size=40),
)


def test_prompt_files(tmp_path, tell):
    @fuzz(300)
    @given(st.sampled_from([".json", ".jsonl", ".txt", ".csv", ".parquet", ".bin", ""]), BYTES)
    def case(suffix, content):
        path = tmp_path / f"prompts{suffix}"
        path.write_bytes(content)
        tell[outcome(lambda: read_prompts(str(path)))] += 1

    case()
    assert tell["valid"] > 20 and tell["refused"] > 50


SIZES = {
    "algorithm": st.sampled_from(["gradspo", "spo"]),
    "eval_interval": st.sampled_from([0, 1]),
    "eval.weights": st.sampled_from(["policy", "policy", "ema"]),
    "mixed_precision": st.sampled_from(["no", "bf16"]),
    "sample.num_steps": st.integers(2, 4),
    "sample.branch_from": st.integers(0, 1),
    "sample.num_inner_steps": st.sampled_from([0, 0, 0, 1]),
    "sample.num_candidates": st.integers(2, 3),
    "sample.eta": st.sampled_from([0.1, 1.0]),
    "sample.guidance_scale": st.sampled_from([0.0, 1.0, 5.0]),
    "sample.threshold": st.sampled_from([0.0, 0.05, 1.0]),
    "sample.final_step": st.sampled_from(["branch", "extend"]),
    "sample.final_score_timestep": st.sampled_from(["zero", "t"]),
    "sample.final_direction": st.sampled_from(["window", "last"]),
    "sample.decode_batch_size": st.integers(1, 5),
    "train.batch_size": st.integers(1, 5),
    "train.gradient_accumulation_steps": st.sampled_from([None, 2]),
    "train.max_grad_norm": st.sampled_from([None, 1.0]),
    "train.clip_eps": st.sampled_from([None, 0.1]),
    "train.ema_every": st.sampled_from(["optimizer_step", "window"]),
    "prompts.num": st.integers(1, 2),
}
FEW = {"num_epochs": 1, "eval.num_images": 1, "eval.num_steps": 2, "sample.batch_size": 2}


def test_settings_that_pass_train(tmp_path, monkeypatch, tell):
    monkeypatch.chdir(ROOT)

    @fuzz(9)
    @given(st.fixed_dictionaries(SIZES))
    def case(changes):
        config = load_config("tests/data/random_models.py")
        place = {"logdir": str(tmp_path), "run_name": str(sum(tell.values()))}
        config.update_from_flattened_dict(changes | FEW | place)
        tell[outcome(lambda: train(config))] += 1

    case()
    assert tell["valid"] > 2
