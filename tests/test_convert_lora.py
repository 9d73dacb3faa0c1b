"""scripts/convert_lora.py: finding, writing, merging, and what it says of bad input."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers import add_tiny_lora, load_backbone, model_folder, random_weights, unet_output
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from scripts.convert_lora import check_output
from spo import hub
from spo.atomic import new_output
from spo.errors import UserError
from spo.lora_io import convert as conversion
from spo.lora_io import find
from spo.lora_io.convert import merged_pipeline
from spo.lora_io.find import find_lora
from spo.lora_io.read import read_lora_file
from spo.lora_io.write import LORA_FILE, LoraModule, LoraWeights, save_lora
from spo.models.backbone import Backbone
from spo.models.loading import ModelSource

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "assets" / "tiny" / "sd15")  # stored in fp16
HEADER = {"base_model": "elsewhere", "algorithm": "gradspo", "config_sha256": "0a", "step": "3"}


def tiny_backbone(model=TINY):
    return Backbone(ModelSource(model), "sd15", "no", torch.device("cpu"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with the LoRA of a trainer, alpha twice its rank, and what the UNet then says."""
    backbone, folder = tiny_backbone(), tmp_path_factory.mktemp("run")
    lora = add_tiny_lora(backbone, rank=4, alpha=8)
    weights = {name: 0.3 * weight for name, weight in random_weights(lora, seed=1).items()}
    save_lora(folder / LORA_FILE, lora, weights, HEADER)
    without = unet_output(backbone)
    lora.assign(weights)
    assert (unet_output(backbone) - without).abs().max() > 0.1
    return folder, unet_output(backbone)


@pytest.fixture
def convert(monkeypatch):
    """The script in this process."""

    def run_script(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_lora.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "scripts" / "convert_lora.py"), run_name="__main__")

    return run_script


@pytest.mark.slow
def test_the_command_line(run, tmp_path, convert):
    there, back = tmp_path / "new" / "there.safetensors", tmp_path / "back.safetensors"
    command = [
        sys.executable,
        "scripts/convert_lora.py",
        run[0],
        "--to",
        "kohya",
        "--output",
        there,
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"wrote {there}\n"), result.stderr
    convert(there, "--to", "diffusers", "--base", TINY, "--output", back)
    assert back.read_bytes() == (run[0] / LORA_FILE).read_bytes()
    assert [path.name for path in there.parent.iterdir()] == [there.name]

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr == f"error: --output: {there} exists; choose another, or add --overwrite.\n"
    convert(*command[2:], "--overwrite", "--dtype", "bf16")
    dtypes = {name: tensor.dtype for name, tensor in load_file(there).items()}
    assert all((t == torch.float32) == n.endswith(".alpha") for n, t in dtypes.items())


def test_the_base_is_noted_where_the_file_does_not_say_it(run, tmp_path, convert):
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(run[0] / LORA_FILE), plain)
    for source, expected in ((run[0], "elsewhere"), (plain, TINY)):
        convert(source, "--to", "peft", "--base", TINY, "--overwrite", "--output", tmp_path / "x")
        config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == expected


def test_merging(run, tmp_path, convert, capsys):
    merged = tmp_path / "merged"
    with pytest.raises(SystemExit, match="2"):
        convert(run[0], "--merge", "--output", merged)
    assert capsys.readouterr().err == "error: --base: name the model to merge the LoRA into.\n"
    convert(run[0], "--merge", "--base", TINY, "--output", merged, "--dtype", "fp32")
    torch.testing.assert_close(unet_output(tiny_backbone(merged)), run[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_merged_model_is_stored_as_its_base_or_as_asked(run, tmp_path, dtype):
    lora = read_lora_file(run[0] / LORA_FILE, "SOURCE")
    merged_pipeline(lora, TINY, dtype).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype or torch.float16}
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    factors = load_file(run[0] / LORA_FILE)
    a, b = (factors[f"unet.{name}.lora_{x}.weight"] for x in "AB")
    base = load_file(f"{TINY}/unet/diffusion_pytorch_model.safetensors")
    expected = (base[f"{name}.weight"].float() + 2 * b @ a).to(dtype or torch.float16)
    assert torch.equal(stored[f"{name}.weight"], expected)
    assert torch.equal(stored["conv_in.bias"], base["conv_in.bias"].to(dtype or torch.float16))


@pytest.fixture(scope="module")
def sdxl_lora(tmp_path_factory):
    """A LoRA of the random tiny SDXL, in a file."""
    path = tmp_path_factory.mktemp("sdxl") / "x.safetensors"
    lora = add_tiny_lora(load_backbone("sdxl"))
    save_lora(path, lora, random_weights(lora, seed=1), {})
    return path


def test_a_merged_folder_is_for_older_libraries_and_other_machines(sdxl_lora, tmp_path, convert):
    base, merged = Path(model_folder("sdxl")), tmp_path / "merged"
    convert(sdxl_lora, "--merge", "--base", base, "--output", merged)
    files = {p.relative_to(base) for p in base.rglob("*") if p.is_file()}
    assert files <= {p.relative_to(merged) for p in merged.rglob("*")}
    for file in (file for file in files if file.parts[0].startswith("tokenizer")):
        assert (merged / file).read_bytes() == (base / file).read_bytes()
    texts = [path.read_text() for path in merged.rglob("*.json")]
    assert len(texts) > 10
    assert not any("name_or_path" in text or str(base.parent) in text for text in texts)
    plain = tmp_path / "plain"
    plain.touch()  # with the mode that the umask gives
    modes = {path.stat().st_mode for path in merged.rglob("*") if path.is_file()}
    assert modes == {plain.stat().st_mode}


def test_a_base_without_the_vocabulary_of_older_libraries(run, tmp_path, convert):
    convert(run[0], "--merge", "--base", TINY, "--output", tmp_path / "merged")
    folder = tmp_path / "merged" / "tokenizer"
    vocabulary = json.loads((folder / "vocab.json").read_text())
    model = json.loads((Path(TINY) / "tokenizer" / "tokenizer.json").read_text())["model"]
    assert vocabulary == model["vocab"]
    merges = (folder / "merges.txt").read_text().splitlines()
    assert merges[1:] == [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]


def test_numbers_that_are_not_finite_are_refused(run, tmp_path, convert, capsys):
    def refused(*arguments):
        with pytest.raises(SystemExit, match="2"):
            convert(*arguments, "--output", tmp_path / "out")
        assert {path.name for path in tmp_path.iterdir()} <= {"big.safetensors", "base"}
        return capsys.readouterr().err.splitlines()[-1]

    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    weights = load_file(run[0] / LORA_FILE)
    weights[f"unet.{name}.lora_B.weight"] *= 1e7
    save_file(weights, tmp_path / "big.safetensors")
    line = refused(tmp_path / "big.safetensors", "--merge", "--base", TINY)
    assert line.startswith("error: --dtype: choose fp32, as torch.float16 cannot hold")
    assert line.endswith(f"merged unet's {name}.weight.")
    line = refused(tmp_path / "big.safetensors", "--to", "peft", "--dtype", "fp16")
    assert line == f"error: --dtype: fp16 cannot hold the numbers of unet.{name}.lora_B.weight."
    shutil.copytree(TINY, tmp_path / "base")
    file = tmp_path / "base" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    broken = min(n for n, tensor in weights.items() if tensor.ndim == 1)
    weights[broken][0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    line = refused(run[0], "--merge", "--base", tmp_path / "base")
    assert line == f"error: --base: numbers are not finite in the vae's {broken}."


def test_home_folders_and_links(run, tmp_path, convert, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").symlink_to(TINY)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "model_index.json").write_text("old")
    convert(run[0], "--merge", "--base=~/base", "--output=~/link", "--overwrite")
    assert (tmp_path / "link").is_symlink()
    assert "StableDiffusion" in (tmp_path / "real" / "model_index.json").read_text()
    (tmp_path / "file.safetensors").symlink_to(tmp_path / "new" / "x.safetensors")
    convert(run[0], "--to=kohya", "--output=~/file.safetensors")
    assert (tmp_path / "new" / "x.safetensors").is_file()
    with pytest.raises(UserError, match="SOURCE: no file '~nobody/x"):
        find_lora("~nobody/x", "SOURCE")


def test_the_work_begins_only_if_the_output_can_be_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "merged_pipeline", None)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output: cannot write"):
        conversion.convert_lora(str(run[0]), None, TINY, None, tmp_path / "file" / "model")


def test_merging_a_text_encoder():
    name = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    layer = StableDiffusionPipeline.from_pretrained(TINY).text_encoder.encoder.layers[0].mlp.fc1
    out, inside = layer.weight.shape
    module = LoraModule(torch.ones(2, inside), torch.ones(out, 2), 3.0)
    pipe = merged_pipeline(LoraWeights({name: module}, {}, ()), TINY, torch.float32)
    merged = pipe.text_encoder.encoder.layers[0].mlp.fc1
    torch.testing.assert_close(merged.weight, layer.weight.float() + 3)
    second = LoraWeights({name.replace("encoder.text", "encoder_2.text"): module}, {}, ())
    with pytest.raises(
        UserError, match="--base: .*another model: text_encoder_2.* is missing here"
    ):
        merged_pipeline(second, TINY)


def test_a_lora_of_another_model(run, tmp_path):
    lora = read_lora_file(run[0] / LORA_FILE, "SOURCE")
    sdxl = model_folder("sdxl")
    with pytest.raises(UserError, match="--base: the LoRA is of another model: .* missing here"):
        merged_pipeline(lora, sdxl)
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    wide = LoraWeights({name: LoraModule(torch.ones(2, 2048), torch.ones(64, 2), 2.0)}, {}, ())
    with pytest.raises(UserError, match=f"--base: .*another model: {name} is .* but .*2048"):
        merged_pipeline(wide, TINY)
    with pytest.raises(UserError, match="--base: no file"):
        merged_pipeline(lora, str(tmp_path))
    shutil.copy(f"{TINY}/model_index.json", tmp_path)
    (tmp_path / "unet").mkdir()
    shutil.copy(f"{TINY}/unet/config.json", tmp_path / "unet")
    with pytest.raises(UserError, match="--dtype: say in which.*diffusion_pytorch_model"):
        merged_pipeline(lora, str(tmp_path))
    with pytest.raises(UserError, match="--base: .*cannot be loaded"):
        merged_pipeline(lora, str(tmp_path), torch.float32)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match="--base: .* is a FluxPipeline, not an SD1.5 or SDXL"):
        merged_pipeline(lora, str(tmp_path))


def test_only_complete_output_appears(tmp_path):
    file, folder = tmp_path / "x.safetensors", tmp_path / "x"
    for path, mark in ((file, None), (folder, "mark")):
        with pytest.raises(ZeroDivisionError), new_output(path) as partial:
            partial.mkdir() if mark else partial.write_bytes(b"half")
            raise ZeroDivisionError
        refused = pytest.raises(UserError, match=f"--output: cannot write {path} .*disk full")
        with refused, new_output(path) as partial:
            partial.write_bytes(b"half")
            raise OSError("disk full")
        assert not list(tmp_path.iterdir())
    for content in (b"1", b"2"):  # a new one takes the place of the old
        with new_output(file) as partial:
            partial.write_bytes(content)
        with new_output(folder) as partial:
            partial.mkdir()
            (partial / "mark").write_bytes(content)
    assert file.read_bytes() == (folder / "mark").read_bytes() == b"2"
    assert len(list(tmp_path.iterdir())) == 2


def test_output_that_may_be_written(tmp_path):
    file, folder = tmp_path / "x.safetensors", tmp_path / "x"
    check_output(file, None, overwrite=False)
    check_output(folder, "mark", overwrite=False)
    with pytest.raises(UserError, match=r"--output: .* must end in \.safetensors"):
        check_output(folder, None, overwrite=True)
    with pytest.raises(UserError, match="--output: .* must be a folder"):
        check_output(file, "mark", overwrite=True)
    file.touch()
    folder.mkdir()
    for path, mark in ((file, None), (folder, "mark")):
        with pytest.raises(UserError, match="--output: .* exists; .*--overwrite"):
            check_output(path, mark, overwrite=False)
    check_output(file, None, overwrite=True)
    with pytest.raises(UserError, match="--output: .* holds something else"):
        check_output(folder, "mark", overwrite=True)
    (folder / "mark").touch()
    check_output(folder, "mark", overwrite=True)


def test_the_only_file_of_a_folder(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "a.safetensors").touch()
    assert find_lora(str(tmp_path), "SOURCE") == tmp_path / "a.safetensors"
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(UserError, match=r"^SOURCE: which .*: /a.safetensors, b.safetensors$"):
        find_lora(str(tmp_path), "SOURCE")
    (tmp_path / LORA_FILE).touch()
    assert find_lora(str(tmp_path), "SOURCE") == tmp_path / LORA_FILE


REPO = {
    "sd15/gradspo.safetensors",
    "sdxl/x_diffusers.safetensors",
    "sdxl/x_webui.safetensors",
    "run/" + LORA_FILE,
    "run/ema.safetensors",
    "peft/adapter_model.safetensors",
    "peft/adapter_config.json",
}


@pytest.fixture
def downloads(monkeypatch):
    """A Hub with one repo, user/repo; the list of what was downloaded from it."""
    found = []

    def resolve(spec, key):
        found.append(spec.removeprefix("hf://user/repo/"))
        assert found[-1] in REPO
        return Path(spec)

    monkeypatch.setattr(find, "list_files", lambda repo, key: sorted(REPO))
    monkeypatch.setattr(find, "resolve_file", resolve)
    return found


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("user/repo/sd15", "sd15/gradspo.safetensors"),
        ("hf://user/repo/run/", f"run/{LORA_FILE}"),
        ("user/repo/sdxl/x_webui.safetensors", "sdxl/x_webui.safetensors"),
        ("user/repo/peft", "peft/adapter_model.safetensors"),
    ],
)
def test_finding_in_a_repo(downloads, spec, expected):
    find_lora(spec, "SOURCE")
    assert downloads[-1] == expected
    assert ("peft/adapter_config.json" in downloads) == ("peft" in spec)


def test_a_repo_with_several(downloads):
    with pytest.raises(UserError, match=r"user/repo/sdxl\? .*/x_diffusers.* x_webui.safetensors$"):
        find_lora("user/repo/sdxl", "SOURCE")
    with pytest.raises(UserError, match=r"SOURCE: .*sd15/gradspo.safetensors, sdxl/x_diffusers"):
        find_lora("user/repo", "SOURCE")
    assert downloads == []


def test_listing_a_repo(monkeypatch, tmp_path):
    def fail(error):
        def raise_it(*_, **__):
            raise error

        return raise_it

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = tmp_path / "models--user--repo" / "snapshots" / ("0" * 40)
    (commit / "sub").mkdir(parents=True)
    (commit / "sub" / "a.safetensors").touch()
    monkeypatch.setattr(hub.HfApi, "list_repo_files", fail(ConnectionError("no line")))
    assert hub.list_files("user/repo", "SOURCE", commit.name) == ["sub/a.safetensors"]
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text(commit.name)
    assert hub.list_files("user/repo", "SOURCE") == ["sub/a.safetensors"]
    shutil.rmtree(commit)
    with pytest.raises(UserError, match="SOURCE: user/repo: not in the local cache, .*no line"):
        hub.list_files("user/repo", "SOURCE")
    missing = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    monkeypatch.setattr(hub.HfApi, "list_repo_files", fail(missing))
    with pytest.raises(UserError, match="SOURCE: user/repo: not found .404.: there is no"):
        hub.list_files("user/repo", "SOURCE")


def test_the_cache_is_enough_without_a_network(tmp_path, monkeypatch):
    repo = tmp_path / "models--user--lora"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    file = repo / "snapshots" / ("0" * 40) / "sd15" / "x.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_lora("user/lora/sd15", "SOURCE") == file
    with pytest.raises(UserError, match="SOURCE: user/other: not in the local cache"):
        find_lora("user/other", "SOURCE")
