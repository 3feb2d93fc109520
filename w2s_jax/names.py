"""Names and lines of text from files of unknown origin: checked when read, escaped when shown."""

from __future__ import annotations

import re
from collections.abc import Iterable

from w2s_jax.errors import W2SError

#: Characters of the name of a dimension, and of a line that describes something.
LONGEST, LONGEST_LINE = 64, 500
#: Names of outputs in one file.
MOST = 1000


def check_dimensions(names: Iterable[str], where: object) -> tuple[str, ...]:
    """Check that every name of an output can be a key, a column and a word on a terminal.

    Args:
        names: in output order.
        where: what names them, for the message.

    Returns:
        The names, unchanged.

    Raises:
        W2SError: a name is empty, long, not printable, has a comma, or blanks around it; two are the same; too many.
    """
    names = tuple(names)
    if len(names) > MOST:
        raise W2SError(f"{where} names {len(names)} dimensions; expected at most {MOST}")
    for name in names:
        fits = isinstance(name, str) and 0 < len(name) <= LONGEST and name.isprintable() and "," not in name
        if not fits or name != name.strip():
            shown = line(ascii(name), LONGEST)
            raise W2SError(f"{where} names a dimension {shown}; expected 1 to {LONGEST} printable characters, no comma")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise W2SError(f"{where} names two dimensions alike: {', '.join(twice)}")
    return names


def line(text: object, longest: int = LONGEST_LINE) -> str:
    """Shorten text to one line that a terminal can show: blanks for line breaks, no control characters."""
    words = " ".join(str(text)[: 8 * longest].split())
    words = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in words)
    return words if len(words) <= longest else words[: longest - 1] + "…"


def markdown(text: object) -> str:
    """Escape text so that Markdown shows it unchanged, in a paragraph or in a table: no markup, no HTML, no link."""
    shown = line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    shown = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", shown)
    return re.sub(r"(?<=[a-z])://", "&#58;//", shown)  # else a bare address is a link
