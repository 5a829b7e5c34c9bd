"""Runs that are killed, share a folder or run in several processes end with the bytes of one left in peace; memory."""

import multiprocessing
import os
import random
import signal
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from filelock import Timeout
from PIL import Image

from kvutils.answer import answer_all
from kvutils.datasets.samples import Episode, LabelledImage, YesNoSample
from kvutils.errors import MemoryLimitError, StoreError
from kvutils.kvcache import capture
from kvutils.readout.attention import attention_mass
from kvutils.readout.features import FeatureExtractor
from kvutils.readout.selections import select_all
from kvutils.store import Parts, code_version, write_json
from kvutils.tasks.base import run_task
from kvutils.tasks.foreground_segmentation import ForegroundSegmentation
from kvutils.tasks.key_blocking import NONE, ask_under_blocks
from kvutils.tasks.key_table import measure_keys
from kvutils.tasks.yes_no import Pope
from kvutils.vision import in_halves
from tests.tiny_models import tiny_pocket

KILLS = 10
QUESTIONS = ["is the fish on the left", "what colour is the car"]
FORK = multiprocessing.get_context("fork")  # the model and the imports are there at once


@pytest.fixture(scope="module")
def mlm():
    code_version()  # remembered by the processes that are started
    mlm = tiny_pocket()
    mlm.model.generation_config.eos_token_id = list(range(0, len(mlm.tokenizer), 3))  # after a few words, not at the limit
    return mlm


def images(count: int) -> list[LabelledImage]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    mask = np.repeat(np.arange(32)[:, None] < 16, 32, axis=1).astype(np.uint8)
    return [LabelledImage(f"image{i}", Image.fromarray(one), mask) for i, one in enumerate(pixels)]


class Logged(Parts):
    """Writes down what this process computes."""

    def __init__(self, root, log: Path):
        super().__init__(root, model="tiny")
        self.log = log

    def save(self, key, value, seconds=0.0):
        with self.log.open("a") as file:
            file.write(f"{os.getpid()} {key}\n")
        super().save(key, value, seconds)


def measure(mlm, folder: Path, out: Path, pause: float = 0) -> None:
    """Merged variances, per-item scores and answers of a small run; what every notebook does, in `folder`."""
    parts = Logged(folder / "parts", folder / "log")
    samples = images(12)

    def slowly(sample: LabelledImage):
        time.sleep(pause)
        return sample.image

    keys = [LabelledImage(s.id, lambda s=s: slowly(s), s.mask) for s in samples]
    table = measure_keys(mlm, keys, QUESTIONS, parts, chunk=2, progress=False)
    episodes = [Episode(f"e{i}", i % 2, "fish", 0, samples[i], tuple(samples[i - 2 : i])) for i in range(2, 8)]
    extractor = FeatureExtractor(mlm)
    scores = run_task(ForegroundSegmentation(episodes), extractor, parts, progress=False, chunk=1)
    asked = [YesNoSample(f"{s.id}-{k}", s.id, s.image, text, "yes" if k else "no", "random")
             for s in samples[:6] for k, text in enumerate(QUESTIONS)]  # fmt: skip
    block = select_all(range(2), mlm.num_kv_heads, table.variance.shape[-1])
    answers = ask_under_blocks(Pope(asked), mlm, {NONE: None, "all": block}, parts, chunk=1, progress=False).texts
    numbers = {name: getattr(table, name) for name in ("variance", "norm", "mass", "foreground")}
    write_json(out, {"keys": numbers, "scores": vars(scores), "answers": answers})


def start(mlm, folder: Path, out: Path, pause: float = 0) -> multiprocessing.Process:
    folder.mkdir(exist_ok=True)
    process = FORK.Process(target=measure, args=(mlm, folder, out, pause))
    process.start()
    return process


@pytest.fixture(scope="module")
def undisturbed(mlm, tmp_path_factory):
    """(bytes of the results, keys of the parts) of a run of its own."""
    folder = tmp_path_factory.mktemp("undisturbed")
    start(mlm, folder, folder / "results.json").join()
    log = [line.split(" ", 1)[1] for line in (folder / "log").read_text().splitlines()]
    assert len(log) == len(set(log)) == 6 + 6 + 6, "not made of parts"
    return (folder / "results.json").read_bytes(), log


def stored(folder: Path) -> list[Path]:
    return list(folder.rglob("parts/**/*.safetensors"))


@pytest.mark.slow
def test_killed_at_random_points(mlm, undisturbed, tmp_path):
    """SIGKILL at `KILLS` random moments: at most the part in flight is lost, and the results are the same bytes."""
    expected, keys = undisturbed
    left = []
    for number in range(KILLS):
        folder, chance = tmp_path / str(number), random.Random(number)
        process, some = start(mlm, folder, folder / "results.json"), chance.randrange(len(keys))
        while process.is_alive() and len(stored(folder)) < some:  # not by the clock: another machine is slower, or busy
            time.sleep(0.01)
        process.join(chance.uniform(0, 0.05))
        process.kill()
        process.join()
        begun = len((folder / "log").read_text().splitlines()) if (folder / "log").exists() else 0
        left.append(len(stored(folder)))
        assert begun - left[-1] in (0, 1)
        start(mlm, folder, folder / "results.json").join()
        assert (folder / "results.json").read_bytes() == expected
        made = len((folder / "log").read_text().splitlines()) - begun
        assert made == len(keys) - left[-1]  # only what was not stored is computed again
    assert len(set(left)) > KILLS // 4, f"the kills came at {left} stored parts: too much alike to show anything"


def test_processes_share_the_work(mlm, undisturbed, tmp_path):
    expected, keys = undisturbed
    outs = [tmp_path / f"{i}.json" for i in range(3)]
    running = [start(mlm, tmp_path / "run", out, pause=0.05) for out in outs]
    for process in running:
        process.join()
    assert [out.read_bytes() for out in outs] == [expected] * 3
    log = [line.split(" ", 1) for line in (tmp_path / "run" / "log").read_text().splitlines()]
    assert sorted(key for _, key in log) == sorted(keys), "every part once, by somebody"
    assert len({pid for pid, _ in log}) == 3, "everybody did some"


def test_the_part_of_a_dead_process_is_done_by_another(mlm, undisturbed, tmp_path):
    expected, _ = undisturbed
    first = start(mlm, tmp_path / "run", tmp_path / "first.json", pause=1.0)  # holds the lock of its first part for seconds
    time.sleep(0.5)
    second = start(mlm, tmp_path / "run", tmp_path / "second.json")
    time.sleep(0.5)
    os.kill(first.pid, signal.SIGKILL)
    second.join(60)
    assert second.exitcode == 0 and (tmp_path / "second.json").read_bytes() == expected


def test_a_part_that_cannot_be_written_stops_the_run_and_keeps_the_others(tmp_path, monkeypatch):
    parts, made = Parts(tmp_path, x=1), []
    jobs = [(f"part/{i}", lambda i=i: made.append(i) or {"i": i}) for i in range(3)]
    save = Parts.save

    def full(self, key, value, seconds=0.0):
        if key == "part/1":
            raise StoreError("part/1 could not be written (No space left on device)")
        save(self, key, value, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "save", full)
        with pytest.raises(StoreError, match="No space left"):
            list(parts.make_all(jobs))
    assert [one["i"] for one in parts.make_all(jobs)] == [0, 1, 2] and made == [0, 1, 1, 2]
    parts.path("part/2").write_bytes(parts.path("part/2").read_bytes()[:-3])  # a damaged one is computed again
    assert [one["i"] for one in parts.make_all(jobs)] == [0, 1, 2] and made == [0, 1, 1, 2, 2]


@contextmanager
def small_memory(mlm, most: int):
    """A device on which the vision tower can take `most` images at once: it fails as CUDA does, and here is how often."""
    failed = []

    def check(module, args, kwargs):
        if len(args[0] if args else next(iter(kwargs.values()))) > most:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    hook = mlm.model.model.vision_tower.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield failed
    finally:
        hook.remove()


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 3])
def test_batches_shrink_to_the_memory(mlm, most, caplog):
    pictures = [sample.image for sample in images(7)]

    def read():
        answers = list(answer_all(mlm, [(f"{i}", one, QUESTIONS) for i, one in enumerate(pictures)]))
        texts = [(name, [answer.text for answer in found["none"]]) for name, found in answers]
        return capture(mlm, pictures), attention_mass(mlm, pictures, QUESTIONS), texts

    whole = read()
    with small_memory(mlm, most) as failed:
        small = read()
    assert failed and "taken in halves" in caplog.text and whole[2] == small[2]
    torch.testing.assert_close(whole[1], small[1])
    for one, other in zip(whole[0], small[0], strict=True):
        torch.testing.assert_close((one.values, one.encoder), (other.values, other.encoder))


def test_an_image_that_does_not_fit_says_what_to_do(mlm):
    with pytest.raises(MemoryLimitError, match="one image does not fit.*20.00 GiB.*smaller model"), small_memory(mlm, 0):
        capture(mlm, [images(1)[0].image])


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="shape"):
        in_halves(lambda items: torch.zeros(2).view(3), [1, 2])


@pytest.mark.parametrize("raised", [NotImplementedError("no such operator on this device"), Timeout("another lock")])
def test_what_a_part_raises_is_not_taken_for_a_lock(tmp_path, raised):
    """torch raises NotImplementedError, and a download within the part may wait for a lock of its own."""
    parts = Parts(tmp_path, x=1)
    with pytest.raises(type(raised)) as error:
        list(parts.make_all([("part", Mock(side_effect=raised)), ("next", lambda: 1)]))
    assert error.value is raised and list(parts.make_all([("part", lambda: 0)])) == [0]  # the lock was given back
