"""Train a convolutional tokenizer on pictures; see `genkit.tasks._tokenizer` for the losses.

Source: Zhu et al. 2024 (SimVQ, arXiv 2411.02038), whose images were trained so with PatchGAN's discriminator.
"""

from __future__ import annotations

from dataclasses import dataclass

from genkit.tasks._tokenizer import TokenizerConfig, TokenizerTask
from genkit.tokenizers.conv_vqgan import ConvVQModel


@dataclass
class Config(TokenizerConfig):
    """Settings of the task; see `TokenizerConfig` for the others.

    Attributes:
        channels, multipliers, num_res_blocks, num_mid_blocks, resampling, shortcut: of `ConvVQModel`.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    num_mid_blocks: int = 2
    resampling: str = "convolution"
    shortcut: str = "input"


class ConvVQTask(TokenizerTask):
    """A convolutional tokenizer. Arguments as `TokenizerTask`."""

    name = "conv_vqgan"

    def network(self) -> ConvVQModel:
        """Build the tokenizer."""
        config = self.config
        return ConvVQModel(
            quantizer_config=config.quantizer.settings(),
            channels=config.channels,
            multipliers=list(config.multipliers),
            num_res_blocks=config.num_res_blocks,
            num_mid_blocks=config.num_mid_blocks,
            resampling=config.resampling,
            shortcut=config.shortcut,
            sample_size=config.image_size,
        )


def build(config: Config) -> ConvVQTask:
    """Build the task of a recipe."""
    return ConvVQTask(config)
