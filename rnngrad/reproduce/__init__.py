"""Published experiments, run again: what was measured beside what was published.

An experiment is a set-up in conf/experiment/ and a module in ``rnngrad.reproduce.experiments`` with
its criteria. What is kept of its runs are rows of plain numbers; verdicts, figures and the page
docs/results.md are functions of these, so that everybody can follow them without running anything.
"""

from rnngrad.reproduce.experiment import Criterion, Experiment, Published, Quick, Rows, Seen

__all__ = ["Criterion", "Experiment", "Published", "Quick", "Rows", "Seen"]
