"""The pocket models of three families: what training computes is what the class, the processor and the chat template compute."""

import numpy as np
import pytest
import torch
from PIL import Image
from recipe.captions import GROUPS, caption_tokens, encoder_batch
from recipe.families import FAMILIES, halved_pixels
from recipe.model import answer_logits
from recipe.packing import IGNORE, encode, pack, paint, pixel_batch, to_pixels
from recipe.pool import GRID, make_pool
from recipe.qwen import run_tower
from recipe.samples import LETTERED, PLAIN, Sample

import kvutils as kv

LOOK = "look for the fish"
COLOUR, COUNT = ("colour", "what colour is the fish ?", "red"), ("count", "how many things are there ?", "one")
CAPTION = ("caption", "describe the image .", "a red fish and a blue car")
SAMPLES = {
    "one image": Sample([(0, PLAIN)], [COLOUR, CAPTION, COUNT], LOOK),
    "several images": Sample([(1, PLAIN), (2, PLAIN), (3, PLAIN)], [COLOUR, COUNT]),
    "question first": Sample([(4, PLAIN)], [COLOUR], LOOK, question_first=True),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def pool():
    return make_pool(40, seed=9, processes=1, quiet=True)


@pytest.fixture(scope="module")
def models(pool):
    """name -> (family, model, processor), its projector started as stage 3 does."""
    made = {}

    def of(name):
        if name not in made:
            torch.manual_seed(0)
            family = FAMILIES[name]
            mlm = family.build_mlm().eval()
            with torch.no_grad():
                family.match_words(mlm, family.features(mlm, pixel_batch(pool, [(row, PLAIN) for row in range(8)])))
            made[name] = family, mlm, family.processor()
        return made[name]

    return of


def pictures_of(pool, images):
    return [Image.fromarray(picture) for picture in paint(pool, images)]


def processed(name, processor, pictures, text):
    """The processor's inputs; of `pocket` those of its several-images mode, which has no tiles, for a single image too."""
    if name != "pocket":
        return processor(images=pictures, text=[text], return_tensors="pt", add_special_tokens=False)
    batch = processor.image_processor(images=pictures, return_tensors="pt")
    ids = processor.tokenizer(text.replace("<image>", "<image>" * 145), return_tensors="pt").input_ids
    return {"input_ids": ids, "pixel_values": batch["pixel_values"][:, :1], "image_sizes": batch["image_sizes"],
            "batch_num_images": torch.tensor([max(2, len(pictures))])}  # fmt: skip


def prompt_of(processor, sample, question):
    """By the processor's chat template."""
    said = [{"type": "text", "text": sample.prefix}] * bool(sample.prefix)
    content = [*said, *[{"type": "image"}] * len(sample.images)]
    content.insert(len(said) if sample.question_first else len(content), {"type": "text", "text": question})
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)


@every_family
def test_a_packed_block_is_the_prompt_that_the_class_meets_at_inference(name, models, pool):
    """Logits of every block of a packed batch equal those of its prompt alone, through chat template, processor and own forward."""
    family, mlm, processor = models(name)
    samples = list(SAMPLES.values())
    packed = pack(samples, family.full)
    with torch.no_grad():
        found = answer_logits(mlm, packed, family.tokens(mlm, family.features(mlm, pixel_batch(pool, packed.images))))
        start, others = 0, []
        for sample in samples:
            for _, question, answer in sample.blocks:
                text = prompt_of(processor, sample, question) + answer
                rows = slice(-len(encode(answer)) - 1, None)
                wanted = mlm(**processed(name, processor, pictures_of(pool, sample.images), text)).logits[0, rows]
                assert torch.allclose(found[start : start + len(wanted)], wanted, atol=1e-4)
                other = pictures_of(pool, [(row + 10, PLAIN) for row, _ in sample.images])
                others.append((mlm(**processed(name, processor, other, text)).logits[0, rows] - wanted).abs().max())
                start += len(wanted)
    assert start == len(found) == (packed.labels != IGNORE).sum()
    assert min(others) > 1e-3  # the pictures matter by far more than the tolerance


@every_family
def test_tokens_are_the_image_features_of_the_class(name, models, pool):
    family, mlm, processor = models(name)
    images = [(0, PLAIN), (int(np.flatnonzero(pool.portrait)[0]), LETTERED)]
    inputs = processed(name, processor, pictures_of(pool, images), "<image> <image>")
    inputs = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
    with torch.no_grad():
        features = family.features(mlm, pixel_batch(pool, images))
        found = family.tokens(mlm, features)
        wanted = mlm.model.get_image_features(**inputs).pooler_output
        assert found.shape[1] == family.full.slots and family.tokens(mlm, family.halve(features)).shape[1] == family.coarse.slots
    assert torch.allclose(found, torch.stack(list(wanted)), atol=1e-5)
    words = mlm.get_input_embeddings().weight.norm(dim=-1).mean()
    assert 0.8 < found.norm(dim=-1).mean() / words < 1.25


@every_family
def test_a_saved_model_is_loaded_captured_and_prompted(name, models, pool, tmp_path):
    family, mlm, processor = models(name)
    mlm.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = kv.load_mlm(str(tmp_path), device="cpu")
    assert loaded.max_pixels == (192**2 if name == "pocket-qwen" else None)  # its own bound, lower than kvutils'
    captured = kv.capture(loaded, pictures_of(pool, [(0, PLAIN)]))[0]
    layout = captured.layout
    assert layout.grids == {"pocket": {"base": (12, 12)}, "pocket-qwen": {"base": (8, 8)}, "pocket-next": {"base": (6, 6), "tiles": (12, 12)}}[name]
    assert len(layout) == family.full.slots and layout.is_newline.sum() == {"pocket": 1, "pocket-qwen": 0, "pocket-next": 12}[name]
    packed = pack([Sample([(0, PLAIN)], [COLOUR])], family.full)
    assert np.array_equal(layout.slots, (packed.tokens[0] == loaded.image_token_id).nonzero()[:, 0].numpy())
    image = {"pocket-qwen": "<|vision_start|><image><|vision_end|>"}.get(name, "<image>")
    head = ("<|begin|>" if name == "pocket-next" else "") + "<|system|>you are a helpful assistant .<|end|><|user|>"
    tail = "<|end|><|assistant|>"
    assert loaded.prompt("what is it ?") == f"{head}{image} what is it ?{tail}"
    assert loaded.prompt(prefix=LOOK) == f"{head}{LOOK} {image}{tail}"
    assert loaded.prompt("what is it ?", LOOK, images=2) == f"{head}{LOOK} first {image} second {image} what is it ?{tail}"


@every_family
def test_weights_are_at_most_6_mb_and_heads_in_the_published_ratio(name, models):
    _, mlm, _ = models(name)
    text = mlm.config.get_text_config()
    assert sum(p.numel() for p in mlm.parameters()) * 2 <= 6e6  # in float16
    assert text.num_attention_heads // text.num_key_value_heads == {"pocket": 7, "pocket-qwen": 7, "pocket-next": 4}[name]
    assert text.num_hidden_layers == {"pocket": 12, "pocket-qwen": 8, "pocket-next": 8}[name]


@every_family
def test_the_tower_of_stage_1_becomes_the_models(name, models, pool):
    family, _, _ = models(name)
    torch.manual_seed(1)
    pair, mlm = family.build_pair().eval(), family.build_mlm().eval()
    before = [p.clone() for _, p in mlm.named_parameters()]
    family.take_tower(mlm, pair)
    changed = {k for (k, p), b in zip(mlm.named_parameters(), before, strict=True) if not torch.equal(p, b)}
    trained = {k for k, p in mlm.named_parameters() if family.vision_parameters(k) and p.ndim > 1}
    assert trained <= changed and not [k for k in changed if "language_model" in k or family.projector_parameters(k)]
    pixels = pixel_batch(pool, [(row, PLAIN) for row in range(2)])
    captions = pair.get_text_features(input_ids=caption_tokens()).pooler_output
    for side in (family.window, GRID):
        pooled = family.encode_windows(pair, pixels, torch.zeros(2, 2, dtype=torch.long), side)
        assert pooled.shape == (2, captions.shape[1])
    assert torch.pdist(captions).min() > 1e-6  # all are told apart: read at their end, not at a first token that many share


def test_windows_of_stage_1_are_pictures_that_the_class_reads_alike(models, pool):
    torch.manual_seed(0)
    pictures = pictures_of(pool, [(0, PLAIN), (1, PLAIN)])
    pixels = pixel_batch(pool, [(0, PLAIN), (1, PLAIN)])
    family, mlm, processor = models("pocket-qwen")
    crops = [picture.crop((24, 8, 72, 56)) for picture in pictures]
    batch = processor.image_processor(images=crops, return_tensors="pt")
    assert batch["image_grid_thw"].tolist() == [[1, 8, 8]] * 2
    with torch.no_grad():
        wanted = mlm.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output
        found = family.tokens(mlm, run_tower(mlm.model.visual, pixels[:, :, 8:56, 24:72]))
    assert torch.allclose(found.flatten(0, 1), wanted, atol=1e-5)
    next_family, _, next_processor = models("pocket-next")
    pair = next_family.build_pair().eval()
    views = next_processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    first = torch.tensor([[6, 0], [6, 6]])  # two tiles
    for side, wanted in ((GRID, views[:, 0]), (6, views[torch.arange(2), [3, 4]])):
        with torch.no_grad():
            found = next_family.encode_windows(pair, pixels, first, side)
            assert torch.allclose(found, pair.get_image_features(wanted).pooler_output, atol=1e-5)


def test_halved_pictures_are_the_processors_to_the_last_bit(models):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (8, 96, 96, 3), dtype=np.uint8)
    pictures[4:] = pictures[4:] // 128 * 255  # black and white: overshoots, and sums that end in a half
    views = models("pocket-next")[2].image_processor(images=list(pictures), return_tensors="pt")["pixel_values"]
    assert torch.allclose(halved_pixels(to_pixels(pictures)), views[:, 0], atol=1e-6)


def test_captions_of_places_count_where_a_tower_can_know_them(pool):
    rows = np.arange(6)
    for side, places, wanted in ((GRID, False, True), (7, True, True), (6, False, False)):
        weights = encoder_batch(pool, rows, np.random.default_rng(0), side, places)[4]
        assert bool(weights[:, GROUPS["place"]].any()) is wanted and weights[:, GROUPS["class"]].any()


def test_a_picture_of_another_size_keeps_it_in_qwen(models):
    _, _, processor = models("pocket-qwen")
    sizes = {(96, 96): (16, 16), (120, 60): (10, 20), (31, 29): (4, 6)}
    batch = processor.image_processor(images=[Image.new("RGB", size) for size in sizes], return_tensors="pt")
    assert [tuple(grid) for grid in batch["image_grid_thw"][:, 1:].tolist()] == list(sizes.values())
