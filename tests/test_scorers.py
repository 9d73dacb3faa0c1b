"""Scorers of candidates: image preparation by hand, CLIP's own scores, and scorers by name."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import MODELS, PROMPTS, randn, scorer_source
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from spo.errors import UserError
from spo.scorers import Scorer, check_scorer, load_scorer
from spo.scorers.clip import ImagePreparation
from spo.scorers.pixels import to_pil

CPU = torch.device("cpu")
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PREPARE = ImagePreparation(32, MEAN, STD)


@pytest.fixture
def processor_with(tmp_path):
    """A function that makes the tiny CLIP's folder with changes of one of its files; None deletes."""

    def make(file, **changes):
        folder = tmp_path / "processor"
        shutil.copytree(MODELS / "tiny-clip", folder, dirs_exist_ok=True)
        values = json.loads((folder / file).read_text()) | changes
        kept = {name: value for name, value in values.items() if value is not None}
        (folder / file).write_text(json.dumps(kept))
        return str(folder)

    return make


def normalised(images):
    """Returns CLIP's pixels of images in [-1, 1] that have the right size, computed in numpy."""
    unit = np.clip(images.numpy().astype(np.float64) / 2 + 0.5, 0, 1)
    return (unit - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]


def halved(images):
    """Returns images at half the size: bicubic (a = -0.75), no antialiasing, taps at 0.5 and 1.5."""
    taps = torch.tensor([-0.09375, 0.59375, 0.59375, -0.09375])
    kernel = torch.outer(taps, taps).expand(3, 1, 4, 4)
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, stride=2, groups=3)


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(64, 64, (0, 32), (0, 32)), (64, 128, (0, 32), (16, 48)), (96, 64, (8, 40), (0, 32))],
)
def test_preparation_at_half_the_size(height, width, rows, columns):
    images = randn(2, 3, height, width, seed=0)  # a third of it outside [-1, 1]
    expected = normalised(halved(images)[..., slice(*rows), slice(*columns)])
    np.testing.assert_allclose(PREPARE(images).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [
        # Official offsets, int(round(margin / 2.0)): of 299 - 224, 327 - 224, 297 - 224.
        (384, 512, 0, 38),
        (512, 384, 38, 0),
        (832, 1216, 0, 52),
        (1216, 832, 52, 0),
        (224, 297, 0, 36),
        (512, 512, 0, 0),
    ],
)
def test_the_centre_where_the_margin_is_odd(height, width, rows, columns):
    images, size = randn(1, 3, height, width, seed=0), 224
    short = min(height, width)
    shape = (round(size * height / short), round(size * width / short))
    resized = F.interpolate(images, shape, mode="bicubic", align_corners=False)
    expected = normalised(resized[..., rows : rows + size, columns : columns + size])
    found = ImagePreparation(size, MEAN, STD)(images)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "crop", "resized"),
    [
        (32, 32, (32, 64)),
        ({"height": 32, "width": 32}, {"height": 32, "width": 32}, (32, 32)),
        ({"height": 40, "width": 48}, 32, (40, 48)),
        ({"shortest_edge": 48}, {"height": 32, "width": 32}, (48, 96)),
    ],
)
def test_the_processors_sizes(processor_with, size, crop, resized):
    folder = processor_with("preprocessor_config.json", size=size, crop_size=crop)
    images = randn(2, 3, 48, 96, seed=0).clamp(-1, 1)
    whole = F.interpolate(images, resized, mode="bicubic", align_corners=False)
    top, left = (resized[0] - 32) // 2, (resized[1] - 32) // 2
    expected = normalised(whole[..., top : top + 32, left : left + 32])
    scorer = load_scorer(scorer_source("pickscore", processor=folder), CPU)
    np.testing.assert_allclose(scorer.inputs.prepare(images).numpy(), expected, atol=1e-5)
    finished = scorer.score_images(to_pil(images), PROMPTS[:2])  # prepared by the processor itself
    assert finished.shape == (2,) and finished.isfinite().all()


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("preprocessor_config.json", {"size": {"longest_edge": 32}}, "cannot be loaded"),
        ("preprocessor_config.json", {"size": {"height": 32, "width": 16}}, "cuts no square"),
        ("preprocessor_config.json", {"do_center_crop": False}, "cuts no square"),
        ("preprocessor_config.json", {"size": 24}, "cuts no square"),
        ("preprocessor_config.json", {"crop_size": {"height": 32, "width": 16}}, "no square"),
        ("preprocessor_config.json", {"crop_size": 16}, "16 x 16 pixels .* takes 32 x 32 pixels"),
        ("preprocessor_config.json", {"image_std": [0, 0, 0]}, "cuts no square"),
        ("preprocessor_config.json", {"image_mean": 0.5}, "not iterable"),
        ("tokenizer_config.json", {"model_max_length": None}, "has no model_max_length"),
        ("tokenizer_config.json", {"model_max_length": "77"}, "cannot be loaded"),
        ("tokenizer_config.json", {"model_max_length": 78}, "78 tokens, but .* 77 tokens"),
    ],
)
def test_a_processor_that_does_not_fit_the_clip(processor_with, file, changes, message):
    folder = processor_with(file, **changes)
    for scorer in ("step_aware_clip", "pickscore"):
        with pytest.raises(UserError, match=rf"preference\.processor: .*{message}"):
            check_scorer(scorer_source(scorer, processor=folder))


def test_preparation_at_full_size_and_of_one_colour():
    images = randn(2, 3, 32, 32, seed=0)
    np.testing.assert_allclose(PREPARE(images).numpy(), normalised(images), atol=1e-5)
    colour = torch.tensor([0.25, -1.5, 0.5]).view(1, 3, 1, 1)
    for size in ((16, 16), (17, 33), (100, 37)):
        found = PREPARE(colour.expand(1, 3, *size))
        assert found.shape == (1, 3, 32, 32)
        expected = np.broadcast_to(normalised(colour), found.shape)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    half = PREPARE(images.to(torch.float16))
    assert half.dtype == torch.float32  # whatever the VAE's type


def test_preparation_passes_gradients_on():
    images = (0.5 * randn(1, 3, 64, 64, seed=0)).requires_grad_()
    PREPARE(images).square().sum().backward()
    assert images.grad.abs().sum() > 0


def test_a_clip_without_one_of_its_tensors(tmp_path):
    """Whichever it is, no number is drawn in its place."""
    shutil.copytree(MODELS / "tiny-clip", tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    weights, said = load_file(file), r"preference\.backbone: .*CLIP: its weights lack "
    for missing in list(weights)[::5] + ["visual_projection.weight", "logit_scale"]:
        rest = {name: tensor for name, tensor in weights.items() if name != missing}
        save_file(rest, file, {"format": "pt"})
        with pytest.raises(UserError, match=said + re.escape(missing)):
            load_scorer(scorer_source("pickscore", backbone=str(tmp_path / "clip")), CPU)


def test_a_preference_model_without_one_of_its_tensors(tmp_path):
    weights = torch.load(MODELS / "tiny-spm.bin", weights_only=True)
    for missing in list(weights)[::9]:
        rest = {name: tensor for name, tensor in weights.items() if name != missing}
        torch.save(rest, tmp_path / "spm.bin")
        with pytest.raises(UserError, match=rf"preference\.checkpoint: .*{re.escape(missing)}"):
            source = scorer_source("step_aware_clip", checkpoint=str(tmp_path / "spm.bin"))
            load_scorer(source, CPU)


@pytest.fixture(scope="module")
def pickscore():
    return load_scorer(scorer_source("pickscore"), CPU)


def tokens_by_hand(prompts, length):
    """Returns token ids: start, one for each byte-level character, end, padded with ends."""
    vocabulary = json.loads((MODELS / "tiny-clip" / "vocab.json").read_text())
    rows = []
    for prompt in prompts:
        ids = [512]
        for word in prompt.split():
            ids += [vocabulary[c] for c in word[:-1]] + [vocabulary[word[-1] + "</w>"]]
        rows.append((ids[: length - 1] + [513] * length)[:length])
    return torch.tensor(rows)


def test_pickscore_is_the_plain_clip(pickscore):
    prompts = [*PROMPTS, "a very long prompt " * 10]
    images = randn(4, 3, 64, 64, seed=0)
    clip = CLIPModel.from_pretrained(MODELS / "tiny-clip").eval()
    tokens = tokens_by_hand(prompts, 77)
    assert (tokens[3] == 513).sum() == 1  # truncated, but still ended
    with torch.no_grad():
        pixels = torch.from_numpy(normalised(halved(images))).float()
        expected = clip(input_ids=tokens, pixel_values=pixels).logits_per_image.diag()
    features = pickscore.encode_prompts(prompts)
    for timestep in (0, 951):
        found = pickscore.score(images, features, timestep)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # Images of one prompt: features of another row would show.
    swapped = pickscore.score(images, features[[1, 0, 3, 2]], 0)
    assert not torch.isclose(swapped, expected, atol=1e-2).any()


def test_the_step_aware_one_differs_with_the_timestep(spm_scorer):
    features, images = spm_scorer.encode_prompts(PROMPTS), randn(3, 3, 16, 16, seed=0)
    early, late = (spm_scorer.score(images, features, t) for t in (951, 1))
    assert early.shape == (3,) and early.dtype == torch.float32
    assert ((early - late).abs() > 1e-2).all()
    again = spm_scorer.score(images[1:2], features[1:2], 951)
    torch.testing.assert_close(again, early[1:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_comes_close(spm_scorer, dtype):
    low = load_scorer(scorer_source("step_aware_clip", dtype=dtype), CPU)
    images = randn(3, 3, 16, 16, seed=0)
    exact, found = (s.score(images, s.encode_prompts(PROMPTS), 501) for s in (spm_scorer, low))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0, atol=1.0)
    assert not torch.equal(found, exact)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["step_aware_clip", "pickscore"])
def test_candidates_that_are_nearly_the_same_are_told_apart(name, dtype):
    """What follows the projection loses nothing: best and worst are those of exact arithmetic."""
    scorer, projected = load_scorer(scorer_source(name, dtype=dtype), CPU), []
    for layer in (scorer.clip.text_projection, scorer.clip.visual_projection):
        layer.register_forward_hook(lambda *seen: projected.append(seen[-1].double()))
    text = scorer.encode_prompts(["a fox"])
    drawn = randn(50, 1, 3, 16, 16, seed=0) + 0.003 * randn(50, 4, 3, 16, 16, seed=1)
    found = torch.stack([scorer.score(images / 3, text, 301) for images in drawn])
    features, *of_images = projected
    cosines = F.cosine_similarity(torch.stack(of_images), features, dim=-1)
    exact = scorer.clip.logit_scale.double().exp() * cosines
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    for best in (torch.argmax, torch.argmin):
        assert (best(found, dim=1) == best(exact, dim=1)).float().mean() > 0.95


@pytest.mark.parametrize("scorer", ["step_aware_clip", "pickscore"])
def test_prompts_have_the_tokenizers_own_length(tmp_path, monkeypatch, scorer):
    processor = tmp_path / "processor"
    shutil.copytree(MODELS / "tiny-clip", processor)
    path = processor / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 21}))
    scorer = load_scorer(scorer_source(scorer, processor=str(processor)), CPU)
    embedded, embed = [], torch.nn.Embedding.forward

    def spy(module, ids):
        embedded.append(ids)
        return embed(module, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", spy)
    scorer.encode_prompts([*PROMPTS, "a very long prompt " * 10])
    tokens = max(embedded, key=torch.numel)  # the others are positions
    assert torch.equal(tokens, tokens_by_hand([*PROMPTS, "a very long prompt " * 10], 21))


class Constant(Scorer):
    def __init__(self, device, value):
        self.device, self.value = device, value

    def encode_prompts(self, prompts):
        return torch.zeros(len(prompts), device=self.device)

    def score(self, images, prompt_features, timestep):
        return prompt_features + self.value


def test_a_scorer_by_its_dotted_path():
    source = scorer_source(f"{__name__}:Constant", kwargs={"value": 3})
    check_scorer(source)
    scorer = load_scorer(source, CPU)
    found = scorer.score(randn(3, 3, 8, 8, seed=0), scorer.encode_prompts(PROMPTS), 951)
    assert found.tolist() == [3, 3, 3] and found.device == CPU


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer": "no_such"}, r"preference\.scorer: 'no_such' .*step_aware_clip, pickscore"),
        ({"scorer": "no_such_module:factory"}, r"preference\.scorer: .*no_such_module"),
        ({"scorer": f"{__name__}:no_such"}, r"preference\.scorer: .*no_such"),
        ({"scorer": f"{__name__}:Constant", "kwargs": {"no_such": 1}}, r"preference\.kwargs: "),
        ({"scorer": "functools:partial"}, r"preference\.scorer: functools:partial does not tell"),
        ({"scorer": "builtins:dict"}, r"preference\.scorer: builtins:dict does not tell"),
        ({"scorer": "math:pi"}, r"preference\.kwargs: math:pi takes other options"),
        ({"checkpoint": "no/such.bin"}, r"preference\.checkpoint: no file 'no/such\.bin'"),
        ({"backbone": "./no_such"}, r"preference\.backbone: '\./no_such'"),
        ({"scorer": "pickscore", "backbone": "./no_such"}, r"preference\.backbone: '\./no_such'"),
        ({"processor": "./no_such"}, r"preference\.processor: '\./no_such'"),
    ],
)
def test_what_cannot_be_loaded_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        load_scorer(scorer_source(**({"scorer": "step_aware_clip"} | changes)), CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer": "no_such"}, r"preference\.scorer: 'no_such'"),
        ({"dtype": "float8"}, r"preference\.dtype: 'float8'"),
        ({"checkpoint": "no/such.bin"}, r"preference\.checkpoint: no file"),
    ],
)
def test_what_is_seen_before_loading(changes, message):
    with pytest.raises(UserError, match=message):
        check_scorer(scorer_source(**({"scorer": "step_aware_clip"} | changes)))
