"""The pocket models: tiny configurations of the real `transformers` classes of three families, built as the published ones are."""

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
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from kvutils.datasets.pocket.world import SIZE
from kvutils.processors import ImageOnlyLlavaOnevisionProcessor
from recipe.captions import LONGEST
from recipe.packing import EOS, IMAGE, PAD, TOKEN, TOKENIZER, ImageTokens
from recipe.pool import GRID, PATCH
from recipe.tokenizer import chat_template

HIDDEN = 128
LANGUAGE = {  # of every family's language model; query and key-value heads are in the ratio of the published ones
    "vocab_size": len(TOKEN), "hidden_size": HIDDEN, "intermediate_size": 256, "num_hidden_layers": 12, "head_dim": 16,
    "max_position_embeddings": 1024, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS, "tie_word_embeddings": False,
    "initializer_range": 0.04,
}  # fmt: skip


def text_tower() -> dict:
    """Of the captions, in a contrastive pair."""
    return SiglipTextConfig(
        vocab_size=len(TOKEN), hidden_size=HIDDEN, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LONGEST, projection_size=HIDDEN, pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS,
    ).to_dict()  # fmt: skip


class OneVision:
    """LLaVA-OneVision: a SigLIP tower, a two-layer projector, Qwen2; several images without tiles, a newline behind each."""

    folder, encoder_folder = "llava-onevision", "siglip"
    coarse, full = ImageTokens((GRID // 2) ** 2 + 1), ImageTokens(GRID**2 + 1)
    compiled = ("SiglipEncoderLayer", "Qwen2DecoderLayer", "Qwen2Attention")

    def vision_config(self) -> SiglipVisionConfig:
        return SiglipVisionConfig(
            hidden_size=HIDDEN, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=SIZE, patch_size=PATCH,
        )  # fmt: skip

    def build_pair(self) -> SiglipModel:
        """The vision-language pair of stage 1."""
        return SiglipModel(SiglipConfig(text_config=text_tower(), vision_config=self.vision_config().to_dict()))

    def encode_windows(self, pair: SiglipModel, pixels: torch.Tensor, first: torch.Tensor, side: int) -> torch.Tensor:
        """Pooled image embedding (B, C) of windows of `side` x `side` patches, with the position embeddings of where they were cut.

        `pixels` (B, 3, 96, 96); `first` (B, 2) row and column of the first patch."""
        window, ids = patch_windows(pixels, first, side)
        vision = pair.vision_model
        hidden = vision.embeddings.patch_embedding(window).flatten(2).transpose(1, 2)
        hidden = hidden + vision.embeddings.position_embedding(ids)
        hidden = vision.encoder(inputs_embeds=hidden).last_hidden_state
        return vision.head(vision.post_layernorm(hidden))

    def build_mlm(self) -> LlavaOnevisionForConditionalGeneration:
        text = Qwen2Config(**LANGUAGE, num_attention_heads=14, num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
        config = LlavaOnevisionConfig(
            vision_config=self.vision_config(), text_config=text, image_token_index=IMAGE, video_token_index=len(TOKEN),
            image_grid_pinpoints=[[SIZE, SIZE]], vision_feature_layer=-1, vision_feature_select_strategy="full",
            tie_word_embeddings=False,
        )  # fmt: skip
        return finished(LlavaOnevisionForConditionalGeneration(config))

    def take_tower(self, mlm: nn.Module, pair: SiglipModel) -> None:
        mlm.model.vision_tower.load_state_dict(pair.vision_model.state_dict())

    def features(self, mlm: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 144, hidden) of the tower: what the projector reads."""
        return mlm.model.vision_tower(pixels, output_hidden_states=True).hidden_states[mlm.config.vision_feature_layer]

    def halve(self, features: torch.Tensor) -> torch.Tensor:
        """Features at half the resolution, (n, 36, hidden): each the mean of 2 x 2 patches."""
        grid = features.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)
        return nn.functional.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)

    def tokens(self, mlm: nn.Module, features: torch.Tensor) -> torch.Tensor:
        """(n, slots, hidden): projector output and the newline. At full resolution equal to the class's own `get_image_features` in its
        several-images mode (asserted by a test), without its per-image Python work."""
        tokens = mlm.model.multi_modal_projector(features)
        newline = mlm.model.image_newline.to(tokens.dtype).expand(len(tokens), 1, -1)
        return torch.cat((tokens, newline), dim=1)

    def vision_parameters(self, name: str) -> bool:
        """Whether a parameter is the tower's and is used."""
        return "vision_tower" in name and ".head." not in name and "post_layernorm" not in name

    def projector_parameters(self, name: str) -> bool:
        return "projector" in name or "newline" in name

    @torch.no_grad()
    def match_words(self, mlm: nn.Module, features: torch.Tensor) -> None:
        """Begin with image tokens as long as words: the first layer replaces a token by what it computes from it, and tokens many
        times longer stay in all that later layers read."""
        wanted = mlm.get_input_embeddings().weight.norm(dim=-1).mean()
        last = mlm.model.multi_modal_projector.linear_2
        factor = wanted / mlm.model.multi_modal_projector(features).norm(dim=-1).mean()
        last.weight *= factor
        last.bias *= factor
        mlm.model.image_newline *= wanted / mlm.model.image_newline.norm()

    def processor(self) -> ImageOnlyLlavaOnevisionProcessor:
        """Images squashed to squares, mean and standard deviation 0.5 as SigLIP; one token per patch."""
        image_processor = LlavaOnevisionImageProcessorPil(
            size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3, image_grid_pinpoints=[[SIZE, SIZE]])
        return ImageOnlyLlavaOnevisionProcessor(
            image_processor, TOKENIZER, num_image_tokens=GRID**2, vision_feature_select_strategy="full", chat_template=chat_template())


FAMILIES = {"pocket": OneVision()}


def finished(mlm: nn.Module) -> nn.Module:
    mlm.generation_config.eos_token_id = EOS
    mlm.generation_config.pad_token_id = PAD
    return mlm


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
