"""All that a GPU does, on one that is not there: devices, dtypes, and how often Python waits for it."""

from __future__ import annotations

import functools
import inspect
import pkgutil
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from finished_images import PROMPTS, pictures, tiny_scorers
from helpers import GOLDEN, MODELS, randn
from labelled_pairs import make_row
from pretend_cuda import CPU, CUDA, DeviceMismatch, DtypeMismatch, by_module, pretend_cuda

from config import lrm_tiny, spm_tiny
from spo.errors import Stopped
from spo.method.build import build_learner, build_lora, read_recipe
from spo.method.collect import collect_rollout
from spo.method.replay import Replay
from spo.models.backbone import DTYPES
from spo.preference.batches import RawBatch, decode_batch
from spo.preference.pair_learner import PreferenceLearner
from spo.preference.pair_recipe import build_preparation, build_scorer, read_pair_recipe
from spo.preference.replay import replay_latent_reward
from spo.scorers import SCORERS, clip, image_scorer, load_scorer
from tests import small_runs
from tests.small_runs import OF_SDXL, ROOT, differences, judged, run, small_config

slow = pytest.mark.slow
WEIGHTS = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
COVERED = {
    f"method/{name}" for name in ("rollout", "collect", "pairs", "losses", "learner", "ddim")
}
COVERED |= {"models/backbone", "models/lora", "models/optimizers"}
COVERED_BY = {
    "spm": {"scorers/step_aware_clip", "scorers/pickscore", "scorers/clip", "models/decoder"},
    "lrm": {"scorers/latent_reward", "scorers/latent_reward_scorer"},
}


def matrix(*quick):
    """Every kind of run, family and precision: those of `quick`, and slow ones."""
    every = [(k, f, p) for k in ("spm", "lrm") for f in ("sd15", "sdxl") for p in WEIGHTS]
    return [pytest.param(*case, marks=() if case in quick else slow) for case in every]


@functools.cache
def on_the_cpu(make, *case):
    return make(CPU, *case)


def compare(found, expected, precision):
    """Bit for bit in fp32, else roughly, in what has no sharp steps."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.isfinite().all() and value.dtype == expected[name].dtype, name
        if precision == "no":
            assert torch.equal(value, expected[name]), name
        elif name in ("scores", "losses"):
            torch.testing.assert_close(value, expected[name], rtol=0.15, atol=0.1)


def changes_of(kind, family, precision):
    """GradSPO by an SPM with merged LoRA; or SPO by an LRM, with neither EMA nor merging."""
    changes = {"mixed_precision": precision, "sample.num_steps": 3, "sample.branch_from": 1}
    if kind == "spm":
        changes |= OF_SDXL if family == "sdxl" else {}
        return changes | {"algorithm": "gradspo", "preference.dtype": WEIGHTS[precision]}
    changes |= judged(family) | {"algorithm": "spo", "eval_interval": 0}
    changes["preference.kwargs"] = changes["preference.kwargs"] | {"dtype": WEIGHTS[precision]}
    return changes | {"lora.merge": False, "train.gradient_checkpointing": True}


def train_lora(device, kind, family, precision, loaded=lambda: None):
    """Returns the numbers of a rollout, an update by two minibatches, and a second rollout."""
    recipe = read_recipe(small_config(ROOT / "none", **changes_of(kind, family, precision)))
    backbone, scorer = recipe.load_backbone(device), load_scorer(recipe.scorer, device)
    lora = build_lora(recipe, backbone.unet)
    learner = build_learner(recipe, backbone, backbone.unet, lora, accumulation_steps=2)
    loaded()

    def collect():
        rows, generator = torch.arange(2, device=device), torch.Generator().manual_seed(7)
        drawn_with = backbone, scorer, learner.sampler, recipe.collect
        with learner.drawing_network():
            return collect_rollout(*drawn_with, PROMPTS[:2], rows, generator)

    before = collect()
    halves = [before.pairs.select(slice(i, i + 2)) for i in (0, 2)]
    steps = [learner.train_minibatch(half, i) for i, half in enumerate(halves)]
    after = collect()
    found = {"scores": torch.cat([comparison.scores for comparison in before.comparisons])}
    found["losses"] = torch.stack([step.output.loss for step in steps])
    found["latents"] = after.pairs.latents
    for weights in (lora.parameters, learner.ema or {}):
        found |= {f"{name} {len(found)}": tensor for name, tensor in weights.items()}
    return {name: value.detach().cpu() for name, value in found.items()}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.chdir(ROOT)
    clip._per_channel.cache_clear()


@pytest.mark.parametrize(
    ("kind", "family", "precision"), matrix(("spm", "sd15", "no"), ("lrm", "sdxl", "fp16"))
)
def test_rollouts_and_updates_with_no_wait_that_is_not_needed(kind, family, precision):
    with pretend_cuda() as gpu:
        found = train_lora(CUDA, kind, family, precision, gpu.waits.clear)
    expected = {"method/collect": 2}  # which pairs are kept, once in each of two rollouts
    # Tokens of prompts, of SD1.5's empty prompt, of SDXL's second encoder; SDXL's image sizes.
    expected["models/backbone"] = 2 * {"sd15": 2, "sdxl": 3}[family]
    if kind == "spm":
        expected |= {"scorers/pickscore": 2, "scorers/clip": 2}  # tokens; mean and deviation, once
    else:
        expected["scorers/latent_reward_scorer"] = 2 * {"sd15": 1, "sdxl": 2}[family]
        expected["method/ddim"] = 1  # the table of transitions of SPO's loss, once
    if precision == "fp16":  # GradScaler asks for overflows once, and twice for its scale
        expected["models/optimizers"] = 3
    waits = by_module(gpu.waits)
    del waits[""]  # what this file reads at the end
    assert waits == expected, f"waits: {gpu.waits}"
    compare(found, on_the_cpu(train_lora, kind, family, "no"), precision)
    operations = by_module(gpu.operations)
    assert COVERED | COVERED_BY[kind] <= operations.keys() and sum(operations.values()) > 8000


@pytest.mark.parametrize("family", ["sd15", pytest.param("sdxl", marks=slow)])
def test_a_run_stopped_and_resumed_leaves_what_one_on_the_cpu_leaves(tmp_path, monkeypatch, family):
    changes = {
        "prompts.num": 2,
        "num_epochs": 1,
        "eval.num_images": 1,
        **(OF_SDXL if family == "sdxl" else {}),
    }
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


TRACES = ["gradspo_sd15", "gradspo_sdxl_clip", "spo_sd15_all", "spo_sdxl", "lpo_sd15_b"]
TRACES += ["lpo_sdxl_all", "lrm_forward_sdxl", "lrm_train_sd15", "lrm_train_sdxl"]


@slow
@pytest.mark.parametrize("trace", TRACES)
def test_a_trace_replays_exactly_as_on_the_cpu(trace):
    def deviations(device):
        if trace.startswith("lrm_"):
            return replay_latent_reward(GOLDEN / trace, MODELS, device)["cases"]
        return Replay(GOLDEN / trace, MODELS, device).rollout(0)

    with pretend_cuda() as gpu:
        found = deviations(CUDA)
    assert found == deviations(CPU)
    assert sum(gpu.operations.values()) > 1000


def train_preference_model(device, kind, family, precision):
    """Returns the numbers of an update of a preference model, and its scores after it."""
    config = {"spm": spm_tiny, "lrm": lrm_tiny}[kind].get_config()
    clip, parts = str(MODELS / "tiny-clip"), ("backbone", "processor")
    changes = {f"labels.{name}": clip for name in parts} | {"labels.source": "pickscore"}
    own = ("text_projection",) if kind == "lrm" else parts
    changes |= {f"preference.{name}": clip for name in own}
    changes |= {"family": family, "pretrained.model": str(MODELS / f"tiny-{family}")}
    changes |= {"mixed_precision": precision, "data.image_size": 16}
    changes |= {"train.gradient_checkpointing": True, "train.warmup_steps": 0}
    config.update_from_flattened_dict(changes)
    recipe = read_pair_recipe(config)
    preparation = build_preparation(recipe, device)
    scorer = build_scorer(recipe, preparation.backbone)
    learner = PreferenceLearner(scorer, scorer, recipe.train, device, DTYPES[precision])
    if precision == "fp16":  # the scale to which overflows bring it
        learner.scaler = torch.amp.GradScaler(device.type, init_scale=64.0)
    batch = decode_batch(RawBatch([make_row(i) for i in range(4)], range(4)), 16)
    losses, scores = learner.backward(preparation.training_pairs(batch, 4.0), last=True)
    timestep, images = next(iter(preparation.validation_images(batch)))
    timesteps = torch.full((4,), timestep, device=device)
    found = {"losses": losses, "scores": scores, "grad_norm": learner.update().grad_norm}
    found["after"] = learner.scores(images, timesteps, *preparation.input_ids(batch))
    found |= learner.scorer.learned()
    return {name: value.detach().cpu() for name, value in found.items()}


@pytest.mark.parametrize(
    ("kind", "family", "precision"),
    matrix(("spm", "sd15", "bf16"), ("spm", "sdxl", "no"), ("lrm", "sd15", "fp16")),
)
def test_a_preference_model_learns(kind, family, precision):
    with pretend_cuda() as gpu:
        found = train_preference_model(CUDA, kind, family, precision)
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

    torch.backends.mha.set_fastpath_enabled(False)  # which torch does not take under a mode
    with pretend_cuda() as gpu:
        found = scores(CUDA)
    assert all(map(torch.equal, found, scores(CPU)))
    torch.backends.mha.set_fastpath_enabled(True)
    module = SCORERS[name].partition(":")[0].replace(".", "/")
    assert by_module(gpu.operations)[module.removeprefix("spo/")] > 0


TAKEN_OUT = [
    ("spm", "sd15", "no", "method.rollout._to", "drawn.to(device, non_blocking=True)", "drawn"),
    ("spm", "sd15", "no", "scorers.pickscore.CLIPScorer.encode_prompts", ".to(self.device)", ""),
    ("spm", "sdxl", "no", "models.backbone.Backbone.encode_prompts", ", device=self.device", ""),
    ("spm", "sdxl", "no", "models.backbone.Backbone.predict", ", device=latents.device", ""),
    ("spm", "sdxl", "fp16", "models.backbone.Backbone.predict", ".to(self.dtype)", ""),
    ("spm", "sdxl", "bf16", "models.decoder.decode", ".to(autoencoder.dtype)", ""),
    (
        "spm",
        "sd15",
        "no",
        "method.learner.Learner._epsilon",
        ", device=latents.device",
        "",
    ),  # waits
]


@pytest.mark.parametrize(("kind", "family", "precision", "place", "old", "new"), TAKEN_OUT)
def test_a_move_or_a_cast_taken_out_is_missed(
    monkeypatch, kind, family, precision, place, old, new
):
    owner, _, name = f"spo.{place}".rpartition(".")
    owner = pkgutil.resolve_name(owner)
    own, made = getattr(owner, name), {}
    source = textwrap.dedent(inspect.getsource(own))
    assert old in source
    exec(source.replace(old, new), inspect.unwrap(own).__globals__, made)
    for user in [owner, *(module for key, module in sys.modules.items() if key[:4] == "spo.")]:
        if getattr(user, name, None) is own:
            monkeypatch.setattr(user, name, made[name])
    with pytest.raises((RuntimeError, AssertionError), match="on one device|type|^waits"):
        test_rollouts_and_updates_with_no_wait_that_is_not_needed(kind, family, precision)


def test_what_cuda_refuses_and_where_it_waits():
    with pretend_cuda() as gpu:
        a, b, seed = torch.ones(2, 3, device="cuda"), torch.ones(2, 3), torch.Generator()
        assert a.device == CUDA and a.is_cuda and not a.is_cpu and b.device == CPU
        assert (b.to(a.device) + a).sum().item() == 12
        assert (a * torch.tensor(2.0)).is_cuda  # a number
        pytest.raises(DeviceMismatch, torch.add, a, b)
        pytest.raises(DeviceMismatch, b.add_, a)
        pytest.raises(DeviceMismatch, torch.cat, [a, b])
        pytest.raises(DeviceMismatch, lambda: b[a.long()])
        pytest.raises(DeviceMismatch, torch.randn, 2, generator=seed, device=CUDA)
        pytest.raises(DeviceMismatch, a.normal_, generator=seed)
        pytest.raises(TypeError, a.numpy)
        F.layer_norm(b.half(), (3,), torch.ones(3))  # which a CPU takes
        weight = torch.ones(3, device=CUDA)
        pytest.raises(DtypeMismatch, F.layer_norm, a.half(), (3,), weight)
        with torch.autocast("cuda", torch.float16):
            assert F.layer_norm(a.half(), (3,), weight).dtype == torch.float32
            assert (a @ a.T).dtype == torch.float16 and (b @ b.T).dtype == torch.float32
        gpu.waits.clear()
        _ = a.nonzero(), a[a > 0], a.tolist(), bool(a.sum() > 0), a.cpu(), b.cuda(), a.copy_(b)
        b.pin_memory().to(CUDA, non_blocking=True)  # as the only one does not
        assert sum(gpu.waits.values()) == 7
