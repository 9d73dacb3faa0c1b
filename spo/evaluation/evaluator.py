"""Models -> images -> scores -> comparison: each stage resumes where it was stopped."""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from spo.atomic import write_lines
from spo.command_line.config_files import check_leaves, leaves, save_config
from spo.command_line.values import Checked, fill, whole
from spo.data.prompts import PromptSet, read_prompts
from spo.data.token_lengths import describe_lengths
from spo.errors import RunError, Stopped, UserError, WriteError
from spo.evaluation.contents import contents, source_contents
from spo.evaluation.image_sets import DrawSettings, ImageSet, claim_images, claim_prompts, image_set
from spo.evaluation.report import write_report
from spo.evaluation.results import (
    ModelInfo,
    PromptResult,
    Results,
    ScoredImage,
    summary_table,
    write_results,
)
from spo.evaluation.scores import ScoreFolder
from spo.evaluation.seen import Training, training_of
from spo.hub import check_repo
from spo.launch.workers import Workers
from spo.lora_io.model_spec import ModelSpec, at_strengths, read_specs, use_loras
from spo.method.health import check_images
from spo.models.backbone import Backbone
from spo.models.device import set_up_device
from spo.models.loading import check_source, model_source
from spo.models.plain_images import sample_images
from spo.run.folder import CONFIG, TABLE, locked, run_folder, versions, writable
from spo.run.session import Session
from spo.scorers import SCORERS, check_scorer, image_scorer, load_scorer, named_files
from spo.scorers.pixels import to_pil


@dataclass(frozen=True)
class EvaluationSettings(Checked):
    """The settings of an evaluation; config/eval_base.py explains each. Raises UserError."""

    models: tuple[str, ...]
    lora_scales: tuple[float, ...]
    family: str
    scorers: tuple[str, ...]
    scorer_options: Mapping[str, Mapping[str, Any]]
    draw: DrawSettings
    score_batch_size: int = whole()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(isinstance(name, str) for name in (*self.models, *self.scorers)):
            raise UserError("models, scorers: expected only text.")
        if not all(type(scale) in (int, float) for scale in self.lora_scales):
            raise UserError("lora_scales: expected only numbers, e.g. 0.5,1.")
        unknown = self.scorer_options.keys() - set(self.scorers)
        if unknown:
            raise UserError(f"scorer_options.{min(unknown)}: there is no such scorer in scorers.")


@dataclass(frozen=True)
class EvaluationPlan:
    """Everything that an evaluation knows before a model loads."""

    settings: EvaluationSettings
    folder: Path
    models: tuple[ModelSpec, ...]
    images: tuple[ImageSet, ...]  # of each model
    prompts: PromptSet
    scorers: tuple[ScoreFolder, ...]
    training: Mapping[str, Training]  # by model


def plan_evaluation(config: ConfigDict, num_processes: int) -> EvaluationPlan:
    """Checks config and files, and reads the prompts; writes nothing. Raises UserError in one line."""
    check_leaves(leaves(config))
    settings = fill(
        EvaluationSettings,
        config,
        scorer_options=config.scorer_options.to_dict(),
        draw=fill(DrawSettings, config.sample, mixed_precision=config.mixed_precision),
    )
    folder = run_folder(config.logdir, config.run_name, "eval", config.family)
    base = model_source(config.pretrained)
    named = read_specs(settings.models, base, settings.family, "models")
    models = tuple(at_strengths(named, settings.lora_scales, "lora_scales"))
    for source in {spec.source for spec in models if spec.source is not None}:
        check_source(source, settings.family)
    scorers = []
    for name in dict.fromkeys(settings.scorers):
        options = settings.scorer_options.get(name, {})
        check_scorer(source := image_scorer(name, options))
        for option, file in named_files(source).items() if name in SCORERS else ():
            check_repo(file, f"{source.section}.{option}")  # before images are drawn
        path = folder / "scores" / name.replace(":", ".")
        scorers.append(ScoreFolder(path, name, options, contents(named_files(source))))
        scorers[-1].info()  # raises if the folder has scores of another scorer
    prompts = read_prompts(**config.prompts)
    images = tuple(image_set(folder, spec, prompts.prompts) for spec in models)
    training = {spec.name: training_of(spec, base, prompts.prompts) for spec in models}
    return EvaluationPlan(settings, folder, models, images, prompts, tuple(scorers), training)


def evaluate(config: ConfigDict) -> None:
    """Draws, scores, compares and reports; raises UserError, before models load if possible."""
    with Workers(config.rank_timeout) as workers, ExitStack() as held:
        plan = None
        with workers.together():
            if workers.is_main:
                plan = plan_evaluation(config, workers.count)
                held.enter_context(locked(plan.folder))
                _open_folder(plan, json.loads(config.to_json()))
        set_up_device(workers.device)
        Evaluation(workers.from_main(plan), config.to_dict(), workers).run()


def _open_folder(plan: EvaluationPlan, config: Mapping[str, Any]) -> None:
    """Makes the folder, with the config in it; raises UserError if it cannot be written."""
    with writable(plan.folder):
        claim_prompts(plan.folder, plan.prompts.prompts)
        drawing = [spec for spec in plan.models if spec.source is not None]
        known = {source: source_contents(source) for source in {spec.source for spec in drawing}}
        for spec in drawing:
            claim_images(plan.folder, spec, known[spec.source], plan.settings.draw)
        save_config(config, plan.folder / CONFIG)


class Evaluation:
    """One evaluation on one of its processes; `config` is for the record."""

    def __init__(self, plan: EvaluationPlan, config: Mapping[str, Any], workers: Workers) -> None:
        self.plan, self.settings, self.config, self.workers = plan, plan.settings, config, workers
        self.prompts, self.session = plan.prompts.prompts, Session(plan.folder, workers)

    def run(self) -> None:
        """Draws and scores missing images, and reports; raises Stopped after SIGTERM or SIGINT."""
        self.session.say(self.plan.prompts.describe())
        for name, training in self.plan.training.items():
            if training.fault:
                self.session.say(f"training prompts of {name}: unknown ({training.fault})")
        again = f"the same command with --config.run_name={self.plan.folder.name} goes on."
        try:
            with self.session.signals:
                self.draw_images()
                for scores in self.plan.scorers:
                    self.score_images(scores)
            if not self.plan.scorers:
                self.session.say(f"images: {self.plan.folder / 'images'}")
            elif self.workers.is_main:
                self.report()
        except Stopped as stopped:
            raise Stopped(f"by a signal; every whole batch is kept: {again}") from stopped
        except WriteError as error:
            failed = f"cannot write {error.filename}: {error.strerror}; every whole batch is kept"
            raise RunError(f"{failed}: mend that, then {again}") from error

    def draw_images(self) -> None:
        """Draws the missing images; base models load one after the other, and LoRAs into them."""
        draw, backbone, loaded = self.settings.draw, None, None
        for spec, images in zip(self.plan.models, self.plan.images, strict=True):
            missing = [] if spec.images else images.missing(draw.batch_size)
            with self.workers.together():  # also: nobody draws before all have looked
                if missing and spec.source != loaded:
                    backbone = None  # frees the last one before the next one loads
                    device, precision = self.workers.device, draw.mixed_precision
                    backbone = Backbone(spec.source, self.settings.family, precision, device)
                    loaded = spec.source
                    self.session.say(describe_lengths(self.prompts, backbone.tokenizers))
                if missing:
                    use_loras(backbone, spec, "models")
            with self.workers.together():
                for batch in self.share(missing, f"{spec.name}: images"):
                    self._draw(backbone, images, batch)

    def _draw(self, backbone: Backbone, images: ImageSet, batch: range) -> None:
        prompts, draw = self.prompts[batch.start : batch.stop], self.settings.draw
        pixels = sample_images(backbone, prompts, batch, draw)
        check_images(pixels, prompts, images.name)
        for i, prompt, image in zip(batch, prompts, to_pil(pixels), strict=True):
            images.write(i, image, prompt, draw.image_seed(i))

    def score_images(self, scores: ScoreFolder) -> None:
        """Scores the images of all models by one scorer, which loads only if scores are missing."""
        size = self.settings.score_batch_size
        with self.workers.together():
            missing = [scores.missing(images, size) for images in self.plan.images]
        if not any(missing):
            return
        with self.workers.together():
            scorer = load_scorer(image_scorer(scores.name, scores.options), self.workers.device)
            if self.workers.is_main:
                scores.claim(scorer)
        with self.workers.together():
            for images, batches in zip(self.plan.images, missing, strict=True):
                for batch in self.share(batches, f"{images.name}: {scorer.title}"):
                    scores.score(scorer, images, batch, self.prompts)

    def share(self, batches: list[range], name: str) -> Iterable[range]:
        """Yields this process's part of `batches` with a progress bar; raises Stopped on a signal."""
        mine = batches[self.workers.rank :: self.workers.count]
        return self.session.signals.watch(self.session.bar(mine, name))

    def report(self) -> None:
        """Writes results.json, table.md and report.html, and prints the table."""
        folder, training = self.plan.folder, self.plan.training
        results = Results(
            title=folder.name,
            settings=self.config,
            versions=versions() | {"open-clip-torch": version("open-clip-torch")},
            scorers=tuple(scores.info() for scores in self.plan.scorers),
            models=tuple(
                ModelInfo(s.name, s.text, known.sources, bool(known.fault), s.lora, s.strength)
                for s, known in zip(self.plan.models, training.values(), strict=True)
            ),
            prompts=self._prompt_results(),
        )
        table = summary_table(results)
        print(f"\n{table}\n\nresults: {write_results(results, folder)}")
        write_lines(folder / TABLE, [table])
        print(f"report:  {write_report(folder, results)}")

    def _prompt_results(self) -> tuple[PromptResult, ...]:
        drawn = any(spec.images is None for spec in self.plan.models)
        size, seed_of = self.settings.score_batch_size, self.settings.draw.image_seed
        rows = [{} for _ in self.prompts]
        for images in self.plan.images:
            scores = {s.name: s.read(images, size) for s in self.plan.scorers}
            for i, file in enumerate(images.files):
                inside = file.is_relative_to(self.plan.folder)
                path = file.relative_to(self.plan.folder) if inside else file.resolve()
                own = {name: each[i] for name, each in scores.items()}
                rows[i][images.name] = ScoredImage(str(path), own)
        trained = self.plan.training.items()
        seen = [[name for name, t in trained if p.strip() in t.seen] for p in self.prompts]
        return tuple(
            PromptResult(prompt, seed_of(i) if drawn else None, rows[i], seen[i])
            for i, prompt in enumerate(self.prompts)
        )
