"""HPSv2, CLIPScore and the aesthetic predictor against open_clip's own forward pass."""

import copy
import json

import numpy as np
import open_clip
import pytest
import torch
from finished_images import PROMPTS, SIZES, check, load, pictures, score, tiny_open_clip
from safetensors.torch import load_file, save_file
from torchvision import transforms

from spo.errors import UserError
from spo.scorers.open_clip import find_open_clip, fit_square

HPS = {"hpsv2": "HPSv2", "hpsv2.1": "HPSv2.1"}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_open_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def options(folder):
    return {"model": str(folder), "checkpoint": str(folder / "open_clip_model.safetensors")}


@pytest.fixture(scope="module")
def reference(folder):
    """Returns open_clip's own model and transform of the folder, and the tokens of the prompts."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(list(PROMPTS))
    assert tokens.shape == (3, 16) and tokens[2, -1] == 49407  # truncated, but still ended
    return model.eval(), transform, tokens


@torch.no_grad()
def cosines(reference, pixels):
    model, _, tokens = reference
    image, text, _ = model(torch.stack(pixels), tokens)
    return (image * text).sum(-1)


def test_clipscore(reference, options):
    expected = [cosines(reference, [reference[1](i)] * 3) for i in pictures()]
    scorer = load("clipscore", options)
    found = [scorer.score_images([image] * 3, PROMPTS) for image in pictures()]
    assert (torch.stack(expected) < -0.05).any() and (torch.stack(expected) > 0.05).any()
    torch.testing.assert_close(
        torch.stack(found), torch.stack(expected).clamp(min=0), rtol=0, atol=1e-6
    )
    assert (scorer.title, scorer.scale) == ("CLIPScore", 100)
    assert found[0].dtype == torch.float32 and not found[0].requires_grad


def official_pixels(image, size):
    """Returns the pixels that hpsv2 1.2.0 prepares, by torchvision's own operations."""
    width, height = image.size
    ratio = size / max(image.size)
    new = (round(height * ratio), round(width * ratio))
    left, top = (size - new[1]) // 2, (size - new[0]) // 2
    steps = [
        transforms.ToTensor(),
        transforms.Resize(new, transforms.InterpolationMode.BICUBIC, antialias=True),
        transforms.Pad([left, top, size - new[1] - left, size - new[0] - top], fill=0),
        transforms.Normalize(MEAN, STD),
    ]
    return transforms.Compose(steps)(image)


@pytest.mark.parametrize("name", HPS)
def test_hpsv2(tmp_path, reference, options, name):
    model = reference[0]
    halved = {name: tensor.half() for name, tensor in model.state_dict().items()}  # as published
    torch.save({"epoch": 1, "state_dict": halved}, tmp_path / "hps.pt")
    images = pictures([*SIZES, (20, 13), (33, 97)])
    prompts = [PROMPTS[i % 3] for i in range(5)]
    scorer = load(name, options | {"checkpoint": str(tmp_path / "hps.pt")})
    pixels = [official_pixels(image, 32) for image in images]
    for image, expected in zip(images, pixels, strict=True):
        torch.testing.assert_close(scorer.prepare(image), expected, rtol=0, atol=1e-5)
    tokens = reference[2][[i % 3 for i in range(5)]]
    rounded = copy.deepcopy(model)
    rounded.load_state_dict(halved)
    expected = cosines((rounded, None, tokens), pixels)
    torch.testing.assert_close(scorer.score_images(images, prompts), expected, rtol=0, atol=1e-6)
    assert (scorer.title, scorer.scale) == (HPS[name], 100)


def test_the_whole_image_is_fitted_and_padded_with_black():
    pixels = fit_square(torch.ones(3, 10, 40), 20)
    expected = torch.zeros(3, 20, 20)
    expected[:, 7:12] = 1  # 5 rows of 20; 7 above and 8 below
    torch.testing.assert_close(pixels, expected)


def mlp(widths):
    """Returns weights with the published names; dropout stood between all but the last two layers."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for number, i, o in zip((0, 2, 4, 6, 7), widths[:-1], widths[1:], strict=True):
        weights[f"layers.{number}.weight"] = torch.randn(o, i, generator=generator)
        weights[f"layers.{number}.bias"] = torch.randn(o, generator=generator)
    return weights


def linear():
    generator = torch.Generator().manual_seed(2)
    return {
        "weight": torch.randn(1, 16, generator=generator),
        "bias": torch.randn(1, generator=generator),
    }


@pytest.mark.parametrize("weights", [mlp((16, 12, 8, 6, 4, 1)), linear()], ids=["mlp", "linear"])
def test_aesthetic(tmp_path, reference, options, weights):
    torch.save(weights, tmp_path / "head.pth")
    scorer = load("aesthetic", options | {"head": str(tmp_path / "head.pth")})
    model, transform, _ = reference
    with torch.no_grad():
        hidden = model.encode_image(torch.stack([transform(i) for i in pictures()])).double()
    hidden = hidden.numpy() / np.linalg.norm(hidden.numpy(), axis=1, keepdims=True)
    names = sorted({name.removesuffix("weight").removesuffix("bias") for name in weights})
    for name in names:
        weight, bias = (weights[name + part].double().numpy() for part in ("weight", "bias"))
        hidden = hidden @ weight.T + bias
    found = scorer.score_images(pictures(), PROMPTS)
    np.testing.assert_allclose(found.numpy(), hidden[:, 0], rtol=1e-5, atol=1e-5)
    assert torch.equal(found, scorer.score_images(pictures(), PROMPTS[::-1]))
    assert (scorer.title, scorer.scale) == ("Aesthetic", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.0.weight": torch.zeros(12, 15)}, r"\(12, 15\) after features of 16"),
        ({"layers.7.weight": torch.zeros(2, 4), "layers.7.bias": torch.zeros(2)}, "one number"),
        ({"layers.4.bias": None}, "not those of linear layers"),
        ({"encoder.weight": torch.zeros(2, 2)}, "not those of linear layers"),
    ],
)
def test_a_head_of_another_shape(tmp_path, options, change, message):
    weights = mlp((16, 12, 8, 6, 4, 1)) | change
    path = tmp_path / "head.pth"
    torch.save({name: tensor for name, tensor in weights.items() if tensor is not None}, path)
    with pytest.raises(
        UserError, match=rf"scorer_options\.aesthetic\.head: .*head\.pth.*{message}"
    ):
        score("aesthetic", options | {"head": str(path)}, pictures())


def test_the_activation_is_the_architectures(tmp_path, folder, options):
    """Weights do not tell QuickGELU: for a local file the architecture decides."""
    plain = tiny_open_clip(tmp_path / "plain", quick_gelu=False)
    quick, other = (
        score("clipscore", options | {"model": str(m)}, pictures()) for m in (folder, plain)
    )
    assert (quick - other).abs().max() > 1e-4
    message = r"scorer_options\.aesthetic\.model: .*QuickGELU"
    with pytest.raises(UserError, match=message):
        score("aesthetic", options | {"model": str(plain)}, pictures())


def test_tags_of_open_clip_are_files_on_the_hub(monkeypatch):
    asked = []

    def unreachable(repo, name, **_):
        asked.append((repo, name))
        raise OSError("no network here")

    monkeypatch.setattr("spo.hub.hf_hub_download", unreachable)
    for name in ("clipscore", "aesthetic", *HPS):
        check(name, {})
    assert not asked  # a check downloads nothing
    for name in ("clipscore", "aesthetic", *HPS):
        with pytest.raises(UserError, match=rf"scorer_options\.{name}\.checkpoint: .*no network"):
            score(name, {}, pictures())
    openai = ("timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors")
    assert asked == [
        openai,
        openai,
        ("xswu/HPSv2", "HPS_v2_compressed.pt"),
        ("xswu/HPSv2", "HPS_v2.1_compressed.pt"),
    ]


@pytest.mark.parametrize(
    ("model", "checkpoint", "message"),
    [
        ("ViT-L-14", "openai", r"S\.model: 'openai' belongs to ViT-L-14-quickgelu"),
        ("ViT-L-41", "openai", r"S\.model: 'ViT-L-41' is neither a folder nor an architecture"),
        ("ViT-B-16-SigLIP", "webli", r"S\.model: 'ViT-B-16-SigLIP' has another text encoder"),
        ("ViT-H-14-CLIPA", "datacomp1b", r"S\.model: 'ViT-H-14-CLIPA' has another text encoder"),
        ("ViT-L-14", "no_such_tag", r"S\.checkpoint: no file 'no_such_tag'"),
        ("ViT-L-14", "hf://user/file", r"S\.checkpoint: 'hf://user/file' is not of the form"),
    ],
)
def test_names_are_checked(model, checkpoint, message):
    with pytest.raises(UserError, match=message):
        find_open_clip(model, checkpoint, "S")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"model_cfg": 1}',
        '{"model_cfg": {"embed_dim": 3}}',
        '{"model_cfg": {"text_cfg": 1}}',
    ],
)
def test_a_folder_that_is_not_open_clips(tmp_path, text):
    with pytest.raises(UserError, match=r"S\.model: no file .*open_clip_config\.json"):
        find_open_clip(str(tmp_path), "openai", "S")
    (tmp_path / "open_clip_config.json").write_text(text)
    with pytest.raises(UserError, match=r"S\.model: .* is not a config of open_clip"):
        find_open_clip(str(tmp_path), "openai", "S")


def test_weights_of_another_shape(tmp_path, options, folder):
    weights = load_file(options["checkpoint"])
    save_file(weights | {"visual.proj": torch.zeros(32, 15)}, tmp_path / "wrong.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(
        (folder / "open_clip_model.safetensors").read_bytes()[:-99]
    )
    for name, said in (("wrong", "does not fit: .*visual.proj"), ("cut", "cannot be read")):
        path = tmp_path / f"{name}.safetensors"
        with pytest.raises(
            UserError, match=rf"scorer_options\.hpsv2\.checkpoint: .*{name}.*{said}"
        ):
            score("hpsv2", options | {"checkpoint": str(path)}, pictures())
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["no_such"] = 1
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"scorer_options\.clipscore\.model: .*no_such"):
        score("clipscore", options | {"model": str(tmp_path)}, pictures())
