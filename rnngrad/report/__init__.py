"""Figures, tables and one page from runs; and a figure of a backward of a model of one's own."""

from rnngrad.report.command import main
from rnngrad.report.documentation import bench_figure, initial_figure
from rnngrad.report.overview import figure
from rnngrad.report.tape import plot
from rnngrad.report.writing import Written, write

__all__ = ["Written", "bench_figure", "figure", "initial_figure", "main", "plot", "write"]
