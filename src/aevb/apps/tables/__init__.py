"""Verbs on tables whose columns are of different kinds: what they hold, what is odd in them, what their holes hold."""

from aevb.apps.tables.drawing import sample_file
from aevb.apps.tables.filling import encode_file, impute_file
from aevb.apps.tables.kinds import inspected, kinds_of, print_schema, set_aside
from aevb.apps.tables.scoring import score_file, score_quietly

__all__ = [
    "encode_file",
    "impute_file",
    "inspected",
    "kinds_of",
    "print_schema",
    "sample_file",
    "score_file",
    "score_quietly",
    "set_aside",
]
