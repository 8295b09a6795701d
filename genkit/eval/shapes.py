"""3D metrics on sampled points, normals, occupancies and mesh counts, in float64.

Conventions differ between papers and stand in the names: L1 is the plain nearest distance, L2 its square; "sum" adds both directions,
"half" averages them.

- completeness: mean distance from the true to the predicted points; accuracy: the other way;
- F-score at t: harmonic mean of the shares of predicted points within t of a true one and of true points within t of a predicted one;
- normal consistency: cosine of the normals of nearest neighbours, averaged over both directions; absolute for unoriented meshes;
- edge Chamfer: Chamfer distance between the points near sharp edges;
- volume IoU: occupancy on points of the volume, surface IoU: on points near the true surface; inside where the winding number exceeds 1/2,
  which also works for meshes that do not close.

Source: Chen et al. 2020 (NMC) for the edge Chamfer distance; Jacobson et al. 2013 for generalised winding numbers.
Letters: p true, q predicted points, v vertices, f faces.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PAIRS_AT_ONCE = 2**21


def nearest_points(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return each point's distance to the nearest of the others and which that is, for [p, 3] and [q, 3]: [p] float64, [p] int64."""
    from scipy.spatial import cKDTree

    distance, index = cKDTree(others.double().cpu().numpy()).query(points.double().cpu().numpy())
    return torch.from_numpy(distance).to(points.device), torch.from_numpy(index).to(points.device)


@dataclass(frozen=True)
class PointDistances:
    """Nearest distances between true and predicted points in both directions.

    Attributes:
        completeness: true point -> nearest predicted point [p].
        accuracy: predicted point -> nearest true point [q].
    """

    completeness: Tensor
    accuracy: Tensor

    @classmethod
    def between(cls, true: Tensor, predicted: Tensor) -> PointDistances:
        """Measure points [p, 3] and [q, 3]."""
        return cls(nearest_points(true, predicted)[0], nearest_points(predicted, true)[0])

    def chamfer(self, power: int = 1, half: bool = False) -> float:
        """Return the Chamfer distance: mean of distance ** power in each direction, summed, or averaged if `half`."""
        total = float(self.completeness.pow(power).mean() + self.accuracy.pow(power).mean())
        return total / 2 if half else total

    def hausdorff(self) -> float:
        """Return the largest of all nearest distances."""
        return float(torch.maximum(self.completeness.max(), self.accuracy.max()))

    def fscore(self, threshold: float) -> tuple[float, float, float]:
        """Return F-score, precision (predicted points within the threshold) and recall (true points within it)."""
        precision = float((self.accuracy <= threshold).double().mean())
        recall = float((self.completeness <= threshold).double().mean())
        total = precision + recall
        return (2 * precision * recall / total if total else 0.0), precision, recall


def normal_consistency(true: Tensor, true_normals: Tensor, predicted: Tensor, predicted_normals: Tensor, signed: bool = False) -> float:
    """Return the mean cosine between each point's normal and its nearest neighbour's, averaged over both directions.

    Args:
        true, predicted: points [p, 3], [q, 3].
        true_normals, predicted_normals: unit normals of the same shapes.
        signed: keep the sign; for meshes with consistent orientation.
    """
    parts = []
    for points, normals, others, other_normals in (
        (true, true_normals, predicted, predicted_normals),
        (predicted, predicted_normals, true, true_normals),
    ):
        cosine = (normals.double() * other_normals.double()[nearest_points(points, others)[1]]).sum(1)
        parts.append((cosine if signed else cosine.abs()).mean())
    return float(sum(parts) / 2)


def edge_points(points: Tensor, normals: Tensor, radius: float = 0.004, abs_cos: float = 0.2) -> Tensor:
    """Tell which points lie near a sharp edge: some point within the radius has a normal with |cos| below `abs_cos`.

    Args:
        points: [p, 3]; with enough of them that the radius holds several.
        normals: [p, 3], unit.
        radius: in the points' unit; 0.004 is meant for unit shapes.
        abs_cos: in [0, 1].

    Returns:
        [p] bool.
    """
    from scipy.spatial import cKDTree

    where, unit = points.double().cpu().numpy(), normals.double().cpu().numpy()
    tree, found = cKDTree(where), np.zeros(len(where), bool)
    counts = tree.query_ball_point(where, radius, return_length=True)
    for rows in np.split(np.arange(len(where)), np.flatnonzero(np.diff(counts.cumsum() // PAIRS_AT_ONCE)) + 1):
        first = np.repeat(rows, counts[rows])
        second = np.concatenate(tree.query_ball_point(where[rows], radius)).astype(np.int64)
        found[first[np.abs((unit[first] * unit[second]).sum(1)) < abs_cos]] = True
    return torch.from_numpy(found).to(points.device)


def occupancy_iou(first: Tensor, second: Tensor) -> float:
    """Return the intersection over union of two occupancies [q] bool; 1 where both are empty."""
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0


@dataclass(frozen=True)
class MeshCounts:
    """What a mesh consists of: vertices, faces, area, signed volume, and whether every edge belongs to exactly two faces."""

    vertices: int
    faces: int
    area: float
    volume: float
    watertight: bool


def mesh_counts(vertices: Tensor, faces: Tensor) -> MeshCounts:
    """Measure a mesh of vertices [v, 3] and faces [f, 3]; the volume is meaningful for closed ones."""
    a, b, c = vertices.double()[faces.long()].unbind(1)
    normals = torch.linalg.cross(b - a, c - a)
    edges = faces.long()[:, [0, 1, 1, 2, 2, 0]].view(-1, 2).sort(1).values
    shared = edges.unique(dim=0, return_counts=True)[1]
    area, volume = float(normals.norm(dim=1).sum() / 2), float((a * torch.linalg.cross(b, c)).sum() / 6)
    return MeshCounts(len(vertices), len(faces), area, volume, bool(len(faces)) and bool((shared == 2).all()))
