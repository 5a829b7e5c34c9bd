"""The static site, for a reader without a kernel: `make site` -> build/site/.

README and the other texts, the executed notebooks, every comparison (REPORT.md), API pages from the docstrings, and the explorer with
the data of a few pictures built in. Nothing is loaded from elsewhere, so every page also opens from the disk."""

import argparse
import base64
import json
import pkgutil
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import mistune
import nbformat
import numpy as np
import pdoc
import pdoc.render
from mistune.toc import add_toc_hook
from nbconvert import HTMLExporter
from PIL import Image
from sklearn.datasets import load_sample_images
from tqdm import tqdm

import kvutils
from kvutils.checkpoints import original_encoder
from kvutils.datasets.pocket.world import render, sample_scene
from kvutils.errors import ParameterError
from kvutils.explorer.widget import Explorer
from kvutils.readout.features import FeatureExtractor
from kvutils.readout.words import POCKET_NAMES
from kvutils.run.report import repository

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/pocket/README.md", "benchmarks/README.md", "benchmarks/RESULTS.md",
         "benchmarks/VERDICTS.md", "data/results/pocket/pocket/REPORT.md",
         *(path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("data/pocket/*/README.md"))))  # fmt: skip
PAGES = {"index.html": "kvutils", "explorer.html": "Explorer", "notebooks.html": "Notebooks", "data/results/pocket/pocket/REPORT.html": "Every comparison",
         "api/kvutils.html": "API"}  # fmt: skip
BAR = """<style>
.site { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; padding: .7rem 1rem; border-bottom: 1px solid #d0d7de; font: 15px system-ui, sans-serif; background: #f6f8fa }
.site a { color: #0550ae } .site a[aria-current] { font-weight: 600; color: inherit; text-decoration: none }
</style>"""
STYLE = """\
body { font: 16px/1.55 system-ui, sans-serif; color: #1f2328; background: #fff; margin: 0 }
main { max-width: 60rem; margin: 0 auto; padding: 1rem }
a { color: #0550ae } img { max-width: 100% } h1, h2 { border-bottom: 1px solid #d0d7de; padding-bottom: .2em } h1, h2, h3 { line-height: 1.25 }
pre, code { font: 14px ui-monospace, monospace; background: #f6f8fa; border-radius: 4px } code { padding: .1em .3em } pre { padding: .8rem; overflow: auto } pre code { padding: 0 }
.table { overflow-x: auto } table { border-collapse: collapse; font-size: 14px } th, td { border: 1px solid #d0d7de; padding: .3rem .6rem; text-align: left; vertical-align: top }
blockquote { margin-left: 0; padding-left: 1rem; border-left: 4px solid #d0d7de; color: #57606a }
"""
MARK = ".nojekyll"  # tells the host to serve the files as they are, and this script that the folder is its own
SCENES = 2  # generated, in the explorer page, beside scikit-learn's two photographs


def navigation(page: str) -> str:
    up = "../" * page.count("/")
    links = (f'<a href="{up}{path}"{" aria-current=page" if path == page else ""}>{title}</a>' for path, title in PAGES.items())
    return f'<div class="site" role="navigation" aria-label="site">{"".join(links)}</div>'


def page_of(page: str, title: str, body: str) -> str:
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{mistune.escape(title)}</title><style>{STYLE}</style></head>\n<body>{BAR}{navigation(page)}<main>{body}</main></body></html>\n")


def write(out: Path, page: str, text: str) -> None:
    (out / page).parent.mkdir(parents=True, exist_ok=True)
    (out / page).write_text(text, encoding="utf-8")


def page_name(text: str) -> str:
    """The page of a Markdown file or notebook of the repository."""
    return "index.html" if text == "README.md" else re.sub(r"\.(md|ipynb)$", ".html", text)


class Renderer(mistune.HTMLRenderer):
    """Links lead to pages of the site, to files beside them, or to the public repository; without an address they are plain text."""

    def __init__(self, source: str, pages: set[str], address: str, out: Path):
        super().__init__(escape=False)
        self.source, self.pages, self.address, self.out = source, pages, address, out

    def link(self, text: str, url: str, title: str | None = None) -> str:
        target = self._target(url)
        return super().link(text, target, title) if target else text

    def image(self, text: str, url: str, title: str | None = None) -> str:
        path = (ROOT / self.source).parent / url
        if not urlsplit(url).scheme:
            shown = self.out / path.resolve().relative_to(ROOT)
            shown.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, shown)
        return super().image(text, url, title)

    def _target(self, url: str) -> str | None:
        parts = urlsplit(url)
        if parts.scheme or not parts.path:
            return url
        path = ((ROOT / self.source).parent / parts.path).resolve()
        name, anchor = path.relative_to(ROOT).as_posix(), f"#{parts.fragment}" if parts.fragment else ""
        if name == "notebooks":
            name = "notebooks.html"
        if name in self.pages or name == "notebooks.html":
            return "../" * page_name(self.source).count("/") + page_name(name) + anchor
        kind = "tree" if path.is_dir() else "blob"
        return f"{self.address}/{kind}/main/{name}{anchor}" if self.address else None


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"<[^>]+>", "", heading).lower()).strip().replace(" ", "-")


def texts(out: Path, pages: set[str], address: str) -> None:
    for source in (name for name in TEXTS if name in pages):
        markdown = mistune.create_markdown(renderer=Renderer(source, pages, address, out), plugins=["table", "strikethrough", "url"])
        add_toc_hook(markdown, 1, 6, lambda token, index: slug(token["text"]))
        found = (ROOT / source).read_text(encoding="utf-8")
        title = re.search(r"^# (.+)$", found, re.MULTILINE)
        body = re.sub(r"<table>.*?</table>", r'<div class="table" tabindex="0">\g<0></div>', markdown(found), flags=re.DOTALL)  # scrolls alone
        write(out, page_name(source), page_of(page_name(source), title[1] if title else source, body))


def notebooks(out: Path) -> list[str]:
    exporter = HTMLExporter(template_name="lab", mathjax_url="", require_js_url="", mermaid_js_url="", jquery_url="", widget_renderer_url="")
    listed = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        found = nbformat.read(path, as_version=4)
        page = f"notebooks/{path.stem}.html"
        text = exporter.from_notebook_node(found)[0]
        # the template's mermaid loader asks a network for its code, even where no diagram is
        text = re.sub(r'<script type="module">(?:(?!</script>).)*mermaid(?:(?!</script>).)*</script>', "", text, flags=re.DOTALL)
        text = re.sub(r"(<body[^>]*>)", lambda match, page=page: match[1] + BAR + navigation(page), text, count=1)
        text = re.sub(r'href="(\.\./[^":#]+|[^"/:#]+)\.(?:md|ipynb)(#[^"]*)?"', r'href="\1.html\2"', text)
        write(out, page, text)
        heading = re.search(r"^# (.+)$", "".join(found.cells[0].source), re.MULTILINE)
        listed.append(f'<li><a href="{page}">{mistune.escape(heading[1] if heading else path.stem)}</a></li>')
    write(out, "notebooks.html", page_of("notebooks.html", "Notebooks", f"<h1>Notebooks, as they were run</h1><ul>{''.join(listed)}</ul>"))
    return listed


def api(out: Path) -> None:
    """A page of every module from its docstrings. The face's names are loaded first: they are when they are used."""
    for name in kvutils.__all__:
        getattr(kvutils, name)
    pdoc.render.configure(docformat="markdown", show_source=False, search=True)
    rooms = [f"kvutils.{each.name}" for each in pkgutil.iter_modules(kvutils.__path__) if each.name != "__main__"]  # __all__ hides them
    pdoc.pdoc("kvutils", *rooms, output_directory=out / "api")
    for path in (out / "api").rglob("*.html"):
        page = path.relative_to(out).as_posix()
        write(out, page, re.sub(r'(<main class="pdoc">)', lambda match, page=page: match[1] + BAR + navigation(page), path.read_text(encoding="utf-8"), count=1))


def built_in(name: str, explorer: Explorer, texts: Sequence[str]) -> dict:
    """All that the page is asked of one picture, from the messages of the widget itself: similarity of every token to every token
    (a byte each), colours, maps of some texts."""
    def floats(op: str, **params: object) -> np.ndarray:
        return np.frombuffer(explorer.answer(op, {"panel": 0, **params})[1][0], "<f4")

    about, buffers = explorer.answer("open")
    panel = about["panels"][0]
    panel |= {"title": name, "interventions": False, "can_ask": False}
    found: dict = {"name": name, "about": about, "open": list(map(coded, buffers)), "similar": {}, "colours": {}, "words": {}}
    for source in panel["sources"]:
        source["heads"] = None  # a map for each head of each layer would be too much for a page
        for layer in source["layers"] or [None]:
            which = {"source": source["name"], "layer": layer, "head": None}
            key = source["name"] if layer is None else f"{source['name']}.{layer}"
            none = np.full(panel["tokens"], np.nan)  # newline tokens are like nothing
            cosines = np.stack([none if newline else floats("similar", token=token, **which) for token, newline in enumerate(buffers[-1])])
            found["similar"][key] = coded(np.where(np.isnan(cosines), -128, np.rint(127 * np.nan_to_num(cosines))).astype(np.int8).tobytes())
            found["colours"][key] = coded(explorer.answer("colours", {"panel": 0, **which})[1][0])
            with suppress(ParameterError):  # features without a text side
                found["words"][key] = {text: coded(floats("words", text=text, **which).tobytes()) for text in texts}
    return found


def coded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def explorer_page(out: Path) -> None:
    extractor = FeatureExtractor(kvutils.load_mlm("pocket"), encoder_original=kvutils.load_encoder(original_encoder("pocket")))
    shown = {f"generated scene {i + 1}": Image.fromarray(render(sample_scene(np.random.default_rng(i))).image) for i in range(SCENES)}
    shown |= {Path(name).stem: Image.fromarray(image) for name, image in zip(*(load_sample_images()[key] for key in ("filenames", "images")), strict=True)}
    pictures = [built_in(name, kvutils.explore(extractor, image), POCKET_NAMES) for name, image in shown.items()]
    able = " or ".join(source["label"] for source in pictures[0]["about"]["panels"][0]["sources"]
                       if any(key.split(".")[0] == source["name"] for key in pictures[0]["words"]))  # fmt: skip
    data = json.dumps({"pictures": pictures, "texts": POCKET_NAMES, "able": able}, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    room = ROOT / "kvutils" / "explorer"
    code = "\n".join(path.read_text(encoding="utf-8") for path in (room / "explorer.js", ROOT / ".ci" / "site_explorer.js"))
    write(out, "explorer.html", page_of("explorer.html", "Explorer", f"""<h1>What is like the token you click?</h1>
<p>The image tokens of the pocket model, a small model trained in this repository. Click the picture: every token is coloured by how similar its
features are to those of the token under the pointer; choose features and layers. This page has no kernel: questions, attention and blocked keys
need <code>kv.explore</code> in JupyterLab or Colab, as in notebook 00.</p>
<p><label>Picture: <select id="picture"></select></label></p><div id="explorer"></div>
<style>{(room / "explorer.css").read_text(encoding="utf-8")}</style><script type="application/json" id="data">{data}</script>
<script type="module">{code}</script>"""))


def main() -> int:
    chosen = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    chosen.add_argument("--out", type=Path, default=ROOT / "build" / "site", help="folder to write (default: build/site)")
    out = chosen.parse_args().out.resolve()
    if out.exists() and not (out / MARK).exists() and any(out.iterdir()):
        sys.exit(f"{out} holds something else than a site; name an empty folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    write(out, MARK, "")
    pages = {*(name for name in TEXTS if (ROOT / name).exists()), *(f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb"))}
    steps = {"texts": lambda: texts(out, pages, repository(ROOT)), "notebooks": lambda: notebooks(out), "API": lambda: api(out),
             "explorer": lambda: explorer_page(out)}  # fmt: skip
    for name in (bar := tqdm(steps, "site")):
        bar.set_postfix_str(name)
        steps[name]()
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {sum(1 for _ in out.rglob('*.html'))} pages, {size / 1e6:.1f} MB; open {out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
