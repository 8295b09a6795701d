"""Figures of reconstructed and generated shapes on shapes whose answer is known."""

from __future__ import annotations

import pytest
import trimesh

from genkit.eval.solids import METRICS, Solid


def test_a_shape_agrees_with_itself_and_a_smaller_one_as_its_volume_says() -> None:
    box = trimesh.creation.box((2, 2, 2))
    truth = Solid.of(box, 3000)
    same = truth.compare(truth.of_closed(box))
    assert tuple(same) == METRICS
    assert same["volume-iou"] == same["surface-iou"] == 1 and same["fscore@0.02"] > 0.85 and same["chamfer-l1-sum"] < 0.03
    smaller = truth.compare(truth.of_closed(trimesh.creation.box((2, 2, 1.8))))
    assert smaller["volume-iou"] == pytest.approx(0.9, abs=0.02)
    # a third of the faces' area is 0.1 away and what lies beyond the smaller box is near its rim
    assert 0.6 < smaller["fscore@0.02"] < 0.8
    moved = box.copy()
    moved.apply_translation((0, 0, 5))
    assert truth.compare(truth.of_closed(moved))["volume-iou"] == 0


def test_an_open_mesh_has_an_inside_too() -> None:
    box = trimesh.creation.box((2, 2, 2))
    opened = trimesh.Trimesh(box.vertices, box.faces[2:], process=False)
    assert not opened.is_watertight
    truth = Solid.of(opened, 2000)
    assert truth.compare(truth.of_closed(box))["volume-iou"] > 0.85


def test_a_hole_in_a_reconstruction_does_no_harm() -> None:
    ball = trimesh.creation.icosphere(4, 0.8)
    torn = trimesh.Trimesh(ball.vertices, ball.faces[20:], process=False)
    assert not torn.is_watertight
    truth = Solid.of(ball, 3000)
    assert truth.compare(truth.of_closed(torn))["volume-iou"] > 0.99


def test_another_open_mesh_is_looked_at_where_the_truth_is() -> None:
    box, other = trimesh.creation.box((2, 2, 2)), trimesh.creation.box((2, 2, 1))
    opened = trimesh.Trimesh(other.vertices, other.faces[2:], process=False)
    truth = Solid.of(box, 3000)
    found = truth.of_open(opened)
    assert found.at is truth.at
    assert truth.compare(found)["volume-iou"] == pytest.approx(truth.compare(truth.of_closed(other))["volume-iou"], abs=0.03)
    assert truth.compare(truth.of_open(box))["surface-iou"] == 1
