"""Prompts as text: how much of them the models read, and how messages name them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

# 77 tokens are seldom more than 500 characters; to tokenize 100,000 takes seconds.
_READ = 4_000
_LOOKED_AT = 2_000_000  # characters of all prompts, a few seconds' work
_NAMED = 4  # prompts that an error names
# What the libraries say of a prompt that is cut, at every call; `describe_lengths` says it once.
_WARNINGS = {
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion": "input was truncated",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl": "input was truncated",
    "transformers.tokenization_utils_base": "sequence length is longer",
    "transformers.tokenization_utils_tokenizers": "Ignoring clean_up_tokenization_spaces",
}
for _name, _text in _WARNINGS.items():
    logging.getLogger(_name).addFilter(lambda record, text=_text: text not in record.getMessage())


def readable(prompts: Sequence[str]) -> list[str]:
    """What there is to tokenize of each prompt: of a very long one, more than any text encoder reads.

    In that, blanks beside each other become one, as tokenizers take them.
    """
    return [p if len(p) <= _READ else " ".join(p.split())[:_READ] for p in prompts]


def named(prompts: Sequence[str]) -> str:
    """A list of prompts for one line of an error: the first ones, shortened."""
    more = [f"and {len(prompts) - _NAMED} more"] if len(prompts) > _NAMED else []
    return ", ".join([*(repr(_short(prompt)) for prompt in prompts[:_NAMED]), *more])


@dataclass(frozen=True)
class _Lengths:
    """Prompts as a tokenizer sees them; its start and end tokens count."""

    limit: int  # tokens that it keeps
    too_long: int  # prompts that have more
    longest: str
    most: int  # tokens of the longest


def describe_lengths(
    prompts: Sequence[str], tokenizers: Mapping[str, PreTrainedTokenizerBase]
) -> str:
    """How many prompts are cut, and the longest of them: a line for the log.

    `tokenizers` by the name of what reads their tokens; one that cuts otherwise than those before it
    has a line of its own. Of many prompts, every so many are looked at.
    """
    every = max(1, math.ceil(sum(map(len, prompts)) / _LOOKED_AT))
    looked_at = prompts[::every]
    reader_of: dict[_Lengths, str] = {}
    for reader, tokenizer in tokenizers.items():
        reader_of.setdefault(_measure(looked_at, tokenizer), reader)
    prompts_are = f"{len(looked_at):,} prompts" + (f" (every {every}th)" if every > 1 else "")
    return "\n".join(_line(lengths, prompts_are, reader_of[lengths]) for lengths in reader_of)


def _line(lengths: _Lengths, prompts_are: str, reader: str) -> str:
    if not lengths.too_long:
        return f"none of {prompts_are} is longer than the {lengths.limit} tokens of the {reader}"
    return (
        f"{lengths.too_long:,} of {prompts_are} are longer than {lengths.limit} tokens and are cut "
        f"by the {reader}: the longest, {_short(lengths.longest)!r}, has {lengths.most:,}"
    )


def _measure(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> _Lengths:
    counts = list(_token_counts(prompts, tokenizer))
    most, limit = max(counts), tokenizer.model_max_length
    too_long = sum(count > limit for count in counts)
    return _Lengths(limit, too_long, prompts[counts.index(most)], most)


def _token_counts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    for start in range(0, len(prompts), 1000):
        batch = list(prompts[start : start + 1000])
        # verbose: it would warn of prompts that are too long, which is what is being found out.
        yield from map(len, tokenizer(batch, verbose=False).input_ids)


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 80 else f"{prompt[:79]}…"
