"""How the tiny world's models are trained, controlled and judged; and what is committed of it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import MODELS
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from spo.command_line.config_files import load_config
from spo.data.prompts import read_prompts
from spo.errors import UserError
from spo.lora_io.write import LORA_FILE, save_lora
from spo.method.build import read_recipe
from spo.scorers import load_scorer
from spo.scorers.latent_reward import UP_PATH
from spo.tiny_world.clip import TOKENS, make_tokenizer
from spo.tiny_world.evaluation import Bench, ScoredImages, before_and_after, compare
from spo.tiny_world.fitting import fit
from spo.tiny_world.preferences import FlippedPreferences, draw_labelled_pairs, split_captions
from spo.tiny_world.scenes import all_captions

ROOT = Path(__file__).resolve().parent.parent
CLIP = str(MODELS / "tiny-clip")


def test_every_word_of_a_caption_is_one_token(tmp_path):
    make_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    captions = [str(caption) for caption in all_captions()]
    ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (336, TOKENS) and tokenizer.model_max_length == TOKENS
    assert len(ids.unique(dim=0)) == 336
    assert (ids == tokenizer.eos_token_id).int().argmax(dim=1).eq(9).all()  # start and 8 words
    assert len(tokenizer("a giraffe")["input_ids"]) > 4  # other words are spelt


def test_fitting_finds_a_line_and_repeats():
    lines = []
    for _ in range(2):
        torch.manual_seed(len(lines))  # the steps draw from generators of their own
        line = torch.nn.Linear(1, 1)
        torch.nn.init.ones_(line.weight)
        torch.nn.init.zeros_(line.bias)

        def loss(generator, line=line):
            x = torch.randn(16, 1, generator=generator)
            return (line(x) - 3 * x).square().mean()

        fit("line", line, loss, ((250, 0.1), (150, 0.02)))
        lines.append(line)
    assert torch.equal(lines[0].weight, lines[1].weight) and torch.equal(
        lines[0].bias, lines[1].bias
    )
    assert lines[0].weight.item() == pytest.approx(3, abs=0.05) and not lines[0].training


def test_flipped_preferences_flip_half_of_the_comparisons(spm_scorer):
    flipped = FlippedPreferences(torch.device("cpu"), str(MODELS / "tiny-spm.bin"), CLIP, seed=0)
    prompts = [f"prompt {i}" for i in range(40)]
    features = flipped.encode_prompts(prompts)
    images = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    signs = torch.stack(
        [
            flipped.score(images, features, t) / spm_scorer.score(images, features, t)
            for t in (1, 101, 501, 751)
        ]
    ).round()
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert 0.35 < (signs > 0).float().mean() < 0.65
    # All candidates of a comparison share their sign, or best and worst would not be exchanged.
    again = flipped.score(images.flip(0), features, 101) / spm_scorer.score(
        images.flip(0), features, 101
    )
    assert torch.equal(again.round(), signs[1])


@pytest.fixture(scope="module")
def bench():
    return make_bench("config/tiny.py", ["a small red circle on a blue background"] * 3)


def make_bench(config_file, prompts):
    config = load_config(config_file)
    config.eval.num_steps = 4
    return Bench(read_recipe(config), prompts)


def test_a_lora_without_effect_ties_with_the_base(bench, tmp_path):
    lora = bench.lora
    save_lora(tmp_path / LORA_FILE, lora, lora.snapshot(), {})
    same = bench.score(tmp_path)
    torch.testing.assert_close(same.images, bench.base.images, atol=1e-5, rtol=0)
    noise = torch.Generator().manual_seed(0)
    other = {
        name: 0.3 * torch.randn(p.shape, generator=noise) for name, p in lora.snapshot().items()
    }
    save_lora(tmp_path / LORA_FILE, lora, other, {})
    assert (bench.score(tmp_path).images - bench.base.images).abs().max() > 0.01


def test_other_models_are_refused():
    with pytest.raises(UserError, match="draws 16 pixels"):
        make_bench("tests/data/random_models.py", ["a fox"])


def test_the_verdict_on_known_numbers():
    images = torch.zeros(4, 3, 32, 32)
    base = ScoredImages(
        images, torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    )
    better = ScoredImages(images, base.quality + 1, torch.tensor([1.0, 1.0, 0.0, 0.0]))
    verdict = compare(base, better)
    assert verdict.difference.mean == 1 and verdict.win_rate.mean == 1
    assert verdict.faithfulness.mean == -0.25
    text = verdict.describe("GradSPO").splitlines()
    assert text[0].endswith("base 2.50, GradSPO 3.50 of 10") and len(text) == 4
    assert "base 75.0 %, GradSPO 50.0 %" in text[3]
    assert verdict.quality == {"base": 2.5, "trained": 3.5}
    picture = before_and_after(base, better, ["a b c"] * 4, "GradSPO")
    assert picture.height > 4 * 112


def test_the_committed_prompts_are_those_of_the_world():
    training, held_out = split_captions()
    for name, captions in (("train", training), ("held_out", held_out)):
        prompts = read_prompts(f"assets/tiny/prompts/{name}.txt").prompts
        assert list(prompts) == [str(caption) for caption in captions]


@pytest.mark.parametrize(("timestep", "least"), [(1, 0.74), (501, 0.64)])
def test_the_committed_latent_reward_model_tells_better_from_worse(timestep, least):
    recipe = read_recipe(load_config("config/gradspo_lrm_tiny.py"))
    backbone = recipe.load_backbone(torch.device("cpu"))
    scorer = load_scorer(recipe.scorer, torch.device("cpu"))
    pairs = draw_labelled_pairs(split_captions()[1], 400, seed=7)
    sure, n = pairs.labels != 0.5, len(pairs.labels)
    posterior, noise = torch.randn(2, 2 * n, *backbone.latent_shape, generator=torch.manual_seed(0))
    latents = backbone.encode_images(pairs.images.flatten(0, 1), posterior)
    noisy = backbone.noise_schedule().add_noise(latents, noise, torch.full((2 * n,), timestep))
    text = scorer.encode_prompts([str(caption) for caption in pairs.captions])
    first, second = (scorer.score(side, text, timestep) for side in noisy.chunk(2))
    right = (first > second).float() == pairs.labels
    assert right[sure].float().mean() > least  # chance: 0.5 +- 0.03


@pytest.mark.slow
def test_the_world_can_be_made_again(tmp_path):
    """The one command, shortened; what it makes is what training starts from."""
    command = [sys.executable, "scripts/make_tiny_world.py", "--out", tmp_path, "--shorten", "1000"]
    for _ in range(2):  # the second time there is nothing left to do
        made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr[-2000:]
    assert "sd15 ..." not in made.stdout
    network = "unet/diffusion_pytorch_model.safetensors"
    with_spm = "step_aware_preference_model.safetensors"
    for ours, committed in (
        ("sd15/unet/diffusion_pytorch_model.safetensors",) * 2,
        ("sd15/vae/diffusion_pytorch_model.safetensors",) * 2,
        ("pickscore/model.safetensors", "clip/model.safetensors"),
        ("decoder/diffusion_pytorch_model.safetensors",) * 2,
        (f"spm/{with_spm}", "spm.safetensors"),
        (f"lrm/latent_reward_model/{network}", f"lrm/{network}"),
    ):
        shapes = [
            {name: tensor.shape for name, tensor in load_file(file).items()}
            for file in (tmp_path / ours, ROOT / "assets" / "tiny" / committed)
        ]
        if committed.startswith("lrm"):  # without the up path
            shapes[0] = {n: s for n, s in shapes[0].items() if not n.startswith(UP_PATH)}
        assert shapes[0] == shapes[1]
