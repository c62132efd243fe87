"""What leaves the submitter's process by value: functions with their arguments, and working directories.

A queued job must not depend on its submitter's life: object references and uploaded packages of a Ray driver are
dropped when it ends. So the function is pickled, the directory zipped, both are named by their SHA-256 and kept
in the store on the head.
"""

from __future__ import annotations

import hashlib
import io
import os
import site
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import pathspec

from rm.errors import InvalidSpec, NotPicklable, PayloadTooLarge
from rm.spec import MAX_INLINE_BYTES

MAX_WORKING_DIR_BYTES = 256 * 2**20
NEVER_SHIPPED = (".git/", ".venv/", "venv/", "__pycache__/", "*.pyc")
IGNORE_FILES = (".gitignore", ".rayignore")


def pack_function(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """The function and its arguments as bytes. Raises NotPicklable and PayloadTooLarge, each with the way out."""
    module = _loose_module(function)
    if module is not None:
        cloudpickle.register_pickle_by_value(module)
    try:
        data = cloudpickle.dumps((function, args, kwargs))
    except Exception as error:
        raise NotPicklable(
            f"{_name(function)} can't be sent to another process: {error}. Create connections, locks, open files "
            "and loggers inside the function instead of capturing them",
            field="function",
        ) from error
    finally:
        if module is not None:
            cloudpickle.unregister_pickle_by_value(module)
    if len(data) > MAX_INLINE_BYTES:
        raise PayloadTooLarge(
            f"{_name(function)} with its arguments is {len(data) / 2**20:.1f} MiB pickled; at most "
            f"{MAX_INLINE_BYTES // 2**20} MiB travel by value. Write large data to a file that the nodes can read "
            "(or ship it with working_dir) and pass its path, or load it inside the function",
            field="args",
        )
    return bytes(data)


def pack_directory(path: str | os.PathLike[str]) -> bytes:
    """A zip of the directory: the same bytes for the same content. Leaves out what its ignore files name.

    Raises InvalidSpec where it is not a directory or is too large.
    """
    root = Path(path).expanduser().absolute()
    if not root.is_dir():
        kind = "is not a directory" if root.exists() else "does not exist"
        raise InvalidSpec(f"working_dir: {root} {kind}", field="working_dir")
    buffer = io.BytesIO()
    total = 0
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for file in _files(root):
            total += file.stat().st_size
            if total > MAX_WORKING_DIR_BYTES:
                raise PayloadTooLarge(
                    f"working_dir: {root} holds more than {MAX_WORKING_DIR_BYTES // 2**20} MiB; name what need not "
                    "travel in .rayignore or .gitignore, and keep data on a shared file system",
                    field="working_dir",
                )
            member = zipfile.ZipInfo(file.relative_to(root).as_posix(), (1980, 1, 1, 0, 0, 0))
            member.external_attr = (file.stat().st_mode & 0o777) << 16
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, file.read_bytes())
    return buffer.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _files(root: Path) -> Iterator[Path]:
    """The regular files below `root` that no ignore file names, in a fixed order."""
    patterns = [*NEVER_SHIPPED]
    for name in IGNORE_FILES:
        if (root / name).is_file():
            patterns += (root / name).read_text(errors="replace").splitlines()
    ignored = pathspec.GitIgnoreSpec.from_lines(patterns)
    for directory, names, files in os.walk(root):
        here = Path(directory)
        names[:] = sorted(
            n for n in names if not ignored.match_file((here / n).relative_to(root).as_posix() + "/")
        )
        for name in sorted(files):
            file = here / name
            if file.is_file() and not ignored.match_file(file.relative_to(root).as_posix()):
                yield file


def _loose_module(function: Callable[..., Any]) -> ModuleType | None:
    """The function's module where it lies beside the script and is installed nowhere: the job could not import it.

    Such a module is pickled by value. `__main__` always is.
    """
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    file = getattr(module, "__file__", None)
    if module is None or file is None or module.__name__ == "__main__":
        return None
    installed = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    installed += [*site.getsitepackages(), site.getusersitepackages()]
    if any(Path(file).is_relative_to(each) for each in installed if each):
        return None
    return None if module.__name__.split(".")[0] == "rm" else module


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", None) or repr(function)
