"""MME in its official layout: two questions per image, answered yes or no, in 14 subtasks.

    MME_Benchmark_release_version/existence/000000006040.jpg, 000000006040.txt ...
    MME_Benchmark_release_version/artwork/images/0.jpg ...  artwork/questions_answers_YN/0.txt ...

Subtasks come in either form. A text file holds two lines, question, tab, Yes or No. Each question ends with
"Please answer yes or no.".

The hub copy lmms-lab/MME (Parquet, split test; question_id "code_reasoning/0020.png", question, answer, image,
category) holds the same questions, two rows per image: samples have the same ids and texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from kvutils.datasets.catalog import missing_data
from kvutils.datasets.hub import holds_parquet, open_rows, picture_at
from kvutils.datasets.samples import YesNoSample
from kvutils.errors import DataError, ParameterError

MME_PERCEPTION = tuple("existence count position color posters celebrity scene landmark artwork OCR".split())
MME_COGNITION = tuple("commonsense_reasoning numerical_calculation text_translation code_reasoning".split())
SUBTASKS = (*MME_PERCEPTION, *MME_COGNITION)
HALLUCINATION = ("existence", "count", "position", "color")  # the subset of the papers on hallucination
GROUPS = {
    "all": SUBTASKS,
    "perception": MME_PERCEPTION,
    "cognition": MME_COGNITION,
    "hallucination": HALLUCINATION,
}
_RELEASE = "MME_Benchmark_release_version"
_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def mme_questions(
    root: str | Path, split: str | Sequence[str] = "all", max_images: int | None = None, suffix: str = ""
) -> Iterator[YesNoSample]:
    """The questions of the named subtasks, subtask by subtask, the two of an image next to each other.

    root: the release folder, the one that holds it, a copy of lmms-lab/MME or "hub". split: a subtask, several, or
    "all", "perception", "cognition", "hallucination" (existence, count, position, color). max_images keeps the first
    images of each subtask. suffix is added to every question. Raises ParameterError for an unknown split, DataError
    for a missing subtask or image and, with file and line number, a malformed line.
    """
    subtasks = mme_subtasks(split)
    if max_images is not None and max_images < 1:
        raise ParameterError(f"max_images must be at least 1, not {max_images}")
    if holds_parquet(root):
        yield from _hub_questions(root, subtasks, max_images, suffix)
        return
    home = _home(Path(root))
    absent = [name for name in subtasks if not (home / name).is_dir()]
    if absent:
        here = [name for name in SUBTASKS if (home / name).is_dir()]
        raise missing_data(
            "mme",
            f"MME {', '.join(absent)}: no such folder in {home}, which holds {', '.join(here)}; extract the "
            "whole release, or name in split= the subtasks to read",
        )
    for subtask in subtasks:
        yield from _subtask_questions(home, subtask, max_images, suffix)


def mme_subtasks(split: str | Sequence[str], known: Sequence[str] = SUBTASKS) -> tuple[str, ...]:
    """The subtasks that a split names, of those `known`, each once; ParameterError for an unknown one."""
    named = [split] if isinstance(split, str) else list(split)
    groups = {name: members for name, members in GROUPS.items() if set(members) <= set(known)}
    groups["all"] = tuple(known)
    unknown = [name for name in named if name not in known and name not in groups]
    if unknown or not named:
        raise ParameterError(
            f"MME has no split {', '.join(map(repr, unknown)) or named}: expected one or several of "
            f"{', '.join(known)}, or {', '.join(sorted(groups))}"
        )
    return tuple(dict.fromkeys(subtask for name in named for subtask in groups.get(name, (name,))))


def _home(root: Path) -> Path:
    places = [root, root / _RELEASE, root / _RELEASE / "MME_Benchmark", root / "MME_Benchmark"]
    for place in places:
        if any((place / subtask).is_dir() for subtask in SUBTASKS):
            return place
    raise missing_data(
        "mme",
        f"no MME data in {root}: expected a folder per subtask, such as {root / _RELEASE / 'existence'} (to be "
        "had on request, see github.com/BradyFU/Awesome-Multimodal-Large-Language-Models)",
    )


def _subtask_questions(
    home: Path, subtask: str, max_images: int | None, suffix: str
) -> Iterator[YesNoSample]:
    folder = home / subtask
    texts, pictures = folder / "questions_answers_YN", folder / "images"
    if not texts.is_dir():
        texts = pictures = folder
    files = sorted(path for path in texts.glob("*.txt"))[:max_images]
    if not files:
        raise missing_data("mme", f"{texts} holds no question files (*.txt): is MME extracted whole?")
    found = {path.stem: path for path in sorted(pictures.glob("*")) if path.suffix.lower() in _PICTURES}
    missing = [path.stem for path in files if path.stem not in found]
    if missing:
        raise missing_data(
            "mme",
            f"MME {subtask}: {len(missing)} of {len(files)} images are missing in {pictures} (first: "
            f"{missing[0]}{_PICTURES[0]}); extract the whole release",
        )
    for path in files:
        name = f"{subtask}/{path.stem}"
        for number, (question, truth) in enumerate(_read_questions(path), start=1):
            yield YesNoSample(f"{name}-{number}", name, found[path.stem], question + suffix, truth, subtask)


def _read_questions(path: Path) -> list[tuple[str, str]]:
    """The two (question, "yes" or "no") of a file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        question, tab, answer = line.rpartition("\t")
        if not tab or not question.strip():
            raise DataError(f"{where}: expected a question, a tab, and Yes or No, found {line!r}")
        found.append((question.strip(), _truth(answer, where)))
    if len(found) != 2:
        raise DataError(f"{path}: expected two questions (lines), found {len(found)}")
    return found


def _truth(answer: str, where: str) -> str:
    truth = answer.strip().rstrip(".").lower()
    if truth not in ("yes", "no"):
        raise DataError(f"{where}: the answer must be Yes or No, found {answer!r}")
    return truth


def _hub_questions(
    root: str | Path, subtasks: Sequence[str], max_images: int | None, suffix: str
) -> Iterator[YesNoSample]:
    """The same questions from the rows of lmms-lab/MME, images in the order of their names."""
    text = ["question_id", "question", "answer", "category"]
    rows = open_rows("mme", root, "test", text, pictures=("image",))
    found: dict[str, dict[str, list[tuple[int, dict]]]] = {}
    for index, row in enumerate(rows.select_columns(text)):
        if not all(isinstance(row[key], str) and row[key].strip() for key in text):
            raise DataError(f"MME, row {index}: {', '.join(text)} must be text, found {row}")
        stem = PurePosixPath(row["question_id"]).stem
        found.setdefault(row["category"], {}).setdefault(stem, []).append((index, row))
    absent = [name for name in subtasks if name not in found]
    if absent:
        raise missing_data("mme", f"MME {', '.join(absent)}: no row of that category among the {len(rows)} in {root}")
    for subtask in subtasks:
        for stem in sorted(found[subtask])[:max_images]:
            pair, name = found[subtask][stem], f"{subtask}/{stem}"
            if len(pair) != 2:
                raise DataError(f"MME {name}: expected two questions (rows), found {len(pair)}; is the copy whole?")
            picture = picture_at(rows, pair[0][0], "image", f"MME {name}")
            for number, (index, row) in enumerate(pair, start=1):
                truth = _truth(row["answer"], f"MME {name}, row {index}")
                yield YesNoSample(f"{name}-{number}", name, picture, row["question"].strip() + suffix, truth, subtask)
