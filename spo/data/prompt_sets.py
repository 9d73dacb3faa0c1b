"""Reads the prompt sets that papers evaluate on, by name, and any file or dataset."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download

from spo.data.prompt_files import file_rows
from spo.data.prompts import PromptSet, collect_prompts, draw_prompts, read_prompts
from spo.errors import UserError, first_line

_KEY = "prompts.source"
# Name -> dataset, split, column.
_DATASETS = {
    "pickapic_v2": ("yuvalkirstain/pickapic_v2", "test_unique", "caption"),
    "partiprompts": ("nateraw/parti-prompts", "train", "Prompt"),
}
_HPDV2 = "zhwang/HPDv2"
_HPDV2_FILES = ("anime", "concept-art", "paintings", "photo")  # 800 prompts each


def read_prompt_set(source: str, split: str, column: str, num: int, seed: int) -> PromptSet:
    """Returns the prompts of a named set, or of any source that read_prompts takes.

    Raises UserError if the source cannot be read.
    """
    if source == "hpdv2":
        return _hpdv2(num, seed)
    if source in _DATASETS:
        source, split, column = _DATASETS[source]
    return read_prompts(source, split=split, column=column, num=num, seed=seed)


def _hpdv2(num: int, seed: int) -> PromptSet:
    """Returns the benchmark prompts of HPDv2 (Wu et al., arXiv 2306.09341), style by style."""
    rows = []
    for style in _HPDV2_FILES:
        name = f"benchmark/{style}.json"
        try:
            path = hf_hub_download(_HPDV2, name, repo_type="dataset")
        except Exception as error:  # of whatever network library the Hub's client uses
            raise UserError(
                f"{_KEY}: cannot download {name} of {_HPDV2} ({first_line(error)})."
            ) from error
        rows += file_rows(Path(path), "prompt")
    return draw_prompts(collect_prompts(_HPDV2, rows), num, seed)
