"""The diagnosis of a run, from what lies in its directory."""

from __future__ import annotations

from rnngrad.diagnosis.detectors import examine
from rnngrad.diagnosis.evidence import Evidence
from rnngrad.diagnosis.findings import Diagnosis
from rnngrad.runs import Run


def diagnose_run(run: Run) -> Diagnosis:
    """What is wrong with a run, if anything, from its files as they are now.

    Takes milliseconds; whatever is missing because the run was cut short, or has measured less, is
    reported as unknown.

    Args:
        run: A run, also one that still goes on.
    """
    return examine(Evidence.of_run(run))
