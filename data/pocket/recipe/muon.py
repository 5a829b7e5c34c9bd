"""Muon in float32, matrices of one shape together, shared out among the processes that train."""

from collections import defaultdict

import torch
import torch.distributed as dist


def orthogonalise(matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> torch.Tensor:
    """Newton-Schulz iteration of `torch.optim.Muon` on (n, rows, columns) at once, in their own precision."""
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, orthogonalised in float32.

    torch's own iterates in bfloat16, one matrix after the other. A CPU that only emulates bfloat16 spends a third of a
    training step of the pocket model in there. State and options are torch's. Where several processes train, each
    orthogonalises its share of the matrices and all get all of them: gradients are equal on all of them by then."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.param_groups:
            alike: dict[tuple, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    momentum = state.setdefault("momentum_buffer", torch.zeros_like(parameter.grad))
                    momentum.lerp_(parameter.grad, 1 - group["momentum"])
                    alike[parameter.shape].append((parameter, parameter.grad.lerp(momentum, group["momentum"])))
            for shape, found in alike.items():
                wanted = torch.stack([update for _, update in found])
                updates = torch.zeros_like(wanted)
                updates[rank::ranks] = orthogonalise(wanted[rank::ranks], group["ns_coefficients"], group["ns_steps"], group["eps"])
                if ranks > 1:
                    dist.all_reduce(updates)  # the others' are zero here: bit for bit what one process computes
                rate = 0.2 * max(shape) ** 0.5 * group["lr"]
                for (parameter, _), update in zip(found, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)
        return loss
