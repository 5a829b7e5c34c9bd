"""`pocket-qwen`: Qwen2.5-VL with its own vision transformer of window attention, merged patches and positions in three dimensions."""

import copy

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

from kvutils.datasets.pocket.world import SIZE
from kvutils.language import attention_by
from kvutils.processors import ImageOnlyQwen2_5_VLProcessor
from recipe.packing import IMAGE, TOKEN, TOKENIZER, ImageTokens
from recipe.shared import LANGUAGE, finished, match_length, patch_windows, text_tower
from recipe.tokenizer import chat_template

PATCH, MERGE, WINDOW = 6, 2, 24  # pixels of a patch; patches of a side of a token; pixels of a side of an attention window
CELLS = SIZE // (PATCH * MERGE)
HEADS, WIDTH = 6, 96
# Its class has as many channels as its query heads together: 14 of 12. The rotary frequencies of a head are dealt out to time, rows and
# columns in turn, the slowest to the columns; with the usual base of 10,000 the 8 columns of a picture would be as good as one.
TEXT = {k: v for k, v in LANGUAGE.items() if k != "head_dim"} | {
    "hidden_size": 168, "intermediate_size": 224, "num_hidden_layers": 8, "num_attention_heads": 14, "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 2, 2]},
}  # fmt: skip


class Pair(nn.Module):
    """Stage 1's vision-language pair, as it would be Siglip's: the tower without its merger, a pooling head, a text tower."""

    def __init__(self, vision: Qwen2_5_VLVisionConfig):
        super().__init__()
        self.vision_model = Qwen2_5_VisionTransformerPretrainedModel(vision)
        self.vision_model.merger = nn.Identity()
        self.norm = nn.LayerNorm(WIDTH)
        self.head = SiglipMultiheadAttentionPoolingHead(SiglipVisionConfig(hidden_size=WIDTH, intermediate_size=256, num_attention_heads=HEADS))
        self.text_model = SiglipTextModel(SiglipTextConfig(**text_tower(projection=WIDTH)))
        self.logit_scale, self.logit_bias = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def get_text_features(self, input_ids: torch.Tensor):
        return self.text_model(input_ids=input_ids)

    def set_attn_implementation(self, name: str) -> None:
        self.text_model.set_attn_implementation(name)


class Qwen:
    """Qwen2.5-VL: 16 x 16 patches of 6 pixels, every second layer sees windows of 4 x 4 patches only; 2 x 2 patches are merged into a
    token by its projector. Pictures keep their own size and shape."""

    coarse = full = ImageTokens(CELLS**2, before=(TOKEN["<|vision_start|>"],), after=(TOKEN["<|vision_end|>"],), grid=(CELLS, CELLS))
    compiled = ("SiglipEncoderLayer", "Qwen2_5_VLDecoderLayer", "Qwen2_5_VLAttention")
    window, knows_places = 6, False  # 48 pixels: whole windows of attention; rotary positions know no place in a picture

    def vision_config(self) -> Qwen2_5_VLVisionConfig:
        return Qwen2_5_VLVisionConfig(
            depth=4, hidden_size=WIDTH, intermediate_size=256, num_heads=HEADS, patch_size=PATCH, spatial_merge_size=MERGE,
            window_size=WINDOW, fullatt_block_indexes=[1, 3], out_hidden_size=TEXT["hidden_size"],
        )  # fmt: skip

    def build_pair(self) -> Pair:
        """The vision-language pair of stage 1."""
        return Pair(self.vision_config())

    def encode_windows(self, pair: Pair, pixels: torch.Tensor, first: torch.Tensor, side: int) -> torch.Tensor:
        """Pooled image embedding (B, C) of windows of `side` x `side` patches of 8 pixels, each a picture of its own."""
        return pair.head(pair.norm(run_tower(pair.vision_model, patch_windows(pixels, first, side)[0])))

    def build_mlm(self) -> Qwen2_5_VLForConditionalGeneration:
        config = Qwen2_5_VLConfig(
            vision_config=self.vision_config().to_dict(), text_config=copy.deepcopy(TEXT), image_token_id=IMAGE, video_token_id=len(TOKEN),
            vision_start_token_id=TOKEN["<|vision_start|>"], vision_end_token_id=TOKEN["<|vision_end|>"], tie_word_embeddings=False,
        )  # fmt: skip
        return finished(Qwen2_5_VLForConditionalGeneration(config))

    def take_tower(self, mlm: nn.Module, pair: Pair) -> None:
        tower = mlm.model.visual
        tower.load_state_dict(tower.state_dict() | pair.vision_model.state_dict())  # the merger is its own

    def features(self, mlm: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 256, hidden) of the tower: what the merger reads, the four patches of a token one after the other."""
        return run_tower(mlm.model.visual, pixels)

    def halve(self, features: torch.Tensor) -> torch.Tensor:
        """As they are: 64 tokens are few, and a token of four means would not be what the merger reads later."""
        return features

    def tokens(self, mlm: nn.Module, features: torch.Tensor) -> torch.Tensor:
        """(n, 64, hidden): the merger's output, equal to the class's own `get_image_features` (asserted by a test)."""
        return mlm.model.visual.merger(features).unflatten(0, (len(features), -1))

    def vision_parameters(self, name: str) -> bool:
        return "visual" in name and "merger" not in name

    def projector_parameters(self, name: str) -> bool:
        return "merger" in name

    def match_words(self, mlm: nn.Module, features: torch.Tensor) -> None:
        """Begin with image tokens as long as words."""
        match_length(mlm, self.tokens(mlm, features), mlm.model.visual.merger.mlp[2])

    def processor(self) -> ImageOnlyQwen2_5_VLProcessor:
        """Pictures at their own size in multiples of a token, of 4 to 256 tokens."""
        image_processor = Qwen2VLImageProcessorPil(
            patch_size=PATCH, merge_size=MERGE, image_mean=[0.5] * 3, image_std=[0.5] * 3,
            size={"shortest_edge": (SIZE // 4) ** 2, "longest_edge": (2 * SIZE) ** 2})  # fmt: skip
        image = "<|vision_start|><image><|vision_end|>"
        return ImageOnlyQwen2_5_VLProcessor(image_processor, TOKENIZER, chat_template=chat_template(image))


def run_tower(tower: Qwen2_5_VisionTransformerPretrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """Features (n, patches, hidden) before the merger, in the processor's order, of pictures (n, 3, H, W) of one size whose sides are
    multiples of a window: as the class's own forward, but all pictures and windows at once."""
    count, _, height, width = pixels.shape
    grid = height // PATCH // MERGE, width // PATCH // MERGE
    patches = pixels.unflatten(3, (grid[1], MERGE, PATCH)).unflatten(2, (grid[0], MERGE, PATCH)).permute(0, 2, 5, 3, 6, 1, 4, 7)
    patches = patches.unsqueeze(6).expand(*patches.shape[:6], tower.config.temporal_patch_size, PATCH, PATCH)
    hidden = tower.patch_embed(patches.flatten(0, 4).flatten(1))
    size = len(hidden) // count
    # Row and column of every patch, and the patches window by window, both counted in the processor's order.
    cells = torch.arange(size // MERGE**2, device=pixels.device).view(grid)
    side = WINDOW // PATCH // MERGE
    windows = cells.unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2).flatten()
    patch = torch.arange(MERGE**2, device=pixels.device)
    order = (windows[:, None] * MERGE**2 + patch).flatten()
    cell, inside = order // MERGE**2, order % MERGE**2
    places = torch.stack((cell // grid[1] * MERGE + inside // MERGE, cell % grid[1] * MERGE + inside % MERGE), dim=1)
    where = tuple(x.repeat(count, 1) for x in tower.rotary_pos_emb(hidden, places))
    hidden = hidden.unflatten(0, (count, size))[:, order].flatten(0, 1)
    everything = torch.tensor([0, len(hidden)])  # one sequence, which `attention_in_chunks` cuts
    with attention_by(tower.config, "chunks"):
        for number, block in enumerate(tower.blocks):
            chunk = size if number in tower.fullatt_block_indexes else (side * MERGE) ** 2
            hidden = block(hidden, cu_seqlens=everything, position_embeddings=where, chunk=chunk)
    return hidden.unflatten(0, (count, size))[:, order.argsort()]


def attention_in_chunks(module, query, key, value, attention_mask, scaling, chunk: int, **_):
    """Full attention within every `chunk` patches. query, key, value (1, H, N, D): (1, N, H, D)."""
    query, key, value = (x[0].unflatten(1, (-1, chunk)).transpose(0, 1) for x in (query, key, value))
    weights = ((query * scaling) @ key.mT).softmax(-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).transpose(1, 2).flatten(0, 1)[None], None


AttentionInterface.register("chunks", attention_in_chunks)
