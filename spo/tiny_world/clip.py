"""A small CLIP that knows the world's captions, and a small PickScore that starts from it."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from spo.preference.pair_learner import pair_losses
from spo.scorers.clip import CLIPInputs, text_features
from spo.tiny_world.fitting import Rounds, fit
from spo.tiny_world.preferences import draw_labelled_pairs, split_captions
from spo.tiny_world.scenes import SIDE, all_captions, draw_scenes

TOKENS = 16  # length that prompts are padded to; a caption has ten tokens
TEXT_WIDTH = 64
_FEATURES = 64  # width of the space that text and images share
_LOGIT_SCALE = 3.4  # e^3.4 = 30 at the start of training; OpenAI's CLIP starts at 14, ends at 100
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer(folder: Path) -> None:
    """Saves CLIP's byte-pair tokenizer, its vocabulary being letters and the world's words."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges: list[str] = []
    for word in sorted({word for caption in all_captions() for word in str(caption).split()}):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = f"{parts[0]} {parts[1]}"
            parts = [parts[0] + parts[1], *parts[2:]]
            if pair not in merges:
                merges.append(pair)
                vocabulary.append(parts[0])
    ids = {token: i for i, token in enumerate(dict.fromkeys([*vocabulary, _BOS, _EOS]))}
    vocab, merges_file = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps(ids, ensure_ascii=False))
    merges_file.write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = CLIPTokenizer(vocab=str(vocab), merges=str(merges_file), model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)


def train_clip(folder: Path, rounds: Rounds) -> None:
    """Trains images against texts, contrastively; saves model, tokenizer and image processor.

    The loss is CLIP's (Radford et al., arXiv 2103.00020), except that images with the same caption
    count as equally right.
    """
    make_tokenizer(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder)
    torch.manual_seed(0)
    inputs = CLIPInputs(str(folder))
    clip = CLIPModel(_clip_config(inputs.tokenizer))

    def loss(generator: torch.Generator) -> Tensor:
        prompts, images = draw_scenes(256, generator)
        ids = inputs.tokenize(prompts)
        image = _image_features(clip, inputs.prepare(images))
        logits = clip.logit_scale.exp() * image @ text_features(clip, ids).T
        same = (ids[:, None] == ids[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        by_image = -(target * logits.log_softmax(1)).sum(1).mean()
        by_text = -(target * logits.log_softmax(0)).sum(0).mean()
        return (by_image + by_text) / 2

    fit("CLIP", clip, loss, rounds)
    clip.save_pretrained(folder)


def _clip_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    both = {"num_attention_heads": 4, "hidden_act": "gelu", "projection_dim": _FEATURES}
    text = {"hidden_size": TEXT_WIDTH, "intermediate_size": 2 * TEXT_WIDTH, "num_hidden_layers": 2}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": TOKENS}
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    text |= {name: getattr(tokenizer, name) for name in special}
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3}
    vision |= {"image_size": SIDE, "patch_size": 8}
    return CLIPConfig(
        text_config=both | text,
        vision_config=both | vision,
        projection_dim=_FEATURES,
        logit_scale_init_value=_LOGIT_SCALE,
    )


def train_pickscore(folder: Path, clip_folder: Path, rounds: Rounds) -> None:
    """Trains the CLIP of `clip_folder` on labelled pairs of clean images, and saves it.

    The result is to CLIP what PickScore is (Kirstain et al., arXiv 2305.01569).
    """
    inputs = CLIPInputs(str(clip_folder))
    clip = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32)
    training, _ = split_captions()

    def loss(generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**31, (), generator=generator))
        pairs = draw_labelled_pairs(training, 96, seed)
        ids = inputs.tokenize([str(caption) for caption in pairs.captions])
        image = _image_features(clip, inputs.prepare(pairs.images.flatten(0, 1)))
        text = text_features(clip, ids)
        scores = clip.logit_scale.exp() * (image.unflatten(0, (2, -1)) * text).sum(-1).T
        return pair_losses(scores, pairs.labels).mean()

    fit("PickScore", clip, loss, rounds)
    shutil.copytree(clip_folder, folder)  # tokenizer and image processor
    clip.save_pretrained(folder)


def _image_features(clip: CLIPModel, pixels: Tensor) -> Tensor:
    """Returns unit-norm features (n, D) of normalised pixels (n, 3, S, S)."""
    pooled = clip.vision_model(pixels).pooler_output
    return torch.nn.functional.normalize(clip.visual_projection(pooled), dim=-1)
