"""What a user can get wrong: one exception type with one clear line and a hint.

A `SnelloError` is the user's to mend (a wrong file, option, request, a full disk); everything else that goes wrong is a
bug and stays an ordinary exception. The command line prints `error: message` and `hint: hint` and nothing more.
"""

from __future__ import annotations


class SnelloError(Exception):
    """An error that its reader can act on.

    Args:
        message: lower case, one line: what is wrong and by how much.
        hint: what to do about it, preferably a command that works.
        exit_code: what the command line exits with (1 failed, 2 usage, 3 target missed, 4 text proves too little).
    """

    def __init__(self, message: str, hint: str | None = None, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code


class Unsupported(SnelloError):
    """Something that a model or an option says and that this version does not do."""
