"""Time of the batched probe divided by that of scikit-learn's LogisticRegression looped over the sources.

An episode is made as in the segmentation task: five crops of a photograph, cut into patches, pass through
the layers of an untrained language model; the sources are the value vectors of its layers, and the label of a
token is whether most of its pixels show the red flower. Both sides get the same float32 features, standardise
them, use balanced classes and one thread, and alternate within an episode. scikit-learn's tolerance is the
loosest power of ten, from its default 1e-4 down, at which its loss is within 1e-3 of the minimum, as the
batched probe's is by default. Time is the CPU time of the process, which is wall time on an idle machine and
comparable on a busy one.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from sklearn.datasets import load_sample_image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import Qwen2Config, Qwen2Model

from kvutils.probes import LinearProbe, fit_linear_probe

SHOTS, PATCH = 5, 8
# ratio: sources, KV heads, head dimension, tokens along a side, episodes, scikit-learn's tolerance, goal
SIZES = {
    "probe_time_ratio": (30, 2, 32, 12, 5, 1e-4, 0.05),  # the first pocket model's values: N = 720, C = 64
    "probe_time_ratio_c128": (30, 4, 32, 12, 3, 1e-4, 0.08),  # the width of its encoder and projector
    "probe_time_ratio_c512_n3645": (8, 4, 128, 27, 1, 1e-5, 0.2),  # values and tokens of LLaVA-OneVision-7B
}


def make_episode(sources: int, heads: int, head_dim: int, side: int,
                 seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (S, N, C) float32 and labels (N,) of an episode; N = 5 * side * side, C = heads * head_dim."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    hidden = 2 * heads * head_dim
    model = Qwen2Model(Qwen2Config(
        vocab_size=8, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=sources,
        num_attention_heads=2 * heads, num_key_value_heads=heads)).eval()
    photo = load_sample_image("flower.jpg").astype(np.float32) / 255
    size = side * PATCH
    patches, labels = [], []
    while len(patches) < SHOTS:
        top, left = (int(rng.integers(0, limit - size)) for limit in photo.shape[:2])
        crop = photo[top : top + size, left : left + size]
        patch = crop.reshape(side, PATCH, side, PATCH, 3).transpose(0, 2, 1, 3, 4).reshape(side * side, -1, 3)
        label = (patch[..., 0] - patch[..., 1] > 0.2).mean(1) > 0.5
        if 0.05 < label.mean() < 0.95:
            patches.append(patch.reshape(side * side, -1))
            labels.append(label)
    embed = rng.standard_normal((PATCH * PATCH * 3, hidden)) / PATCH
    inputs = torch.tensor((np.stack(patches) - 0.5) @ embed, dtype=torch.float32)
    with torch.no_grad():
        layers = model(inputs_embeds=inputs, use_cache=True).past_key_values.layers
    X = torch.stack([layer.values.transpose(1, 2).flatten(2).flatten(0, 1) for layer in layers])
    return X.contiguous(), torch.tensor(np.concatenate(labels)).long()


def fit_scikit_learn(X: np.ndarray, y: np.ndarray, tol: float) -> list[Pipeline]:
    """One fit per source of X (S, N, C) float, standardised as the batched probe does."""
    return [make_pipeline(
        StandardScaler(), LogisticRegression(class_weight="balanced", tol=tol, max_iter=100_000)).fit(x, y)
        for x in X]


def objective(weight: np.ndarray, bias: np.ndarray, Z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The objective of each source in float64; weight (S, C), bias (S,), standardised Z (S, N, C), y (N,)."""
    s = len(y) / (2 * np.bincount(y)[y])
    margins = (2 * y - 1) * (np.einsum("snc,sc->sn", Z, weight) + bias[:, None])
    return (s * np.logaddexp(0, -margins)).sum(1) + (weight**2).sum(1) / 2


def compare(probe: LinearProbe, X: torch.Tensor, y: torch.Tensor, models: list[Pipeline]) -> dict[str, float]:
    """Largest relative excess of both losses over a tight float64 fit; share of predictions unlike it."""
    X64, labels = X.double().numpy(), y.numpy()
    exact = fit_scikit_learn(X64, labels, tol=1e-6)
    Z = np.stack([model[0].transform(x) for model, x in zip(exact, X64)])

    def losses(fits: list[Pipeline]) -> np.ndarray:
        weight = np.stack([model[1].coef_[0] for model in fits])
        return objective(weight, np.stack([model[1].intercept_[0] for model in fits]), Z, labels)

    best = losses(exact)
    ours = objective(probe.weight[:, 0].double().numpy(), probe.bias[:, 0].double().numpy(), Z, labels)
    predicted = np.stack([model.predict(x) for model, x in zip(exact, X64)])
    return {"ours": float((ours / best - 1).max()), "scikit-learn": float((losses(models) / best - 1).max()),
            "differ": float((probe.predict(X).numpy() != predicted).mean())}


def run() -> list[dict]:
    """Figures {name, value, goal, detail}; lower is better. About a minute on one core."""
    figures, checks = [], []
    for name, (sources, heads, head_dim, side, episodes, tol, goal) in SIZES.items():
        ours, theirs = [], []
        for seed in range(episodes):
            X, y = make_episode(sources, heads, head_dim, side, seed)
            for _ in range(3):
                start = time.process_time()
                probe = fit_linear_probe(X, y)
                middle = time.process_time()
                models = fit_scikit_learn(X.numpy(), y.numpy(), tol)
                ours.append(middle - start)
                theirs.append(time.process_time() - middle)
            probe.require_converged()
            if seed == 0:
                checks.append((f"C={X.shape[2]}", compare(probe, X, y, models)))
        S, N, C = X.shape
        figures.append({
            "name": name, "value": round(float(np.median(ours) / np.median(theirs)), 4), "goal": goal,
            "detail": f"S={S} sources, N={N} tokens, C={C} channels, {episodes} episodes, 1 thread: "
                      f"{np.median(ours) * 1e3:.1f} ms, scikit-learn (tol {tol:g}) "
                      f"{np.median(theirs) * 1e3:.1f} ms"})

    def per_size(key: str) -> str:
        return ", ".join(f"{size} {check[key]:.1e}" for size, check in checks)

    figures.append({
        "name": "probe_loss_excess", "value": max(check["ours"] for _, check in checks), "goal": 1e-3,
        "detail": f"largest relative excess over a tight float64 scikit-learn fit: {per_size('ours')}; "
                  f"scikit-learn as timed: {per_size('scikit-learn')}"})
    figures.append({
        "name": "probe_predictions_differ", "goal": 5e-3,
        "value": max(check["differ"] for _, check in checks),
        "detail": f"share of training tokens classified unlike that fit: {per_size('differ')}"})
    return figures
