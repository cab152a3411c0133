"""Experiment tracking: what scripts log to, first in the output folder, then in MLflow.

`run.py` is what scripts use, `sync.py` keeps the logs on disk, `store.py` calls MLflow.
"""

from utils.tracking.run import Run, continue_run, given_settings, home_of, name_of

__all__ = ["Run", "continue_run", "given_settings", "home_of", "name_of"]
