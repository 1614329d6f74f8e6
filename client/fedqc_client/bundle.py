"""What a site lets Flower start: the code that the hospital installed, never code that came with a request.

Flower ships the coordinator's application to every site as a ZIP archive, unpacks it, puts its folder first
on Python's path and imports from there. So `flwr-clientapp`, the program that Flower starts for each message,
is this module here: it refuses an archive that carries anything but the names of what is installed, before
anything of it is unpacked, and lets no exception's text out.
"""

import io
import tomllib
import zipfile
from dataclasses import replace
from importlib import import_module
from typing import Any, NoReturn

from fedqc.errors import ProtocolError

COMPONENTS = {"serverapp": "fedqc_server.app:app", "clientapp": "fedqc_client.app:app"}
"""The only ones that are run."""

NAME, VERSION, PUBLISHER = "fedqc-run", "1.0.0", "fedqc"
"""What the bundle calls itself; Flower makes the name of a folder of it."""

_LIST = ".info/CONTENT"  # Flower's list of the other files
_FILES = {"pyproject.toml", "README.md", _LIST}
_LARGEST = 2**18  # bytes of all files together, unpacked
_STEPS = ("pull_task_input", "push_message", "push_task_output")
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
            project = tomllib.loads(archive.read("pyproject.toml").decode())
            listed = {line.split(",")[0] for line in archive.read(_LIST).decode().splitlines() if line}
            if listed - _FILES:  # Flower would look at whatever file of this machine stands there
                strange_ones = ", ".join(sorted(listed - _FILES))
                raise BundleRefusedError(f"the coordinator's bundle lists {strange_ones}")
    except (zipfile.BadZipFile, KeyError, UnicodeDecodeError, tomllib.TOMLDecodeError, OSError) as error:
        raise BundleRefusedError(f"the coordinator's bundle cannot be read ({error})") from None
    app = _table(_table(_table(project, "tool"), "flwr"), "app")
    if app.get("components") != COMPONENTS:
        raise BundleRefusedError(
            f"the coordinator's bundle names the components {app.get('components')!r}, expected "
            f"{COMPONENTS!r}"
        )
    about = _table(project, "project")
    if (about.get("name"), about.get("version"), app.get("publisher")) != (NAME, VERSION, PUBLISHER):
        raise BundleRefusedError(
            f"the coordinator's bundle calls itself {about.get('name')!r} {about.get('version')!r} of "
            f"{app.get('publisher')!r}, expected {NAME!r} {VERSION!r} of {PUBLISHER!r}"
        )
    dependencies = about.get("dependencies", [])
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
    if not {"install_from_fab", "Error", *_STEPS} <= vars(runtime).keys():
        raise SystemExit("this version of Flower starts sites in another way than fedqc knows")
    install = runtime.install_from_fab
    pull_input, push_reply, push_output = (vars(runtime)[name] for name in _STEPS)
    answered: list[bool] = []

    def install_checked(content: Any, *arguments: Any, **options: Any) -> Any:
        if not isinstance(content, bytes):
            raise BundleRefusedError("the coordinator's bundle is no archive")
        check_bundle(content)
        return install(content, *arguments, **options)

    def error_without_text(*, code: int, reason: str | None = None) -> Error:
        return Error(code=code, reason=_NO_REASON)

    def pull_named(client: Any) -> Any:
        message, context, run, fab = pull_input(client)
        if (run.fab_id, run.fab_version) != (f"{PUBLISHER}/{NAME}", VERSION):
            # Flower would look for the bundle under this name, wherever it leads to. Without content it is
            # refused as any other, with an answer.
            fab = replace(fab, content=b"")
        return message, context, run, fab

    def push_and_note(*arguments: Any, **options: Any) -> None:
        push_reply(*arguments, **options)
        answered.append(True)

    def push_output_of_answers(*arguments: Any, **options: Any) -> None:
        # A task that is done, but without a reply, is waited for in vain; one that just ends is not.
        if answered:
            push_output(*arguments, **options)

    vars(runtime).update(
        install_from_fab=install_checked,
        Error=error_without_text,
        pull_task_input=pull_named,
        push_message=push_and_note,
        push_task_output=push_output_of_answers,
    )
    flwr_clientapp()
    raise SystemExit(0)


if __name__ == "__main__":
    main()
