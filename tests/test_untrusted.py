"""Values of JSON files are taken only where they have the type and range of their field."""

from dataclasses import dataclass, field

import pytest

from utils.cli import UserError
from utils.files import typed


@dataclass(frozen=True)
class Settings:
    size: int
    rate: float = 0.5
    shape: tuple[int, int] | None = None
    levels: tuple[str, ...] = ()
    on: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")


@dataclass(frozen=True)
class Nested:
    parts: tuple[Settings, ...]
    sums: dict[str, str] = field(default_factory=dict)
    one: Settings | None = None


def test_nested_values() -> None:
    values = {"parts": [{"size": 3}, {"size": 4, "on": True}], "sums": {"a": "b"}, "one": None}
    assert typed(Nested, values) == Nested((Settings(3), Settings(4, on=True)), {"a": "b"})
    assert typed(Nested, {"parts": [], "one": {"size": 3}}).one == Settings(3)
    for wrong, complaint in (
        ({"parts": {}}, "parts must be"),
        ({"parts": [3]}, "parts must be"),
        ({"parts": [{"size": 0}]}, "size must be at least 1, got 0"),
        ({"parts": [], "sums": {"a": 1}}, "sums must be"),
        ({"parts": [], "one": {"colour": 1}}, "'colour' is unknown"),
    ):
        with pytest.raises(UserError, match=complaint):
            typed(Nested, wrong)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"size": 3}, Settings(3)),
        ({"size": 3, "rate": 1}, Settings(3, 1)),
        ({"size": 3, "shape": [2, 4], "levels": ["a"]}, Settings(3, 0.5, (2, 4), ("a",))),
        ({"size": 3, "shape": None, "on": True}, Settings(3, on=True)),
    ],
)
def test_what_fits(values: dict, expected: Settings) -> None:
    assert typed(Settings, values) == expected


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({}, ".*missing.* 'size'"),
        ({"size": "3"}, "size must be int, got '3'"),
        ({"size": 3.0}, r"size must be int, got 3\.0"),
        ({"size": True}, "size must be int, got True"),
        ({"size": 10**20}, "size must be int"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"size": 3, "rate": "x"}, "rate must be float"),
        ({"size": 3, "rate": None}, "rate must be float"),
        ({"size": 3, "on": 1}, "on must be bool"),
        ({"size": 3, "shape": [2]}, "shape must be"),
        ({"size": 3, "shape": [2, [4]]}, "shape must be"),
        ({"size": 3, "levels": [1]}, "levels must be"),
        ({"size": 3, "levels": "ab"}, "levels must be"),
        ({"size": 3, "__class__": "x"}, "'__class__' is unknown"),
        ({"size": 3, "x" * 500: 1}, "'x{79} is unknown"),
    ],
)
def test_what_does_not(values: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=f"^{complaint}"):
        typed(Settings, values)
