"""What a user gains and loses, on one page: measured, drawn, and kept as numbers."""

from wina.report.compare import Comparison, compare_runs, read_run
from wina.report.document import Report
from wina.report.measure import ReportSettings, make_report
from wina.report.page import render

__all__ = [
    "Comparison",
    "Report",
    "ReportSettings",
    "compare_runs",
    "make_report",
    "read_run",
    "render",
]
