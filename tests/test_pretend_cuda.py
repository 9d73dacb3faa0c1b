"""All that runs on a GPU, on one that is not there: devices, dtypes, and how often Python waits for it."""

import functools
import inspect
import textwrap

import numpy as np
import pytest
import torch
from finished_images import PROMPTS, pictures, tiny_scorers
from helpers import GOLDEN, MODELS, randn
from labelled_pairs import make_row
from pretend_cuda import CPU, CUDA, DeviceMismatch, DtypeMismatch, by_module, pretend_cuda
from torch import nn

from config import lrm_tiny, spm_tiny
from spo.errors import Stopped
from spo.method import collect, learner, rollout
from spo.method.build import build_learner, build_lora, read_recipe
from spo.method.collect import collect_rollout
from spo.method.replay import replay_trace
from spo.models import decoder, optimizers
from spo.models.backbone import DTYPES, Backbone
from spo.preference.batches import RawBatch, decode_batch
from spo.preference.pair_learner import PreferenceLearner
from spo.preference.pair_recipe import build_preparation, build_scorer, read_pair_recipe
from spo.preference.replay import replay_latent_reward
from spo.scorers import SCORERS, candidate_scorer, clip, image_scorer, load_scorer
from spo.scorers.latent_reward import LatentRewardModel
from spo.scorers.latent_reward_scorer import LatentRewardScorer
from spo.scorers.pickscore import CLIPScorer
from spo.scorers.step_aware_clip import StepAwareScorer
from tests import small_runs
from tests.small_runs import OF_SDXL, ROOT, differences, judged, run, small_config

slow = pytest.mark.slow
WEIGHTS = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
METHOD = ("rollout", "collect", "pairs", "losses", "learner", "ddim")
OF_METHOD = {f"method/{name}" for name in METHOD}
OF_MODELS = {f"models/{name}" for name in ("backbone", "decoder", "lora", "optimizers")}
OF_SPM = {f"scorers/{name}" for name in ("step_aware_clip", "clip", "pickscore")}
OF_LRM = {f"scorers/{name}" for name in ("latent_reward", "latent_reward_scorer")}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.chdir(ROOT)
    clip._per_channel.cache_clear()  # whose tensors would not be made again


def changes_of(kind, family, precision):
    """GradSPO by an SPM with merged LoRA; or SPO by an LRM, with neither EMA nor merging."""
    changes = {"mixed_precision": precision, "train.gradient_accumulation_steps": 2}
    if kind == "spm":
        own = OF_SDXL if family == "sdxl" else {}
        return changes | own | {"preference.dtype": WEIGHTS[precision], "algorithm": "gradspo"}
    own = judged(family, **changes)
    own["preference.kwargs"] = own["preference.kwargs"] | {"dtype": WEIGHTS[precision]}
    unmerged = {"lora.merge": False, "train.gradient_checkpointing": True}
    return own | unmerged | {"algorithm": "spo", "eval_interval": 0}


class Small:
    """A small training on a device, without files."""

    def __init__(self, folder, device, **changes):
        self.recipe = recipe = read_recipe(small_config(folder, **changes))
        self.backbone, self.device = recipe.load_backbone(device), device
        self.scorer = load_scorer(recipe.scorer, device)
        unet, lora = self.backbone.unet, build_lora(recipe, self.backbone.unet)
        self.learner = build_learner(recipe, self.backbone, unet, lora, accumulation_steps=2)

    def collect(self):
        rows, generator = torch.arange(2, device=self.device), torch.Generator().manual_seed(7)
        drawn_with = self.backbone, self.scorer, self.learner.sampler, self.recipe.collect
        with self.learner.drawing_network():
            return collect_rollout(*drawn_with, PROMPTS[:2], rows, generator)

    def train(self, pairs):
        return [self.learner.train_minibatch(pairs.select(slice(i, i + 1)), i) for i in range(4)]

    def run(self):
        """Two rollouts of 4 pairs, with an update after each second one; returns the numbers."""
        found = {}
        for i in range(2):
            collected = self.collect()
            steps = self.train(collected.pairs)
            scores = [comparison.scores for comparison in collected.comparisons]
            found |= {f"{i}.scores": torch.cat(scores), f"{i}.latents": collected.pairs.latents}
            found[f"{i}.losses"] = torch.stack([step.output.loss for step in steps])
            found[f"{i}.grad_norm"] = torch.stack([step.update.grad_norm for step in steps[1::2]])
        weights = {"policy": self.learner.lora.parameters, "ema": self.learner.ema or {}}
        for name, tensors in weights.items():
            found |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
        return {name: value.detach().cpu() for name, value in found.items()}


def matrix(*quick):
    """Every kind of run, family and precision: those of `quick`, and slow ones."""
    every = [(k, f, p) for k in ("spm", "lrm") for f in ("sd15", "sdxl") for p in WEIGHTS]
    return [pytest.param(*case, marks=() if case in quick else slow) for case in every]


@functools.cache
def on_the_cpu(make, *case):
    return make(*case, CPU)


def compare(found, expected, precision, atol=0.1):
    """Bit for bit in fp32, else what has no sharp steps, roughly."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.isfinite().all() and value.dtype == expected[name].dtype, name
        if precision == "no":
            assert torch.equal(value, expected[name]), name
        elif name.endswith(("scores", "losses", "grad_norm")):
            torch.testing.assert_close(value, expected[name], rtol=0, atol=atol)


def train_small(kind, family, precision, device):
    return Small(ROOT / "none" / "run", device, **changes_of(kind, family, precision)).run()


@pytest.mark.parametrize(
    ("kind", "family", "precision"),
    matrix(("spm", "sd15", "no"), ("lrm", "sdxl", "bf16"), ("spm", "sdxl", "fp16")),
)
def test_rollouts_and_training(kind, family, precision):
    with pretend_cuda() as gpu:
        found = train_small(kind, family, precision, CUDA)
    compare(found, on_the_cpu(train_small, kind, family, "no"), precision)
    seen = OF_METHOD | OF_MODELS | (OF_SPM if kind == "spm" else OF_LRM)
    seen -= {"models/decoder"} if kind == "lrm" else set()
    assert seen <= by_module(gpu.operations).keys()
    assert sum(gpu.operations.values()) > 20_000


@pytest.mark.parametrize("family", ["sd15", pytest.param("sdxl", marks=slow)])
def test_a_run_that_was_stopped_goes_on_and_leaves_what_it_leaves_on_the_cpu(
    tmp_path, monkeypatch, family
):
    changes = {"num_epochs": 1, **(OF_SDXL if family == "sdxl" else {})}
    whole = run(tmp_path / "cpu" / "run", **changes)
    monkeypatch.setattr(small_runs, "minibatches", 0)
    monkeypatch.setenv("SIGNAL", "15")
    monkeypatch.setenv("SIGNAL_AT", "3")
    with pretend_cuda():
        with pytest.raises(Stopped):
            run(tmp_path / "gpu" / "run", **changes)
        resumed = run(tmp_path / "gpu" / "run", **changes)
    assert differences(whole, resumed) == []
    assert (resumed / "starts.jsonl").read_text().count('"device": "cuda"') == 2


@pytest.mark.parametrize(
    "trace",
    [
        pytest.param(path.parent.name, marks=() if path.parent.name.startswith("lrm_") else slow)
        for path in sorted(GOLDEN.glob("*/meta.json"))
    ],
)
def test_a_trace_replays_exactly_as_on_the_cpu(trace):
    replay = replay_latent_reward if trace.startswith("lrm_") else replay_trace
    with pretend_cuda() as gpu:
        found = replay(GOLDEN / trace, MODELS, CUDA)
    assert found == replay(GOLDEN / trace, MODELS) and found["failures"] == []
    assert sum(gpu.operations.values()) > 1000


def train_preference_model(kind, family, precision, device):
    """Returns the numbers of an update of a preference model, and its scores after it."""
    config = {"spm": spm_tiny, "lrm": lrm_tiny}[kind].get_config()
    clip = {name: str(MODELS / "tiny-clip") for name in ("backbone", "processor")}
    own = {"guidance_scale": 7.5, "text_projection": clip["backbone"]} if kind == "lrm" else clip
    changes = {f"preference.{name}": value for name, value in own.items()}
    changes |= {f"labels.{name}": value for name, value in clip.items()}
    changes |= {"family": family, "mixed_precision": precision, "labels.source": "pickscore"}
    changes |= {"pretrained.model": str(MODELS / f"tiny-{family}"), "data.image_size": 16}
    changes |= {"train.gradient_checkpointing": True, "train.warmup_steps": 0}
    config.update_from_flattened_dict(changes)
    recipe = read_pair_recipe(config)
    preparation = build_preparation(recipe, device)
    scorer = build_scorer(recipe, preparation.backbone)
    learner = PreferenceLearner(scorer, scorer, recipe.train, device, DTYPES[precision])
    batch = decode_batch(RawBatch([make_row(i) for i in range(4)], range(4)), 16)
    losses, scores = learner.backward(preparation.training_pairs(batch, 4.0), last=True)
    found = {"losses": losses, "scores": scores, "norm": learner.update().grad_norm}
    timestep, images = next(iter(preparation.validation_images(batch)))
    timesteps = torch.full((4,), timestep, device=device)
    found["after"] = learner.scores(images, timesteps, *preparation.input_ids(batch))
    found |= learner.scorer.learned()
    return {name: value.detach().cpu() for name, value in found.items()}


@pytest.mark.parametrize(
    ("kind", "family", "precision"),
    matrix(("spm", "sd15", "bf16"), ("spm", "sdxl", "no"), ("lrm", "sd15", "fp16")),
)
def test_a_preference_model_learns(kind, family, precision):
    with pretend_cuda() as gpu:
        found = train_preference_model(kind, family, precision, CUDA)
    compare(found, on_the_cpu(train_preference_model, kind, family, "no"), precision)
    seen = {"preference/preparation", "preference/pair_learner", "models/optimizers"}
    assert seen <= by_module(gpu.operations).keys()


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return tiny_scorers(tmp_path_factory.mktemp("scorers"))


@pytest.mark.parametrize("name", [name for name in SCORERS if name != "latent_reward"])
def test_a_scorer_of_finished_images_and_of_candidates(options, name):
    source, images = image_scorer(name, options[name]), randn(3, 3, 64, 64, seed=0).clamp(-1, 1)

    def scores(device):
        scorer = load_scorer(source, device)
        features = scorer.encode_prompts(PROMPTS)[torch.arange(3, device=device)]
        candidates = scorer.score(images.to(device), features, 501)
        assert candidates.device.type == device.type
        return [scorer.score_images(pictures(), PROMPTS), candidates.cpu()]

    with pretend_cuda() as gpu:
        found = scores(CUDA)
    assert all(map(torch.equal, found, scores(CPU)))
    module = SCORERS[name].partition(":")[0].removeprefix("spo.").replace(".", "/")
    assert by_module(gpu.operations)[module] > 0


def test_a_rollout_waits_once_for_the_gpu_and_a_minibatch_never():
    """Besides the copies of the prompts' tokens, made before there is anything to wait for."""
    changes = changes_of("spm", "sdxl", "fp16")
    with pretend_cuda() as gpu:
        small = Small(ROOT / "none" / "run", CUDA, **changes)
        pairs = small.collect().pairs  # makes constants of the device
        gpu.waits.clear()
        small.collect()
        tokens = {"models/backbone": 4, "scorers/pickscore": 1}
        assert by_module(gpu.waits) == tokens | {"method/collect": 1}
        gpu.waits.clear()
        steps = small.train(pairs)
        updates = sum(step.update is not None for step in steps)
        # GradScaler reads whether the gradients overflowed.
        assert by_module(gpu.waits) == {"models/optimizers": 3 * updates}


# One move to the device, or one cast, taken out: (where, text, what stands there instead, precision).
MUTATIONS = [
    (rollout, "_to", "drawn.to(device, non_blocking=True)", "drawn", "no"),
    (CLIPScorer, "encode_prompts", ".to(self.device)", "", "no"),
    (StepAwareScorer, "score", ", device=images.device", "", "no"),
    (Backbone, "predict", ", device=latents.device", "", "no"),
    (Backbone, "encode_prompts", ", device=self.device", "", "no"),
    (collect, "score_candidates", ", device=latents.device", "", "no"),
    (learner.Learner, "_epsilon", ", device=latents.device", "", "no"),
    (Backbone, "predict", "latents.to(self.dtype)", "latents", "fp16"),
    (decoder, "decode", "latents.to(autoencoder.dtype)", "latents", "bf16"),
    (StepAwareScorer, "score", ".to(self.clip.visual_projection.weight.dtype)", "", "fp16"),
]
OF_THE_LRM = [
    (LatentRewardScorer, "encode_prompts", "ids.to(self.device)", "ids", "no"),
    (LatentRewardScorer, "score", ", device=images.device", "", "no"),
    (LatentRewardModel, "_pooled", "latents.to(hidden.dtype)", "latents", "fp16"),
    (optimizers, "apply_gradients", "scaler.unscale_(optimizer)", "pass", "fp16"),
]


@pytest.mark.parametrize(
    ("kind", "owner", "name", "old", "new", "precision"),
    [("spm", *mutation) for mutation in MUTATIONS] + [("lrm", *m) for m in OF_THE_LRM],
)
def test_what_is_taken_out_is_missed(monkeypatch, kind, owner, name, old, new, precision):
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) >= 1
    scope = inspect.unwrap(function).__globals__
    made = {}
    exec(source.replace(old, new), scope, made)
    for place in {owner, *(m for m in (collect, learner, decoder) if hasattr(m, name))}:
        monkeypatch.setattr(place, name, made[name])
    with pretend_cuda(), pytest.raises((DeviceMismatch, DtypeMismatch, RuntimeError)):
        train_small(kind, "sdxl", precision, CUDA)
