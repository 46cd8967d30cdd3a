from importlib.metadata import EntryPoint

import pytest

from wina.errors import UsageError
from wina.registry import Registry


def registry() -> Registry[int]:
    made: Registry[int] = Registry("fruit", "fruits")
    made.add("apple", 1)
    made.add("banana", 2)
    return made


def test_names_are_sorted_and_found() -> None:
    assert list(registry()) == ["apple", "banana"]
    assert registry().get("banana") == 2


def test_an_unknown_name_brings_a_suggestion_and_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown fruit 'aple'. Did you mean 'apple'\?") as error:
        registry().get("aple")
    assert "apple, banana" in str(error.value)
    with pytest.raises(UsageError, match=r"unknown fruit 'xyz'\. Known:"):
        registry().get("xyz")


def test_a_taken_name_is_refused_and_the_same_object_is_not() -> None:
    made: Registry[object] = Registry("thing", "things")
    entry = object()
    assert made.add("one", entry) is entry
    assert made.add("one", entry) is entry
    with pytest.raises(UsageError, match="already registered"):
        made.add("one", object())


def test_entry_points_are_loaded_once_and_never_replace_what_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def entry_points(group: str) -> list[EntryPoint]:
        asked.append(group)
        return [
            EntryPoint("pi", "math:pi", group),
            EntryPoint("apple", "math:e", group),
        ]

    monkeypatch.setattr("wina.registry.entry_points", entry_points)
    made = registry()
    assert made.get("pi") == pytest.approx(3.14159, abs=1e-5)
    assert made.get("apple") == 1
    assert list(made) == ["apple", "banana", "pi"]
    assert asked == ["wina.fruits"]
