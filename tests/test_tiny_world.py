"""The tiny world: its images, the hidden quality, the reading of captions, and the labelled pairs."""

import io
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from spo.command_line.config_files import EVAL_BASE, load_config
from spo.scorers import image_scorer, load_scorer
from spo.scorers.pixels import to_pil
from spo.tiny_world import preferences
from spo.tiny_world.preferences import draw_labelled_pairs, split_captions, write_parquet
from spo.tiny_world.quality import hidden_quality, quality_parts, read_captions
from spo.tiny_world.scenes import SHAPES, SIDE, Caption, all_captions, coverage, draw_flaws, render

PERFECT = {"saturation": 1.0, "brightness": 1.0, "contrast": 1.0, "blur": 0.0, "blotches": 0.0}


def images_of(captions, seed=0, **flaws):
    """Images of captions, perfect but for `flaws`."""
    n = len(captions)
    values = {name: torch.full((n,), value) for name, value in (PERFECT | flaws).items()}
    return render(captions, values, torch.Generator().manual_seed(seed))


def some_captions(n, seed=0):
    return [all_captions()[i] for i in np.random.default_rng(seed).integers(336, size=n)]


def test_captions_are_distinct():
    captions = all_captions()
    assert len(captions) == len(set(captions)) == 7 * 6 * 4 * 2
    assert len({str(caption) for caption in captions}) == len(captions)
    assert str(captions[0]).startswith("a small red circle on a ")


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", np.pi),
        ("square", (2 * 0.89) ** 2),
        ("cross", 2 * 2.24 * 0.8 - 0.8**2),
    ],
)
def test_shapes_cover_their_areas(shape, area):
    cover = coverage([shape], torch.tensor([8.0]), torch.full((2, 1), SIDE / 2))
    assert cover.sum().item() == pytest.approx(64 * area, rel=0.02)


def test_shapes_are_of_similar_size():
    cover = coverage(SHAPES, torch.full((4,), 8.0), torch.full((2, 4), SIDE / 2)).sum((1, 2))
    assert cover.max() < 2 * cover.min()


def test_a_seed_repeats_an_image_and_another_moves_the_shape():
    captions = some_captions(20)
    assert torch.equal(images_of(captions), images_of(captions))
    assert not torch.equal(images_of(captions), images_of(captions, seed=1))


def test_perfect_images_have_the_highest_quality():
    assert hidden_quality(images_of(some_captions(50))).min() > 9


@pytest.mark.parametrize(
    ("name", "values", "part"),
    [
        ("saturation", (0.9, 0.7, 0.5), 0),
        ("blur", (0.5, 0.8, 1.1), 1),
        ("blotches", (0.01, 0.03, 0.05), 2),
    ],
)
def test_quality_falls_with_each_flaw_and_with_no_other(name, values, part):
    captions = some_captions(100)
    measured = [quality_parts(images_of(captions, **{name: value})).mean(0) for value in values]
    assert measured[0][part] > measured[1][part] + 0.1 > measured[2][part] + 0.2
    for other in {0, 1, 2} - {part}:
        assert abs(measured[0][other] - measured[2][other]) < 0.15


@pytest.mark.parametrize("name", ["brightness", "contrast"])
def test_quality_hardly_sees_the_rest(name):
    captions = some_captions(100)
    dark = hidden_quality(images_of(captions, **{name: 0.75}, saturation=0.7, blotches=0.03)).mean()
    light = hidden_quality(images_of(captions, saturation=0.7, blotches=0.03)).mean()
    assert abs(dark - light) < 1.2


@pytest.mark.parametrize("part", ["shape", "size", "colour", "background"])
def test_quality_is_blind_to_the_caption(part):
    captions = some_captions(800, seed=3)
    generator = torch.Generator().manual_seed(0)
    values = hidden_quality(render(captions, draw_flaws(800, generator), generator))
    groups = {}
    for caption, value in zip(captions, values.tolist(), strict=True):
        groups.setdefault(getattr(caption, part), []).append(value)
    means = [np.mean(group) for group in groups.values()]
    assert max(means) - min(means) < 0.35 * values.std().item()


def test_captions_are_read_from_pixels():
    captions = some_captions(300, seed=4)
    generator = torch.Generator().manual_seed(1)
    read = read_captions(render(captions, draw_flaws(300, generator), generator))
    assert np.mean([a == b for a, b in zip(read, captions, strict=True)]) > 0.95


@pytest.mark.parametrize("part", ["shape", "size", "colour", "background"])
def test_a_wrong_part_is_noticed(part):
    asked = Caption("large", "red", "circle", "blue")
    other = {"shape": "cross", "size": "small", "colour": "green", "background": "yellow"}[part]
    shown = replace(asked, **{part: other})
    assert read_captions(images_of([shown])) == [shown] != [asked]


def test_held_out_captions_are_in_no_training_pair():
    training, held_out = split_captions()
    assert len(held_out) == 200 and not set(training) & set(held_out)
    assert set(training) | set(held_out) == set(all_captions())
    assert {c.colour for c in training} == {c.colour for c in held_out}
    assert set(draw_labelled_pairs(training, 50, seed=0).captions) <= set(training)


def test_labels_follow_quality_and_caption(monkeypatch):
    monkeypatch.setattr(preferences, "WRONG_LABEL", 0.0)
    training, _ = split_captions()
    pairs = draw_labelled_pairs(training, 400, seed=5)
    shown = [read_captions(images) for images in pairs.images]
    gap = hidden_quality(pairs.images[0]) - hidden_quality(pairs.images[1])
    disagreements = wrong_captions = 0
    for i, asked in enumerate(pairs.captions):
        right = [shown[side][i] == asked for side in range(2)]
        if right[0] != right[1]:
            wrong_captions += 1
            expected = float(right[0])
        else:
            expected = 0.5 if abs(gap[i]) < 0.8 else float(gap[i] > 0)
        disagreements += pairs.labels[i].item() != expected
    assert disagreements <= 16  # captions that were read wrongly
    assert 0.25 < wrong_captions / 400 < 0.4


def test_some_labels_are_turned_round(monkeypatch):
    training, _ = split_captions()
    labels = draw_labelled_pairs(training, 1000, seed=6).labels
    monkeypatch.setattr(preferences, "WRONG_LABEL", 0.0)
    honest = draw_labelled_pairs(training, 1000, seed=6).labels
    assert 0.02 < (labels != honest).float().mean() < 0.08


def test_pairs_are_written_in_the_columns_of_pick_a_pic(tmp_path):
    training, _ = split_captions()
    pairs = draw_labelled_pairs(training, 30, seed=7)
    write_parquet(pairs, tmp_path / "train.parquet")
    rows = pq.read_table(tmp_path / "train.parquet").to_pylist()
    count = Counter(row["caption"] for row in rows)
    for i, row in enumerate(rows):
        assert row["caption"] == str(pairs.captions[i])
        assert row["label_0"] == pairs.labels[i] and row["label_0"] + row["label_1"] == 1
        assert row["has_label"] == (row["label_0"] != 0.5)
        assert row["num_example_per_prompt"] == count[row["caption"]]
        pixels = np.asarray(Image.open(io.BytesIO(row["jpg_1"])), dtype=np.float32)
        original = (pairs.images[1, i].permute(1, 2, 0).numpy() / 2 + 0.5) * 255
        assert np.abs(pixels - original).mean() < 6


def test_the_scorers_of_its_evaluation():
    captions = some_captions(4)
    images, prompts = images_of(captions), [str(caption) for caption in captions]
    names = load_config("config/eval_tiny.py", EVAL_BASE).scorers
    found = [load_scorer(image_scorer(name, {}), torch.device("cpu")) for name in names[:2]]
    quality, faithful = (scorer.score_images(to_pil(images), prompts) for scorer in found)
    torch.testing.assert_close(quality, hidden_quality(images), atol=0.5, rtol=0)
    assert faithful.tolist() == [1.0] * 4
    assert [scorer.title for scorer in found] == ["Hidden quality", "Faithful"]
