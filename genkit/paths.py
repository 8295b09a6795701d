"""Where things lie: the packaged models, the recipes, the user's cache. No imports beyond the standard library."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
LAUNCH_FOLDERS = ("tokenizers", "pipelines", "distill", "eval")


def pretrained_dir() -> Path:
    """Return the folder of the models that ship with the package."""
    return PACKAGE / "pretrained"


def recipes_dir() -> Path:
    """Return the folder that holds the launch folders (`tokenizers`, `pipelines`, `distill`, `eval`).

    An installed wheel carries them beside the package's files in `recipes/`; in a checkout they lie at its root. A stale copy that an
    editable install left in site-packages is never read, because the search starts from this file.

    Raises:
        FileNotFoundError: if neither place has them.
    """
    packaged = PACKAGE / "recipes"
    if packaged.is_dir():
        return packaged
    if all((PACKAGE.parent / name).is_dir() for name in LAUNCH_FOLDERS):
        return PACKAGE.parent
    raise FileNotFoundError(
        f"no recipes beside {PACKAGE} and no launch folders in {PACKAGE.parent}; reinstall the package or clone the repository."
    )


def cache_dir() -> Path:
    """Return the folder for files that can be made again: `GENKIT_CACHE`, else the platform's cache folder. It is not created here."""
    if chosen := os.environ.get("GENKIT_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "genkit" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "genkit"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "genkit"


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Write a folder completely or not at all: fill the folder this yields, it takes its place when the block ends without an error.

    Args:
        path: the folder to make. Files of an older folder there that the new one does not have stay.

    Yields:
        A folder beside it, removed if the block raises.

    Raises:
        NotADirectoryError: if a file is in the way.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{str(path)!r} is a file, expected a folder to write to; choose another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield aside
        aside.chmod(0o777 & ~_umask())
        if not path.exists():
            aside.rename(path)
            return
        for source in sorted(item for item in aside.rglob("*") if item.is_file()):
            target = path / source.relative_to(aside)
            target.parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
