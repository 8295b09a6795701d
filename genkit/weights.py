"""Read weight files without running anything that is in them.

safetensors are read as they are. Torch files are read with `weights_only=True`; where that refuses because the file is a richer
pickle (Lightning checkpoints hold hyper-parameters and callbacks), a reader of our own walks the pickle, knows nothing but ordered
dicts and tensor records, replaces every other class with an inert stand-in, and only ever builds the tensors of the state dict.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from genkit.checks import misshapen_keys, tell_differences

StateDict = dict[str, Tensor]
DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def weights_hash(module: nn.Module) -> str:
    """Return a hash (hex, 24 digits) of a module's tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]


def sniff(path: Path) -> str:
    """Return what a file is by its first bytes: `safetensors`, `zip` or `pickle`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, all zeros, a web page, a Git LFS pointer or nothing known; says what to do.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint file {str(path)!r} does not exist; check the path.")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
    text = head.lstrip().lower()
    if not head:
        raise ValueError(f"checkpoint {str(path)!r} is empty (0 bytes); download it again.")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(
            f"checkpoint {str(path)!r} is a web page, not weights: the download returned an error or a login page; download it again."
        )
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(f"checkpoint {str(path)!r} is a Git LFS pointer of {size} bytes, not the weights; run `git lfs pull`.")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if size > 8 and head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"\x80"):
        return "pickle"
    what = "holds only zero bytes" if not any(head) else "is neither safetensors nor a torch file"
    raise ValueError(f"checkpoint {str(path)!r} {what} ({size} bytes); it is corrupt or incomplete: download it again.")


def safetensors_header(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes in a safetensors file, from its header alone.

    Args:
        path: file that has to be safetensors.

    Returns:
        Shape of each tensor by key.

    Raises:
        ValueError: if the file is a pickle, truncated or otherwise unreadable.
    """
    path = Path(path)
    if (kind := sniff(path)) != "safetensors":
        raise ValueError(
            f"{str(path)!r} should be safetensors but is a torch {kind} file; pickles are not opened here. "
            "Convert it (`genkit convert`) or save it again as safetensors."
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError(f"{str(path)!r} is truncated: its header wants {length} bytes, the file has {size}; download it again.")
        try:
            header = json.loads(file.read(length))
            tensors = {key: value for key, value in header.items() if key != "__metadata__"}
            end = 8 + length + max((value["data_offsets"][1] for value in tensors.values()), default=0)
            shapes = {key: tuple(value["shape"]) for key, value in tensors.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{str(path)!r} has an unreadable safetensors header ({error}); it is corrupt: download it again.") from error
    if end != size:
        raise ValueError(f"{str(path)!r} is truncated or corrupt: it should have {end} bytes, it has {size}; download it again.")
    return shapes


def read_safetensors(path: str | Path) -> StateDict:
    """Return the tensors of a safetensors file after checking that it is complete.

    Raises:
        ValueError: if it is not a complete safetensors file.
    """
    safetensors_header(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a valid safetensors file ({error}); it is corrupt: download it again.") from error


def check_finite(state: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuse weights that contain NaN or infinity.

    Args:
        state: tensors by key.
        source: where they come from, for the message.

    Raises:
        ValueError: naming the file, the first keys and their number.
    """
    bad = [key for key, value in state.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]
    if bad:
        shown = ", ".join(bad[:10]) + (", ..." if len(bad) > 10 else "")
        raise ValueError(
            f"{str(source)!r}: NaN or infinity in {len(bad)} of {len(state)} tensors: {shown}; the training that wrote it diverged."
        )


def load_strict(module: nn.Module, state: Mapping[str, Tensor], what: str, remedy: str) -> None:
    """Load a state dict whose keys and shapes must be the module's; only batch norms' step counters may be missing.

    Args:
        module: to load.
        state: tensors by key.
        what: whose weights, for the message.
        remedy: what to give instead.

    Raises:
        ValueError: naming the keys that differ, or hold values that are not finite.
    """
    own = module.state_dict()
    given = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")} | dict(state)
    shapes, found = ({key: tuple(value.shape) for key, value in tensors.items()} for tensors in (own, given))
    text = tell_differences(list(own.keys() - given.keys()), list(given.keys() - own.keys()), misshapen_keys(shapes, found))
    if text:
        raise ValueError(f"{what}: the weights do not fit: {text}. {remedy}")
    check_finite(given, what)
    module.load_state_dict(given)


def read_checkpoint(path: str | Path, wrappers: Sequence[str] = ("state_dict",)) -> tuple[StateDict, str]:
    """Read the state dict in a checkpoint file, never executing anything that is in it.

    Args:
        path: a safetensors or torch file (`.pth`, `.pt`, `.bin`, `.ckpt`).
        wrappers: keys under which the state dict may lie; the first that is present is taken.

    Returns:
        The tensors by key, without a `module.` prefix, and a note on how the file was read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is corrupt, truncated, not a checkpoint, or holds no tensors.
    """
    path = Path(path)
    kind = sniff(path)
    if kind == "safetensors":
        return strip_prefix(read_safetensors(path), "module."), "safetensors"
    content, note = _read_torch(path, kind)
    wrapper = next((key for key in wrappers if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)), None)
    if wrapper:
        content, note = content[wrapper], f"{note}, under {wrapper!r}"
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint {str(path)!r} holds a {type(content).__name__}, expected a state dict (names -> tensors).")
    state = {key: value.build() if isinstance(value, _Record) else value for key, value in content.items()}
    other = sorted(str(key) for key, value in state.items() if not isinstance(value, Tensor))
    if other or not state:
        hint = f"these entries are no tensors: {', '.join(other[:10])} ({len(other)} in all)" if other else "it is empty"
        raise ValueError(f"checkpoint {str(path)!r} holds no plain state dict: {hint}; pass the file with the weights alone.")
    return strip_prefix({str(key): value for key, value in state.items()}, "module."), note


def checkpoint_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes in a file by key; of a torch file that holds several state dicts, with their names as prefixes.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is corrupt, truncated, or not a checkpoint.
    """
    path = Path(path)
    kind = sniff(path)
    if kind == "safetensors":
        return safetensors_header(path)
    content, _ = _read_torch(path, kind)
    found: dict[str, tuple[int, ...]] = {}
    for key, value in content.items() if isinstance(content, Mapping) else ():
        parts = {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, Mapping) else {str(key): value}
        found |= {name: tuple(part.shape) for name, part in parts.items() if isinstance(part, Tensor)}
        found |= {name: part.size for name, part in parts.items() if isinstance(part, _Record)}
    return found


def strip_prefix(state: Mapping[str, Tensor], prefix: str) -> StateDict:
    """Return the state dict without a prefix that all of its keys share (unchanged when one lacks it)."""
    if state and all(key.startswith(prefix) for key in state):
        return {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def _read_torch(path: Path, kind: str) -> tuple[Any, str]:
    """Return the object in a torch file: with torch's restricted reader, or with ours where that refuses classes."""
    if kind == "zip" and not zipfile.is_zipfile(path):
        raise ValueError(f"checkpoint {str(path)!r} is a truncated zip file ({path.stat().st_size} bytes); download it again.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True), "torch file, weights only"
    except pickle.UnpicklingError as error:
        if kind == "pickle":
            raise ValueError(
                f"checkpoint {str(path)!r} is an old-format torch pickle that is corrupt or has more than tensors ({_first_line(error)}); "
                "save its state dict with `torch.save` of torch >= 1.6 or as safetensors."
            ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, AttributeError, TypeError) as error:
        raise ValueError(
            f"checkpoint {str(path)!r} cannot be read ({_first_line(error)}); it is corrupt or incomplete: download it again."
        ) from error
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_rich_pickle(archive)
    except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise ValueError(
            f"checkpoint {str(path)!r} cannot be read safely ({_first_line(error)}); save its state dict as safetensors."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


class _Inert:
    """Stand-in for any class a pickle names: accepts every pickle operation and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def __call__(self, *args: object, **kwargs: object) -> _Inert:
        return self

    def __hash__(self) -> int:
        return id(self)

    def append(self, value: object) -> None:
        """Ignore a value."""

    def extend(self, values: object) -> None:
        """Ignore values."""

    def add(self, value: object) -> None:
        """Ignore a value."""


class _Storage:
    """Where a tensor's numbers lie in the archive."""

    def __init__(self, archive: zipfile.ZipFile, name: str, dtype: torch.dtype) -> None:
        self.archive, self.name, self.dtype = archive, name, dtype
        self.data: Tensor | None = None

    def read(self) -> Tensor:
        """Return the numbers [n], read once."""
        if self.data is None:
            info = self.archive.getinfo(self.name)
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"record {self.name} is compressed, torch never writes that")
            self.data = (
                torch.frombuffer(bytearray(self.archive.read(info)), dtype=self.dtype)
                if info.file_size
                else torch.empty(0, dtype=self.dtype)
            )
        return self.data


class _Record:
    """A tensor as the pickle describes it; built only when asked for."""

    def __init__(self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    def __setstate__(self, state: object) -> None:
        pass

    def build(self) -> Tensor:
        """Return the tensor."""
        try:
            return self.storage.read().as_strided(self.size, self.stride, self.offset).clone()
        except RuntimeError as error:
            raise ValueError(f"a tensor of shape {list(self.size)} does not fit its record {self.storage.name}") from error


def _rebuild_tensor(storage: _Storage, offset: int, size: Any, stride: Any, *_: object) -> _Record:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without storage")
    return _Record(storage, int(offset), tuple(int(n) for n in size), tuple(int(n) for n in stride))


def _rebuild_parameter(data: Any, *_: object) -> Any:
    return data


class _RichUnpickler(pickle.Unpickler):
    """Unpickler that knows ordered dicts, tensors and storages; every other class becomes an inert stand-in."""

    def __init__(self, file: IO[bytes], archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file, encoding="utf-8")
        self.archive, self.root = archive, root
        self.ignored: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        """Return what a pickled name stands for."""
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return _rebuild_parameter
        if module == "torch" and name in DTYPES:
            return type(name, (_Inert,), {"dtype": DTYPES[name]})
        self.ignored.add(f"{module}.{name}")
        return type(name.rpartition(".")[2] or "Inert", (_Inert,), {})

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the storage that a persistent id names."""
        kind, storage_type, key, *_ = pid
        if kind != "storage" or not hasattr(storage_type, "dtype"):
            raise pickle.UnpicklingError(f"unknown record {kind!r}")
        return _Storage(self.archive, f"{self.root}/data/{key}", storage_type.dtype)


def _read_rich_pickle(archive: zipfile.ZipFile) -> tuple[Any, str]:
    """Return the object of a torch zip file with all tensors of its state dict built and every foreign class inert."""
    name = next((name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1), None)
    if name is None:
        raise ValueError("no data.pkl in the zip file, so torch did not write it")
    root = name.split("/")[0]
    if f"{root}/byteorder" in archive.namelist() and archive.read(f"{root}/byteorder") != b"little":
        raise ValueError("written on a big-endian machine")
    with archive.open(name) as file:
        reader = _RichUnpickler(file, archive, root)
        content = reader.load()
    for value in [content, *(content.values() if isinstance(content, dict) else [])]:
        if isinstance(value, dict):
            value.update({key: item.build() for key, item in value.items() if isinstance(item, _Record)})
    return content, f"rich pickle read without executing it, {len(reader.ignored)} classes ignored"
