"""The pocket models: tiny configurations of the real `transformers` classes of three families, built as the published ones are."""

import math

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from kvutils.datasets.pocket.world import SIZE
from kvutils.processors import ImageOnlyLlavaNextProcessor, ImageOnlyLlavaOnevisionProcessor
from recipe.packing import IMAGE, PAD, TOKEN, TOKENIZER, ImageTokens
from recipe.pool import GRID, PATCH
from recipe.qwen import Qwen
from recipe.shared import HIDDEN, LANGUAGE, finished, match_length, patch_windows, text_tower
from recipe.tokenizer import BEGIN, build_tokenizer, chat_template


class Llava:
    """What the two LLaVA families share: a tower with a pair of its own class, a two-layer projector, a newline token."""

    def take_tower(self, mlm: nn.Module, pair: nn.Module) -> None:
        mlm.model.vision_tower.load_state_dict(pair.vision_model.state_dict())

    def projector_parameters(self, name: str) -> bool:
        return "projector" in name or "newline" in name

    @torch.no_grad()
    def match_words(self, mlm: nn.Module, features: torch.Tensor) -> None:
        """Begin with image tokens as long as words."""
        match_length(mlm, mlm.model.multi_modal_projector(features), mlm.model.multi_modal_projector.linear_2)
        mlm.model.image_newline *= mlm.get_input_embeddings().weight.norm(dim=-1).mean() / mlm.model.image_newline.norm()


class OneVision(Llava):
    """LLaVA-OneVision: a SigLIP tower, a two-layer projector, Qwen2; several images without tiles, a newline behind each."""

    coarse, full = ImageTokens((GRID // 2) ** 2 + 1), ImageTokens(GRID**2 + 1)
    compiled = ("SiglipEncoderLayer", "Qwen2DecoderLayer", "Qwen2Attention")
    window, knows_places = 7, True  # side of stage 1's windows; they keep the position embeddings of where they were cut

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

    def build_mlm(self, **language) -> LlavaOnevisionForConditionalGeneration:
        """language: other values of the language model's configuration."""
        usual = LANGUAGE | {"num_attention_heads": 14, "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
        text = Qwen2Config(**usual | language)
        config = LlavaOnevisionConfig(
            vision_config=self.vision_config(), text_config=text, image_token_index=IMAGE, video_token_index=len(TOKEN),
            image_grid_pinpoints=[[SIZE, SIZE]], vision_feature_layer=-1, vision_feature_select_strategy="full",
            tie_word_embeddings=False,
        )  # fmt: skip
        return finished(LlavaOnevisionForConditionalGeneration(config))

    def features(self, mlm: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 144, hidden) of the tower: what the projector reads."""
        return mlm.model.vision_tower(pixels, output_hidden_states=True).hidden_states[mlm.config.vision_feature_layer]

    def halve(self, features: torch.Tensor) -> torch.Tensor:
        """Features at half the resolution, (n, 36, hidden): each the mean of 2 x 2 patches."""
        return halved_grid(features, GRID)

    def tokens(self, mlm: nn.Module, features: torch.Tensor) -> torch.Tensor:
        """(n, slots, hidden): projector output and the newline. At full resolution equal to the class's own `get_image_features` in its
        several-images mode (asserted by a test), without its per-image Python work."""
        tokens = mlm.model.multi_modal_projector(features)
        newline = mlm.model.image_newline.to(tokens.dtype).expand(len(tokens), 1, -1)
        return torch.cat((tokens, newline), dim=1)

    def vision_parameters(self, name: str) -> bool:
        """Whether a parameter is the tower's and is used."""
        return "vision_tower" in name and ".head." not in name and "post_layernorm" not in name

    def processor(self) -> ImageOnlyLlavaOnevisionProcessor:
        """Images squashed to squares, mean and standard deviation 0.5 as SigLIP; one token per patch."""
        image_processor = LlavaOnevisionImageProcessorPil(
            size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3, image_grid_pinpoints=[[SIZE, SIZE]])
        return ImageOnlyLlavaOnevisionProcessor(
            image_processor, TOKENIZER, num_image_tokens=GRID**2, vision_feature_select_strategy="full", chat_template=chat_template())


class Next(Llava):
    """LLaVA-NeXT: a CLIP tower for 48 x 48 pixels that reads the halved picture (base view) and its 2 x 2 tiles, a two-layer projector,
    Llama with a first token. The projector reads the last layer but one, without CLS: of five layers four, as of 24 published ones 23."""

    view, cells = SIZE // 2, GRID // 2
    coarse, full = (ImageTokens((GRID // 2) ** 2 + side * (side + 1), begin=(TOKEN[BEGIN],)) for side in (GRID // 2, GRID))
    compiled = ("CLIPEncoderLayer", "LlamaDecoderLayer", "LlamaAttention")
    window, knows_places = GRID // 2, False  # a tile, which is not told where it was cut

    def vision_config(self) -> CLIPVisionConfig:
        return CLIPVisionConfig(
            hidden_size=HIDDEN, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4, image_size=self.view, patch_size=PATCH,
            projection_dim=HIDDEN,
        )  # fmt: skip

    def build_pair(self) -> CLIPModel:
        """The vision-language pair of stage 1, with a bias beside CLIP's scale: the loss is SigLIP's, several captions hold at once. CLIP
        reads a caption at its end token; here that is the first padding."""
        text = CLIPTextConfig(**text_tower() | {"model_type": "clip_text_model", "projection_dim": HIDDEN, "eos_token_id": PAD})
        pair = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=self.vision_config().to_dict(), projection_dim=HIDDEN))
        pair.logit_bias = nn.Parameter(torch.zeros(1))
        return pair

    def encode_windows(self, pair: CLIPModel, pixels: torch.Tensor, first: torch.Tensor, side: int) -> torch.Tensor:
        """Image embedding (B, C) of crops as large as a tile or, for `side` = `GRID`, of the base view."""
        views = halved_pixels(pixels) if side == GRID else patch_windows(pixels, first, side)[0]
        return pair.get_image_features(views).pooler_output

    def build_mlm(self) -> LlavaNextForConditionalGeneration:
        text = LlamaConfig(**LANGUAGE | {"bos_token_id": TOKEN[BEGIN], "num_hidden_layers": 8}, num_attention_heads=8, num_key_value_heads=2,
                           rope_parameters={"rope_type": "default", "rope_theta": 5e5})  # fmt: skip
        config = LlavaNextConfig(
            vision_config=self.vision_config(), text_config=text, image_token_index=IMAGE, image_grid_pinpoints=[[SIZE, SIZE]],
            vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=False,
        )  # fmt: skip
        return finished(LlavaNextForConditionalGeneration(config))

    def features(self, mlm: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 36 + 144, hidden) of the tower: the base view, then the tiles row by row of the whole picture."""
        tower = mlm.model.vision_tower
        tiles = pixels.unflatten(2, (2, self.view)).unflatten(4, (2, self.view)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        views = torch.cat((halved_pixels(pixels)[:, None], tiles), dim=1)
        hidden = tower.pre_layrnorm(tower.embeddings(views.flatten(0, 1)))
        for layer in tower.encoder.layers[: mlm.config.vision_feature_layer + 1]:
            hidden = layer(hidden, None)
        views = hidden[:, 1:].unflatten(0, (-1, 5))
        tiles = views[:, 1:].unflatten(2, (self.cells, self.cells)).unflatten(1, (2, 2)).transpose(2, 3).flatten(1, 4)
        return torch.cat((views[:, 0], tiles), dim=1)

    def halve(self, features: torch.Tensor) -> torch.Tensor:
        """The base view, and the tiles at half their resolution: (n, 36 + 36, hidden)."""
        base, tiles = features.tensor_split((self.cells**2,), dim=1)
        return torch.cat((base, halved_grid(tiles, GRID)), dim=1)

    def tokens(self, mlm: nn.Module, features: torch.Tensor) -> torch.Tensor:
        """(n, slots, hidden): projector output, a newline behind every row of the tiles. At full resolution equal to the class's own
        `get_image_features` (asserted by a test)."""
        base, tiles = mlm.model.multi_modal_projector(features).tensor_split((self.cells**2,), dim=1)
        side = math.isqrt(tiles.shape[1])
        newline = mlm.model.image_newline.to(tiles.dtype).expand(len(tiles), side, 1, -1)
        return torch.cat((base, torch.cat((tiles.unflatten(1, (side, side)), newline), dim=2).flatten(1, 2)), dim=1)

    def vision_parameters(self, name: str) -> bool:
        """Whether a parameter is the tower's and is used."""
        return "vision_tower" in name and "post_layernorm" not in name and f"layers.{self.vision_config().num_hidden_layers - 1}." not in name

    def processor(self) -> ImageOnlyLlavaNextProcessor:
        """Mean and standard deviation 0.5: a tower that is trained from nothing needs none of CLIP's."""
        image_processor = LlavaNextImageProcessorPil(
            size={"shortest_edge": self.view}, crop_size={"height": self.view, "width": self.view}, image_mean=[0.5] * 3,
            image_std=[0.5] * 3, image_grid_pinpoints=[[SIZE, SIZE]])  # fmt: skip
        return ImageOnlyLlavaNextProcessor(
            image_processor, build_tokenizer(BEGIN), patch_size=PATCH, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=chat_template(begin=BEGIN))  # fmt: skip


FAMILIES = {"pocket": OneVision(), "pocket-qwen": Qwen(), "pocket-next": Next()}


def halved_grid(features: torch.Tensor, side: int) -> torch.Tensor:
    """Means of 2 x 2 neighbours of a grid: (n, side², C) -> (n, side² / 4, C)."""
    grid = features.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return nn.functional.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)


# (96, 48) weights by which PIL halves one side: what it makes of a picture with a single bright pixel.
_HALVING = np.array(Image.fromarray(np.eye(SIZE, dtype=np.float32)).resize((SIZE // 2, SIZE), Image.Resampling.BICUBIC))


def halved_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """(n, 3, 96, 96) -> (n, 3, 48, 48), both in [-1, 1]: bit for bit what the processor's resize makes of 8-bit pictures, on any device."""
    with torch.autocast(pixels.device.type, enabled=False):
        weights = torch.from_numpy(_HALVING).to(pixels)
        values = ((pixels + 1) * 127.5).round()
        for picture in (lambda x: x @ weights, lambda x: weights.T @ x):  # columns, then rows; rounded to 8 bits in between
            values = (picture(values) + 0.5).floor().clamp(0, 255)
        return values / 127.5 - 1
