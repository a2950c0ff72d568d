"""What an HTML page is made of: tables, data for its script, a file that is whole or absent."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from space.errors import ConfigError
from space.files import is_full, write_atomically


def html_table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()
) -> str:
    """Return a table of texts, which are escaped.

    Args:
        heads: Of the columns.
        rows: Of texts.
        numbers: Which columns are figures.
    """

    def cells(values: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if index in numbers else ''}>{html.escape(value)}</{tag}>"
            for index, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells(heads, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def script_text(values: Any) -> str:
    """Return JSON values as the text of a script element."""
    text = json.dumps(values, allow_nan=False, separators=(",", ":"))
    # No text from outside may end the script element or open a comment.
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def write_named(path: Path, content: bytes) -> None:
    """Write a file that the user named, so that no reader sees a part of it.

    Raises:
        ConfigError: It cannot be written there.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        if is_full(error):
            raise
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}.") from None
