"""Typed reading of a TOML file: a table knows where it stands, so that an error can say so."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class TableError(ValueError):
    """What a file has and should not have, and where."""


class Table:
    """A table; every key is read once, and `end` refuses those that nothing has read.

    Args:
        values: as the TOML reader gives them.
        file: in errors.
        path: the names of the tables around it, and its own.
    """

    def __init__(self, values: Mapping[str, Any], file: str, path: tuple[str, ...] = ()) -> None:
        self._values, self._file, self._path = values, file, path
        self._read: list[str] = []

    @property
    def name(self) -> str:
        return self._path[-1]

    def error(self, key: str, text: str) -> TableError:
        where = f"[{'.'.join(self._path)}]" if self._path else "outside of any table"
        return TableError(f"{self._file}, {where}: {key!r} {text}")

    def is_list(self, key: str) -> bool:
        return isinstance(self._values.get(key), list)

    def text(self, key: str, known: Iterable[str] = ()) -> str:
        """A text; if `known` names any, one of those."""
        value = self._value(key, str, "a text")
        self._check(key, [value], known)
        return str(value)

    def texts(self, key: str, known: Iterable[str] = ()) -> tuple[str, ...]:
        """A list of texts; if `known` names any, of those."""
        values = self._value(key, list, "a list of texts")
        for value in values:
            if not isinstance(value, str):
                raise self.error(key, f"has {value!r}; it must be a list of texts")
        self._check(key, values, known)
        return tuple(values)

    def flag(self, key: str) -> bool:
        return bool(self._value(key, bool, "true or false"))

    def table(self, key: str) -> Table:
        return Table(self._value(key, dict, "a table"), self._file, (*self._path, key))

    def tables(self, key: str) -> list[Table]:
        """The tables within a table."""
        outer = self.table(key)
        return [outer.table(name) for name in outer._values]

    def all_texts(self) -> dict[str, str]:
        """A table of nothing but texts."""
        return {name: self.text(name) for name in self._values}

    def end(self) -> None:
        """TableError for a key that nothing has read, with what it may be meant for."""
        for key in self._values:
            if key not in self._read:
                close = difflib.get_close_matches(key, self._read, 1)
                hint = f"; do you mean {close[0]!r}?" if close else ""
                raise self.error(key, f"is not known here{hint}")

    def _value(self, key: str, kind: type, words: str) -> Any:
        self._read.append(key)
        if key not in self._values:
            # A misspelled key is told as such, not as the absence of the right one.
            self._hint_at(key)
            raise self.error(key, "is missing")
        if not isinstance(self._values[key], kind):
            raise self.error(key, f"is {self._values[key]!r}; it must be {words}")
        return self._values[key]

    def _hint_at(self, key: str) -> None:
        left = [name for name in self._values if name not in self._read]
        for name in difflib.get_close_matches(key, left, 1):
            raise self.error(name, f"is not known here; do you mean {key!r}?")

    def _check(self, key: str, values: list[str], known: Iterable[str]) -> None:
        allowed = list(known)
        for value in values:
            if allowed and value not in allowed:
                raise self.error(key, f"has {value!r}; there is {', '.join(allowed)}")
