"""Readers of game meshes, on files written here byte by byte: the same two triangles in every format."""

from __future__ import annotations

import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from genkit.data.game_formats import READERS, fan, read_mesh, y_up

POINTS = np.array([[0, 0, 0], [1, 0, 0], [1, 2, 0], [0, 2, 3]], np.float32)
FACES = np.array([[0, 1, 2], [0, 2, 3]])
Z_UP = np.stack([POINTS[:, 0], -POINTS[:, 2], POINTS[:, 1]], axis=1)  # what y_up turns into POINTS


def pmd(version: int = 4) -> bytes:
    coordinates = 2 if version >= 4 else 1
    head = b"PSMD" + struct.pack("<III", version, 0, 4) + (struct.pack("<I", 2) if version >= 4 else b"")
    rows = b"".join(point.tobytes() + bytes(12 + 8 * coordinates + 20) for point in POINTS)
    return head + rows + struct.pack("<I", 2) + FACES.astype("<u2").tobytes() + b"bones"


def g3d() -> bytes:
    mesh = bytes(64) + struct.pack("<III", 2, 4, 6) + bytes(32) + struct.pack("<II", 0, 0b101) + bytes(128)
    mesh += POINTS.tobytes() + (POINTS + 9).tobytes() + bytes(2 * 48) + bytes(4 * 8) + FACES.astype("<u4").tobytes()
    return b"G3D" + struct.pack("<BHB", 4, 2, 0) + 2 * mesh


def md2() -> bytes:
    triangles = b"".join(struct.pack("<6H", *face, 0, 0, 0) for face in FACES)
    scale, shift = np.array([0.5, 0.25, 1], "<f4"), np.array([0, -3, 0], "<f4")
    steps = np.round((Z_UP - shift) / scale).astype(np.uint8)
    frame = scale.tobytes() + shift.tobytes() + bytes(16) + b"".join(bytes([*step, 0]) for step in steps)
    header = [8, 64, 64, len(frame), 0, 4, 0, 2, 0, 1, 0, 0, 68, 68 + len(triangles), 0, 0]
    return b"IDP2" + struct.pack("<16i", *header) + triangles + frame


def md3() -> bytes:
    vertices = b"".join(struct.pack("<3hH", *(np.round(64 * point).astype(int).tolist()), 0) for point in Z_UP)
    triangles = FACES.astype("<i4").tobytes()
    at = 4 + 64 + 40
    surface = b"IDP3" + bytes(64) + struct.pack("<10i", 0, 1, 0, 4, 2, at, 0, 0, at + len(triangles), at + len(triangles) + len(vertices))
    surface += triangles + vertices
    return b"IDP3" + struct.pack("<i", 15) + bytes(64) + struct.pack("<9i", 0, 1, 0, 2, 0, 0, 0, 108, 0) + 2 * surface


def spm(kind: int = 1) -> bytes:
    head = b"SP" + struct.pack("<BB", 8 + kind, 7) + bytes(24) + struct.pack("<H", 1) + b"\x03abc\x00"
    body = struct.pack("<H", 1) + struct.pack("<IIH", 4, 6, 0)
    for i, point in enumerate(POINTS):
        body += (
            point.tobytes() + bytes(4) + (b"\x80" if i % 2 else b"\x00" + bytes(3)) + bytes(4) + bytes(4) + bytes(16 if kind == 0 else 0)
        )
    return head + (struct.pack("<H", 0) if kind == 2 else b"") + body + FACES.astype("u1").tobytes()


def ac() -> bytes:
    vertices = "\n".join(" ".join(map(str, point - [5, 0, 0])) for point in POINTS)
    return f"""AC3Db
MATERIAL "x" rgb 1 1 1
OBJECT world
kids 1
OBJECT group
loc 2 0 0
kids 1
OBJECT poly
name "strip"
data 7
OBJECT
loc 3 0 0
numvert 4
{vertices}
numsurf 3
SURF 0x10
mat 0
refs 4
0 0 0
1 0 0
2 0 0
3 0 0
SURF 0x12
refs 2
0 0 0
1 0 0
SURF 0x24
refs 3
1 0 0
2 0 0
3 0 0
kids 0
""".encode()


def pie() -> bytes:
    points = "\n".join(" ".join(str(int(x)) for x in point) for point in POINTS)
    level = f"POINTS 4\n{points}\nPOLYGONS 2\n200 3 0 1 2 0 0 0 0 0 0\n4200 3 0 2 3 1 1 1 1 0 0 0 0 0 0\n"
    return f"PIE 2\nTYPE 200\nTEXTURE 0 page.png 256 256\nLEVELS 2\nLEVEL 1\n{level}CONNECTORS 1\n0 0 0\nLEVEL 2\n{level}".encode()


OBJ = "\n".join(["v " + " ".join(map(str, point)) for point in POINTS] + ["f 1 2 3", "f 1 3 4"]).encode()
FILES = {
    "a.pmd": (pmd(), 1), "old.pmd": (pmd(3), 1), "a.g3d": (g3d(), 2), "a.md2": (md2(), 1), "a.md3": (md3(), 2), "a.spm": (spm(), 1),
    "animated.SPM": (spm(0), 1), "sectors.spm": (spm(2), 1), "a.pie": (pie(), 2), "a.obj": (OBJ, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_triangles(name: str) -> None:
    data, copies = FILES[name]
    vertices, faces = read_mesh(name, data)
    wanted = np.tile(POINTS[FACES], (copies, 1, 1))
    np.testing.assert_allclose(vertices[faces], wanted, atol=1e-6)


def test_objects_of_ac3d_stand_at_their_places() -> None:
    for suffix in ("ac", "acc"):
        vertices, faces = read_mesh(f"a.{suffix}", ac())
        np.testing.assert_allclose(vertices[faces], POINTS[np.array([[0, 1, 2], [0, 2, 3], [1, 2, 3]])], atol=1e-6)


def test_polygons_become_fans_and_z_becomes_y() -> None:
    assert fan([4, 5, 6, 7]) == [(4, 5, 6), (4, 6, 7)]
    np.testing.assert_allclose(y_up(Z_UP), POINTS)


@pytest.mark.parametrize("suffix", sorted(READERS))
@pytest.mark.parametrize(
    "data", [b"", b"nonsense that is none of these", b"PIE 2\nPOINTS 3\n1 2\n", b"AC3Db\nOBJECT poly\nnumvert 9\n0 0 0\n"]
)
def test_what_is_no_mesh_is_said_to_be_none(suffix: str, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"begin|ends at|no faces|cut off|could not convert"):
        read_mesh(f"x{suffix}", data)


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_that_are_cut_off_do_not_pass(name: str) -> None:
    data = FILES[name][0]
    for share in (0.3, 0.6, 0.9):
        try:
            _, faces = read_mesh(name, data[: int(share * len(data))])
        except ValueError:
            continue
        assert len(faces) < 2 * FILES[name][1], "text formats may end early, with fewer faces"


def test_folders_and_archives_become_a_parquet_file(tmp_path: Path) -> None:
    folder = tmp_path / "game"
    folder.mkdir()
    (folder / "a.obj").write_bytes(OBJ)
    (folder / "again.pmd").write_bytes(pmd())
    (folder / "broken.md3").write_bytes(b"IDP3")
    with zipfile.ZipFile(folder / "data.pk3", "w") as archive:
        archive.writestr("models/other.pie", pie().replace(b"1 2 0\n", b"7 2 0\n"))
    script = Path(__file__).parents[2] / "tokenizers" / "prepare_meshes.py"
    command = [sys.executable, str(script), str(folder), "--out", str(tmp_path / "out.parquet"), "--min-faces", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 meshes" in done.stdout and "'there already': 1" in done.stdout and "'cannot be read, or has no faces': 1" in done.stdout
    from genkit.data.mesh_samples import MeshSamples

    samples = MeshSamples(tmp_path / "out.parquet")
    assert sorted(len(mesh.faces) for mesh in samples.meshes) == [2, 2]
