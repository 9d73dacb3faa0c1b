"""Counts the tokens of prompts, and tells how many prompts the models cut."""

import logging
import math
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from spo.errors import shortened

# 77 tokens are seldom more than 500 characters; to tokenize 100,000 takes seconds.
_READ = 4_000
_SAMPLED = 2_000_000  # characters of all prompts that are tokenized: a few seconds' work
# Messages of the libraries about a prompt that is cut, at every call; `describe_lengths` tells once.
_WARNINGS = {
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion": "input was truncated",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl": "input was truncated",
    "transformers.tokenization_utils_base": "sequence length is longer",
    "transformers.tokenization_utils_tokenizers": "Ignoring clean_up_tokenization_spaces",
}
for _name, _text in _WARNINGS.items():
    logging.getLogger(_name).addFilter(lambda record, text=_text: text not in record.getMessage())


def readable(prompts: Sequence[str]) -> list[str]:
    """Returns the prompts, very long ones cut to far more than any text encoder reads.

    In a prompt that is cut, a run of blanks becomes one blank, as in tokenizers.
    """
    return [p if len(p) <= _READ else " ".join(p.split())[:_READ] for p in prompts]


def describe_lengths(
    prompts: Sequence[str], tokenizers: Mapping[str, PreTrainedTokenizerBase]
) -> str:
    """Returns lines for the log: the number of prompts that are cut, and the longest of them.

    `tokenizers` are keyed by the model that reads their tokens; one that cuts as an earlier one does
    adds no line. Of very many prompts only every n-th is counted.
    """
    every = max(1, math.ceil(sum(map(len, prompts)) / _SAMPLED))
    sample = prompts[::every]
    texts = f"{len(sample):,} prompts" + (f" (every {every}th)" if every > 1 else "")
    lines: dict[tuple[int, ...], str] = {}
    for reader, tokenizer in tokenizers.items():
        # verbose=False: no warnings of long prompts, which are counted here.
        tokens = tokenizer(list(sample), verbose=False).input_ids
        counts, limit = [len(ids) for ids in tokens], tokenizer.model_max_length
        most, too_long = max(counts), sum(count > limit for count in counts)
        longest = counts.index(most)
        line = (
            f"{too_long:,} of {texts} are longer than {limit} tokens and are cut by the {reader}: "
            f"the longest, {shortened(sample[longest])!r}, has {most:,}"
        )
        if not too_long:
            line = f"none of {texts} is longer than the {limit} tokens of the {reader}"
        lines.setdefault((limit, too_long, most, longest), line)
    return "\n".join(lines.values())
