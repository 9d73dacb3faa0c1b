"""ImageReward against the scores of its official code for the same weights, images and prompts."""

import json
from pathlib import Path

import pytest
import torch
from finished_images import check, load
from PIL import Image

from spo.errors import UserError
from spo.scorers.imagereward import _sizes

RECORDED = Path(__file__).parent / "data" / "imagereward"
OPTIONS = {
    "checkpoint": str(RECORDED / "ImageReward.pt"),
    "tokenizer": str(RECORDED),
    "head_width": 8,
}
IMAGES = [Image.open(RECORDED / f"image_{i}.png") for i in range(3)]


@pytest.fixture(scope="module")
def weights():
    return torch.load(RECORDED / "ImageReward.pt", weights_only=True)


def test_the_official_scores():
    recorded = json.loads((RECORDED / "scores.json").read_text())
    scorer = load("imagereward", OPTIONS)
    for image, expected in zip(IMAGES, recorded["scores"], strict=True):
        found = scorer.score_images([image] * 3, recorded["prompts"])
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-5)
    assert found.dtype == torch.float32 and not found.requires_grad
    diagonal = scorer.score_images(IMAGES, recorded["prompts"])
    expected = torch.tensor(recorded["scores"]).diag()
    torch.testing.assert_close(diagonal, expected, rtol=0, atol=1e-5)
    assert (scorer.title, scorer.scale) == ("ImageReward", 1)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blip.visual_encoder.cls_token", None, "class_embedding"),
        ("blip.visual_encoder.blocks.1.attn.qkv.bias", None, "layers.1.self_attn.qkv.bias"),
        ("blip.text_encoder.encoder.layer.0.output.dense.bias", None, "layer.0.output.dense.bias"),
        ("blip.text_encoder.encoder.layer.0.crossattention.self.key.weight", (48, 31), "size"),
        ("blip.text_encoder.pooler.dense.bias", (48,), "pooler"),
        ("blip.visual_encoder.no_such", (1,), "no_such"),
        ("mlp.layers.0.weight", (32, 47), r"\(32, 47\) after features of 48"),
        ("mlp.layers.7.bias", None, "not those of linear layers: layers.7.bias is missing"),
        ("mlp.layers.2.scale", (1,), "not those of linear layers: layers.2.scale is unknown"),
    ],
)
def test_every_tensor_has_its_place(tmp_path, weights, name, tensor, message):
    changed = weights | {name: None if tensor is None else torch.zeros(tensor)}
    torch.save({k: v for k, v in changed.items() if v is not None}, tmp_path / "changed.pt")
    said = rf"scorer_options\.imagereward\.checkpoint: .*changed\.pt is not ImageReward.*{message}"
    with pytest.raises(UserError, match=said):
        load("imagereward", OPTIONS | {"checkpoint": str(tmp_path / "changed.pt")})


def test_no_tensor_may_be_missing(tmp_path, weights):
    unused = ("_proj.", "position_ids", "itm_head")
    for missing in [name for name in weights if not any(part in name for part in unused)]:
        path = tmp_path / "rest.pt"
        torch.save({name: tensor for name, tensor in weights.items() if name != missing}, path)
        with pytest.raises(UserError, match="is not ImageReward"):
            load("imagereward", OPTIONS | {"checkpoint": str(path)})


def test_the_last_layers_of_a_tower_may_not_be_missing():
    def tower(depth):
        names = [f"encoder.layers.{i}.mlp.fc1.weight" for i in range(depth)]
        return {name: torch.empty(3072, 768, device="meta") for name in names}

    assert _sizes(tower(12), ".mlp.fc1.weight", 64)["num_hidden_layers"] == 12
    with pytest.raises(ValueError, match="lacks layers from 11 on"):
        _sizes(tower(11), ".mlp.fc1.weight", 64)


def test_what_the_reward_does_not_use_may_be_missing(tmp_path, weights):
    used = {k: v for k, v in weights.items() if "_proj." not in k and "position_ids" not in k}
    assert len(used) == len(weights) - 5
    torch.save(used, tmp_path / "used.pt")
    load("imagereward", OPTIONS | {"checkpoint": str(tmp_path / "used.pt")})


@pytest.mark.parametrize("head_width", [0, 10, 64])
def test_a_head_width_that_does_not_fit(head_width):
    with pytest.raises(UserError, match=rf"head_width {head_width} does not divide"):
        load("imagereward", OPTIONS | {"head_width": head_width})


def test_the_tokenizer_is_named():
    options = OPTIONS | {"tokenizer": "./no_such"}
    for use in (check, load):
        with pytest.raises(
            UserError, match=r"scorer_options\.imagereward\.tokenizer: '\./no_such'"
        ):
            use("imagereward", options)


def test_the_published_size(weights):
    """Shapes and the default head width tell ViT-L/16 at 224 pixels and BERT base."""
    from spo.scorers import imagereward

    def zeros(*shape):
        return torch.zeros(shape, device="meta")

    vision = {
        "embeddings.position_embedding": zeros(1, 197, 1024),
        "embeddings.patch_embedding.weight": zeros(1024, 3, 16, 16),
    } | {f"encoder.layers.{i}.mlp.fc1.weight": zeros(4096, 1024) for i in range(24)}
    text = {
        "embeddings.word_embeddings.weight": zeros(30524, 768),
        "embeddings.position_embeddings.weight": zeros(512, 768),
    } | {f"encoder.layer.{i}.intermediate.dense.weight": zeros(3072, 768) for i in range(12)}
    found, text_found = imagereward._configs(vision, text, 64)
    assert (found.num_hidden_layers, found.num_attention_heads) == (24, 16)
    assert (found.image_size, found.patch_size) == (224, 16)
    assert (found.hidden_size, found.intermediate_size) == (1024, 4096)
    found = text_found
    assert (found.num_hidden_layers, found.num_attention_heads) == (12, 12)
    assert (found.hidden_size, found.intermediate_size) == (768, 3072)
    assert (found.vocab_size, found.max_position_embeddings) == (30524, 512)
    assert found.encoder_hidden_size == 1024
