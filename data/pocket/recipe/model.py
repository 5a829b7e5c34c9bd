"""The pocket models: tiny configurations of the real `transformers` classes, and how a training batch runs through."""

import torch
from torch import nn
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from kvutils.datasets.pocket.world import SIZE
from recipe.packing import EOS, IMAGE, PAD, TOKEN, Packed
from recipe.pool import GRID, PATCH

IMAGE_SLOTS = GRID * GRID + 1  # one token per patch and one newline, as the class packs several images
HIDDEN = 128


def vision_config() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=HIDDEN, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        image_size=SIZE, patch_size=PATCH,
    )  # fmt: skip


def build_siglip() -> SiglipModel:
    text = SiglipTextConfig(
        vocab_size=len(TOKEN), hidden_size=HIDDEN, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=8, projection_size=HIDDEN, pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS,
    )  # fmt: skip
    return SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision_config().to_dict()))


def build_mlm() -> LlavaOnevisionForConditionalGeneration:
    text = Qwen2Config(
        vocab_size=len(TOKEN), hidden_size=HIDDEN, intermediate_size=384, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS, tie_word_embeddings=False, initializer_range=0.04,
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        vision_config=vision_config(), text_config=text, image_token_index=IMAGE, video_token_index=len(TOKEN),
        image_grid_pinpoints=[[SIZE, SIZE]], vision_feature_layer=-1, vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaOnevisionForConditionalGeneration(config)
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    return model


def patch_windows(pixels: torch.Tensor, first: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of `side` x `side` patches at their native scale, and the ids of their positions in the full grid.

    `pixels` (B, 3, 96, 96); `first` (B, 2) row and column of the first patch: (B, 3, 8 side, 8 side), (B, side²)."""
    steps = torch.arange(side * PATCH)
    rows = first[:, 0, None] * PATCH + steps
    columns = first[:, 1, None] * PATCH + steps
    window = pixels[torch.arange(len(pixels))[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    cell = torch.arange(side)
    ids = (first[:, 0, None, None] + cell[:, None]) * GRID + first[:, 1, None, None] + cell
    return window.permute(0, 3, 1, 2), ids.flatten(1)


def encode_windows(siglip: SiglipModel, window: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Pooled image embedding (B, C) of patch windows, with the position embeddings of where they were cut."""
    vision = siglip.vision_model
    embeddings = vision.embeddings
    hidden = embeddings.patch_embedding(window).flatten(2).transpose(1, 2)
    hidden = hidden + embeddings.position_embedding(position_ids)
    hidden = vision.encoder(inputs_embeds=hidden).last_hidden_state
    return vision.head(vision.post_layernorm(hidden))


def image_embeddings(mlm: LlavaOnevisionForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """(n images, 145, hidden): projector output and the newline, equal to the class's own `get_image_features` in its
    several-images mode (asserted by a test), without its per-image Python work."""
    tower = mlm.model.vision_tower
    hidden = tower(pixels, output_hidden_states=True).hidden_states[mlm.config.vision_feature_layer]
    return with_newline(mlm, mlm.model.multi_modal_projector(hidden))


def with_newline(mlm: LlavaOnevisionForConditionalGeneration, tokens: torch.Tensor) -> torch.Tensor:
    newline = mlm.model.image_newline.to(tokens.dtype).expand(len(tokens), 1, -1)
    return torch.cat((tokens, newline), dim=1)


def answer_logits(mlm: LlavaOnevisionForConditionalGeneration, packed: Packed, images: torch.Tensor) -> torch.Tensor:
    """Logits (labelled positions, vocabulary) of a packed batch, `images` (n, slots, hidden) scattered into place."""
    embedded = mlm.get_input_embeddings()(packed.tokens)
    embedded = embedded.masked_scatter((packed.tokens == IMAGE)[..., None], images.to(embedded.dtype))
    mask = packed.mask
    if mlm.config.text_config._attn_implementation == "eager":
        mask = torch.zeros(mask.shape, dtype=embedded.dtype, device=mask.device).masked_fill(~mask, -1e4)
    hidden = mlm.model.language_model(
        inputs_embeds=embedded, attention_mask=mask, position_ids=packed.positions, use_cache=False
    ).last_hidden_state
    return mlm.lm_head(hidden[packed.labels >= 0])


def answer_loss(mlm: LlavaOnevisionForConditionalGeneration, packed: Packed, images: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over answer tokens."""
    logits = answer_logits(mlm, packed, images)
    return nn.functional.cross_entropy(logits.float(), packed.labels[packed.labels >= 0])
