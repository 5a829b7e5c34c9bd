"""How a training batch runs through a language model of any family: attention of packed sequences, logits and loss of the answers."""

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from kvutils.language import attention_by
from recipe.packing import IMAGE, Packed


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


def answer_logits(mlm: PreTrainedModel, packed: Packed, images: torch.Tensor | None) -> torch.Tensor:
    """Logits (labelled positions, vocabulary) of a packed batch, `images` (n, slots, hidden) scattered into place."""
    embedded = mlm.get_input_embeddings()(packed.tokens)
    if images is not None:
        embedded = embedded.masked_scatter((packed.tokens == IMAGE)[..., None], images.to(embedded.dtype))
    language = mlm.model.language_model
    with attention_by(language.config, "packed"):  # as `language.forward`, but for the last layer's MLP: only what is asked for
        three = language.config.model_type.startswith("qwen2_5_vl")
        where = language.rotary_emb(embedded, packed.positions if three else packed.positions[0])
        masks = packed.shared, packed.own
        for layer in language.layers[:-1]:
            embedded = layer(embedded, attention_mask=masks, position_embeddings=where)
        last = language.layers[-1]
        embedded = embedded + last.self_attn(last.input_layernorm(embedded), position_embeddings=where, attention_mask=masks)[0]
    asked = embedded.flatten(0, 1)[packed.asked]
    asked = asked + last.mlp(last.post_attention_layernorm(asked))
    return mlm.lm_head(language.norm(asked))


def answer_loss(mlm: PreTrainedModel, packed: Packed, images: torch.Tensor | None) -> torch.Tensor:
    """Mean cross-entropy over answer tokens."""
    logits = answer_logits(mlm, packed, images)
    return nn.functional.cross_entropy(logits.float(), packed.labels.flatten()[packed.asked])
