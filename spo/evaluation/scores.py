"""Scores of images, kept batch by batch as they are computed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spo.atomic import write_json
from spo.errors import RunError, UserError
from spo.evaluation.image_sets import ImageSet, batches, read_json
from spo.evaluation.results import ScorerInfo
from spo.run.folder import file_digest
from spo.scorers import Scorer

_SCORER = "scorer.json"


@dataclass(frozen=True)
class ScoreFolder:
    """The scores of one scorer: a folder per model, a file per batch."""

    path: Path
    name: str
    options: Mapping[str, Any]
    contents: Mapping[str, str] = field(default_factory=dict)  # of the scorer's files

    def info(self) -> ScorerInfo | None:
        """Returns the scorer, None if it never loaded; raises UserError for scores of another one."""
        file = self.path / _SCORER
        if not file.exists():
            return None
        found = read_json(file)
        if found["options"] != dict(self.options):
            raise UserError(
                f"scorer_options.{self.name}: {self.path} holds scores of {found['options']}, not "
                f"{dict(self.options)}; choose another run_name, or delete that folder."
            )
        before = found.get("contents", {})
        changed = sorted(k for k, v in self.contents.items() if v != before.get(k))
        if changed:
            raise UserError(
                f"scorers: {self.path} holds scores of another {', '.join(changed)}; choose another "
                "run_name, or delete that folder."
            )
        return ScorerInfo(**found["scorer"])

    def claim(self, scorer: Scorer) -> None:
        """Writes the scorer's name, title, scale and options into the folder."""
        info = asdict(ScorerInfo(self.name, scorer.title, scorer.scale))
        own = {"options": dict(self.options), "contents": dict(self.contents)}
        write_json(self.path / _SCORER, {"scorer": info, **own})

    def missing(self, images: ImageSet, batch_size: int) -> list[range]:
        """Returns the batches that have no scores yet, or scores of other images."""
        every = batches(len(images.files), batch_size)
        return [batch for batch in every if self._read(images, batch) is None]

    def score(self, scorer: Scorer, images: ImageSet, batch: range, prompts: Sequence[str]) -> None:
        """Scores a batch and writes its file; raises RunError for a score that is not finite."""
        digests = [file_digest(images.files[i]) for i in batch]
        pictures = [images.read(i, prompts[i]) for i in batch]
        scores = scorer.score_images(pictures, [prompts[i] for i in batch]).tolist()
        for i, score in zip(batch, scores, strict=True):
            if not math.isfinite(score):
                raise RunError(f"{self.name} gives {score} to {images.files[i]} ({prompts[i]!r}).")
        write_json(self._file(images, batch), {"images": digests, "scores": scores})

    def read(self, images: ImageSet, batch_size: int) -> list[float]:
        """Returns all scores of a model, times the scorer's scale, in the order of the prompts."""
        scale = self.info().scale
        parts = [self._read(images, batch) for batch in batches(len(images.files), batch_size)]
        return [scale * score for part in parts for score in part]

    def _file(self, images: ImageSet, batch: range) -> Path:
        return self.path / images.name / f"{batch.start:05d}-{batch.stop:05d}.json"

    def _read(self, images: ImageSet, batch: range) -> list[float] | None:
        file = self._file(images, batch)
        if not file.exists():
            return None
        content = read_json(file)
        same = content["images"] == [file_digest(images.files[i]) for i in batch]
        return content["scores"] if same else None
