"""Files that are either whole or absent, and errors that name the file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args

from platformdirs import user_cache_path
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wina.errors import UsageError, WinaError

Schema = TypeVar("Schema", bound=BaseModel)
UNUSED_DAYS = 90


def cache_dir() -> Path:
    """Return the folder of cached calibrations and plans (WINA_CACHE overrides the platform's)."""
    override = os.environ.get("WINA_CACHE")
    return Path(override) if override else user_cache_path("wina")


def cached(kind: str, name: str) -> Path:
    """Return where the cache keeps a thing; if it is there, it counts as used now.

    What was not used for UNUSED_DAYS is removed, once a process for each kind.

    Args:
        kind: a folder of the cache.
        name: of the file or folder in it.
    """
    folder = cache_dir() / kind
    path = folder / name
    with suppress(OSError):
        os.utime(path)
    _forget(folder)
    return path


@cache
def _forget(folder: Path) -> None:
    """Remove what was not used for long; the cache of another user or a read-only one stays."""
    oldest = time.time() - UNUSED_DAYS * 86_400
    with suppress(OSError):
        for path in folder.iterdir():
            if path.lstat().st_mtime > oldest:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block succeeds."""
    temporary = _beside(path)
    temporary.touch(exist_ok=False)
    mode = stat.S_IMODE(temporary.stat().st_mode)
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors writes files that only their owner may read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of ``path`` when the block succeeds."""
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():  # moved away first: deleting takes time and may be interrupted
            path.rename(old := temporary.with_name(f"{temporary.name}.old"))
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path) -> Path:
    """Return a free name in the folder of ``path``, which is made; unlike tempfile, not a file.

    So what is made there gets the mode that the umask gives.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")


def check_replaceable(path: Path, document: str) -> None:
    """Raise UsageError if ``path`` is taken by anything but a folder of the same kind.

    Args:
        path: a folder to be written; free, empty, or an older one with ``document`` in it.
        document: name of the JSON file that marks the kind, such as ``plan.json``.
    """
    taken = path.exists()
    if path.is_dir():
        taken = any(path.iterdir()) and not (path / document).exists()
    if taken:
        kind = document.removesuffix(".json")
        raise UsageError(f"{path} exists and is not a {kind}; choose another folder")


@contextmanager
def work_folder(
    output: str | Path | None, fingerprint: str, names: Sequence[str]
) -> Iterator[Path]:
    """Yield a folder for work in progress beside its output; it goes when the block succeeds.

    After a failure or a kill it stays, and work with the same fingerprint finds it again.

    Args:
        output: what is being made; None works in a temporary folder.
        fingerprint: text of all settings; files of other settings are removed first.
        names: the files that the work keeps there; nothing else is ever removed.
    """
    if output is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    target = Path(output)
    folder = target.with_name(target.name + ".partial")
    settings = folder / "settings.json"
    folder.mkdir(parents=True, exist_ok=True)
    # Without settings it is what was left of a folder while it was deleted.
    if not settings.exists() or settings.read_text(encoding="utf-8") != fingerprint:
        for name in names:
            (folder / name).unlink(missing_ok=True)
    write_text(settings, fingerprint)
    yield folder
    shutil.rmtree(folder)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def kept(path: Path | None, schema: type[Schema], compute: Callable[[], Schema]) -> Schema:
    """Return what a JSON file holds; if it is not there, compute it and write it.

    Args:
        path: of the file; None only computes.
        schema: of its content.
        compute: makes the content.
    """
    if path is not None and path.exists():
        return read_json(path, schema)
    value = compute()
    if path is not None:
        write_text(path, value.model_dump_json())
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    with replacing(path) as temporary:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata=metadata)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Raises:
        WinaError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise WinaError(f"{path} is missing; the folder is incomplete, make it again") from None
    except (SafetensorError, OSError) as error:
        raise WinaError(f"{path} is damaged ({error}); make it again") from error


def read_json(path: Path, schema: type[Schema]) -> Schema:
    """Read and validate a JSON file.

    Raises:
        WinaError: the file is missing, not JSON, or does not follow the schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WinaError(f"{path} is missing; the folder is incomplete, make it again") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WinaError(f"{path} is not valid JSON ({error}); make it again") from error
    return validate(content, schema, str(path))


def validate(content: Any, schema: type[Schema], source: str) -> Schema:
    """Validate ``content`` against ``schema``, naming ``source`` and each wrong field."""
    version = schema.model_fields.get("schema_version")
    if version is not None and isinstance(content, dict):
        found = content.get("schema_version")
        known = get_args(version.annotation)
        if found not in known:
            readable = " and ".join(map(str, known))
            raise WinaError(
                f"{source} has schema version {found!r}; this wina reads {readable}. "
                "Make the file again, or use the wina that wrote it."
            )
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, issue['loc'])) or 'content'}: {issue['msg']}"
            for issue in error.errors()[:5]
        )
        raise WinaError(
            f"{source} does not follow its schema ({problems}); make it again"
        ) from error
