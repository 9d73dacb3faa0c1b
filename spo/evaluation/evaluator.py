"""Models -> images -> scores -> comparison: each stage goes on where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ml_collections import ConfigDict
from tqdm import tqdm

from spo.atomic import PARTIAL
from spo.command_line.config_files import check_leaves, save_config
from spo.data.prompt_sets import read_prompt_set
from spo.data.prompts import PromptSet
from spo.data.token_lengths import describe_lengths
from spo.errors import Stopped, UserError
from spo.evaluation.image_sets import DrawSettings, ImageSet, claim, claim_prompts, image_set
from spo.evaluation.report import write_report
from spo.evaluation.results import ModelInfo, Results, summary_table, write_results
from spo.evaluation.scores import ScoreFolder
from spo.launch.signals import StopSignals
from spo.launch.workers import Workers
from spo.lora_io.model_spec import ModelSpec, read_specs, use_loras
from spo.method import build
from spo.method.health import check_images
from spo.models.backbone import DTYPES, Backbone
from spo.models.loading import ModelSource, check_source
from spo.models.plain_images import ImageSettings, sample_images
from spo.run.folder import TABLE
from spo.scorers import ImageScorerSource, check_scorer, load_scorer
from spo.scorers.pixels import to_pil

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "open-clip-torch")


@dataclass(frozen=True)
class Preflight:
    """What an evaluation needs to know before it loads a model."""

    folder: Path
    models: tuple[ModelSpec, ...]
    prompts: PromptSet
    scorers: tuple[ScoreFolder, ...]


def preflight(config: ConfigDict, num_processes: int) -> Preflight:
    """Check config and files and read the prompts; nothing is written. UserError in one line."""
    check_leaves(config)
    check_values(config)
    name = config.run_name or f"eval_{config.family}_{time.strftime('%Y%m%d_%H%M%S')}"
    folder = Path(config.logdir).expanduser() / name
    base = build.model_source(config)
    models = tuple(read_specs(config.models, base, config.family, "models"))
    for source in {spec.source for spec in models if spec.source is not None}:
        check_source(source, config.family)
    scorers = []
    for scorer in config.scorers:
        options = config.scorer_options.get(scorer, ConfigDict()).to_dict()
        check_scorer(ImageScorerSource(scorer, options))
        scorers.append(ScoreFolder(folder / "scores" / scorer.replace(":", "."), scorer, options))
    prompts = read_prompt_set(**config.prompts)
    for scores in scorers:
        scores.info()
    for spec in models:
        image_set(folder, spec, draw_settings(config), prompts.prompts)
    return Preflight(folder, models, prompts, tuple(scorers))


def check_values(config: ConfigDict) -> None:
    """Raise UserError for settings that cannot work."""
    for key in ("models", "scorers"):
        if not all(isinstance(name, str) for name in config[key]):
            raise UserError(f"{key}: {tuple(config[key])}: expected text alone.")
    for section, key in (("sample", "num_steps"), ("sample", "batch_size")):
        if config[section][key] < 1:
            raise UserError(f"{section}.{key} = {config[section][key]}: must be at least 1.")
    if config.score_batch_size < 1:
        raise UserError(f"score_batch_size = {config.score_batch_size}: must be at least 1.")
    if config.mixed_precision not in DTYPES:
        raise UserError(
            f"mixed_precision: {config.mixed_precision!r} is none of {', '.join(DTYPES)}."
        )
    if len(set(config.scorers)) < len(config.scorers):
        raise UserError("scorers: one stands there twice.")
    unknown = set(config.scorer_options) - set(config.scorers)
    if unknown:
        raise UserError(f"scorer_options.{min(unknown)}: there is no such scorer in scorers.")


def draw_settings(config: ConfigDict) -> DrawSettings:
    return DrawSettings(**config.sample, mixed_precision=config.mixed_precision)


def evaluate(config: ConfigDict) -> None:
    """Draw, score, compare and report, in one process or as one of several.

    Raises UserError for bad input, before any model loads where that can be told.
    """
    with Workers(config.rank_timeout) as workers:
        ready = None
        with workers.together():
            if workers.is_main:
                ready = preflight(config, workers.count)
                _open_folder(ready, config)
        Evaluation(config, workers.from_main(ready), workers).run()


def _open_folder(ready: Preflight, config: ConfigDict) -> None:
    """Make the folder, with the config in it; UserError where it cannot be written."""
    try:
        ready.folder.mkdir(parents=True, exist_ok=True)
        for left in ready.folder.rglob(f"*{PARTIAL}"):  # of an evaluation that was killed
            left.unlink()
        claim_prompts(ready.folder, ready.prompts.prompts)
        for spec in ready.models:
            claim(ready.folder, spec, draw_settings(config))
        save_config(config, ready.folder / "config.json")
    except OSError as error:
        raise UserError(f"logdir: cannot write to {ready.folder} ({error.strerror}).") from error


class Evaluation:
    """One evaluation on one of its processes."""

    def __init__(self, config: ConfigDict, ready: Preflight, workers: Workers) -> None:
        self.config, self.ready, self.workers = config, ready, workers
        self.prompts, self.signals = ready.prompts.prompts, StopSignals()
        sample = config.sample
        self.image_settings = ImageSettings(sample.num_steps, sample.guidance_scale, sample.seed)
        self.images = [
            image_set(ready.folder, spec, draw_settings(config), self.prompts)
            for spec in ready.models
        ]

    def run(self) -> None:
        """Draw what is missing, score what has no scores, and write the comparison.

        Raises Stopped after SIGTERM or SIGINT.
        """
        self.say(self.ready.prompts.describe())
        try:
            with self.signals:
                self.draw_images()
                for scores in self.ready.scorers:
                    self.score_images(scores)
        except Stopped as stopped:
            name = self.ready.folder.name
            raise Stopped(
                "by a signal; every whole batch is kept: the same command with "
                f"--config.run_name={name} goes on."
            ) from stopped
        if not self.ready.scorers:
            self.say(f"images: {self.ready.folder / 'images'}")
        elif self.workers.is_main:
            self.report()

    def draw_images(self) -> None:
        """Draw the missing images; base models load one after the other, and LoRAs into them."""
        loaded: tuple[ModelSource, Backbone] | None = None
        for spec, images in zip(self.ready.models, self.images, strict=True):
            size = self.config.sample.batch_size
            missing = [] if spec.images else images.missing(size)
            with self.workers.together():  # also: nobody draws before all have looked
                if missing and (loaded is None or loaded[0] != spec.source):
                    loaded = None  # the one before goes first
                    loaded = spec.source, self._load(spec.source)
                if missing:
                    use_loras(loaded[1], spec, "models")
            with self.workers.together():
                for batch in self.share(missing, f"{spec.name}: images"):
                    self._draw(loaded[1], images, batch)

    def _load(self, source: ModelSource) -> Backbone:
        config, workers = self.config, self.workers
        backbone = Backbone(source, config.family, config.mixed_precision, workers.device)
        if workers.is_main:
            self.say(describe_lengths(self.prompts, backbone.tokenizers))
        return backbone

    def _draw(self, backbone: Backbone, images: ImageSet, batch: range) -> None:
        prompts = self.prompts[batch.start : batch.stop]
        pixels = sample_images(backbone, prompts, batch, self.image_settings)
        check_images(pixels, prompts, images.name)
        for i, prompt, image in zip(batch, prompts, to_pil(pixels), strict=True):
            images.write(i, image, prompt, self.image_settings.image_seed(i))

    def score_images(self, scores: ScoreFolder) -> None:
        """Score the images of all models by one scorer, which loads only where scores are missing."""
        size = self.config.score_batch_size
        with self.workers.together():
            missing = [scores.missing(images, size) for images in self.images]
        if not any(missing):
            return
        with self.workers.together():
            source = ImageScorerSource(scores.name, scores.options)
            scorer = load_scorer(source, self.workers.device)
            if self.workers.is_main:
                scores.claim(scorer)
        with self.workers.together():
            for images, batches in zip(self.images, missing, strict=True):
                for batch in self.share(batches, f"{images.name}: {scorer.title}"):
                    scores.score(scorer, images, batch, self.prompts)

    def report(self) -> None:
        """Write results.json, table.md and report.html, and print the table."""
        folder, size = self.ready.folder, self.config.score_batch_size
        drawn = any(spec.images is None for spec in self.ready.models)
        seeds = [
            self.image_settings.image_seed(i) if drawn else None for i in range(len(self.prompts))
        ]
        results = Results(
            title=folder.name,
            settings=self.config.to_dict(),
            versions={name: version(name) for name in _PACKAGES},
            scorers=tuple(scores.info() for scores in self.ready.scorers),
            prompts=self.prompts,
            seeds=tuple(seeds),
            models=tuple(
                ModelInfo(
                    name=images.name,
                    spec=spec.text,
                    files=tuple(_relative(file, folder) for file in images.files),
                    scores={s.name: s.read(images, size) for s in self.ready.scorers},
                )
                for spec, images in zip(self.ready.models, self.images, strict=True)
            ),
        )
        results_file = write_results(results, folder)
        (folder / TABLE).write_text(summary_table(results) + "\n")
        report = write_report(folder, results, self.config.report_prompts)
        print(f"\n{summary_table(results)}\nresults: {results_file}\nreport:  {report}")

    def share(self, batches: list[range], name: str) -> Iterator[range]:
        """This process's part of `batches`, with a progress bar on the main process."""
        mine = batches[self.workers.rank :: self.workers.count]
        hidden = not (self.workers.is_main and mine)
        with tqdm(total=sum(map(len, mine)), desc=name, unit=" images", disable=hidden) as bar:
            for batch in self.signals.watch(mine):
                yield batch
                bar.update(len(batch))

    def say(self, text: str) -> None:
        """Print a line, on the main process."""
        if self.workers.is_main:
            print(text, flush=True)


def _relative(file: Path, folder: Path) -> str:
    """`file` as seen from `folder`, or its whole path where it lies elsewhere."""
    inside = file.is_relative_to(folder)
    return str(file.relative_to(folder) if inside else file.resolve())
