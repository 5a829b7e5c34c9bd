"""The batched probe against scikit-learn, its convergence and bad input; Otsu's threshold and shuffled labels."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from kvutils import probes
from kvutils.errors import ParameterError
from kvutils.probes import ConvergenceError, fit_linear_probe, join_probes
from kvutils.tasks.base import shuffled_labels


def make_episode(S, N, C, K=2, decay=0.5, signal=1.0, share=None, seed=0):
    """Features (S, N, C) float32 with a falling spectrum, offsets and scales that differ, and labels (N,)."""
    rng = np.random.default_rng(seed)
    y = rng.choice(K, N, p=share)
    y[:K] = np.arange(K)
    spectrum = (1.0 + np.arange(C)) ** -decay
    X = []
    for _ in range(S):
        Z = rng.standard_normal((N, C)) + signal * rng.standard_normal((K, C))[y]
        Q, _ = np.linalg.qr(rng.standard_normal((C, C)))
        X.append((Z * spectrum) @ Q * rng.uniform(0.5, 20, C) + 10 * rng.standard_normal(C))
    return torch.tensor(np.stack(X), dtype=torch.float32), torch.tensor(y)


def reference(x, y, balanced=True, strength=1.0, sample_weight=None):
    """A tightly converged scikit-learn fit of one source in float64, and its standardised features."""
    scaler = StandardScaler().fit(x.double().numpy())
    class_weight = "balanced" if balanced else None
    model = LogisticRegression(C=strength, class_weight=class_weight, tol=1e-6, max_iter=20000)
    z = scaler.transform(x.double().numpy())
    return model.fit(z, y.numpy(), sample_weight=sample_weight), z


def objective(weight, bias, z, y, balanced, strength, sample_weight=None):
    """F of the module's docstring in float64 numpy, written independently of the solver."""
    y = y.numpy()
    s = np.ones(len(y)) if sample_weight is None else np.asarray(sample_weight, float)
    if balanced:
        classes = np.unique(y)
        total = s.sum()
        s = s * np.array([total / (len(classes) * s[y == k].sum()) for k in y])
    logits = z @ weight.T + bias
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], 1)
    top = logits.max(1, keepdims=True)
    nll = np.log(np.exp(logits - top).sum(1)) + top[:, 0] - logits[np.arange(len(y)), y]
    return (s * nll).sum() + (weight**2).sum() / (2 * strength)


CASES = {
    "more rows than channels": dict(S=5, N=720, C=64, signal=0.3),
    "falling spectrum": dict(S=4, N=720, C=64, decay=1.5, signal=0.5),
    "more channels than rows": dict(S=3, N=90, C=300, signal=0.2),
    "imbalanced": dict(S=4, N=600, C=32, share=[0.97, 0.03], signal=0.4),
    "separable": dict(S=4, N=300, C=48, signal=3.0),
    "multinomial": dict(S=3, N=400, C=24, K=5, signal=0.5),
    "multinomial, separable": dict(S=2, N=200, C=40, K=5, signal=2.5),
    "small": dict(S=2, N=300, C=20, signal=0.4),
}


@pytest.mark.parametrize(("name", "balanced", "strength", "weighted"), [
    *[(name, balanced, 1.0, False) for name in CASES for balanced in (True, False) if name != "small"],
    *[("small", not weighted, strength, weighted) for strength in (1e-3, 0.1, 10.0, 100.0) for weighted in (True, False)],
])  # fmt: skip
def test_agrees_with_scikit_learn(name, balanced, strength, weighted):
    case = CASES[name]
    X, y = make_episode(**case)
    sample_weight = np.random.default_rng(1).uniform(0.1, 3, len(y)) if weighted else None
    options = {"strength": strength, "sample_weight": sample_weight}
    probe = fit_linear_probe(X, y, case.get("K", 2), class_balanced=balanced, **options).require_converged()
    predicted = probe.predict(X)
    for i, x in enumerate(X):
        model, z = reference(x, y, balanced, **options)
        best = objective(model.coef_, model.intercept_, z, y, balanced, **options)
        weight, bias = probe.weight[i].double().numpy(), probe.bias[i].double().numpy()
        ours = objective(weight, bias, z, y, balanced, **options)
        assert ours <= best * (1 + 1e-3)
        assert float(probe.loss[i]) == pytest.approx(ours, rel=1e-4)
        assert np.mean(model.predict(z) == predicted[i].numpy()) >= 0.995 or name == "small"


def test_rows_of_weight_zero_are_as_if_absent():
    X, y = make_episode(S=3, N=200, C=16)
    padded = torch.cat([X, torch.full((3, 40, 16), float("nan"))], 1)
    labels = torch.cat([y, torch.full((40,), 255)])
    mask = torch.arange(240) < 200
    plain = fit_linear_probe(X, y, tol=1e-5)
    masked = fit_linear_probe(padded, labels, sample_weight=mask, tol=1e-5)
    torch.testing.assert_close(masked.mean, plain.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(masked.std, plain.std, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(masked.loss, plain.loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(masked.logits(X), plain.logits(X), rtol=0, atol=0.02)


def test_float64_is_solved_in_float64_to_any_tolerance_and_half_precision_in_float32():
    X, y = make_episode(S=2, N=200, C=12, signal=0.5)
    weight = np.random.default_rng(1).uniform(0.1, 3, 200)
    for options in ({}, {"sample_weight": weight}):
        probe = fit_linear_probe(X.double(), y, tol=1e-13, **options).require_converged()
        assert probe.weight.dtype == torch.float64
        for i, x in enumerate(X):
            np.testing.assert_allclose(probe.weight[i].numpy(), reference(x, y, **options)[0].coef_, atol=1e-4)
    assert fit_linear_probe(X.bfloat16(), y).require_converged().weight.dtype == torch.float32


@pytest.mark.parametrize("K", [2, 3])
def test_leading_dimensions_chunks_and_neighbours_do_not_matter(K, monkeypatch):
    X, y = make_episode(S=6, N=150, C=10, K=K, signal=0.7)
    X = X.view(2, 3, 150, 10)
    labels = torch.stack([y, torch.roll(y, 5)])[:, None].expand(2, 3, 150)
    probe = fit_linear_probe(X, labels, K)
    assert probe.weight.shape == (2, 3, 1 if K == 2 else K, 10) and probe.converged.shape == (2, 3)
    logits = probe.logits(X[:, :, :7])
    assert logits.shape == ((2, 3, 7) if K == 2 else (2, 3, 7, K))
    monkeypatch.setitem(probes.CHUNK_BYTES, "cpu", 1)  # one source at a time
    torch.testing.assert_close(fit_linear_probe(X, labels, K).logits(X[:, :, :7]), logits, rtol=0, atol=1e-3)
    joined = join_probes([fit_linear_probe(X[:1], labels[:1], K), fit_linear_probe(X[1:], labels[1:], K)])
    torch.testing.assert_close(joined.logits(X[:, :, :7]), logits, rtol=0, atol=1e-3)
    assert joined.converged.shape == (2, 3)
    single = fit_linear_probe(X[1, 2], labels[1, 2], K)
    assert single.loss.ndim == 0
    torch.testing.assert_close(single.logits(X[1, 2, :7]), logits[1, 2], rtol=0, atol=1e-3)


def test_beyond_the_preconditioner_the_minimum_is_the_same(monkeypatch):
    X, y = make_episode(S=3, N=150, C=40)
    expected = fit_linear_probe(X, y).loss
    monkeypatch.setattr(probes, "PRECONDITION_UP_TO", 10)
    torch.testing.assert_close(fit_linear_probe(X, y).require_converged().loss, expected, rtol=1e-3, atol=0)


def test_constant_collinear_and_outlier_features():
    X, y = make_episode(S=2, N=200, C=8)
    constant = torch.tensor([0.1, 0.0]).expand(2, 200, 2)
    X = torch.cat([X, constant, X[:, :, :3], 3e4 + X[:, :, 3:4]], -1)
    probe = fit_linear_probe(X, y, strength=1e3).require_converged()
    assert (probe.std[:, 8:10] == 1).all()
    assert probe.weight[:, :, 8:10].abs().max() < 1e-2
    assert torch.isfinite(probe.logits(X)).all()


def test_a_source_that_has_nothing_to_learn_harms_neither_itself_nor_its_neighbours():
    X, y = make_episode(S=3, N=200, C=8)
    labels = torch.arange(200) % 2
    probe = fit_linear_probe(torch.cat([X, torch.ones(1, 200, 8)]), labels)  # its gradient is 0 from the start
    assert int(probe.iterations[3]) == 0 and probe.converged.all() and (probe.weight[3] == 0).all()
    torch.testing.assert_close(probe.weight[:3], fit_linear_probe(X, labels).weight, rtol=1e-3, atol=1e-3)


def test_a_class_without_rows_is_never_predicted():
    X, y = make_episode(S=2, N=200, C=8, K=3)
    probe = fit_linear_probe(X, torch.where(y == 2, 3, y), 4).require_converged()
    assert torch.isneginf(probe.bias[:, 2]).all() and torch.isfinite(probe.weight).all()
    assert not (probe.predict(X) == 2).any()


def test_unconverged_sources_are_flagged_and_named():
    X, y = make_episode(S=3, N=200, C=30, decay=2.0)
    probe = fit_linear_probe(X, y, max_iter=2)
    assert probe.iterations.max() == 2 and not probe.converged[0]
    with pytest.raises(ConvergenceError, match=r"sources \[0"):
        probe.require_converged()


X, Y = make_episode(S=2, N=60, C=5)


@pytest.mark.parametrize(("x", "y", "options", "said"), [
    *[(torch.stack([X[0], torch.full_like(X[1], value)]), Y, {}, "source 1") for value in (np.nan, np.inf, -np.inf)],
    (X, torch.zeros(60, dtype=torch.long), {}, "two classes.*source 0"),
    (X, torch.stack([Y, torch.ones_like(Y)]), {}, "two classes.*source 1"),
    (X, Y - 1, {}, "labels 0..1"),
    (X, Y * 255, {}, "labels 0..1"),
    (X, Y - 1, {"sample_weight": torch.ones(60)}, "labels 0..1"),
    (X, Y[:-1], {}, "y of shape"),
    (X, Y, {"sample_weight": -torch.ones(60)}, "sample weights"),
    (X, Y, {"strength": 0}, "strength"),
    (X[:, :0], Y[:0], {}, "X of shape"),
])  # fmt: skip
def test_bad_input(x, y, options, said, monkeypatch):
    monkeypatch.setitem(probes.CHUNK_BYTES, "cpu", 1)
    with pytest.raises(ParameterError, match=said):
        fit_linear_probe(x, y, **options)


def test_input_is_left_as_it_was_and_logits_need_all_sources():
    before = X.clone()
    probe = fit_linear_probe(X, Y, sample_weight=torch.arange(60) > 3)
    assert torch.equal(X, before)
    with pytest.raises(ParameterError, match="logits: expected"):
        probe.logits(X[:1])


def test_shuffled_labels_keep_counts_and_void_entries():
    y = torch.tensor([0] * 30 + [1] * 10 + [255] * 5)
    out = shuffled_labels(y, 3, y != 255)
    assert torch.equal(out, shuffled_labels(y, 3, y != 255)) and out.dtype == y.dtype
    assert torch.equal(out.sort().values, y) and torch.equal(out[40:], y[40:])
    assert not torch.equal(out, shuffled_labels(y, 4, y != 255)) and not torch.equal(out, y)


@pytest.mark.parametrize("counts", [(7, 5, 5, 2, 2), (10, 190)])
def test_intercepts_are_fitted_under_a_strong_penalty(counts):
    """Of classes as they are: under a penalty that leaves the features nothing, the intercepts still say how frequent each class is."""
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    X = torch.randn(len(y), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probe = fit_linear_probe(X, y, len(counts), strength=np.float64(2e-4), class_balanced=False)
    priors = torch.tensor(counts, dtype=torch.float64) / len(y)
    assert probe.converged and float(probe.loss) < float(-(priors.log() * priors).sum() * len(y)) * 1.001
    if len(counts) == 2:
        assert float(probe.bias) == pytest.approx(np.log(190 / 10), abs=0.15)  # the loss within a thousandth
