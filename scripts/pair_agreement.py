"""How far a run's pairs change with what scores its candidates: a tiny decoder, another precision.

    python scripts/pair_agreement.py --config=config/tiny.py \\
        --compare=sample.decoder=assets/tiny/decoder

Rolls out the first prompts of the run exactly as training would, once, as its candidates do not hang
on their scores. Each `--compare=KEY=VALUE` (decoder, threshold, preference model) judges them beside
the config itself. `--config.lora.init_from=RUN` draws them with what a run has learned.
"""

import json
from dataclasses import asdict
from pathlib import Path

from absl import app, flags

from spo.command_line.flags import changed, define_config, exit_on_user_error, parse_flags

CONFIG = define_config("config/sd15.py")
COMPARE = flags.DEFINE_multi_string("compare", [], "KEY=VALUE that judges beside the config")
ROLLOUTS = flags.DEFINE_integer("rollouts", 4, "how many of the run's rollouts")
JSON = flags.DEFINE_string("json", "", "file for the figures")


def main(_) -> None:
    with exit_on_user_error():
        figures = compare(CONFIG.value)
        if JSON.value:
            from spo.atomic import write_file

            write_file(Path(JSON.value), (json.dumps(figures, indent=2) + "\n").encode())


def compare(config) -> dict:
    """Roll out, let each judge score, print a table for each change, and return the figures."""
    variants = check(config)

    from spo.costs.meter import DECODING, SCORING
    from spo.costs.pair_agreement import agreement

    judges, (ours, *others) = judge_rollouts(config, list(variants.values()))
    seconds = [
        {name: judge.meter.seconds[name] for name in (DECODING, SCORING)} for judge in judges
    ]
    figures = {"config": {"seconds": seconds[0]}}
    for change, theirs, taken in zip(variants, others, seconds[1:], strict=True):
        rows = {"all": agreement(ours, theirs)}
        for t in ours.timesteps.unique().flip(0).tolist():
            rows[f"t = {t}"] = agreement(ours.at(t), theirs.at(t))
        print(f"{change}\n\n{as_table(rows)}")
        figures[change] = {"seconds": taken} | {name: asdict(row) for name, row in rows.items()}
    for name, figure in figures.items():
        print(f"{name}: " + ", ".join(f"{k} {v:.2f} s" for k, v in figure["seconds"].items()))
    return figures


def check(config) -> dict:
    """The config of each --compare; UserError for what is wrong with one, before any model loads."""
    from spo.errors import UserError

    if not COMPARE.value:
        raise UserError(
            "--compare: name a change, e.g. --compare=sample.decoder=madebyollin/taesd."
        )
    if ROLLOUTS.value < 1:
        raise UserError(f"--rollouts: {ROLLOUTS.value} must be 1 or more.")
    if JSON.value and not Path(JSON.value).absolute().parent.is_dir():
        raise UserError(f"--json: there is no folder {Path(JSON.value).parent}; make it first.")
    variants = {change: changed(config, change) for change in COMPARE.value}

    from spo.costs.pair_agreement import check_change  # imports torch, which takes seconds

    check_change(config)
    for change, variant in variants.items():
        check_change(variant, change.partition("=")[0])
    return variants


def judge_rollouts(config, variants):
    """The judges of the config and of its variants, and what each makes of all comparisons."""
    from accelerate import PartialState
    from tqdm import tqdm

    from spo.costs.pair_agreement import concatenate, judge_rollout, load_judges
    from spo.launch.batch_plan import plan_batches
    from spo.lora_io.find import find_lora, read_lora
    from spo.method import build, preflight
    from spo.method.shared_rollout import first_slices
    from spo.models.backbone import Backbone

    plan, prompts = plan_batches(config, 1), preflight.read_training_prompts(config).prompts
    init, device = config.lora.init_from, PartialState().device
    path = find_lora(init, "lora.init_from") if init else None
    source = build.rollout_source(config)
    model = Backbone(source, config.family, config.mixed_precision, device)
    if path is not None:
        lora = build.build_lora(config, model.unet, seed=0)
        lora.assign(read_lora(path, lora, "lora.init_from"))
    judges = load_judges(model, config, variants)
    schedule, collect = model.schedule(config.sample.num_steps), build.collect_settings(config)
    slices = first_slices(len(prompts), plan, config.seed, ROLLOUTS.value)
    found = [[] for _ in judges]
    for part in tqdm(slices, desc="slices", leave=False):
        rows = [prompts[i] for i in part.prompt_ids]
        steps = judge_rollout(model, schedule, collect, judges, rows, part.generator)
        for of_judge, new in zip(found, steps, strict=True):
            of_judge.extend(new)
    return judges, [concatenate(parts) for parts in found]


def as_table(rows) -> str:
    """Agreements by their names, as a table in Markdown."""
    head = (
        "",
        "comparisons",
        "best",
        "worst",
        "both",
        "both, of pairs",
        "kept or not",
        "correlation",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in rows.items():
        shares = (row.best, row.worst, row.both, row.both_of_pairs, row.kept)
        cells = (name, str(row.comparisons), *(f"{100 * share:.1f} %" for share in shares))
        lines.append("| " + " | ".join((*cells, f"{row.correlation:.3f}")) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
