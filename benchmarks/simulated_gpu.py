"""A GPU that is simulated on the CPU, to tell the host's share of a run's seconds from the GPU's.

    with SimulatedGPU() as gpu:
        scores = torch.randn(8, 4).to("cuda") @ weights.to("cuda")
    gpu.host, gpu.device  # CPU seconds

Tensors that would live on the GPU carry a mark and say so of themselves (`device`, `is_cuda`), so that code which asks goes the
GPU's way; they are computed with on the CPU. A torch function of marked tensors, or of a `device=` that names the GPU, is
device time, with all that it calls, and its tensors are marked. Copies between marked and plain tensors, `tolist` and
everything else (Python, numpy, PIL, scipy, torch without marked tensors) are host time. What CUDA refuses is refused:
tensors of two places in one function, `numpy` of a marked one. Not in it: the launch of a kernel (count `launches`, 5 to 10
microseconds of the host each), waiting for the GPU, the bus (a copy takes what it takes within main memory).
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
MOVES = ("to", "cpu", "cuda", "as_tensor", "tensor", "asarray")  # functions that take values from one place to another
MIXED = (*MOVES, "copy_", "__getitem__", "__setitem__", "index_put_", "__get__", "__set__", "new_tensor",
         "_has_compatible_shallow_copy_type")  # may have tensors of both
CARD = {"get_device_properties": lambda *_: SimpleNamespace(total_memory=80 * 2**30), "memory_allocated": lambda *_: 0,
        "mem_get_info": lambda *_: (80 * 2**30, 80 * 2**30), "synchronize": lambda *_: None}  # fmt: skip


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for each in values for tensor in _tensors(each)]


def on_gpu(tensor: torch.Tensor) -> bool:
    """Does it carry the mark?"""
    return "simulated" in tensor.__dict__


def _place(value) -> torch.device | None:
    """The device that an argument names, if it does."""
    if isinstance(value, torch.Tensor):
        return CUDA if on_gpu(value) else CPU
    return torch.device(value) if isinstance(value, (str, torch.device)) else None


class SimulatedGPU(TorchFunctionMode):
    """See the module. `restart` sets the clock to zero; `host` and `device` are CPU seconds since, for one thread."""

    def __init__(self):
        super().__init__()
        self._patches = ExitStack()
        self._unseen = 0.0  # seconds of a call that this class costs beside what it measures itself
        self.restart()

    def __enter__(self):
        self._patches.enter_context(mock.patch.multiple(torch.cuda, **CARD))
        super().__enter__()
        one = torch.zeros(1)
        self.restart()
        for _ in range(5000):
            one.dim()
        with_this = time.process_time() - self._start - self._own
        with torch._C.DisableTorchFunction():
            start = time.process_time()
            for _ in range(5000):
                one.dim()
        self._unseen = max(0.0, (with_this - (time.process_time() - start)) / 5000)
        self.restart()
        return self

    def __exit__(self, *exception):
        self._patches.close()
        return super().__exit__(*exception)

    def restart(self) -> None:
        self.device, self.calls, self.launches, self._own, self._start = 0.0, 0, 0, 0.0, time.process_time()

    @property
    def host(self) -> float:
        """All seconds less the device's, and less what this class takes itself."""
        return time.process_time() - self._start - self.device - self.overhead

    @property
    def overhead(self) -> float:
        return self._own + self.calls * self._unseen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        entered, kwargs = time.process_time(), dict(kwargs or {})
        self.calls += 1
        name, given = func.__name__, _tensors([args, kwargs])
        marked = [on_gpu(each) for each in given]
        there = any(marked)
        if there and not all(each or not tensor.ndim or name in MIXED for each, tensor in zip(marked, given, strict=True)):
            raise RuntimeError(f"{name}: tensors on the GPU and tensors on the CPU")
        if there and name in ("numpy", "__array__"):
            raise TypeError(f"{name}: the tensor is on the GPU")
        if name == "__get__" and func.__self__.__name__ in ("device", "is_cuda", "is_cpu"):
            value = {"device": CUDA, "is_cuda": True, "is_cpu": False}[func.__self__.__name__] if there else func(*args)
            self._own += time.process_time() - entered
            return value

        named = {"cpu": CPU, "cuda": CUDA}.get(name) or _place(kwargs.get("device", kwargs.get("other")))
        if name == "to":
            named = next((place for place in map(_place, args[1:]) if place), named)
            args = (args[0], *(CPU if isinstance(each, (str, torch.device)) else each for each in args[1:]))
        if "device" in kwargs:
            kwargs["device"] = kwargs["device"] and CPU
        if name == "cuda":
            func, args, kwargs = torch.Tensor.cpu, args[:1], {}
        becomes_marked = named.type == "cuda" if named else there
        moved = name in MOVES and (becomes_marked != marked[0] if given else becomes_marked)
        into_plain = name in ("copy_", "__setitem__") and there and not marked[0]
        crosses = moved or (name == "copy_" and any(marked) != all(marked)) or into_plain or (name == "tolist")

        start = time.process_time()
        result = func(*args, **kwargs)
        if moved and given and result is given[0]:
            result = result.clone()  # within one memory nothing needs to be copied; between two it does
        end = time.process_time()

        found = [] if into_plain else _tensors(result)
        if becomes_marked:
            for each in found:
                each.simulated = True
            if name == "__set__":  # parameter.data = ...
                args[0].simulated = True
        elif moved:
            for each in found:
                each.__dict__.pop("simulated", None)
        if (there or becomes_marked) and not crosses:
            self.device += end - start
            self.launches += bool(found)
        self._own += start - entered + time.process_time() - end
        return result
