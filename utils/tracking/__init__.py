"""Experiment tracking: what scripts log to, first in the output folder, then in MLflow.

`run.py` is what scripts use; `opening.py` and `store.py` hold all calls of MLflow; `sync.py` keeps
the logs on disk and sends them.
"""

from utils.tracking.opening import experiment_of, given_settings, name_of
from utils.tracking.run import Run, continue_run, home_of

__all__ = ["Run", "continue_run", "experiment_of", "given_settings", "home_of", "name_of"]
