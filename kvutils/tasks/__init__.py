"""The six perception tasks of the paper's section 3.1: samples -> features -> scores per item and source."""

from kvutils.tasks.base import Row, ScoreTable, Task, run_task, summarise
from kvutils.tasks.co_segmentation import CoSegmentation
from kvutils.tasks.foreground_segmentation import ForegroundSegmentation
from kvutils.tasks.referring_segmentation import ReferringSegmentation
from kvutils.tasks.semantic_correspondence import SemanticCorrespondence
from kvutils.tasks.semantic_segmentation import SemanticSegmentation, SemanticSegmentationProbe
from kvutils.tasks.temporal_correspondence import TemporalCorrespondence

__all__ = [
    "CoSegmentation",
    "ForegroundSegmentation",
    "ReferringSegmentation",
    "Row",
    "ScoreTable",
    "SemanticCorrespondence",
    "SemanticSegmentation",
    "SemanticSegmentationProbe",
    "Task",
    "TemporalCorrespondence",
    "run_task",
    "summarise",
]
