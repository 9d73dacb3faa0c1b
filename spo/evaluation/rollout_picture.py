"""Draws one prompt's rollout: the K candidates of every comparison, with their scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import PartialState
from ml_collections import ConfigDict
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from spo.lora_io.find import find_lora, read_lora
from spo.method.build import read_recipe
from spo.method.collect import roll_out, score_candidates
from spo.method.pairs import Chosen, PairSettings, choose, differ_enough
from spo.models.loading import check_source
from spo.run.pictures import Cell, grid
from spo.scorers import check_scorer, load_scorer
from spo.scorers.pixels import to_pil
from spo.types import Candidates


@dataclass(frozen=True)
class Scored:
    """The candidates of one comparison of one prompt."""

    candidates: Candidates
    scores: Tensor  # (K, 1)
    chosen: Chosen
    images: Tensor  # (K, 3, H, W) in [-1, 1]


def draw_rollout(config: ConfigDict, prompt: str, lora_spec: str, seed: int) -> Image.Image:
    """Rolls out `prompt` with a LoRA (run, file or Hub id; "" for the base model) and draws it.

    One row per comparison: winners framed green, losers red, and the one with which the
    rollout continues named. Raises UserError for a wrong config or LoRA.
    """
    recipe = read_recipe(config)
    check_source(recipe.model, recipe.run.family)
    check_scorer(recipe.scorer)
    lora_path = find_lora(lora_spec, "--lora") if lora_spec else None
    device, collect = PartialState().device, recipe.collect
    model = recipe.load_backbone(device)
    if lora_path is not None:
        lora = recipe.lora.add_to(model.unet, seed=0)
        lora.assign(read_lora(lora_path, lora, "--lora"))
    scorer = load_scorer(recipe.scorer, device)
    features = scorer.encode_prompts([prompt])
    comparisons = roll_out(
        model,
        recipe.load_sampler(model),
        collect,
        model.encode_prompts([prompt]),
        torch.Generator().manual_seed(seed),
    )
    seen = []
    for candidates in tqdm(comparisons, desc="comparisons"):
        images: list[Tensor] = []

        def decode(latents: Tensor, images: list[Tensor] = images) -> Tensor:
            images.append(model.decode_candidates(latents))
            return images[-1]

        scores = score_candidates(candidates, decode, scorer, features, collect.decode_batch_size)
        chosen = choose(scores, collect.pairs, torch.Generator().manual_seed(seed))
        seen.append(Scored(candidates, scores, chosen, torch.cat(images)))
    rows = [_cells(one, after) for one, after in zip(seen, [*seen[1:], None], strict=True)]
    weights = f"LoRA {lora_spec}" if lora_spec else "base model"
    labels = [_label(scored, collect.pairs) for scored in seen]
    return grid(rows, f"{prompt}  ({weights})", labels, side=160)


def _cells(scored: Scored, after: Scored | None) -> list[Cell]:
    continues = None
    if after is not None:  # the next window starts from the latents of one of these candidates
        start = after.candidates.window[0].latents[0, 0]
        ends = scored.candidates.window[-1].next_latents[:, 0]
        continues = int((ends == start).flatten(1).all(dim=1).nonzero()[0])
    win, lose = scored.chosen.win.tolist(), scored.chosen.lose.tolist()
    frames = dict.fromkeys(lose, "red") | dict.fromkeys(win, "green")
    return [
        Cell(image, f"{score:.2f}" + (" goes on" if k == continues else ""), frames.get(k))
        for k, (image, score) in enumerate(
            zip(to_pil(scored.images), scored.scores[:, 0].tolist(), strict=True)
        )
    ]


def _label(scored: Scored, settings: PairSettings) -> str:
    candidates, gaps = scored.candidates, scored.chosen.gap(scored.scores)
    kept = differ_enough(candidates, gaps, settings).any()
    return (
        f"from t = {candidates.window[0].timestep}\n"
        f"scored at {candidates.score_timestep}\n"
        f"gap {gaps[0].item():.2f}\n" + ("pair" if kept else "no pair")
    )
