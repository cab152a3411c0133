"""The laboratory notebook: what scripts do with MLflow, which is imported nowhere else, and late.

`run.py` is what scripts use, and `gateway.py` alone imports MLflow. Behind it `store.py` and
`registry.py` say what goes where; all else either keeps what is logged in the output folder or
passes it on.
"""

from utils.addresses import OUTPUT_TAG, fetch
from utils.tracking.run import Run, continue_run, home_of
from utils.tracking.store import experiment_of

__all__ = ["OUTPUT_TAG", "Run", "continue_run", "experiment_of", "fetch", "home_of"]
