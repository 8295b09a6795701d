"""Train a ViT-VQGAN tokenizer on pictures; see `genkit.tasks._tokenizer` for the losses.

The first steps may train a plain autoencoder; then the codes start at the k-means centres of its latents and quantization begins. On 64x64
views of game assets SimVQ's own start had 4 % of 1,024 codes in use after 500 steps (width 32), a start at the blank encoder's latents had
17 % after 300 (width 8); started this way, 90 % were in use after 500 steps (width 8).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from genkit.tasks._tokenizer import QuantizerConfig, TokenizerConfig, TokenizerTask
from genkit.tokenizers.vit_vqgan import ViTVQModel

__all__ = ["Config", "QuantizerConfig", "TowerConfig", "ViTVQTask", "build"]


@dataclass
class TowerConfig:
    """One transformer tower: width, blocks, heads, MLP width, head width, the MLP's activation; or other blocks by a stack string."""

    dim: int = 128
    depth: int = 3
    heads: int = 4
    mlp_dim: int = 512
    dim_head: int = 32
    act: str = "gelu"
    stack: str | None = None

    def settings(self) -> dict[str, Any]:
        """Return the tower's part of a model's configuration."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass
class Config(TokenizerConfig):
    """Settings of the task; see `TokenizerConfig` for the others.

    Attributes:
        patch_size: pixels per token side.
        stem: "conv" or "patch".
        encoder, decoder: sizes of the towers.
    """

    patch_size: int = 4
    stem: str = "conv"
    encoder: TowerConfig = field(default_factory=TowerConfig)
    decoder: TowerConfig = field(default_factory=TowerConfig)


class ViTVQTask(TokenizerTask):
    """A transformer tokenizer. Arguments as `TokenizerTask`."""

    name = "vit_vqgan"

    def network(self) -> ViTVQModel:
        """Build the tokenizer."""
        config = self.config
        return ViTVQModel(
            patch_size=config.patch_size,
            encoder_config=config.encoder.settings(),
            decoder_config=config.decoder.settings(),
            quantizer_config=config.quantizer.settings(),
            stem=config.stem,
            sample_size=config.image_size,
        )


def build(config: Config) -> ViTVQTask:
    """Build the task of a recipe."""
    return ViTVQTask(config)
