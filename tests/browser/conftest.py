"""A Chromium for the tests marked `browser`, and the repository's files on a server of this machine alone.

Screenshots of what the tests saw are kept in a folder that is named at the end, or in $KVUTILS_SCREENSHOTS."""

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
         "--disable-sync").split()  # fmt: skip
SHOTS, MEASURED = pytest.StashKey[Path](), pytest.StashKey[list]()


@pytest.fixture(scope="session")
def chromium(request):
    """A headless Chromium with a fresh profile."""
    if os.environ.get("KVUTILS_BROWSER") != "1":
        pytest.skip("browser tests run by `make test-browser` (KVUTILS_BROWSER=1)")
    from playwright.sync_api import sync_playwright

    found = os.environ.get("KVUTILS_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        pytest.fail(f"no browser found: install one of {', '.join(NAMES)}, or set KVUTILS_CHROMIUM to its path", pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def shots(request, tmp_path_factory):
    named = os.environ.get("KVUTILS_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    request.config.stash[SHOTS] = folder
    return folder


@pytest.fixture(scope="session")
def measured(request):
    """Lines that are printed at the end: what was measured, not asserted."""
    return request.config.stash.setdefault(MEASURED, [])


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash.get(MEASURED, []):
        terminalreporter.write_line(line)
    if SHOTS in config.stash:
        terminalreporter.write_line(f"screenshots: {config.stash[SHOTS]}")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Nothing: the tests' output is not for requests."""


@pytest.fixture(scope="session")
def served():
    """The address below which the repository's files lie."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(ROOT)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def new_page(chromium):
    """(width, height, scheme) -> an empty page of a fresh profile; an error in any of them fails the test."""
    errors, contexts = [], []

    def opened(width=1200, height=1000, scheme="light"):
        contexts.append(chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []
