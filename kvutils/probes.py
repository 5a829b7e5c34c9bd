"""The linear probe of all feature sources at once: the classifier of the segmentation tasks (paper section 3.1).

For every source it minimises

    F(w, b) = sum_i s_i * cross_entropy(w . x_i + b, y_i) + |w|^2 / (2 * strength),

1 / C times the objective of scikit-learn's `LogisticRegression(C=strength, class_weight="balanced")`: the intercept is not
penalised, s_i = sample weight * total weight / (classes * weight of the class), and x_i is standardised as by
`StandardScaler` (mean and population deviation of the rows of non-zero weight, unweighted).

Dozens of sources share one set of rows, so the solver runs them side by side and passes over the features, the largest array,
only twice per iteration. Each step minimises F over the plane spanned by the preconditioned gradient and the last few steps
(sequential subspace optimisation, Narkiss and Zibulevsky 2005). The logits of these directions are kept, hence the Newton
step inside the plane costs little. The preconditioner is F's Hessian, estimated from a part of the rows and seldom renewed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Real

import torch
from torch import Tensor
from torch.nn.functional import softplus

from kvutils.errors import KVUtilsError, ParameterError, at_least, of_kind

DIRECTIONS = 4  # preconditioned gradient and the last three steps; more gained nothing measurable
REFRESH = 5  # iterations between preconditioners: separable data leave the curvature at zero far behind
ROWS = 400  # that enter a preconditioner, and one per channel in the first, but at most three: it need not be exact and costs in proportion
PRECONDITION_UP_TO = 1536  # channels; beyond, a C x C factorisation costs more than the iterations it saves
# Bytes of features solved in one batch: on a CPU they stay in the last-level cache; on a GPU this leaves memory to the model.
CHUNK_BYTES = {"cpu": 6 * 2**20, "cuda": 4 * 2**30}
CACHE_BYTES = 2**19  # of features standardised together: they stay in the second-level cache


class ConvergenceError(KVUtilsError):
    """A probe whose optimisation stopped before its convergence criterion held."""


@dataclass
class LinearProbe:
    """A fitted probe per source; S stands for the leading dimensions of the fitted X (none, one or several). K' is 1 for two
    classes (one logit, positive for class 1), else num_classes. weight applies to standardised features. A class without training
    rows has bias -inf. loss is F (see the module) at the solution."""

    weight: Tensor  # (S, K', C)
    bias: Tensor  # (S, K')
    mean: Tensor  # (S, C)
    std: Tensor  # (S, C), 1 where a feature is constant
    converged: Tensor  # (S,) bool
    iterations: Tensor  # (S,) int64
    loss: Tensor  # (S,)

    @torch.no_grad()
    def logits(self, X: Tensor) -> Tensor:
        """Logits of features X (S, M, C) of the same sources: (S, M) for two classes, (S, M, K) for more."""
        X = torch.as_tensor(X, device=self.weight.device).to(self.weight.dtype)
        if X.ndim < 2 or (*X.shape[:-2], X.shape[-1]) != self.mean.shape:
            expected = (*self.mean.shape[:-1], "M", self.mean.shape[-1])
            raise ParameterError(f"logits: expected features of shape {expected}, found {tuple(X.shape)}: those of the fit")
        # As in the fit; folded into weight and bias, mean / std would cancel digits in outlier channels.
        X = (X - self.mean.unsqueeze(-2)).div_(self.std.unsqueeze(-2))
        logits = X @ self.weight.mT + self.bias.unsqueeze(-2)
        return logits[..., 0] if logits.shape[-1] == 1 else logits

    def predict(self, X: Tensor) -> Tensor:
        """Class (S, M) int64 of features X (S, M, C)."""
        logits = self.logits(X)
        return (logits > 0).long() if self.weight.shape[-2] == 1 else logits.argmax(-1)

    def require_converged(self) -> LinearProbe:
        """This probe, or ConvergenceError that names the sources which have not converged."""
        if failed := (~self.converged).flatten().nonzero().flatten().tolist():
            raise ConvergenceError(f"linear probe: {len(failed)} of {self.converged.numel()} sources did not converge within "
                                   f"{int(self.iterations.max())} iterations (sources {failed[:10]}); raise max_iter or tol, "
                                   "lower strength, or pass float64 features")
        return self


def join_probes(probes: list[LinearProbe]) -> LinearProbe:
    """Probes of several groups of sources as one, in their order."""
    return LinearProbe(*(torch.cat([getattr(probe, each.name) for probe in probes]) for each in fields(LinearProbe)))


@torch.no_grad()
def fit_linear_probe(X: Tensor, y: Tensor, num_classes: int = 2, strength: float = 1.0, class_balanced: bool = True,
                     sample_weight: Tensor | None = None, tol: float = 1e-3, max_iter: int = 1000) -> LinearProbe:
    """L2-regularised logistic regression of every source, computed where X lies (CPU or GPU).

    X (S, N, C) features, S any leading dimensions (sources, or episodes x sources); y (N,) or (S, N) classes; sample_weight
    (N,) or (S, N), bool or >= 0: rows of weight 0 (padding, void tokens) take no part and may hold any label and feature.
    strength is scikit-learn's C. float64 is solved in float64, all else in float32.

    A source has converged when |gradient|^2 <= 2 tol F / strength and what the intercepts could still gain, by their curvature where
    features tell little, is below tol F. F is 1/strength-strongly convex in w, so its loss is then
    within a share of about tol of the minimum (in practice a tenth of that). Sources do not depend on those beside them.

    ParameterError: shapes that do not fit, labels out of range, a source with fewer than two classes, NaN or Inf. Source:
    paper section 3.1; the regularisation is ours.

    >>> shot = kv.capture(mlm, [scene])[0]
    >>> features = torch.stack([shot.value(layer) for layer in shot.layers])     # (S, N, C): a source for each layer
    >>> upper = torch.tensor(shot.layout.centers[:, 1] < 48).long()              # (N,): is a token in the upper half?
    >>> probe = kv.fit_linear_probe(features, upper).require_converged()
    >>> probe.predict(features).shape     # (S, N)
    torch.Size([12, 145])
    """
    try:
        X, y = torch.as_tensor(X), torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ParameterError(f"fit_linear_probe: expected arrays of numbers, X (S, N, C) and labels y (N,) from 0 on ({error})") from error
    if y.is_floating_point() and not (y == y.round()).all():
        raise ParameterError("fit_linear_probe: expected whole numbers as labels y, found fractions")
    of_kind("strength", strength, Real, "a number")
    of_kind("tol", tol, Real, "a number")
    at_least("num_classes", num_classes, 2)
    at_least("max_iter", max_iter)
    if X.ndim < 2 or X.numel() == 0:
        raise ParameterError(f"fit_linear_probe: expected X of shape (S, N, C), none of them 0, found {tuple(X.shape)}")
    if not 0 < strength < float("inf") or not tol > 0:
        raise ParameterError(f"fit_linear_probe: expected strength > 0 and tol > 0, found {strength}, {tol}")
    lead, (N, C) = X.shape[:-2], X.shape[-2:]
    dtype = torch.float64 if X.dtype == torch.float64 else torch.float32

    def rows(name: str, value: Tensor) -> Tensor:
        if (value := torch.as_tensor(value, device=X.device)).shape not in ((N,), (*lead, N)):
            raise ParameterError(f"fit_linear_probe: expected {name} of shape {(N,)} or {(*lead, N)}, found {tuple(value.shape)}")
        return value.expand(*lead, N).reshape(-1, N)

    y, keep = rows("y", y).long(), None
    s = torch.ones_like(y, dtype=dtype)
    if sample_weight is not None:
        s = rows("sample_weight", sample_weight).to(dtype)
        if not (torch.isfinite(s) & (s >= 0)).all():
            raise ParameterError("fit_linear_probe: expected finite sample weights >= 0; use 0 to exclude a row")
        keep = s > 0
        y = torch.where(keep, y, y.new_zeros(()))
        keep = None if keep.all() else keep  # most often no row is void
    if y.min() < 0 or y.max() >= num_classes:
        raise ParameterError(f"fit_linear_probe: expected labels 0..{num_classes - 1}, found {int(y.min())}..{int(y.max())}; "
                             "give void rows sample weight 0")
    onehot = y.unsqueeze(1) == torch.arange(num_classes, device=y.device)[:, None]  # (S, K, N)
    onehot = (onehot if keep is None else onehot & keep.unsqueeze(1)).to(dtype)
    present = onehot.any(-1)
    if (lacking := present.sum(1) < 2).any():
        raise ParameterError("fit_linear_probe: expected at least two classes among the training rows, found fewer in source "
                             f"{int(lacking.nonzero()[0])}; choose other support images")
    if class_balanced:
        per_class = (onehot @ s.unsqueeze(-1)).squeeze(-1).clamp_min(torch.finfo(dtype).tiny)
        factor = s.sum(1, keepdim=True) / (present.sum(1, keepdim=True) * per_class)
        s = s * (factor.masked_fill(~present, 0).unsqueeze(1) @ onehot).squeeze(1)
    flat = X.reshape(-1, N, C)
    size = max(1, CHUNK_BYTES["cuda" if X.is_cuda else "cpu"] // (N * (C + 1) * dtype.itemsize))
    # Chunks of equal size: a last one with few sources would waste the fixed cost of an iteration.
    chunks = torch.arange(len(flat)).tensor_split(-(-len(flat) // size))
    with torch.inference_mode():  # less bookkeeping per operation than no_grad: it counts for small features
        solved = [_fit_chunk(flat[i:j], onehot[i:j], s[i:j], None if keep is None else keep[i:j], strength, tol, max_iter, i)
                  for i, j in ((int(c[0]), int(c[-1]) + 1) for c in chunks)]
    joined = map(torch.cat, zip(*solved, strict=True))
    return LinearProbe(*(value.unflatten(0, lead) if lead else value[0] for value in joined))


def _standardise(X: Tensor, keep: Tensor | None, dtype: torch.dtype, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Standardised rows with a column of ones (S, N, C+1), mean and std (S, C); X (S, N, C), keep (S, N) bool or None. Few sources
    at a time, which stay in the cache: passes over all of them would cost as much as the optimisation."""
    S, N, C = X.shape
    A, mean, std = (X.new_empty(shape, dtype=dtype) for shape in ((S, N, C + 1), (S, C), (S, C)))
    few, eps = max(1, CACHE_BYTES // (N * C * dtype.itemsize)), torch.finfo(dtype).eps
    scratch = A.new_empty(min(S, few), N, C)
    share = A.new_full((S, 1, N), 1 / N) if keep is None else (keep / keep.sum(1, keepdim=True)).to(dtype).unsqueeze(1)
    for some in (slice(i, min(i + few, S)) for i in range(0, S, few)):
        rows, out = X[some].to(dtype), A[some]
        if keep is not None:  # by filling: NaN in padding would survive a multiplication by zero
            rows = rows.masked_fill(~keep[some].unsqueeze(-1), 0)
        centre, centred = share[some] @ rows, out[..., :C]
        torch.sub(rows, centre, out=centred)
        deviation = (share[some] @ torch.mul(centred, centred, out=scratch[: len(out)])).sqrt_()
        # The spread of a constant feature is rounding error, which must not be blown up to unit variance.
        deviation.masked_fill_(deviation <= 10 * eps * centre.abs(), 1)
        centred.div_(deviation)
        out[..., C] = 1
        if keep is not None:
            out.mul_(keep[some].unsqueeze(-1))
        mean[some], std[some] = centre[:, 0], deviation[:, 0]
    bad = ~torch.isfinite(std).all(-1)  # a NaN or Inf in any row ends up here: this saves a pass over X
    if bad.any():
        raise ParameterError("fit_linear_probe: expected finite features, found NaN, Inf or an overflow in source "
                             f"{first + int(bad.nonzero()[0])}; check the capture of that source")
    return A, mean, std


def _fit_chunk(X: Tensor, onehot: Tensor, s: Tensor, keep: Tensor | None, strength: float, tol: float,
               max_iter: int, first: int) -> tuple[Tensor, ...]:
    """Fields of LinearProbe; X (S, N, C), onehot (S, K, N), row weights s (S, N); errors name first + i."""
    A, mean, std = _standardise(X, keep, s.dtype, first)
    (S, N, P), classes = A.shape, onehot.shape[1]
    model = (_Binary if classes == 2 else _Softmax)(onehot, s.unsqueeze(1))
    K, eps = model.outputs, torch.finfo(A.dtype).eps
    ridge = A.new_full((P,), 1 / strength)
    ridge[-1] = 0  # the intercept
    # Parameters (first P columns) and their logits (last N) are stored together, of the point and of the directions of the plane.
    point, plane = A.new_zeros(S, K, P + N), A.new_zeros(S, DIRECTIONS, K, P + N)
    metric = torch.empty_like(point)  # weights under which a direction's squared length is F's curvature
    metric[..., :P] = ridge
    iterations = torch.zeros(S, dtype=torch.long, device=A.device)
    # The intercepts, which nothing holds, bend the loss by so much where features tell little; 0: of a class that no row has.
    rows = s.sum(1, keepdim=True)
    share = ((onehot @ s.unsqueeze(-1)).squeeze(-1) / rows)[:, -K:]
    bend = rows * share * (1 - share)
    loss, state = model(point[..., P:])
    factor = None
    for iteration in range(max_iter + 1):
        gradient = model.residual(state) @ A + ridge * point[..., :P]
        still = torch.where(bend > 0, gradient[..., -1].square() / (2 * bend), 0).sum(1)
        converged = torch.maximum(gradient.square().sum((1, 2)) * (strength / 2), still) <= tol * loss
        todo = (~converged).nonzero().flatten()
        if iteration == max_iter or not len(todo):
            break
        iterations[todo] += 1
        if iteration % REFRESH == 0 and P <= PRECONDITION_UP_TO:
            some = torch.arange(S, device=A.device) if factor is None else todo
            renewed = _factorise(A, model.row_curvature(state)[some], ridge, some, evenly=iteration == 0)
            factor = renewed if factor is None else factor.index_copy_(0, some, renewed)
        direction = gradient if factor is None else torch.cholesky_solve(gradient.mT, factor).mT
        plane[:, 0, :, :P] = direction
        plane[:, 0, :, P:] = direction @ A.mT
        # A Newton step inside the plane: `step` (S, 1, DIRECTIONS) are coordinates along the directions.
        H = model.plane_curvature(state, plane, metric)
        # Directions that are zero (first steps, finished sources) or depend on others must do no harm.
        H.diagonal(dim1=1, dim2=2).mul_(1 + 50 * eps).add_(torch.finfo(H.dtype).tiny)
        slope = plane[..., :P].flatten(2) @ gradient.flatten(1).unsqueeze(2)
        step = torch.linalg.solve_ex(H, slope)[0].mT.neg()
        step.masked_fill_(converged[:, None, None], 0)  # a source stops where it converged, others or not
        while True:
            move = (step @ plane.flatten(2)).view_as(point)
            trial = point + move
            data, state = model(trial[..., P:])
            trial_loss = data + (trial[..., :P].square() * (ridge / 2)).sum((1, 2))
            if not (worse := trial_loss > loss * (1 + 8 * eps)).any():
                break
            step = torch.where(worse[:, None, None], step * 0.25, step)  # Newton overshot in its direction
        point, loss = trial, trial_loss
        plane[:, 1 + iteration % (DIRECTIONS - 1)] = move
    weight, bias = point[..., : P - 1].clone(), point[..., P - 1].clone()
    if K > 1:
        bias.masked_fill_(~onehot.any(-1), -torch.inf)
    return weight, bias, mean, std, converged, iterations, loss


def _factorise(A: Tensor, curvature: Tensor, ridge: Tensor, some: Tensor, evenly: bool) -> Tensor:
    """Cholesky factors (T, P, P) of about A' diag(curvature) A + diag(ridge) for the sources `some` (T,) of A (S, N, P); curvature (T, N).
    Only some rows enter: every n-th while all have about the same curvature (evenly), else those with most of it, for late in the
    optimisation a few rows near the boundary carry nearly all."""
    S, N, P = A.shape
    count = min(N, 3 * P, ROWS + evenly * P)
    if evenly:
        index = torch.arange(0, N, N // count, device=A.device).expand(len(some), -1)
        curvature = curvature[:, :: N // count] * (N // count)
    else:
        curvature, index = curvature.topk(count, dim=1, sorted=False)
    rows = A.view(S * N, P).index_select(0, (index + N * some.unsqueeze(1)).flatten()).view(len(some), -1, P)
    rows.mul_(curvature.clamp_min(0).sqrt_().unsqueeze(-1))  # rounding can leave a curvature of -0.0000001
    H = rows.mT @ rows
    diagonal = H.diagonal(dim1=1, dim2=2)
    # The floor makes factorising safe where features are collinear and hardly penalised; it changes the path, never the minimum.
    floor = 20 * torch.finfo(H.dtype).eps * diagonal.sum(-1, keepdim=True)
    diagonal.add_(torch.maximum(ridge, floor.clamp_min(torch.finfo(H.dtype).tiny)))
    return torch.linalg.cholesky(H)


class _Binary:
    """Logistic loss of two classes with one logit z (S, 1, N). State: probability of the wrong class."""

    outputs = 1

    def __init__(self, onehot: Tensor, s: Tensor) -> None:
        self.s, self.flip = s, onehot[:, :1] - onehot[:, 1:]
        self.signed = s * self.flip

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        wrong = self.flip * z
        return (self.s @ softplus(wrong).mT)[:, 0, 0], torch.sigmoid(wrong)

    def residual(self, wrong: Tensor) -> Tensor:
        return self.signed * wrong

    def row_curvature(self, wrong: Tensor) -> Tensor:
        return torch.addcmul(wrong, wrong, wrong, value=-1).mul_(self.s)[:, 0]

    def plane_curvature(self, wrong: Tensor, plane: Tensor, metric: Tensor) -> Tensor:
        metric[..., -wrong.shape[-1] :] = self.row_curvature(wrong).unsqueeze(1)
        plane = plane[:, :, 0]
        return (plane * metric) @ plane.mT


class _Softmax:
    """Cross entropy of K logits z (S, K, N), without classes that a source lacks. State: probabilities."""

    def __init__(self, onehot: Tensor, s: Tensor) -> None:
        self.s, self.onehot, self.absent = s, onehot, ~onehot.any(-1, keepdim=True)
        self.outputs = onehot.shape[1]

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_p = z.masked_fill(self.absent, -torch.inf).log_softmax(1)
        return -(log_p.masked_fill(self.onehot == 0, 0) * self.s).sum((1, 2)), log_p.exp()

    def residual(self, p: Tensor) -> Tensor:
        return self.s * (p - self.onehot)

    def row_curvature(self, p: Tensor) -> Tensor:
        # One matrix has to serve all classes: their mean curvature, without the coupling between classes.
        return self.s[:, 0] * (p * (1 - p)).sum(1) / (self.outputs - 1)

    def plane_curvature(self, p: Tensor, plane: Tensor, metric: Tensor) -> Tensor:
        N = p.shape[-1]
        metric[..., -N:] = self.s * p
        mean = (plane[..., -N:] * p.unsqueeze(1)).sum(2)
        return (plane * metric.unsqueeze(1)).flatten(2) @ plane.flatten(2).mT - (mean * self.s) @ mean.mT
