"""The static site as a reader without a kernel meets it, opened from the disk."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[2]


class Page(HTMLParser):
    """What a page points to, loads, and can be pointed at."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors.update(found[name] for name in ("id", "name") if found.get(name))
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        self.loaded += [found["src"]] if found.get("src") else [found["href"]] if tag == "link" and found.get("rel") == "stylesheet" else []


@pytest.fixture(scope="module")
def site(chromium, tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, ROOT / ".ci" / "site.py", "--out", out], check=True, capture_output=True)
    return out


def test_every_link_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for url in page.links + page.loaded:
            parts = urlsplit(url)
            if parts.scheme:
                assert parts.scheme in ("http", "https", "data"), (path, url[:80])
                assert url not in page.loaded or parts.scheme == "data", (path, url[:80])
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if parts.fragment.endswith(".__init__"):  # pdoc links constructors that a class has from another one
                continue
            there = target.exists() and (not parts.fragment or target not in pages or
                                        pages[target].anchors & {parts.fragment, unquote(parts.fragment)})
            broken += [] if there else [f"{path.relative_to(site)}: {url}"]
    assert broken == []


def test_the_first_page_shows_the_verdicts(site, new_page, shots):
    page = new_page()
    page.goto((site / "index.html").as_uri())
    words = page.locator("table td strong").all_inner_texts()
    assert {"present", "cannot appear here"} <= set(words)
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    page.screenshot(path=shots / "site_index.png")
    page.get_by_role("link", name="API", exact=True).click()
    assert "load_mlm" in page.locator("main").inner_text()


def test_a_click_without_a_kernel(site, new_page, shots):
    page = new_page()
    page.goto((site / "explorer.html").as_uri())
    page.wait_for_selector(".kvx-panel[data-drawn]")
    drawn = lambda: int(page.locator(".kvx-panel").get_attribute("data-drawn"))  # noqa: E731
    info = lambda: page.locator(".kvx-info").inner_text()  # noqa: E731

    def colours():
        return page.locator(".kvx-map").evaluate("c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 997 == 0)")

    before, seen = drawn(), colours()
    box = page.locator(".kvx-stack").bounding_box()
    page.mouse.click(box["x"] + 0.1 * box["width"], box["y"] + 0.9 * box["height"])
    page.wait_for_function(f"document.querySelector('.kvx-panel').dataset.drawn > {before}")
    assert info().endswith("value +1.00") and colours() != seen  # the token is most like itself
    page.screenshot(path=shots / "site_explorer.png", full_page=True)
    page.get_by_label("map", exact=True).select_option("words")
    page.get_by_label("words", exact=True).fill("fish")
    page.get_by_label("words", exact=True).press("Enter")
    page.wait_for_function("document.querySelector('.kvx').innerText.includes('score of the words')")
    page.get_by_label("words", exact=True).fill("zebra")
    page.get_by_label("words", exact=True).press("Enter")
    page.wait_for_function("document.querySelector('[role=status]').innerText.includes('fish, bird')")
    assert not page.get_by_text("Block image keys").is_visible() and not page.get_by_text("Ask", exact=True).first.is_visible()
    page.get_by_label("Picture:").select_option(index=2)
    page.wait_for_function("document.querySelector('.kvx-panel')?.innerText.includes('px')")
    assert re.search(r"china|flower", page.locator(".kvx").inner_text())
    page.screenshot(path=shots / "site_explorer_photo.png", full_page=True)
