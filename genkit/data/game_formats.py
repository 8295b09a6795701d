"""Readers of the mesh formats of free games: pmd, g3d, md2, md3, spm, ac, acc, pie; what else there is trimesh reads.

Only positions and triangles are read, of the first frame; polygons become fans; +Y is up in what comes out. All binary formats are little
endian.

Letters: v vertices, f faces.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

MeshArrays = tuple[NDArray[np.float64], NDArray[np.int64]]
"""Positions [v, 3] and triangles [f, 3]."""


class Bytes:
    """A file that is read from front to back.

    Args:
        data: all of it.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def take(self, form: str) -> tuple[int, ...]:
        """Read numbers by a `struct` format.

        Raises:
            ValueError: at the end of the file.
        """
        try:
            found: tuple[int, ...] = struct.unpack_from("<" + form, self.data, self.place)
        except struct.error as error:
            raise ValueError(f"the file ends at byte {len(self.data)} where more is expected ({error}).") from None
        self.place += struct.calcsize("<" + form)
        return found

    def array(self, kind: str, *shape: int) -> NDArray[np.generic]:
        """Read an array of a numpy type.

        Raises:
            ValueError: at the end of the file, or for impossible counts.
        """
        dtype, count = np.dtype(kind).newbyteorder("<"), int(np.prod(shape))
        end = self.place + count * dtype.itemsize
        if min(shape, default=0) < 0 or end > len(self.data):
            raise ValueError(f"the file ends at byte {len(self.data)}, {shape} numbers are expected at byte {self.place}.")
        found = np.frombuffer(self.data, dtype, count, self.place).reshape(shape)
        self.place = end
        return found

    def expect(self, ident: bytes) -> None:
        """Read the name of the format.

        Raises:
            ValueError: if it is another.
        """
        found = self.data[self.place : self.place + len(ident)]
        if found != ident:
            raise ValueError(f"the file begins with {found!r}, not with {ident!r}.")
        self.place += len(ident)


@dataclass
class Parts:
    """Parts of a mesh that are put together."""

    vertices: list[NDArray[np.float64]] = field(default_factory=list)
    faces: list[NDArray[np.int64]] = field(default_factory=list)
    count: int = 0

    def add(self, vertices: object, faces: object) -> None:
        """Add vertices [v, 3] and faces [f, 3] that count from the first of these."""
        own = np.asarray(vertices, np.float64).reshape(-1, 3)
        self.faces.append(np.asarray(faces, np.int64).reshape(-1, 3) + self.count)
        self.vertices.append(own)
        self.count += len(own)

    def joined(self) -> MeshArrays:
        """Return the whole.

        Raises:
            ValueError: if there is no face, or one names vertices that are not there.
        """
        faces = np.concatenate(self.faces) if self.faces else np.zeros((0, 3), np.int64)
        if not len(faces):
            raise ValueError("the file has no faces.")
        if not 0 <= faces.min() <= faces.max() < self.count:
            raise ValueError(f"faces name vertices {faces.min()} to {faces.max()} of {self.count}.")
        return np.concatenate(self.vertices), faces


def y_up(vertices: NDArray[np.generic]) -> NDArray[np.float64]:
    """Return vertices [v, 3] of a world whose z is up with y up: (x, z, -y)."""
    x, y, z = np.asarray(vertices, np.float64).T
    return np.stack([x, z, -y], axis=1)


def fan(corners: list[int]) -> list[tuple[int, int, int]]:
    """Return the triangles of a polygon."""
    return [(corners[0], corners[i], corners[i + 1]) for i in range(1, len(corners) - 1)]


def read_pmd(data: bytes) -> MeshArrays:
    """Read a mesh of 0 A.D."""
    file, parts = Bytes(data), Parts()
    file.expect(b"PSMD")
    version, _, count = file.take("III")
    coordinates = file.take("I")[0] if version >= 4 else 1
    rows = file.array("u1", count, 44 + 8 * coordinates)
    positions = np.ascontiguousarray(rows[:, :12]).view("<f4")
    (faces,) = file.take("I")
    parts.add(positions, file.array("u2", faces, 3))
    return parts.joined()


def read_g3d(data: bytes) -> MeshArrays:
    """Read a mesh of MegaGlest, version 4."""
    file, parts = Bytes(data), Parts()
    file.expect(b"G3D")
    version, meshes, _ = file.take("BHB")
    if version != 4:
        raise ValueError(f"G3D of version 4 is read, got version {version}.")
    for _ in range(meshes):
        file.array("u1", 64)
        frames, vertices, indices = file.take("III")
        file.array("u1", 32)
        _, textures = file.take("II")
        file.array("u1", 64 * int(textures).bit_count())
        positions = file.array("f4", frames, vertices, 3)
        file.array("f4", frames, vertices, 3)
        if textures:
            file.array("f4", vertices, 2)
        parts.add(positions[0], file.array("u4", indices // 3, 3))
        file.array("u4", indices % 3)
    return parts.joined()


def read_md2(data: bytes) -> MeshArrays:
    """Read a model of Quake 2's form."""
    file, parts = Bytes(data), Parts()
    file.expect(b"IDP2")
    header = file.take("16i")
    count, triangles, triangles_at, frames_at = header[5], header[7], header[12], header[13]
    file.place = triangles_at
    faces = file.array("u2", triangles, 6)[:, :3]
    file.place = frames_at
    scale, shift = file.array("f4", 3), file.array("f4", 3)
    file.array("u1", 16)
    positions = file.array("u1", count, 4)[:, :3] * np.asarray(scale, np.float64) + np.asarray(shift, np.float64)
    parts.add(y_up(positions), faces)
    return parts.joined()


def read_md3(data: bytes) -> MeshArrays:
    """Read a model of Quake 3's form."""
    file, parts = Bytes(data), Parts()
    file.expect(b"IDP3")
    file.place = 72
    header = file.take("9i")
    surfaces, start = header[3], header[7]
    for _ in range(surfaces):
        file.place = start
        file.expect(b"IDP3")
        file.array("u1", 64)
        _, _, _, vertices, triangles, triangles_at, _, _, vertices_at, end = file.take("10i")
        file.place = start + triangles_at
        faces = file.array("i4", triangles, 3)
        file.place = start + vertices_at
        parts.add(y_up(file.array("i2", vertices, 4)[:, :3]) / 64, faces)
        start += end
    return parts.joined()


def read_spm(data: bytes) -> MeshArrays:
    """Read a mesh of SuperTuxKart."""
    file, parts = Bytes(data), Parts()
    file.expect(b"SP")
    kind, flags = file.take("BB")
    file.array("f4", 6)
    materials = []
    for _ in range(file.take("H")[0]):
        names = []
        for _ in range(2):
            (length,) = file.take("B")
            names.append(length)
            file.array("u1", length)
        materials.append(sum(length > 0 for length in names))
    if kind & 7 == 2:
        file.take("H")
    for _ in range(file.take("H")[0]):
        vertices, indices, material = file.take("IIH")
        textures = materials[material] if material < len(materials) else 0
        positions = np.zeros((vertices, 3))
        for i in range(vertices):
            positions[i] = file.take("3f")
            _skip_attributes(file, kind & 7, flags, textures)
        index = file.array("u2" if vertices > 255 else "u1", indices // 3, 3)
        file.array("u2" if vertices > 255 else "u1", indices % 3)
        parts.add(positions, index)
    return parts.joined()


def _skip_attributes(file: Bytes, kind: int, flags: int, textures: int) -> None:
    """Skip what a vertex of SuperTuxKart has beside its position."""
    size = 4 if flags & 1 else 0
    if flags & 2:
        file.place += size
        (marker,) = file.take("B")
        size = 0 if marker == 128 else 3
    size += 4 * textures + (4 if flags & 4 and textures else 0) + (16 if kind == 0 else 0)
    file.place += size


def read_ac(data: bytes) -> MeshArrays:
    """Read a file of AC3D or TORCS: polygons and triangle strips of all objects, each at its place."""
    lines = iter(data.decode("utf-8", "replace").splitlines())
    if not next(lines, "").startswith("AC3D"):
        raise ValueError("the file does not begin with 'AC3D'.")
    parts = Parts()
    for line in lines:
        if line.startswith("OBJECT"):
            _read_object(lines, np.eye(3), np.zeros(3), parts)
    return parts.joined()


def _read_object(rows: Iterator[str], rotation: NDArray[np.float64], place: NDArray[np.float64], parts: Parts) -> None:
    """Read an object and its children, turned by [3, 3] and moved by [3]."""
    vertices, surface = np.zeros((0, 3)), 0
    faces: list[tuple[int, ...]] = []
    for line in rows:
        word, _, rest = line.strip().partition(" ")
        if word == "loc":
            place = place + np.array(rest.split(), float) @ rotation
        elif word == "rot":
            rotation = np.array(rest.split(), float).reshape(3, 3) @ rotation
        elif word == "data":
            _skip_text(rows, int(rest))
        elif word == "numvert":
            vertices = np.array([next(rows).split()[:3] for _ in range(int(rest))], float).reshape(-1, 3)
        elif word == "SURF":
            surface = int(rest, 16) & 15
        elif word == "refs":
            corners = [int(next(rows).split()[0]) for _ in range(int(rest))]
            if surface == 0:
                faces += fan(corners)
            elif surface == 4:
                faces += [tuple(corners[i : i + 3]) for i in range(len(corners) - 2)]
        elif word == "kids":
            parts.add(vertices @ rotation + place, faces)
            for _ in range(int(rest)):
                next(line for line in rows if line.startswith("OBJECT"))
                _read_object(rows, rotation, place, parts)
            return


def _skip_text(rows: Iterator[str], count: int) -> None:
    """Skip the free text of an object, so many characters."""
    seen = 0
    while seen < count:
        seen += len(next(rows)) + 1


def read_pie(data: bytes) -> MeshArrays:
    """Read a model of Warzone 2100, version 2 or 3: all levels."""
    lines = iter(data.decode("utf-8", "replace").splitlines())
    if not next(lines, "").startswith("PIE "):
        raise ValueError("the file does not begin with 'PIE'.")
    parts, points = Parts(), np.zeros((0, 3))
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        if word == "POINTS":
            points = np.array([next(lines).split()[:3] for _ in range(int(rest))], float).reshape(-1, 3)
        elif word == "POLYGONS":
            faces: list[tuple[int, int, int]] = []
            for _ in range(int(rest)):
                numbers = next(lines).split()
                faces += fan([int(index) for index in numbers[2 : 2 + int(numbers[1])]])
            parts.add(points, faces)
    return parts.joined()


READERS: dict[str, Callable[[bytes], MeshArrays]] = {
    ".pmd": read_pmd,
    ".g3d": read_g3d,
    ".md2": read_md2,
    ".md3": read_md3,
    ".spm": read_spm,
    ".ac": read_ac,
    ".acc": read_ac,
    ".pie": read_pie,
}


def read_mesh(name: str, data: bytes) -> MeshArrays:
    """Read a mesh by the suffix of its name.

    Raises:
        ValueError: if it cannot be read, or holds no faces.
    """
    suffix = "." + name.rpartition(".")[2].lower()
    if suffix in READERS:
        try:
            return READERS[suffix](data)
        except (IndexError, StopIteration, OverflowError, MemoryError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} is cut off or corrupt ({type(error).__name__}).") from error
    import trimesh

    try:
        mesh = trimesh.load(io.BytesIO(data), file_type=suffix[1:], force="mesh", process=False)
    except (ValueError, OSError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"{name} cannot be read as a mesh ({error}).") from error
    parts = Parts()
    parts.add(getattr(mesh, "vertices", ()), getattr(mesh, "faces", ()))
    return parts.joined()
