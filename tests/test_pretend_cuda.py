"""All that a GPU does, on one that is not there: devices, dtypes, and how often Python waits for it."""

from __future__ import annotations

import inspect
import pkgutil
import sys
import textwrap

import pytest
import torch
from finished_images import PROMPTS, pictures, tiny_scorers
from helpers import GOLDEN, MODELS, randn
from labelled_pairs import make_row
from pretend_cuda import CPU, CUDA, DeviceMismatch, DtypeMismatch, by_module, pretend_cuda

from config import lrm_tiny, spm_tiny
from spo.errors import Stopped
from spo.method.build import build_learner, build_lora, read_recipe
from spo.method.collect import collect_rollout, join
from spo.method.replay import Replay
from spo.models.device import minibatch_unet
from spo.preference.batches import RawBatch, decode_batch
from spo.preference.pair_learner import PreferenceLearner
from spo.preference.pair_recipe import build_preparation, build_scorer, read_pair_recipe
from spo.preference.replay import replay_latent_reward
from spo.scorers import SCORERS, clip, image_scorer, load_scorer
from tests import small_runs
from tests.small_runs import OF_SDXL, ROOT, differences, judged, read_metrics, run, small_config

slow = pytest.mark.slow
WEIGHTS = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
COVERED = {f"method/{name}" for name in ("rollout", "collect", "pairs", "losses", "learner")}
COVERED |= {"method/ddim", "models/backbone", "models/lora", "models/optimizers"}
COVERED_BY = {
    "spm": {"scorers/step_aware_clip", "scorers/pickscore", "scorers/clip", "models/decoder"},
    "lrm": {"scorers/latent_reward", "scorers/latent_reward_scorer"},
}


def matrix(*quick):
    """Every kind of run, family and precision: those of `quick`, and slow ones."""
    every = [(k, f, p) for k in ("spm", "lrm") for f in ("sd15", "sdxl") for p in WEIGHTS]
    return [pytest.param(*case, marks=() if case in quick else slow) for case in every]


def check(found, make, *case):
    """Checks that numbers are of fp32 and finite; those of a run in fp32 are the CPU's, bit for bit."""
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in found.values())
    if case[-1] == "no":
        assert all(torch.equal(found[name], value) for name, value in make(CPU, *case).items())


def changes_of(kind, family, precision):
    """GradSPO by an SPM with merged LoRA; or SPO by an LRM, with neither EMA nor merging."""
    changes = {"mixed_precision": precision, "sample.num_steps": 3, "sample.branch_from": 1}
    if kind == "spm":
        changes |= OF_SDXL if family == "sdxl" else {}
        return changes | {"algorithm": "gradspo", "preference.dtype": WEIGHTS[precision]}
    changes |= judged(family) | {"algorithm": "spo"}
    changes["preference.kwargs"] = changes["preference.kwargs"] | {"dtype": WEIGHTS[precision]}
    return changes | {"lora.merge": False, "train.gradient_checkpointing": True}


def train_lora(device, kind, family, precision, loaded=lambda: None):
    """Returns the numbers of a rollout, an update by two minibatches, and a second rollout."""
    recipe = read_recipe(small_config(ROOT / "none", **changes_of(kind, family, precision)))
    backbone, scorer = recipe.load_backbone(device), load_scorer(recipe.scorer, device)
    seed, noise = torch.Generator().manual_seed(7), randn(1, *backbone.latent_shape, seed=1)
    found = {"drawn": backbone.draw(["a fox"], noise, "euler_a", 2, 5.0, [seed])}
    lora = build_lora(recipe, backbone.unet)
    unet = minibatch_unet(backbone, recipe.speed)
    learner = build_learner(recipe, backbone, unet, lora, accumulation_steps=2)
    loaded()

    def collect():
        asked = PROMPTS[:2], torch.arange(2, device=device), seed.manual_seed(7)
        with learner.drawing_network():
            found = collect_rollout(backbone, scorer, learner.sampler, recipe.collect, *asked)
        nothing = join((), backbone, recipe.collect.pairs)  # as a process without prompts has
        return join((nothing, found), backbone, recipe.collect.pairs)

    first = collect()
    steps = [learner.train_minibatch(first.pairs.select(slice(i, i + 2)), i) for i in (0, 2)]
    found["scores"] = torch.cat([comparison.scores for comparison in first.comparisons])
    found["losses"] = torch.stack([step.output.loss for step in steps])
    found["latents"] = collect().pairs.latents
    found |= {**lora.parameters, **{f"ema {k}": v for k, v in (learner.ema or {}).items()}}
    return {name: value.detach().cpu() for name, value in found.items()}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.chdir(ROOT)
    adamw = torch.optim.AdamW  # fused as on a GPU, so that the CPU rounds alike
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: adamw(*a, **k | {"fused": True}))
    clip._per_channel.cache_clear()


@pytest.mark.parametrize(
    ("kind", "family", "precision"), matrix(("spm", "sd15", "no"), ("lrm", "sdxl", "fp16"))
)
def test_rollouts_and_updates_with_no_wait_that_is_not_needed(kind, family, precision):
    with pretend_cuda() as gpu:
        found = train_lora(CUDA, kind, family, precision, gpu.waits.clear)
    # Which pairs are kept; the table of transitions, once; tokens, of SD1.5's empty prompt too, of
    # SDXL's both encoders; its sizes.
    expected = {"method/collect": 2, "method/ddim": 1}
    expected["models/backbone"] = 4 * (2 if family == "sd15" else 3)
    if kind == "spm":
        expected |= {"scorers/pickscore": 2, "scorers/clip": 2}  # tokens; mean and deviation, once
    else:
        expected["scorers/latent_reward_scorer"] = 2 if family == "sd15" else 4  # tokens
    if precision == "fp16":  # GradScaler's scale, before and after the update
        expected["models/optimizers"] = 2
    expected[""] = by_module(gpu.waits)[""]  # what this file reads at the end
    assert by_module(gpu.waits) == expected, f"waits: {gpu.waits}"
    check(found, train_lora, kind, family, precision)
    assert (found["losses"] - 0.693).abs().max() < 0.05
    assert COVERED | COVERED_BY[kind] <= by_module(gpu.operations).keys()


@pytest.mark.parametrize("family", ["sd15", pytest.param("sdxl", marks=slow)])
def test_a_run_stopped_and_resumed_leaves_what_one_on_the_cpu_leaves(tmp_path, monkeypatch, family):
    changes = {"prompts.num": 2, "num_epochs": 1, "eval.num_images": 1, "eval.num_judged": 1}
    changes |= {"eval.judges": ("pickscore",)}  # config/tiny.py has its options
    changes |= OF_SDXL if family == "sdxl" else {}
    changes["train.gradient_accumulation_steps"] = 2  # stopped between two updates
    monkeypatch.setattr("spo.models.device.keep_contiguous", lambda _: None)  # rounds on a CPU
    whole = run(tmp_path / "cpu" / "run", **changes)
    monkeypatch.setattr(small_runs, "minibatches", 0)
    monkeypatch.setenv("SIGNAL", "15")
    monkeypatch.setenv("SIGNAL_AT", "3")
    resumed = tmp_path / "gpu" / "run"
    with pretend_cuda():
        pytest.raises(Stopped, run, resumed, **changes)
        run(resumed, **changes)
    assert differences(whole, resumed) == []
    assert (resumed / "starts.jsonl").read_text().count('"device": "cuda"') == 2
    (line,) = [line for line in read_metrics(resumed) if "evaluation" in line]
    assert line["judges"]["pickscore"]["mean"] and line["pixels"]["diversity"]["now"]


@slow
@pytest.mark.parametrize("of", ["gradspo_{}_clip", "spo_{}_all", "lpo_{}_all", "lrm_train_{}"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_trace_replays_exactly_as_on_the_cpu(of, family):
    def deviations(device):
        trace = of.format(family)
        if trace.startswith("lrm_"):
            return replay_latent_reward(GOLDEN / trace, MODELS, device)["cases"]
        return Replay(GOLDEN / trace, MODELS, device).rollout(0)

    with pretend_cuda():
        found = deviations(CUDA)
    assert found == deviations(CPU)


def train_preference_model(device, kind, family, precision):
    """Returns the numbers of an update of a preference model, and its scores after it."""
    config = {"spm": spm_tiny, "lrm": lrm_tiny}[kind].get_config()
    clip, parts = str(MODELS / "tiny-clip"), ("backbone", "processor")
    own, labels = (parts, "data") if kind == "spm" else (("text_projection",), "pickscore")
    changes = {f"labels.{name}": clip for name in parts} | {"labels.source": labels}
    changes |= {f"preference.{name}": clip for name in own}
    changes |= {"family": family, "pretrained.model": str(MODELS / f"tiny-{family}")}
    changes |= {"mixed_precision": precision, "data.image_size": 16}
    changes |= {"train.gradient_checkpointing": True, "train.warmup_steps": 0}
    config.update_from_flattened_dict(changes)
    recipe = read_pair_recipe(config)
    preparation = build_preparation(recipe, device)
    scorer = build_scorer(recipe, preparation.backbone)
    learner = PreferenceLearner(
        scorer, scorer, recipe.train, device, getattr(torch, WEIGHTS[precision])
    )
    learner.scaler = torch.amp.GradScaler(device.type, 64.0, enabled=precision == "fp16")
    batch = decode_batch(RawBatch([make_row(i) for i in range(4)], range(4)), 16)
    losses, scores = learner.backward(preparation.training_pairs(batch, 4.0), last=True)
    found = {"losses": losses, "scores": scores, "grad_norm": learner.update().grad_norm}
    for timestep, images in preparation.validation_images(batch):
        timesteps = torch.full((4,), timestep, device=device)
        found[timestep] = learner.scores(images, timesteps, *preparation.input_ids(batch))
    found |= learner.scorer.learned()
    return {name: value.detach().cpu() for name, value in found.items()}


@pytest.mark.parametrize(
    ("kind", "family", "precision"),
    matrix(("spm", "sd15", "bf16"), ("spm", "sdxl", "no"), ("lrm", "sd15", "fp16")),
)
def test_a_preference_model_learns(kind, family, precision):
    with pretend_cuda() as gpu:
        found = train_preference_model(CUDA, kind, family, precision)
    check(found, train_preference_model, kind, family, precision)
    assert {"preference/preparation", "preference/pair_learner"} <= by_module(gpu.operations).keys()


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return tiny_scorers(tmp_path_factory.mktemp("scorers"))


@pytest.mark.parametrize("name", [name for name in SCORERS if name != "latent_reward"])
def test_a_scorer_of_finished_images_and_of_candidates(options, name):
    source, images = image_scorer(name, options[name]), randn(3, 3, 64, 64, seed=0).clamp(-1, 1)

    def scores(device):
        scorer = load_scorer(source, device)
        features = scorer.encode_prompts(PROMPTS)[torch.arange(3, device=device)]
        candidates = scorer.score(images.to(device), features, 501).cpu()
        return [scorer.score_images(pictures(), PROMPTS), candidates]

    torch.backends.mha.set_fastpath_enabled(False)  # which torch does not take under a mode
    with pretend_cuda() as gpu:
        found = scores(CUDA)
    assert all(map(torch.equal, found, scores(CPU)))
    torch.backends.mha.set_fastpath_enabled(True)
    module = SCORERS[name].removeprefix("spo.").partition(":")[0].replace(".", "/")
    assert by_module(gpu.operations)[module] > 0


TAKEN_OUT = [
    ("sd15", "no", "method.rollout._to", ".to(device, non_blocking=True)"),
    ("sd15", "no", "scorers.pickscore.CLIPScorer.encode_prompts", ".to(self.device)"),
    ("sd15", "no", "models.backbone.Backbone.predict", ", device=latents.device"),
    ("sdxl", "no", "models.backbone.Backbone.encode_prompts", ", device=self.device"),
    ("sdxl", "fp16", "models.backbone.Backbone.predict", ".to(self.dtype)"),
    ("sdxl", "bf16", "models.decoder.decode", ".to(autoencoder.dtype)"),
    ("sd15", "no", "method.learner.Learner._epsilon", ", device=latents.device"),  # only waits
]


@pytest.mark.parametrize(("family", "precision", "place", "taken"), TAKEN_OUT)
def test_a_move_or_a_cast_taken_out_is_missed(monkeypatch, family, precision, place, taken):
    owner, _, name = f"spo.{place}".rpartition(".")
    own, made = pkgutil.resolve_name(f"{owner}.{name}"), {}
    source = textwrap.dedent(inspect.getsource(own))
    assert taken in source
    exec(source.replace(taken, ""), inspect.unwrap(own).__globals__, made)
    for user in [pkgutil.resolve_name(owner), *sys.modules.values()]:
        if vars(user).get(name) is own:
            monkeypatch.setattr(user, name, made[name])
    with pytest.raises((RuntimeError, AssertionError), match="on one device|type|^waits"):
        test_rollouts_and_updates_with_no_wait_that_is_not_needed("spm", family, precision)


def test_what_cuda_refuses_and_where_it_waits():
    with pretend_cuda() as gpu:
        a, b, seed = torch.ones(2, 3, device="cuda"), torch.ones(2, 3), torch.Generator()
        assert a.device == CUDA and a.is_cuda and not a.is_cpu and b.device == CPU
        assert (b.to(a.device) + a).sum().item() == 12 and (a * torch.tensor(2.0)).is_cuda
        pytest.raises(DeviceMismatch, b.add_, a)
        pytest.raises(DeviceMismatch, torch.cat, [a, b])
        pytest.raises(DeviceMismatch, lambda: b[a.long()])
        pytest.raises(DeviceMismatch, torch.randn, 2, generator=seed, device=CUDA)
        pytest.raises(DeviceMismatch, a.normal_, generator=seed)
        pytest.raises(TypeError, a.numpy)
        torch.layer_norm(b.half(), (3,), b[0])  # which a CPU takes
        pytest.raises(DtypeMismatch, torch.layer_norm, a.half(), (3,), a[0])
        with torch.autocast("cuda", torch.float16):
            assert torch.layer_norm(a.half(), (3,), a[0]).dtype == torch.float32
            assert (a @ a.T).dtype == torch.float16 and (b @ b.T).dtype == torch.float32
        gpu.waits.clear()
        _ = a.nonzero(), a[a > 0], a.tolist(), bool(a.sum() > 0), a.cpu(), b.cuda(), a.copy_(b)
        b.pin_memory().to(CUDA, non_blocking=True)  # as the only one does not
        assert sum(gpu.waits.values()) == 7
