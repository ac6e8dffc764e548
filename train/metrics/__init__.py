"""Metrics of reading: CER, WER, confusions, field F1, end-to-end accuracy, with intervals.

`text_report` and `field_report` are the two entries that evaluation uses; every definition stands
in the module that computes it. Free of torch.
"""

from train.metrics.align import EPSILON, edit_distance, edits
from train.metrics.confidence import error_at_coverage, expected_calibration_error
from train.metrics.fields import FieldReport, FieldScores, Scores, anls_score, field_report
from train.metrics.intervals import (
    Interval,
    bootstrap_ratio,
    paired_difference,
    relative_error_reduction,
)
from train.metrics.lines import LineReport, line_report, match_boxes
from train.metrics.normalize import NormalizeOptions, graphemes, normalize, typed_value, words
from train.metrics.text import (
    Confusion,
    ErrorCounts,
    ErrorRate,
    TextReport,
    confusions,
    count_errors,
    text_report,
)
from train.metrics.trees import tree_edit_accuracy

__all__ = [
    "EPSILON",
    "Confusion",
    "ErrorCounts",
    "ErrorRate",
    "FieldReport",
    "FieldScores",
    "Interval",
    "LineReport",
    "NormalizeOptions",
    "Scores",
    "TextReport",
    "anls_score",
    "bootstrap_ratio",
    "confusions",
    "count_errors",
    "edit_distance",
    "edits",
    "error_at_coverage",
    "expected_calibration_error",
    "field_report",
    "graphemes",
    "line_report",
    "match_boxes",
    "normalize",
    "paired_difference",
    "relative_error_reduction",
    "text_report",
    "tree_edit_accuracy",
    "typed_value",
    "words",
]
