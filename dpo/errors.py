"""The one exception that is the user's to fix.

Everything a user can get wrong (a flag, a file, a row, a folder) raises UserError with one line that names what was
found and what to do. The verbs print that line without a traceback and exit with code 2.
"""

LONGEST_LINE = 1000
"""Characters of a message; a longer one, with a row or a path in it, loses its middle."""


def printable(text: str, keep: str = "") -> str:
    """Escape what a terminal would obey or cannot show, as Python writes it: \\n, \\x1b, \\u202e, \\ud800.

    Args:
        text: Any text, from a file or from the user.
        keep: Characters to leave as they are, such as a line end.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def one_line(what: object, limit: int | None = None) -> str:
    """A text, or that of an error, with every run of white space as one space, cut to `limit` characters."""
    return " ".join(str(what).split())[:limit]


class UserError(Exception):
    """A mistake in the input; its message is one line of at most LONGEST_LINE characters: what, got, fix."""

    def __init__(self, message: str) -> None:
        line = printable(message)
        if len(line) > LONGEST_LINE:
            line = f"{line[: LONGEST_LINE - 305]} ... {line[-300:]}"
        super().__init__(line)
