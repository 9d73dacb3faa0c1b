"""The prompt sets that have a name: where each is, in the order to try, and under which licence."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """One place that serves a prompt set: an https address, or a dataset on the Hub."""

    source: str  # https://...[#sha256=...], or user/name[@revision]
    split: str = "train"  # of a dataset
    column: str = "caption"  # column or JSON key that holds the prompt
    files: tuple[str, ...] = ()  # of a Hub repo that `datasets` cannot read: its prompt files


@dataclass(frozen=True)
class NamedPrompts:
    """A prompt set, whose places are tried one after the other."""

    places: tuple[Place, ...]
    license: str  # by the Hub's identifier; empty: see the page of its first place
    about: str


def _on_github(path: str, sha256: str, column: str) -> Place:
    return Place(f"https://raw.githubusercontent.com/{path}#sha256={sha256}", column=column)


_OFFICIAL_4K = "804018fcb30bc9bed28a2a0518855bffd386675a3c5138f96b925071cbae6fc4"
_SPO = "RockeyCoss/SPO/27a86428edcff3b25dcce8001be94a7a01608f58/spo_training_and_inference"
_GRADSPO = "JoshuaTTJ/GradSPO/0bae19f52181a758d7cc75b84b739162ccfe6025"
_LPO = "Kwai-Kolors/LPO/9c2e8b81418cb86cc0a78aa1dc10a5503ce59f4e"
_SDPO = "AIDC-AI/Diffusion-SDPO/84fb241c1b89705a247da8b0d6047798ca49830d/prompts"
_PAPV2 = "531f3ca923035b5f17dbcbc60a7d7dfa476219e59b0e99617bb3f0afabf5663b"
_HPSV2 = "417a2ce00b3307780402c1d27528a0e41ed26651384687bbf3aa06c4c7e559fd"
_PARTI = "b11d46a91c4202461d6d1df69da0b9af5070851403574de6efd6736ccad22291"
_HPDV2_FILES = ("anime", "concept-art", "paintings", "photo")  # 800 prompts each

# Pick-a-Pic v1 with images, and ids of the same rows. yuvalkirstain's answer 404 since April 2025.
PICKAPIC = ("pickapic-anonymous/pickapic_v1", "yuvalkirstain/pickapic_v1")

PROMPT_SETS = {
    "official-4k": NamedPrompts(
        (
            _on_github(f"{_SPO}/assets/prompts/4k_training_prompts.json", _OFFICIAL_4K, "caption"),
            _on_github(
                f"{_GRADSPO}/assets/prompts/4k_training_prompts.json", _OFFICIAL_4K, "caption"
            ),
            _on_github(f"{_LPO}/lpo/prompts/4k_training_prompts.json", _OFFICIAL_4K, "caption"),
        ),
        "mit",
        "4,000 of SPO, GradSPO and LPO",
    ),
    "pickapic-sfw": NamedPrompts(
        (Place("CarperAI/pickapic_v1_no_images_training_sfw"),),
        "",
        "Pick-a-Pic v1, filtered",
    ),
    "pickapic": NamedPrompts(
        tuple(map(Place, PICKAPIC)),
        "",
        "Pick-a-Pic v1",
    ),
    "pickapic_v2": NamedPrompts(
        (
            _on_github(f"{_SDPO}/papv2.json", _PAPV2, "prompt"),
            Place("yuvalkirstain/pickapic_v2", "test_unique"),
        ),
        "apache-2.0",
        "487 test prompts",
    ),
    "hpdv2": NamedPrompts(
        (
            _on_github(f"{_SDPO}/hpsv2.json", _HPSV2, "prompt"),
            Place(
                "zhwang/HPDv2",
                column="prompt",
                files=tuple(f"benchmark/{style}.json" for style in _HPDV2_FILES),
            ),
        ),
        "apache-2.0",
        "3,200 (arXiv 2306.09341)",
    ),
    "partiprompts": NamedPrompts(
        (
            _on_github(f"{_SDPO}/partiprompts.json", _PARTI, "prompt"),
            Place("nateraw/parti-prompts", column="Prompt"),
        ),
        "apache-2.0",
        "1,632 (arXiv 2206.10789)",
    ),
}
