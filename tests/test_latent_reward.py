"""The latent reward model: the official scores, the published layout, and all that may be wrong."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from helpers import COLLECT, MODELS, PROMPTS, model_folder, randn
from safetensors.torch import load_file, save_file
from test_malicious_files import trap  # noqa: F401, a fixture

from spo.command_line.config_files import load_config
from spo.errors import UserError
from spo.method.build import read_recipe
from spo.method.collect import collect_rollout, score_candidates
from spo.models.loading import ModelSource, check_source
from spo.scorers import candidate_scorer, check_scorer, latent_reward_folder, load_scorer
from spo.scorers.latent_reward import unit
from spo.types import Candidates, Transition

CPU = torch.device("cpu")
RECORDED = Path(__file__).parent / "data" / "golden_lpo"
UNET = "unet/diffusion_pytorch_model.safetensors"
OF_LATENTS = replace(COLLECT, rollout=replace(COLLECT.rollout, looks_at="latents"))


def lrm(family):
    return MODELS / f"tiny-lrm-{family}"


def source(family="sd15", folder=None, **options):
    folder = folder or lrm(family)
    options = {"checkpoint": str(folder), "base": model_folder(family)} | options
    return candidate_scorer("latent_reward", options)


def load(*args, **options):
    return load_scorer(source(*args, **options), CPU)


def check(folder, family="sd15", model=None, **options):
    """Raises UserError as the start of a run, before any model loads."""
    base = check_source(ModelSource(model or model_folder(family)), family)
    check_scorer(source(family, folder, **options), family, base)


@pytest.fixture
def folder(tmp_path):
    """A copy of the reward model of SD1.5 to be changed."""
    return shutil.copytree(lrm("sd15"), tmp_path / "lrm")


@pytest.fixture(scope="module")
def scorer():
    return load()


def scores(scorer, timestep=501):
    text = scorer.encode_prompts(PROMPTS)
    return scorer.score(randn(3, 4, 8, 8, seed=5), text, timestep)


@pytest.mark.parametrize("case", ["cfg", "cfg_all", "none"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_forward_as_recorded(family, case):
    meta = json.loads((RECORDED / f"lrm_forward_{family}" / "meta.json").read_text())
    trace = load_file(RECORDED / f"lrm_forward_{family}" / "trace.safetensors")
    guided = meta["cases"][case]
    scale, stages = guided["guidance_scale"], guided["multi_scale_cfg"]
    scorer = load(family, guidance_scale=scale, guide_stages=stages)
    assert (scorer.empty is None) == (scale == 1)
    latents, timesteps = trace["latents"], trace["timesteps"]
    text = scorer.encode_prompts(meta["prompts"])
    with torch.no_grad():
        features = scorer.model.image_features(latents, timesteps, text, scorer.empty)
    for found, name, atol in (
        (features, "image_features", 2e-3),
        (scorer.model.score(latents, timesteps, text, scorer.empty), "scores", 5e-3),
    ):
        torch.testing.assert_close(found, trace[f"{case}.{name}"], rtol=0, atol=atol)
    expected = unit(trace[f"{case}.text_features"])
    torch.testing.assert_close(text.features, expected, rtol=0, atol=1e-5)
    for i in (5, 0):  # one by one, at one timestep for all rows
        row = slice(i, i + 1)
        alone = scorer.score(latents[row], text[row], int(timesteps[i]))
        torch.testing.assert_close(alone, trace[f"{case}.scores"][row], rtol=0, atol=5e-3)


def test_rows_per_pass_do_not_matter(scorer):
    latents = randn(4, 3, 4, 8, 8, seed=0)
    transition = Transition(501, 451, latents[:1], latents, latents, latents[:1])
    candidates, text = Candidates((transition,), None, 451, False), scorer.encode_prompts(PROMPTS)
    sizes, rows, own = (1, 5, 12, 100), [], scorer.score

    def counted(seen, *rest):
        rows.append(len(seen))
        return own(seen, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "score", counted)
        settings = [replace(OF_LATENTS, score_batch_size=size) for size in sizes]
        found = [score_candidates(candidates, None, scorer, text, each) for each in settings]
    assert rows == [1] * 12 + [5, 5, 2] + [12] + [12]
    for each in found:
        torch.testing.assert_close(each, found[0], rtol=0, atol=1e-4)
    by_hand = [own(latents[k, b : b + 1], text[b : b + 1], 501) for k in (0, 3) for b in (0, 2)]
    torch.testing.assert_close(found[0][[0, 0, 3, 3], [0, 2, 0, 2]], torch.cat(by_hand))


def test_prompts_are_read_once_per_rollout_and_the_empty_one_once_per_run(sd15, monkeypatch):
    scorer, read = load(), []
    assert scorer.empty.hidden.shape[0] == 1
    own = scorer.model.encode_text
    monkeypatch.setattr(
        scorer.model, "encode_text", lambda ids: read.append(len(ids[0])) or own(ids)
    )
    monkeypatch.setattr(sd15, "decode_candidates", None)
    for _ in range(2):
        ids, generator = torch.tensor([7, 8]), torch.Generator().manual_seed(0)
        sampler = sd15.sampler(4, eta=1.0)
        collect_rollout(sd15, scorer, sampler, OF_LATENTS, PROMPTS[:2], ids, generator)
    assert read == [2, 2]


def rewrite(path, change):
    """Saves the tensors of a file again as `change` makes them."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_the_up_path_is_never_read(folder, scorer, monkeypatch):
    def garble(tensors):
        for name in [n for n in tensors if n.startswith(("up_blocks", "conv_out"))]:
            del tensors[name]
        tensors["up_blocks.7.no_such.weight"] = torch.zeros(3)

    rewrite(folder / UNET, garble)
    got, own = [], latent_reward_folder.safe_open

    class Watched:
        def __init__(self, *args, **options):
            self.file = own(*args, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            got.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(latent_reward_folder, "safe_open", Watched)
    assert torch.equal(scores(load(folder=folder)), scores(scorer))
    load()  # from the whole file
    assert {name.split(".")[0] for name in got} == {
        *("conv_in", "time_embedding", "down_blocks", "mid_block")
    }
    assert {name.split(".")[0] for name, _ in scorer.model.unet.named_parameters()} == {
        *("conv_in", "time_embedding", "down_blocks", "mid_block")
    }


@pytest.mark.parametrize(("dtype", "atol"), [("float16", 0.2), ("bfloat16", 3)])
def test_heads_and_scores_stay_in_float32(scorer, dtype, atol):
    half = load(dtype=dtype)
    model, wanted = half.model, getattr(torch, dtype)
    for network in (model.unet, model.text_encoder):
        assert {p.dtype for p in network.parameters()} == {wanted}
    heads = (model.visual_projection.weight, model.text_projection.weight, model.logit_scale)
    assert {head.dtype for head in heads} == {torch.float32}
    found = scores(half)
    assert found.dtype == torch.float32
    assert 0 < (found - scores(scorer)).abs().max() < atol


def shard(folder):
    tensors = load_file(folder / UNET)
    (folder / UNET).unlink()
    names = ["diffusion_pytorch_model-00001-of-00002.safetensors"]
    names.append(names[0].replace("00001", "00002"))
    where = {name: names[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / "unet" / file)
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))


def halve(folder):
    """Leaves nothing but files of the variant fp16."""
    for name in (UNET, "text_encoder/model.safetensors"):
        path = folder / name
        tensors = {n: t.half() if t.is_floating_point() else t for n, t in load_file(path).items()}
        path.unlink()
        save_file(tensors, path.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})


def save_heads(folder, **changes):
    """Saves state_dict.pt with some entries changed; None removes one."""
    saved = torch.load(lrm("sd15") / "state_dict.pt", weights_only=True) | changes
    torch.save({k: v for k, v in saved.items() if v is not None}, folder / "state_dict.pt")


def temperature(kind):
    scale = float(torch.load(lrm("sd15") / "state_dict.pt", weights_only=True)["logit_scale"])
    return lambda folder: save_heads(folder, logit_scale=kind(scale))


@pytest.mark.parametrize(
    ("change", "atol"),
    [(shard, 0), (halve, 0.2), (temperature(float), 1e-5), (temperature(torch.tensor), 1e-5)],
)
def test_forms_of_the_files(folder, scorer, change, atol):
    change(folder)
    check(folder)
    torch.testing.assert_close(scores(load(folder=folder)), scores(scorer), rtol=0, atol=atol)


def config(**changes):
    """Changes unet/config.json; a key with two underscores is of the text encoder."""

    def change(folder):
        for key, value in changes.items():
            part, _, name = key.rpartition("__")
            path = folder / (part or "unet") / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return change


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def remove(name):
    return lambda folder: (folder / name).unlink()


def heads(**changes):
    return lambda folder: save_heads(folder, **changes)


def compress(folder):
    zipped = folder / "zipped"
    save_heads(folder, visual_projection={"weight": torch.zeros(24, 96)})
    with ZipFile(folder / "state_dict.pt") as plain, ZipFile(zipped, "w", ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    zipped.rename(folder / "state_dict.pt")


def cut(folder):
    content = (folder / "state_dict.pt").read_bytes()
    (folder / "state_dict.pt").write_bytes(content[: len(content) // 2])


def pickled(folder):
    """Leaves the UNet's weights in a .bin file alone."""
    torch.save(load_file(folder / UNET), (folder / UNET).with_suffix(".bin"))
    (folder / UNET).unlink()


BAD = {  # what is done to the folder, and what the start of a run says
    "no state_dict": (remove("state_dict.pt"), r"lacks state_dict\.pt; a latent reward model is a"),
    "no folder": (shutil.rmtree, "neither a folder nor"),
    "no UNet config": (remove("unet/config.json"), r"lacks unet/config\.json"),
    "no text config": (remove("text_encoder/config.json"), r"lacks text_encoder/config\.json"),
    "no UNet weights": (remove(UNET), r"unet: no weights"),
    "no text weights": (remove("text_encoder/model.safetensors"), "text_encoder: no weights"),
    "pickled UNet": (pickled, r"diffusion_pytorch_model\.bin is not in safe format"),
    "config is no JSON": (write("unet/config.json", b"{"), r"config\.json is not a JSON file"),
    "config is a number": (write("unet/config.json", b"5"), r"config\.json is not an object"),
    "config is empty": (
        write("text_encoder/config.json", b"{}"),
        "its networks has no 'hidden_size'",
    ),
    "config without stages": (
        write("unet/config.json", b"{}"),
        "has no 'cross_attention_dim'",
    ),
    "other stages": (
        config(block_out_channels=[8, 16, 24, 32]),
        r"visual_projection in state_dict\.pt is \(24, 96\), but its networks need \(24, 112\)",
    ),
    "other text": (
        config(text_encoder__hidden_size=48, cross_attention_dim=48),
        r"text_projection in state_dict\.pt is \(24, 32\), but its networks need \(24, 48\)",
    ),
    "text that the UNet does not read": (config(cross_attention_dim=64), "reads text of width 64"),
    "other channels": (config(in_channels=9), "reads latents of 9 channels, .* have 4"),
    "no visual projection": (heads(visual_projection=None), "KeyError: 'visual_projection'"),
    "no text projection": (heads(text_projection=None), "text_projection .* is missing"),
    "no temperature": (heads(logit_scale=None), "KeyError: 'logit_scale'"),
    "temperature of two": (heads(logit_scale=torch.ones(2)), "does not hold visual_projection"),
    "infinite temperature": (heads(logit_scale=math.inf), "not finite"),
    "projection in another place": (
        heads(visual_projection=5),
        "does not hold visual_projection",
    ),
    "vector": (heads(visual_projection={"weight": torch.zeros(24)}), r"projection is \(24,\)"),
    "NaN": (heads(text_projection={"weight": torch.full((24, 32), torch.nan)}), "not finite"),
    "grows": (
        heads(visual_projection={"weight": torch.zeros(1).expand(24, 96)}),
        r"projection is \(24, 96\), or not all there",
    ),
    "a list": (lambda folder: torch.save([1], folder / "state_dict.pt"), "does not hold visual_"),
    "compressed": (compress, "compressed, as torch.save never does"),
    "cut": (cut, "does not hold visual_projection"),
    "empty": (write("state_dict.pt", b""), "does not hold visual_projection"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_told_before_any_model_loads(folder, name):
    change, message = BAD[name]
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        check(folder)
    assert str(caught.value).startswith("preference.kwargs.checkpoint: ")
    assert "\n" not in str(caught.value)


def test_a_pickle_runs_nothing(folder, trap):  # noqa: F811
    for legacy in (False, True):
        trap(folder / "state_dict.pt", legacy)
        for use in (lambda: check(folder), lambda: load(folder=folder)):
            with pytest.raises(UserError, match=r"checkpoint: .*state_dict\.pt does not hold"):
                use()


def changed_base(tmp_path, **changes):
    model = shutil.copytree(model_folder("sd15"), tmp_path / "base")
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(model)


def test_an_lrm_of_another_family_or_noise(tmp_path):
    own = "preference.kwargs.checkpoint: .*"
    for family, other in (("sd15", "sdxl"), ("sdxl", "sd15")):
        check(lrm(family), family)
        with pytest.raises(UserError, match=f"{own}is of {other}, but family is '{family}'"):
            check(lrm(other), family)
    for number, (changes, said) in enumerate(
        [
            ({"prediction_type": "v_prediction"}, "prediction type v_prediction, not epsilon"),
            ({"beta_end": 0.02}, "other betas"),
        ]
    ):
        model = changed_base(tmp_path / str(number), **changes)
        message = rf"{own}was trained on the noise of .*, but pretrained.model has {said}"
        with pytest.raises(UserError, match=message):
            check(lrm("sd15"), model=model)
        check(lrm("sd15"), model=model, base=model)  # an LRM trained on it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 0.5}, r"kwargs\.guidance_scale: 0.5 must be 1 \(off\) or above"),
        ({"guidance_scale": math.nan}, r"kwargs\.guidance_scale: nan must be"),
        ({"guidance_scale": math.inf}, r"kwargs\.guidance_scale: inf must be"),
        ({"dtype": "float8"}, r"kwargs\.dtype: 'float8' is none of"),
        ({"guide_stages": 1}, r"kwargs\.guide_stages: 1 is none like False"),
        ({"scale": 7.5}, r"preference\.kwargs: latent_reward takes other options: .*'scale'"),
        ({"checkpoint": "./no"}, r"kwargs\.checkpoint: './no' is neither a folder nor a Hub id"),
        ({"checkpoint": "/no/such/lrm"}, r"kwargs\.checkpoint: '/no/such/lrm' is neither"),
        ({"base": "./no"}, r"kwargs\.base: './no' is neither a folder nor a Hub id"),
        ({"base": "assets"}, r"kwargs\.base: .*"),
    ],
)
def test_bad_options_are_told_before_any_model_loads(options, message):
    with pytest.raises(UserError, match=message) as caught:
        check(None, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        *(
            (
                "lpo_sd15",
                {f"sample.{name}": value},
                rf"sample\.{name}: .* means nothing to latent_r",
            )
            for name, value in (
                *(("num_inner_steps", 1), ("final_step", "extend"), ("final_direction", "last")),
                *(("final_score_timestep", "t"), ("keep_all_final", True), ("decoder", "user/x")),
            )
        ),
        *(
            ("sd15", {f"sample.{name}": value}, rf"sample\.{name}: .* means nothing to step_aware")
            for name, value in (("stop_at", 10), ("score_timestep", "next"))
        ),
        ("lpo_sd15", {"sample.score_timestep": "now"}, r"score_timestep: 'now' is none of t, next"),
        ("lpo_sd15", {"sample.score_batch_size": 0}, r"score_batch_size: 0 must be a whole number"),
        ("lpo_sd15", {"sample.stop_at": 21}, r"sample\.stop_at: 21 must be .* at most .*=20"),
        ("lpo_sd15", {"sample.stop_at": -1}, r"sample\.stop_at: -1 must be 0 or more"),
        ("lpo_sd15", {"sample.threshold": 0.3}, r"sample\.threshold: the sigma schedule goes"),
        (
            "lpo_sd15",
            {"compile.vae": True, "eval_interval": 0},
            r"compile\.vae: nothing is decoded in this run; set it to False",
        ),
    ],
)
def test_keys_that_make_no_sense_together(file, changes, message):
    config = load_config(f"config/{file}.py")
    read_recipe(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        read_recipe(config)


def lacking(tensors):
    del tensors["down_blocks.1.resnets.0.conv1.weight"], tensors["mid_block.resnets.0.conv1.bias"]


def misshaped(tensors):
    tensors["conv_in.weight"] = torch.zeros(8, 4, 1, 1)


def unknown(tensors):
    tensors["extra.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lacking, r"lack down_blocks\.1\.resnets\.0\.conv1\.weight and 1 more"),
        (misshaped, r"another shape of conv_in\.weight"),
        (unknown, r"they have extra\.weight"),
    ],
)
def test_wrong_tensors_are_named(folder, change, message):
    rewrite(folder / UNET, change)
    said = rf"preference\.kwargs\.checkpoint: .*cannot be loaded \(UNet: its weights .*{message}"
    with pytest.raises(UserError, match=said):
        load(folder=folder)


def test_files_that_cannot_be_loaded(folder, tmp_path):
    shard(folder)
    index = next((folder / "unet").glob("*.index.json"))
    for content in (index.read_text().replace("00002-of", "00003-of"), "{}", "{"):
        index.write_text(content)
        with pytest.raises(UserError, match=r"kwargs\.checkpoint: .* cannot be loaded"):
            load(folder=folder)
    base = shutil.copytree(model_folder("sd15"), tmp_path / "base")
    shutil.rmtree(base / "tokenizer")
    with pytest.raises(UserError, match=r"kwargs\.base: no tokenizer of "):
        load(base=str(base))


@pytest.mark.slow
def test_compiled_blocks_score_alike(scorer):
    compiled = load()
    compiled.compile()
    torch.testing.assert_close(scores(compiled), scores(scorer), rtol=0, atol=1e-3)
