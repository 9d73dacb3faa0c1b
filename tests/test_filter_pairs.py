"""The multi-preference filter: its rule, the scores that it needs, and the rows that training keeps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from finished_images import CPU, pictures, score, tiny_open_clip
from labelled_pairs import make_row, picture, write_splits
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from config import spm_base
from spo.command_line.values import fill
from spo.errors import UserError
from spo.preference import pair_scores
from spo.preference.batches import read_image
from spo.preference.filter import SCORES, passing
from spo.preference.pair_scores import Scoring, score_split
from spo.preference.rows import find_training_rows, find_usable_rows
from spo.preference.source import PairData
from spo.scorers.vqascore import VQAScore

ROOT = Path(__file__).resolve().parent.parent
NONE = (None,) * 4
# Row of scores -> strategies by which it passes, and without VQA scores.
RULE = {
    (1, 0.1, 0.01, 0.01): ("123", "123"),
    (1, 0.0, 0.01, 0.01): ("23", "23"),
    (1, -0.5, 0.01, 0.01): ("3", "3"),
    (1, -1.0, 0.01, 0.01): ("", ""),
    (1, 0.1, 0.0, 0.01): ("", ""),
    (1, 0.1, 0.01, 0.0): ("", "123"),
    (1, 9.0, 9.0, 9.0): ("123", "123"),  # no upper limits
    (1, None, 0.01, 0.01): ("", ""),
    (0, 0.19, 0.029, 0.069): ("123", "123"),
    (0, 0.2, 0.029, 0.069): ("", ""),
    (0, 0.19, 0.03, 0.069): ("", ""),
    (0, 0.19, 0.029, 0.07): ("", "123"),
    (0, 0.0, 0.0, 0.0): ("123", "123"),
    (None, 0.1, 0.01, 0.01): ("", ""),
    NONE: ("", ""),
}


@pytest.mark.parametrize("strategy", [1, 2, 3])
def test_the_rule(strategy):
    rows = np.array(list(RULE), dtype=float).T
    scores = dict(zip(SCORES.names, rows, strict=True))
    for column, found in enumerate((scores, scores | {"vqascore_gap": np.full(len(RULE), np.nan)})):
        wanted = [str(strategy) in strategies[column] for strategies in RULE.values()]
        assert passing(found, strategy).tolist() == wanted


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Returns options of the judges that name a tiny CLIP of open_clip."""
    folder = tiny_open_clip(tmp_path_factory.mktemp("clip") / "tiny")
    torch.save({"weight": torch.linspace(-1, 1, 16)[None], "bias": torch.ones(1)}, folder / "h.pth")
    clip = {"model": str(folder), "checkpoint": str(folder / "open_clip_model.safetensors")}
    return {"aesthetic": clip | {"head": str(folder / "h.pth")}, "clipscore": clip}


CHAT = (
    "{% for m in messages %}USER : {% for c in m.content %}{% if c.type == 'image' %}<image> "
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %} ASSISTANT :"
)


@pytest.fixture(scope="module")
def vqa(tmp_path_factory):
    """Writes a random LLaVA that knows a few words, and returns its folder."""
    words = (
        'Does this figure show " "? Please answer yes or no . USER : ASSISTANT Yes a red fox tiny'
    )
    words = dict.fromkeys(["<unk>", "<pad>", "<s>", "</s>", "<image>", *words.split()])
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}
        | small,
        text_config={"model_type": "llama", "vocab_size": len(words), "pad_token_id": 1} | small,
        image_token_index=4,
        image_seq_length=4,
    )
    folder = tmp_path_factory.mktemp("vqa")
    torch.manual_seed(0)
    network = LlavaForConditionalGeneration(config)
    for parameter in network.parameters():  # answers of fresh weights hardly differ
        parameter.data.add_(0.3 * torch.randn_like(parameter) * (parameter.ndim == 2))
    network.save_pretrained(folder)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    LlavaProcessor(
        processor, tokenizer, 8, "default", CHAT, num_additional_image_tokens=1
    ).save_pretrained(folder)
    return str(folder)


def test_vqascore_is_the_probability_of_yes(vqa):
    prompts = ("a red fox", "a tiny fox , a red fox", "a <image> fox")
    found = VQAScore(CPU, vqa).score_images(pictures(), prompts)
    processor = LlavaProcessor.from_pretrained(vqa)
    network = LlavaForConditionalGeneration.from_pretrained(vqa).eval()
    expected = []
    for image, prompt in zip(pictures(), (*prompts[:2], "a   fox"), strict=True):  # one at a time
        text = (
            f'USER : <image> Does this figure show "{prompt}"? Please answer yes or no. ASSISTANT :'
        )
        with torch.no_grad():
            logits = network(**processor(image, text, return_tensors="pt")).logits[0, -1]
        yes = processor.tokenizer.convert_tokens_to_ids(["Yes", "yes"])
        expected.append(logits.softmax(dim=-1)[yes].sum())
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-6)
    assert np.ptp(found.numpy()) > 1e-3
    with pytest.raises(
        UserError, match="^--vqa: .*tiny/clip' is no chat model for images and text"
    ):
        VQAScore(CPU, str(ROOT / "assets" / "tiny" / "clip"))


ROWS = [
    make_row(0, label_0=1.0, label_1=0.0, jpg_0=picture(7, (64, 40))),
    make_row(1, caption=" "),
    make_row(2, label_0=0.0, label_1=1.0),
    make_row(3, jpg_1=b"broken"),
    make_row(4, label_0=0.5, label_1=0.5),
    make_row(5, label_0=0.7, label_1=0.3),
    make_row(6, label_0=0.5, label_1=0.5),
]
SIGNS = {0: 1, 2: -1, 4: 0, 6: 0}  # of the sound rows: image 0 less image 1, or the magnitude


def pair_data(source, **changes):
    values = spm_base.get_config().data.to_dict() | {"image_size": 32, "num_workers": 2}
    return fill(PairData, values | {"source": str(source)} | changes)


def call(tmp_path, options, vqa="", rows=ROWS, size=2):
    source, output = write_splits(tmp_path / "data", rows, []), tmp_path / "scores.parquet"
    said = score_split(pair_data(source), "train", Scoring(options, vqa, size), output, CPU)
    return output, said


def test_scores_lie_beside_their_rows(tmp_path, options, vqa):
    output, said = call(tmp_path, options, vqa)
    assert f"{output}: 4 of 7 rows scored; of them pass " in said
    table = pq.read_table(output)
    assert table.schema == SCORES
    rows = table.to_pylist()
    assert [i for i, row in enumerate(rows) if row["different_flag"] is not None] == list(SIGNS)
    assert all(rows[i] == dict.fromkeys(SCORES.names) for i in (1, 3, 5))
    for i, sign in SIGNS.items():
        images = [read_image(ROWS[i][name]) for name in ("jpg_0", "jpg_1")]
        scores = {n: score(n, options[n], images, [ROWS[i]["caption"]] * 2) for n in options}
        scores["vqascore"] = VQAScore(CPU, vqa).score_images(images, [ROWS[i]["caption"]] * 2)
        for name, (first, second) in scores.items():
            wanted = sign * (first - second).item() if sign else abs(first - second).item()
            assert rows[i][f"{name}_gap"] == pytest.approx(wanted, abs=1e-6)
        assert rows[i]["different_flag"] == abs(sign)
    assert max(row["aesthetic_gap"] or 0 for row in rows) > 1e-2


def test_a_killed_scoring_goes_on(tmp_path, options, vqa, monkeypatch):
    whole, _ = call(tmp_path / "whole", options)
    write, calls = pair_scores.append_line, []

    def killed(path, line):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(path.read_bytes() + line.encode()[:9])
            raise KeyboardInterrupt
        write(path, line)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pair_scores, "append_line", killed)
        call(tmp_path, options)
    (journal,) = tmp_path.glob("scores.parquet*")
    for changes in ({"rows": [*ROWS[:-1], make_row(7)]}, {"vqa": vqa}):
        with pytest.raises(UserError, match=r"^--output: .*jsonl has scores of other rows, or by"):
            call(tmp_path, options, **changes)
    scored = []
    own = pair_scores.score_pairs
    monkeypatch.setattr(pair_scores, "score_pairs", lambda r, *a: scored.extend(r) or own(r, *a))
    output, _ = call(tmp_path, options)
    assert len(scored) == 3  # the last of seven
    assert output.read_bytes() == whole.read_bytes() and not journal.exists()
    assert pq.read_table(output)["vqascore_gap"].null_count == len(ROWS)


def write_scores(file, rows, width=4):
    columns = list(zip(*rows, strict=True))[:width]
    pq.write_table(pa.table(list(map(pa.array, columns)), SCORES.names[:width]), file)
    return str(file)


WIN, TIE = (1, 0.1, 0.01, 0.01), (0, 0.1, 0.01, 0.01)
ALIGNED = [WIN, NONE, (1, -0.4, 0.01, 0.01), NONE, TIE, NONE, (0, 0.3, 0.01, 0.01)]


@pytest.mark.parametrize(("strategy", "kept"), [(1, (0, 4)), (2, (0, 2, 4))])
def test_training_keeps_the_rows_that_pass(tmp_path, strategy, kept):
    source = write_splits(tmp_path / "data", ROWS, ROWS)
    file = write_scores(tmp_path / "s.parquet", ALIGNED)
    data = pair_data(source, filter=file, filter_strategy=strategy)
    found = find_training_rows(data)
    assert found.indices == kept
    left_out = {"filtered out": 5 - len(kept), "no caption": 1, "invalid label": 1}
    assert found.faults == left_out and f"{5 - len(kept)} filtered out" in found.description
    validation = find_usable_rows(data, "validation_unique", need_has_label=True)
    assert validation.indices == (0, 2, 3, 4, 6)


@pytest.mark.parametrize(
    ("rows", "width", "message"),
    [
        (ALIGNED[:6], 4, "has 6 rows, but the split 7; make it .*filter_pairs.py"),
        ([TIE, *ALIGNED[1:]], 4, "takes row 0 for a tie or a winner, which it is not"),
        (ALIGNED, 2, "no column clipscore_gap, vqascore_gap"),
        ([("x", *WIN[1:])], 4, "is no .parquet file of scores .*'x'"),
        (None, 4, "is no .parquet file of scores"),
    ],
)
def test_files_of_other_rows(tmp_path, rows, width, message):
    source, file = write_splits(tmp_path / "data", ROWS, []), tmp_path / "s.parquet"
    file.write_text("PAR1") if rows is None else write_scores(file, rows, width)
    with pytest.raises(UserError, match=f"^data.filter: .*s.parquet.*{message}") as error:
        find_training_rows(pair_data(source, filter=str(file)))
    assert "\n" not in str(error.value)


def test_keys_that_make_no_sense():
    for changes, message in (
        ({"filter": "no.parquet"}, "data.filter: no file 'no.parquet'"),
        ({"filter": "x", "streaming": True}, "data.filter: .* set data.streaming=False"),
        ({"filter_strategy": 4}, "data.filter_strategy: 4 must be 1, 2 or 3"),
    ):
        with pytest.raises(UserError, match=message):
            find_training_rows(pair_data("nowhere/at/all", **changes))


def script(*arguments):
    command = [sys.executable, "scripts/filter_pairs.py", "--config=config/spm_tiny.py", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_the_script_filters_the_tiny_world(tmp_path, options):
    file = tmp_path / "scores.parquet"
    arguments = (f"--output={file}", f"--scorer_options={json.dumps(options)}")
    result = script(*arguments, "--split=validation_unique")
    assert result.returncode == 0, result.stderr[-2000:]
    first, last = result.stdout.splitlines()
    assert first.startswith("no --vqa: ") and f"{file}: 400 of 400 rows scored" in last
    assert "pairs: 100%" in result.stderr
    again = script(*arguments)
    assert again.returncode == 2 and f"--output: {file} is there" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--output: '' must end in .parquet"),
        (["--output=/proc/no/s.parquet"], "--output: cannot write /proc/no/s.parquet"),
        (["--output=s.parquet", "--scorer_options={"], "--scorer_options: '{' is not JSON"),
        (["--output=s.parquet", '--scorer_options={"hpsv2": {}}'], "options of aesthetic, clip"),
        (["--output=s.parquet", "--batch_size=0"], "--batch_size: 0 must be 1 or more"),
    ],
)
def test_bad_flags_are_one_line(arguments, message):
    result = script(*arguments)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ") and message in result.stderr
