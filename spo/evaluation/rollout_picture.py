"""Draws one prompt's rollout: the K candidates of every comparison, with their scores."""

from dataclasses import dataclass

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from spo.lora_io.find import find_lora, read_lora
from spo.method.build import Recipe
from spo.method.collect import roll_out, score_candidates
from spo.method.pairs import Chosen, choose, differ_enough
from spo.models.loading import check_source
from spo.run.pictures import Cell, grid
from spo.scorers import check_scorer, load_scorer
from spo.scorers.pixels import to_pil
from spo.types import Candidates


@dataclass(frozen=True)
class ComparedCandidates:
    """The candidates of one comparison of one prompt."""

    candidates: Candidates
    scores: Tensor  # (K, 1)
    chosen: Chosen
    images: Tensor  # (K, 3, H, W) in [-1, 1]


def draw_rollout(recipe: Recipe, prompt: str, lora_spec: str, seed: int) -> Image.Image:
    """Rolls out `prompt` with a LoRA (run, file or Hub id; "" for the base model) and draws it.

    One row per comparison: winners framed green, losers red, and the one with which the
    rollout continues named. Raises UserError for a wrong model, scorer or LoRA.
    """
    check_source(recipe.model, recipe.run.family)
    check_scorer(recipe.scorer)
    lora_path = find_lora(lora_spec, "--lora") if lora_spec else None
    device, collect = PartialState().device, recipe.collect
    model = recipe.load_backbone(device)
    if lora_path is not None:
        lora = recipe.lora.add_to(model.unet, seed=0)
        lora.assign(read_lora(lora_path, lora, "--lora"))
    scorer = load_scorer(recipe.scorer, device)
    features, conditioning = scorer.encode_prompts([prompt]), model.encode_prompts([prompt])
    sampler, generator = recipe.load_sampler(model), torch.Generator().manual_seed(seed)
    decoded: list[Tensor] = []

    def decode(latents: Tensor) -> Tensor:
        decoded.append(model.decode_candidates(latents))
        return decoded[-1]

    seen, labels = [], []
    comparisons = roll_out(model, sampler, collect, conditioning, generator)
    for candidates in tqdm(comparisons, desc="comparisons"):
        decoded.clear()
        scores = score_candidates(candidates, decode, scorer, features, collect.decode_batch_size)
        chosen = choose(scores, collect.pairs, torch.Generator().manual_seed(seed))
        seen.append(ComparedCandidates(candidates, scores, chosen, torch.cat(decoded)))
        gaps = chosen.gap(scores)
        kept = differ_enough(candidates, gaps, collect.pairs).any()
        labels.append(
            f"from t = {candidates.window[0].timestep}\nscored at {candidates.score_timestep}\n"
            f"gap {gaps[0].item():.2f}\n" + ("pair" if kept else "no pair")
        )
    rows = [_row(one, after) for one, after in zip(seen, [*seen[1:], None], strict=True)]
    weights = f"LoRA {lora_spec}" if lora_spec else "base model"
    return grid(rows, f"{prompt}  ({weights})", labels, side=160)


def _row(compared: ComparedCandidates, after: ComparedCandidates | None) -> list[Cell]:
    continues = None
    if after is not None:  # the next window starts from the latents of one of these candidates
        start = after.candidates.window[0].latents[0, 0]
        ends = compared.candidates.window[-1].next_latents[:, 0]
        continues = int((ends == start).flatten(1).all(dim=1).nonzero()[0])
    win, lose = compared.chosen.win.tolist(), compared.chosen.lose.tolist()
    frames = dict.fromkeys(lose, "red") | dict.fromkeys(win, "green")
    images, scores = to_pil(compared.images), compared.scores[:, 0].tolist()
    return [
        Cell(image, f"{score:.2f}" + (" continues" if k == continues else ""), frames.get(k))
        for k, (image, score) in enumerate(zip(images, scores, strict=True))
    ]
