"""The GPU that benchmarks/bench_host.py simulates: which place a tensor says it is in, and whose seconds are counted."""

import time

import numpy as np
import pytest
import torch
from simulated_gpu import SimulatedGPU, on_gpu


@pytest.fixture
def gpu():
    with SimulatedGPU() as simulated:
        yield simulated


ON_GPU = {
    "arithmetic": lambda x: x * 2 + 1,
    "named tuple": lambda x: x.sort(dim=1).indices,
    "iteration": lambda x: next(iter(x.split(1))),
    "view": lambda x: x.mT[0],
    "factory of its device": lambda x: torch.zeros(3, device=x.device),
    "factory like it": lambda x: x.new_zeros(3),
    "conversion": lambda x: x.to(torch.float64),
    "moved to another's place": lambda x: torch.ones(2).to(x),
    "function of the library": lambda x: torch.nn.functional.interpolate(x[None, None], size=(4, 6), mode="bilinear"),
    "module": lambda x: torch.nn.Linear(3, 2).to("cuda")(x),
    "index of the CPU": lambda x: x[torch.tensor([1, 0])],
    "half of a plain one": lambda x: torch.ones(2).half().to(device="cuda"),
}
ON_CPU = {
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu", torch.float64),
    "to another's place": lambda x: x.to(torch.ones(2)),
    "plain": lambda x: torch.ones(2) + 1,
    "part of a plain one set": lambda x: torch.ones(2, 3).copy_(x),
    "list": lambda x: torch.tensor(x.tolist()),
    "no scalar": lambda x: torch.ones(2) * float(x.sum()),
}


@pytest.mark.parametrize(("made", "place"), [*((each, "cuda") for each in ON_GPU), *((each, "cpu") for each in ON_CPU)])
def test_place(gpu, made, place):
    plain = torch.rand(2, 3)
    found = (ON_GPU | ON_CPU)[made](plain.to("cuda"))
    assert (found.device.type, found.is_cuda, on_gpu(found)) == (place, place == "cuda", place == "cuda")
    assert plain.device.type == "cpu"


@pytest.mark.parametrize(("made", "error"), [
    (lambda x: x.numpy(), TypeError), (np.asarray, TypeError), (lambda x: x + torch.ones(3), RuntimeError),
    (lambda x: torch.stack([x[0], torch.ones(3)]), RuntimeError)])  # fmt: skip
def test_refuses_what_cuda_refuses(gpu, made, error):
    with pytest.raises(error, match="GPU"):
        made(torch.rand(2, 3).to("cuda"))


def test_values_are_those_of_the_cpu(gpu):
    x = torch.arange(6.0).reshape(2, 3)
    assert torch.equal((x.to("cuda") @ x.to("cuda").T).cpu(), x @ x.T)
    moved = x.to("cuda")
    moved += 1
    assert x[0, 0] == 0  # a copy, not the same memory


@pytest.mark.parametrize(("work", "share"), [
    (lambda x, there: there @ there, "device"), (lambda x, there: x @ x, "host"), (lambda x, there: np.sort(x.numpy().ravel()), "host"),
    (lambda x, there: [there.cpu() for _ in range(20)], "host"), (lambda x, there: [x.to("cuda") for _ in range(20)], "host"),
    (lambda x, there: torch.nn.functional.interpolate(there[None, None], scale_factor=4, mode="bicubic"), "device"),
])  # fmt: skip
def test_whose_seconds(gpu, work, share):
    x = torch.rand(1000, 1000)
    there = x.to("cuda")
    gpu.restart()
    start = time.process_time()
    work(x, there)
    taken = time.process_time() - start
    seconds = {"device": gpu.device, "host": gpu.host}
    other = seconds["host" if share == "device" else "device"]
    assert seconds[share] == pytest.approx(taken, rel=0.1)
    assert other < 0.1 * taken


def test_its_own_seconds_are_not_the_hosts(gpu):
    there, hosts = torch.zeros(1).to("cuda"), []
    for _ in range(5):  # other work on the machine can only add to one of them
        gpu.restart()
        for _ in range(5000):
            there.add(1)
        assert gpu.launches == 5000
        hosts.append(abs(gpu.host))
    assert min(hosts) < 5000 * 2e-6  # of about 50 ms in all
