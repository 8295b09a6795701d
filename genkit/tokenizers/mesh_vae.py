"""MeshVQModel: the faces of a mesh to residual codes and back, the way back given the shape.

The mesh tokenizer of MeshAnything (Chen et al. 2024, arXiv 2406.10163). Its decoder sees the shape and learns on codes drawn with noise, so
that it mends the wrong codes of a generator. The decoder loads the official checkpoint (`genkit.convert.mesh_vq`); the encoder was never
released and follows the paper's description.

- nine codes a face: three vertices of three levels, one table for all levels
- the released decoder attends to empty face slots, so its result depends on their number: `official_padding`

Legend: b meshes, f faces, m shape tokens, w width of one, d width, c width of codes, k bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from genkit.blocks import stack
from genkit.blocks.fast_linear import with_fast_linear
from genkit.blocks.init import normal_init
from genkit.blocks.norms import build_norm
from genkit.checks import check_shape
from genkit.tokenizers.point_encoder import PointFeatures
from genkit.tokenizers.quantizers.output import QuantizerOutput
from genkit.tokenizers.quantizers.residual import ResidualQuantizer
from genkit.tokenizers.quantizers.vq import VectorQuantizer

SIZES: dict[str, dict[str, Any]] = {"meshanything_v1": {}}
CORNERS, COORDINATES, LEVELS = 3, 9, 3
COORDINATE_WIDTH = 64  # of the encoder's embedded coordinates


@dataclass
class MeshDecoderOutput(BaseOutput):
    """Result of decoding.

    Attributes:
        logits: [b, f, 9, k] of the coordinates v0x, v0y, v0z, v1x, ...
        valid: [b, f] bool: faces all of whose codes are there.
    """

    logits: Tensor
    valid: Tensor

    @property
    def steps(self) -> Tensor:
        """The most probable coordinates [b, f, 3, 3] int64; -1 in faces that are not there."""
        found = self.logits.argmax(-1).masked_fill(~self.valid[..., None], -1)
        return found.unflatten(-1, (CORNERS, 3))


class MeshVQModel(ModelMixin, ConfigMixin):
    """Faces to codes to faces.

    Args:
        codebook_size, codebook_dim: codes of the table and their width c.
        width: d.
        depth: blocks of the decoder.
        heads: of each attention.
        hidden: width of the feed-forward layers.
        bins: k, steps a side.
        num_faces: most faces of a mesh.
        num_positions: rows of the table of face positions; num_faces if None.
        point_width: w.
        num_points: m.
        encoder_depth: blocks of the encoder; None leaves it out, as released.
        official_padding: pad to num_faces and attend to what is padded.

    Raises:
        ValueError: if sizes do not fit together.

    Example:
        >>> sizes = {"width": 8, "depth": 1, "heads": 2, "hidden": 8, "num_faces": 4, "point_width": 4, "num_points": 3}
        >>> model = MeshVQModel(codebook_size=5, codebook_dim=4, **sizes)
        >>> features = PointFeatures(tokens=torch.zeros(1, 3, 4), shape_tokens=torch.zeros(1, 2, 4))
        >>> model.decode(torch.zeros(1, 18, dtype=torch.long), features).steps.shape
        torch.Size([1, 2, 3, 3])
    """

    _supports_gradient_checkpointing = False
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _repeated_blocks: ClassVar[list[str]] = ["Block"]

    @register_to_config
    def __init__(
        self,
        *,
        codebook_size: int = 8192,
        codebook_dim: int = 1024,
        width: int = 768,
        depth: int = 6,
        heads: int = 12,
        hidden: int = 3072,
        bins: int = 128,
        num_faces: int = 800,
        num_positions: int | None = None,
        point_width: int = 768,
        num_points: int = 257,
        encoder_depth: int | None = None,
        official_padding: bool = False,
    ) -> None:
        super().__init__()
        places = num_faces if num_positions is None else num_positions
        if width % heads or places < num_faces:
            raise ValueError(
                f"MeshVQModel: heads must divide width and num_positions hold num_faces, got heads={heads}, width={width}, "
                f"num_positions={places}, num_faces={num_faces}."
            )
        self.quantizer = ResidualQuantizer(lambda: VectorQuantizer(codebook_size, codebook_dim, beta=1.0), num_levels=LEVELS)
        self.face_proj = nn.Linear(CORNERS * codebook_dim, width)
        self.position_embed = nn.Embedding(places, width)
        self.face_norm, self.point_norm = build_norm("ln", width), build_norm("ln", width)
        self.point_embed = nn.Embedding(num_points, width)
        self.cond_head_proj, self.cond_proj = nn.Linear(point_width, width), nn.Linear(point_width, width)
        block = f"(attention + mlp(hidden={hidden}))"
        self.blocks = stack.build(f"{block} * {depth}", width, heads=heads, residual="post", eps=1e-12)
        self.head = nn.Linear(width, COORDINATES * bins)
        self.encoder: nn.ModuleDict | None = None
        if encoder_depth is not None:
            self.encoder = nn.ModuleDict(
                {
                    "coordinates": nn.Embedding(bins, COORDINATE_WIDTH),
                    "proj": nn.Linear(COORDINATES * COORDINATE_WIDTH, width),
                    "norm": build_norm("ln", width),
                    "blocks": stack.build(f"{block} * {encoder_depth}", width, heads=heads, residual="post"),
                    "out": nn.Linear(width, CORNERS * codebook_dim),
                }
            )
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw matrices and tables from N(0, 0.02^2), biases 0, codes from N(0, 1/c)."""
        normal_init(self)
        nn.init.normal_(self.table, std=self.quantizer.dim**-0.5)

    @property
    def table(self) -> Tensor:
        """The codes [codes, c] of all levels."""
        return cast(VectorQuantizer, self.quantizer.level(0)).embedding.weight

    @with_fast_linear
    def encode(self, steps: Tensor, gumbel: Tensor | None = None, temperature: float = 1.0) -> QuantizerOutput:
        """Quantize faces.

        Args:
            steps: [b, f, 3, 3] int64 coordinates; -1 in faces that are not there.
            gumbel: noise [3, b, 3 f, codes], see `ResidualQuantizer`.
            temperature: likewise.

        Returns:
            `indices` [b, 9 f], -1 in faces that are not there; `quantized` [b, 3 f, c]. The loss counts all faces.

        Raises:
            ValueError: if the model has no encoder, or there are too many faces.
        """
        if self.encoder is None:
            raise ValueError("MeshVQModel.encode: this model is a decoder only; train one with encoder_depth.")
        f = check_shape(steps, "MeshVQModel: steps", "b f 3 3")["f"]
        self._check_count(f)
        valid = (steps >= 0).flatten(2).all(-1)
        x = self.encoder["proj"](self.encoder["coordinates"](steps.clamp_min(0).flatten(2)).flatten(2))
        x = self.encoder["norm"](x + self.position_embed.weight[:f])
        for block in cast(nn.ModuleList, self.encoder["blocks"]):
            x = block(x, mask=[valid, None])
        latents = self.encoder["out"](x).unflatten(-1, (CORNERS, -1)).flatten(1, 2)
        out: QuantizerOutput = self.quantizer(latents, gumbel, temperature)
        present = valid.repeat_interleave(CORNERS, dim=1)[..., None]
        indices = out.indices.masked_fill(~present, -1).flatten(1)
        return QuantizerOutput(quantized=out.quantized, indices=indices, loss=out.loss, terms=out.terms)

    def decode(self, codes: Tensor, features: PointFeatures) -> MeshDecoderOutput:
        """Return the faces of codes [b, 9 f], -1 where there is none, given the shape.

        Raises:
            ValueError: for an odd number of codes or too many faces.
        """
        if codes.ndim != 2 or codes.shape[1] % COORDINATES:
            raise ValueError(f"MeshVQModel: codes must be [b, 9 f], got {list(codes.shape)}.")
        grouped = codes.unflatten(1, (-1, LEVELS))
        embedded = self.quantizer.lookup(grouped).to(self.head.weight.dtype)
        return self.decode_embedded(embedded, (codes >= 0).unflatten(1, (-1, COORDINATES)).all(-1), features)

    @with_fast_linear
    def decode_embedded(self, embedded: Tensor, valid: Tensor, features: PointFeatures) -> MeshDecoderOutput:
        """Return the faces of vertex embeddings [b, 3 f, c] and their presence [b, f] bool, given the shape."""
        f = valid.shape[1]
        self._check_count(f)
        points = self.shape_tokens(features)
        is_padded = bool(self.config["official_padding"])
        rows = self.config["num_faces"] if is_padded else f
        present = F.pad(valid, (0, rows - f))
        faces = F.pad(self.face_proj(embedded.unflatten(1, (-1, CORNERS)).flatten(2)), (0, 0, 0, rows - f))
        x = self.face_norm(faces * present[..., None] + self.position_embed.weight[:rows])
        x = torch.cat([points, x], dim=1)
        mask = None if is_padded else [F.pad(present, (points.shape[1], 0), value=True), None]
        for block in self.blocks:
            x = block(x, mask=mask)
        kept = x[:, points.shape[1] :][:, :f] * valid[..., None]
        return MeshDecoderOutput(logits=self.head(kept).unflatten(-1, (COORDINATES, -1)), valid=valid)

    def shape_tokens(self, features: PointFeatures) -> Tensor:
        """Return the shape tokens [b, m, d] that stand before the faces."""
        tokens = features.tokens
        check_shape(tokens, "MeshVQModel: tokens", "b m w", m=self.config["num_points"], w=self.config["point_width"])
        both = torch.cat([self.cond_head_proj(tokens[:, :1]), self.cond_proj(tokens[:, 1:])], dim=1)
        normed: Tensor = self.point_norm(both + self.point_embed.weight)
        return normed

    def forward(self, steps: Tensor, features: PointFeatures) -> tuple[MeshDecoderOutput, QuantizerOutput]:
        """Return the faces that a mesh [b, f, 3, 3] becomes, and its codes."""
        found = self.encode(steps)
        return self.decode_embedded(found.quantized, (steps >= 0).flatten(2).all(-1), features), found

    def _check_count(self, faces: int) -> None:
        if faces > self.config["num_faces"]:
            raise ValueError(f"MeshVQModel: {faces} faces are more than num_faces={self.config['num_faces']}; decimate the mesh.")
