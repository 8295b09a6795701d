"""MeshAnythingPipeline: a shape from anywhere to a clean low-poly mesh.

MeshAnything (Chen et al. 2024, arXiv 2406.10163) and V2 (arXiv 2408.02555): points of the shape become a prefix, a transformer writes the
mesh after it, token by token.

- a grammar lets only sequences through that decode to a mesh, and ids that it forces cost nothing
- no limit on faces: beyond the trained length a sequence goes on from a window of itself
- faces are turned by the normals of the given surface, so that open meshes come out right too

Letters: b samples, p points, m prefix tokens, t ids.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from genkit.checks import choose
from genkit.data.mesh_augment import POINT_LIMIT, NormalisedPoints, normalised_points
from genkit.data.surfaces import uniform_points
from genkit.generators.mesh_transformer import MeshTransformer
from genkit.pipelines.base import Callback, GenPipeline, check_sampling, samples_at_once_or_default
from genkit.pipelines.mesh_loop import MeshRun, MeshStepState, TokenSampling, loop, sequences
from genkit.pipelines.outputs import MemoryEstimate
from genkit.pipelines.seeds import Seeds, resolve_seeds
from genkit.pipelines.surface_shell import surface_shell
from genkit.tokenizers.mesh_tokens import ON_ILLEGAL, SPECIALS, DecodedMesh, canonical
from genkit.tokenizers.mesh_vae import MeshVQModel
from genkit.tokenizers.point_encoder import PointEncoder, PointFeatures

if TYPE_CHECKING:
    import trimesh
    from numpy.typing import NDArray

MeshPrompt = Any
"""A `trimesh.Trimesh`, or points with normals [p, 6], or what a shape pipeline returned (as many shapes as it has)."""
MOST_TOKENS_PER_FACE = 10  # of adjacent tokens: a break and three vertices


@dataclass(frozen=True)
class MeshReport:
    """What became of one sequence.

    Args:
        faces: of the mesh.
        tokens: of the sequence, without special ones.
        dropped: tokens that made no face.
        degenerate, duplicate: faces left out for that.
        is_complete: the sequence ended by itself.
        problem: what was wrong with the sequence; "" if nothing.
    """

    faces: int
    tokens: int
    dropped: int
    degenerate: int
    duplicate: int
    is_complete: bool
    problem: str


@dataclass
class MeshOutput(BaseOutput):
    """Meshes.

    Attributes:
        meshes: list of `trimesh.Trimesh`, at the places and sizes of the given shapes.
        tokens: of each mesh, [t] int64.
        reports: of each mesh.
        seeds: of each mesh; with candidates that of the one kept.
    """

    meshes: list[Any]
    tokens: list[NDArray[Any]]
    reports: list[MeshReport]
    seeds: list[int]


class MeshAnythingPipeline(GenPipeline):
    """Shapes to artist-like meshes.

    Args:
        transformer: writes the tokens.
        point_encoder: of the shape.
        vq_model: turns codes into faces, where the tokens are codes.
        num_points: sampled on a mesh, and taken of larger point clouds.
        max_faces: used when a call gives none; None for no limit but the number of tokens.
        candidates, temperature: used when a call gives none.

    Raises:
        ValueError: if the components do not fit together.
    """

    model_cpu_offload_seq = "point_encoder->transformer->vq_model"
    _optional_components: ClassVar[list[str]] = ["vq_model"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["sample"]

    def __init__(
        self,
        transformer: MeshTransformer,
        point_encoder: PointEncoder,
        vq_model: MeshVQModel | None = None,
        num_points: int = 8192,
        max_faces: int | None = None,
        candidates: int = 1,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        wanted = transformer.config["point_width"], transformer.config["num_points"]
        given = point_encoder.config["width"], point_encoder.config["num_latents"] + 1
        if wanted != given:
            raise ValueError(
                f"MeshAnythingPipeline: the transformer takes {wanted[1]} tokens of width {wanted[0]}, the encoder gives {given}."
            )
        if (transformer.config["num_codes"] is None) != (vq_model is None):
            raise ValueError("MeshAnythingPipeline: a vq_model belongs to a transformer whose tokens are codes, and to no other.")
        if vq_model is not None and vq_model.config["codebook_size"] != transformer.config["num_codes"]:
            sizes = f"{transformer.config['num_codes']} and {vq_model.config['codebook_size']}"
            raise ValueError(f"MeshAnythingPipeline: transformer and vq_model have {sizes} codes.")
        if num_points < 1 or candidates < 1 or temperature <= 0:
            raise ValueError(
                "MeshAnythingPipeline: num_points and candidates must be at least 1 and temperature above 0, "
                f"got {num_points}, {candidates} and {temperature}."
            )
        self.register_modules(transformer=transformer, point_encoder=point_encoder, vq_model=vq_model)
        self.register_to_config(num_points=num_points, max_faces=max_faces, candidates=candidates, temperature=temperature)

    @torch.no_grad()
    def __call__(
        self,
        shape: MeshPrompt | Sequence[MeshPrompt],
        *,
        max_faces: int | None = None,
        max_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int = 50,
        top_p: float = 0.95,
        face_target: int | None = None,
        face_bias: float = 5.0,
        use_grammar: bool = True,
        on_illegal: str = "repair",
        shell_depth: int | None = None,
        num_images_per_prompt: int = 1,
        candidates: int | None = None,
        generator: Seeds = None,
        samples_at_once: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("sample",),
    ) -> MeshOutput:
        """Make meshes.

        Args:
            shape: a mesh, points with unit normals [p, 6], or what a shape pipeline returned; or a list of these. +Y is up.
            max_faces: budget of each mesh; the pipeline's own if None.
            max_tokens: ids of a sequence; None: enough for `max_faces`, or what the model was trained for.
            do_sample: draw ids; else take the most probable. None: draw them for candidates.
            temperature, top_k, top_p: of the drawing; temperature None: the pipeline's own.
            face_target, face_bias: faces to aim at, and how strongly, see `TokenSampling`.
            use_grammar: let only legal ids through. Off, the result is that of the released code.
            on_illegal: what to do with an illegal sequence: "raise", "repair" and count, or "official".
            shell_depth: sample the points on a new surface around the mesh, of 2^depth grid points a side; None leaves the mesh as it is.
            num_images_per_prompt: meshes per shape.
            candidates: meshes that are drawn for each one returned: the one nearest to the given surface (Chamfer distance). The first has
                the seed of a call with one candidate. None: the pipeline's own, and one with do_sample=False.
            generator: int or `torch.Generator` that draws one seed per mesh, or a list of seeds, one per mesh; of the points too.
            samples_at_once: meshes that are evaluated together; None: one on a CPU, all elsewhere.
            callback_on_step_end: called as callback(pipe, index, timestep, fields) after each id.
            callback_on_step_end_tensor_inputs: fields of the state that the callback gets.

        Returns:
            Meshes in the order of the shapes, those of one shape together, with tokens, reports and seeds.

        Raises:
            ValueError: for shapes and numbers that cannot be used, before any work is done; for an illegal sequence if asked to.
        """
        choose(on_illegal, ON_ILLEGAL, "on_illegal")
        self.check_callback_inputs(callback_on_step_end_tensor_inputs)
        if candidates is None:
            candidates = 1 if do_sample is False else self.config["candidates"]
        do_sample = candidates > 1 if do_sample is None else do_sample
        temperature = self.config["temperature"] if temperature is None else temperature
        sampling = TokenSampling(temperature, top_k, top_p, do_sample, face_target, face_bias)
        check_sampling(1, num_images_per_prompt, 1.0)
        if candidates < 1 or (candidates > 1 and not do_sample):
            raise ValueError(f"candidates must be at least 1, and more need do_sample=True, got {candidates} with do_sample={do_sample}.")
        shapes = [item for item in as_shapes(shape) for _ in range(num_images_per_prompt)]
        seeds = resolve_seeds(generator, len(shapes))
        clouds = [self.points(item, seed, shell_depth) for item, seed in zip(shapes, seeds, strict=True)]
        clouds = [cloud for cloud in clouds for _ in range(candidates)]
        drawn = [other for seed in seeds for other in (seed, *(resolve_seeds(seed, candidates - 1) if candidates > 1 else ()))]
        if samples_at_once is None and self._execution_device.type == "cpu":
            samples_at_once = candidates
        run, features = self.prepare(clouds, sampling, max_faces, max_tokens, use_grammar, samples_at_once)
        last = self.drain(loop(run, drawn), run.limit, callback_on_step_end, callback_on_step_end_tensor_inputs)
        found = self.decode(last.sample, features, on_illegal)
        results = [self._finish(item, cloud) for item, cloud in zip(found, clouds, strict=True)]
        tokens = sequences(last.sample)
        reports = [
            MeshReport(len(mesh.faces), len(own), item.dropped, clean.degenerate, clean.duplicate, done, item.problem)
            for (mesh, clean), own, item, done in zip(results, tokens, found, last.is_done, strict=True)
        ]
        self.maybe_free_model_hooks()
        kept = list(range(len(drawn)))
        if candidates > 1:
            misfits = [misfit(mesh, cloud) for (mesh, _), cloud in zip(results, clouds, strict=True)]
            kept = [min(range(i, i + candidates), key=misfits.__getitem__) for i in range(0, len(drawn), candidates)]
        return MeshOutput(
            meshes=[results[i][0] for i in kept],
            tokens=[tokens[i] for i in kept],
            reports=[reports[i] for i in kept],
            seeds=[drawn[i] for i in kept],
        )

    def iterate(
        self,
        shape: MeshPrompt | Sequence[MeshPrompt] | None = None,
        *,
        state: MeshStepState | None = None,
        max_faces: int | None = None,
        max_tokens: int | None = None,
        sampling: TokenSampling | None = None,
        use_grammar: bool = True,
        shell_depth: int | None = None,
        generator: Seeds = None,
        samples_at_once: int | None = None,
    ) -> Generator[MeshStepState, None, None]:
        """Run the loop id by id, without gradients; arguments as in a call.

        Args:
            shape: as in a call.
            state: one that a loop yielded, or a `clone()` of it, to go on from: then nothing else is given.
            sampling: how ids are chosen; the most probable if None.

        Yields:
            The state after each id; `preview(state)` gives the meshes so far. `close()` cancels.

        Raises:
            ValueError: for what cannot be used.
        """
        if state is not None:
            others = (shape, max_faces, max_tokens, sampling, shell_depth, generator, samples_at_once)
            if any(item is not None for item in others) or not use_grammar:
                raise ValueError("iterate(state=...) goes on with the settings of the saved loop; leave shape and other arguments out.")
            return loop(state.run, state.seeds, state)
        if shape is None:
            raise ValueError("iterate needs a shape, or state=... of an earlier loop.")
        shapes = as_shapes(shape)
        seeds = resolve_seeds(generator, len(shapes))
        with torch.no_grad():
            clouds = [self.points(item, seed, shell_depth) for item, seed in zip(shapes, seeds, strict=True)]
            run, _ = self.prepare(clouds, sampling or TokenSampling(), max_faces, max_tokens, use_grammar, samples_at_once)
        return loop(run, seeds)

    # ---- the stages ----

    def points(self, shape: MeshPrompt, seed: int, shell_depth: int | None = None) -> NormalisedPoints:
        """Return the points of a mesh or point cloud as the encoder takes them; `seed` draws them.

        Raises:
            ValueError: for shapes that cannot be used. TypeError: for other things.
        """
        count, rng = self.config["num_points"], np.random.default_rng(seed)
        if hasattr(shape, "faces") and hasattr(shape, "vertices"):
            if not len(shape.faces) or not np.isfinite(np.asarray(shape.vertices)).all():
                raise ValueError(f"a mesh needs faces and finite vertices, got {len(shape.faces)} faces; repair the mesh.")
            surface = shape if shell_depth is None else surface_shell(shape, shell_depth)
            return normalised_points(np.concatenate(uniform_points(surface, count, rng), axis=1))
        if shell_depth is not None:
            raise ValueError(f"shell_depth={shell_depth} makes a new surface around a mesh; a point cloud has none.")
        if not isinstance(shape, np.ndarray | Tensor):
            raise TypeError(
                f"a shape is a trimesh mesh, points with normals [p, 6], or a shape pipeline's result, got {type(shape).__name__}."
            )
        rows = np.asarray(shape, np.float64)
        if rows.ndim == 2 and len(rows) > count:
            rows = rows[rng.choice(len(rows), count, replace=False)]
        return normalised_points(rows)

    def prepare(
        self,
        clouds: Sequence[NormalisedPoints],
        sampling: TokenSampling,
        max_faces: int | None,
        max_tokens: int | None,
        use_grammar: bool,
        samples_at_once: int | None,
    ) -> tuple[MeshRun, PointFeatures]:
        """Return the settings of a loop, with the encoded points, and these.

        Raises:
            ValueError: for limits that make no sense, or need the grammar.
        """
        faces = self.config["max_faces"] if max_faces is None else max_faces
        trained = self.transformer.config["max_tokens"]
        limit = max_tokens if max_tokens is not None else trained if faces is None else faces * MOST_TOKENS_PER_FACE + 2
        if not use_grammar and (max_faces is not None or sampling.face_target is not None):
            raise ValueError("max_faces and face_target count faces while they are written, which takes the grammar; leave use_grammar on.")
        if (faces is not None and faces < 1) or limit < MOST_TOKENS_PER_FACE + 1:
            least = MOST_TOKENS_PER_FACE + 1
            raise ValueError(f"max_faces must be at least 1 and max_tokens {least} (one face), got {faces} and {limit}.")
        if self.vq_model is not None:
            most = self.vq_model.config["num_faces"]
            if (max_faces or 0) > most or (max_tokens or 0) > 9 * most + 2:
                given = f"max_faces={max_faces}, max_tokens={max_tokens}"
                raise ValueError(f"this model's mesh decoder takes {most} faces, {9 * most + 2} ids, got {given}.")
            limit = min(limit, 9 * most + 2)
        at_once = samples_at_once_or_default(samples_at_once, self._execution_device)
        dtype, device = self.point_encoder.query.dtype, self._execution_device
        distinct = {id(cloud): cloud for cloud in clouds}  # candidates share theirs
        found = {key: self.point_encoder(torch.from_numpy(cloud.points[None]).to(device, dtype)) for key, cloud in distinct.items()}
        encoded = [found[id(cloud)] for cloud in clouds]
        features = PointFeatures(
            tokens=torch.cat([part.tokens for part in encoded]), shape_tokens=torch.cat([part.shape_tokens for part in encoded])
        )
        prefixes = self.transformer.prefix(features).to(self.transformer.dtype)
        return MeshRun(self.transformer, prefixes, sampling, limit, faces if use_grammar else None, use_grammar, at_once), features

    @torch.no_grad()
    def decode(self, sample: Tensor, features: PointFeatures | None = None, on_illegal: str = "repair") -> list[DecodedMesh]:
        """Return the triangles of ids [b, t]; those of codes need the features of the shapes.

        Raises:
            ValueError: for an illegal sequence, if asked to.
        """
        if self.vq_model is None:
            return [self.transformer.tokens.decode(tokens, on_illegal) for tokens in sequences(sample)]
        assert features is not None, "codes are decoded with the shape"
        body = sample[:, 1:].to(features.tokens.device)
        codes = torch.where(body < SPECIALS, -1, body - SPECIALS)[:, : body.shape[1] // 9 * 9]
        found = []
        for i in range(len(codes)):
            own = PointFeatures(tokens=features.tokens[i : i + 1], shape_tokens=features.shape_tokens[i : i + 1])
            steps = self.vq_model.decode(codes[i : i + 1], own).steps[0].cpu().numpy()
            whole = steps[(steps >= 0).all(axis=(1, 2))]
            rest = int((codes[i] >= 0).sum()) - 9 * len(whole)
            problem = "there is no face" if not len(whole) else f"{rest} codes stand alone" if rest else ""
            if problem and on_illegal == "raise":
                raise ValueError(f"illegal sequence: {problem}; on_illegal='repair' leaves the rest out and counts it.")
            found.append(DecodedMesh(whole, rest, problem))
        return found

    def preview(self, state: MeshStepState) -> list[trimesh.Trimesh | None]:
        """Return the meshes so far in [-0.5, 0.5], None where there is no face yet; not for models of codes.

        Raises:
            ValueError: for models of codes.
        """
        if self.vq_model is not None:
            raise ValueError("the tokens of this model are codes, which are decoded together at the end; there is no preview.")
        found = [self.to_mesh(item)[0] for item in self.decode(state.sample)]
        return [mesh if len(mesh.faces) else None for mesh in found]

    def to_mesh(self, decoded: DecodedMesh) -> tuple[trimesh.Trimesh, Any]:
        """Return the mesh of decoded triangles in [-0.5, 0.5], cleaned, and what the cleaning found."""
        import trimesh

        bins = self.transformer.config["bins"] if self.vq_model is None else self.vq_model.config["bins"]
        corners = decoded.triangles.reshape(-1, 3)
        clean = canonical(corners, np.arange(len(corners)).reshape(-1, 3))
        return trimesh.Trimesh(clean.positions(bins), clean.faces, process=False), clean

    def _finish(self, decoded: DecodedMesh, cloud: NormalisedPoints) -> tuple[trimesh.Trimesh, Any]:
        """Return the mesh at the place and size of its shape, its faces turned by the shape's normals, and what the cleaning found."""
        mesh, clean = self.to_mesh(decoded)
        points = cloud.points.astype(np.float64)
        if len(mesh.faces):
            mesh.faces = turned_faces(np.asarray(mesh.vertices) * 2, np.asarray(mesh.faces), points[:, :3], points[:, 3:])
            mesh.vertices = cloud.back(np.asarray(mesh.vertices))
        return mesh, clean

    def estimate_memory(self, max_faces: int | None = None, num_meshes: int = 1) -> MemoryEstimate:
        """Estimate the peak memory of a call before it runs.

        Args:
            max_faces: as in a call.
            num_meshes: of the call; on a CPU, too, all their caches are kept.
        """
        config, like = self.transformer.config, self.transformer.lm_head.weight
        faces = self.config["max_faces"] if max_faces is None else max_faces
        tokens = config["max_tokens"] if faces is None else min(config["max_tokens"], faces * MOST_TOKENS_PER_FACE + 2)
        cache = 2 * config["depth"] * config["width"] * (config["num_points"] + tokens) * like.element_size()
        encoding = self.config["num_points"] * self.point_encoder.config["width"] * 4 * like.element_size()
        return MemoryEstimate(self.weight_bytes(), sampling=int(num_meshes * cache), decoding=int(encoding))


def as_shapes(shape: MeshPrompt | Sequence[MeshPrompt]) -> list[Any]:
    """Return shapes one by one.

    Raises:
        ValueError: for none.
    """
    items = shape if isinstance(shape, list | tuple) else [shape]
    found = [part for item in items for part in (item.meshes if hasattr(item, "meshes") else [item])]
    if not found:
        raise ValueError("there is no shape; give a mesh, or points with normals [p, 6].")
    return found


def misfit(mesh: Any, cloud: NormalisedPoints) -> float:
    """Return the Chamfer distance between a mesh and the points it stands for, both directions added; infinite without faces."""
    from scipy.spatial import cKDTree

    if not len(mesh.faces):
        return float("inf")
    points = cloud.back(cloud.points[:, :3].astype(np.float64) / (2 * POINT_LIMIT))
    own, _ = uniform_points(mesh, len(points), np.random.default_rng(0))
    return float(cKDTree(own).query(points)[0].mean() + cKDTree(points).query(own)[0].mean())


def turned_faces(
    vertices: NDArray[np.float64], faces: NDArray[np.int64], points: NDArray[np.float64], normals: NDArray[np.float64], nearest: int = 5
) -> NDArray[np.int64]:
    """Return faces [f, 3] wound so that their normals agree with those of the nearest points.

    Args:
        vertices: [v, 3].
        faces: [f, 3].
        points, normals: [p, 3] of the surface that the mesh stands for.
        nearest: points that vote on a face.
    """
    from scipy.spatial import cKDTree

    corners = vertices[faces]
    own = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    _, index = cKDTree(points).query(corners.mean(1), k=min(nearest, len(points)))
    votes = normals[np.asarray(index).reshape(len(faces), -1)].sum(1)
    is_wrong = (own * votes).sum(1) < 0
    found: NDArray[np.int64] = np.where(is_wrong[:, None], faces[:, ::-1], faces)
    return found
