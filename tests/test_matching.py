"""Nearest neighbours, label propagation and co-segmentation on features whose answer is known."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.preprocessing import normalize

from kvutils.readout import clusters as cosegmentation
from kvutils.readout import matching

GRID = (6, 8)


def random_tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moving_square(frames=5, scale=10):
    """Masks (T, 60, 80) and features of a 2 x 2-cell square that moves one cell right per frame."""
    masks = np.zeros((frames, GRID[0] * scale, GRID[1] * scale), np.uint8)
    background, square = random_tokens(*GRID, 32), random_tokens(2, 2, 32, seed=1)
    features = []
    for t in range(frames):
        masks[t, 2 * scale : 4 * scale, (1 + t) * scale : (3 + t) * scale] = 1
        frame = background.clone()
        frame[2:4, 1 + t : 3 + t] = square
        features.append(frame.flatten(0, 1))
    return masks, torch.stack(features)


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_match_nearest_finds_permuted_tokens_for_a_stack_of_sources():
    target = random_tokens(3, 20, 16)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    for source, other in ((5 * target[:, order], target), (target[:, order].half(), target.half())):
        assert torch.equal(matching.match_nearest(source, other), order.expand(3, 20))


def test_soft_argmax_is_between_the_match_and_the_mean():
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 100.0]])
    similarity = torch.tensor([[0.9, 0.7, 0.9 - 1e-4]])
    for temperature, expected in ((1e-6, centers[:1]), (1e6, centers.mean(0, keepdim=True))):
        torch.testing.assert_close(matching.soft_argmax(similarity, centers, temperature, radius=1e3), expected)
    local = matching.soft_argmax(similarity, centers, 0.1, radius=20)
    assert local[0, 1] == 0 and 0 < local[0, 0] < 5  # the distant equal is not mixed in


def test_propagation_follows_a_moving_object():
    masks, features = moving_square()
    (result,), (copied,) = matching.propagate_labels(masks[0], features[None], GRID)
    assert result.dtype == torch.uint8 and np.array_equal(result[0], masks[0])
    masks = torch.from_numpy(masks)
    for found, t in ((result, 1), (result, 4), (copied, 4)):
        assert iou(found[t] == 1, masks[t] == 1) > 0.7
    assert iou(torch.from_numpy(matching.copy_first_mask(masks[0].numpy(), len(masks))[4]) == 1, masks[4] == 1) == 0


@pytest.mark.parametrize("chunk", [2**29, 1])
def test_a_stack_of_sources_equals_one_at_a_time(monkeypatch, chunk):
    monkeypatch.setattr(matching, "CHUNK_BYTES", chunk)
    masks, features = moving_square(4)
    stack = torch.stack([features, random_tokens(*features.shape, seed=3), features.flip(-1)])
    alone = [matching.propagate_labels(masks[0], source[None], GRID) for source in stack]
    for together, *each in zip(matching.propagate_labels(masks[0], stack, GRID), *alone, strict=True):
        assert np.array_equal(together, np.concatenate(each))


def test_the_neighbourhood_is_a_square_window():
    near = matching.restrict_neighborhood(4, 5, 1)
    assert near[0].reshape(4, 5).nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]] and near[7].sum() == 9
    masks, features = moving_square(2)
    far = features[1].reshape(*GRID, -1).roll(4, dims=1).flatten(0, 1)  # everything jumps beyond the window
    clip = torch.stack([features[0], far])[None]
    (free,), (bound,) = (matching.propagate_labels(masks[0], clip, GRID, radius=radius)[0] for radius in (8, 1))
    there = torch.from_numpy(np.roll(masks[1], 40, axis=1)) == 1
    assert iou(free[1] == 1, there) > 0.7 and iou(bound[1] == 1, there) < 0.3


def test_topk_is_over_all_context_frames_and_keeps_ties():
    target = torch.tensor([[1.0, 0.0]])
    context = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])  # three frames of one cell
    labels = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]])
    tied = matching.propagate_step(target @ context.flatten(0, 1).T, labels, torch.ones(1, 1, dtype=torch.bool), topk=1)
    torch.testing.assert_close(tied, torch.tensor([[0.5, 0.5]]))


def test_first_labels_void_and_small_objects():
    mask = np.zeros((60, 80), np.uint8)
    mask[12:14, 12:14] = 2  # misses every cell centre
    mask[40:, 40:] = 255
    area = matching.grid_labels(mask, GRID)
    assert area.shape == (48, 3) and area[9, 2] == pytest.approx(4 / 100)
    assert area[-1].tolist() == [1, 0, 0]  # void is background
    torch.testing.assert_close(area.sum(1), torch.ones(48))


def test_norm_mask_leaves_constant_channels():
    labels = torch.stack([torch.full((2, 2), 0.3), torch.zeros(2, 2), torch.tensor([[0.2, 0.4], [0.6, 0.2]])])
    expected = torch.stack([labels[0], labels[1], torch.tensor([[0.0, 0.5], [1.0, 0.0]])])
    torch.testing.assert_close(matching.norm_mask(labels), expected)


def test_clusters_are_found_by_direction_and_the_elbow_stops():
    random = np.random.default_rng(0)
    directions = random.normal(size=(2, 16))  # of background and object; grids of different size, a little noise
    truth = [(random.random(30 + i) < 0.4).astype(int) for i in range(4)]
    tokens = [directions[t] * random.uniform(1, 9) + 0.1 * random.normal(size=(len(t), 16)) for t in truth]
    labels, inertias = cosegmentation.cluster_tokens(tokens)
    assert [len(each) for each in labels] == [30, 31, 32, 33]
    assert inertias[1] < 0.1 * inertias[0] and len(inertias) <= cosegmentation.MAX_CLUSTERS
    best, score = cosegmentation.oracle_clusters(labels, truth, [np.ones(len(t)) for t in truth], len(inertias))
    assert score > 0.99
    _, salient = cosegmentation.salient_clusters(labels, [t * 0.2 for t in truth], len(inertias), percentage=1)
    assert salient.tolist() == best.tolist()
    again, _ = cosegmentation.cluster_tokens(tokens)
    assert all(np.array_equal(a, b) for a, b in zip(labels, again, strict=True))


@pytest.mark.parametrize("limit", [2, 6, 9])
def test_clusters_are_those_of_scikit_learn(monkeypatch, limit):
    """Starts that several numbers of clusters share are drawn once, and are those that each would draw by itself."""
    monkeypatch.setattr(cosegmentation, "MAX_CLUSTERS", limit)
    tokens = np.random.default_rng(3).normal(size=(150, 12)).astype(np.float32)  # no elbow: k grows to the limit
    (labels,), inertias = cosegmentation.cluster_tokens([tokens], seed=5)
    points = normalize(tokens)
    expected = KMeans(limit, n_init=1, random_state=5).fit(points)
    assert len(inertias) == limit and inertias[-1] == pytest.approx(expected.inertia_ / 150)
    assert np.array_equal(labels, expected.predict(points))


def test_identical_tokens_are_one_cluster():
    _, inertias = cosegmentation.cluster_tokens([np.ones((5, 3)), np.ones((4, 3))])
    assert inertias == pytest.approx([0], abs=1e-9)


def test_oracle_is_the_best_of_all_unions():
    random = np.random.default_rng(1)
    labels = [random.integers(0, 5, 40) for _ in range(3)]
    pixels = [random.integers(1, 9, 40) for _ in range(3)]
    inside = [random.integers(0, p + 1) for p in pixels]
    best, score = cosegmentation.oracle_clusters(labels, inside, pixels, 5)

    def mean_jaccard(union):
        chosen = [np.isin(image, union) for image in labels]
        return np.mean([f[c].sum() / (p[c].sum() + f[~c].sum()) for c, f, p in zip(chosen, inside, pixels, strict=True)])

    unions = [[k for k in range(5) if code >> k & 1] for code in range(32)]
    for expected in (mean_jaccard(best), max(mean_jaccard(union) for union in unions)):
        assert score == pytest.approx(expected)
