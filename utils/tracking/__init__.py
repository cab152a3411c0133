"""The laboratory notebook: what scripts do with MLflow, which is imported nowhere else, and late.

`run.py` is what scripts use; `store.py` and `registry.py` talk to MLflow; all else either keeps
what is logged in the output folder or passes it on.
"""

from utils.tracking.run import OUTPUT_TAG, Run, continue_run, home_of
from utils.tracking.store import experiment_of, fetch

__all__ = ["OUTPUT_TAG", "Run", "continue_run", "experiment_of", "fetch", "home_of"]
