"""What took long to find out and stays true until a file changes: on disk, for any number of processes."""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedqc.errors import DataError


class Memo:
    """JSON values in a folder, each in a file named by what it depends on."""

    def __init__(self, folder: Path) -> None:
        """A memo in `folder`, which is made where it is missing.

        Raises:
            DataError: the folder cannot be written.
        """
        self._folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: object) -> Any:
        """The value that depends on `key` (anything that JSON can write); None where there is none."""
        with contextlib.suppress(OSError, ValueError):  # not there yet, or damaged
            return json.loads(self._path(key).read_text(encoding="utf-8"))
        return None

    def put(self, key: object, value: object) -> None:
        """Remember a value.

        Raises:
            DataError: the folder cannot be written.
        """
        with writing(self._folder), tempfile.TemporaryDirectory(prefix="tmp-", dir=self._folder) as aside:
            written = Path(aside) / "value.json"
            written.write_text(json.dumps(value), encoding="utf-8")
            written.replace(self._path(key))

    def _path(self, key: object) -> Path:
        return self._folder / f"{digest(key)}.json"


def state(path: Path) -> tuple[str, int, int]:
    """Path, size in bytes and time of last change in nanoseconds: what differs once a file was written again.

    Raises:
        OSError: there is no such file, or it may not be looked at.
    """
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns


def digest(content: object) -> str:
    """SHA-256 of anything that JSON can write, in hexadecimal."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Whatever keeps the cache from being written is said in our words.

    Raises:
        DataError: the system refused.
    """
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder}: the cache cannot be written ({error.strerror or error}); "
            "free space or name another folder under [compute] cache"
        ) from None
