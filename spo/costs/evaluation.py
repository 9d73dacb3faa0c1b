"""Counts what a run's own evaluations cost: images that are drawn, scored and judged."""

from dataclasses import dataclass, replace

import torch
from transformers import CLIPModel

from spo.costs.count import Costs
from spo.costs.load import META, Models, meta_kernels
from spo.costs.meter import DECODING, DENOISING, SCORING, Meter, flop_counter
from spo.costs.unloaded_scorers import local_folder
from spo.guard.judges import find_judges
from spo.run.validation import draw_batch
from spo.scorers import ScorerSource, options_of
from spo.scorers.clip import clip_config


@dataclass(frozen=True)
class EvaluationCosts:
    """FLOPs of an evaluation between two epochs."""

    drawing: int  # of all images
    judging: int  # reward and judges of all judged images
    unknown: tuple[str, ...]  # judges that are not counted


def count_evaluation(models: Models, costs: Costs, num_prompts: int) -> EvaluationCosts:
    """Counts an evaluation of `num_prompts` prompts on the meta device; `costs` are the iteration's."""
    recipe, settings = models.recipe, models.recipe.validation
    judged = min(settings.num_judged, num_prompts)
    again = judged * (settings.seeds_per_prompt - 1)
    images = num_prompts + again
    one_step = replace(settings, num_steps=1, num_judged=0)
    with meta_kernels(), flop_counter() as counter:
        meter = Meter(META, counter)
        parts = {DENOISING: (models.backbone, "predict"), DECODING: (models.backbone, "decode")}
        with meter.each_call(parts), models.learner.network(settings.weights):
            draw_batch(models.backbone, ["a prompt"], range(1), one_step)
    image = settings.num_steps * meter.flops[DENOISING] + meter.flops[DECODING]
    rollout = recipe.collect.rollout
    scored = costs.flops[SCORING] // (costs.pairs * rollout.num_candidates)
    judging, unknown = scored, []
    for source in find_judges(settings.judges, settings.judge_options, recipe.scorer)[0]:
        flops = _flops_of(source)
        judging += flops or 0
        unknown += [] if flops else [source.name]
    return EvaluationCosts(images * image, (judged + again) * judging, tuple(unknown))


def _flops_of(source: ScorerSource) -> int | None:
    """Returns the FLOPs of a CLIP that judges an image for its prompt; None for other judges."""
    options = options_of(source)
    with META:
        if "model" in options:
            import open_clip  # takes seconds

            from spo.scorers.open_clip import find_open_clip

            architecture, *_ = find_open_clip(options["model"], options["checkpoint"], "")
            network = open_clip.CLIP(**architecture)
            towers = network.encode_image, network.encode_text
            size, length = architecture["vision_cfg"]["image_size"], network.context_length
        elif "backbone" in options:
            config = clip_config(local_folder(options["backbone"], "clip_h", source.section))
            network = CLIPModel(config)
            towers = network.get_image_features, network.get_text_features
            size = config.vision_config.image_size
            length = config.text_config.max_position_embeddings
        else:
            return None
        with torch.no_grad(), meta_kernels(), flop_counter() as counter:
            towers[0](torch.empty(1, 3, size, size))
            towers[1](torch.zeros(1, length, dtype=torch.long))
    return counter.get_total_flops()
