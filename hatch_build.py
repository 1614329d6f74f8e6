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
SHA256 = "d6c2be4feb1ad53b2ac76b4196da8d8fd2263b662b511c55ca0fd127eb6a6532"
"""Of the one file of it that is shipped."""
TARGET = Path("fedqc") / "review" / "static" / "niivue.js"
SECONDS = 120


class NiiVueHook(BuildHookInterface[Any]):
    """Fetches the viewer where it is not there yet; where that fails, what is built has none, and says so."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Before a wheel is built, or an editable one."""
        del version
        target = Path(self.root) / TARGET
        if not is_the_viewer(target):
            target.unlink(missing_ok=True)
            try:
                fetch(target)
            except (OSError, RuntimeError, subprocess.SubprocessError, tarfile.TarError) as error:
                self.app.display_warning(f"`fedqc review` will have no viewer: {error}")
                return
        build_data["artifacts"].append(TARGET.as_posix())


def is_the_viewer(path: Path) -> bool:
    """Whether a file is the very one that was chosen."""
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256


def fetch(target: Path) -> None:
    """Fetch the viewer by npm.

    Raises:
        RuntimeError: npm is not there or cannot fetch it, or it is not the very package that was chosen.
        OSError: it cannot be written.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("npm is not there to fetch it")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(  # noqa: S603 - a fixed command
            [npm, "pack", "--silent", "--ignore-scripts", PACKAGE],
            cwd=folder, check=False, capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
        packages = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(packages) != 1:
            raise RuntimeError(f"npm cannot fetch {PACKAGE}: {done.stderr.strip() or done.stdout.strip()}")
        if base64.b64encode(hashlib.sha512(packages[0].read_bytes()).digest()).decode() != SHA512:
            raise RuntimeError(f"{PACKAGE} is not the package that was chosen: its SHA-512 differs")
        with tarfile.open(packages[0]) as archive:
            member = archive.extractfile(MEMBER)
            if member is None:
                raise RuntimeError(f"{PACKAGE} holds no {MEMBER}")
            aside = Path(folder) / target.name
            aside.write_bytes(member.read())
        if not is_the_viewer(aside):
            raise RuntimeError(f"{MEMBER} of {PACKAGE} is not the file that was chosen: its SHA-256 differs")
        shutil.move(aside, target)
