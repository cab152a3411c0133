"""What the machine does during a training: load and memory of CPU and GPUs, disk, network."""

import contextlib
import threading
from collections.abc import Callable

import psutil
import torch

SECONDS = 10  # between samples


def sample() -> dict[str, float]:
    """Figures of this moment, by the names that MLflow gives to them."""
    memory, disk = psutil.virtual_memory(), psutil.disk_usage("/")
    values = {
        "cpu_utilization_percentage": psutil.cpu_percent(),  # since the sample before
        "system_memory_usage_percentage": memory.percent,
        "system_memory_usage_megabytes": memory.used / 1e6,
        "process_memory_usage_megabytes": psutil.Process().memory_info().rss / 1e6,
        "disk_usage_percentage": disk.percent,
        "disk_available_megabytes": disk.free / 1e6,
        **sample_gpus(),
    }
    if network := psutil.net_io_counters():  # None on a machine without a network
        values["network_receive_megabytes"] = network.bytes_recv / 1e6
        values["network_transmit_megabytes"] = network.bytes_sent / 1e6
    return values


def sample_gpus() -> dict[str, float]:
    """Figures of the GPUs: of this process alone where nvidia-ml-py is not installed."""
    values: dict[str, float] = {}
    numbers = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    for number in numbers:
        used = torch.cuda.memory_reserved(number)
        try:
            values[f"gpu_{number}_utilization_percentage"] = torch.cuda.utilization(number)
            used = torch.cuda.device_memory_used(number)
        except (ImportError, RuntimeError):
            pass  # it does not say
        values[f"gpu_{number}_memory_usage_megabytes"] = used / 1e6
    return values


class SystemMetrics:
    """Samples in a thread of its own, which ends with `close` or with the process."""

    def __init__(self, log: Callable[[dict[str, float]], object]) -> None:
        """Start; `log` is given each sample, and must not wait for a server."""
        self._log = log
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No sample comes after this."""
        self._closing.set()
        self._thread.join()

    def _work(self) -> None:
        with contextlib.suppress(OSError, psutil.Error):  # a machine that does not say
            while not self._closing.wait(SECONDS):
                self._log(sample())
