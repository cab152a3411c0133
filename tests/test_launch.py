"""The jobs in launch/ start torchrun and the trainer with flags that both of them have."""

import re
import shlex
from collections.abc import Callable

import pytest
import yaml
from torch.distributed.run import get_args_parser

import train
from tests.conftest import ROOT


def job(name: str) -> dict:
    return yaml.safe_load((ROOT / "launch" / name).read_text())


def kubernetes() -> list[str]:
    (replicated,) = job("kubernetes.yaml")["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    return container["command"]


def skypilot() -> list[str]:
    script = re.sub(r"\$SKYPILOT_\w+", "2", job("skypilot.yaml")["run"].replace("\\\n", ""))
    return shlex.split(script)


@pytest.mark.parametrize("command", [kubernetes, skypilot])
def test_commands_have_known_flags(command: Callable[[], list[str]]) -> None:
    torchrun, *words = command()
    assert torchrun == "torchrun"
    options = get_args_parser().parse_args(words)
    flags = train.make_parser().parse_args(options.training_script_args)
    assert options.training_script == "train.py"
    assert (flags.resume, flags.output_dir) == ("auto", "/data/gpt")


def test_the_pods_of_a_job_find_the_first_of_them() -> None:
    content = job("kubernetes.yaml")
    name, (replicated,) = content["metadata"]["name"], content["spec"]["replicatedJobs"]
    pods = replicated["template"]["spec"]
    options = get_args_parser().parse_args(kubernetes()[1:])
    assert options.rdzv_endpoint == f"{name}-{replicated['name']}-0-0.{name}:29500"
    (container,) = pods["template"]["spec"]["containers"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert (options.nnodes, options.nproc_per_node) == (str(pods["parallelism"]), str(gpus))
    assert pods["parallelism"] == pods["completions"]
