"""The streaming key variance: definition, independence of batching, merging, precision, bad input."""

import pytest
import torch

from kvutils.errors import DataError, LayerError, ParameterError
from kvutils.keys import KeySelection, KeyVariance


def keys(images=20, shape=(3, 2, 5, 8), seed=0):
    return torch.randn(images, *shape, generator=torch.Generator().manual_seed(seed))


def direct(x):
    x = x.double()
    return (x - x.mean(0)).square().sum(-1).mean(0)


def test_is_the_mean_squared_distance_to_the_mean_key():
    x = keys()
    variance = KeyVariance().update(x)
    torch.testing.assert_close(variance.result, direct(x))
    assert variance.result.shape == (3, 2, 5)
    assert variance.result.dtype == torch.float64
    torch.testing.assert_close(variance.variance(ddof=1), direct(x) * 20 / 19)


def test_does_not_depend_on_the_batch_size():
    x = keys()
    whole = KeyVariance().update(x)
    for size in (1, 3, 7):
        parts = KeyVariance()
        for batch in x.split(size):
            parts.update(batch)
        assert torch.equal(parts.result, whole.result)  # to the last bit


def test_merging_shards_in_any_order_equals_one_stream():
    x = keys()
    a, b, c = (KeyVariance().update(part) for part in x.split([2, 11, 7]))
    merged = KeyVariance().merge(c).merge(KeyVariance()).merge(a).merge(b)
    assert merged.count == 20
    torch.testing.assert_close(merged.result, direct(x))
    torch.testing.assert_close(c.result, direct(x[13:]))  # the merged stream is left as it was


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_large_common_offset_does_not_drown_the_variance(dtype):
    x = (keys(50, (4, 16)) + 100).to(dtype)
    torch.testing.assert_close(KeyVariance().update(x).result, direct(x))


def test_memory_is_that_of_one_mean_key():
    variance = KeyVariance().update(keys(4)).update(keys(9, seed=1))
    assert variance.mean.shape == (3, 2, 5, 8)
    assert variance.sum_squares.shape == (3, 2, 5)


def test_keys_given_stay_as_they_are():
    x = keys()
    before = x.clone()
    KeyVariance().update(x)
    assert torch.equal(x, before)


def test_bad_input_is_one_clear_error():
    with pytest.raises(DataError, match="no key"):
        _ = KeyVariance().result
    with pytest.raises(DataError, match="floating point"):
        KeyVariance().update(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(DataError, match="same token grid"):
        KeyVariance().update(keys()).update(keys(shape=(3, 2, 6, 8)))
    with pytest.raises(DataError, match="merge"):
        KeyVariance().update(keys()).merge(KeyVariance().update(keys(shape=(3, 2, 6, 8))))
    broken = keys()
    broken[3, 0, 0, 0, 0] = torch.inf
    variance = KeyVariance()
    with pytest.raises(DataError, match="NaN or infinite"):
        variance.update(broken)
    assert variance.count == 0
    with pytest.raises(ParameterError, match="more than 1"):
        KeyVariance().update(keys(1)).variance(ddof=1)


# ---- selections ----------------------------------------------------------------------------------


def some(name="some", layers=(3, 7, 9), heads=2, tokens=11, seed=0, share=0.3):
    generator = torch.Generator().manual_seed(seed)
    return KeySelection(name, torch.rand(len(layers), heads, tokens, generator=generator) < share, layers)


def test_a_selection_says_which_keys_of_which_layer():
    chosen = some()
    assert chosen.count.shape == (3, 2) and torch.equal(chosen.count, chosen.mask.sum(-1))
    assert torch.equal(chosen.at(7), chosen.mask[1])
    part = chosen.restrict([9, 3])
    assert part.layers == (9, 3) and torch.equal(part.mask, chosen.mask[[2, 0]])
    assert chosen.restrict([]).layers == () and chosen.restrict([]).count.shape == (0, 2)


def test_the_union_of_selections():
    a, b = some("a", (3, 7)), some("b", (5, 7), seed=1)
    both = a | b
    assert both.layers == (3, 5, 7) and both.name == "a or b"
    assert torch.equal(both.at(3), a.at(3)) and torch.equal(both.at(5), b.at(5))
    assert torch.equal(both.at(7), a.at(7) | b.at(7))
    with pytest.raises(DataError, match="different keys"):
        _ = a | some(tokens=12)


def test_a_selection_that_cannot_be_is_refused():
    mask = torch.ones(2, 2, 5, dtype=torch.bool)
    with pytest.raises(DataError, match="bool of shape"):
        KeySelection("x", mask.float(), (0, 1))
    with pytest.raises(DataError, match="bool of shape"):
        KeySelection("x", mask[0], (0, 1))
    with pytest.raises(DataError, match="2 layers for 3"):
        KeySelection("x", mask, (0, 1, 2))
    for layers in ((1, 1), (-1, 0), (0, "1"), (0, 1.0)):
        with pytest.raises(LayerError, match="different numbers"):
            KeySelection("x", mask, layers)
    with pytest.raises(LayerError, match="nothing about layer 4"):
        some().restrict([4])
