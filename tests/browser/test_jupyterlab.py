"""The explorer in JupyterLab, with a kernel and the pocket model, as a reader meets it."""

import base64
import io
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kvutils.datasets.pocket.sets import pocket_scene

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.browser, pytest.mark.slow]
START = """import time
import kvutils as kv
mlm, other = kv.load_mlm("pocket"), kv.load_mlm("pocket", untrained=True)
began = time.perf_counter()"""
FOLDERS = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")
SETTINGS = {"apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}


class Lab:
    """A JupyterLab server of this machine, in a folder of its own with no settings of the user."""

    def __init__(self, folder):
        self.folder, self.token = folder, secrets.token_hex(16)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.settle(SETTINGS)
        own = dict.fromkeys(FOLDERS, str(folder / "own"))
        environment = os.environ | own | {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.log = open(folder / "lab.log", "w+")  # noqa: SIM115 (as long as the server)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={self.port}",
             f"--IdentityProvider.token={self.token}", f"--ServerApp.root_dir={folder}"],
            env=environment, cwd=folder, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{self.address('api')}?token={self.token}", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                assert self.process.poll() is None, self.said()
                time.sleep(0.25)
        self.stop()
        raise AssertionError(self.said())

    def settle(self, settings):
        for name, found in settings.items():
            path = self.folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found))

    def address(self, path):
        return f"http://127.0.0.1:{self.port}/{path}"

    def said(self):
        self.log.seek(0)
        return self.log.read()[-3000:]

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()  # which ends its kernels, too
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def lab(chromium, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    for index in range(2):
        pocket_scene("keys", index).image.save(folder / f"scene{index}.png")
    server = Lab(folder)
    yield server
    server.stop()


@pytest.fixture
def notebook(lab, new_page, shots, request):
    """(name, last lines, page's settings) -> the page of a notebook in which all cells were run."""

    def opened(name, code, theme="JupyterLab Light", height=1500, **how):
        lab.settle({"apputils-extension/themes": {"theme": theme}})
        empty = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
        cells = [empty | {"id": f"cell-{i}", "source": source} for i, source in enumerate((START, code))]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        (lab.folder / f"{name}.ipynb").write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
        page = new_page(height=height, **how)
        pages.append(page)
        page.set_default_timeout(60_000)
        page.goto(lab.address(f"lab/tree/{name}.ipynb?token={lab.token}&reset"))
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        for _ in range(20):  # JupyterLab refuses, in a dialog or in silence, while it is not yet connected to the kernel
            page.keyboard.press("Escape")
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
            page.wait_for_timeout(1500)
            if re.search(r"\[(\*|\d+)\]", page.locator(".jp-InputPrompt").first.inner_text()):
                break
        page.locator(".kvx-panel[data-drawn]").first.wait_for(timeout=180_000)  # the kernel's first import of torch
        return page

    pages = []
    yield opened
    for page in pages:
        page.screenshot(path=shots / f"last_of_{request.node.name}.png")


def quiet(page):
    page.wait_for_function("document.querySelector('.kvx').getAttribute('aria-busy') === 'false'")


def image(page, layer="map", panel=0):
    """(height, width, 4) of a panel's canvas."""
    data = page.locator(f".kvx-{layer}").nth(panel).evaluate("(canvas) => canvas.toDataURL().split(',')[1]")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))


TIMED = """async () => { const stack = document.querySelector('.kvx-stack'), panel = document.querySelector('.kvx-panel'), took = [];
  for (let i = 0; i < 10; i++) { const box = stack.getBoundingClientRect(), before = panel.dataset.drawn, start = performance.now();
    stack.dispatchEvent(new PointerEvent('pointerdown', { clientX: box.x + box.width * (0.04 + i / 12), clientY: box.y + box.height * 0.1 }));
    while (panel.dataset.drawn === before) await new Promise((done) => requestAnimationFrame(done));
    took.push(performance.now() - start); }
  return took; }"""


def test_click_ask_block_upload(notebook, lab, shots, measured):
    page = notebook("one", 'explored = kv.explore(mlm, "scene0.png")\nprint(f"{time.perf_counter() - began:.2f} s")\nexplored')
    opened = page.locator(".jp-OutputArea-output pre").get_by_text(re.compile(r"^\s*[\d.]+ s\s*$")).inner_text().strip()
    shown, original = image(page, "picture")[..., :3].astype(float), np.asarray(Image.open(lab.folder / "scene0.png").convert("RGB"), float)
    middle = (np.arange(96) * len(shown) // 96) + len(shown) // 192
    assert np.abs(shown[middle][:, middle] - original).mean() < 6  # JPEG of it
    page.locator(".kvx-stack").scroll_into_view_if_needed()
    took = page.evaluate(TIMED)
    measured.append(f"pocket model in JupyterLab: kv.explore {opened}, click to redrawn {np.median(took):.0f} ms (median of ten)")
    first = image(page)
    assert (first[..., 3] == 255).all() and len(np.unique(first.reshape(-1, 4), axis=0)) > 50
    assert "row 1, column" in page.locator(".kvx-info").inner_text() and page.locator(".kvx-info").inner_text().endswith("value +1.00")
    page.locator(".kvx-stack").focus()
    page.keyboard.press("]")  # a letter of the notebook's command mode as well: "m" would make the cell Markdown
    quiet(page)
    page.keyboard.press("m")
    quiet(page)
    assert page.locator(".kvx-layer").inner_text() == "7" and page.get_by_label("map", exact=True).input_value() == "colours"
    assert page.locator(".jp-MarkdownCell").count() == 0 and not np.array_equal(image(page), first)
    page.get_by_label("map", exact=True).select_option("words")
    page.get_by_label("words", exact=True).fill("bird")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('.kvx-unit').innerText.startsWith('score of the words')")

    page.get_by_label("question").fill("is there a bird ?")
    page.get_by_label("options").fill("yes, no")
    page.keyboard.press("Enter")
    page.locator(".kvx-bars").wait_for()
    answer = page.locator(".kvx-card p").inner_text()
    assert answer in ("yes", "no") and page.locator(".kvx-word").all_inner_texts()[:4] == ["is", "there", "a", "bird"]
    page.locator(".kvx-word").last.click()
    page.wait_for_function("document.querySelector('.kvx-unit').innerText.includes('of it on the image')")
    assert "attention weight" in page.locator(".kvx-unit").inner_text() and image(page)[..., 3].max() == 255
    page.screenshot(path=shots / "lab_attention.png")

    page.get_by_label("box").check()
    page.locator(".kvx-stack").scroll_into_view_if_needed()
    box = page.locator(".kvx-stack").bounding_box()
    page.mouse.move(box["x"] + 2, box["y"] + 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] - 2, steps=3)
    page.mouse.up()
    page.wait_for_function("document.querySelector('.kvx-unit').innerText.includes('144 keys per layer and head')")
    page.get_by_role("button", name="Block and ask again").click()
    page.get_by_text("with keys blocked").first.wait_for()
    rows = page.locator(".kvx-bars").evaluate("(table) => [...table.rows].map((row) => [...row.cells].map((cell) => cell.textContent))")
    before, after, change = (float(text.split()[0].replace("−", "-")) for text in rows[1][1:])
    assert abs(after - before - change) < 0.11 and abs(change) > 1  # blind, the model answers otherwise
    assert page.locator(".kvx-card p").first.inner_text() == answer
    page.locator(".kvx").screenshot(path=shots / "lab_blocked.png")
    page.get_by_role("button", name="Copy code").click()
    page.wait_for_function("document.querySelector('.kvx-code').innerText.includes('kv.KeySelection(')")

    photo = np.kron(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8), np.ones((100, 100, 1), np.uint8))
    Image.fromarray(photo).save(lab.folder / "photo.jpg", quality=90)  # 12 megapixels
    start = time.perf_counter()
    page.locator(".kvx input[type=file]").set_input_files(lab.folder / "photo.jpg")
    page.locator(".kvx h4", has_text="photo.jpg").wait_for()
    quiet(page)
    measured.append(f"a 12-megapixel photo: upload to drawn {time.perf_counter() - start:.2f} s")
    assert image(page, "picture").shape[:2] == (768, 1024)
    (lab.folder / "broken.png").write_bytes(b"\x89PNG nothing")
    page.locator(".kvx input[type=file]").set_input_files(lab.folder / "broken.png")
    page.locator(".kvx-error").wait_for()
    assert "broken.png is no picture" in page.locator(".kvx-status").inner_text() and page.locator(".kvx h4").inner_text().startswith("photo.jpg · pocket")
    page.screenshot(path=shots / "lab_error.png")
    page.get_by_role("button", name="Close", exact=True).click()
    page.get_by_text("run the cell again").wait_for()


def test_two_pictures_dark_and_narrow(notebook, shots):
    page = notebook("two", 'kv.explore(mlm, ["scene0.png", "scene1.png"])', theme="JupyterLab Dark")
    quiet(page)
    assert [text.split(" · ")[0] for text in page.locator(".kvx h4").all_inner_texts()] == ["scene0.png", "scene1.png"]
    dark = page.evaluate("getComputedStyle(document.querySelector('.kvx')).backgroundColor").removeprefix("rgb(").split(",")[0]
    assert int(dark) < 60
    page.locator(".kvx-stack").first.click(position={"x": 20, "y": 20})
    quiet(page)
    maps = [image(page, panel=panel) for panel in (0, 1)]
    assert all((each[..., 3] == 255).all() for each in maps) and not np.array_equal(*maps)
    page.locator(".kvx").screenshot(path=shots / "lab_two_dark.png")
    page.set_viewport_size({"width": 480, "height": 900})
    page.wait_for_function("""(() => { const [a, b] = [...document.querySelectorAll('.kvx-stack')].map((e) => e.getBoundingClientRect());
        return b.top > a.bottom; })()""")
    page.screenshot(path=shots / "lab_narrow.png")


def test_two_models_and_views_that_go(notebook, shots):
    page = notebook("models", 'explored = kv.explore([mlm, other], "scene0.png")\nexplored')
    quiet(page)
    assert page.locator(".kvx h4").count() == 2
    page.get_by_label("question").fill("is there a bird ?")
    page.get_by_label("options").fill("yes, no")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelectorAll('.kvx-bars').length === 2")
    page.locator(".kvx").screenshot(path=shots / "lab_two_models.png")
    page.locator(".jp-CodeCell").last.locator(".cm-content").click()
    page.keyboard.press("Control+A")
    page.keyboard.type("print('still held' if any(panel._read for panel in explored.panels) else 'freed')")
    page.keyboard.press("Control+Enter")  # the cell's output goes, and the view with it
    page.locator(".jp-OutputArea-output pre", has_text=re.compile("freed|still held")).wait_for()
    page.keyboard.press("Control+Enter")
    page.locator(".jp-OutputArea-output pre", has_text="freed").wait_for()


def test_a_kernel_that_was_restarted(notebook):
    page = notebook("restarted", 'kv.explore(mlm, "scene0.png")')
    quiet(page)
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_role("menuitem", name=re.compile("^Restart Kernel…")).click()
    page.locator(".jp-Dialog .jp-mod-accept").click()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.get_by_label("question").fill("is there a bird ?")
    page.keyboard.press("Enter")
    page.locator(".kvx-error").wait_for()
    assert page.locator(".kvx-status").inner_text().startswith("The kernel that read this picture is gone; run the cell again")
