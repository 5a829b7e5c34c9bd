"""Where the text behind an image looks: the attention that the image tokens receive from it.

`attention_mass`: from all text after the image, per key; are some keys attention sinks? `token_attention`: from one word, per layer and
head. `prompt_saliency`: from the last prompt token, per image token (ours): co-segmentation after Amir et al. picks clusters that are
salient; their saliency is the attention of DINO's class token. A language model has none; its last prompt token, from which the answer
starts, is what comes closest."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from PIL import Image
from transformers import DynamicCache

from kvutils.answer import SessionBatch
from kvutils.block import block_keys
from kvutils.errors import DataError, ParameterError, at_least
from kvutils.images import ImageLike, open_image
from kvutils.keys import KeySelection, SameGrid
from kvutils.language import CACHE, EXACT, embed, not_finite
from kvutils.layout import TokenLayout
from kvutils.models import MLM
from kvutils.prompts import TextInputs, prepare_text
from kvutils.vision import VisionInputs, encode_images, over_images, prepare_images

QUESTION = "Describe the image."


@torch.no_grad()
def attention_mass(mlm: MLM, images: Iterable[ImageLike], questions: Sequence[str], prefix: str | None = None,
                   batch_size: int = 8) -> torch.Tensor:  # fmt: skip
    """(L, G, N) float64 on the CPU: the attention weight (0..1) that each image key receives, as a mean. The mean is over images,
    questions, all text tokens after the image (question and what the chat template adds) and the query heads that a key-value
    head serves. Summed over N it is the share of its attention that the text spends on the image. The images need one token grid,
    as in `key_variance`, and may come from a generator. Raises DataError for different token grids and for no images, ImageError,
    ParameterError."""
    if isinstance(questions, str) or not questions:
        raise ParameterError(f"questions must be a list of at least one text, not {questions!r}")
    grid, prompts = SameGrid(), [mlm.prompt(question, prefix) for question in questions]

    def run(batch: Sequence[Image.Image], names: Sequence[str]) -> list[tuple[torch.Tensor, int]]:
        """The sum over these images and all questions, and how many it has of them, as the only element."""
        vision = prepare_images(mlm, batch, names)
        for layout, name in zip(vision.layouts, names, strict=True):
            grid.check(layout, name)
        # One grid and one question: all rows are equally long, and nothing is padded.
        texts = [prepare_text(mlm, [prompt] * len(batch), vision, images_only=False) for prompt in prompts]
        end = int(vision.layouts[0].slots[-1]) + 1
        for question, text in zip(questions, texts, strict=True):
            if not torch.equal(text.input_ids[:, :end], texts[0].input_ids[:, :end]) or text.input_ids.shape[1] == end:
                raise ParameterError(f"the chat template of {mlm.name} does not put the question {question!r} after the image")
        return [(_received(mlm, vision, texts, end), len(batch) * len(questions))]

    if not (found := list(over_images(run, images, batch_size))):
        raise DataError("a mean over images needs images, found none")
    return sum(mass for mass, _ in found) / sum(count for _, count in found)


@torch.no_grad()
def prompt_saliency(mlm: MLM, image: ImageLike, question: str = QUESTION) -> tuple[TokenLayout, torch.Tensor]:
    """(layout, (N,) float32 on the CPU): attention weight of the last token of the prompt `image + question` on every image
    token; mean over all heads and layers, not normalised. Raises ImageError."""
    vision = prepare_images(mlm, [open_image(image)])
    text = prepare_text(mlm, [mlm.prompt(question=question)], vision, images_only=False)
    return vision.layouts[0], _received(mlm, vision, [text], text.input_ids.shape[1] - 1).mean((0, 1)).float()


@torch.no_grad()
def token_attention(session: SessionBatch, ids: Sequence[int], block: KeySelection | None = None) -> torch.Tensor:
    """(L, H, N) float32 on the CPU: attention weight (0..1) of the last of `ids` on every image token of a session's one prompt.
    ids: text after the image, such as `session.tokens.tail(question, 1)` and tokens of the answer. The image is not read again,
    and of the text only the weights of this one token are kept. block: image keys hidden from the text. Raises ParameterError for
    a closed session, ModelError for weights that are not finite."""
    at_least("the number of ids", len(ids))
    mlm, slots = session.mlm, torch.from_numpy(session.slots[0])
    weights = torch.empty(mlm.num_layers, mlm.num_heads, len(slots))

    def record(row: torch.Tensor, module, args, output) -> None:
        row.copy_(output[1][0, :, -1].index_select(-1, slots.to(output[1].device)))

    blocked = contextlib.nullcontext() if block is None else block_keys(mlm, block, session.slots)
    with _weights_shown(mlm, weights, record), blocked:
        session.continued().extend([(0, ids)])
    return _finite(mlm, weights)


@contextlib.contextmanager
def _weights_shown(mlm: MLM, rows: Iterable[torch.Tensor], record: Callable) -> Iterator[None]:
    """Inside, attention returns its weights: record(the layer's row, module, args, output) sees them as output[1] (B, H, queries, keys),
    float32."""
    language_model = mlm.model.model.language_model
    with contextlib.ExitStack() as stack:
        stack.callback(language_model.set_attn_implementation, language_model.config._attn_implementation)
        language_model.set_attn_implementation(EXACT)
        for layer, row in zip(language_model.layers, rows, strict=True):
            stack.callback(layer.self_attn.register_forward_hook(partial(record, row)).remove)
        yield


def _finite(mlm: MLM, weights: torch.Tensor) -> torch.Tensor:
    """(L, ...) weights as they are; ModelError that names the first layer with one that is not finite."""
    if not weights.isfinite().all():
        raise not_finite(mlm, f"attention that is not finite in layer {int((~weights.isfinite()).flatten(1).any(1).nonzero()[0])}, the first of them")
    return weights


def _received(mlm: MLM, vision: VisionInputs, texts: Sequence[TextInputs], end: int) -> torch.Tensor:
    """(L, G, N) the mean weight of the queries from `end` on, on the image tokens, summed over all sequences of the texts. What
    lies before `end`, alike in all texts, is read once with the model's own attention; only the rest runs with attention
    that returns its weights, so no T x T map is ever held."""
    language_model, cache, first = mlm.model.model.language_model, DynamicCache(), texts[0]
    columns = torch.from_numpy(vision.layouts[0].slots)
    mass = torch.zeros(mlm.num_layers, mlm.num_kv_heads, len(columns), dtype=torch.float64)

    def run(embeddings: torch.Tensor, positions: torch.Tensor, past: DynamicCache) -> None:
        language_model(inputs_embeds=embeddings, position_ids=positions, use_cache=True, **{CACHE: past})

    def record(row: torch.Tensor, module, args, output) -> None:
        weights = output[1]  # (B, H, queries, keys)
        row.add_(weights[..., columns.to(weights.device)].double().mean(2).unflatten(1, (len(row), -1)).mean(2).sum(0).cpu())

    run(embed(mlm, first.input_ids[:, :end], encode_images(mlm, vision)[1]), first.position_ids[..., :end], cache)
    with _weights_shown(mlm, mass, record):
        for text in texts:
            run(mlm.model.get_input_embeddings()(text.input_ids[:, end:]), text.position_ids[..., end:], copy.deepcopy(cache))
    return _finite(mlm, mass)
