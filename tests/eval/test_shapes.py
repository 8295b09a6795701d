"""3D metrics: closed forms on boxes and spheres, invariances."""

from __future__ import annotations

import math

import pytest
import torch
import trimesh
from torch import Tensor
from torch.testing import assert_close

from genkit.data.winding import winding_numbers
from genkit.eval import shapes


def box(side: float = 1.0) -> tuple[Tensor, Tensor]:
    mesh = trimesh.creation.box((side, side, side))
    return torch.tensor(mesh.vertices), torch.tensor(mesh.faces)


def test_chamfer_of_a_shift_along_a_sparse_line_is_the_shift() -> None:
    x = torch.arange(5.0)[:, None] * torch.tensor([[10.0, 0.0, 0.0]])
    found = shapes.PointDistances.between(x, x + torch.tensor([0.0, 3.0, 0.0]))
    assert found.chamfer() == pytest.approx(6) and found.chamfer(half=True) == pytest.approx(3)
    assert found.chamfer(2) == pytest.approx(18) and found.hausdorff() == pytest.approx(3)
    assert found.fscore(3.1) == (1, 1, 1) and found.fscore(2.9) == (0, 0, 0)


def test_distances_do_not_change_under_a_common_rigid_motion() -> None:
    x, y = torch.randn(50, 3).double(), torch.randn(60, 3).double()
    turn = torch.linalg.qr(torch.randn(3, 3).double())[0]
    before, after = shapes.PointDistances.between(x, y), shapes.PointDistances.between(x @ turn + 5, y @ turn + 5)
    assert before.chamfer() == pytest.approx(after.chamfer(), rel=1e-9)
    assert before.chamfer() == pytest.approx(shapes.PointDistances.between(y, x).chamfer(), rel=1e-12)


def test_fscore_is_the_harmonic_mean() -> None:
    true, predicted = torch.tensor([[0.0, 0, 0], [5.0, 0, 0]]), torch.tensor([[0.0, 0, 0]])
    score, precision, recall = shapes.PointDistances.between(true, predicted).fscore(0.1)
    assert (precision, recall) == (1, 0.5) and score == pytest.approx(2 / 3)


def test_normal_consistency_with_and_without_orientation() -> None:
    points, normals = torch.randn(40, 3), torch.nn.functional.normalize(torch.randn(40, 3), dim=1)
    assert shapes.normal_consistency(points, normals, points, -normals) == pytest.approx(1, rel=1e-6)
    assert shapes.normal_consistency(points, normals, points, -normals, signed=True) == pytest.approx(-1, rel=1e-6)


@pytest.mark.parametrize("pairs", [1, 50, 10**6])
def test_only_points_near_edges_are_edge_points(monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    monkeypatch.setattr(shapes, "PAIRS_AT_ONCE", pairs)
    grid = torch.stack(torch.meshgrid(torch.linspace(0, 1, 21), torch.linspace(0, 1, 21), indexing="ij"), -1).view(-1, 2)
    floor, wall = torch.cat([grid, torch.zeros(441, 1)], 1), torch.stack([torch.zeros(441), grid[:, 0], grid[:, 1]], 1)
    normals = torch.cat([torch.tensor([[0.0, 0, 1]]).expand(441, 3), torch.tensor([[1.0, 0, 0]]).expand(441, 3)])
    mask = shapes.edge_points(torch.cat([floor, wall]), normals, radius=0.07)
    assert mask[:441].tolist() == (floor[:, 0] < 0.07).tolist()
    assert mask[441:].tolist() == (wall[:, 2] < 0.07).tolist()


def test_winding_number_tells_inside_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    vertices, faces = box()
    queries = torch.tensor([[0.0, 0, 0], [0.4, 0.4, 0.4], [0.6, 0, 0], [3.0, 3, 3]])
    found = winding_numbers(queries, vertices, faces)
    assert_close(found, torch.tensor([1.0, 1, 0, 0], dtype=torch.float64), rtol=0, atol=1e-9)
    monkeypatch.setattr("genkit.data.winding.CHUNK", 1)
    assert_close(winding_numbers(queries, vertices, faces), found, rtol=0, atol=1e-12)


def test_iou() -> None:
    a, b = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([0, 1, 1, 0]).bool()
    assert shapes.occupancy_iou(a, b) == pytest.approx(1 / 3)
    assert shapes.occupancy_iou(a, a) == 1 and shapes.occupancy_iou(a & ~a, b & ~b) == 1


def test_counts_of_closed_and_open_meshes() -> None:
    vertices, faces = box(2.0)
    counts = shapes.mesh_counts(vertices, faces)
    assert (counts.vertices, counts.faces, counts.watertight) == (8, 12, True)
    assert counts.area == pytest.approx(24) and counts.volume == pytest.approx(8)
    assert not shapes.mesh_counts(vertices, faces[1:]).watertight
    sphere = trimesh.creation.icosphere(4)
    assert shapes.mesh_counts(torch.tensor(sphere.vertices), torch.tensor(sphere.faces)).volume == pytest.approx(4 / 3 * math.pi, rel=0.01)
