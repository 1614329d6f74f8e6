"""Bundles as Flower builds them, and what a hostile coordinator would put into one."""

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomli_w
from fedqc_client.bundle import COMPONENTS, BundleRefusedError, check_bundle
from fedqc_server.superlink import SuperLink
from flwr.cli.build import build_fab_from_disk

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")

PROJECT = {
    "project": {"name": "fedqc-run", "version": "1.0.0", "dependencies": []},
    "tool": {"flwr": {"app": {"publisher": "fedqc", "components": COMPONENTS}}},
}


def bundle(files: dict[str, bytes | str] | None = None, project: dict[str, object] | None = None) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pyproject.toml", tomli_w.dumps(project or PROJECT))
        for name, text in (files or {"README.md": "", ".info/CONTENT": ""}).items():
            archive.writestr(name, text)
    return content.getvalue()


def test_the_bundle_of_our_own_server_passes(tmp_path: Path) -> None:
    superlink = SuperLink.prepare(tmp_path / "flower", tmp_path / "state.db")
    check_bundle(build_fab_from_disk(superlink.folder / "bundle"))


def test_another_name_is_refused() -> None:
    """Flower makes the name of a folder of it."""
    for about in ({"name": "../x", "version": "1.0.0"}, {"name": "fedqc-run", "version": "../../data"}):
        with pytest.raises(BundleRefusedError, match="calls itself"):
            check_bundle(bundle(project={**PROJECT, "project": about}))


def test_a_list_of_other_files_is_refused() -> None:
    """Flower compares the hash of each file that is listed: it tells whether a site has one like it."""
    listed = f"/data/patient_0001.nii.gz,{'0' * 64},1\n"
    with pytest.raises(BundleRefusedError, match=r"lists /data/patient_0001\.nii\.gz"):
        check_bundle(bundle({"README.md": "", ".info/CONTENT": listed}))


@pytest.mark.parametrize(
    "name",
    [
        "fedqc_client/app.py",
        "fedqc_client/__init__.py",
        "sitecustomize.py",
        "torch.py",
        "weights.pkl",
        "x.so",
        "../fedqc_client/app.py",
        "/etc/cron.d/x",
        "readme.md",
        "pyproject.toml/x",
        "README.md/",
    ],
)
def test_anything_but_the_names_is_refused(name: str) -> None:
    with pytest.raises(BundleRefusedError, match="no code from outside"):
        check_bundle(bundle({name: "open('/tmp/stolen', 'w')"}))


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_a_second_file_of_one_name_is_refused() -> None:
    content = io.BytesIO(bundle())
    with zipfile.ZipFile(content, "a") as archive:
        archive.writestr("pyproject.toml", "[tool]\n")
    with pytest.raises(BundleRefusedError, match="a file twice"):
        check_bundle(content.getvalue())


@pytest.mark.parametrize(
    "components",
    [
        {},
        {"clientapp": "fedqc_client.app:app"},
        COMPONENTS | {"clientapp": "os:system"},
        COMPONENTS | {"clientapp": "fedqc_client.tasks:app"},
        COMPONENTS | {"agentapp": "x:y"},
        "fedqc_client.app:app",
    ],
)
def test_other_components_are_refused(components: object) -> None:
    project = {**PROJECT, "tool": {"flwr": {"app": {"components": components}}}}
    with pytest.raises(BundleRefusedError, match="names the components"):
        check_bundle(bundle(project=project))


def test_dependencies_are_refused() -> None:
    about = {"name": "fedqc-run", "version": "1.0.0", "dependencies": ["evil>=1"]}
    project = {**PROJECT, "project": about}
    with pytest.raises(BundleRefusedError, match=r"asks to install \['evil>=1'\]"):
        check_bundle(bundle(project=project))


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    with pytest.raises(BundleRefusedError, match="holds more than"):
        check_bundle(bundle({"README.md": bytes(50 << 20)}))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no archive" * 100])
def test_what_is_no_archive_is_refused(content: bytes) -> None:
    with pytest.raises(BundleRefusedError, match="cannot be read"):
        check_bundle(content)


def test_toml_that_is_none_is_refused() -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("pyproject.toml", b"\xff\xfe[")
    with pytest.raises(BundleRefusedError, match="cannot be read"):
        check_bundle(content.getvalue())


def test_flower_still_starts_sites_in_the_way_that_is_guarded() -> None:
    """The program runs, and Flower's module has the two names that are put behind the check."""
    done = subprocess.run(
        [sys.executable, "-m", "fedqc_client.bundle", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Run a Flower ClientApp" in done.stdout
