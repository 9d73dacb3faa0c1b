"""The model card of a Hub repo: a section for each run in it, and the metadata the Hub reads.

A section stands between two comments. The first holds what the metadata need of its run, so that a
card can be brought up to date without the other runs at hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub

from spo.evaluation.results import summary_table
from spo.hub import Destination, is_hub_id
from spo.lora_io.diffusers_file import LORA_FILE
from spo.publish.card_text import citations, facts, markdown_table, snippet, title
from spo.publish.record import RunRecord
from spo.run.folder import SAMPLES

GRID = "validation.png"
NUM_SAMPLES = 4  # images that are published one by one
_SECTION = re.compile(r"<!-- spo:run (\{[^\n]*\}) -->\n.*?<!-- spo:end -->", re.DOTALL)
_LICENSES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
}
_FAMILY_TAGS = {"sd15": "stable-diffusion", "sdxl": "stable-diffusion-xl"}


def make_card(record: RunRecord, to: Destination) -> huggingface_hub.ModelCard:
    """The card of a repo that holds this run alone."""
    head = json.dumps(_metadata(record, to)).replace(">", "\\u003e")  # no end of a comment
    section = f"<!-- spo:run {head} -->\n{_text(record, to)}<!-- spo:end -->"
    name = to.repo_id.rpartition("/")[2]
    skeleton = f"---\nlibrary_name: diffusers\n---\n\n# {name}\n\n{section}\n"
    return _with_metadata(huggingface_hub.ModelCard(skeleton))


def merge_cards(published: str, own: str) -> huggingface_hub.ModelCard:
    """The card `published`, the section of the card `own` put in its place or at the end.

    Whatever else `published` says stays; of its metadata, those that follow from the sections change.
    Raises ValueError where its metadata cannot be read.
    """
    card = huggingface_hub.ModelCard(published)
    section = _SECTION.search(own)
    subfolder = json.loads(section[1])["subfolder"]
    for old in _SECTION.finditer(card.text):
        if json.loads(old[1])["subfolder"] == subfolder:
            card.text = card.text[: old.start()] + section[0] + card.text[old.end() :]
            break
    else:
        card.text = f"{card.text.rstrip()}\n\n{section[0]}\n"
    return _with_metadata(card)


def _metadata(record: RunRecord, to: Destination) -> dict[str, Any]:
    """What the metadata of the card need of a run."""
    base = record.config.pretrained.model
    algorithm = record.config.algorithm.rpartition(":")[2]
    return {
        "subfolder": to.subfolder,
        # The Hub takes ids alone; the name of a local folder means nothing there.
        "base_model": base if is_hub_id(base) else "",
        "license": _license(record, to),
        "tags": ["text-to-image", "lora", _FAMILY_TAGS[record.config.family], algorithm],
        "widget": [
            {"text": prompt, "output": {"url": to.path(f"{SAMPLES}/{path.name}")}}
            for path, prompt in published_samples(record).items()
        ],
    }


def _license(record: RunRecord, to: Destination) -> str:
    return to.license or _LICENSES.get(record.config.pretrained.model, "")


def published_samples(record: RunRecord) -> dict[Path, str]:
    """The images that are published one by one, with their prompts."""
    return dict(list(record.samples.items())[:NUM_SAMPLES])


def _with_metadata(card: huggingface_hub.ModelCard) -> huggingface_hub.ModelCard:
    """`card` with the metadata that follow from its sections."""
    runs = [json.loads(section[1]) for section in _SECTION.finditer(card.text)]
    bases = _unique(run["base_model"] for run in runs if run["base_model"])
    licenses = _unique(run["license"] for run in runs)
    data = card.data
    data["license"] = "other" if len(licenses) > 1 else licenses[0] or None
    data["license_name"] = "see-the-sections" if len(licenses) > 1 else None
    data["base_model"] = bases[0] if len(bases) == 1 else bases or None
    data["base_model_relation"] = "adapter" if bases else None
    data["library_name"], data["pipeline_tag"] = "diffusers", "text-to-image"
    data["tags"] = _unique([*(data.tags or []), *(tag for run in runs for tag in run["tags"])])
    data["widget"] = [sample for run in runs for sample in run["widget"]] or None
    return card


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _text(record: RunRecord, to: Destination) -> str:
    """The section of a run, in Markdown."""
    base = record.config.pretrained.model
    lines = [
        f"## {to.subfolder + ': ' if to.subfolder else ''}{title(record)}",
        "",
        f"A LoRA of rank {record.config.lora.rank} for `{base}` "
        f"({'policy' if record.weights == 'policy' else 'EMA'} weights), in `{to.path(LORA_FILE)}`.",
        f"Licence: {_license(record, to) or 'the terms of the base model'}.",
    ]
    if not is_hub_id(base):
        lines += ["The base model was a folder, not a model of the Hub; only its name is given."]
    if record.grid is not None:
        drawn = int(record.grid.stem.split("_")[1])
        lines += ["", f"![Validation images after epoch {drawn}]({to.path(GRID)})"]
    lines += ["", "### Use", "", "```python", snippet(record, to), "```"]
    lines += ["", "### How it was trained", "", markdown_table(facts(record))]
    for results in record.evaluations.values():
        lines += ["", f"### Results: {results.title}", "", summary_table(results)]
        lines += ["", "Means with 95 % intervals; every score is in results.json."]
    lines += ["", "### Citation", "", "```bibtex", citations(record), "```", ""]
    return "\n".join(lines)
