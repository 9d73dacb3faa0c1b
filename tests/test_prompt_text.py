"""Prompts of any text and length: how much of them is read, and what is said of it."""

import logging

import pytest
import torch
from helpers import MODELS
from PIL import Image
from transformers import AutoTokenizer

from spo.data import token_lengths
from spo.data.prompts import read_prompts
from spo.data.token_lengths import describe_lengths, readable
from spo.errors import named
from spo.run.pictures import Cell, grid, write_png

HARD = {
    "empty": "",
    "emoji": "👩‍🚀🐈 zwei 🦊",
    "right to left": "قطة على القمر חתול על הירח",
    "NUL": "a fox\0 and a bear",
    "control": "\x1b[31m red \x07\x08",
    "no blank": "x" * 100_000,
    "words": "cat " * 25_000,
    "emoji alone": "🦊" * 100_000,
}


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(MODELS / "tiny-clip")


@pytest.mark.parametrize("name", HARD)
def test_any_prompt_is_encoded_without_a_word(backbone, spm_scorer, name):
    heard = Listener()
    loggers = [logging.getLogger(library) for library in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(heard)
    encoded = backbone.encode_prompts([HARD[name], "a fox"])
    features = spm_scorer.encode_prompts([HARD[name], "a fox"])
    for logger in loggers:
        logger.removeHandler(heard)
    assert heard.said == []
    assert encoded.prompt_embeds.shape[:2] == (2, 77) and encoded.prompt_embeds.isfinite().all()
    assert features.shape[0] == 2 and features.isfinite().all()


class Listener(logging.Handler):
    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


@pytest.mark.parametrize("name", HARD)
def test_what_is_read_of_a_prompt_is_all_that_is_encoded(tokenizer, spm_scorer, name):
    (shown,) = readable([HARD[name]])
    assert len(shown) <= 4000 and (shown == HARD[name] or len(HARD[name]) > 4000)
    whole = tokenizer([HARD[name]], padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(spm_scorer.inputs.tokenize([HARD[name]]), whole.input_ids)


def test_blanks_do_not_use_up_what_is_read(tokenizer):
    prompt = "a fox" + " \n" * 50_000 + "and a bear"
    assert readable([prompt]) == ["a fox and a bear"]
    assert tokenizer(prompt).input_ids == tokenizer("a fox and a bear").input_ids


def test_prompts_that_are_cut_are_counted(tokenizer):
    words = "cat " * 200
    longest = len(tokenizer(words, verbose=False).input_ids)
    prompts = ["a fox", words, "x" * 76, "x" * 75, ""]
    assert len(tokenizer("x" * 75).input_ids) == 77
    short = AutoTokenizer.from_pretrained(MODELS / "tiny-clip", model_max_length=6)
    tokenizers = {"text encoder": tokenizer, "second": tokenizer, "preference model": short}
    shown = "cat " * 19 + "cat…"
    assert describe_lengths(prompts, tokenizers).splitlines() == [
        "2 of 5 prompts are longer than 77 tokens and are cut by the text encoder: the longest, "
        f"{shown!r}, has {longest}",
        "3 of 5 prompts are longer than 6 tokens and are cut by the preference model: the longest, "
        f"{shown!r}, has {longest}",
    ]
    assert describe_lengths(["a fox"], {"text encoder": tokenizer}) == (
        "none of 1 prompts is longer than the 77 tokens of the text encoder"
    )


def test_of_many_prompts_every_so_many_are_looked_at(tokenizer, monkeypatch):
    monkeypatch.setattr(token_lengths, "_SAMPLED", 3000)
    prompts = ["x" * 100] * 2500
    said = describe_lengths(prompts, {"text encoder": tokenizer})
    assert said.startswith("30 of 30 prompts (every 84th) are longer than 77 tokens")


def test_errors_name_some_prompts_and_the_beginning_of_each():
    assert named(["a fox", "it's"]) == "'a fox', \"it's\""
    many = named(["x" * 100_000] * 10)
    assert many.count("x" * 79 + "…") == 4 and many.endswith(", and 6 more") and len(many) < 400


@pytest.mark.parametrize("name", [name for name in HARD if name != "empty"])
def test_prompts_in_files_and_under_pictures(tmp_path, name):
    (tmp_path / "p.txt").write_text(f"{HARD[name]}\n\n", encoding="utf-8")
    found = read_prompts(str(tmp_path / "p.txt"))
    assert found.prompts == (HARD[name].strip(),) and found.left_out == {"empty": 1}
    image = Image.new("RGB", (32, 32))
    write_png(tmp_path / "p.png", image, {"prompt": HARD[name]})
    with Image.open(tmp_path / "p.png") as file:
        file.load()
        assert file.text["prompt"] == HARD[name]
    assert grid([[Cell(image, HARD[name])]], "title").width < 1000
