"""How much attention image keys receive from the text behind the image: are some of them attention sinks?

Where the model looks: attention from the last prompt token to the image tokens (ours).

Co-segmentation after Amir et al. picks clusters that are salient; their saliency is the attention of DINO's
class token. A language model has none. Its last prompt token, from which the answer starts, is what comes
closest.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from transformers import DynamicCache

from kvutils.errors import DataError, ParameterError
from kvutils.images import ImageLike, open_image
from kvutils.keys import SameGrid
from kvutils.language import embed, resolve_layers
from kvutils.layout import TokenLayout
from kvutils.models import MLM
from kvutils.prompts import prepare_text
from kvutils.vision import encode_images, over_images, prepare_images


@torch.no_grad()
def attention_mass(
    mlm: MLM,
    images: Iterable[ImageLike],
    questions: Sequence[str],
    layers: str | int | Iterable[int] = "all",
    *,
    prefix: str | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> torch.Tensor:
    """(L, G, N) float64 on the CPU: the attention weight (0..1) that each image key receives, as a mean.

    The mean is over images, questions, all text tokens behind the image (question and what the chat template
    adds) and the query heads that a key-value head serves. Summed over N it is the share of its attention
    that the text spends on the image. Row i belongs to the i-th of the increasing layer numbers.

    The images need one token grid, as in `key_variance`, and may come from a generator; each is read once
    with the model's own attention, and only the text behind it with eager attention, which shows its weights.
    Raises DataError for different token grids and for no images, ImageError, ParameterError.
    """
    if isinstance(questions, str) or not questions:
        raise ParameterError(f"questions must be a list of at least one text, not {questions!r}")
    layers, grid = resolve_layers(mlm, layers), SameGrid()
    language_model = mlm.model.model.language_model
    prompts = [mlm.prompt(question, prefix) for question in questions]

    def run(batch: Sequence[Image.Image], names: Sequence[str]) -> list[tuple[torch.Tensor, int]]:
        """The sum over these images and all questions, and how many it has of them, as the only element."""
        vision = prepare_images(mlm, batch, names)
        for layout, name in zip(vision.layouts, names, strict=True):
            grid.check(layout, name)
        # One grid and one question: all rows are equally long, and nothing is padded.
        texts = [prepare_text(mlm, [prompt] * len(batch), vision, images_only=False) for prompt in prompts]
        slots = vision.layouts[0].slots
        end = int(slots[-1]) + 1
        ids = texts[0].input_ids[:, :end]
        for question, text in zip(questions, texts, strict=True):
            if not torch.equal(text.input_ids[:, :end], ids) or text.input_ids.shape[1] == end:
                raise ParameterError(
                    f"the chat template of {mlm.name} does not put the question {question!r} behind the image"
                )
        cache = DynamicCache()
        language_model(
            inputs_embeds=embed(mlm, ids, encode_images(mlm, vision)[1]),
            position_ids=texts[0].position_ids[..., :end],
            past_key_values=cache,
            use_cache=True,
        )
        mass = torch.zeros(len(layers), mlm.num_kv_heads, len(slots), dtype=torch.float64)
        with _recorded_mass(language_model, layers, slots, mass):
            for text in texts:
                language_model(
                    inputs_embeds=mlm.model.get_input_embeddings()(text.input_ids[:, end:]),
                    position_ids=text.position_ids[..., end:],
                    past_key_values=copy.deepcopy(cache),
                    use_cache=True,
                )
        return [(mass, len(batch) * len(questions))]

    total, seen = None, 0
    for mass, count in over_images(run, images, batch_size, progress):
        total, seen = mass if total is None else total + mass, seen + count
    if total is None:
        raise DataError("a mean over images needs images, found none")
    return total / seen


@contextlib.contextmanager
def _recorded_mass(
    language_model: torch.nn.Module, layers: Sequence[int], slots: np.ndarray, mass: torch.Tensor
) -> Iterator[None]:
    """Adds to mass (L, G, N), for every sequence of a pass, the mean weight of its queries on the slots."""
    columns = torch.from_numpy(slots)

    def recorder(row: torch.Tensor):
        def hook(module, args, output) -> None:
            weights = output[1]  # (B, H, queries, keys)
            received = weights[..., columns.to(weights.device)].double().mean(2)
            row.add_(received.unflatten(1, (len(row), -1)).mean(2).sum(0).cpu())

        return hook

    with eager_attention(language_model), contextlib.ExitStack() as stack:
        for layer, row in zip(layers, mass, strict=True):
            attention = language_model.layers[layer].self_attn
            stack.callback(attention.register_forward_hook(recorder(row)).remove)
        yield


QUESTION = "Describe the image."


@torch.no_grad()
def prompt_saliency(
    mlm: MLM,
    image: ImageLike,
    question: str = QUESTION,
) -> tuple[TokenLayout, torch.Tensor]:
    """(layout, (N,) float32 on the CPU): attention weight of the last prompt token on every image token.

    Mean over all heads and layers, not normalised. The prompt `image + question` is read with the model's own
    attention into the cache; only the last token runs with eager attention, so no T x T map is ever held.
    Raises ImageError.
    """
    vision = prepare_images(mlm, [open_image(image)])
    text = prepare_text(mlm, [mlm.prompt(question=question)], vision, images_only=False)
    _, projector = encode_images(mlm, vision)
    embeddings = embed(mlm, text.input_ids, projector)
    language_model, cache = mlm.model.model.language_model, DynamicCache()
    positions = text.position_ids
    language_model(
        inputs_embeds=embeddings[:, :-1],
        position_ids=positions[..., :-1],
        past_key_values=cache,
        use_cache=True,
    )
    with eager_attention(language_model):
        output = language_model(
            inputs_embeds=embeddings[:, -1:],
            position_ids=positions[..., -1:],
            past_key_values=cache,
            use_cache=True,
            output_attentions=True,
        )
    mean = sum(weights[0, :, -1].float().mean(0).cpu() for weights in output.attentions) / len(
        output.attentions
    )
    layout = vision.layouts[0]
    return layout, mean[torch.from_numpy(layout.slots)]


@contextlib.contextmanager
def eager_attention(language_model: torch.nn.Module) -> Iterator[None]:
    """Eager attention, the only backend that returns its weights, for the time of the block."""
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        language_model.set_attn_implementation(before)
