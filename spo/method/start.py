"""The start of a training run: config -> processes, models, session -> the loop."""

from contextlib import ExitStack
from dataclasses import asdict

from ml_collections import ConfigDict

from spo.data.token_lengths import describe_lengths
from spo.guard.evaluations import forget_evaluations
from spo.guard.judges import Judges
from spo.guard.watch import Watch
from spo.hub import commits
from spo.launch.workers import Workers
from spo.method.build import build_learner, build_lora
from spo.method.checkpoint import load_checkpoint
from spo.method.position import Position, TrainingState
from spo.method.preflight import Preflight, preflight
from spo.method.trainer import Trainer
from spo.models.device import minibatch_unet, set_up_device, speed_up
from spo.models.optimizers import check_optimizer
from spo.run.session import Session, open_run_dir
from spo.scorers import load_scorer, named_files


def train(config: ConfigDict) -> None:
    """Trains in one process, or as one of several that the launcher started.

    Raises UserError for bad input before any model loads, RunError if a run cannot continue, and
    Stopped after a signal.
    """
    with Workers(config.rank_timeout) as workers, ExitStack() as held:
        ready = None
        with workers.together():
            if workers.is_main:
                ready = preflight(config, workers.count)
                check_optimizer(config.train.optimizer, workers.device)
                run = open_run_dir(ready.run_dir, ready.recipe.config, ready.resume)
                held.enter_context(run)
        make_trainer(workers.from_main(ready), workers).run()


def make_trainer(ready: Preflight, workers: Workers) -> Trainer:
    """Loads the models, restores the checkpoint if there is one, and starts to record."""
    recipe, plan = ready.recipe, ready.plan
    session = Session(ready.run_dir, workers, ready.resume.checkpoint)
    session.say(ready.prompts.describe())
    session.say(plan.describe())
    set_up_device(workers.device, recipe.run.allow_tf32, recipe.run.deterministic)
    with workers.together():
        backbone = recipe.load_backbone(workers.device)
        scorer = load_scorer(recipe.scorer, workers.device)
        lora = build_lora(recipe, backbone.unet)
        speed_up(backbone, scorer, recipe.speed)
    unet = workers.wrap(minibatch_unet(backbone, recipe.speed))
    learner = build_learner(recipe, backbone, unet, lora, plan.accumulation_steps)
    state = TrainingState(Position())
    if session.saved is not None:
        with workers.together():
            state = load_checkpoint(session.saved, learner, plan, workers.rank)
        session.say("\n".join(ready.resume.describe()))
    for line in ready.notes:
        session.say(line)
    lengths = describe_lengths(ready.prompts.prompts, backbone.tokenizers | scorer.tokenizers)
    session.say(lengths)
    files = [recipe.model.model, recipe.model.vae, recipe.model.decoder]
    for source in (recipe.scorer, *ready.judges):
        files += named_files(source).values()
    facts = {
        "commits": commits(files, recipe.model.revision),
        "plan": asdict(plan),
        "prompts": ready.prompts.describe(),
        "prompt_lengths": lengths,
        "device": workers.device.type,
    }
    # Nothing is kept of a run that left no checkpoint.
    last = state.position.rollouts if session.saved else -1
    session.start(recipe.tracker, recipe.config, facts, "rollout", last)
    session.start_publishing(recipe.hub, recipe.push_every)
    watch = None
    if ready.validation_prompts:
        epochs = state.position.epochs if session.saved else -1
        session.on_main(lambda: forget_evaluations(ready.run_dir, epochs))
        judges = Judges(ready.judges, workers.device)
        prompts = ready.validation_prompts
        watch = Watch(session, backbone, scorer, judges, recipe.validation, prompts)
    return Trainer(ready, workers, session, backbone, scorer, learner, watch, state)
