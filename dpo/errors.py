"""The one exception that is the user's to mend.

Everything a user can get wrong (a flag, a file, a row, a folder) raises UserError with one line that names what was
found and what to do. The verbs print that line without a traceback and exit with code 2.
"""


class UserError(Exception):
    """A mistake in the input; its message is one line: what, got, fix."""
