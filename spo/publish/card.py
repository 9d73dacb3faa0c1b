"""The model card of a Hub repo: a section for each run in the repo, and the metadata the Hub reads.

A section stands between two comments. The first comment holds what the metadata need of its run, so
that a card can be updated without the files of the other runs.
"""

import json
import re
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import huggingface_hub
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from ml_collections import ConfigDict

from spo.command_line.config_files import BASE, REPO_ROOT, leaves, load_config
from spo.command_line.values import fill
from spo.evaluation.results import summary_table
from spo.hub import Destination, is_hub_id
from spo.launch.batch_plan import UpdatePlan
from spo.lora_io.write import KOHYA_FILE, LORA_FILE
from spo.models.families import FAMILIES
from spo.plugins import algorithm_name
from spo.publish.record import RunRecord
from spo.run.folder import SAMPLES
from spo.run.tables import markdown_table

# At the beginning of a line, where no text of a user stands.
_SECTION = re.compile(
    r"^<!-- spo:run (\{[^\n]*\}) -->\n.*?^<!-- spo:end -->", re.DOTALL | re.MULTILINE
)
_TITLES = {"gradspo": "GradSPO", "spo": "SPO", "lpo": "LPO"}
_LATENT_REWARD = "latent_reward"
# The settings that every card shows; further ones are shown if they differ from config/FAMILY.py.
_SHOWN = {"lora.rank", "train.learning_rate", "train.beta", "sample.threshold"}
_SHOWN |= {"sample.num_candidates", "sample.num_steps", "sample.guidance_scale"}
_SHOWN_OF_GRADSPO = {"train.grad_scale", "train.ema_decay"}


def make_card(record: RunRecord, to: Destination) -> huggingface_hub.ModelCard:
    """Returns the card of a repo that holds only this run."""
    metadata = _metadata(record, to)
    # Without a beginning or end of a comment.
    head = json.dumps(metadata).replace("<", "\\u003c").replace(">", "\\u003e")
    section = f"<!-- spo:run {head} -->\n{_section(record, to, metadata)}<!-- spo:end -->"
    name = to.repo_id.rpartition("/")[2]
    skeleton = f"---\nlibrary_name: diffusers\n---\n\n# {name}\n\n{section}\n"
    return _with_metadata(huggingface_hub.ModelCard(skeleton))


def merge_cards(published: str, own: str) -> huggingface_hub.ModelCard:
    """Returns the card `published` with the section of the card `own`, replaced or appended.

    The rest of `published` stays, except for the metadata that follow from the sections. Raises
    ValueError if its metadata cannot be read.
    """
    card = huggingface_hub.ModelCard(published)
    section = _SECTION.search(huggingface_hub.ModelCard(own).text)
    subfolder = json.loads(section[1])["subfolder"]
    for old in _SECTION.finditer(card.text):
        if json.loads(old[1])["subfolder"] == subfolder:
            card.text = card.text[: old.start()] + section[0] + card.text[old.end() :]
            break
    else:
        card.text = f"{card.text.rstrip()}\n\n{section[0]}\n"
    return _with_metadata(card)


def _metadata(record: RunRecord, to: Destination) -> dict[str, Any]:
    """Returns what the metadata of the card need of a run."""
    config = record.config
    base, family = config.pretrained.model, FAMILIES[config.family]
    return {
        "subfolder": to.subfolder,
        # The Hub takes only ids; the name of a local folder means nothing there.
        "base_model": base if is_hub_id(base) else "",
        "license": to.license or (family.license if base == family.base_model else ""),
        "tags": ["text-to-image", "lora", family.tag, *_unique(_method_tags(config))],
        "widget": [
            {"text": prompt, "output": {"url": to.path(f"{SAMPLES}/{path.name}")}}
            for path, prompt in record.samples.items()
        ],
    }


def _method_tags(config: ConfigDict) -> Iterator[str]:
    yield algorithm_name(config.algorithm)
    if config.preference.scorer == _LATENT_REWARD:
        yield from ("lpo", "latent-reward-model")


def _with_metadata(card: huggingface_hub.ModelCard) -> huggingface_hub.ModelCard:
    """Sets the metadata of `card` that follow from its sections."""
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


def _section(record: RunRecord, to: Destination, metadata: dict[str, Any]) -> str:
    config = record.config
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"quoted": _quoted, "plain": _plain}
    environment.filters["summary_table"] = lambda each: escape(summary_table(each), quote=False)
    method = _TITLES.get(config.algorithm, algorithm_name(config.algorithm))
    judged_in_latents = config.preference.scorer == _LATENT_REWARD
    if judged_in_latents and config.algorithm != "lpo":
        method += " with a latent reward model"
    facts = [(name, _plain(value)) for name, value in training_facts(record).items()]
    return environment.get_template("section.md.j2").render(
        record=record,
        to=to,
        config=config,
        judged_in_latents=judged_in_latents,
        pretrained=config.pretrained,
        title=f"{method} on {config.pretrained.model.rpartition('/')[2]}",
        metadata=metadata,
        pipeline=FAMILIES[config.family].pipeline,
        lora_file=LORA_FILE,
        kohya_file=KOHYA_FILE,
        strength=1 if config.lora.alpha is None else config.lora.alpha / config.lora.rank,
        facts_table=markdown_table(("", ""), facts),
    )


def _quoted(text: str) -> str:
    """Returns a Python literal in double quotes, without our own marks."""
    return json.dumps(text, ensure_ascii=False).replace("<!-- spo:", "\\u003c!-- spo:")


def _plain(text: object) -> str:
    """Returns a text in one line, with nothing in it that Markdown or HTML would take for its own."""
    special = r"(?<![^\W_])_|_(?![^\W_])|[\\`*|~$\[\]]"  # an underscore within a word is none
    return re.sub(special, r"\\\g<0>", escape(" ".join(str(text).split()), quote=False))


def training_facts(record: RunRecord) -> dict[str, object]:
    """Returns how the LoRA was trained: what the run recorded, and the settings that matter."""
    config, preference, start = record.config, record.config.preference, record.start
    plan = fill(UpdatePlan, start["plan"]) if "plan" in start else None
    scorers = {
        "step_aware_clip": preference.checkpoint,
        "pickscore": preference.backbone,
        _LATENT_REWARD: preference.kwargs.get("checkpoint"),
    }
    values = {
        "algorithm": _TITLES.get(config.algorithm, config.algorithm),
        "base model": config.pretrained.model,
        "VAE": config.pretrained.vae,
        "preference model": scorers.get(preference.scorer) or preference.scorer,
        "prompts": start["prompts"],
        "checkpoint": record.checkpoint,
        "epochs": f"{record.epochs} of {config.num_epochs}" if record.epochs else None,
        "rollouts": record.rollouts or None,
        "updates": record.updates,
        "pairs per update": plan and plan.pairs_per_update,
        "processes": plan and f"{plan.num_processes} x {start.get('device', 'process')}",
        **dict(_settings(record)),
        "mixed precision": config.mixed_precision,
        "seed": config.seed,
        "versions": ", ".join(f"{n} {v}" for n, v in start.get("versions", {}).items()),
    }
    return {name: value for name, value in values.items() if value not in (None, "")}


def _settings(record: RunRecord) -> Iterator[tuple[str, str]]:
    """Yields settings of LoRA, rollout and update: `_SHOWN`, and all unlike the family's default."""
    defaults = leaves(load_config(str(REPO_ROOT / "config" / f"{record.config.family}.py"), BASE))
    shown = _SHOWN | (_SHOWN_OF_GRADSPO if record.config.algorithm == "gradspo" else set())
    for key, value in leaves(record.config).items():
        is_training = key.startswith(("lora.", "sample.", "train."))
        if is_training and (key in shown or defaults[key] != value):
            yield key, f"{value:g}" if isinstance(value, float) else str(value)
