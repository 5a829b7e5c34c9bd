"""Readouts of image tokens: a linear probe fitted for all feature sources at once, text similarity, thresholds.

The probe is the classifier of the segmentation task (paper section 3.1) and minimises, for every source separately,

    F(w, b) = sum_i s_i * cross_entropy(w . x_i + b, y_i) + |w|^2 / (2 * strength),

which is 1/C times scikit-learn's `LogisticRegression(C=strength, class_weight="balanced")` objective: the intercept is
not penalised, s_i = sample weight times total / (classes * total of the class), and x_i is standardised as
`StandardScaler` does (mean and population deviation of the rows with non-zero weight, not weighted otherwise).

Dozens of sources share one set of rows, so the solver runs all of them side by side and touches the features, the
largest array, only twice per iteration. Each step minimises F over the plane spanned by the preconditioned gradient and
the last few steps (sequential subspace optimisation, Narkiss and Zibulevsky 2005). The logits of those directions are
kept, hence the Newton steps inside the plane cost nothing on the scale of the features, and the preconditioner, F's
exact Hessian at zero, is factorised once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from kvutils.errors import KVUtilsError, ParameterError

DIRECTIONS = 4  # the plane of one step: preconditioned gradient and the last three steps; more gained nothing measurable
PRECONDITION_UP_TO = 1536  # channels; beyond, the C x C Hessian costs more than the iterations it saves
# Working set of one batched solve. On a CPU an episode should stay in the last-level cache between iterations; on a GPU
# the limit is there only to leave memory to the model.
CHUNK_BYTES = {"cpu": 6 * 2**20, "cuda": 4 * 2**30}


class ConvergenceError(KVUtilsError):
    """A probe whose optimisation stopped before its convergence criterion held."""


@dataclass
class LinearProbe:
    """A fitted probe per source; S stands for the leading dimensions of the X it was fitted on (none, one or several).

    K' is 1 for two classes (one logit, positive for class 1) and num_classes otherwise. weight applies to standardised
    features. A class without training rows has bias -inf. loss is F (see the module) at the solution.
    """

    weight: Tensor  # (S, K', C)
    bias: Tensor  # (S, K')
    mean: Tensor  # (S, C)
    std: Tensor  # (S, C), 1 where a feature is constant
    converged: Tensor  # (S,) bool
    iterations: Tensor  # (S,) int64
    loss: Tensor  # (S,)

    @torch.no_grad()
    def logits(self, X: Tensor) -> Tensor:
        """Logits of features X (S, M, C): (S, M) for two classes, (S, M, K) for more. ParameterError on a wrong shape."""
        X = torch.as_tensor(X, device=self.weight.device).to(self.weight.dtype)
        if X.shape[:-2] != self.mean.shape[:-1] or X.shape[-1:] != self.mean.shape[-1:]:
            expected = (*self.mean.shape[:-1], "M", self.mean.shape[-1])
            raise ParameterError(f"logits: expected features of shape {expected}, found {tuple(X.shape)}; "
                                 "pass the same sources and channels as in fit_linear_probe")
        # Standardise first, as in the fit: folding mean / std into the bias would cancel digits in outlier channels.
        X = (X - self.mean.unsqueeze(-2)).div_(self.std.unsqueeze(-2))
        logits = X @ self.weight.mT + self.bias.unsqueeze(-2)
        return logits[..., 0] if logits.shape[-1] == 1 else logits

    def predict(self, X: Tensor) -> Tensor:
        """Class (S, M) int64 of features X (S, M, C)."""
        logits = self.logits(X)
        return (logits > 0).long() if self.weight.shape[-2] == 1 else logits.argmax(-1)

    def require_converged(self) -> LinearProbe:
        """This probe, or ConvergenceError that names the sources which have not converged."""
        if not self.converged.all():
            failed = (~self.converged).flatten().nonzero().flatten().tolist()
            raise ConvergenceError(f"linear probe: expected every source to converge, found {len(failed)} of "
                                   f"{self.converged.numel()} that did not (sources {failed[:10]}) after "
                                   f"{int(self.iterations.max())} iterations; raise max_iter, lower strength, or pass float64")
        return self


@torch.no_grad()
def fit_linear_probe(X: Tensor, y: Tensor, num_classes: int = 2, strength: float = 1.0, class_balanced: bool = True,
                     sample_weight: Tensor | None = None, tol: float = 1e-3, max_iter: int = 1000) -> LinearProbe:
    """L2-regularised logistic regression of every source, where X lies (CPU or GPU).

    X (S, N, C) features, S any leading dimensions (sources, or episodes x sources); y (N,) or (S, N) classes;
    sample_weight (N,) or (S, N), >= 0 or bool: rows of weight 0 (padding, void tokens) take no part and may hold any
    label or feature. strength is scikit-learn's C. float64 features are solved in float64, all others in float32.

    A source has converged when |gradient|^2 <= 2 tol F / strength. As F is 1/strength-strongly convex in w, its loss is
    then within a share tol of the minimum; in practice the error is about a tenth of that. The result of a source
    does not depend on the sources beside it.

    ParameterError: shapes that do not fit, labels out of range, fewer than two classes in a source, NaN or Inf.
    Source: paper section 3.1 (probing set-up ours).

    >>> probe = fit_linear_probe(support, labels).require_converged()   # (28, 720, 64), (720,)
    >>> scores = probe.logits(query)                                    # (28, 144, 64) -> (28, 144)
    """
    X = torch.as_tensor(X)
    if X.ndim < 2 or X.numel() == 0:
        raise ParameterError(f"fit_linear_probe: expected X of shape (S, N, C), found {tuple(X.shape)}; stack sources first")
    if num_classes < 2 or not strength > 0 or not tol > 0 or max_iter < 1:
        raise ParameterError("fit_linear_probe: expected num_classes >= 2, strength > 0, tol > 0 and max_iter >= 1, found "
                             f"{num_classes}, {strength}, {tol}, {max_iter}")
    lead, (N, C) = X.shape[:-2], X.shape[-2:]
    dtype = torch.float64 if X.dtype == torch.float64 else torch.float32

    def rows(name: str, value: Tensor) -> Tensor:
        value = torch.as_tensor(value, device=X.device)
        if value.shape not in ((N,), (*lead, N)):
            raise ParameterError(f"fit_linear_probe: expected {name} of shape {(N,)} or {(*lead, N)}, found {tuple(value.shape)}")
        return value.expand(*lead, N).reshape(-1, N)

    y = rows("y", y).long()
    weight = None
    if sample_weight is not None:
        weight = rows("sample_weight", sample_weight).to(dtype)
        if not (torch.isfinite(weight) & (weight >= 0)).all():
            raise ParameterError("fit_linear_probe: expected finite sample weights >= 0; use 0 to exclude a row")
        y = torch.where(weight > 0, y, -1)
    allowed = -1 if weight is not None else 0
    if y.min() < allowed or y.max() >= num_classes:
        raise ParameterError(f"fit_linear_probe: expected labels 0..{num_classes - 1}, found {int(y.min())}..{int(y.max())}; "
                             "give void rows sample weight 0")
    onehot = (y.unsqueeze(1) == torch.arange(num_classes, device=y.device)[:, None]).to(dtype)  # (S, K, N)
    present = onehot.any(-1)
    if (lacking := present.sum(1) < 2).any():
        raise ParameterError("fit_linear_probe: expected at least two classes among the training rows, found fewer in source "
                             f"{int(lacking.nonzero()[0])}; skip this episode or choose other support images")
    s = onehot.sum(1) if weight is None else weight  # (S, N)
    if class_balanced:
        total = (onehot @ s.unsqueeze(-1)).squeeze(-1)  # weighted count of each class
        factor = s.sum(1, keepdim=True) / (present.sum(1, keepdim=True) * total.clamp_min(torch.finfo(dtype).tiny))
        s = s * (factor.unsqueeze(1) @ onehot).squeeze(1)
    flat = X.reshape(-1, N, C)
    size = max(1, CHUNK_BYTES["cuda" if X.is_cuda else "cpu"] // (N * (C + 1) * dtype.itemsize))
    # Chunks of equal size: a last one with few sources would use the cores badly.
    parts = torch.arange(len(flat)).tensor_split(-(-len(flat) // size))
    solved = [_fit_chunk(flat[i:j], onehot[i:j], s[i:j], None if weight is None else weight[i:j] > 0, strength, tol, max_iter, i)
              for i, j in ((int(p[0]), int(p[-1]) + 1) for p in parts)]
    joined = [torch.cat(parts).unflatten(0, lead) if lead else torch.cat(parts)[0] for parts in zip(*solved)]
    return LinearProbe(**{field.name: value for field, value in zip(fields(LinearProbe), joined)})


def _standardise(X: Tensor, keep: Tensor | None, s: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardised rows with a column of ones (S, N, C+1), mean and std (S, C), Gram matrix weighted by s (S, C+1, C+1).

    X (S, N, C), keep (S, N) bool or None, s (S, N). One source at a time: a pass over one source stays in the cache and
    its scratch space is small, where passes over all sources would cost more than the optimisation.
    """
    S, N, C = X.shape
    A, mean, std = s.new_empty(S, N, C + 1), s.new_empty(S, C), s.new_empty(S, C)
    gram = s.new_empty(S, C + 1, C + 1) if C < PRECONDITION_UP_TO else None
    scratch, eps = s.new_empty(N, C + 1), torch.finfo(s.dtype).eps
    share = s.new_full((1, N), 1 / N)
    for i, (rows, out) in enumerate(zip(X, A)):
        rows, centred = rows.to(s.dtype), out[:, :C]
        if keep is not None:
            rows = rows.masked_fill(~keep[i].unsqueeze(-1), 0)  # a NaN in padding would survive a multiplication by zero
            share = (keep[i] / keep[i].sum()).to(s.dtype).unsqueeze(0)
        torch.sub(rows, torch.mm(share, rows, out=mean[i : i + 1]), out=centred)
        variance = share @ torch.mul(centred, centred, out=scratch[:, :C])
        # The spread of a constant feature is rounding error, which must not be blown up to unit variance.
        deviation = variance[0].sqrt_()
        std[i] = deviation.masked_fill_(deviation <= 10 * eps * mean[i].abs(), 1)
        centred.div_(std[i])
        out[:, C] = 1
        if keep is not None:
            out.mul_(keep[i].unsqueeze(-1))
        if gram is not None:
            torch.mm(out.mT, torch.mul(out, s[i].unsqueeze(-1), out=scratch), out=gram[i])
    if not torch.isfinite(std).all():  # any NaN or Inf among the rows ends up here, so the features need no pass of their own
        source = first + int((~torch.isfinite(std)).any(-1).nonzero()[0])
        raise ParameterError(f"fit_linear_probe: expected finite features, found NaN, Inf or an overflow in source {source}; "
                             "check the capture of that source (half precision overflows above 65504)")
    return A, mean, std, gram


def _fit_chunk(X: Tensor, onehot: Tensor, s: Tensor, keep: Tensor | None, strength: float, tol: float, max_iter: int,
               first: int) -> tuple[Tensor, ...]:
    """Fields of LinearProbe for X (S, N, C), onehot (S, K, N), row weights s (S, N); `first` numbers the sources in errors."""
    A, mean, std, gram = _standardise(X, keep, s, first)
    (S, N, P), classes = A.shape, onehot.shape[1]
    loss_at = (_Binary if classes == 2 else _Softmax)(onehot, s.unsqueeze(1), A)
    K = loss_at.outputs
    ridge = A.new_full((P,), 1 / strength)
    ridge[-1] = 0  # the intercept
    precondition = _preconditioner(gram, loss_at.curvature_at_zero, ridge)
    x, z = A.new_zeros(S, K, P), A.new_zeros(S, K, N)  # weights and intercept; logits
    D, Z = A.new_zeros(S, DIRECTIONS, K, P), A.new_zeros(S, DIRECTIONS, K, N)  # directions and their logits
    iterations = torch.zeros(S, dtype=torch.long, device=A.device)
    noise = 8 * torch.finfo(A.dtype).eps
    flat = lambda t: t.flatten(2)  # noqa: E731  (S, DIRECTIONS, K, .) -> (S, DIRECTIONS, K * .)
    data, state = loss_at(z)
    penalty = x.new_zeros(S)
    loss = data
    for iteration in range(max_iter + 1):
        residual = loss_at.residual(state)
        gradient = residual @ A + ridge * x
        converged = gradient.square().sum((1, 2)) * (strength / 2) <= tol * loss
        if iteration == max_iter or converged.all():
            break
        iterations += ~converged
        D[:, 0] = precondition(gradient)
        Z[:, 0] = D[:, 0] @ A.mT
        # Two Newton steps inside the plane; `step` are coordinates along the directions, of shape (S, 1, DIRECTIONS).
        DD = flat(D * ridge) @ flat(D).mT
        Dx = x.flatten(1).unsqueeze(1) @ flat(D * ridge).mT
        step, trial = torch.zeros_like(Dx), state
        for inner in range(2):
            g = loss_at.residual(trial).flatten(1).unsqueeze(1) @ flat(Z).mT + Dx + step @ DD
            H = loss_at.curvature(trial, Z) + DD
            step = step - _solve_small(H, g)
            if inner == 0:
                trial = loss_at(z + (step @ flat(Z)).view_as(z), loss=False)[1]
        step.masked_fill_(converged[:, None, None], 0)  # a source stops where it converged, whatever its neighbours do
        while True:
            dx, dz = (step @ flat(D)).view_as(x), (step @ flat(Z)).view_as(z)
            data, state = loss_at(z + dz)
            penalty = ((x + dx).square() * (ridge / 2)).sum((1, 2))
            worse = data + penalty > loss * (1 + noise)
            if not worse.any():
                break
            step = torch.where(worse[:, None, None], step * 0.25, step)  # Newton overshot; the direction is one of descent
        x, z, loss = x + dx, z + dz, data + penalty
        slot = 1 + iteration % (DIRECTIONS - 1)
        D[:, slot], Z[:, slot] = dx, dz
    weight, bias = x[..., :-1].clone(), x[..., -1].clone()
    if K > 1:
        bias = bias.masked_fill(~onehot.any(-1), -torch.inf)
    return weight, bias, mean, std, converged, iterations, loss


def _preconditioner(gram: Tensor | None, curvature: float, ridge: Tensor):
    """Function g (S, K, P) -> inverse Hessian at zero times g; g itself without a Gram matrix (S, P, P)."""
    if gram is None:
        return lambda g: g
    H = gram.mul_(curvature)
    diagonal = H.diagonal(dim1=1, dim2=2)
    # A floor keeps the factorisation safe when features are collinear and hardly penalised. It changes the path to the
    # minimum, never the minimum.
    floor = 20 * torch.finfo(H.dtype).eps * diagonal.sum(-1, keepdim=True)
    diagonal.add_(torch.maximum(ridge, floor))
    L = torch.linalg.cholesky(H)
    return lambda g: torch.cholesky_solve(g.mT, L).mT


def _solve_small(H: Tensor, g: Tensor) -> Tensor:
    """g (S, 1, m) H^-1 for positive semi-definite H (S, m, m); directions that are zero or depend on others are harmless."""
    scale = H.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(H.dtype).tiny).rsqrt().unsqueeze(1)
    H = H * scale * scale.mT
    H.diagonal(dim1=1, dim2=2).add_(50 * torch.finfo(H.dtype).eps)
    L, _ = torch.linalg.cholesky_ex(H)
    return torch.cholesky_solve((g * scale).mT, L).mT * scale


class _Binary:
    """Logistic loss of two classes with one logit z (S, 1, N). The state is the probability of the wrong class."""

    outputs, curvature_at_zero = 1, 1 / 4

    def __init__(self, onehot: Tensor, s: Tensor, A: Tensor) -> None:
        self.s, self.sign = s, (onehot[:, 1:] - onehot[:, :1])
        self.signed = -s * self.sign

    def __call__(self, z: Tensor, loss: bool = True) -> tuple[Tensor | None, Tensor]:
        wrong = -self.sign * z
        return ((self.s @ softplus(wrong).mT)[:, 0, 0] if loss else None), torch.sigmoid(wrong)

    def residual(self, wrong: Tensor) -> Tensor:
        return self.signed * wrong

    def curvature(self, wrong: Tensor, Z: Tensor) -> Tensor:
        Z = Z[:, :, 0]
        return (Z * (self.s * wrong * (1 - wrong))) @ Z.mT


class _Softmax:
    """Cross entropy of K logits z (S, K, N); classes that a source does not contain are left out. State: probabilities."""

    def __init__(self, onehot: Tensor, s: Tensor, A: Tensor) -> None:
        self.s, self.onehot, self.absent = s, onehot, ~onehot.any(-1, keepdim=True)
        self.outputs, self.curvature_at_zero = onehot.shape[1], 1 / onehot.shape[1]

    def __call__(self, z: Tensor, loss: bool = True) -> tuple[Tensor | None, Tensor]:
        log_p = z.masked_fill(self.absent, -torch.inf).log_softmax(1)
        value = -(log_p.masked_fill(self.onehot == 0, 0) * self.s).sum((1, 2)) if loss else None
        return value, log_p.exp()

    def residual(self, p: Tensor) -> Tensor:
        return self.s * (p - self.onehot)

    def curvature(self, p: Tensor, Z: Tensor) -> Tensor:
        weighted = Z * p.unsqueeze(1)
        mean = weighted.sum(2)
        return (weighted * self.s.unsqueeze(1)).flatten(2) @ Z.flatten(2).mT - (mean * self.s) @ mean.mT


def shuffled_labels(y: Tensor | np.ndarray, seed: int, valid: Tensor | np.ndarray | None = None) -> Tensor | np.ndarray:
    """Control: labels (..., N) permuted over N, each row by its own permutation; entries where `valid` is False stay.

    The share of each class is unchanged, so a probe that does better than chance on these has only memorised. Same type
    and device as y, the same permutation for the same seed on every machine.
    """
    rng = np.random.default_rng(seed)
    array = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    mask = np.ones(array.shape, bool) if valid is None else np.broadcast_to(np.asarray(torch.as_tensor(valid).cpu()), array.shape)
    out = array.copy()
    for row, labels, movable in zip(out.reshape(-1, array.shape[-1]), array.reshape(-1, array.shape[-1]),
                                    mask.reshape(-1, array.shape[-1])):
        row[movable] = rng.permutation(labels[movable])
    return torch.from_numpy(out).to(y.device) if isinstance(y, Tensor) else out


def text_similarity(image_values: Tensor, text_values: Tensor, cosine: bool = False) -> Tensor:
    """Dot product of a text's values with each image token's, summed over heads (PROTOCOL task 3, paper section 3.1).

    image_values (..., N, G, D), text_values (..., G, D) of the same layer -> (..., N) in float32 at least. cosine=True
    divides by both lengths, taken over all heads together; a zero vector scores 0. ParameterError on shapes that do not fit.
    """
    if image_values.ndim < 3 or text_values.ndim < 2 or image_values.shape[-2:] != text_values.shape[-2:]:
        raise ParameterError("text_similarity: expected image values (..., N, G, D) and text values (..., G, D), found "
                             f"{tuple(image_values.shape)} and {tuple(text_values.shape)}")
    dtype = torch.promote_types(image_values.dtype, torch.float32)
    image, text = image_values.to(dtype).flatten(-2), text_values.to(image_values.device, dtype).flatten(-2)
    scores = (image @ text.unsqueeze(-1)).squeeze(-1)
    if not cosine:
        return scores
    lengths = image.norm(dim=-1) * text.norm(dim=-1, keepdim=True)
    return scores / lengths.clamp_min(torch.finfo(dtype).tiny)


def otsu(scores: Tensor | np.ndarray) -> float:
    """Otsu's threshold (1979): the split of the scores, of any shape, with the largest between-class variance.

    Exact over all splits, without a histogram. Foreground is `scores > threshold`; the threshold lies midway between
    the two scores at the split, and is the score itself when all are equal. ParameterError on empty or non-finite scores.
    """
    array = scores.detach().cpu().double().numpy() if isinstance(scores, Tensor) else np.asarray(scores, float)
    x = np.sort(array, axis=None)
    if x.size == 0 or not np.isfinite(x).all():
        raise ParameterError(f"otsu: expected finite scores, found {x.size} of which {int((~np.isfinite(x)).sum())} are not finite")
    if x[0] == x[-1]:
        return float(x[0])
    centred = x - x.mean()  # the sum of the lower class then gives the variance between the classes directly
    lower, count = np.cumsum(centred)[:-1], np.arange(1, x.size)
    between = np.where(x[1:] > x[:-1], lower**2 / (count * (x.size - count)), -1.0)
    i = int(between.argmax())
    return float((x[i] + x[i + 1]) / 2)
