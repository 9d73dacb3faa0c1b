"""What an iteration costs: counted on real models, on shapes alone, and by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import MODELS, PROMPTS, save_tiny_decoder
from torch import nn

from spo.command_line.config_files import load_config
from spo.costs import benchmark, count, load
from spo.costs.count import CHECKPOINTED, SCORER, Costs, LiveMemory, MetaMeter
from spo.costs.evaluation import count_evaluation
from spo.costs.load import load_models
from spo.costs.meter import (
    DECODING,
    DENOISING,
    ROLLOUT,
    SCORING,
    TRAINING,
    Meter,
    draw_pairs,
    flop_counter,
    train_on_pairs,
)
from spo.costs.unloaded_scorers import ARCHITECTURES
from spo.errors import UserError
from spo.method.build import read_recipe
from spo.models.loading import ModelSource
from spo.run.validation import draw_batch
from spo.scorers import ScorerSource, load_scorer
from spo.scorers.pixels import to_pil

ROOT = Path(__file__).resolve().parent.parent
CPU, META = torch.device("cpu"), load.META
LATENT_REWARD = {
    family: {
        "preference.scorer": "latent_reward",
        "preference.kwargs": {
            "checkpoint": str(MODELS / f"tiny-lrm-{family}"),
            "base": str(MODELS / f"tiny-{family}"),
        },
    }
    for family in ("sd15", "sdxl")
}
SIZES = {"sample.num_steps": 4, "sample.branch_from": 2, "sample.num_candidates": 3}


def small_config(family="sd15", **changes):
    config = load_config(str(ROOT / "tests" / "data" / "random_models.py"))
    own = {"family": family, "pretrained.model": str(MODELS / f"tiny-{family}"), **SIZES}
    config.update_from_flattened_dict(own | changes)
    return config


def count_costs(config, *trainings):
    return count.count_costs(load_models(read_recipe(config), META), *trainings)


def test_flops_of_parts_within_parts_by_hand():
    linear, x = nn.Linear(8, 4), torch.ones(3, 8, requires_grad=True)
    query = torch.ones(1, 2, 5, 8)
    with flop_counter() as counter:
        meter = Meter(CPU, counter)
        with meter.part("all"):
            with meter.part("forward"):
                output = linear(x)
            with meter.part("backward"):
                output.sum().backward()
            with meter.part("attention"):
                F.scaled_dot_product_attention(query, query, query)
    product = 2 * 3 * 8 * 4
    attention = 2 * 2 * 2 * 5 * 5 * 8  # two products of 2 heads
    # One product gives the gradient of x, one that of the weight.
    assert meter.flops == {
        "forward": product,
        "backward": 2 * product,
        "attention": attention,
        "all": 3 * product + attention,
    }
    assert meter.seconds["all"] >= sum(meter.seconds.values()) / 2 > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "copies", "changes"),
    [
        ("sd15", 5, {}),
        ("sdxl", 5, {}),
        ("sdxl", 4, {"algorithm": "spo", "sample.num_inner_steps": 1}),
        ("sd15", 5, {"preference.scorer": "pickscore"}),
        ("sd15", 5, LATENT_REWARD["sd15"] | {"eval_interval": 0}),
        ("sdxl", 4, LATENT_REWARD["sdxl"] | {"algorithm": "lpo"}),
    ],
)
def test_shapes_alone_cost_what_real_models_cost(family, copies, changes):
    config = small_config(family, **changes)
    models = load_models(read_recipe(config), CPU)
    with flop_counter() as counter:
        meter, again = Meter(CPU, counter), Meter(CPU, counter)
        pairs = draw_pairs(models, 1, meter, apart=True)
        train_on_pairs(models, pairs.select(slice(1)), 1, meter)
        models.backbone.unet.enable_gradient_checkpointing()
        train_on_pairs(models, pairs.select(slice(1)), 1, again)
    costs = count_costs(config)
    assert costs.pairs == len(pairs) == 2
    measured = {name: meter.flops[name] for name in costs.flops if name != CHECKPOINTED}
    assert costs.flops == measured | {CHECKPOINTED: again.flops[TRAINING]}
    assert all(costs.flops.values())
    # The rest encodes the prompt.
    inner = sum(costs.flops.get(name, 0) for name in (DENOISING, DECODING, SCORING))
    assert 0.5 * costs.flops[ROLLOUT] < inner < costs.flops[ROLLOUT]
    weights = sum(p.numel() * 4 for p in models.backbone.vae.parameters())
    assert costs.resident_bytes["vae"] == weights  # of none, 0
    *_, judge = [part for part in vars(models.scorer).values() if isinstance(part, nn.Module)]
    assert costs.resident_bytes[SCORER] == sum(p.numel() * 4 for p in judge.parameters())
    assert (weights == 0) == (not config.eval_interval)
    looks_at_latents = "preference.kwargs" in changes
    assert (DECODING in costs.flops) == (DECODING in costs.peak_bytes) != looks_at_latents
    assert (SCORING in costs.peak_bytes) == looks_at_latents
    lora = sum(p.numel() * 4 for p in models.learner.lora.parameters.values())
    assert costs.resident_bytes["LoRAs, gradient, optimizer"] == copies * lora
    unet = sum(p.numel() * 4 for p in models.backbone.unet.parameters())
    assert costs.resident_bytes["unet"] == unet - lora
    merged = "weights with the LoRA merged in"
    linears = (m for n, m in models.backbone.unet.named_modules() if n.endswith("base_layer"))
    assert costs.resident_bytes[merged] == sum(m.weight.numel() * 4 for m in linears) > 0
    config.lora.merge = False
    assert merged not in count_costs(config).resident_bytes


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_an_evaluation_costs_what_drawing_and_judging_do(family):
    clip = {name: str(MODELS / "tiny-clip") for name in ("backbone", "processor")}
    config = small_config(family, **{"eval.num_judged": 2, "eval.num_steps": 3})
    config.eval.judges = ("pickscore", "tests.scorers_for_tests:image_brightness")
    config.eval.judge_options.pickscore = clip
    recipe = read_recipe(config)
    models, settings = load_models(recipe, CPU), recipe.validation
    judge = load_scorer(ScorerSource("pickscore", clip, "eval", "eval.judges"), CPU)
    with flop_counter() as counter:
        parts = {"unet": (models.backbone, "predict"), "vae": (models.backbone, "decode")}
        meter = Meter(CPU, counter)
        with meter.each_call(parts), models.learner.network("policy"):
            first, _ = draw_batch(models.backbone, PROMPTS, range(2), settings)
        features = models.scorer.encode_prompts(PROMPTS[:2])
        before = counter.get_total_flops()
        judge.score_images(to_pil(first.images), PROMPTS[:2])
        models.scorer.score(first.images, features, 0)
        judging = counter.get_total_flops() - before
    on_shapes = load_models(recipe, META)
    found = count_evaluation(on_shapes, count.count_costs(on_shapes), num_prompts=2)
    assert found.drawing == sum(meter.flops[part] for part in parts)
    assert found.judging == 2 * judging  # of two seeds; the other judge is no network
    assert found.unknown == ("tests.scorers_for_tests:image_brightness",)


@pytest.mark.slow
def test_a_tiny_decoder_counts_in_the_place_of_the_vae(tmp_path):
    config = small_config(**{"sample.decoder": save_tiny_decoder(tmp_path)})
    models = load_models(read_recipe(config), CPU)
    with flop_counter() as counter:
        meter = Meter(CPU, counter)
        draw_pairs(models, 1, meter, apart=True)
    costs, exact = count_costs(config), count_costs(small_config())
    # 6 images of 16 x 16: two blocks of three convolutions and one more, at 8 x 8 and at 16 x 16.
    block, first, last = 3 * 8 * 8, 4 * 8, 8 * 3
    by_hand = 2 * 9 * (64 * (first + block) + 256 * (8 * 8 + block + last))
    assert costs.flops[DECODING] == meter.flops[DECODING] == 6 * by_hand
    weights = sum(p.numel() * 4 for p in models.backbone.decoder.parameters())
    assert dict(costs.resident_bytes) == exact.resident_bytes | {"decoder": weights}
    assert costs.peak_bytes[DECODING] <= exact.peak_bytes[DECODING]


@pytest.mark.parametrize(("family", "teraflops"), [("sd15", 0.14135), ("sdxl", 0.5654)])
def test_a_decoder_on_the_hub_counts_as_the_published_one(family, teraflops):
    config = small_config(
        family, **{"sample.decoder": "user/taesd", "pretrained.model": "user/model"}
    )
    model = load_models(read_recipe(config), META).backbone
    assert sum(p.numel() for p in model.decoder.parameters()) == 2_445_063
    with flop_counter() as counter:
        model.decode_candidates(torch.ones(1, *model.latent_shape, device=META))
    assert counter.get_total_flops() / 1e12 == pytest.approx(teraflops, rel=1e-4)


def test_live_memory_by_hand():
    weight = torch.ones(1000, device=META)  # was there before: 4,000 bytes that do not count
    with LiveMemory() as memory:
        a = weight * 2
        b = (a.view(10, 100) + 1).t()  # a view makes nothing
        assert memory.live == 8000
        del a
        b.mul_(2)  # nor does a change in place
        assert (memory.live, memory.peak) == (4000, 8000)
        torch.ones(5000)  # on another device
        del b
        assert (memory.live, memory.peak) == (0, 8000)


def test_a_part_needs_what_lives_on_top_of_its_beginning():
    with flop_counter() as counter, LiveMemory() as memory:
        meter = MetaMeter(counter, memory)
        x = torch.ones(1000, device=META)
        with meter.part("outer"):
            y = x + 1
            with meter.part("inner"):
                z = (y + 1) + 1
            del y, z
    assert meter.peak_bytes == {"inner": 8000, "outer": 12000}


def test_a_call_of_known_shapes_counts_without_running():
    calls = []

    class Model:
        def predict(self, x):
            calls.append(x.shape)
            return x @ x

    model = Model()
    with flop_counter() as counter, LiveMemory() as memory:
        meter = MetaMeter(counter, memory)
        with meter.part("all"), meter.each_call({"product": (model, "predict")}):
            for side in (2, 3, 2, 2):
                model.predict(torch.ones(side, side, device=META))
    assert [len(shape) and shape[0] for shape in calls] == [2, 3]
    assert meter.flops == {"product": 3 * 2 * 2**3 + 2 * 3**3, "all": 3 * 2 * 2**3 + 2 * 3**3}
    model.predict(torch.ones(2, 2))  # its own again
    assert len(calls) == 3


@pytest.mark.slow
def test_a_pair_is_the_unit_of_training_memory():
    models = load_models(read_recipe(small_config()), META)
    with load.meta_kernels(), flop_counter() as counter, LiveMemory() as memory:
        pairs = draw_pairs(models, 2, MetaMeter(counter, memory), apart=True)
        peaks = {}
        for count in (1, 2, 4):
            meter = MetaMeter(counter, memory)
            train_on_pairs(models, pairs.select(slice(count)), count, meter)
            peaks[count] = meter.peak_bytes[TRAINING]
    assert peaks[4] - peaks[2] == pytest.approx(2 * (peaks[2] - peaks[1]), rel=0.02)
    # What does not grow is small beside it, and makes the estimate a little too large.
    assert 3.5 * peaks[1] < peaks[4] <= 4 * peaks[1]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"algorithm": "spo"},
        LATENT_REWARD["sd15"],
        {"family": "sdxl", "algorithm": "lpo"} | LATENT_REWARD["sdxl"],
    ],
)
def test_a_rollout_looks_at_numbers_once(changes, monkeypatch):
    """Which waits for a GPU. The meta device has no numbers, and raises where one is asked for."""
    models = load_models(read_recipe(small_config(**changes)), META)
    calls = []
    with load.meta_kernels():
        every_index = torch.Tensor.nonzero
        monkeypatch.setattr(torch.Tensor, "nonzero", lambda t: calls.append(t) or every_index(t))
        pairs = draw_pairs(models, 2, Meter(META), apart=False)
        monkeypatch.undo()
    (differ,) = [tensor for tensor in calls if tensor.is_meta]  # which of all comparisons are pairs
    assert differ.dtype == torch.bool and len(pairs) == len(differ) == 2 * 2


@pytest.mark.slow
@pytest.mark.parametrize("ema_prediction", ["fresh", "rollout", "none"])
def test_passes_of_a_pair(ema_prediction):
    changes = {"train.ema_prediction": ema_prediction, "train.clip_eps": None}
    own, fresh = count_costs(small_config(**changes)), count_costs(small_config())
    rows = own.flops[DENOISING] / 12  # two for each of three steps, six for the candidates'
    saved = 0 if ema_prediction == "fresh" else 2
    assert fresh.flops[TRAINING] - own.flops[TRAINING] == pytest.approx(saved * rows, rel=0.02)


@pytest.mark.parametrize("merge", [False, True])
def test_low_precision_is_autocast_on_these_models(merge):
    """Autocast runs norms in fp32; with the LoRA merged, a rollout needs none of it."""
    config = small_config(mixed_precision="fp16", **{"lora.merge": merge})
    models = load_models(read_recipe(config), META)
    unet, seen = models.backbone.unet, {}

    def hook(name):
        return lambda module, args, output: seen.update({name: output.dtype})

    unet.conv_in.register_forward_hook(hook("convolution"))
    unet.conv_norm_out.register_forward_hook(hook("norm"))
    unet.time_embedding.linear_1.register_forward_hook(hook("linear"))
    with load.meta_kernels():
        draw_pairs(models, 1, Meter(META), apart=False)
    half = torch.float16
    norm = half if merge else torch.float32
    assert seen == {"convolution": half, "norm": norm, "linear": half}
    assert torch.Tensor.nonzero(torch.tensor([0, 1])).tolist() == [[1]]


@pytest.mark.parametrize(
    ("family", "unet", "unet_teraflops", "vae_teraflops"),
    [("sd15", 859_520_964, 0.803, 2.515), ("sdxl", 2_567_463_684, 6.761, 10.470)],
)
def test_full_size_models_are_the_published_ones(family, unet, unet_teraflops, vae_teraflops):
    source = ModelSource(str(ARCHITECTURES / family))
    model = load.MetaBackbone(source, family, "fp16", META)
    sizes = {k: sum(p.numel() for p in v.parameters()) for k, v in model.networks().items()}
    text = {"sd15": {}, "sdxl": {"text_encoder_2": 694_659_840}}[family]
    expected = {"unet": unet, "vae": 83_653_863, "text_encoder": 123_060_480}
    assert sizes == expected | text
    with load.meta_kernels(), torch.no_grad():
        conditioning = model.encode_prompts(["a fox"])
        latents = torch.ones(1, *model.latent_shape, device=META)
        with flop_counter() as counter:
            model.predict(model.unet, latents, 1, conditioning, 1.0)
        assert counter.get_total_flops() / 1e12 == pytest.approx(unet_teraflops, rel=1e-3)
        with flop_counter() as counter:
            model.decode(latents)
        assert counter.get_total_flops() / 1e12 == pytest.approx(vae_teraflops, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "most", "half_unet", "before_text", "resident"),
    [("sd15", 72, 0.261, 0.0399, 0.9e9), ("sdxl", 745, 2.933, 0, 4.1e9)],
)
def test_a_latent_reward_model_at_full_size(family, most, half_unet, before_text, resident):
    recipes = [read_recipe(load_config(f"config/{name}{family}.py")) for name in ("lpo_", "")]
    ours, pixels = (count.count_costs(load_models(recipe, META), []) for recipe in recipes)
    assert 0.98 * most < ours.flops[ROLLOUT] / 1e12 <= most < pixels.flops[ROLLOUT] / 2e12
    # 20 steps of four candidates, each with its text and with the empty one; once before the text.
    scoring = 160 * half_unet - 80 * before_text
    assert ours.flops[SCORING] / 1e12 == pytest.approx(scoring, rel=2e-3)
    assert ours.resident_bytes[SCORER] == pytest.approx(resident, rel=0.08)
    peaks = []
    for costs, recipe in zip((ours, pixels), recipes, strict=True):
        collect = recipe.collect
        judging = {DECODING: collect.decode_batch_size, SCORING: collect.score_batch_size}
        sizes = {DENOISING: recipe.config["sample"]["batch_size"]} | judging
        peaks.append(max(costs.bytes_of(part, sizes[part]) for part in costs.peak_bytes))
    assert peaks[0] < 0.9 * peaks[1]


@pytest.mark.parametrize("checkpoint", ["hf://casiatao/LRM/lrm_sd15", "user/name"])
def test_a_latent_reward_model_on_the_hub_counts_as_the_published_one(checkpoint):
    changes = LATENT_REWARD["sd15"] | {"preference.kwargs": {"checkpoint": checkpoint}}
    model = load_models(read_recipe(small_config(**changes)), META).scorer.model
    assert sum(p.numel() for p in model.unet.parameters()) == pytest.approx(349e6, rel=2e-3)
    assert model.visual_projection.weight.shape == (768, 4800)
    assert model.text_projection.weight.shape == (768, 768)
    assert model.guidance_scale == 7.5  # by default


def test_what_is_measured_on_a_cpu_is_as_large_as_the_config_says():
    config = load_config("config/small.py")
    config.sample.decoder = f"{config.pretrained.model}/decoder"
    models = load_models(read_recipe(config), META)
    assert (
        round(sum(p.numel() for p in models.backbone.networks()["unet"].parameters()) / 1e6) == 18
    )
    judge = load_models(read_recipe(load_config("config/small_lrm.py")), META).scorer.model
    own, half = models.backbone.unet.state_dict(), judge.unet.state_dict()
    base = {name.replace(".base_layer", ""): value.shape for name, value in own.items()}
    assert half and all(base[name] == value.shape for name, value in half.items())
    latents = torch.ones(1, *models.backbone.latent_shape, device=META)
    with torch.no_grad():
        for decode in (models.backbone.decode, models.backbone.decode_candidates):
            assert decode(latents).shape == (1, 3, 256, 256)


def test_what_is_measured_on_a_cpu_has_the_proportions_of_sd15():
    shares = []
    for path in ("config/small.py", "config/sd15.py"):
        costs = count.count_costs(load_models(read_recipe(load_config(path)), META), [])
        shares.append(costs.flops[DECODING] / costs.flops[DENOISING])
    assert shares[0] == pytest.approx(shares[1], rel=0.1)


def test_what_fits_and_what_a_run_costs_by_hand():
    costs = Costs(
        flops={ROLLOUT: 100, TRAINING: 5, CHECKPOINTED: 7},
        pairs=16,
        resident_bytes={"unet": 40, "vae": 20},
        peak_bytes={TRAINING: 10, CHECKPOINTED: 3},
    )
    assert costs.bytes_of(TRAINING, 2) == 80
    # 90 of 100 bytes are free, less 60.
    assert (costs.largest_batch(TRAINING, 100), costs.largest_batch(CHECKPOINTED, 100)) == (3, 10)
    assert costs.largest_batch(TRAINING, 50) == 0


def test_an_iteration_is_timed_and_counted():
    config = small_config(**{"sample.batch_size": 2, "train.batch_size": 3})
    models = load_models(read_recipe(config), CPU)
    work = benchmark.count_work(models)
    assert models.learner.updates == 2  # 4 pairs are two minibatches
    seconds = benchmark.time_parts(models, repeats=2)
    assert models.learner.updates == 2 + 3 * 2  # it warms up once
    inner = {DENOISING, DECODING, SCORING}
    assert set(seconds) == {ROLLOUT, TRAINING, benchmark.ITERATION} | inner
    assert all(len(values) == 2 and min(values) > 0 for values in seconds.values())
    # 2 prompts, the steps 2 and 3 of 4, one pair of each comparison.
    assert (work.prompts, work.pairs) == (2, 4)
    both = (ROLLOUT, TRAINING)
    assert work.flops[benchmark.ITERATION] == sum(work.flops[part] for part in both) > 0
    assert seconds[benchmark.ITERATION][0] == pytest.approx(
        sum(seconds[part][0] for part in both), rel=0.01
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preference.dtype": "int8"}, "preference.dtype: 'int8' is none of"),
        ({"preference.backbone": "./no"}, "preference.backbone: './no' is neither a folder"),
        (
            LATENT_REWARD["sd15"] | {"preference.kwargs": {"checkpoint": "./no"}},
            "preference.kwargs.checkpoint: './no' is neither a folder",
        ),
        ({"pretrained.model": "./no"}, "pretrained.model: './no' is neither a folder"),
        ({"pretrained.vae": str(MODELS)}, "pretrained.vae: no file .*config.json"),
        ({"pretrained.model": "user/name", "family": "sd3"}, "family: 'sd3' is none of"),
    ],
)
def test_what_cannot_be_built_without_weights(changes, message):
    with pytest.raises(UserError, match=message):
        load_models(read_recipe(small_config(**changes)), META)


def test_a_model_folder_without_configs(tmp_path):
    index = MODELS / "tiny-sd15" / "model_index.json"
    (tmp_path / index.name).write_bytes(index.read_bytes())
    with pytest.raises(UserError, match="no file .*config.json"):
        load_models(read_recipe(small_config(**{"pretrained.model": str(tmp_path)})), META)


def run_script(*arguments):
    command = [sys.executable, "scripts/benchmark.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_command_line(tmp_path):
    sizes = [f"--config.{key}={value}" for key, value in SIZES.items()]
    common = ["--config=tests/data/random_models.py", *sizes, "--config.prompts.num=100"]
    file = tmp_path / "meta.json"
    result = run_script(*common, "--meta", f"--json={file}", "--tflops=1e-6", "--num_gpus=2")
    assert result.returncode == 0, result.stderr
    figures = json.loads(file.read_text())
    flops, pairs = figures["tflop"], figures["pairs_of_a_prompt"] * 0.8
    per_prompt = flops[ROLLOUT] + pairs * flops[TRAINING]
    assert figures["hours"] == pytest.approx(100 * per_prompt / 1e-6 / 2 / 3600)
    assert (
        "largest that fits on a card of" in result.stdout
        and " hours for 100 prompts" in result.stdout
    )
    file = tmp_path / "measured.json"
    result = run_script(*common, "--repeats=1", f"--json={file}", "--config.sample.batch_size=1")
    assert result.returncode == 0, result.stderr
    figures = json.loads(file.read_text())
    assert figures["parts"][ROLLOUT]["tflop"] == pytest.approx(flops[ROLLOUT])
    assert f"peak_memory_gib: {figures['peak_memory_gib']:.4g}" in result.stdout
    for row in figures["parts"].values():
        assert row["tflop_per_second"] == pytest.approx(row["tflop"] / row["seconds"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats=0"], "error: --repeats: 0 must be above 0."),
        (["--meta", "--tflops=0"], "error: --tflops: 0.0 must be above 0."),
        (["--json=no/such"], f"error: --json: there is no folder {ROOT / 'no'}; make it first."),
        (["--meta", "--compare=seed=1"], "error: --meta, --compare: give one of them."),
        (["--compare=train.b=1"], "error: config: unknown key train.b; did you mean train.beta?"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    result = run_script("--config=config/tiny.py", *arguments)
    assert (result.returncode, result.stderr) == (2, message + "\n")


@pytest.mark.slow
def test_the_networks_cost_no_second_unet():
    command = [sys.executable, "scripts/measure_memory.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the rest of the difference" in done.stdout
