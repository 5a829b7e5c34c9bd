"""The paper's tasks: samples -> scores per item.

The six perception tasks of section 3.1 go from features to scores per source, the question tasks (POPE, MME)
from answers to scores per subset.
"""

from kvutils.tasks.base import Row, ScoreTable, Task, run_task, summarise
from kvutils.tasks.co_segmentation import CoSegmentation
from kvutils.tasks.foreground_segmentation import ForegroundSegmentation
from kvutils.tasks.mme import Mme
from kvutils.tasks.pope import Pope
from kvutils.tasks.referring_segmentation import ReferringSegmentation
from kvutils.tasks.semantic_correspondence import SemanticCorrespondence
from kvutils.tasks.semantic_segmentation import SemanticSegmentation, SemanticSegmentationProbe
from kvutils.tasks.temporal_correspondence import TemporalCorrespondence
from kvutils.tasks.yes_no import YesNoTask, compare_answers, run_questions, summarise_answers

__all__ = [
    "CoSegmentation",
    "ForegroundSegmentation",
    "Mme",
    "Pope",
    "ReferringSegmentation",
    "Row",
    "ScoreTable",
    "SemanticCorrespondence",
    "SemanticSegmentation",
    "SemanticSegmentationProbe",
    "Task",
    "TemporalCorrespondence",
    "YesNoTask",
    "compare_answers",
    "run_questions",
    "run_task",
    "summarise",
    "summarise_answers",
]
