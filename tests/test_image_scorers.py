"""Every scorer by name, on finished images and on candidates, and scorers of a user's own."""

import importlib
import inspect
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from finished_images import CPU, PROMPTS, check, load, pictures, score, tiny_scorers
from helpers import COLLECT, randn
from PIL import Image
from scorers_for_tests import ImageBrightness
from transformers import AutoTokenizer, CLIPModel

import spo
from spo.errors import UserError
from spo.method.collect import score_candidates
from spo.plugins import find
from spo.scorers import (
    SCORERS,
    ImageScorer,
    Scorer,
    candidate_scorer,
    check_scorer,
    load_scorer,
)
from spo.scorers.pixels import to_pil, unit_pixels
from spo.types import Candidates, Transition

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets" / "tiny"
CLIP = str(TINY / "clip")
NAMES = [name for name in SCORERS if name != "latent_reward"]  # see tests/test_latent_reward.py


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Returns options for each scorer that name tiny local models."""
    return tiny_scorers(tmp_path_factory.mktemp("scorers"))


def clip_pixels(image, size=32):
    """A CLIP's pixels of an image, as OpenAI's code computes them: PIL resizes, the centre is kept."""
    short, (width, height) = min(image.size), image.size
    image = image.resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    unit = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float64) / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return torch.tensor((unit - mean) / std, dtype=torch.float32).permute(2, 0, 1)


def test_pickscore(options):
    images = pictures()
    clip = CLIPModel.from_pretrained(CLIP).eval()
    tokenizer = AutoTokenizer.from_pretrained(CLIP)
    tokens = tokenizer(list(PROMPTS), padding="max_length", truncation=True, return_tensors="pt")
    assert tokens.input_ids.shape == (3, 16)
    pixels = torch.stack([clip_pixels(image) for image in images])
    with torch.no_grad():
        expected = clip(input_ids=tokens.input_ids, pixel_values=pixels).logits_per_image.diag()
    scorer = load("pickscore", options["pickscore"])
    found = scorer.score_images(images, PROMPTS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    prepared = scorer.inputs.image_processor(images=images, return_tensors="pt").pixel_values
    torch.testing.assert_close(prepared, pixels, rtol=0, atol=1e-6)  # a grey level is 0.015
    assert (scorer.title, scorer.scale) == ("PickScore", 1)


def test_the_step_aware_one_scores_at_zero(options):
    images = pictures()
    source = candidate_scorer(
        "step_aware_clip", **options["step_aware_clip"], dtype="float32", kwargs={}
    )
    spm = load_scorer(source, CPU)
    features = spm.encode_prompts(PROMPTS)
    at = {t: [] for t in (0, 1)}
    for i, image in enumerate(images):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
        for t in at:
            at[t].append(spm.score(pixels, features[i : i + 1], t))
    scorer = load("step_aware_clip", options["step_aware_clip"])
    found = scorer.score_images(images, PROMPTS)
    torch.testing.assert_close(found, torch.cat(at[0]), rtol=0, atol=1e-4)
    assert (found - torch.cat(at[1])).abs().max() > 1e-3
    assert (scorer.title, scorer.scale) == ("SPM (t = 0)", 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_score_is_of_one_image_and_its_prompt(options, name):
    check(name, options[name])
    scorer = load(name, options[name])
    images = pictures()
    found = scorer.score_images(images, PROMPTS)
    assert found.shape == (3,) and found.dtype == torch.float32 and found.device == CPU
    assert not found.requires_grad
    alone = torch.cat([scorer.score_images([i], [p]) for i, p in zip(images, PROMPTS, strict=True)])
    torch.testing.assert_close(alone, found, rtol=0, atol=1e-5)
    again = scorer.score_images(images[::-1], PROMPTS[::-1]).flip(0)
    torch.testing.assert_close(again, found, rtol=0, atol=1e-5)
    if name != "clipscore":  # which is 0 for what does not fit at all
        assert len(set(found.tolist())) == 3


@pytest.mark.parametrize("name", NAMES)
def test_any_mode_of_an_image_will_do(options, name):
    scorer = load(name, options[name])
    (image,) = pictures([(50, 40)])
    grey = image.convert("L")
    clear = image.copy()
    clear.putalpha(255)
    expected = scorer.score_images([image, grey.convert("RGB")], PROMPTS[:2])
    found = scorer.score_images([clear, grey], PROMPTS[:2])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class Trap:
    """Creates a file if its pickle is run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


FILES = [
    (name, option)
    for name in NAMES
    for option in ("checkpoint", "head")
    if option in inspect.signature(find(SCORERS[name], {}, "scorers")).parameters
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
            load(name, options[name] | {option: str(path)})
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match=rf"{said}no file .*missing\.pt"):
        load(name, options[name] | {option: str(tmp_path / "missing.pt")})
    with pytest.raises(UserError, match=rf"{said}no file .*missing\.pt"):
        check(name, options[name] | {option: str(tmp_path / "missing.pt")})


def test_an_spm_of_another_architecture(options, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(TINY / "spm.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "t_embedder" not in k}, tmp_path / "s.safetensors"
    )
    changed = options["step_aware_clip"] | {"checkpoint": str(tmp_path / "s.safetensors")}
    message = r"_clip\.checkpoint: .* does not fit scorer_options\.step_aware_clip\.backbone"
    with pytest.raises(UserError, match=message):
        load("step_aware_clip", changed)


@pytest.mark.parametrize(
    ("name", "option"),
    [(n, o) for n in ("pickscore", "step_aware_clip") for o in ("backbone", "processor")],
)
def test_missing_folders_are_named(options, name, option):
    changed = options[name] | {option: "./no_such"}
    for use in (check, load):
        with pytest.raises(UserError, match=rf"scorer_options\.{name}\.{option}: '\./no_such'"):
            use(name, changed)


class Brightness(ImageScorer):
    title, scale = "Brightness", 10.0

    def __init__(self, device, weight):
        self.weight = weight

    def score_images(self, images, prompts):
        return torch.tensor([self.weight * i.convert("L").getpixel((0, 0)) for i in images])


def test_a_scorer_by_its_dotted_path():
    name, images = f"{__name__}:Brightness", pictures()
    check(name, {"weight": 2})
    expected = torch.tensor([2 * i.convert("L").getpixel((0, 0)) for i in images])
    assert torch.equal(score(name, {"weight": 2}, images), expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "hpsv3",
            {},
            r"scorers: 'hpsv3' is none of step_aware_clip, pickscore, hpsv2, hpsv2\.1, aesthetic, ",
        ),
        ("no_such_module:make", {}, r"scorers: cannot import 'no_such_module:make'"),
        (f"{__name__}:no_such", {}, r"scorers: cannot import .*no_such"),
        (f"{__name__}:Brightness", {}, r"scorer_options\..*Brightness: .*weight"),
        (f"{__name__}:Brightness", {"weight": 1, "no": 2}, r"scorer_options\..*Brightness: .*'no'"),
        ("pickscore", {"checkpoint": "x.pt"}, r"scorer_options\.pickscore: .*'checkpoint'"),
        ("hpsv2.1", {"device": "cuda"}, r"scorer_options\.hpsv2\.1: .*'device'"),
    ],
)
def test_names_and_options_that_there_are_not(name, options, message):
    for use in (check, load):
        with pytest.raises(UserError, match=message):
            use(name, options)


def test_what_is_not_used_is_not_imported(options):
    """open_clip takes seconds to import, and candidates are scored without it by default."""
    with patch.dict(sys.modules), patch.object(spo, "scorers", spo.scorers):
        for module in [name for name in sys.modules if name.startswith("spo.scorers")]:
            del sys.modules[module]
        sys.modules["open_clip"] = None
        fresh = importlib.import_module("spo.scorers")
        assert fresh.SCORERS == SCORERS
        source = fresh.candidate_scorer(
            "step_aware_clip", **options["step_aware_clip"], dtype="float32", kwargs={}
        )
        fresh.check_scorer(source)
        fresh.load_scorer(source, CPU)
        loaded = {name for name in sys.modules if name.startswith("spo.scorers.")}
        others = ("open_clip", "imagereward")
        assert "spo.scorers.step_aware_clip" in loaded
        assert not loaded & {f"spo.scorers.{name}" for name in others}
        with pytest.raises(ImportError):
            fresh.check_scorer(fresh.image_scorer("clipscore", {}))


class TensorBrightness(Scorer):
    def encode_prompts(self, prompts):
        return torch.arange(len(prompts))

    def score(self, images, prompt_features, timestep):
        return images.mean(dim=(1, 2, 3)) / 2 + 0.5


class PILBrightness(ImageScorer):
    title = "PIL"

    def score_images(self, images, prompts):
        return ImageBrightness().score_images(images, prompts)


def of_tensors(device):
    return TensorBrightness()


def of_images(device):
    return PILBrightness()


@pytest.mark.parametrize(
    ("factory", "title", "scale", "line"),
    [
        (f"{__name__}:of_tensors", f"{__name__}:of_tensors", 1, (1, 0)),
        (f"{__name__}:of_images", "PIL", 1, (1, 0)),
        ("scorers_for_tests:brightness", "scorers_for_tests:brightness", 1, (200, -100)),
        ("scorers_for_tests:image_brightness", "Brightness", 100, (1, 0)),
    ],
)
def test_every_kind_of_scorer_takes_finished_images_and_candidates(factory, title, scale, line):
    """Each scores a * brightness + b, with (a, b) = `line` and the brightness in [0, 1]."""
    images, (a, b) = pictures([(64, 64)] * 3), line
    brightness = torch.tensor([np.asarray(image).mean() / 255 for image in images])
    expected = (a * brightness + b).float()
    scorer = load(factory, {})
    assert (scorer.title, scorer.scale, dict(scorer.tokenizers)) == (title, scale, {})
    found = scorer.score_images(images, PROMPTS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    scorer = load_scorer(candidate_scorer(factory, {}), CPU)
    pixels = torch.stack([unit_pixels(image) * 2 - 1 for image in images])
    rows = torch.tensor([2, 0, 0])
    with torch.no_grad():
        found = scorer.score(pixels, scorer.encode_prompts(PROMPTS)[rows], 951)
    expected = expected * (scale if isinstance(scorer, ImageScorer) else 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"compile\.scorer: .* has no method `compile`"):
        scorer.compile()


@pytest.mark.parametrize("name", NAMES)
def test_all_score_the_candidates_of_a_rollout(options, name, sd15):
    """Scorers of PIL images give candidates the scores of the same images, finished and scaled."""
    own = name in ("step_aware_clip", "pickscore")
    paths = options[name] if own else {"backbone": "", "processor": ""}
    values = {"checkpoint": "", "dtype": "float32", "kwargs": {} if own else options[name]} | paths
    source = candidate_scorer(name, **values)
    check_scorer(source)
    scorer = load_scorer(source, CPU)
    candidates = Candidates((), randn(2, 2, *sd15.latent_shape, seed=0), 501, is_final=False)
    features = scorer.encode_prompts(PROMPTS[:2])
    found = score_candidates(candidates, sd15.decode_candidates, scorer, features, COLLECT)
    assert found.shape == (2, 2) and found.isfinite().all()
    for k in range(2) if not own else ():  # which prepare tensors otherwise than PIL images
        images = to_pil(sd15.decode_candidates(candidates.latents[k]))
        expected = scorer.scale * scorer.score_images(images, PROMPTS[:2])
        torch.testing.assert_close(found[k], expected, rtol=0, atol=1e-4)


def test_options_of_a_candidate_scorer_are_named(options):
    def source(name, **kwargs):
        return candidate_scorer(name, kwargs)

    for kwargs, message in (
        ({"no_such": 1}, r"preference\.kwargs: hpsv2 takes other options: .*no_such"),
        ({"checkpoint": 1}, r"preference\.kwargs\.checkpoint: 1 is none like 'hf://"),
        (options["hpsv2"] | {"checkpoint": "no.pt"}, r"preference\.kwargs\.checkpoint: no file"),
        (options["hpsv2"] | {"model": "no"}, r"preference\.kwargs\.model: 'no' is neither"),
    ):
        for use in (check_scorer, lambda source: load_scorer(source, CPU)):
            with pytest.raises(UserError, match=message):
                use(source("hpsv2", **kwargs))


class LatentMean(Scorer):
    looks_at = "latents"

    def encode_prompts(self, prompts):
        return torch.zeros(len(prompts))

    def score(self, images, prompt_features, timestep):
        return images.mean(dim=(1, 2, 3)) + timestep + prompt_features


def latent_mean(device):
    return LatentMean()


latent_mean.looks_at = "latents"


def of_unsaid_kind(device):
    return LatentMean()


def test_a_function_says_what_its_scorer_looks_at():
    with pytest.raises(UserError, match=r"looks at latents; name its class, or .*'latents'"):
        load_scorer(candidate_scorer(f"{__name__}:of_unsaid_kind", {}), CPU)


def test_a_scorer_of_latents_sees_the_noisy_ones():
    scorer = load_scorer(candidate_scorer(f"{__name__}:latent_mean", {}), CPU)
    x0, noisy = randn(2, 3, 4, 8, 8, seed=0), randn(2, 3, 4, 8, 8, seed=1)
    transition = Transition(501, 451, x0[:1], x0, noisy, x0[:1])
    candidates = Candidates((transition,), x0, 451, is_final=False)
    features = scorer.encode_prompts(PROMPTS)
    for told, timestep in (("t", 501), ("next", 451)):
        settings = replace(COLLECT, score_timestep=told)
        found = score_candidates(candidates, None, scorer, features, settings)
        torch.testing.assert_close(found, noisy.mean(dim=(2, 3, 4)) + timestep)
    with pytest.raises(UserError, match="latent_mean looks at latents, not at finished images"):
        scorer.score_images(pictures(), PROMPTS)


def test_the_latent_reward_model_scores_no_finished_images():
    message = "scorers: latent_reward looks at latents, not at finished images"
    with pytest.raises(UserError, match=message):
        check("latent_reward", {})


def nothing(device):
    return device


def test_an_object_that_is_no_scorer():
    with pytest.raises(UserError, match=r"scorers: a device is no spo\.scorers\.Scorer"):
        load(f"{__name__}:nothing", {})
