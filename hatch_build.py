"""Puts NiiVue, the viewer of the review page, into what is built. npm fetches it; it is never committed."""

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "@niivue/niivue@0.69.0"
SHA512 = "YMjQvJgD1W2b7DuoxkwlC4VxbrgIePRJ5qyQzXKxi2v2MBVg285P/CIQyg46oDDGDIcaNlbd+MhtO/edMbXJkA=="
"""Of the package, as the registry has it."""
MEMBER = "package/dist/index.js"
TARGET = Path("fedqc") / "review" / "static" / "niivue.js"


class NiiVueHook(BuildHookInterface[Any]):
    """Fetches the viewer where it is not there yet; without npm what is built has none, and says so."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Before a wheel is built, or an editable one."""
        del version
        target = Path(self.root) / TARGET
        if not target.is_file():
            npm = shutil.which("npm")
            if npm is None:
                self.app.display_warning("npm is not there, so `fedqc review` will have no viewer")
                return
            fetch(npm, target)
        build_data["artifacts"].append(TARGET.as_posix())


def fetch(npm: str, target: Path) -> None:
    """Fetch the viewer by npm, and check that it is the very package that was chosen."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(  # noqa: S603 - a fixed command
            [npm, "pack", "--silent", "--ignore-scripts", PACKAGE],
            cwd=folder,
            check=True,
            capture_output=True,
        )
        (package,) = Path(folder).glob("*.tgz")
        if base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode() != SHA512:
            message = f"{PACKAGE} is not the package that was chosen: its SHA-512 differs"
            raise RuntimeError(message)
        with tarfile.open(package) as archive:
            member = archive.extractfile(MEMBER)
            if member is None:
                message = f"{PACKAGE} holds no {MEMBER}"
                raise RuntimeError(message)
            aside = target.with_suffix(".new")
            aside.write_bytes(member.read())
            aside.replace(target)
