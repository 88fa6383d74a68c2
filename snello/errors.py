"""What a user can get wrong: one exception type with one clear line and a hint.

A `SnelloError` is the user's to mend (a wrong file, option, request, a full disk); everything else that goes wrong is a
bug and stays an ordinary exception. The command line prints `error: message` and `hint: hint` and nothing more.
"""

from __future__ import annotations

import errno


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


_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def storage_error(error: OSError, place: object, hint: str) -> SnelloError | None:
    """A full, read-only or forbidden disk as the user's to mend; None for any other failure.

    Args:
        place: what was being written, where the system does not name it.
        hint: what a full disk leaves to do.
    """
    where = error.filename or place
    if error.errno in _FULL:
        return SnelloError(f"the disk is full: {where} could not be written", hint)
    if error.errno in _CLOSED:
        return SnelloError(f"{where}: {error.strerror}", "use a folder that may be read and written")
    return None
