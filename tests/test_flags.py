"""Config files and command lines: what they set, and the one line that a mistake gets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spo.command_line.config_files import load_config, save_config
from spo.command_line.flags import exit_on_user_error
from spo.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
from absl import app
from spo.command_line.flags import define_config, parse_flags

CONFIG = define_config("config/sd15.py")

def main(_):
    print(CONFIG.value.to_json())
    CONFIG.value.seed_ = 1  # locked: this fails

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
"""


def run(folder, script, *arguments):
    """Runs a script from `folder`, where importing torch would end it with status 3."""
    (folder / "torch.py").write_text("import os\nos._exit(3)\n")
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )


def parse(folder, *arguments):
    """The config that a command line gives."""
    (folder / "script.py").write_text(SCRIPT)
    result = run(folder, folder / "script.py", *arguments)
    assert 'Key "seed_" does not exist' in result.stderr
    return json.loads(result.stdout)


def test_overrides_of_every_type(tmp_path):
    config = parse(
        tmp_path,
        "--config.seed=7",
        "--config.train.beta=5",
        "--config.train.clip_eps=None",
        "--config.train.max_grad_norm",
        "None",
        "--config.sample.global_batch_size=None",
        "--config.sample.keep_all_final",
        "--config.lora.alpha=8",
        "--config.pretrained.vae=some/vae",
        "--config.lora.target_modules=('to_q', 'to_k')",
        "--config.preference.kwargs={'size': 3}",
    )
    assert config["seed"] == 7 and config["lora"]["alpha"] == 8
    assert config["train"]["beta"] == 5.0
    assert config["train"]["clip_eps"] is None and config["train"]["max_grad_norm"] is None
    assert config["sample"]["global_batch_size"] is None and config["sample"]["keep_all_final"]
    assert config["train"]["global_batch_size"] == 40  # of config/sd15.py
    assert config["pretrained"]["vae"] == "some/vae"
    assert config["lora"]["target_modules"] == ["to_q", "to_k"]
    assert config["preference"]["kwargs"] == {"size": 3}


def test_the_last_config_file_wins_and_overrides_stay_on_top(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from config import sdxl\n"
        "def get_config():\n"
        "    config = sdxl.get_config()\n"
        "    config.train.max_grad_norm = None\n"
        "    return config\n"
    )
    files = ("--config=config/sd15.py", "--config", "mine.py")
    config = parse(tmp_path, "--config.train.beta=2", *files)
    assert config["family"] == "sdxl" and config["train"]["beta"] == 2.0
    assert config["train"]["max_grad_norm"] is None
    # A file's None leaves the key a number that can be set again.
    config = parse(tmp_path, "--config=mine.py", "--config.train.max_grad_norm=3")
    assert config["train"]["max_grad_norm"] == 3.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.train.betta=5"], "unknown key train.betta; did you mean train.beta?"),
        (["--config.learning_rate=1"], "learning_rate; did you mean train.learning_rate?"),
        (["--config.train={'beta': 1}"], "unknown key train"),
        (["--config.train.beta=big"], "train.beta=big: expected float"),
        (["--config.train.batch_size=1.5"], "train.batch_size=1.5: expected int"),
        (["--config.sample.keep_all_final=maybe"], "keep_all_final=maybe: expected bool"),
        (["--config.preference.kwargs=3"], "preference.kwargs=3"),
        (["--config.seed=None"], "seed cannot be None"),
        (["--config.logdir=None"], "logdir cannot be None"),
        (["--config=missing.py"], "no such .py or .json file: missing.py"),
        (["--config=tests"], "no such .py or .json file: tests"),
        (["--config"], "--config needs a file"),
        (["--config.train.beta"], "train.beta"),
        (["--bogus=1"], "bogus"),
        (["train.beta=5"], "unexpected argument 'train.beta=5'"),
    ],
)
def test_bad_command_lines_are_one_line_before_torch(tmp_path, arguments, message):
    result = run(tmp_path, ROOT / "train_sd15.py", *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


CODE = [
    ("algorithm", "algorithm"),
    ("preference.scorer", "preference.scorer"),
    ("preference.kwargs", "preference.kwargs.hooks.y"),
    ("sample.pairing", "sample.pairing"),
    ("sample.timesteps", "sample.timesteps"),
    ("run_name", "run_name"),  # whatever the key: nobody has to remember a new one
    ("train.loss_kwargs", "train.loss_kwargs.hooks.y"),
]


@pytest.mark.parametrize(("key", "named"), CODE)
def test_a_json_file_alone_names_no_code(tmp_path, key, named):
    (tmp_path / "trap.py").write_text("raise SystemExit('sprung')\n")
    value = {"hooks": ["x", {"y": "trap:make"}]} if named.endswith("hooks.y") else "trap:make"
    section, _, name = key.rpartition(".")
    values = {section: {name: value}} if section else {name: value}
    (tmp_path / "mine.json").write_text(json.dumps(values))
    result = run(tmp_path, ROOT / "train_sd15.py", "--config=mine.json")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "sprung" not in result.stderr
    assert result.stderr.startswith(f"error: {named}: 'trap:make' in mine.json may be code")
    # A link is what its name says: its target does not run as a config in Python either.
    (tmp_path / "link.json").symlink_to(tmp_path / "trap.py")
    result = run(tmp_path, ROOT / "train_sd15.py", "--config=link.json")
    assert "not a JSON file" in result.stderr and "sprung" not in result.stderr


@pytest.mark.parametrize(
    ("said", "algorithm"),
    [
        (["--config.algorithm=trap:make"], "trap:make"),
        (["--config.algorithm", "trap:make"], "trap:make"),
        (["--config.algorithm=spo"], "spo"),  # takes the place of the file's
    ],
)
def test_code_in_a_json_file_counts_where_the_command_line_says_it(tmp_path, said, algorithm):
    (tmp_path / "mine.json").write_text('{"algorithm": "trap:make"}')
    assert parse(tmp_path, "--config=mine.json", *said)["algorithm"] == algorithm


@pytest.mark.parametrize(
    "text", ["hf://user/repo/file.bin", "x=runs/a:0.5", "a b:c", "http://x.y", "12:30", "a:"]
)
def test_other_texts_with_colons_are_no_code(tmp_path, text):
    (tmp_path / "mine.json").write_text(json.dumps({"run_name": text}))
    assert parse(tmp_path, "--config=mine.json")["run_name"] == text


GROUP = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
ADDRESS = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("left", "message"),
    [
        ({"LOCAL_RANK": "3"}, "unknown key train.betta"),
        ({"LOCAL_RANK": "x", "WORLD_SIZE": "4"}, "unknown key train.betta"),
        ({"RANK": "1", "WORLD_SIZE": "2", **ADDRESS}, "unknown key train.betta"),
        (GROUP, "several processes, but without a proper MASTER_ADDR, MASTER_PORT it"),
        ({**GROUP, **ADDRESS, "RANK": "one"}, "but without a proper RANK it"),
        ({**GROUP, **ADDRESS}, None),  # the first process of the machine says it
        ({**GROUP, **ADDRESS, "LOCAL_RANK": "0"}, "unknown key train.betta"),
    ],
)
def test_what_a_cluster_left_in_the_environment(tmp_path, monkeypatch, left, message):
    for name in (*GROUP, *ADDRESS):
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    result = run(tmp_path, ROOT / "train_sd15.py", "--config.train.betta=5")
    assert result.returncode == 2
    assert result.stderr.count("\n") == (message is not None) and (message or "") in result.stderr


def test_run_would_notice_torch(tmp_path):
    (tmp_path / "script.py").write_text("import torch\n")
    assert run(tmp_path, tmp_path / "script.py").returncode == 3


def test_the_hub_is_tried_without_a_word_unless_asked_for():
    code = "from spo.command_line import flags; from huggingface_hub.utils import logging as hub; "
    for given, expected in (({}, 40), ({"HF_HUB_VERBOSITY": "info"}, 20)):
        command = [sys.executable, "-c", f"{code}print(hub.get_verbosity())"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | given
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.stdout == f"{expected}\n", result.stderr


def test_help(tmp_path):
    result = run(tmp_path, ROOT / "train_sdxl.py", "--help")
    assert result.returncode == 0
    assert "launch_sdxl.sh" in result.stdout and "config/sdxl.py" in result.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_this_name\n", "line 1: ModuleNotFoundError"),
        ("def get_config(:\n", "SyntaxError"),
        ("def get_config():\n    return 1 / 0\n", "line 2: ZeroDivisionError"),
        ("config = 1\n", "get_config"),
        ("def get_config():\n    return {}\n", "returned dict"),
    ],
)
def test_broken_config_files_name_the_file(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_config(str(tmp_path / "mine.py"))
    assert "mine.py" in str(error.value)


def test_a_key_that_an_overlay_invents_is_an_error(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from config import base\n"
        "def get_config():\n"
        "    config = base.get_config()\n"
        "    config.train.learning_rat = 1.0\n"
        "    return config\n"
    )
    with pytest.raises(UserError, match=r"train.learning_rat; did you mean train.learning_rate\?"):
        load_config(str(tmp_path / "mine.py"))


def test_a_saved_config_comes_back(tmp_path):
    config = load_config("config/sdxl.py")
    config.train.max_grad_norm = None
    config.preference.kwargs = {"sizes": [1, 2]}
    save_config(json.loads(config.to_json()), tmp_path / "config.json")
    again = load_config(str(tmp_path / "config.json"))
    assert again.to_json() == config.to_json()
    assert again.lora.target_modules == config.lora.target_modules  # a tuple, as before

    overridden = parse(tmp_path, "--config=config.json", "--config.lora.alpha=3")
    assert overridden["lora"]["alpha"] == 3 and overridden["family"] == "sdxl"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"train": {"betta": 1}}', "unknown key train.betta; did you mean train.beta?"),
        ('{"train": {"beta": "big"}}', "train.beta = 'big': expected float"),
        ('{"train": {"batch_size": true}}', "train.batch_size = True: expected int"),
        ('{"seed": null}', "seed = None: expected int"),
        ('{"train": 5}', "train = 5: expected ConfigDict"),
        ("[1]", "JSON object"),
        ("{", "not a JSON file"),
    ],
)
def test_broken_saved_configs_name_the_key(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as error:
        load_config(str(tmp_path / "config.json"))
    assert message in str(error.value) and "config.json" in str(error.value)


def test_a_terminal_that_lacks_letters_gets_them_escaped(tmp_path):
    (tmp_path / "fox.txt").write_text("a fox\nein Füchslein\n")
    rows = tmp_path / "füchse 狐.txt"
    (tmp_path / "fox.txt").rename(rows)
    script, said = ROOT / "scripts" / "prepare_prompts.py", ["--num", "1", "--output", "o.json"]
    result = subprocess.run(
        [sys.executable, script, "--source", rows, *said],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert r"f\xfcchse \u72d0.txt" in result.stdout


def test_exit_on_user_error(capsys):
    with pytest.raises(SystemExit) as exit_, exit_on_user_error():
        raise UserError("two\nlines")
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: two lines\n"
