"""How the networks of a pipeline are asked as denoisers, so that every method distils every diffusion or flow model by its name.

A family is found by the pipeline's class. It says which component denoises, how it is evaluated on x = clean + sigma noise, what its
condition is without a prompt, and which pipeline a one-step student runs in.

Letters: b batch, c h w of a picture or latent, l width of the condition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from genkit.checks import unknown

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
        has_bottleneck: whether a discriminator can read the network.
    """

    component: ClassVar[str]
    has_bottleneck: ClassVar[bool] = False
    shape: tuple[int, ...]
    sigma_range: tuple[float, float] = (0.0, float("inf"))
    sigma_data: float = 0.5

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
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

    def check_student(self, student: nn.Module) -> None:
        """Refuse a student that does not fit the teacher.

        Raises:
            ValueError: naming what differs.
        """
        raise NotImplementedError

    def pipeline(self, student: nn.Module, sigma_init: float) -> Any:
        """Return the one-step pipeline around a student, with the teacher's encoders."""
        raise NotImplementedError


class EDMFamily(Family):
    """`EDMPipeline`."""

    component, has_bottleneck = "unet", True

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        config = pipe.unet.config
        self.shape = (config["in_channels"], config["sample_size"], config["sample_size"])
        known = pipe.unet.preconditioner
        self.sigma_range = (known.sigma_min, known.sigma_max)
        self.sigma_data = getattr(known, "sigma_data", 0.5)

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
        if not self.pipe.unet.config["label_dim"]:
            return {}
        from genkit.pipelines.prompts import resolve_prompts

        width = None if self.pipe.is_text_model else self.pipe.unet.config["label_dim"]
        with torch.no_grad():
            return {"labels": self.pipe.encode_prompt(resolve_prompts(prompts, self.pipe.config["id2label"], width), len(prompts))}

    def check_student(self, student: nn.Module) -> None:
        """Compare sizes, conditions and preconditioners."""
        mine, theirs = cast(Any, self.network).config, getattr(student, "config", {})
        for key in ("sample_size", "in_channels", "label_dim", "preconditioner_config"):
            if theirs.get(key) != mine[key]:
                raise ValueError(f"teacher and student differ in {key}: {mine[key]} and {theirs.get(key)}; they must be the same.")

    def pipeline(self, student: nn.Module, sigma_init: float) -> Any:
        """Return a `OneStepPipeline`."""
        from genkit.pipelines.edm import OneStepPipeline

        pipe = self.pipe
        labels = pipe.config["id2label"]
        return OneStepPipeline(cast(Any, student), pipe.text_encoder, pipe.tokenizer, labels, sigma_init)


FAMILIES: dict[str, type[Family]] = {"EDMPipeline": EDMFamily}


def family_of(pipe: Any) -> Family:
    """Return the family of a teacher's pipeline.

    Raises:
        ValueError: if no family knows it.
    """
    name = type(pipe).__name__
    if name not in FAMILIES:
        raise ValueError(f"a teacher must be a diffusion or flow pipeline: {unknown(name, FAMILIES, 'pipeline to distil')}")
    return FAMILIES[name](pipe)
