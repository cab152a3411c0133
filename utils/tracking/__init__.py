"""Experiment tracking: what scripts log to, first in the output folder, then in MLflow.

`run.py` is what scripts use; `store.py` holds all calls of MLflow; `sync.py` keeps the logs on disk
and sends them.
"""

from utils.tracking.run import Run, continue_run, home_of
from utils.tracking.store import experiment_of

__all__ = ["Run", "continue_run", "experiment_of", "home_of"]
