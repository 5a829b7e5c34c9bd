"""Values of words: what the language model stores for a class name or a referring expression."""

from collections.abc import Iterable, Sequence

import torch

from kvutils.errors import ParameterError, PromptError
from kvutils.inputs import pad, text_positions
from kvutils.models import MLM
from kvutils.prefill import RowCache, resolve_layers, run_layers


@torch.no_grad()
def text_values(
    mlm: MLM, texts: Sequence[str], layers: str | int | Iterable[int] = "all", batch_size: int = 64
) -> torch.Tensor:
    """(len(texts), L, G, D) float32 on the CPU: the values of each text, averaged over its tokens.

    Every text is read on its own, without image or chat template: section 3.1 needs a vector in the space of
    the image values. Special tokens that the tokenizer adds, such as a first token, are not averaged.
    """
    if isinstance(texts, str):
        raise ParameterError("texts must be a list of strings, not a single string")
    layers = resolve_layers(mlm, layers)
    tokenized = []
    for text in texts:
        if not text.strip():
            raise PromptError("a text must hold at least one word; found an empty one")
        if mlm.processor.image_token in text:
            raise PromptError(f"the text {text!r} holds the image token; text values need no image")
        tokenized.append(mlm.tokenizer(text, return_special_tokens_mask=True))
    result = torch.empty(len(tokenized), len(layers), mlm.num_kv_heads, mlm.head_dim)
    for start in range(0, len(tokenized), batch_size):
        batch = tokenized[start : start + batch_size]
        ids, mask = pad(mlm, [torch.tensor(item["input_ids"]) for item in batch])
        special, _ = pad(mlm, [torch.tensor(item["special_tokens_mask"]) for item in batch])
        weight = (mask * (1 - special)).float()
        weight = weight / weight.sum(1, keepdim=True)

        def store(position: int, _: torch.Tensor, values: torch.Tensor, start=start, weight=weight) -> None:
            mean = torch.einsum("bgtd,bt->bgd", values.float(), weight.to(values.device))
            result[start : start + len(mean), position] = mean.cpu()

        embeddings = mlm.model.get_input_embeddings()(ids)
        run_layers(mlm, embeddings, mask, text_positions(mask), RowCache(layers, store))
    return result
