"""The files of the Hub and the web that the configs in config/ read: sizes, licences, cached or not."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from tqdm import tqdm

from spo.data.prompt_sets import PICKAPIC, PROMPT_SETS
from spo.data.web_files import is_address, kept, open_address
from spo.errors import Unavailable
from spo.hub import why
from spo.models.families import FAMILIES

_DATASETS = "datasets/"  # begins the names of datasets, as in the addresses of the Hub's pages
_CLIP = ("tokenizer_config.json", "preprocessor_config.json")  # and small files beside them
_WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Download:
    """A repo of the Hub or an address, and what of it is read."""

    source: str  # user/name, datasets/user/name, or https://...
    files: tuple[str, ...]  # of the repo; empty: all that `datasets` needs
    gb: float | None  # 10^9 bytes; 0: less than 0.01; None: not known without asking
    license: str  # by the Hub's identifier; empty: see its page
    used_by: str


def _pipeline(family: str, gb: float, parts: tuple[str, ...]) -> Download:
    row = FAMILIES[family]
    files = ("model_index.json", f"unet/{_WEIGHTS}", *parts)
    return Download(row.base_model, files, gb, row.license, f"all of {family}")


def _spm(family: str, file: str) -> Download:
    repo = "SPO-Diffusion-Models/Step-Aware_Preference_Models"
    return Download(repo, (file,), 5.2, "", f"training {family}")


def _lrm(family: str, gb: float) -> Download:
    folder = f"lrm_{family}"
    files = (f"{folder}/unet/{_WEIGHTS}", f"{folder}/text_encoder/model.safetensors")
    return Download("casiatao/LRM", files, gb, "", f"latent_reward, {family}")


# Sizes: number of weights x bytes of their dtype; of Pick-a-Pic, as on its page.
WEIGHTS = (
    _pipeline("sd15", 4.3, (f"vae/{_WEIGHTS}", "text_encoder/model.safetensors")),
    _spm("sd15", "sd-v1-5_step-aware_preference_model.bin"),
    _pipeline("sdxl", 13.5, ("text_encoder/model.safetensors", "text_encoder_2/model.safetensors")),
    _lrm("sd15", 3.9),
    _lrm("sdxl", 13.5),
    Download(
        "stabilityai/stable-diffusion-2-1-base",
        (
            "model_index.json",
            f"unet/{_WEIGHTS}",
            f"vae/{_WEIGHTS}",
            "text_encoder/model.safetensors",
        ),
        5.2,
        "openrail++",
        "lpo_sd21",
    ),
    Download("madebyollin/sdxl-vae-fp16-fix", ("config.json", _WEIGHTS), 0.3, "mit", "all of sdxl"),
    _spm("sdxl", "sdxl_step-aware_preference_model.bin"),
    Download("yuvalkirstain/PickScore_v1", ("config.json",), 0, "", "training: its architecture"),
    Download("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", _CLIP, 0, "mit", "training, pickscore"),
    Download("yuvalkirstain/PickScore_v1", ("model.safetensors",), 3.9, "", "pickscore, spm"),
    Download("openai/clip-vit-large-patch14", ("model.safetensors",), 1.7, "", "lrm of sd15"),
    Download("xswu/HPSv2", ("HPS_v2_compressed.pt",), 2.0, "", "hpsv2"),
    Download("xswu/HPSv2", ("HPS_v2.1_compressed.pt",), 2.0, "", "hpsv2.1, a judge of training"),
    Download("zai-org/ImageReward", ("ImageReward.pt",), 1.8, "", "imagereward"),
    Download("google-bert/bert-base-uncased", _CLIP[:1], 0, "apache-2.0", "imagereward"),
    Download(
        "timm/vit_large_patch14_clip_224.openai",
        ("open_clip_model.safetensors",),
        1.7,
        "apache-2.0",
        "aesthetic, a judge of training; clipscore",
    ),
    Download("trl-lib/ddpo-aesthetic-predictor", ("aesthetic-model.pth",), 0, "", "aesthetic"),
)
PAIRS = tuple(Download(f"{_DATASETS}{name}", (), 202, "", "spm") for name in PICKAPIC)


def prompt_lists() -> Iterator[Download]:
    """Yields the places of the named prompt sets, in the order in which they are tried."""
    for name, named in PROMPT_SETS.items():
        for number, place in enumerate(named.places):
            source = place.source if is_address(place.source) else f"{_DATASETS}{place.source}"
            used_by = "if that does not answer" if number else f"{name}: {named.about}"
            gb = 0 if is_address(source) or place.files else None
            yield Download(source, place.files, gb, named.license, used_by)


def is_cached(download: Download) -> bool:
    """Returns whether all files are on this disk."""
    source = download.source
    if is_address(source):
        return kept(source) is not None
    name, kind = source.removeprefix(_DATASETS), _kind(source)
    if not download.files:
        return Path(constants.HF_HOME, "datasets", name.replace("/", "___")).is_dir()
    paths = (try_to_load_from_cache(name, file, repo_type=kind) for file in download.files)
    return all(isinstance(path, str) for path in paths)


def ask(download: Download) -> str:
    """Returns what the Hub or the web says of a download, in a few words; downloads nothing."""
    source, kind = download.source, _kind(download.source)
    try:
        if is_address(source):
            with open_address(Request(source.partition("#")[0], method="HEAD")) as response:
                return f"yes, {int(response.headers.get('Content-Length', 0)) / 1e6:.1f} MB"
        name = source.removeprefix(_DATASETS)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        info = HfApi().repo_info(name, repo_type=kind, files_metadata=True, timeout=timeout)
    except Unavailable as error:
        return str(error).partition(": ")[2]
    except Exception as error:  # of whatever network library the Hub's client uses
        return why(error, source).partition(";")[0].removeprefix("not in the local cache, and ")
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    missing = [file for file in download.files if file not in sizes]
    if missing:
        return f"no {', '.join(missing)} in it"
    size = sum(sizes[file] for file in download.files or sizes) / 1e9
    notes = [f"moved to {info.id}"] if info.id != name else []
    notes += ["gated: log in, and accept its terms there"] if info.gated else []
    notes += [f"licence {info.card_data.license}"] if getattr(info.card_data, "license", "") else []
    return ", ".join(["yes", f"{size:.2f} GB", *notes])


def describe(check: bool) -> str:
    """Returns a table of all downloads; with `check` the Hub and the web are asked for each."""
    header = ["GB", "licence", "cached", "for", "from"]
    rows = [header if not check else [*header[:3], "answers", *header[3:]]]
    downloads = [*WEIGHTS, *PAIRS, *prompt_lists()]
    for download in tqdm(downloads, desc="asking", disable=not check, leave=False):
        gb = "?" if download.gb is None else f"{download.gb:g}" if download.gb else "small"
        row = [gb, download.license or "see its page", "yes" if is_cached(download) else "no"]
        row += [ask(download)] if check else []
        where = [download.source.partition("#")[0], ", ".join(download.files)]
        rows.append([*row, download.used_by, ": ".join(filter(None, where))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0  # nothing stands behind it
    return "\n".join("  ".join(map(str.ljust, row, widths)) for row in rows)


def _kind(source: str) -> str:
    return "dataset" if source.startswith(_DATASETS) else "model"
