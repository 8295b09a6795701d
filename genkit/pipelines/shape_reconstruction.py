"""ShapeReconstructionPipeline: a mesh through a shape VAE and back: what the latents of a generator can hold.

Hunyuan3D 2.0 (arXiv 2501.12202) and FlashVDM (arXiv 2503.16302). The mesh is centred and scaled for the model and the result put back.

Letters: b meshes, n latent tokens, e width of a latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from genkit.data.surfaces import normalised, surface_points
from genkit.pipelines.outputs import MemoryEstimate
from genkit.pipelines.seeds import Seeds, resolve_seeds
from genkit.pipelines.shape_decoding import ShapeOutput, ShapePipelineBase
from genkit.tokenizers.shape_vae import ShapeVAE

if TYPE_CHECKING:
    import trimesh


class ShapeReconstructionPipeline(ShapePipelineBase):
    """Meshes to latent tokens and back.

    Args:
        vae: with an encoder.
        slim_vae: decodes the same latents with a slim head.
        octree_resolution: of the grid, used when a call gives none.
        decoder, head: keys of `DECODERS` and `HEADS`, used when a call gives none.

    Raises:
        ValueError: for a VAE without encoder, or components and settings that do not fit together.
    """

    model_cpu_offload_seq = "vae->slim_vae"

    def __init__(
        self,
        vae: ShapeVAE,
        slim_vae: ShapeVAE | None = None,
        octree_resolution: int = 256,
        decoder: str = "hierarchical",
        head: str = "base",
    ) -> None:
        super().__init__()
        if vae.encoder is None:
            raise ValueError("ShapeReconstructionPipeline: this VAE is a decoder only; open a file with an encoder.")
        self.check_decoding(vae, slim_vae, octree_resolution, decoder, head)
        self.register_modules(vae=vae, slim_vae=slim_vae)
        self.register_to_config(octree_resolution=octree_resolution, decoder=decoder, head=head)

    @torch.no_grad()
    def __call__(
        self,
        mesh: trimesh.Trimesh | Sequence[trimesh.Trimesh],
        *,
        octree_resolution: int | None = None,
        decoder: str | None = None,
        decoder_options: dict[str, Any] | None = None,
        head: str | None = None,
        max_faces: int | None = None,
        keep_floaters: bool = False,
        generator: Seeds = None,
    ) -> ShapeOutput:
        """Reconstruct meshes.

        Args:
            mesh: one or several, of any size and place.
            octree_resolution: cells of the grid a side; the pipeline's own if None.
            decoder: "dense", "hierarchical" or "flash"; the pipeline's own if None.
            decoder_options: of its constructor, `num_chunks` say.
            head: "base" or "slim"; the pipeline's own if None.
            max_faces: budget of each result; None for as many as come.
            keep_floaters: keep connected parts with less than half a percent of the faces.
            generator: seeds of the surface points, see `resolve_seeds`.

        Returns:
            Meshes at the places and sizes of the given ones, latents, fields, seeds.

        Raises:
            ValueError: for meshes that cannot be used, before any work is done on it; where no surface is found.
        """
        meshes = list(mesh) if isinstance(mesh, Sequence) else [mesh]
        extraction = self.extraction(octree_resolution, decoder, decoder_options, max_faces, keep_floaters, head)
        prepared = [normalised(item) for item in meshes]
        seeds = resolve_seeds(generator, len(meshes))
        latents, fields, results = [], [], []
        for (item, centre, factor), seed in zip(prepared, seeds, strict=True):
            latent = self.encode(item, seed)
            found, field = self.to_shape(latent, extraction)
            found.vertices = np.asarray(found.vertices) / factor + centre
            results.append(found)
            latents.append(latent)
            fields.append(field)
        self.maybe_free_model_hooks()
        return ShapeOutput(meshes=results, latents=torch.cat(latents), fields=fields, seeds=seeds)

    def encode(self, mesh: trimesh.Trimesh, seed: int) -> Tensor:
        """Return latent tokens [1, n, e], the posterior's mean, of a normalised mesh."""
        config = self.vae.config
        rows = surface_points(mesh, config["pc_size"], config["pc_sharpedge_size"], np.random.default_rng(seed))
        surface = torch.from_numpy(rows[None, :, : 3 + config["point_feats"]]).to(self._execution_device)
        return self.vae.encode(surface).mean

    def estimate_memory(self, octree_resolution: int | None = None, num_chunks: int = 8000) -> MemoryEstimate:
        """Estimate the peak memory of a call before it runs.

        Args:
            octree_resolution: as in a call.
            num_chunks: points at a time.
        """
        config, size = self.vae.config, next(self.vae.parameters()).element_size()
        encoding = (config["pc_size"] + config["pc_sharpedge_size"]) * config["width"] * 4 * size
        return MemoryEstimate(self.weight_bytes(), sampling=int(encoding), decoding=self.decoding_bytes(octree_resolution, num_chunks))
