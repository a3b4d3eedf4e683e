"""Checks of this machine: Python, packages, threads, disks."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import reir
from reir.cli.doctor.check import Check, Status
from reir.config import reir_home

DISTRIBUTION = "reir-platform"
APP_EXTRAS = ("ingestion", "training", "serving", "operations")
OLDEST_PYTHON = (3, 11)
# Below the first, the check is a warning, below the second a failure.
LOW_DISK_BYTES, FULL_DISK_BYTES = 2 * 2**30, 200 * 2**20
_TESTED = "constraints.txt"


def check_python(version: tuple[int, ...]) -> Check:
    """Check that Python is new enough."""
    detail = f"{'.'.join(map(str, version))} on {platform.platform(terse=True)}"
    if version < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return Check("python", "fail", detail, f"install Python {oldest} or newer")
    return Check("python", "ok", detail)


def check_torch() -> Check:
    """Check that torch imports."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its shared libraries does not load
        advice = "reinstall the torch build for this machine"
        return Check("torch", "fail", f"importing it failed: {error}", advice)
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    return Check("torch", "ok", f"{torch.__version__}, {device}")


def check_threads(cpus: int) -> Check:
    """Check that torch does not start more threads than there are CPUs."""
    try:
        import torch
    except (ImportError, OSError):
        return Check("threads", "warn", f"{cpus} CPUs; torch does not import", "fix torch first")
    detail = f"{torch.get_num_threads()} torch threads on {cpus} CPUs"
    if torch.get_num_threads() > cpus:
        return Check("threads", "warn", detail, f"export OMP_NUM_THREADS={cpus}")
    return Check("threads", "ok", detail)


def check_disks(location: str | None) -> Iterator[Check]:
    """Check the free space for an embedded store, and for `$REIR_HOME` if that is another disk."""
    folders = [nearest_folder(location), _existing(reir_home())]
    # Uploads, the search log and reports are in `$REIR_HOME`.
    # Reversed, because the last one counts: on a common disk, the folder of the store is named.
    of_disk = {each.stat().st_dev: each for each in reversed(folders)}
    yield from map(check_disk, of_disk.values())


def nearest_folder(location: str | None) -> Path:
    """Return an existing folder on the disk that an embedded store at `location` uses or would use.

    For any other store, this is `$REIR_HOME`.
    """
    from reir.store import default_location, is_embedded

    place = default_location() if location is None else location
    return _existing(Path(place).expanduser().absolute() if is_embedded(place) else reir_home())


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def check_disk(folder: Path) -> Check:
    """Check the free space of the disk that has a folder."""
    free = shutil.disk_usage(folder).free
    detail = f"{free / 2**30:.1f} GiB free at {folder}"
    if free >= LOW_DISK_BYTES:
        return Check("disk", "ok", detail)
    status: Status = "warn" if free >= FULL_DISK_BYTES else "fail"
    return Check("disk", status, detail, "free up space, or choose another folder with --store")


def check_app(extra: str) -> Check:
    """Check that the packages of an app are installed."""
    required = [each.name for each in _requirements(extra)]
    missing = [name for name in required if _installed(name) is None]
    if missing:
        advice = f"pip install '{DISTRIBUTION}[{extra}]', if you need it"
        return Check(extra, "warn", f"not installed: {', '.join(missing)}", advice)
    return Check(extra, "ok", ", ".join(f"{name} {metadata.version(name)}" for name in required))


def check_versions(tested: Mapping[str, str] | None = None) -> Check:
    """Compare the installed packages with what this release needs, and was tested with.

    Args:
        tested: package -> version that this release was tested with; None reads it.
    """
    needed = [each for extra in ("", *APP_EXTRAS) for each in _requirements(extra)]
    wrong = [
        f"{each.name} {version} (needs {each.specifier})"
        for each in needed
        if (version := _installed(each.name)) is not None
        # Without `prereleases`, an installed pre-release would fit no range at all.
        and not each.specifier.contains(version, prereleases=True)
    ]
    pip = f"pip install -c {_TESTED} {DISTRIBUTION}=={reir.__version__}"
    if wrong:
        return Check("versions", "fail", f"too old or too new: {', '.join(wrong)}", pip)
    tested = tested_versions() if tested is None else tested
    other = [
        f"{name} {version} (tested {tested[name]})"
        for name in tested
        if (version := _installed(name)) is not None
        # The local part of a version names a build, such as that of torch for a GPU.
        and Version(version).public != Version(tested[name]).public
    ]
    if other:
        detail = f"not the versions that this release was tested with: {', '.join(other)}"
        return Check("versions", "warn", detail, f"{pip}, if something does not work")
    return Check("versions", "ok", f"reir {reir.__version__}; packages as they were tested")


def tested_versions() -> dict[str, str]:
    """Return the versions that this release was tested with, by package."""
    # A part of the installed package's metadata (pyproject.toml).
    text = metadata.distribution(DISTRIBUTION).read_text(f"extra_metadata/{_TESTED}") or ""
    pins = (line.partition("==") for line in text.splitlines())
    return {name: version for name, equals, version in pins if equals and not name.startswith("#")}


def _requirements(extra: str) -> list[Requirement]:
    """Return the requirements of an extra, without those that every installation has."""
    found = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    own = [
        each
        for each in found
        # An extra that includes another one requires this package itself, with that extra.
        if each.name != DISTRIBUTION
        and (each.marker is None or each.marker.evaluate({"extra": extra}))
    ]
    if not extra:
        return own
    always = {canonicalize_name(each.name) for each in _requirements("")}
    return [each for each in own if canonicalize_name(each.name) not in always]


def _installed(distribution: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
