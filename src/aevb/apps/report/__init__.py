"""The report of a run: one page of HTML with the figures of its `Summary` and pictures of what they mean."""

from aevb.apps.report.page import write_report

__all__ = ["write_report"]
