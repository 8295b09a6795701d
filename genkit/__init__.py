"""genkit: generative systems on one set of transformer blocks, one trainer, one pipeline interface and one evaluator.

Names are imported when first used, so that `import genkit` stays light:

    >>> from genkit import GenPipeline
    >>> pipe = GenPipeline.from_pretrained("genkit/enat-lowpoly")  # doctest: +SKIP
    >>> images = pipe("a wooden table", num_images_per_prompt=4, generator=[1, 2, 3, 4]).images  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import ModelMixin, SchedulerMixin

    from genkit.catalogue import list_models
    from genkit.generators.edm import EDMUNet2DModel
    from genkit.generators.enat import ENATState, ENATTransformer2DModel
    from genkit.generators.mesh_transformer import MeshTransformer
    from genkit.generators.mimo_vp import MIMOVP
    from genkit.generators.nat import NATTransformer2DModel
    from genkit.generators.predformer import PredFormer
    from genkit.generators.shape_dit import ShapeDiT
    from genkit.generators.vdt import VDTTransformer3DModel
    from genkit.generators.vim import VIMTransformer2DModel
    from genkit.pipelines.base import GenPipeline
    from genkit.pipelines.edm import EDMPipeline, OneStepPipeline
    from genkit.pipelines.enat import ENATPipeline
    from genkit.pipelines.meshanything import MeshAnythingPipeline
    from genkit.pipelines.pixart_one_step import PixArtOneStepPipeline
    from genkit.pipelines.shape import ShapePipeline
    from genkit.pipelines.shape_reconstruction import ShapeReconstructionPipeline
    from genkit.pipelines.vdt import VDTPipeline
    from genkit.pipelines.vim import VIMPipeline
    from genkit.schedulers.edm_heun import EDMHeunScheduler
    from genkit.schedulers.flow_matching import FlowMatchingScheduler
    from genkit.schedulers.masked_token import MaskedTokenScheduler
    from genkit.tokenizers.conv_vqgan import ConvVQModel
    from genkit.tokenizers.mesh_vae import MeshVQModel
    from genkit.tokenizers.point_encoder import PointEncoder
    from genkit.tokenizers.shape_vae import ShapeVAE
    from genkit.tokenizers.vit_vqgan import ViTVQModel

__version__ = "0.1.0"

# Where each public name is defined. Model folders name components as ["genkit", "ClassName"], so a class that can be saved has to be here.
# ModelMixin and SchedulerMixin are diffusers' own: its loader looks for them in the library that a component names.
EXPORTS = {
    "ConvVQModel": "genkit.tokenizers.conv_vqgan",
    "EDMHeunScheduler": "genkit.schedulers.edm_heun",
    "EDMPipeline": "genkit.pipelines.edm",
    "EDMUNet2DModel": "genkit.generators.edm",
    "ENATPipeline": "genkit.pipelines.enat",
    "ENATState": "genkit.generators.enat",
    "ENATTransformer2DModel": "genkit.generators.enat",
    "FlowMatchingScheduler": "genkit.schedulers.flow_matching",
    "GenPipeline": "genkit.pipelines.base",
    "MIMOVP": "genkit.generators.mimo_vp",
    "MaskedTokenScheduler": "genkit.schedulers.masked_token",
    "MeshAnythingPipeline": "genkit.pipelines.meshanything",
    "MeshTransformer": "genkit.generators.mesh_transformer",
    "MeshVQModel": "genkit.tokenizers.mesh_vae",
    "ModelMixin": "diffusers",
    "NATTransformer2DModel": "genkit.generators.nat",
    "OneStepPipeline": "genkit.pipelines.edm",
    "PixArtOneStepPipeline": "genkit.pipelines.pixart_one_step",
    "PointEncoder": "genkit.tokenizers.point_encoder",
    "PredFormer": "genkit.generators.predformer",
    "SchedulerMixin": "diffusers",
    "ShapeDiT": "genkit.generators.shape_dit",
    "ShapePipeline": "genkit.pipelines.shape",
    "ShapeReconstructionPipeline": "genkit.pipelines.shape_reconstruction",
    "ShapeVAE": "genkit.tokenizers.shape_vae",
    "VDTPipeline": "genkit.pipelines.vdt",
    "VDTTransformer3DModel": "genkit.generators.vdt",
    "VIMPipeline": "genkit.pipelines.vim",
    "VIMTransformer2DModel": "genkit.generators.vim",
    "ViTVQModel": "genkit.tokenizers.vit_vqgan",
    "list_models": "genkit.catalogue",
}

__all__ = [
    "MIMOVP",
    "ConvVQModel",
    "EDMHeunScheduler",
    "EDMPipeline",
    "EDMUNet2DModel",
    "ENATPipeline",
    "ENATState",
    "ENATTransformer2DModel",
    "FlowMatchingScheduler",
    "GenPipeline",
    "MaskedTokenScheduler",
    "MeshAnythingPipeline",
    "MeshTransformer",
    "MeshVQModel",
    "ModelMixin",
    "NATTransformer2DModel",
    "OneStepPipeline",
    "PixArtOneStepPipeline",
    "PointEncoder",
    "PredFormer",
    "SchedulerMixin",
    "ShapeDiT",
    "ShapePipeline",
    "ShapeReconstructionPipeline",
    "ShapeVAE",
    "VDTPipeline",
    "VDTTransformer3DModel",
    "VIMPipeline",
    "VIMTransformer2DModel",
    "ViTVQModel",
    "__version__",
    "list_models",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in EXPORTS:
        raise AttributeError(f"module 'genkit' has no attribute {name!r}; public names: {', '.join(__all__)}.")
    value = getattr(importlib.import_module(EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | EXPORTS.keys())
