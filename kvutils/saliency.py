"""Where the model looks: attention from the last prompt token to the image tokens (ours).

Co-segmentation after Amir et al. picks clusters that are salient; their saliency is the attention of DINO's
class token. A language model has none. Its last prompt token, from which the answer starts, is what comes
closest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from transformers import DynamicCache

from kvutils.images import ImageLike, open_image
from kvutils.inputs import encode_images, prepare_images, prepare_text
from kvutils.layout import TokenLayout
from kvutils.models import MLM

QUESTION = "Describe the image."


@torch.no_grad()
def prompt_saliency(
    mlm: MLM,
    image: ImageLike,
    question: str = QUESTION,
    base_view_only: bool | None = None,
    max_pixels: int | None = None,
) -> tuple[TokenLayout, torch.Tensor]:
    """(layout, (N,) float32 on the CPU): attention weight of the last prompt token on every image token.

    Mean over all heads and layers, not normalised. The prompt `image + question` is read with the model's own
    attention into the cache; only the last token runs with eager attention, so no T x T map is ever held.
    Raises ImageError.
    """
    vision = prepare_images(mlm, [open_image(image)], base_view_only, max_pixels)
    text = prepare_text(mlm, [mlm.prompt(question=question)], vision, images_only=False)
    _, projector = encode_images(mlm, vision)
    embeddings = mlm.model.get_input_embeddings()(text.input_ids)
    at_image = (text.input_ids == mlm.image_token_id).unsqueeze(-1)
    embeddings = embeddings.masked_scatter(at_image, projector[0].to(embeddings.device, embeddings.dtype))
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
