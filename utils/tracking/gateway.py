"""MLflow itself: its client, and calls of it in plain types. No other file imports it; late."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from utils import addresses
from utils.addresses import MLFLOW as ADDRESSES  # noqa: F401
from utils.addresses import open_client  # noqa: F401

AT_ONCE = 1000  # numbers in a call; MLflow takes no more


class Point(NamedTuple):
    """A number of a run.

    Attributes:
        key: its name.
        value: NaN and infinities are numbers, too.
        when: milliseconds since 1970.
        step: of the training.
        model_id: of the logged model that it is a figure of; None: of none.
        dataset_name, dataset_digest: of the data that it was measured on, as far as they are known.
    """

    key: str
    value: float
    when: int
    step: int
    model_id: str | None = None
    dataset_name: str | None = None
    dataset_digest: str | None = None


def existing_run(client: Any, run_id: str) -> Any:
    return addresses.find_run(run_id, client)


def find_run(client: Any, run_id: str) -> Any:
    """An MLflow run; None for "", or one that is not in this store."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def send_params(client: Any, run_id: str, params: dict[str, object]) -> None:
    """Log settings."""
    from mlflow.entities import Param

    params = [Param(key, str(value)) for key, value in params.items()]
    client.log_batch(run_id, params=params)


def send_points(client: Any, run_id: str, points: Iterable[Point]) -> None:
    """Log numbers, however many."""
    from mlflow.entities import Metric

    metrics = [Metric(*point) for point in points]
    for start in range(0, len(metrics), AT_ONCE):
        client.log_batch(run_id, metrics=metrics[start : start + AT_ONCE])


def send_inputs(
    client: Any, run_id: str, data_sets: Iterable[tuple[str, str]], models: Iterable[str]
) -> None:
    """Log what a run learns from: data sets, by path and SHA-256, and models, by id."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput

    tags = [InputTag("mlflow.data.context", "training")]
    digest_length = 36  # MLflow takes no more
    inputs = [
        DatasetInput(Dataset(Path(path).name, sha256[:digest_length], "local", path), tags)
        for path, sha256 in data_sets
    ]
    client.log_inputs(run_id, inputs, [LoggedModelInput(model_id) for model_id in models])


def send_output(client: Any, run_id: str, model_id: str, step: int) -> None:
    """Log that a run made a model."""
    from mlflow.entities import LoggedModelOutput

    client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])


def small_copy(image: Image.Image) -> Image.Image:
    """The small picture that MLflow's lists show in place of a picture."""
    from mlflow.tracking.multimedia import compress_image_size

    return compress_image_size(image)


def is_refusal(error: Exception) -> bool:
    """Whether MLflow is there and will never take it, as when the run was deleted meanwhile."""
    status = getattr(error, "get_http_status_code", lambda: 0)()
    return 400 <= status < 500 and status not in (408, 429)  # those two ask to try again
