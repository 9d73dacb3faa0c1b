"""Draws one prompt's rollout: the K candidates of every comparison, with their scores."""

from itertools import islice

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from spo.lora_io.find import find_lora, read_lora
from spo.method.build import Recipe
from spo.method.collect import roll_out, score_candidates
from spo.method.pairs import Chosen, PairSettings, choose, differ_enough
from spo.models.device import set_up_device
from spo.models.gpu import pick_device
from spo.models.loading import check_source
from spo.run.pictures import Cell, grid
from spo.scorers import check_scorer, load_scorer
from spo.scorers.pixels import to_pil
from spo.types import Candidates


def draw_rollout(recipe: Recipe, prompt: str, lora_spec: str, seed: int) -> Image.Image:
    """Rolls out `prompt` with a LoRA (run, file or Hub id; "" for the base model) and draws it.

    One row per comparison: winners framed green, losers red, and the one with which the rollout
    continues named. Images are what the next step predicts, also where the scorer looks at the noisy
    latents. Raises UserError for a wrong model, scorer or LoRA.
    """
    check_scorer(recipe.scorer, recipe.run.family, check_source(recipe.model, recipe.run.family))
    stop = recipe.collect.rollout.stop_at or recipe.collect.rollout.num_steps
    recipe = recipe.drawing_images()
    lora_path = find_lora(lora_spec, "--lora") if lora_spec else None
    device, collect = pick_device(), recipe.collect
    set_up_device(device, recipe.run.allow_tf32, recipe.run.deterministic)
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
    comparisons = islice(comparisons, stop - collect.rollout.branch_from)
    for candidates in tqdm(comparisons, desc="comparisons"):
        decoded.clear()
        scores = score_candidates(candidates, decode, scorer, features, collect)
        if scorer.looks_at == "latents":
            for part in candidates.latents[:, 0].split(collect.decode_batch_size):
                decode(part)
        chosen = choose(scores, collect.pairs, torch.Generator().manual_seed(seed))
        seen.append((candidates, scores, chosen, torch.cat(decoded)))
        told = collect.timestep_told(candidates, scorer)
        labels.append(_label(candidates, chosen.gap(scores), told, collect.pairs))
    following = [*(candidates for candidates, *_ in seen[1:]), None]
    rows = [_row(*one, after) for one, after in zip(seen, following, strict=True)]
    weights = f"LoRA {lora_spec}" if lora_spec else "base model"
    return grid(rows, f"{prompt}  ({weights})", labels, side=160)


def _label(candidates: Candidates, gaps: Tensor, told: int, settings: PairSettings) -> str:
    """Returns the words beside a row; the scorer was told the timestep `told`."""
    kept = differ_enough(candidates, gaps, settings).any()
    return (
        f"from t = {candidates.window[0].timestep}\nscored at {told}\n"
        f"gap {gaps[0].item():.2f}\n" + ("pair" if kept else "no pair")
    )


def _row(
    candidates: Candidates, scores: Tensor, chosen: Chosen, images: Tensor, after: Candidates | None
) -> list[Cell]:
    """Returns cells of candidates with scores (K, 1) and images (K, 3, H, W) in [-1, 1]."""
    continues = None
    if after is not None:  # the next window starts from the latents of one of the candidates
        ends = candidates.window[-1].next_latents[:, 0]
        same = (ends == after.window[0].latents[0, 0]).flatten(1).all(dim=1)
        continues = int(same.nonzero()[0])
    frames = dict.fromkeys(chosen.lose.tolist(), "red")
    frames |= dict.fromkeys(chosen.win.tolist(), "green")
    return [
        Cell(image, f"{score:.2f}" + (" continues" if k == continues else ""), frames.get(k))
        for k, (image, score) in enumerate(zip(to_pil(images), scores[:, 0].tolist(), strict=True))
    ]
