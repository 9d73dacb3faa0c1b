"""Looks at a run between its epochs: validation images, what judges and pixels say, a verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spo.guard.evaluations import read_evaluations, write_evaluation
from spo.guard.judges import Judges, without
from spo.guard.pixel_statistics import DIVERSITY, STATISTICS, diversity
from spo.guard.verdict import JUDGES, PIXELS, REWARD, Evaluation, Verdict, decide
from spo.run.pictures import Cell
from spo.run.session import Session
from spo.run.validation import Drawn, ValidationSettings, draw_batch, show_images

if TYPE_CHECKING:
    from spo.models.backbone import Backbone
    from spo.scorers import Scorer


class Watch:
    """The evaluations of a run, on one of its processes.

    The first is of the untrained model, with which the later ones are compared.
    """

    def __init__(
        self,
        session: Session,
        backbone: Backbone,
        scorer: Scorer,
        judges: Judges,
        settings: ValidationSettings,
        prompts: Sequence[str],
    ) -> None:
        self.session, self.workers, self.backbone = session, session.workers, backbone
        self.scorer, self.judges, self.settings, self.prompts = scorer, judges, settings, prompts
        self.seconds = 0.0  # of scoring and pixels, on this process, in the last evaluation
        # What a scorer of latents is told of finished ones.
        self.last_timestep = backbone.sampler(settings.num_steps, eta=0.0).timesteps[-1]
        self.failed: set[str] = set()  # judges, or REWARD, that are not asked any more
        self._share_failures(judges.failed)

    def look(self, epochs: int, rollouts: int, step: int) -> Verdict | None:
        """Draws, shows and judges images of the UNet's current weights.

        Returns None before training, and where nothing is judged. An evaluation that an interrupted
        run made already is not made again.
        """
        run_dir, settings = self.session.run_dir, self.settings
        past = read_evaluations(run_dir, settings, self.prompts, epochs)
        is_made = self.workers.from_main(bool(past) and past[-1].epochs == epochs)
        if is_made:
            return self.workers.from_main(decide(past) if len(past) > 1 else None)
        started = time.perf_counter()
        cells, scores = self._draw_and_measure()
        seconds = {
            "seconds_evaluation": time.perf_counter() - started,
            "seconds_judging": self.seconds,
        }
        verdict = None
        if self.workers.is_main and scores:
            past.append(Evaluation(epochs, scores))
            verdict = decide(past) if len(past) > 1 else None

        def record() -> None:
            show_images(self.session, cells, settings.weights, epochs, step)
            if verdict is not None:
                at = {"evaluation": epochs, "epoch": epochs, "rollout": rollouts, "step": step}
                self.session.tracking.log(at | verdict.numbers() | seconds, step)
                self.session.say(verdict.describe())
            if scores:
                write_evaluation(run_dir, past[-1], settings, self.prompts)

        self.session.on_main(record)
        return self.workers.from_main(verdict)

    def _draw_and_measure(self) -> tuple[list[Cell], dict[str, list[float]]]:
        """Returns the images to show and, by score, the number of each judged prompt.

        Both on the main process only.
        """
        batches = self.settings.batches(len(self.prompts))
        mine = batches[self.workers.rank :: self.workers.count]
        cells, parts, failed, self.seconds = [], [], {}, 0.0
        with self.workers.together(), self.judges.at_work():
            bar = self.session.bar(mine, "validation images")
            for places in self.session.signals.watch(bar):
                drawn = draw_batch(self.backbone, self.prompts, places, self.settings)
                shown = range(places.start, min(places.stop, self.settings.num_images))
                first = zip(shown, drawn[0].pictures, strict=False)
                cells += [(i, Cell(picture, self.prompts[i])) for i, picture in first]
                if places.start < self.settings.num_judged:
                    started = time.perf_counter()
                    parts.append((places.start, self._measure(drawn, failed)))
                    self.seconds += time.perf_counter() - started
        self._share_failures(failed)
        cells, parts = (self.workers.gather(each, only_to_main=True) for each in (cells, parts))
        in_order = [scores for _, scores in sorted(parts, key=itemgetter(0))]
        left_out = {REWARD if name == REWARD else JUDGES + name for name in self.failed}
        names = [name for name in (in_order[0] if in_order else ()) if name not in left_out]
        joined = {name: torch.cat([scores[name] for scores in in_order]) for name in names}
        return (
            [cell for _, cell in sorted(cells, key=itemgetter(0))],
            {name: values.tolist() for name, values in joined.items()},
        )

    def _measure(self, drawn: Sequence[Drawn], failed: dict[str, str]) -> dict[str, Tensor]:
        """Returns each score (n,) of n prompts, the mean over their images; adds what `failed`."""
        by_seed = []
        for each in drawn:
            pixels = (each.images.float().nan_to_num() / 2 + 0.5).clamp(0, 1)
            own = {PIXELS + name: of(pixels).cpu() for name, of in STATISTICS.items()}
            if REWARD not in self.failed:
                own[REWARD] = _asked(REWARD, failed, self._reward, each)
            for name, judge in self.judges.scorers.items():
                own[JUDGES + name] = _asked(name, failed, partial(_score, judge), each)
            by_seed.append(own)
        scores = {name: torch.stack([own[name] for own in by_seed]).mean(dim=0) for name in own}
        if len(drawn) > 1 and (features := self._features(drawn, failed)) is not None:
            scores[PIXELS + DIVERSITY] = diversity(features).cpu()
        return scores

    @torch.no_grad()
    def _reward(self, drawn: Drawn) -> Tensor:
        """Returns the training scorer's scores (n,) of finished images, or of their latents."""
        if self.scorer.looks_at == "images":
            return _score(self.scorer, drawn)
        features = self.scorer.encode_prompts(drawn.prompts)
        return self.scorer.score(drawn.latents, features, self.last_timestep).float().cpu()

    def _features(self, drawn: Sequence[Drawn], failed: Mapping[str, str]) -> Tensor | None:
        """Returns image features (s, n, D) of the first judge that has any, or the training scorer."""
        judges = [judge for name, judge in self.judges.scorers.items() if name not in failed]
        for scorer in (*judges, self.scorer):
            found = [scorer.image_features(each.pictures) for each in drawn]
            if found[0] is not None:
                return torch.stack(found)
        return None

    def _share_failures(self, failed: Mapping[str, str]) -> None:
        """Does on all processes without the scores that failed on any, and says so."""
        for name, line in dict(self.workers.gather(list(failed.items()))).items():
            self.session.say(line)
            self.failed.add(name)
            self.judges.scorers.pop(name, None)


def _score(scorer: Scorer, drawn: Drawn) -> Tensor:
    return scorer.scale * scorer.score_images(drawn.pictures, drawn.prompts)


def _asked(
    name: str, failed: dict[str, str], score: Callable[[Drawn], Tensor], drawn: Drawn
) -> Tensor:
    """Returns what `score` says of n images; NaN, with a line in `failed`, if it fails."""
    try:
        scores = score(drawn)
        if not scores.isfinite().all():
            raise ValueError("its scores are not finite")
        return scores
    except Exception as error:  # whatever is wrong with a judge, the run goes on
        failed[name] = without(name, error)
        return torch.full((len(drawn.prompts),), torch.nan)
