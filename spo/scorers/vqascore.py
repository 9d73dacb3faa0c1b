"""VQAScore: Lin et al., ECCV 2024, arXiv 2404.01291."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from spo.data.token_lengths import readable
from spo.errors import UserError, first_line
from spo.models.weights import load_network
from spo.scorers import ImageScorer

_QUESTION = 'Does this figure show "{}"? Please answer yes or no.'


class VQAScore(ImageScorer):
    """P("Yes" or "yes") as the first token of a model's answer whether an image shows the prompt.

    `model`: a chat model for images and text of transformers, a Hub id or folder, in the precision of
    its weights. Raises UserError that names --vqa if it cannot be loaded or does not answer.
    """

    title = "VQAScore"

    def __init__(self, device: torch.device, model: str) -> None:
        try:
            self._processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
            network = load_network(AutoModelForImageTextToText, model, "model", dtype="auto")
            self._network = network.requires_grad_(False).eval().to(device)
            tokenizer = self._processor.tokenizer
            tokenizer.padding_side = "left"  # the answer follows the last token
            words = [tokenizer(w, add_special_tokens=False).input_ids for w in ("Yes", "yes")]
            self._yes = sorted({ids[0] for ids in words if len(ids) == 1})
            if not self._yes:
                raise ValueError("its tokenizer has no token for Yes")
            # In a prompt they would not be read as text: <image> asks for a further image.
            self._commands = tuple(tokenizer.get_added_vocab())
            self.score_images([Image.new("RGB", (64, 64))] * 2, ["a fox", "a"])
        except Exception as error:  # which one depends on what the model is
            reason = f"is no chat model for images and text that can be asked ({first_line(error)})"
            raise UserError(f"--vqa: {model!r} {reason}.") from error

    @torch.no_grad()
    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        questions = [
            [{"role": "user", "content": [{"type": "image", "image": image}, self._ask(prompt)]}]
            for image, prompt in zip(images, readable(prompts), strict=True)
        ]
        inputs = self._processor.apply_chat_template(
            questions,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self._network.device, self._network.dtype)
        answer = self._network.generate(
            **inputs,
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        probabilities = answer.logits[0].float().softmax(dim=-1)
        return probabilities[:, self._yes].sum(dim=-1).cpu()

    def _ask(self, prompt: str) -> dict[str, str]:
        for token in self._commands:
            prompt = prompt.replace(token, " ")
        return {"type": "text", "text": _QUESTION.format(prompt)}
