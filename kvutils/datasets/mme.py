"""MME in its official layout (data/catalog.yaml): two questions per image, answered yes or no, in 14 subtasks.

Subtasks come in either form. A text file holds two lines, question, tab, Yes or No. Each question ends with "Please answer yes or no.".

The hub copy lmms-lab/MME (Parquet, split test; question_id "code_reasoning/0020.png", question, answer, image,
category) holds the same questions, two rows per image: samples have the same ids and texts."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from kvutils.datasets.catalog import missing_data
from kvutils.datasets.files import every, expect, find, limits, read_lines, some_of, visible
from kvutils.datasets.hub import holds_parquet, open_rows, picture_at
from kvutils.datasets.samples import YesNoSample
from kvutils.datasets.wording import put
from kvutils.errors import DataError, one_of

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
HALLUCINATION = PERCEPTION[:4]  # the subset of the papers on hallucination
SUBTASKS = PERCEPTION + COGNITION
GROUPS = {"all": SUBTASKS, "perception": PERCEPTION, "cognition": COGNITION, "hallucination": HALLUCINATION}
_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
# subtask, stem of the file names, picture, (question, answer, where) of the two questions, how an error about them begins
_Pair = tuple[str, str, Path | Callable[[], Image.Image], list[tuple[str, str, str]], str]


def mme_questions(root: str | Path, split: str | Sequence[str] = "all", max_images: int | None = None,
                  prompts: str = "paper") -> Iterator[YesNoSample]:  # fmt: skip
    """The questions of the named subtasks, subtask by subtask, the two of an image next to each other.

    root: the release folder, the one that holds it, a copy of lmms-lab/MME or "hub". split: a subtask, several, or
    "all", "perception", "cognition", "hallucination" (existence, count, position, color). max_images keeps the first
    images of each subtask. prompts: the form in which they are asked, see `wording`. Raises ParameterError for an unknown split, DataError
    for a missing subtask or image and, with file and line number, a malformed line."""
    subtasks = mme_subtasks(split)
    limits(max_images=max_images)
    for subtask, stem, picture, pair, expected in (_hub_pairs if holds_parquet(root) else _file_pairs)(root, subtasks, max_images):
        name = f"{subtask}/{stem}"
        for number, (question, truth) in enumerate(_checked(pair, expected), start=1):
            yield YesNoSample(f"{name}-{number}", name, picture, put(prompts, "mme", question), truth, subtask)


def mme_subtasks(split: str | Sequence[str], known: Sequence[str] = SUBTASKS) -> tuple[str, ...]:
    """The subtasks that a split names, of those `known`, each once; ParameterError for an unknown one."""
    groups = {name: members for name, members in GROUPS.items() if set(members) <= set(known)} | {"all": tuple(known)}
    named = some_of("split of MME", split, (*known, *groups))
    return tuple(dict.fromkeys(subtask for name in named for subtask in groups.get(name, (name,))))


def _file_pairs(root: str | Path, subtasks: Sequence[str], max_images: int | None) -> Iterator[_Pair]:
    release = Path(root) / "MME_Benchmark_release_version"
    homes = [release, release / "MME_Benchmark", Path(root) / "MME_Benchmark", Path(root)]
    home = find("mme", *(place / subtask for place in homes for subtask in SUBTASKS)).parent
    here = [name for name in SUBTASKS if (home / name).is_dir()]
    if absent := [name for name in subtasks if name not in here]:
        raise missing_data("mme", f"MME {', '.join(absent)}: no such folder in {home}, which holds {', '.join(here)}; extract the whole "
                                  "release, or name in split= the subtasks to read")  # fmt: skip
    for subtask in subtasks:
        folder = home / subtask
        texts, pictures = folder / "questions_answers_YN", folder / "images"
        if not texts.is_dir():
            texts = pictures = folder
        files = every("mme", texts, "*.txt", ", files of questions: is MME extracted whole?")
        found = {path.stem: path for path in visible(pictures.glob("*")) if path.suffix.lower() in _PICTURES}
        if missing := [path.stem for path in files if path.stem not in found]:
            raise missing_data("mme", f"MME {subtask}: {len(missing)} of the {len(files)} images in {pictures} are missing (first: "
                                      f"{missing[0]}.jpg)")  # fmt: skip
        if lost := sorted(found.keys() - {path.stem for path in files}):
            raise missing_data("mme", f"MME {subtask}: {len(lost)} of the {len(found)} files of questions in {texts} are missing (first: {lost[0]}.txt)")
        for path in files[:max_images]:
            pair = [(*line.rpartition("\t")[::2], where) for where, line in read_lines(path)]
            yield subtask, path.stem, found[path.stem], pair, f"{path}: expected two lines of a question, a tab, and Yes or No"


def _checked(pair: Sequence[tuple[str, str, str]], expected: str) -> list[tuple[str, str]]:
    """(question, "yes" or "no") of the two (question, answer, where) about an image. Raises DataError."""
    expect(len(pair) == 2, f"{expected}, found {len(pair)}; is the data set whole?")
    found = []
    for question, answer, where in pair:
        truth = answer.strip().rstrip(".").lower()
        expect(question.strip(), f"{where}: there is no question before the answer {answer!r}")
        one_of(f"answer in {where}", truth, ("yes", "no"), DataError)
        found.append((question.strip(), truth))
    return found


def _hub_pairs(root: str | Path, subtasks: Sequence[str], max_images: int | None) -> Iterator[_Pair]:
    """The same from the rows of lmms-lab/MME, images in the order of their names."""
    text = ["question_id", "question", "answer", "category"]
    rows = open_rows("mme", root, "test", text, pictures=("image",))
    found: dict[str, dict[str, list[tuple[int, dict]]]] = {}
    for index, row in enumerate(rows.select_columns(text)):
        expect(all(isinstance(row[key], str) for key in text), f"MME, row {index}: {', '.join(text)} must be text, found {row}")
        found.setdefault(row["category"], {}).setdefault(PurePosixPath(row["question_id"]).stem, []).append((index, row))
    if absent := [name for name in subtasks if name not in found]:
        raise missing_data("mme", f"MME {', '.join(absent)}: no row of that category among the {len(rows)} in {root}")
    for subtask in subtasks:
        for stem in sorted(found[subtask])[:max_images]:
            name = f"{subtask}/{stem}"
            pair = [(row["question"], row["answer"], f"MME {name}, row {index}") for index, row in found[subtask][stem]]
            picture = picture_at(rows, found[subtask][stem][0][0], "image", f"MME {name}")
            yield subtask, stem, picture, pair, f"MME {name}: expected two rows"
