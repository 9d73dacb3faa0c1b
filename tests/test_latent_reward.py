"""The latent reward model: the official scores, the published layout, and all that may be wrong."""

import json
import math
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from helpers import COLLECT, MODELS, PROMPTS, model_folder, randn
from safetensors.torch import load_file, save_file
from test_malicious_files import trap  # noqa: F401, a fixture
from test_model_forms import hub  # noqa: F401, a fixture

from spo.command_line.config_files import load_config
from spo.errors import UserError
from spo.method.build import read_recipe
from spo.method.collect import collect_rollout, score_candidates
from spo.models.loading import ModelSource, check_source
from spo.scorers import candidate_scorer, check_scorer, latent_reward_folder, load_scorer
from spo.types import Candidates, Transition

CPU = torch.device("cpu")
UNET = "unet/diffusion_pytorch_model.safetensors"
CONFIG, TEXT, HEADS = "unet/config.json", "text_encoder/config.json", "state_dict.pt"
SCHEDULER = "scheduler/scheduler_config.json"
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
    base = check_source(ModelSource(str(model or model_folder(family))), family)
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


@pytest.mark.parametrize(("family", "shared"), [("sd15", 3), ("sdxl", 6)])
def test_guided_passes_are_one_until_the_text_tells_them_apart(family, shared):
    guided, plain = load(family), load(family, guidance_scale=1.0).model
    text, rows = guided.encode_prompts(PROMPTS), {}
    resnet = guided.model.unet.down_blocks[0].resnets[0]
    block = next(m for m in guided.model.unet.modules() if isinstance(m, BasicTransformerBlock))
    for name, layer in {"resnet": resnet.conv1, "self": block.attn1, "cross": block.attn2}.items():
        layer = getattr(layer, "to_q", layer)
        layer.register_forward_hook(lambda _, __, out, name=name: rows.update({name: len(out)}))
    latents, timesteps = randn(3, 4, 8, 8, seed=5), torch.tensor([901, 501, 1])
    with torch.no_grad():
        found = guided.model.image_features(latents, timesteps, text, guided.empty)
        empty = guided.empty[torch.zeros(3, dtype=torch.long)]
        passes = [plain._pooled(latents, timesteps, t.hidden, t.pooled) for t in (text, empty)]
        *stages, middle = passes[0]
        middle = passes[1][-1] + 7.5 * (middle - passes[1][-1])
        wanted = plain.visual_projection(torch.cat([*stages, middle], dim=1))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert rows == {"resnet": shared, "self": shared, "cross": 6}


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

    @contextmanager
    def watched(*args, **options):
        with own(*args, **options) as file:
            parts = {name: getattr(file, name) for name in ("keys", "get_slice")}
            yield SimpleNamespace(
                **parts, get_tensor=lambda name: got.append(name) or file.get_tensor(name)
            )

    monkeypatch.setattr(latent_reward_folder, "safe_open", watched)
    assert torch.equal(scores(load(folder=folder)), scores(scorer))
    load()  # from the whole file
    parameters = [name for name, _ in scorer.model.unet.named_parameters()]
    for names in (got, parameters):
        found = {name.split(".")[0] for name in names}
        assert found == {"conv_in", "time_embedding", "down_blocks", "mid_block"}


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


def edit(file, **changes):
    """Changes keys of a JSON file of the folder."""

    def change(folder):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def remove(name):
    return lambda folder: (folder / name).unlink()


def heads(**changes):
    return lambda folder: save_heads(folder, **changes)


def projection(weight):
    return heads(visual_projection={"weight": weight})


def compress(folder):
    zipped = folder / "zipped"
    save_heads(folder, visual_projection={"weight": torch.zeros(24, 96)})
    with ZipFile(folder / HEADS) as plain, ZipFile(zipped, "w", ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    zipped.rename(folder / HEADS)


def pickle_weights(folder):
    torch.save(load_file(folder / UNET), (folder / UNET).with_suffix(".bin"))
    (folder / UNET).unlink()


NOT_HELD = "does not hold visual_projection, text_projection and logit_scale"
BAD = [  # what is done to the folder, and what the start of a run says
    (remove(HEADS), r"lacks state_dict\.pt; a latent reward model is a folder of unet"),
    (remove(CONFIG), r"lacks unet/config\.json"),
    (remove(TEXT), r"lacks text_encoder/config\.json"),
    (remove(UNET), "unet: no weights"),
    (remove("text_encoder/model.safetensors"), "text_encoder: no weights"),
    (shutil.rmtree, "neither a folder nor a Hub id"),
    (pickle_weights, r"diffusion_pytorch_model\.bin is not in safe format"),
    (write(CONFIG, b"{"), r"config\.json is not a JSON file"),
    (write(CONFIG, b"5"), r"config\.json is not an object"),
    (write(TEXT, b"{}"), "a config of its networks has no 'hidden_size'"),
    (write(CONFIG, b"{}"), "a config of its networks has no 'cross_attention_dim'"),
    (edit(CONFIG, block_out_channels=[8, 16, 24, 32]), r"is \(24, 96\), but .* need \(24, 112\)"),
    (edit(CONFIG, block_out_channels=8), "'int' object is not iterable"),
    (edit(CONFIG, block_out_channels=[]), "list index out of range"),
    (edit(CONFIG, cross_attention_dim=64), "UNet reads text of width 64, but .* make 32"),
    (edit(TEXT, hidden_size=48), "UNet reads text of width 32, but .* make 48"),
    (edit(CONFIG, in_channels=9), "reads latents of 9 channels, but the base model's have 4"),
    (heads(text_projection=None), r"text_projection in state_dict\.pt is missing"),
    (
        heads(text_projection={"weight": torch.zeros(24, 8)}),
        r"is \(24, 8\), but .* need \(24, 32\)",
    ),
    (heads(visual_projection=None), f"{NOT_HELD}.*KeyError: 'visual_projection'"),
    (heads(visual_projection=5), NOT_HELD),
    (projection(torch.zeros(24)), r"a projection is \(24,\)"),
    (projection(torch.full((24, 96), torch.nan)), "not finite"),
    (projection(torch.zeros(1).expand(24, 96)), r"projection is \(24, 96\), or not all there"),
    (heads(logit_scale=None), f"{NOT_HELD}.*KeyError: 'logit_scale'"),
    (heads(logit_scale=torch.ones(2)), NOT_HELD),
    (heads(logit_scale=math.inf), "not finite"),
    (lambda folder: torch.save([1], folder / HEADS), NOT_HELD),
    (compress, "compressed, as torch.save never does"),
    (lambda folder: os.truncate(folder / HEADS, 5000), NOT_HELD),
    (write(HEADS, b""), NOT_HELD),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_bad_folder_is_told_before_any_model_loads(folder, change, message):
    change(folder)
    with pytest.raises(UserError, match=rf"^preference\.kwargs\.checkpoint: .*{message}.*$"):
        check(folder)


def test_a_pickle_runs_nothing(folder, trap):  # noqa: F811
    for legacy in (False, True):
        trap(folder / HEADS, legacy)
        for use in (lambda: check(folder), lambda: load(folder=folder)):
            with pytest.raises(UserError, match=NOT_HELD):
                use()


@pytest.fixture
def base(tmp_path):
    """A copy of the base model of SD1.5 to be changed."""
    return shutil.copytree(model_folder("sd15"), tmp_path / "base")


@pytest.mark.parametrize(("family", "other"), [("sd15", "sdxl"), ("sdxl", "sd15")])
def test_an_lrm_of_another_family(family, other):
    check(lrm(family), family)
    with pytest.raises(UserError, match=f"checkpoint: .* is of {other}, but family is '{family}'"):
        check(lrm(other), family)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prediction_type": "v_prediction"}, "prediction type v_prediction, not epsilon"),
        ({"beta_end": 0.02}, "other betas"),
    ],
)
def test_an_lrm_of_another_noise(base, changes, said):
    edit(SCHEDULER, **changes)(base)
    message = rf"checkpoint: .* trained on the noise of .*, but pretrained\.model has {said}; name"
    with pytest.raises(UserError, match=message):
        check(lrm("sd15"), model=base)
    check(lrm("sd15"), model=base, base=str(base))  # an LRM that was trained on it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 0.5}, r"\.guidance_scale: 0.5 must be 1 \(off\) or above"),
        ({"guidance_scale": math.nan}, r"\.guidance_scale: nan must be"),
        ({"dtype": "float8"}, r"\.dtype: 'float8' is none of"),
        ({"guide_stages": 1}, r"\.guide_stages: 1 is none like False"),
        ({"scale": 7.5}, ": latent_reward takes other options: .*'scale'"),
        ({"checkpoint": "./no"}, r"\.checkpoint: './no' is neither a folder nor a Hub id"),
        ({"checkpoint": "/no/such/lrm"}, r"\.checkpoint: '/no/such/lrm' is neither"),
        ({"base": "./no"}, r"\.base: './no' is neither a folder nor a Hub id"),
        ({"base": "assets"}, r"\.base: no file 'assets/scheduler/scheduler_config\.json'"),
    ],
)
def test_bad_options_are_told_before_any_model_loads(options, message):
    with pytest.raises(UserError, match=rf"^preference\.kwargs{message}.*$"):
        check(None, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(SCHEDULER, prediction_type="flow_prediction"), "its scheduler's prediction_type is"),
        (write(SCHEDULER, b"{"), "is not a JSON file"),
        (lambda base: shutil.rmtree(base / "tokenizer"), "no tokenizer of "),
        (remove("tokenizer/vocab.json"), "no tokenizer of |a vocabulary of"),
    ],
)
def test_a_bad_base_of_the_lrm(base, change, message):
    change(base)
    with pytest.raises(UserError, match=rf"^preference\.kwargs\.base: .*{message}"):
        check(None, base=str(base))
        load(base=str(base))


def test_a_reward_model_of_another_vocabulary(folder):
    edit(TEXT, vocab_size=400)(folder)
    rewrite(folder / "text_encoder" / "model.safetensors", cut_vocabulary)
    with pytest.raises(UserError, match=r"\.base: .*514 tokens, but the reward model knows 400"):
        load(folder=folder)


MEANINGLESS = [
    *(("lpo_sd15", "num_inner_steps", 1), ("lpo_sd15", "final_step", "extend")),
    *(("lpo_sd15", "final_direction", "last"), ("lpo_sd15", "final_score_timestep", "t")),
    *(("lpo_sd15", "keep_all_final", True), ("lpo_sd15", "decoder", "user/name")),
    *(("sd15", "stop_at", 10), ("sd15", "score_timestep", "next")),
]


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        *((f, {f"sample.{k}": v}, rf"sample\.{k}: .* means nothing to") for f, k, v in MEANINGLESS),
        ("lpo_sd15", {"sample.score_timestep": "now"}, "score_timestep: 'now' is none of t, next"),
        ("lpo_sd15", {"sample.score_batch_size": 0}, "score_batch_size: 0 must be a whole number"),
        ("lpo_sd15", {"sample.stop_at": 21}, "sample.stop_at: 21 must be .* at most .*=20"),
        ("lpo_sd15", {"sample.threshold": 0.3}, "sample.threshold: the sigma schedule goes"),
        ("lpo_sd15", {"compile.vae": True, "eval_interval": 0}, "compile.vae: nothing is decoded"),
    ],
)
def test_keys_that_make_no_sense_together(file, changes, message):
    config = load_config(f"config/{file}.py")
    read_recipe(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        read_recipe(config)


def cut_vocabulary(tensors):
    for name in [n for n in tensors if n.endswith("token_embedding.weight")]:
        tensors[name] = tensors[name][:400].clone()


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


@pytest.mark.parametrize(
    ("file", "changes"),
    [(TEXT, {"num_attention_heads": "x"}), (TEXT, {"num_hidden_layers": None})]
    + [
        (CONFIG, {"layers_per_block": "x"}),
        (CONFIG, {"act_fn": "x"}),
        (CONFIG, {"attention_head_dim": 0}),
    ],
)
def test_configs_of_no_network(folder, file, changes):
    edit(file, **changes)(folder)
    with pytest.raises(UserError, match=r"^preference\.kwargs\.checkpoint: .* cannot be loaded"):
        load(folder=folder)


def test_an_index_of_files_that_are_not_there(folder):
    shard(folder)
    index = next((folder / "unet").glob("*.index.json"))
    for content in (index.read_text().replace("00002-of", "00003-of"), "{}", "{"):
        index.write_text(content)
        with pytest.raises(UserError, match=r"kwargs\.checkpoint: .* cannot be loaded"):
            load(folder=folder)


def test_folders_of_the_hub(scorer, hub):  # noqa: F811
    paths = {p.relative_to(lrm("sd15")).as_posix(): p for p in lrm("sd15").rglob("*.*")}
    files = {name: path.read_bytes() for name, path in paths.items()}
    hub.create("user/lrm", files=files | {f"deep/er/{n}": data for n, data in files.items()})
    for place in ("user/lrm", "hf://user/lrm", "hf://user/lrm/deep/er"):
        check(place)
        assert torch.equal(scores(load(folder=place)), scores(scorer))
    with pytest.raises(UserError, match=r"checkpoint: no/unet/config\.json of user/lrm: no such"):
        check("hf://user/lrm/no")


@pytest.mark.slow
def test_compiled_blocks_score_alike(scorer):
    compiled = load()
    compiled.compile()
    torch.testing.assert_close(scores(compiled), scores(scorer), rtol=0, atol=1e-3)
