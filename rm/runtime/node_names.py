"""Which node somebody means: by its name, its id, or the beginning of its id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rm.core.model import Node
from rm.errors import UnknownNode

LISTED = 20
"""Nodes that an error names."""
SHORT_ID = 8
"""Characters of an id that tell nodes apart in listings."""


def named(
    words: Iterable[str], nodes: Mapping[str, Node], gone: Mapping[str, Node] | None = None
) -> list[Node]:
    """The nodes that these words name, each once. Raises UnknownNode for a word that names none, or several.

    `gone`: nodes that are meant where none of `nodes` is.
    """
    found = {node.id: node for node in (_named(word, nodes, gone or {}) for word in words)}
    return list(found.values())


def _named(word: str, nodes: Mapping[str, Node], gone: Mapping[str, Node]) -> Node:
    meant = _meant(word, nodes) or _meant(word, gone)
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise UnknownNode(
            f"node {word!r} could be any of {_list(meant)}: give more of its id", field="node", node=word
        )
    raise UnknownNode(
        f"there is no node {word!r}; there are {_list(nodes.values())}", field="node", node=word
    )


def _meant(word: str, nodes: Mapping[str, Node]) -> list[Node]:
    if word in nodes:
        return [nodes[word]]
    named = [node for node in nodes.values() if node.name == word]
    return named or [node for node in nodes.values() if word and node.id.startswith(word)]


def _list(nodes: Iterable[Node]) -> str:
    every = sorted(nodes, key=lambda node: (node.name, node.id))
    listed = ", ".join(f"{node.name} ({node.id[:SHORT_ID]})" for node in every[:LISTED])
    return (listed + (f" and {len(every) - LISTED} more" if len(every) > LISTED else "")) or "none"
