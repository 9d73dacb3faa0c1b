"""Scorers of finished images by name: PickScore, the SPM at t = 0, and what all have in common."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from finished_images import CPU, PROMPTS, pictures, score, tiny_open_clip
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from spo.errors import UserError
from spo.scorers import ScorerSource, load_scorer
from spo.scorers.image_scorers import SCORERS, check_image_scorer, load_image_scorer

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets" / "tiny"
CLIP = str(TINY / "clip")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """For each scorer, options that name tiny local models."""
    folder = tiny_open_clip(tmp_path_factory.mktemp("clip") / "tiny")
    recorded = ROOT / "tests" / "data" / "imagereward"
    head = folder.parent / "head.pth"
    torch.save({"weight": torch.linspace(-1, 1, 16)[None], "bias": torch.ones(1)}, head)
    open_clip = {"model": str(folder), "checkpoint": str(folder / "open_clip_model.safetensors")}
    return {
        "pickscore": {"backbone": CLIP, "processor": CLIP},
        "hpsv2": open_clip,
        "hpsv2.1": open_clip,
        "aesthetic": open_clip | {"head": str(head)},
        "clipscore": open_clip,
        "imagereward": {
            "checkpoint": str(recorded / "ImageReward.pt"),
            "tokenizer": str(recorded),
            "head_width": 8,
        },
        "step_aware_clip": {
            "checkpoint": str(TINY / "spm.safetensors"),
            "backbone": CLIP,
            "processor": CLIP,
        },
    }


def test_pickscore(options):
    images = pictures()
    clip = CLIPModel.from_pretrained(CLIP).eval()
    tokenizer = AutoTokenizer.from_pretrained(CLIP)
    tokens = tokenizer(list(PROMPTS), padding="max_length", truncation=True, return_tensors="pt")
    assert tokens.input_ids.shape == (3, 16)
    prepare = CLIPImageProcessor.from_pretrained(CLIP)
    pixels = torch.cat([prepare(images=i, return_tensors="pt").pixel_values for i in images])
    with torch.no_grad():
        expected = clip(input_ids=tokens.input_ids, pixel_values=pixels).logits_per_image.diag()
    scorer = load_image_scorer("pickscore", options["pickscore"], CPU)
    found = scorer.score(images, PROMPTS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (scorer.title, scorer.scale) == ("PickScore", 1)


def test_the_step_aware_one_scores_at_zero(options):
    images = pictures()
    source = ScorerSource(
        "step_aware_clip", **options["step_aware_clip"], dtype="float32", kwargs={}
    )
    spm = load_scorer(source, CPU)
    features = spm.encode_prompts(PROMPTS)
    at = {t: [] for t in (0, 1)}
    for i, image in enumerate(images):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
        for t in at:
            at[t].append(spm.score(pixels, features[i : i + 1], t))
    scorer = load_image_scorer("step_aware_clip", options["step_aware_clip"], CPU)
    found = scorer.score(images, PROMPTS)
    torch.testing.assert_close(found, torch.cat(at[0]), rtol=0, atol=1e-4)
    assert (found - torch.cat(at[1])).abs().max() > 1e-3
    assert (scorer.title, scorer.scale) == ("SPM (t = 0)", 1)


@pytest.mark.parametrize("name", SCORERS)
def test_a_score_is_of_one_image_and_its_prompt(options, name):
    check_image_scorer(name, options[name])
    scorer = load_image_scorer(name, options[name], CPU)
    images = pictures()
    found = scorer.score(images, PROMPTS)
    assert found.shape == (3,) and found.dtype == torch.float32 and found.device == CPU
    assert not found.requires_grad
    alone = torch.cat([scorer.score([i], [p]) for i, p in zip(images, PROMPTS, strict=True)])
    torch.testing.assert_close(alone, found, rtol=0, atol=1e-5)
    again = scorer.score(images[::-1], PROMPTS[::-1]).flip(0)
    torch.testing.assert_close(again, found, rtol=0, atol=1e-5)
    if name != "clipscore":  # which is 0 for what does not fit at all
        assert len(set(found.tolist())) == 3


@pytest.mark.parametrize("name", SCORERS)
def test_any_mode_of_an_image_will_do(options, name):
    scorer = load_image_scorer(name, options[name], CPU)
    (image,) = pictures([(50, 40)])
    grey = image.convert("L")
    clear = image.copy()
    clear.putalpha(255)
    expected = scorer.score([image, grey.convert("RGB")], PROMPTS[:2])
    found = scorer.score([clear, grey], PROMPTS[:2])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class Trap:
    """Creates a file where its pickle is run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


FILES = [
    (name, option)
    for name in SCORERS
    for option in ("checkpoint", "head")
    if option in SCORERS[name].__kwdefaults__
]


@pytest.mark.parametrize(("name", "option"), FILES)
def test_bad_files_are_named_and_not_run(tmp_path, options, name, option):
    said = rf"scorer_options\.{name}\.{option}: "
    whole = Path(options[name][option]).read_bytes()
    bad = {"trap.pt": None, "cut.pt": whole[: len(whole) // 2], "list.pt": None, "empty.pt": b""}
    for file, content in bad.items():
        path = tmp_path / file
        if content is not None:
            path.write_bytes(content)
        else:
            torch.save([1] if file == "list.pt" else {"state_dict": Trap(tmp_path / "ran")}, path)
        with pytest.raises(UserError, match=rf"{said}.*{file}"):
            load_image_scorer(name, options[name] | {option: str(path)}, CPU)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match=rf"{said}no file .*missing\.pt"):
        load_image_scorer(name, options[name] | {option: str(tmp_path / "missing.pt")}, CPU)
    with pytest.raises(UserError, match=rf"{said}no file .*missing\.pt"):
        check_image_scorer(name, options[name] | {option: str(tmp_path / "missing.pt")})


def test_an_spm_of_another_architecture(options, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(TINY / "spm.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "t_embedder" not in k}, tmp_path / "s.safetensors"
    )
    changed = options["step_aware_clip"] | {"checkpoint": str(tmp_path / "s.safetensors")}
    message = r"_clip\.checkpoint: .* does not fit scorer_options\.step_aware_clip\.backbone"
    with pytest.raises(UserError, match=message):
        load_image_scorer("step_aware_clip", changed, CPU)


@pytest.mark.parametrize(
    ("name", "option"),
    [(n, o) for n in ("pickscore", "step_aware_clip") for o in ("backbone", "processor")],
)
def test_missing_folders_are_named(options, name, option):
    changed = options[name] | {option: "./no_such"}
    for use in (check_image_scorer, lambda *which: load_image_scorer(*which, CPU)):
        with pytest.raises(UserError, match=rf"scorer_options\.{name}\.{option}: '\./no_such'"):
            use(name, changed)


class Brightness:
    title, scale = "Brightness", 10.0

    def __init__(self, device, weight):
        self.weight = weight

    def score(self, images, prompts):
        return torch.tensor([self.weight * i.convert("L").getpixel((0, 0)) for i in images])


def test_a_scorer_by_its_dotted_path():
    name, images = f"{__name__}:Brightness", pictures()
    check_image_scorer(name, {"weight": 2})
    expected = torch.tensor([2 * i.convert("L").getpixel((0, 0)) for i in images])
    assert torch.equal(score(name, {"weight": 2}, images), expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hpsv3", {}, r"scorers: 'hpsv3' is none of pickscore, hpsv2, hpsv2\.1, aesthetic, "),
        ("no_such_module:make", {}, r"scorers: cannot import 'no_such_module:make'"),
        (f"{__name__}:no_such", {}, r"scorers: cannot import .*no_such"),
        (f"{__name__}:Brightness", {}, r"scorer_options\..*Brightness: .*weight"),
        (f"{__name__}:Brightness", {"weight": 1, "no": 2}, r"scorer_options\..*Brightness: .*'no'"),
        ("pickscore", {"checkpoint": "x.pt"}, r"scorer_options\.pickscore: .*'checkpoint'"),
        ("hpsv2.1", {"device": "cuda"}, r"scorer_options\.hpsv2\.1: .*'device'"),
    ],
)
def test_names_and_options_that_there_are_not(name, options, message):
    for use in (check_image_scorer, lambda *which: load_image_scorer(*which, CPU)):
        with pytest.raises(UserError, match=message):
            use(name, options)


def test_the_table_does_without_open_clip(monkeypatch):
    """Which takes seconds to import, and is not needed by every scorer."""
    for module in [name for name in sys.modules if name.startswith("spo.scorers.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    imported = importlib.import_module("spo.scorers.image_scorers")
    assert imported.SCORERS.keys() == SCORERS.keys()
    with pytest.raises(ImportError):
        imported.check_image_scorer("clipscore", {})
