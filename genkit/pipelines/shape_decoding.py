"""What shape pipelines share: latent tokens to meshes, by any volume decoder, and the form of the output.

Letters: b shapes, n latent tokens, e width of a latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from genkit.checks import choose
from genkit.pipelines.base import GenPipeline
from genkit.tokenizers.adaptive_kv import FlashDecoder
from genkit.tokenizers.isosurface import decimated, isosurface, to_mesh, without_floaters
from genkit.tokenizers.shape_vae import ShapeVAE
from genkit.tokenizers.volume_decoders import DenseDecoder, HierarchicalDecoder, check_resolution
from genkit.tokenizers.volume_grid import SparseField

if TYPE_CHECKING:
    import trimesh

DECODERS: dict[str, type[Any]] = {"dense": DenseDecoder, "hierarchical": HierarchicalDecoder, "flash": FlashDecoder}
HEADS = {"base": "vae", "slim": "slim_vae"}
"""Which component turns latents into a field."""


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
        head: key of `HEADS`.
    """

    decode: Any
    resolution: int
    max_faces: int | None = None
    keep_floaters: bool = False
    head: str = "base"


class ShapePipelineBase(GenPipeline):
    """A pipeline with a `vae` and perhaps a `slim_vae`, and `octree_resolution`, `decoder` and `head` in its configuration."""

    _optional_components: ClassVar[list[str]] = ["slim_vae"]

    def check_decoding(self, vae: ShapeVAE, slim_vae: ShapeVAE | None, octree_resolution: int, decoder: str, head: str) -> None:
        """Refuse components and settings that do not fit together.

        Raises:
            ValueError: naming what was given.
        """
        choose(decoder, DECODERS, "decoder")
        choose(head, HEADS, "head")
        check_resolution(octree_resolution)
        name = type(self).__name__
        if slim_vae is None and head == "slim":
            raise ValueError(f"{name}: head='slim' needs a slim_vae.")
        for size in ("num_latents", "embed_dim", "scale_factor") if slim_vae is not None else ():
            mine, slim = vae.config[size], slim_vae.config[size]  # type: ignore[union-attr]
            if mine != slim:
                raise ValueError(f"{name}: vae and slim_vae decode the same latents, but their {size} are {mine} and {slim}.")

    def vae_of(self, head: str) -> ShapeVAE:
        """Return the VAE whose decoder has a head."""
        return cast(ShapeVAE, getattr(self, HEADS[head]))

    def extraction(
        self,
        octree_resolution: int | None,
        decoder: str | None,
        options: dict[str, Any] | None,
        max_faces: int | None,
        keep_floaters: bool,
        head: str | None,
    ) -> Extraction:
        """Check a call's choices and complete them with the pipeline's own.

        Raises:
            ValueError: for resolutions out of range, unknown decoders or heads, a missing slim head, or a budget below four faces.
        """
        head = choose(self.config["head"] if head is None else head, HEADS, "head")
        if self.vae_of(head) is None:
            raise ValueError(f"{type(self).__name__}: this model has no slim head (component slim_vae); leave out head='slim'.")
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
        return Extraction(DECODERS[name](**given), resolution, max_faces, keep_floaters, head)

    @torch.no_grad()
    def to_shape(self, latent: Tensor, extraction: Extraction) -> tuple[trimesh.Trimesh, SparseField]:
        """Return the mesh and field of one shape's latent tokens [1, n, e], in the VAE's coordinates.

        Raises:
            NoSurfaceError: if the field has no surface.
        """
        vae = self.vae_of(extraction.head)
        field = extraction.decode(vae, vae.decode(latent)[0], extraction.resolution)
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
        config = self.vae_of(self.config["head"]).config
        width = config["width"] // config["head_downsample"]
        chunk = num_chunks * width * (3 + config["head_mlp_ratio"]) * 4
        near = 24 * resolution**2 * 28  # points near the surface, with keys, values and their sorting
        return int(chunk + near)
