"""Files that somebody carries elsewhere, to an auditor or to a witness: whole under their name, or not there.

Rules:

- A file is written beside its place, in the same folder, synced, and renamed. Whatever fails, or is killed, on the way
  leaves what was there before; at most a file stays whose name begins with a dot and ends in `.partial`.
- What a link leads to is what is replaced. What is no regular file, a pipe say, is written to as it is.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, ClassVar

from api.private_files import sync_folder
from appliance.errors import Fault, HoldfastError


class FileNotWritten(HoldfastError, OSError):
    """A file that was asked for cannot be written; what was there before is there still."""

    code: ClassVar[str] = "file_not_written"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


def write_carried(path: Path, content: bytes) -> None:
    """Put a file in its place, or in that of the one before. Raises as `carried_file`."""
    with carried_file(path) as into:
        into.write(content)


@contextlib.contextmanager
def carried_file(path: Path, *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A file to be written; it is in its place, on the disk, when the block has ended well.

    Args:
        mode: of a new file, less the umask.

    Raises:
        FileNotWritten: it cannot be made or written.
    """
    try:
        target = path.resolve() if path.is_symlink() else path
        if target.exists() and not target.is_file():
            with target.open("wb") as file:
                yield file
            return
        staged = target.with_name(f".{target.name}.{os.urandom(4).hex()}.partial")
        descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(descriptor)
            staged.replace(target)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        try:
            sync_folder(target.parent)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some removable media's file systems cannot
                raise
    except HoldfastError:
        raise
    except OSError as error:
        raise FileNotWritten(
            f"{path} was not written",
            cause=error.strerror or str(error),
            remedy="Choose a place with room that you may write to, and run the command again",
        ) from None
