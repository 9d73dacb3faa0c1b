"""Publishing: what is uploaded, the model card, errors, and pushes while a run trains."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from diffusers.loaders import lora_base
from fake_hub import TOKEN, serve
from helpers import ATTENTION, random_weights, unet_output
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from config import tiny
from scripts import push_to_hub
from spo.command_line.config_files import load_config, save_config
from spo.errors import UserError
from spo.evaluation.results import (
    ModelInfo,
    PromptResult,
    Results,
    ScoredImage,
    ScorerInfo,
    write_results,
)
from spo.hub import Destination, is_hub_id, public_name
from spo.lora_io import find
from spo.lora_io.convert import convert_lora
from spo.lora_io.read import read_lora_file
from spo.lora_io.write import KOHYA_FILE, save_lora
from spo.method.build import read_recipe
from spo.models.backbone import Backbone, ModelSource
from spo.models.lora import add_lora
from spo.publish import push as publish
from spo.publish.card import merge_cards
from spo.publish.layout import lay_out
from spo.run.checkpoint_folder import link_best, new_checkpoint
from spo.run.folder import record_start
from spo.run.pictures import Cell
from spo.run.validation import save_samples

ROOT = Path(__file__).resolve().parent.parent
LORA = "pytorch_lora_weights.safetensors"
HOME = "/home/somebody"  # folders that nobody else needs to know
PLAN = {"num_processes": 4, "minibatch_size": 10, "accumulation_steps": 1}
UPLOADED = {
    "README.md",
    "config.json",
    "metrics.jsonl",
    LORA,
    KOHYA_FILE,
    *(f"samples/{i:02d}.png" for i in range(4)),
}


@pytest.fixture(scope="module")
def made_run(tmp_path_factory):
    """A run directory written by hand: six epochs planned, two trained, on the tiny world's model."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    config = tiny.get_config()
    config.logdir, config.num_epochs = f"{HOME}/runs", 6
    config.prompts.source = f"{HOME}/data/prompts.txt"
    run_dir.mkdir()
    save_config(json.loads(config.to_json()), run_dir / "config.json")
    source = ModelSource(str(ROOT / "assets" / "tiny" / "sd15"))
    unet = Backbone(source, "sd15", "no", torch.device("cpu")).unet
    lora = add_lora(unet, 4, 4, ATTENTION, seed=0)
    header = read_recipe(config).lora_metadata() | {"step": "30"}
    (run_dir / "ema").mkdir()
    save_lora(run_dir / LORA, lora, random_weights(lora, 1), header)
    save_lora(run_dir / "ema" / LORA, lora, random_weights(lora, 2), header)
    lines = [{"epoch": 1 + i // 5, "rollout": i + 1, "step": 3 * (i + 1)} for i in range(12)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = f"4 prompts from {HOME}/data/prompts.txt (4 rows)"
    record_start(run_dir, {"plan": PLAN, "prompts": prompts, "device": "cuda"})
    cells = []
    for i in range(5):
        image = Image.new("RGB", (8, 8), (50 * i, 0, 0))
        cells.append(Cell(image, f"a <!-- {i} --> of 'clubs'"))
    save_samples(run_dir, cells, "policy", 2)
    return run_dir


@pytest.fixture
def run_dir(made_run, tmp_path):
    shutil.copytree(made_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of our own, which this process takes for the real one."""
    constants = huggingface_hub.constants
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(publish, "_WAITS", (0, 0, 0))
        yield hub


def push(run_dir, *arguments):
    push_to_hub.main([str(run_dir), "--repo_id=user/name", *arguments])


def refused(capsys, *arguments):
    """The exit status and the one line of a push that fails."""
    with pytest.raises(SystemExit) as caught:
        push(*arguments)
    (line,) = capsys.readouterr().err.splitlines()
    return caught.value.code, line


def unpadded(card):
    """The card with one space before the ends of all table cells."""
    return re.sub(r" +\|", " |", card)


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


def add_evaluation(folder, title="500 prompts of a test set"):
    """Results of two models by one scorer on three prompts."""
    scores = {"base": (20.0, 21.0, 22.0), "GradSPO": (21.0, 23.0, 22.0)}
    specs = {"base": f"{HOME}/models/base", "GradSPO": f"{HOME}/runs/run"}
    images = [
        {name: ScoredImage(f"{i}.png", {"pickscore": own[i]}) for name, own in scores.items()}
        for i in range(3)
    ]
    results = Results(
        title=title,
        settings={"prompts": f"{HOME}/prompts.txt", "steps": 20},
        versions={"torch": "2"},
        scorers=(ScorerInfo("pickscore", "PickScore", 100.0),),
        models=tuple(ModelInfo(name, spec, lora=spec) for name, spec in specs.items()),
        prompts=tuple(PromptResult(p, i, images[i]) for i, p in enumerate(("/a", "b", "c"))),
    )
    folder.mkdir()
    write_results(results, folder)


def test_what_is_uploaded_is_what_the_run_holds(hub, run_dir, capsys):
    add_evaluation(run_dir / "evaluation")
    config = load_config(str(run_dir / "config.json"))
    config.pretrained.model = f"{HOME}/models/mine"
    assert read_recipe(config).lora_metadata()["base_model"] == "mine"
    save_config(json.loads(config.to_json()), run_dir / "config.json")
    push(run_dir, "--message=mine")
    assert f"pushed to {hub.url}/user/name" in capsys.readouterr().out
    files = hub.files("user/name")
    expected = UPLOADED | {"evaluation/results.json", "evaluation/table.md", ".gitattributes"}
    assert files.keys() == expected and hub.commits("user/name") == ["mine"]
    for name in (LORA, "metrics.jsonl"):
        assert files[name] == (run_dir / name).read_bytes()
    assert files["samples/03.png"] == (run_dir / "samples/03.png").read_bytes()
    assert not hub.repos["user/name"].private
    (run_dir / "config.json").write_bytes(files["config.json"])
    published = load_config(str(run_dir / "config.json"))
    assert published.prompts.source == "prompts.txt" and published.logdir == "runs"
    assert all(HOME.encode() not in content for content in files.values())


def test_the_lora_for_other_programs_beside_that_for_diffusers(hub, run_dir, tmp_path, monkeypatch):
    push(run_dir)
    folder, card = run_dir / "hub", hub.files("user/name")["README.md"].decode()
    converted = tmp_path / "x.safetensors"
    convert_lora(str(run_dir), "kohya", None, None, converted)
    assert (folder / KOHYA_FILE).read_bytes() == converted.read_bytes()
    assert f"\n- `{LORA}` for diffusers\n- `{KOHYA_FILE}` for ComfyUI, A1111, InvokeAI" in card
    assert "Alpha / rank" not in card  # is 1 here
    # Whoever names no file gets diffusers' one: from the repo, from a folder, and by our own finder.
    monkeypatch.setattr(lora_base, "model_info", huggingface_hub.HfApi().model_info)
    assert lora_base._best_guess_weight_name("user/name") == LORA
    assert lora_base._best_guess_weight_name(str(folder)) == LORA
    assert find._choose(sorted(hub.files("user/name")), "user/name", "SOURCE") == LORA
    assert find.find_lora(str(folder), "SOURCE").name == LORA


def test_alpha_is_a_part_of_the_published_weights(run_dir):
    """Readers that take the rank for alpha make the network that was trained, at strength 1."""
    source = ModelSource(str(ROOT / "assets" / "tiny" / "sd15"))
    backbone = Backbone(source, "sd15", "no", torch.device("cpu"))
    lora = add_lora(backbone.unet, 4, 3, ATTENTION, seed=0)
    weights = random_weights(lora, 1)
    save_lora(run_dir / LORA, lora, weights, {"step": "30"})
    before = (run_dir / LORA).read_bytes()
    config = load_config(str(run_dir / "config.json"))
    config.lora.rank, config.lora.alpha = 4, 3
    save_config(json.loads(config.to_json()), run_dir / "config.json")
    folder, _ = lay_out(run_dir, Destination("user/name"))
    lora.assign(weights)
    expected = unet_output(backbone)
    plain = load_file(folder / LORA)  # as old versions of diffusers read it, without its header
    reader = Backbone(source, "sd15", "no", torch.device("cpu"))
    reader.use_loras([(plain, 1.0)])
    torch.testing.assert_close(unet_output(reader), expected, rtol=0, atol=1e-5)
    for name in (LORA, KOHYA_FILE):
        found = read_lora_file(folder / name, "SOURCE")
        assert {module.alpha for module in found.modules.values()} == {4.0}
        assert found.header["alpha"] == found.header["rank"] == "4"
    assert "Alpha / rank of the training, 0.75, is a part of" in (folder / "README.md").read_text()
    assert (run_dir / LORA).read_bytes() == before


MARKS = "<!-- spo:end -->", '<!-- spo:run {"subfolder": ""} -->\n<!-- spo:end -->'


def test_no_text_of_a_user_is_a_mark_of_the_card(hub, run_dir):
    cells = [Cell(Image.new("RGB", (8, 8)), f"{mark} {i}") for i, mark in enumerate(MARKS * 2)]
    save_samples(run_dir, cells, "policy", 2)
    add_evaluation(run_dir / "evaluation", title=f"{MARKS[0]} | <b>_x_\n{MARKS[1]}")
    config = load_config(str(run_dir / "config.json"))
    config.pretrained.model = f"{HOME}/{MARKS[0]} `*my_model*` [x](y)"
    config.pretrained.vae = config.preference.checkpoint = MARKS[1]
    config.algorithm = f"my_loss:{MARKS[0]}"
    save_config(json.loads(config.to_json()), run_dir / "config.json")
    hub.create("user/name", files={"README.md": b"# Mine\n\nBy hand.\n"})
    cards = []
    for license in ("mit", MARKS[0], "mit"):
        for subfolder in ("one", "two"):
            push(run_dir, f"--subfolder={subfolder}", f"--license={license}")
        cards.append(hub.files("user/name")["README.md"].decode())
    text = huggingface_hub.ModelCard(cards[0]).text
    assert text.count("<!-- spo:run {") == text.count("<!-- spo:end -->") == 2
    assert cards[2] == cards[0] != cards[1]
    assert text.count("### Use") == text.count("### Results") == 2 and "By hand." in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    strings = [n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant)]
    assert {f"{MARKS[0]} 0", MARKS[1], f"{MARKS[0]} `*my_model*` [x](y)"} <= set(strings)
    assert [each["text"] for each in metadata(cards[0])["widget"][:2]] == [
        f"{m} {i}" for i, m in enumerate(MARKS)
    ]
    title = re.search("^## one: .*", text, re.MULTILINE)[0]
    assert title.endswith(r" on &lt;!-- spo:end --&gt; \`\*my_model\*\` \[x\](y)")
    assert r"### Results: &lt;!-- spo:end --&gt; \| &lt;b&gt;\_x\_ &lt;!-- spo:run" in text


def test_files_that_a_run_from_elsewhere_names_are_not_published(run_dir, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    (run_dir / "samples" / "samples.json").write_text(
        json.dumps(
            {"weights": "policy", "epochs": 2, "prompts": {"../../secret.png": "x", "00.png": "y"}}
        )
    )
    folder, _ = lay_out(run_dir, Destination("user/name"))
    assert [p.name for p in (folder / "samples").iterdir()] == ["00.png"]
    config = load_config(str(run_dir / "config.json"))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for key, value in (("hub.weights", "../other"), ("family", str(tmp_path / "evil"))):
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict({key: value})
        save_config(json.loads(other.to_json()), run_dir / "config.json")
        with pytest.raises(UserError, match=f"{key.rpartition('.')[2]}: '{value}' is none of"):
            publish.publish_run(run_dir, {"repo_id": "user/name"}, None, "", dry_run=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/home/me/runs/x", "x"),
        ("~/runs/x", "x"),
        ("~me/runs/x", "x"),
        ("../x/y", "y"),
        ("fox=/home/me/runs/x:0.5", "fox=x:0.5"),
        ("fox=~/a:0.5+/home/me/b:2", "fox=a:0.5+b:2"),
        ("--config.logdir=/home/me/my runs/lr=1", "--config.logdir=lr=1"),
        ("4 prompts from /home/me/p.txt (4 rows)", "4 prompts from p.txt (4 rows)"),
        ("{'head': '/home/me/head.pth', 'scale': 2}", "{'head': 'head.pth', 'scale': 2}"),
        *((text, text) for text in ("runs/x", "user/name", "hf://user/name/file", "https://a.b/c")),
        *((text, text) for text in ("a fox / a bear", "~", "..", "/", "1/2")),
    ],
)
def test_private_paths_lose_their_folders(text, public):
    assert public_name(text) == public


def test_ema_branch_and_private(hub, run_dir):
    push(run_dir, "--weights=ema", "--branch=try", "--private", "--subfolder=sd1_5")
    files = hub.files("user/name", "try")
    assert files[f"sd1_5/{LORA}"] == (run_dir / "ema" / LORA).read_bytes()
    assert hub.repos["user/name"].private and hub.files("user/name").keys() == {".gitattributes"}
    card = files["README.md"].decode()
    # Images that the policy drew are none of the EMA's.
    assert "EMA weights" in card and "widget" not in metadata(card) and "![" not in card
    assert 'subfolder="sd1_5",\n    revision="try",' in card


def header(file):
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def add_checkpoint(run_dir, name, step):
    """A checkpoint of the run after so many updates, its weights unlike those of any other."""
    with new_checkpoint(run_dir, name, 0) as folder:
        (folder / "ema").mkdir()
        for file in (LORA, f"ema/{LORA}"):
            weights = {n: tensor * step for n, tensor in load_file(run_dir / file).items()}
            save_file(weights, folder / file, header(run_dir / file) | {"step": str(step)})
    return folder.with_name(name)


@pytest.mark.parametrize(
    ("arguments", "folder", "facts"),
    [
        ((), "epoch_0001", ("1 of 6", 5, 15, 0)),  # hub.checkpoint of the run
        (("--checkpoint=best", "--weights=ema"), "epoch_0001/ema", ("1 of 6", 5, 15, 0)),
        # Images were drawn after the second epoch: later than this one, but not than the next.
        (("--checkpoint=epoch_0001_rollout_000009",), None, ("2 of 6", 9, 27, 0)),
        (("--checkpoint=epoch_0002",), None, ("2 of 6", 10, 30, 4)),
        (("--checkpoint=",), ".", ("2 of 6", 10, 30, 4)),
    ],
)
def test_a_checkpoint_is_published_as_what_it_is(hub, run_dir, arguments, folder, facts):
    steps = {"epoch_0001": 15, "epoch_0001_rollout_000009": 27, "epoch_0002": 30}
    made = [add_checkpoint(run_dir, name, step) for name, step in steps.items()]
    link_best(run_dir, made[0])
    add_evaluation(run_dir / "evaluation")  # of whatever weights
    config = json.loads((run_dir / "config.json").read_text())
    config["hub"]["checkpoint"] = "best"
    (run_dir / "config.json").write_text(json.dumps(config))
    push(run_dir, *arguments)
    files = hub.files("user/name")
    name = folder or arguments[0].partition("=")[2]
    source = (run_dir if folder == "." else run_dir / "checkpoints" / name) / LORA
    found, expected = load_file(run_dir / "hub" / LORA), load_file(source)
    assert found.keys() == expected.keys()
    assert all(found[each].equal(expected[each]) for each in found)
    card = unpadded(files["README.md"].decode())
    rows = dict(re.findall(r"^\| (checkpoint|epochs|rollouts|updates) \| (.*) \|$", card, re.M))
    assert rows.pop("checkpoint", ".") == name.partition("/")[0]
    epochs, rollouts, updates, images = facts
    assert rows == {"epochs": epochs, "rollouts": str(rollouts), "updates": str(updates)}
    assert header(run_dir / "hub" / LORA)["step"] == str(updates)
    assert len([name for name in files if name.startswith("samples/")]) == images
    assert ("evaluation/results.json" in files) is ("Results" in card) is (folder == ".")
    push(run_dir, *arguments, f"--results={run_dir / 'evaluation'}")
    assert "evaluation/results.json" in hub.files("user/name")


def test_a_checkpoint_that_is_not_there_is_one_line(hub, run_dir, capsys):
    status, line = refused(capsys, run_dir, "--checkpoint=best")
    assert status == 2 and "has no whole best checkpoint: evaluations with eval.judges" in line
    folder = add_checkpoint(run_dir, "epoch_0001", 15)
    link_best(run_dir, folder)
    (folder / LORA).write_bytes(b"cut")
    for name, reason in (("best", "no whole best"), ("epoch_0001", "or is damaged"), ("e", "e is")):
        status, line = refused(capsys, run_dir, f"--checkpoint={name}")
        assert status == 2 and reason in line
    status, line = refused(capsys, run_dir, "--checkpoint=../run")
    assert (
        status == 2 and line.startswith("error: --checkpoint: '../run' must be") and not hub.asked
    )


def test_a_training_pushes_its_best_checkpoint_once_there_is_one(hub, run_dir):
    said = []
    to = Destination("user/name", checkpoint="best")
    publishing = publish.Publishing(run_dir, to, 1, said.append)
    publishing.push()
    none = "hub: not pushed: there is no best checkpoint. For the newest weights: python scripts/"
    none += f"push_to_hub.py {run_dir} --checkpoint=''"
    assert said == [none] and hub.asked == []
    publishing.finish()
    assert said[2:] == [none] and hub.asked == []
    link_best(run_dir, add_checkpoint(run_dir, "epoch_0001", 15))
    publishing.finish()
    assert said[-1].startswith("hub: pushed to ") and len(said) == 5
    assert hub.commits("user/name") == ["gradspo LoRA, policy weights after epoch 1"]
    (run_dir / "checkpoints" / "epoch_0001" / LORA).unlink()
    publishing.push()
    assert said[-1].startswith("warning: not pushed: checkpoint: ") and len(said) == 6


def test_a_second_push_uploads_what_changed_and_commits_nothing_for_nothing(hub, run_dir, capsys):
    push(run_dir)
    assert len([line for line in hub.asked if line.startswith("PUT")]) == 6  # LoRAs and images
    hub.asked.clear()
    push(run_dir)
    assert capsys.readouterr().out.splitlines()[-1] == f"nothing new for {hub.url}/user/name"
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "rollout": 13, "step": 40}\n')
    before = hub.files("user/name")
    push(run_dir)
    after = hub.files("user/name")
    assert [name for name in after if after[name] != before[name]] == ["metrics.jsonl"]
    assert len(hub.commits("user/name")) == 2
    assert not any(line.startswith("PUT") for line in hub.asked)


def test_the_card_says_what_the_run_recorded(run_dir):
    add_evaluation(run_dir / "evaluation_pickapic")
    to = Destination("user/name", subfolder="sd1_5")
    card = (lay_out(run_dir, to)[0] / "README.md").read_text()
    for row in (
        "| algorithm | GradSPO |",
        "| epochs | 2 of 6 |",
        "| rollouts | 10 |",
        "| updates | 30 |",
        "| pairs per update | 40 |",
        "| processes | 4 x cuda |",
        "| prompts | 4 prompts from prompts.txt (4 rows) |",
        "| train.learning_rate | 0.0005 |",
        "| train.grad_scale | 0.5 |",
        "| train.ema_decay | 0.9 |",
        f"diffusers {__import__('diffusers').__version__}",
        "| PickScore x 100 | GradSPO | 22.000 [",
        "![Validation image](sd1_5/samples/03.png)",
        "@inproceedings{tee2025gradspo",
        "2406.04314",
    ):
        assert row in unpadded(card)
    # Nothing was measured, nothing is claimed.
    shutil.rmtree(run_dir / "evaluation_pickapic")
    assert "Results" not in (lay_out(run_dir, to)[0] / "README.md").read_text()


def test_metadata_are_the_hubs(run_dir, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(str(run_dir / "config.json"))
    card = lay_out(run_dir, Destination("user/name", "sd1_5"))[0] / "README.md"
    found = metadata(card.read_text())
    # A folder is no base model that the Hub could know.
    assert is_hub_id("user/tiny") and not is_hub_id("assets/tiny") and not is_hub_id("a/b/c")
    assert "base_model" not in found and "license" not in found
    assert "the terms of the base model" in card.read_text()
    config.pretrained.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    save_config(json.loads(config.to_json()), run_dir / "config.json")
    lay_out(run_dir, Destination("user/name", "sd1_5"))
    data = huggingface_hub.ModelCard.load(card).data
    assert isinstance(data, huggingface_hub.ModelCardData)
    assert data.base_model == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert (data.license, data["base_model_relation"]) == ("creativeml-openrail-m", "adapter")
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-image")
    assert {"lora", "gradspo"} <= set(data.tags)
    assert data["widget"][1] == {
        "text": "a <!-- 1 --> of 'clubs'",
        "output": {"url": "sd1_5/samples/01.png"},
    }
    assert len(data["widget"]) == 4
    (comment,) = re.findall("<!-- spo:run .*", card.read_text())
    assert comment.index("-->") == len(comment) - 3
    assert data["widget"][0]["text"] == re.search(r"pipe\(\n    (.*),\n", card.read_text())[
        1
    ].strip('"')
    lay_out(run_dir, Destination("user/name", license="mit"))
    assert huggingface_hub.ModelCard.load(card).data.license == "mit"


def test_sdxl_with_a_vae_of_its_own_and_another_scorer(run_dir):
    config = load_config("config/spo_sdxl.py")
    config.preference.scorer, config.pretrained.variant = "pickscore", "fp16"
    save_config(json.loads(config.to_json()), run_dir / "config.json")
    shutil.rmtree(run_dir / "ema")
    card = (lay_out(run_dir, Destination("user/name"))[0] / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    compile(code, "snippet", "exec")
    for line in ("= StableDiffusionXLPipeline.from_pretrained(", "vae=vae,", 'variant="fp16",'):
        assert line in code
    assert "| preference model | yuvalkirstain/PickScore_v1 |" in unpadded(card)
    assert metadata(card)["license"] == "openrail++" and "spo" in metadata(card)["tags"]
    assert "GradSPO" not in card and "grad_scale" not in card and "ema_decay" not in card


@pytest.mark.parametrize(
    ("name", "title", "tags"),
    [
        ("lpo_sd15", "LPO on stable-diffusion-v1-5", ["lpo", "latent-reward-model"]),
        (
            "gradspo_lrm_sdxl",
            "GradSPO with a latent reward model on stable-diffusion-xl-base-1.0",
            ["gradspo", "lpo", "latent-reward-model"],
        ),
    ],
)
def test_a_latent_reward_model_is_credited(run_dir, name, title, tags):
    config = load_config(f"config/{name}.py")
    save_config(json.loads(config.to_json()), run_dir / "config.json")
    card = (lay_out(run_dir, Destination("user/name"))[0] / "README.md").read_text()
    assert f"## {title}\n" in card
    assert metadata(card)["tags"][3:] == tags
    checkpoint = config.preference.kwargs.checkpoint
    assert f"| preference model | {checkpoint} |" in unpadded(card)
    assert "| sample.threshold_schedule | sigma |" in unpadded(card)
    assert card.count("arXiv:2502.01051") == card.count("arXiv:2406.04314") == 1
    assert ("tee2025gradspo" in card) is name.startswith("gradspo")


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        ("my_losses.smooth:objective", "smooth"),
        ("my_loss:loss", "my_loss"),
        ("my_loss:label_smoothing", "label_smoothing"),
    ],
)
def test_a_loss_of_ones_own_is_called_by_its_name_and_cites_nobody(run_dir, algorithm, name):
    config = load_config(str(run_dir / "config.json"))
    config.algorithm = algorithm
    save_config(json.loads(config.to_json()), run_dir / "config.json")
    folder, summary = lay_out(run_dir, Destination("user/name"))
    card = (folder / "README.md").read_text()
    assert metadata(card)["tags"][-1] == name and f"## {name} on sd15" in card
    assert f"| algorithm | {algorithm} |" in unpadded(card) and summary.startswith(f"{name} LoRA, ")
    assert "bibtex" not in card and "Citation" not in card and "2406.04314" not in card


def test_a_setting_is_in_the_card_if_it_differs_from_the_family_s_default(run_dir):
    config = load_config("config/sdxl.py")

    def settings(**changes):
        """The rows of settings in the card of a run with these changes."""
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
        save_config(json.loads(changed.to_json()), run_dir / "config.json")
        card = (lay_out(run_dir, Destination("user/name"))[0] / "README.md").read_text()
        return dict(re.findall(r"\| ((?:lora|sample|train)\.\w+) \| (.*) \|", unpadded(card)))

    plain = settings()
    assert plain["lora.rank"] == "64" and "sample.eta" not in plain
    changed = settings(sample__eta=0.5, train__max_grad_norm=None, lora__target_modules=("to_q",))
    assert {key: value for key, value in changed.items() if key not in plain} == {
        "sample.eta": "0.5",
        "train.max_grad_norm": "None",
        "lora.target_modules": "('to_q',)",
    }


def test_runs_share_a_card_and_keep_each_others_sections(hub, run_dir):
    config = load_config(str(run_dir / "config.json"))
    bases = {
        "sd1_5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    }
    hub.create("user/name", files={"README.md": b"---\nlanguage: en\n---\n# Mine\n\nBy hand.\n"})
    for subfolder, base in bases.items():
        config.pretrained.model = base
        save_config(json.loads(config.to_json()), run_dir / "config.json")
        push(run_dir, f"--subfolder={subfolder}")
    card = hub.files("user/name")["README.md"].decode()
    assert metadata(card)["base_model"] == list(bases.values())
    assert metadata(card)["license"] == "other" and metadata(card)["language"] == "en"
    assert len(metadata(card)["widget"]) == 8
    config.train.beta = 77.0
    save_config(json.loads(config.to_json()), run_dir / "config.json")
    push(run_dir, "--subfolder=sdxl")
    again = hub.files("user/name")["README.md"].decode()
    assert again.count("## ") == card.count("## ") and "| train.beta | 77 |" in unpadded(again)
    first = again[: again.index("<!-- spo:run", again.index("<!-- spo:run") + 1)]
    assert first in card and "By hand." in first and "sd1_5/pytorch_lora" in first


def test_a_push_between_reading_the_card_and_committing_is_not_overwritten(
    hub, run_dir, monkeypatch
):
    push(run_dir, "--subfolder=one")
    merge, merged = publish.merge_cards, []

    def while_another_pushes(published, own):
        if not merged:
            other = str(merge(published, own.replace("two", "three")))
            files = hub.files("user/name") | {"README.md": other.encode()}
            hub.commit("user/name", "main", files, "another run")
        merged.append(published)
        return merge(published, own)

    monkeypatch.setattr(publish, "merge_cards", while_another_pushes)
    push(run_dir, "--subfolder=two")
    card = hub.files("user/name")["README.md"].decode()
    assert len(merged) == 2 and re.findall(r'"subfolder": "(\w+)"', card) == ["one", "three", "two"]


def test_the_snippet_of_the_card_runs(hub, run_dir, tmp_path, monkeypatch):
    push(run_dir, "--subfolder=sd1_5")
    card = hub.files("user/name")["README.md"].decode()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    drawn, plain = {}, {}
    exec(code, drawn)
    load = re.search(r"pipe\.load_lora_weights\(.*?\n\)\n", code, re.DOTALL)[0]
    exec(code.replace(load, ""), plain)
    assert Image.open("image.png").size == (32, 32)
    assert drawn["image"].tobytes() != plain["image"].tobytes()


def test_a_dry_run_asks_nobody(hub, run_dir, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    push(run_dir, "--dry_run", "--subfolder=a/b")
    assert hub.asked == []
    folder = run_dir / "hub"
    assert (folder / "README.md").read_text() in capsys.readouterr().out
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == {"README.md"} | {f"a/b/{name}" for name in UPLOADED - {"README.md"}}


@pytest.mark.parametrize("place", ["repos/create", "/preupload/", "/lfs/", "/commit/"])
def test_a_server_that_fails_twice_is_asked_again(hub, run_dir, place, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client has waits of its own
    hub.faults = [(place, 503), (place, 500)]
    push(run_dir)
    assert not hub.faults and hub.files("user/name").keys() == UPLOADED | {".gitattributes"}


def test_refusals_are_one_line_each(hub, run_dir, capsys, monkeypatch):
    monkeypatch.setattr(hub, "token", "hf_another")
    status, line = refused(capsys, run_dir)
    assert status == 2 and line.startswith("error: --repo_id: the Hub does not accept the token")
    monkeypatch.setattr(hub, "token", TOKEN)
    monkeypatch.setattr(hub, "role", "read")
    status, line = refused(capsys, run_dir)
    assert status == 2 and "the token may not write to user/name (403)" in line
    monkeypatch.setattr(hub, "role", "write")
    status, line = refused(capsys, run_dir, "--repo_id=usr/name")
    assert status == 2 and "the Hub has no usr/name, and no usr to make it for (404)" in line
    hub.create("user/public")
    status, line = refused(capsys, run_dir, "--repo_id=user/public", "--private")
    assert status == 2 and "user/public exists and is public" in line
    hub.create("user/odd", files={"README.md": b"---\n[\n---\n"})
    status, line = refused(capsys, run_dir, "--repo_id=user/odd")
    assert status == 2 and "README.md on the Hub cannot be read as a model card" in line
    hub.faults = [("/branch/", 400)]
    status, line = refused(capsys, run_dir, "--branch=refs")
    assert status == 2 and "the Hub refuses the push to user/name (" in line
    monkeypatch.delenv("HF_TOKEN")
    status, line = refused(capsys, run_dir)
    assert status == 2 and "needs a token: `hf auth login`" in line


def test_no_network_is_one_line_and_status_1(hub, run_dir, capsys, monkeypatch):
    hub.dies_after = 0
    status, line = refused(capsys, run_dir)
    assert status == 1 and line.startswith("error: --repo_id: cannot push to user/name (")
    assert len(hub.asked) == 4
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    status, line = refused(capsys, run_dir)
    assert status == 1 and "HF_HUB_OFFLINE" in line


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: (run / LORA).unlink(), f"{LORA}: no such LoRA"),
        (lambda run: (run / LORA).write_bytes(b"no"), "is not a LoRA of a run"),
        (lambda run: (run / "config.json").unlink(), "no config.json in it"),
        (lambda run: (run / "evaluation").mkdir(), None),
        (lambda run: shutil.rmtree(run), "no config.json in it"),
    ],
)
def test_a_folder_that_is_no_run_is_one_line(hub, run_dir, capsys, break_it, message):
    break_it(run_dir)
    if message is None:  # an evaluation that has not finished is left out
        push(run_dir)
        return
    status, line = refused(capsys, run_dir)
    assert status == 2 and message in line and hub.asked == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repo_id": "user/na me"}, "hub.repo_id: Repo id must use"),
        ({"repo_id": "datasets/user/name"}, "hub.repo_id: Repo id must be in the form"),
        ({"repo_id": "name"}, "hub.repo_id: 'name' must be user/name"),
        ({"subfolder": "../up"}, "hub.subfolder: '../up' must be"),
        ({"checkpoint": "a/b"}, "hub.checkpoint: 'a/b' must be best, or the name of a folder of"),
        ({"checkpoint": ".."}, "hub.checkpoint: '..' must be best"),
    ],
)
def test_malformed_destinations_are_found_before_training(hub, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        publish.check_access(replace(Destination("user/name"), **changes))
    assert hub.asked == []


def test_access_is_checked_before_training(hub, monkeypatch, capsys):
    to = Destination("user/name")
    publish.check_access(to)
    assert hub.asked == ["GET /api/whoami-v2"]
    hub.role = "read"
    with pytest.raises(UserError, match="hub.repo_id: the token may only read"):
        publish.check_access(to)
    hub.token = "hf_another"
    with pytest.raises(UserError, match="hub.repo_id: the Hub does not accept the token"):
        publish.check_access(to)
    assert capsys.readouterr().out == ""
    hub.dies_after = 0
    publish.check_access(to)
    assert capsys.readouterr().out.startswith("warning: hub.repo_id: the Hub cannot be asked now")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="needs a token"):
        publish.check_access(to)


def test_a_push_that_hangs_is_left_alone_at_the_end(hub, run_dir, monkeypatch):
    import threading

    released, said = threading.Event(), []
    monkeypatch.setattr(publish, "push", lambda *_: released.wait(20))
    monkeypatch.setattr(publish, "_LAST_PUSH", 0.2)
    publishing = publish.Publishing(run_dir, Destination("user/name"), 2, said.append)
    assert [epoch for epoch in range(6) if publishing.due(epoch)] == [2, 4]
    publishing.push()
    publishing.finish()
    released.set()
    assert said[0] == "hub: pushing to user/name, for at most 0.2 s"
    assert "still goes on" in said[1] and said[2].startswith("warning: not pushed: still not done")
    assert said[2].endswith(f"python scripts/push_to_hub.py {run_dir}")


def test_a_run_that_cannot_be_laid_out_goes_on(hub, run_dir):
    said = []
    (run_dir / LORA).unlink()
    publish.Publishing(run_dir, Destination("user/name"), 1, said.append).push()
    assert len(said) == 1 and said[0].startswith("warning: not pushed: ") and LORA in said[0]


def test_a_card_without_sections_of_ours_gets_one_at_the_end(run_dir):
    own = (lay_out(run_dir, Destination("user/name"))[0] / "README.md").read_text()
    merged = merge_cards("# Mine\n\n\\1 stays\n", own)
    assert merged.text.startswith("# Mine\n\n\\1 stays\n\n<!-- spo:run")
    assert str(merge_cards(str(merged), own)) == str(merged)


@pytest.mark.slow
def test_training_pushes_and_outlives_the_hub(tmp_path):
    """One run: pushed after its first epoch, and the Hub is gone when it ends."""
    program = "from spo import publish; publish._WAITS = (0,); import runpy; "
    program += "runpy.run_path('train_sd15.py', run_name='__main__')"
    settings = {
        "logdir": tmp_path / "runs",
        "run_name": "run",
        "prompts.num": 2,
        "num_epochs": 2,
        "save_interval": 2,
        "eval.num_images": 1,
        "eval.num_steps": 2,
        "sample.batch_size": 2,
        "sample.num_steps": 4,
        "sample.branch_from": 2,
        "sample.threshold": 0.0,
        "hub.repo_id": "user/name",
        "hub.push_every": 1,
        "hub.subfolder": "tiny",
    }
    with serve() as hub:
        hub.dies_after = 1
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [sys.executable, "-c", program, "--config=tests/data/random_models.py"]
            + [f"--config.{key}={value}" for key, value in settings.items()],
            cwd=ROOT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert result.returncode == 0, result.stderr[-2000:]
    said = (result.stdout + result.stderr).splitlines()
    assert hub.commits("user/name") == ["gradspo LoRA, policy weights after epoch 1"]
    files = hub.files("user/name")
    assert files.keys() >= {"README.md", f"tiny/{LORA}", "tiny/samples/00.png"}
    run_dir = tmp_path / "runs" / "run"
    assert files[f"tiny/{LORA}"] != (run_dir / LORA).read_bytes()  # of the second epoch
    (warning,) = [line for line in said if "warning: not pushed" in line]
    assert warning.endswith(f"To push it: python scripts/push_to_hub.py {run_dir}")
    assert not any(re.search("Retrying|LFS files|HTTP Request: (POST|PUT)", line) for line in said)
    written = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()] + list(files.values())
    assert len(written) > 20
    assert not any(TOKEN.encode() in text for text in [*written, "\n".join(said).encode()])
    assert all(str(tmp_path).encode() not in content for content in files.values())
