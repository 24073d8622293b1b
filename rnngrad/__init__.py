"""rnngrad: train RNNs on long-range tasks and see the exact gradient at every time step."""

from pathlib import Path

__version__ = "0.1.0"

# in a clone, tasks/ and conf/ lie beside this package instead of in it
_here = Path(__file__).parent
if not (_here / "tasks").is_dir():
    __path__.append(str(_here.parent))
