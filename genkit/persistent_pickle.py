"""Read pickles of persistent network objects (EDM, StyleGAN, SiD) without executing the source code that they carry.

Such files store every module as `_reconstruct_persistent_obj(meta)`; meta holds the module's full source, which the usual reader runs.
Here a fixed list of names is known, each with a harmless meaning; any other name ends the reading with an error that gives it.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Persistent:
    """A persistent object: its class by name and its state; the source code that came with it is dropped.

    Attributes:
        class_name: of the original.
        state: its `__dict__`.
    """

    class_name: str
    state: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Arguments that its constructor was called with."""
        found: Mapping[str, Any] = self.state.get("_init_kwargs", {})
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Return the state dict of the module tree."""
        return dict(_walk(self.state, ""))

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.state = state


class _Container(Persistent):
    """A plain container module of torch, state by `__setstate__`."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__("ModuleDict")


def _walk(state: Mapping[str, Any], prefix: str) -> list[tuple[str, Tensor]]:
    """Collect parameters, buffers and those of the modules inside."""
    found = []
    lost = state.get("_non_persistent_buffers_set", set())
    for kind in ("_parameters", "_buffers"):
        for name, value in (state.get(kind) or {}).items():
            if isinstance(value, Tensor) and name not in lost:
                found.append((prefix + name, value.detach()))
    for name, module in (state.get("_modules") or {}).items():
        if isinstance(module, Persistent):
            found += _walk(module.state, f"{prefix}{name}.")
    return found


def _persistent(meta: Mapping[str, Any]) -> Persistent:
    """Stand in for the function that would run the source code in meta."""
    if not isinstance(meta, Mapping) or meta.get("type") != "class":
        raise pickle.UnpicklingError("a persistent object without description")
    return Persistent(str(meta.get("class_name")), meta.get("state") or {})


def _storage(content: bytes) -> Any:
    """Load a storage, itself a pickle, with torch's restricted reader."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


class _EasyDict(dict[str, Any]):
    """A dictionary with attributes, as a plain one."""


def _scalar(dtype: Any, content: bytes) -> Any:
    """Return a number of NumPy.

    Raises:
        pickle.UnpicklingError: for objects, which would be pickles of their own.
    """
    if not isinstance(dtype, np.dtype) or dtype.hasobject:
        raise pickle.UnpicklingError("a number of NumPy that is no number")
    return np.frombuffer(content, dtype=dtype)[0]


ALLOWED: dict[tuple[str, str], Any] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("dnnlib.util", "EasyDict"): _EasyDict,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch.nn.modules.container", "ModuleDict"): _Container,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy", "dtype"): np.dtype,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return the meaning of a name on the list."""
        if (module, name) not in ALLOWED:
            raise ForbiddenName(f"{module}.{name}")
        return ALLOWED[module, name]


class ForbiddenName(Exception):
    """A name that such files do not hold."""


def read_persistent_pickle(path: str | Path) -> Any:
    """Return the object in a pickle of persistent objects, networks as `Persistent`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or names anything outside the list; nothing of it is executed.
    """
    try:
        with Path(path).open("rb") as file:
            return _Reader(file).load()
    except ForbiddenName as error:
        known = ", ".join(sorted(".".join(item) for item in ALLOWED))
        raise ValueError(
            f"{str(path)!r} asks for {error}, which a file of networks does not need: it was not opened. Known names: {known}."
        ) from error
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, IndexError, AttributeError, RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is damaged or no pickle of networks ({error}); download it again.") from error
