"""How the networks of a pipeline are asked as denoisers, so that every method distils every diffusion or flow model by its name.

A family is found by the pipeline's class. It says which component denoises, how it is evaluated on x = clean + sigma noise, what its
condition is without a prompt, and which pipeline a one-step student runs in.

Letters: b batch, c h w of a picture or latent, l width of the condition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from genkit.checks import unknown
from genkit.generators import pixart

Condition = Mapping[str, Tensor]
"""Name -> rows [b, ...]; empty for an unconditional model."""


class Family:
    """One kind of pipeline.

    Args:
        pipe: of the teacher.

    Attributes:
        component: name of the denoising network in the pipeline.
        shape: of one sample, (c, h, w).
        sigma_range: noise levels that the network knows.
        sigma_data: standard deviation of the data.
        blocks: prefixes of the names of parameters inside the network's blocks.
        levels: law of the student's noise levels, for methods whose own law reaches beyond the range.
        is_text: whether prompts are text.
        num_classes: of a class model, else 0.
    """

    component: ClassVar[str]
    is_text: bool = False
    num_classes: int = 0
    shape: tuple[int, ...]
    sigma_range: tuple[float, float] = (0.0, float("inf"))
    sigma_data: float = 0.5
    blocks: ClassVar[tuple[str, ...]] = ()
    levels: ClassVar[Mapping[str, Any] | None] = None

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.empty: Condition = {}  # the condition without a prompt, one row, where it was computed before
        self.network: nn.Module = getattr(pipe, self.component)

    def denoise(self, network: Callable[..., Any], x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Return D(x; sigma, condition) [b, c, h, w]."""
        raise NotImplementedError

    def null(self, condition: Condition) -> Condition:
        """Return the condition without a prompt, for as many samples."""
        raise NotImplementedError

    def conditions(self, prompts: list[Any]) -> Condition:
        """Return the conditions of distinct prompts, computed by the pipeline's own encoders."""
        raise NotImplementedError

    def bottleneck(self, network: Callable[..., Any], x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Return the network's lowest activations [b, c', h', w'].

        Raises:
            ValueError: if the network has none.
        """
        raise ValueError(f"{type(self.network).__name__} has no lowest activations for a discriminator; choose a method without one.")

    compared: ClassVar[tuple[str, ...]] = ()  # entries of the configuration that teacher and student share

    def check_student(self, student: nn.Module) -> None:
        """Refuse a student that does not fit the teacher.

        Raises:
            ValueError: naming what differs.
        """
        mine, theirs = cast(Any, self.network).config, getattr(student, "config", {})
        for key in self.compared:
            if theirs.get(key) != mine[key]:
                raise ValueError(f"teacher and student differ in {key}: {mine[key]} and {theirs.get(key)}; they must be the same.")

    def decode(self, samples: Tensor) -> Tensor:
        """Return pictures [b, 3, h', w'] in about [-1, 1] of samples [b, c, h, w]."""
        return samples

    def pipeline(self, student: nn.Module, sigma_init: float) -> Any:
        """Return the one-step pipeline around a student, with the teacher's encoders."""
        raise NotImplementedError


class EDMFamily(Family):
    """`EDMPipeline`."""

    component = "unet"
    blocks = ("unet.enc.", "unet.dec.")
    compared = ("sample_size", "in_channels", "label_dim", "preconditioner_config")

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        config = pipe.unet.config
        self.shape = (config["in_channels"], config["sample_size"], config["sample_size"])
        known = pipe.unet.preconditioner
        self.sigma_range = (known.sigma_min, known.sigma_max)
        self.sigma_data = getattr(known, "sigma_data", 0.5)
        self.is_text = pipe.is_text_model
        self.num_classes = 0 if self.is_text else config["label_dim"]

    def denoise(self, network: Callable[..., Any], x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Evaluate the preconditioned network."""
        return cast(Tensor, network(x, sigma, condition.get("labels")).sample)

    def bottleneck(self, network: Callable[..., Any], x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Return the lowest activations of the encoder."""
        return cast(Tensor, network(x, sigma, condition.get("labels")).bottleneck)

    def null(self, condition: Condition) -> Condition:
        """Return rows of zeros."""
        return {name: torch.zeros_like(rows) for name, rows in condition.items()}

    def conditions(self, prompts: list[Any]) -> Condition:
        """Return label rows; none for an unconditional model."""
        if not self.is_text and not self.num_classes:
            return {}
        from genkit.pipelines.prompts import resolve_prompts

        meanings = resolve_prompts(prompts, self.pipe.config["id2label"], None if self.is_text else self.num_classes)
        with torch.no_grad():
            return {"labels": self.pipe.encode_prompt(meanings, len(meanings))}

    def pipeline(self, student: nn.Module, sigma_init: float) -> Any:
        """Return a `OneStepPipeline`."""
        from genkit.pipelines.edm import OneStepPipeline

        pipe = self.pipe
        labels = pipe.config["id2label"]
        return OneStepPipeline(cast(Any, student), pipe.text_encoder, pipe.tokenizer, labels, sigma_init)


class PixArtFamily(Family):
    """diffusers' `PixArtAlphaPipeline`: latents, T5 captions, noise prediction at 1,000 steps."""

    component = "transformer"
    blocks = ("transformer_blocks.",)
    compared = ("sample_size", "in_channels", "caption_channels", "patch_size")
    sigma_data = 1.0
    is_text = True
    levels = MappingProxyType({"name": "karras", "sigma_min": 0.0101})

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        config = pipe.transformer.config
        self.shape = (config["in_channels"], config["sample_size"], config["sample_size"])
        table = pixart.level_table()
        self.sigma_range = (float(table[-2]), float(table[0]))

    def denoise(self, network: Callable[..., Any], x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Ask the transformer for the noise."""
        return pixart.denoise(network, x, sigma, condition["caption"], condition["mask"])

    def conditions(self, prompts: list[Any]) -> Condition:
        """Return text-encoder states and masks.

        Raises:
            ValueError: if the pipeline was opened without its text encoder.
        """
        if self.pipe.text_encoder is None:
            raise ValueError("this teacher has no text encoder: give captions encoded before (a .safetensors file) as task_config.data.")
        from genkit.pipelines.pixart_one_step import encode_caption

        caption, mask = encode_caption(prompts, self.pipe.tokenizer, self.pipe.text_encoder, torch.float32)
        return {"caption": caption, "mask": mask}

    def null(self, condition: Condition) -> Condition:
        """Return the states of an empty text."""
        if not self.empty:
            self.empty = self.conditions([""])
        b = len(condition["caption"])
        return {name: rows.to(condition["caption"].device).expand(b, *rows.shape[1:]) for name, rows in self.empty.items()}

    def decode(self, samples: Tensor) -> Tensor:
        """Decode latents with the pipeline's VAE."""
        vae = self.pipe.vae
        weight = next(vae.parameters())
        return cast(Tensor, vae.decode(samples.to(weight) / vae.config["scaling_factor"]).sample)

    def pipeline(self, student: nn.Module, sigma_init: float) -> Any:
        """Return a `PixArtOneStepPipeline`."""
        from genkit.pipelines.pixart_one_step import PixArtOneStepPipeline

        pipe = self.pipe
        return PixArtOneStepPipeline(cast(Any, student), pipe.vae, pipe.text_encoder, pipe.tokenizer, sigma_init)


FAMILIES: dict[str, type[Family]] = {"EDMPipeline": EDMFamily, "PixArtAlphaPipeline": PixArtFamily}


def family_of(pipe: Any) -> Family:
    """Return the family of a teacher's pipeline.

    Raises:
        ValueError: if no family knows it.
    """
    name = type(pipe).__name__
    if name not in FAMILIES:
        raise ValueError(f"a teacher must be a diffusion or flow pipeline: {unknown(name, FAMILIES, 'pipeline to distil')}")
    return FAMILIES[name](pipe)


def open_teacher(name: str) -> Any:
    """Open a teacher's pipeline: ours by packaged name, folder or hub id, or one of diffusers' that a family knows.

    Raises:
        ValueError: if no family knows its class. FileNotFoundError, OSError: if it cannot be opened.
    """
    import diffusers

    from genkit.pipelines.base import GenPipeline
    from genkit.pipelines.loading import locate

    path = locate(name)
    with_index = path is None or (path / "model_index.json").is_file()
    kind = diffusers.DiffusionPipeline.load_config(str(path or name)).get("_class_name", "") if with_index else ""
    if kind in FAMILIES and hasattr(diffusers, kind):
        return getattr(diffusers, kind).from_pretrained(str(path or name))
    return GenPipeline.from_pretrained(name)
