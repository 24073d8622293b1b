"""What is wrong with a run or a model, with evidence, and what to try.

``diagnose_run`` reads a run's directory; ``diagnose`` looks at a model of one's own before it is
trained. docs/diagnosis.md says what each symptom means and where its threshold is from.
"""

from rnngrad.diagnosis.before_training import diagnose
from rnngrad.diagnosis.findings import Diagnosis, Finding, Remedy
from rnngrad.diagnosis.from_run import diagnose_run
from rnngrad.diagnosis.thresholds import Threshold, clip_thresholds, pascanu_range

__all__ = [
    "Diagnosis",
    "Finding",
    "Remedy",
    "Threshold",
    "clip_thresholds",
    "diagnose",
    "diagnose_run",
    "pascanu_range",
]
