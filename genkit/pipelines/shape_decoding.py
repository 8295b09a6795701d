"""What shape pipelines share: latent tokens to meshes, by any volume decoder, and the form of the output.

Letters: b shapes, n latent tokens, e width of a latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from genkit.checks import choose
from genkit.pipelines.base import GenPipeline
from genkit.tokenizers.adaptive_kv import FlashDecoder
from genkit.tokenizers.isosurface import decimated, isosurface, to_mesh, without_floaters
from genkit.tokenizers.volume_decoders import DenseDecoder, HierarchicalDecoder, check_resolution
from genkit.tokenizers.volume_grid import SparseField

if TYPE_CHECKING:
    import trimesh

DECODERS: dict[str, type[Any]] = {"dense": DenseDecoder, "hierarchical": HierarchicalDecoder, "flash": FlashDecoder}


@dataclass
class ShapeOutput(BaseOutput):
    """Shapes.

    Attributes:
        meshes: list of `trimesh.Trimesh`.
        latents: [b, n, e] latent tokens.
        fields: what was evaluated of each shape.
        seeds: of each shape.
    """

    meshes: list[Any]
    latents: Tensor
    fields: list[SparseField]
    seeds: list[int]


@dataclass(frozen=True)
class Extraction:
    """How latents become meshes.

    Args:
        decode: a volume decoder.
        resolution: cells of the grid a side.
        max_faces: budget of each mesh; None for as many as come.
        keep_floaters: keep connected parts with less than half a percent of the faces.
    """

    decode: Any
    resolution: int
    max_faces: int | None = None
    keep_floaters: bool = False


class ShapePipelineBase(GenPipeline):
    """A pipeline with a `vae`, and `octree_resolution` and `decoder` in its configuration."""

    def extraction(
        self, octree_resolution: int | None, decoder: str | None, options: dict[str, Any] | None, max_faces: int | None, keep_floaters: bool
    ) -> Extraction:
        """Check a call's choices and complete them with the pipeline's own.

        Raises:
            ValueError: for resolutions out of range, unknown decoders or a budget below four faces.
        """
        resolution = self.config["octree_resolution"] if octree_resolution is None else octree_resolution
        check_resolution(resolution)
        name = choose(self.config["decoder"] if decoder is None else decoder, DECODERS, "decoder")
        given = dict(options or {})
        if name == "hierarchical" and "min_resolution" not in given:
            coarse = resolution  # a resolution that cannot be halved down to the usual coarsest grid starts from a finer one
            while coarse % 2 == 0 and coarse // 2 >= HierarchicalDecoder.min_resolution:
                coarse //= 2
            given["min_resolution"] = coarse
        if max_faces is not None and max_faces < 4:
            raise ValueError(f"max_faces must be at least 4 (a closed mesh), got {max_faces}.")
        return Extraction(DECODERS[name](**given), resolution, max_faces, keep_floaters)

    @torch.no_grad()
    def to_shape(self, latent: Tensor, extraction: Extraction) -> tuple[trimesh.Trimesh, SparseField]:
        """Return the mesh and field of one shape's latent tokens [1, n, e], in the VAE's coordinates.

        Raises:
            NoSurfaceError: if the field has no surface.
        """
        field = extraction.decode(self.vae, self.vae.decode(latent)[0], extraction.resolution)
        mesh = to_mesh(isosurface(field), field.resolution, field.bound)
        mesh = mesh if extraction.keep_floaters else without_floaters(mesh)
        return (mesh if extraction.max_faces is None else decimated(mesh, extraction.max_faces)), field

    def decoding_bytes(self, octree_resolution: int | None, num_chunks: int = 8000) -> int:
        """Estimate the bytes of decoding one shape beyond the weights.

        Args:
            octree_resolution: as in a call.
            num_chunks: points at a time.
        """
        resolution = self.config["octree_resolution"] if octree_resolution is None else octree_resolution
        config = self.vae.config
        width = config["width"] // config["head_downsample"]
        chunk = num_chunks * width * (3 + config["head_mlp_ratio"]) * 4
        near = 24 * resolution**2 * 28  # points near the surface, with keys, values and their sorting
        return int(chunk + near)
