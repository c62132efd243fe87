"""YAML text to plain values, and on which line each stands.

Narrower than YAML 1.1 on purpose: keys are text as written, `no` and `1:30:00` are text too (so that fields judge
them), a key that is given twice is an error and not silently the last one, and no tag makes objects. Anchors work
as long as they don't bite their own tail.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from rm.errors import InvalidSpec

Path = tuple[str, ...]
MOST_CHARACTERS = 2**20
MOST_VALUES = 100_000
"""Values in all, each use of an anchor counted: a few lines could stand for billions."""


@dataclass(frozen=True, slots=True)
class Document:
    """`value`: dicts, lists, text, numbers, booleans and None. `lines`: of each key, by its path."""

    value: Any
    lines: dict[Path, int]

    def line(self, path: Path) -> int | None:
        """Where the value stands, or the nearest thing around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)


_YAML = "tag:yaml.org,2002:"
_TAGS = frozenset(f"{_YAML}{each}" for each in ("null", "bool", "int", "float", "str", "map", "seq"))


class _Loader(yaml.SafeLoader):
    """The safe loader with the plain words of YAML 1.2: true and false, decimal numbers, null."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own shape)


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(?:0|[1-9][0-9]{0,17})$", list("-+0123456789")),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]{1,3})?$", list("-+.0123456789")),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", list("-+.")),
):  # fmt: skip
    _Loader.add_implicit_resolver(f"{_YAML}{_tag}", re.compile(_pattern), _first)


def read(text: str) -> Document:
    """The only document in `text`; None where there is nothing. Raises InvalidSpec with line and column."""
    if len(text) > MOST_CHARACTERS:
        raise InvalidSpec(f"YAML: more than {MOST_CHARACTERS} characters")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines: dict[Path, int] = {}
        value = None if node is None else _Reader(loader, lines).value(node, (), ())
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        found = chr(error.character) if isinstance(error.character, int) else str(error.character)
        raise InvalidSpec(
            f"YAML: line {line}, column {column}: the character {found!r} is not allowed"
        ) from None
    except yaml.MarkedYAMLError as error:
        raise _invalid(error) from None
    except RecursionError:
        raise InvalidSpec("YAML: nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()
    return Document(value, lines)


class _Reader:
    """One walk over the composed nodes."""

    def __init__(self, loader: _Loader, lines: dict[Path, int]) -> None:
        self._loader = loader
        self._lines = lines
        self._left = MOST_VALUES

    def value(self, node: yaml.Node, path: Path, inside: tuple[int, ...]) -> Any:
        self._left -= 1
        if self._left < 0:
            raise InvalidSpec(f"YAML: more than {MOST_VALUES} values")
        if id(node) in inside:
            raise _at(node, f"{'.'.join(path)} contains itself")
        inside = (*inside, id(node))
        if node.tag not in _TAGS:
            raise _at(node, f"the tag {node.tag.removeprefix(_YAML)} is not understood; leave it out")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, inside)
        if isinstance(node, yaml.SequenceNode):
            return [self._item(each, (*path, str(place)), inside) for place, each in enumerate(node.value)]
        try:
            return self._loader.construct_object(node)
        except (ValueError, LookupError):
            raise _at(node, f"{node.value!r} is not a value of its tag") from None

    def _item(self, node: yaml.Node, path: Path, inside: tuple[int, ...]) -> Any:
        self._lines[path] = node.start_mark.line + 1
        return self.value(node, path, inside)

    def _mapping(self, node: yaml.MappingNode, path: Path, inside: tuple[int, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _at(key_node, "a key must be a word")
            key = str(key_node.value)
            mine = (*path, key)
            if key in found:
                raise _at(key_node, f"{'.'.join(mine)} stands here a second time")
            self._lines.setdefault(mine, key_node.start_mark.line + 1)
            found[key] = self.value(value_node, mine, inside)
        return found


def _at(node: yaml.Node, problem: str) -> InvalidSpec:
    return InvalidSpec(
        f"YAML: line {node.start_mark.line + 1}, column {node.start_mark.column + 1}: {problem}"
    )


def _invalid(error: yaml.MarkedYAMLError) -> InvalidSpec:
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    problem = " ".join(str(error.problem or error.context or "not YAML").split())
    if "'\\t'" in problem:
        problem += "; indent with spaces"
    return InvalidSpec(f"YAML: {where}{problem}")
