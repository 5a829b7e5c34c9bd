"""How the questions of a benchmark are put to a model: the forms of data/prompts.yaml, which says where each is from."""

from collections.abc import Sequence

import yaml

from kvutils import data_folder
from kvutils.errors import one_of

_FORMS = yaml.safe_load((data_folder() / "prompts.yaml").read_text(encoding="utf-8"))


def put(prompts: str, benchmark: str, question: str, subtask: str = "", letters: Sequence[str] = ()) -> str:
    """A published question as a form asks it. letters: of its choices. ParameterError for an unknown form."""
    one_of("form of prompts", prompts, _FORMS)
    form = _FORMS[prompts]["questions"].get(benchmark, {})
    before = form.get("before", "") if subtask in form.get("subtasks", [subtask]) else ""
    return before.format(letters=", ".join(letters)) + question.replace(form.get("without", ""), "") + form.get("after", "")
