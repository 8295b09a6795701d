"""A small software renderer: orthographic turntables of meshes, flat shading, z-buffer, no display and no compiled part.

The camera is that of the low-poly set: with azimuth a and elevation e it stands at (cos e sin a, sin e, cos e cos a) and looks at the
origin; azimuth 0 looks from +z and turns towards +x, y is up. Colour = face colour (0.45 + 0.55 |n . l|), l fixed to the camera.

Letters: v vertices, f faces, s side of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import trimesh
    from numpy.typing import NDArray
    from PIL import Image

SCALE = 0.513  # of the half picture, so that the unit sphere fits
LIGHT = np.array([-0.4, 0.6, 0.7]) / np.linalg.norm([-0.4, 0.6, 0.7])  # right, up, towards the camera
AMBIENT, DIFFUSE = 0.45, 0.55
ELEVATION = 20.0
GREY = (190, 190, 190)
EDGE, DARK = 0.6, 40.0  # half width of drawn edges in pixels, their grey
PAIRS = 4_000_000  # face-pixel pairs at a time


def camera_axes(azimuth: float, elevation: float = ELEVATION) -> NDArray[np.float64]:
    """Return right, up and the direction towards the camera as rows [3, 3]; angles in degrees."""
    a, e = np.radians(azimuth), np.radians(elevation)
    towards = np.array([np.cos(e) * np.sin(a), np.sin(e), np.cos(e) * np.cos(a)])
    right = np.cross(-towards, [0.0, 1.0, 0.0])
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(right, -towards), towards])


def render(
    vertices: NDArray[Any],
    faces: NDArray[Any],
    colours: NDArray[np.uint8] | None = None,
    azimuth: float = 0.0,
    size: int = 128,
    *,
    elevation: float = ELEVATION,
    supersampling: int = 2,
    wireframe: bool = False,
) -> NDArray[np.uint8]:
    """Draw a mesh on white.

    Args:
        vertices: [v, 3], inside the unit sphere to be seen whole.
        faces: [f, 3].
        colours: [f, 3] uint8 of the faces; grey if None.
        azimuth: degrees.
        size: s, pixels a side.
        elevation: degrees, below 90.
        supersampling: samples per pixel and axis.
        wireframe: draw the edges of the visible faces too.

    Returns:
        [s, s, 3].

    Raises:
        ValueError: for impossible sizes or angles.
    """
    if size < 1 or supersampling < 1 or not abs(elevation) < 90:
        got = f"size={size}, supersampling={supersampling}, elevation={elevation}"
        raise ValueError(f"render: size and supersampling must be at least 1 and the elevation below 90 degrees, got {got}.")
    axes, side = camera_axes(azimuth, elevation), size * supersampling
    corners = np.asarray(vertices, np.float64)[np.asarray(faces, np.int64)] @ axes.T  # f, corner, (right, up, towards)
    shades = shading(corners)
    base = np.broadcast_to(np.array(GREY), (len(faces), 3)) if colours is None else np.asarray(colours)
    picture = np.full((side * side, 3), 255.0)
    nearest = nearest_faces(corners, side)
    seen = nearest >= 0
    picture[seen] = base[nearest[seen]] * shades[nearest[seen], None]
    if wireframe:
        picture[seen] = np.where(edge_distances(corners, nearest, side)[:, None] < EDGE * supersampling, DARK, picture[seen])
    blocks = picture.reshape(size, supersampling, size, supersampling, 3).mean(axis=(1, 3))
    return np.round(blocks).clip(0, 255).astype(np.uint8)


def shading(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the brightness [f] of faces whose corners [f, 3, 3] are in camera axes."""
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    lengths = np.linalg.norm(normals, axis=1)
    cosines = np.divide(np.abs(normals @ LIGHT), lengths, out=np.zeros(len(normals)), where=lengths > 0)
    return AMBIENT + DIFFUSE * cosines


def nearest_faces(corners: NDArray[np.float64], side: int) -> NDArray[np.int64]:
    """Return the face that each sample shows, -1 for none, [side * side], rows from the top.

    Args:
        corners: [f, 3, 3] in camera axes.
        side: samples a side; sample i is at (i + 0.5) / side.
    """
    x, y = (0.5 + SCALE * corners[..., 0]) * side - 0.5, (0.5 - SCALE * corners[..., 1]) * side - 0.5
    low = np.stack([np.ceil(x.min(1)), np.ceil(y.min(1))], 1).clip(0).astype(np.int64)
    high = np.stack([np.floor(x.max(1)), np.floor(y.max(1))], 1).clip(max=side - 1).astype(np.int64)
    spans = (high - low + 1).clip(0)
    counts = spans[:, 0] * spans[:, 1]
    depth, found = np.full(side * side, -np.inf), np.full(side * side, -1, np.int64)
    ends = np.cumsum(counts)
    first = 0
    while first < len(counts):
        base = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, base + PAIRS, side="right")))
        _draw(slice(first, last), x, y, corners[..., 2], low, spans, side, depth, found)
        first = last
    return found


def edge_distances(corners: NDArray[np.float64], found: NDArray[np.int64], side: int) -> NDArray[np.float64]:
    """Return how far each sample that shows a face is from the nearest edge of that face, in samples.

    Args:
        corners: [f, 3, 3] in camera axes.
        found: from `nearest_faces`.
        side: samples a side.
    """
    sample = np.flatnonzero(found >= 0)
    places = np.stack([0.5 + SCALE * corners[..., 0], 0.5 - SCALE * corners[..., 1]], -1) * side - 0.5
    own, point = places[found[sample]], np.stack([sample % side, sample // side], -1)
    distances = []
    for i in range(3):
        start, edge = own[:, i], own[:, (i + 1) % 3] - own[:, i]
        length = np.linalg.norm(edge, axis=1).clip(1e-9)
        offset = point - start
        distances.append(np.abs(edge[:, 0] * offset[:, 1] - edge[:, 1] * offset[:, 0]) / length)
    nearest: NDArray[np.float64] = np.min(distances, axis=0)
    return nearest


def _draw(
    part: slice,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    z: NDArray[np.float64],
    low: NDArray[np.int64],
    spans: NDArray[np.int64],
    side: int,
    depth: NDArray[np.float64],
    found: NDArray[np.int64],
) -> None:
    """Draw some faces into the buffers: every sample of a face's box, kept where it lies inside and nearer."""
    counts = spans[part, 0] * spans[part, 1]
    face = np.repeat(np.arange(part.start, part.stop), counts)
    place = np.arange(len(face)) - np.repeat(np.cumsum(counts) - counts, counts)
    width = spans[face, 0]
    px, py = low[face, 0] + place % width, low[face, 1] + place // width
    ax, ay, bx, by, cx, cy = x[face, 0], y[face, 0], x[face, 1], y[face, 1], x[face, 2], y[face, 2]
    area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
    with np.errstate(divide="ignore", invalid="ignore"):
        u = ((bx - px) * (cy - py) - (cx - px) * (by - py)) / area
        v = ((cx - px) * (ay - py) - (ax - px) * (cy - py)) / area
        w = 1 - u - v
    inside = (u >= 0) & (v >= 0) & (w >= 0)
    face, sample = face[inside], (py * side + px)[inside]
    height = u[inside] * z[face, 0] + v[inside] * z[face, 1] + w[inside] * z[face, 2]
    order = np.lexsort((-face, height))  # the nearest last; of equals the first face
    own_depth, own_face = np.full_like(depth, -np.inf), np.full_like(found, -1)
    own_depth[sample[order]], own_face[sample[order]] = height[order], face[order]
    nearer = own_depth > depth
    depth[nearer], found[nearer] = own_depth[nearer], own_face[nearer]


def turntable(
    mesh: trimesh.Trimesh, views: int = 16, size: int = 128, colours: NDArray[np.uint8] | None = None, *, wireframe: bool = False
) -> list[Image.Image]:
    """Return pictures of a full turn of a mesh, which is centred and fitted into the unit sphere first.

    Args:
        mesh: any mesh with faces.
        views: pictures, evenly spread from azimuth 0.
        size: pixels a side.
        colours: [f, 3] uint8; the mesh's own face colours, or grey, if None.
        wireframe: draw the edges of the visible faces too.

    Raises:
        ValueError: for no views, or a mesh without faces or with numbers that are not finite.
    """
    from PIL import Image

    if views < 1:
        raise ValueError(f"turntable: views must be at least 1, got {views}.")
    vertices = fitted(mesh)
    own = colours if colours is not None else face_colours(mesh)
    return [Image.fromarray(render(vertices, mesh.faces, own, 360 * i / views, size, wireframe=wireframe)) for i in range(views)]


def fitted(mesh: trimesh.Trimesh) -> NDArray[np.float64]:
    """Return vertices [v, 3] centred on their box and scaled into the unit sphere.

    Raises:
        ValueError: for a mesh without faces or with numbers that are not finite.
    """
    vertices = np.asarray(mesh.vertices, np.float64)
    if not len(mesh.faces) or not np.isfinite(vertices).all():
        raise ValueError(f"a mesh to draw needs faces and finite vertices, got {len(mesh.faces)} faces and {len(vertices)} vertices.")
    centred = vertices - (vertices.min(0) + vertices.max(0)) / 2
    radius = np.linalg.norm(centred, axis=1).max()
    return centred / radius if radius > 0 else centred


def face_colours(mesh: trimesh.Trimesh) -> NDArray[np.uint8] | None:
    """Return the face colours [f, 3] of a mesh that has some, else None."""
    visual: Any = mesh.visual
    if getattr(visual, "kind", None) not in ("face", "vertex"):
        return None
    return np.asarray(visual.face_colors)[:, :3]


def strip(pictures: Sequence[Image.Image]) -> Image.Image:
    """Lay pictures side by side."""
    from PIL import Image

    whole = Image.new("RGB", (sum(picture.width for picture in pictures), max(picture.height for picture in pictures)), "white")
    place = 0
    for picture in pictures:
        whole.paste(picture, (place, 0))
        place += picture.width
    return whole
