"""Reproduce: methods side by side, models x methods x sparsities, on the same text."""

from wina.reproduce.grid import Cell, GridSettings, reproduce
from wina.reproduce.report import write_report

__all__ = ["Cell", "GridSettings", "reproduce", "write_report"]
