"""Text by anybody, made harmless: on one line, with nothing in it that a terminal or a reader's eye would obey.

Control characters, escape sequences, line breaks and marks that turn the direction of writing become the escapes
that Python writes for them. Called wherever names, commands, reasons or output are shown.
"""

from __future__ import annotations


def plain(text: object) -> str:
    """`text` on one line, with all that a terminal could take as an instruction written out as an escape."""
    return "".join(each if each.isprintable() else _escaped(each) for each in str(text))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
