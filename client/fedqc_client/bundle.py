"""What a site lets Flower start: the code that the hospital installed, never code that came with a request.

Flower ships the coordinator's application to every site as a ZIP archive, unpacks it, puts its folder first
on Python's path and imports from there. So `flwr-clientapp`, the program that Flower starts for each message,
is this module here: it refuses an archive that carries anything but the names of what is installed, before
anything of it is unpacked, and lets no exception's text out.
"""

import io
import tomllib
import zipfile
from importlib import import_module
from typing import Any, NoReturn

from fedqc.errors import ProtocolError

COMPONENTS = {"serverapp": "fedqc_server.app:app", "clientapp": "fedqc_client.app:app"}
"""The only ones that are run."""

_FILES = {"pyproject.toml", "README.md", ".info/CONTENT"}  # the last is Flower's list of the others
_LARGEST = 2**18  # bytes of all files together, unpacked
_NO_REASON = "the site refused the request or failed; its own log says why"


class BundleRefusedError(ProtocolError):
    """The coordinator's bundle carries more than the names of what is installed here."""


def check_bundle(content: bytes) -> None:
    """Refuse a bundle with any code, other components, or dependencies.

    Args:
        content: of the archive; nothing of it is unpacked to disk.

    Raises:
        BundleRefusedError: with what was found.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            strange = sorted(set(names) - _FILES)
            if strange or len(names) > len(set(names)):
                raise BundleRefusedError(
                    f"the coordinator's bundle carries {', '.join(strange) or 'a file twice'}; only "
                    f"{', '.join(sorted(_FILES))} may be in it, for this site runs its own fedqc and no code "
                    "from outside"
                )
            if sum(entry.file_size for entry in entries) > _LARGEST:
                raise BundleRefusedError(f"the coordinator's bundle holds more than {_LARGEST} bytes")
            with archive.open("pyproject.toml") as file:
                project = tomllib.loads(file.read(_LARGEST).decode())
    except (zipfile.BadZipFile, KeyError, UnicodeDecodeError, tomllib.TOMLDecodeError, OSError) as error:
        raise BundleRefusedError(f"the coordinator's bundle cannot be read ({error})") from None
    app = _table(_table(_table(project, "tool"), "flwr"), "app")
    if app.get("components") != COMPONENTS:
        raise BundleRefusedError(
            f"the coordinator's bundle names the components {app.get('components')!r}, expected "
            f"{COMPONENTS!r}"
        )
    dependencies = _table(project, "project").get("dependencies", [])
    if dependencies:
        raise BundleRefusedError(
            f"the coordinator's bundle asks to install {dependencies!r}; what is installed here is the "
            "hospital's decision"
        )


def _table(values: object, key: str) -> dict[str, Any]:
    found = values.get(key) if isinstance(values, dict) else None
    return found if isinstance(found, dict) else {}


def main() -> NoReturn:
    """Run Flower's `flwr-clientapp` behind the check."""
    # Flower is imported here: the check above must not depend on it.
    from flwr.app import Error  # noqa: PLC0415
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp  # noqa: PLC0415

    runtime = import_module("flwr.supernode.runtime.run_clientapp")
    if not {"install_from_fab", "Error"} <= vars(runtime).keys():
        raise SystemExit("this version of Flower starts sites in another way than fedqc knows")
    install = runtime.install_from_fab

    def install_checked(content: Any, *arguments: Any, **options: Any) -> Any:
        if not isinstance(content, bytes):
            raise BundleRefusedError("the coordinator's bundle is no archive")
        check_bundle(content)
        return install(content, *arguments, **options)

    def error_without_text(*, code: int, reason: str | None = None) -> Error:
        return Error(code=code, reason=_NO_REASON)

    vars(runtime).update(install_from_fab=install_checked, Error=error_without_text)
    flwr_clientapp()
    raise SystemExit(0)


if __name__ == "__main__":
    main()
