"""Draw what the method sees: the K candidates of every step of one prompt's rollout.

    python scripts/show_rollout.py --config=config/tiny.py \\
        --prompt="a small red circle on a blue background"

One row per comparison: the decoded candidates with their scores, the best framed green, the worst red,
and which one the rollout went on from. `--lora` draws with a trained LoRA (run, file or Hub id).
"""

from pathlib import Path

from absl import app, flags

from spo.command_line.flags import define_config, exit_on_user_error, parse_flags

CONFIG = define_config("config/sd15.py")
PROMPT = flags.DEFINE_string("prompt", None, "what to roll out", required=True)
LORA = flags.DEFINE_string("lora", "", "LoRA that draws the candidates; none: the base model")
SEED = flags.DEFINE_integer("seed", 0, "seed of the rollout")
OUT = flags.DEFINE_string("out", "rollout.png", "picture to write")


def main(_) -> None:
    with exit_on_user_error():
        show_rollout(CONFIG.value, PROMPT.value, LORA.value, SEED.value, Path(OUT.value))


def show_rollout(config, prompt: str, lora_spec: str, seed: int, out: Path) -> None:
    """Roll out one prompt and write the picture."""
    import torch
    from accelerate import PartialState
    from tqdm import tqdm

    from spo import scorers
    from spo.errors import UserError
    from spo.lora_io.find import find_lora, read_lora
    from spo.method import build
    from spo.method.collect import roll_out, score_candidates
    from spo.models import backbone
    from spo.run.pictures import grid

    build.check(config)
    backbone.check_source(build.rollout_source(config), config.family)
    lora_path = find_lora(lora_spec, "--lora") if lora_spec else None
    if out.suffix != ".png":
        raise UserError(f"--out: {out} must end in .png")
    out.parent.mkdir(parents=True, exist_ok=True)
    device = PartialState().device
    model = backbone.Backbone(
        build.rollout_source(config), config.family, config.mixed_precision, device
    )
    if lora_spec:
        lora = build.build_lora(config, model.unet, seed=0)
        lora.assign(read_lora(lora_path, lora, "--lora"))
    scorer = scorers.load_scorer(build.scorer_source(config), device)
    features = scorer.encode_prompts([prompt])
    collect = build.collect_settings(config)

    comparisons = roll_out(
        model,
        model.schedule(config.sample.num_steps),
        collect,
        model.encode_prompts([prompt]),
        torch.Generator().manual_seed(seed),
    )
    seen = []
    for candidates in tqdm(comparisons, desc="comparisons"):
        images = []

        def decode(latents, images=images):
            images.append(model.decode_candidates(latents))
            return images[-1]

        scores = score_candidates(candidates, decode, scorer, features, collect.decode_batch_size)
        seen.append((candidates, scores[:, 0], torch.cat(images)))
    rows, labels = draw_rows(seen, collect.pairs)
    weights = f"LoRA {lora_spec}" if lora_spec else "base model"
    grid(rows, f"{prompt}  ({weights})", labels, side=160).save(out)
    print(f"picture: {out}")


def draw_rows(seen, settings):
    """Rows of cells and their labels from (candidates, scores (K,), images (K, 3, H, W))."""
    from spo.method.pairs import preference_gap
    from spo.run.pictures import Cell
    from spo.scorers.pixels import to_pil

    rows, labels = [], []
    for i, (candidates, scores, images) in enumerate(seen):
        goes_on = None
        if i + 1 < len(seen):  # the next window starts from the latents of one of these candidates
            start = seen[i + 1][0].window[0].latents[0, 0]
            ends = candidates.window[-1].next_latents[:, 0]
            goes_on = int((ends == start).flatten(1).all(dim=1).nonzero()[0])
        frames = {int(scores.argmin()): "red", int(scores.argmax()): "green"}
        rows.append(
            [
                Cell(
                    image,
                    f"{score:.2f}" + (" goes on" if k == goes_on else ""),
                    frames.get(k),
                )
                for k, (image, score) in enumerate(zip(to_pil(images), scores, strict=True))
            ]
        )
        gap = preference_gap(scores[:, None]).item()
        kept = gap > settings.threshold or (candidates.is_final and settings.keep_all_final)
        labels.append(
            f"from t = {candidates.window[0].timestep}\n"
            f"scored at {candidates.score_timestep}\n"
            f"gap {gap:.2f}\n" + ("pair" if kept else "no pair")
        )
    return rows, labels


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
