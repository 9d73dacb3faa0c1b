"""Files that would run code where they are unpickled: they are refused in one line, and run nothing."""

import os
import shutil
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from helpers import MODELS, add_tiny_lora, model_folder, scorer_source

from spo.errors import UserError
from spo.lora_io.find import read_folded, read_lora
from spo.lora_io.model_spec import read_specs
from spo.models.backbone import Backbone
from spo.models.loading import ModelSource
from spo.preference.pair_recipe import SPMSource, build_spm
from spo.scorers import load_scorer
from spo.scorers.state_dicts import read_state_dict

CPU = torch.device("cpu")
CLIP = str(MODELS / "tiny-clip")


class Trap:
    """Makes the folder `path` where its pickle is run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.makedirs, (str(self.path), 0o777, True)


@pytest.fixture
def trap(tmp_path):
    """A function that puts a trap in the place of a file; afterwards none was sprung."""
    sprung = tmp_path / "sprung"

    def put(path, legacy=False):
        content = {"state_dict": {"weight": Trap(sprung)}, "weight": Trap(sprung)}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        return path

    torch.load(put(tmp_path / "try.pt"), weights_only=False)
    sprung.rmdir()  # the files would do it
    yield put
    assert not sprung.exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".safetensors"])
def test_preference_models(trap, tmp_path, suffix, legacy):
    path = trap(tmp_path / f"spm{suffix}", legacy)
    with pytest.raises(UserError, match=r"preference\.checkpoint: .*cannot be read"):
        load_scorer(scorer_source("step_aware_clip", checkpoint=str(path)), CPU)
    with pytest.raises(UserError, match=r"preference\.init_from: .*cannot be read"):
        build_spm(SPMSource(CLIP, CLIP, str(path)), seed=0, gradient_checkpointing=False)
    with pytest.raises(UserError, match=r"any\.key: .*cannot be read"):
        read_state_dict(path, "any.key")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".safetensors"])
def test_loras(trap, tmp_path, own_backbone, suffix):
    backbone = own_backbone("sd15")
    path = trap(tmp_path / f"lora{suffix}")
    reason = "cannot be read as a LoRA" if suffix == ".safetensors" else "is no .safetensors file"
    with pytest.raises(UserError, match=f"lora.init_from: .*{reason}"):
        read_lora(path, add_tiny_lora(backbone), "lora.init_from")
    (spec,) = read_specs([f"x={path}"], ModelSource(model_folder("sd15")), "sd15", "models")
    with pytest.raises(UserError, match=f"models: .*{reason}"):
        read_folded(spec.loras[0][0], backbone, "models")


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_base_models(trap, tmp_path, part, suffix):
    folder = tmp_path / "model"
    shutil.copytree(model_folder("sd15"), folder)
    (weights,) = (folder / part).glob("*.safetensors")
    weights.unlink()
    stem = weights.stem if suffix == ".safetensors" or part != "text_encoder" else "pytorch_model"
    trap(weights.with_name(stem + suffix))
    with pytest.raises(UserError, match="pretrained: .* cannot be loaded"):
        Backbone(ModelSource(str(folder)), "sd15", "no", CPU)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_clip(trap, tmp_path, name):
    folder = tmp_path / "clip"
    shutil.copytree(CLIP, folder)
    for weights in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        weights.unlink()
    trap(folder / name)
    with pytest.raises(UserError, match=r"preference\.backbone: .* cannot be loaded"):
        load_scorer(scorer_source("pickscore", backbone=str(folder)), CPU)


def test_small_files_that_grow(tmp_path):
    tensors, compressed = {"w": torch.zeros(5_000_000)}, tmp_path / "compressed.bin"
    torch.save(tensors, tmp_path / "plain.bin")
    with ZipFile(tmp_path / "plain.bin") as plain, ZipFile(compressed, "w", ZIP_DEFLATED) as zipped:
        for entry in plain.infolist():
            zipped.writestr(entry.filename, plain.read(entry))
    assert compressed.stat().st_size < 100_000
    assert torch.load(compressed, weights_only=True)["w"].shape == (5_000_000,)
    with pytest.raises(UserError, match=r"any\.key: .*compressed, .* would grow to 20,000,"):
        read_state_dict(compressed, "any.key")
    torch.save({"w": torch.zeros(1).expand(10**9)}, tmp_path / "expanded.bin")
    with pytest.raises(UserError, match=r"fewer numbers than its w \(1000000000,\) needs"):
        read_state_dict(tmp_path / "expanded.bin", "any.key")
    shared = torch.arange(6.0)
    sound = {"a": shared, "b": shared, "c": shared[2:4], "d": shared.view(2, 3).t()}
    torch.save(sound, tmp_path / "sound.bin")
    found = read_state_dict(tmp_path / "sound.bin", "any.key")
    assert all(torch.equal(found[name], tensor) for name, tensor in sound.items())
    clip = shutil.copytree(CLIP, tmp_path / "clip")
    (clip / "model.safetensors").unlink()
    compressed.rename(clip / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"preference\.backbone: .*pytorch_model.bin is compressed"):
        load_scorer(scorer_source("pickscore", backbone=str(clip)), CPU)
