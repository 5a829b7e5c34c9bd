"""The pocket models: tiny configurations of the real `transformers` classes, and how a training batch runs through."""

import torch
from torch import nn
from transformers import (
    AttentionInterface,
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


def packed_attention(module, query, key, value, attention_mask, scaling, **_):
    """Attention of packed sequences: what the class's eager one computes under the whole mask, where that is not zero.

    query (B, H, T, D), key and value (B, G, T, D), `attention_mask` the pair `shared`, `own` of `Packed`: (B, T, H, D)."""
    seen, own = attention_mask
    places, (pieces, piece), repeats = seen.shape[-1], own.shape[2:4], query.shape[1] // key.shape[1]
    query = (query * scaling).unflatten(1, (-1, repeats))  # (B, G, H/G, T, D)
    keys, values = key[:, :, :places], value[:, :, :places]

    def with_previous(x):  # (B, G, n, 2 C, D): each piece behind the one before it
        x = x[:, :, places:].unflatten(2, (pieces, piece))
        return torch.cat((nn.functional.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0)), x), dim=3)

    causal = torch.full((places, places), -1e4, device=query.device).triu(1)
    scores = (query[:, :, :, :places].flatten(2, 3) @ keys.mT).unflatten(2, (repeats, places)).float() + causal
    weights = scores.softmax(-1).to(value.dtype)
    first = (weights.flatten(2, 3) @ values).unflatten(2, (repeats, places))

    asking = query[:, :, :, places:].unflatten(3, (pieces, piece)).transpose(2, 3)  # (B, G, n, H/G, C, D)
    shape = (pieces, repeats, piece)
    far = (asking.flatten(2, 4) @ keys.mT).unflatten(2, shape).float() + seen[:, :, None, None]
    near = (asking.flatten(3, 4) @ with_previous(key).mT).unflatten(3, shape[1:]).float() + own[:, :, :, None]
    highest = torch.maximum(far.amax(-1, keepdim=True), near.amax(-1, keepdim=True)).detach()
    far, near = (far - highest).exp(), (near - highest).exp()
    total = far.sum(-1, keepdim=True) + near.sum(-1, keepdim=True)
    far, near = (far / total).to(value.dtype), (near / total).to(value.dtype)
    last = (far.flatten(2, 4) @ values).unflatten(2, shape)
    last = last + (near.flatten(3, 4) @ with_previous(value)).unflatten(3, shape[1:])
    return torch.cat((first, last.transpose(2, 3).flatten(3, 4)), dim=3).flatten(1, 2).transpose(1, 2), None


AttentionInterface.register("packed", packed_attention)


def answer_logits(mlm: LlavaOnevisionForConditionalGeneration, packed: Packed, images: torch.Tensor) -> torch.Tensor:
    """Logits (labelled positions, vocabulary) of a packed batch, `images` (n, slots, hidden) scattered into place."""
    embedded = mlm.get_input_embeddings()(packed.tokens)
    embedded = embedded.masked_scatter((packed.tokens == IMAGE)[..., None], images.to(embedded.dtype))
    language = mlm.model.language_model
    usual, language.config._attn_implementation = language.config._attn_implementation, "packed"
    try:  # as `language.forward`, but for the last layer's MLP: only what is asked for
        where, masks = language.rotary_emb(embedded, packed.positions), (packed.shared, packed.own)
        for layer in language.layers[:-1]:
            embedded = layer(embedded, attention_mask=masks, position_embeddings=where)
        last = language.layers[-1]
        embedded = embedded + last.self_attn(last.input_layernorm(embedded), where, masks)[0]
    finally:
        language.config._attn_implementation = usual
    asked = embedded.flatten(0, 1)[packed.asked]
    asked = asked + last.mlp(last.post_attention_layernorm(asked))
    return mlm.lm_head(language.norm(asked))


def answer_loss(mlm: LlavaOnevisionForConditionalGeneration, packed: Packed, images: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over answer tokens."""
    logits = answer_logits(mlm, packed, images)
    return nn.functional.cross_entropy(logits.float(), packed.labels.flatten()[packed.asked])
