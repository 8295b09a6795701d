"""PixArtOneStepPipeline: text to pictures in one evaluation of a PixArt-alpha transformer that SIM distilled.

One-Step Diffusion Distillation through Score Implicit Matching (Luo et al. 2024, arXiv 2410.16794): x_0 = G(sigma_init z; sigma_init,
text), sigma_init 2.5, no guidance, then the decoder of Stable Diffusion's VAE.

Legend: b samples, c channels, h w of the latent, m text tokens, d width of a text token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genkit.checks import choose
from genkit.generators.pixart import TEXT_TOKENS, denoise
from genkit.pipelines.base import GenPipeline, samples_at_once_or_default
from genkit.pipelines.outputs import OUTPUT_TYPES, ImageOutput, MemoryEstimate, to_output_type
from genkit.pipelines.seeds import SampleStreams, Seeds, resolve_seeds


class PixArtOneStepPipeline(GenPipeline):
    """Pictures from text in one step.

    Args:
        transformer: the student.
        vae: of its latents.
        text_encoder: T5, or another encoder whose states are as wide as the transformer's captions.
        tokenizer: of the text encoder.
        sigma_init: noise level that the student was trained at.

    Raises:
        ValueError: if the components do not fit together, or sigma_init is not above 0.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer"]

    def __init__(
        self,
        transformer: PixArtTransformer2DModel,
        vae: AutoencoderKL,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        sigma_init: float = 2.5,
    ) -> None:
        super().__init__()
        if not sigma_init > 0:
            raise ValueError(f"PixArtOneStepPipeline: sigma_init must be above 0, got {sigma_init}.")
        channels = transformer.config["in_channels"], vae.config["latent_channels"]
        if channels[0] != channels[1]:
            raise ValueError(f"PixArtOneStepPipeline: the transformer takes {channels[0]} latent channels, the VAE makes {channels[1]}.")
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(sigma_init=sigma_init)

    @property
    def image_size(self) -> tuple[int, int]:
        """(h, w) of the pictures at the trained size."""
        side = self.transformer.config["sample_size"] * 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        return side, side

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        caption: Tensor | None = None,
        caption_mask: Tensor | None = None,
        num_images_per_prompt: int = 1,
        generator: Seeds = None,
        num_inference_steps: int = 1,
        guidance_scale: float | None = None,
        samples_at_once: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImageOutput | tuple[Any, ...]:
        """Make pictures.

        Args:
            prompt: text or a list of texts.
            caption: [p, m, d] states of the text encoder computed before, instead of a prompt; then no text encoder is needed.
            caption_mask: [p, m] bool, True = real token; with `caption`.
            num_images_per_prompt: pictures per prompt.
            generator: int or `torch.Generator` that draws one seed per picture, or a list of seeds, one per picture.
            num_inference_steps: 1; a one-step student has no others.
            guidance_scale: None or 1; guidance is part of what the student learnt.
            samples_at_once: samples that the networks evaluate together; None: one on a CPU, all elsewhere.
            output_type: 'pil', 'np' ([b, h, w, 3] in [0, 1]) or 'pt' ([b, 3, h, w] in [-1, 1]).
            return_dict: False returns a tuple (images, seeds).

        Raises:
            ValueError: for missing prompts and values out of range, before any work is done.
        """
        choose(output_type, OUTPUT_TYPES, "output type")
        if num_inference_steps != 1 or guidance_scale not in (None, 1):
            given = f"num_inference_steps={num_inference_steps}, guidance_scale={guidance_scale}"
            raise ValueError(f"PixArtOneStepPipeline: a one-step student takes one step and no guidance, got {given}; leave them out.")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}.")
        if (prompt is None) == (caption is None) or (caption is None) != (caption_mask is None):
            raise ValueError("give either prompt, or caption and caption_mask.")
        if prompt is not None:
            caption, caption_mask = self.encode_prompt([prompt] if isinstance(prompt, str) else list(prompt))
        assert caption is not None
        assert caption_mask is not None
        seeds = resolve_seeds(generator, len(caption) * num_images_per_prompt)
        rows = [i for i in range(len(caption)) for _ in range(num_images_per_prompt)]
        at_once = samples_at_once_or_default(samples_at_once, self._execution_device)
        side, sigma = self.transformer.config["sample_size"], self.config["sigma_init"]
        noise = SampleStreams(seeds).normal(self.transformer.config["in_channels"], side, side).to(self._execution_device)
        images = []
        for start in range(0, len(seeds), at_once):
            part = rows[start : start + at_once]
            level = torch.full((len(part),), sigma, device=noise.device)
            x = sigma * noise[start : start + at_once]
            images.append(self.decode(denoise(self.transformer, x, level, caption[part], caption_mask[part])))
        self.maybe_free_model_hooks()
        output = ImageOutput(images=to_output_type(torch.cat(images), output_type), seeds=seeds)
        return output if return_dict else output.to_tuple()

    def encode_prompt(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the states [p, m, d] and the mask [p, m] of texts, each by itself, padded to 120 tokens.

        Raises:
            ValueError: if the pipeline has no text encoder, or no text is given.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("PixArtOneStepPipeline: this pipeline has no text encoder; give caption and caption_mask instead of a prompt.")
        if not texts:
            raise ValueError("prompt is an empty list; give at least one text.")
        encoded = [encode_caption([text], self.tokenizer, self.text_encoder, self.transformer.dtype) for text in texts]
        return torch.cat([states for states, _ in encoded]), torch.cat([mask for _, mask in encoded])

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [b, c, h, w] to pictures [b, 3, h', w'], about [-1, 1]."""
        weight = next(self.vae.parameters())
        sample: Tensor = self.vae.decode(latents.to(weight.dtype) / self.vae.config["scaling_factor"]).sample
        return sample

    def estimate_memory(self, num_images: int = 1, *, samples_at_once: int | None = None) -> MemoryEstimate:
        """Estimate the peak memory of a call before it runs; see the other pipelines."""
        group = min(num_images, samples_at_once_or_default(samples_at_once, self._execution_device))
        (h, w), config = self.image_size, self.transformer.config
        tokens, width = (config["sample_size"] // config["patch_size"]) ** 2, config["num_attention_heads"] * config["attention_head_dim"]
        size = next(self.transformer.parameters()).element_size()
        top = self.vae.config["block_out_channels"][0]
        decoding = group * h * w * top * 4 * size + num_images * 3 * h * w * 4
        return MemoryEstimate(weights=self.weight_bytes(), sampling=group * tokens * width * 12 * size, decoding=decoding)


@torch.no_grad()
def encode_caption(texts: Sequence[str], tokenizer: Any, text_encoder: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return T5 states [p, m, d] and mask [p, m] bool of texts, padded to at most 120 tokens, as PixArt takes them."""
    length = min(TEXT_TOKENS, tokenizer.model_max_length)
    batch = tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_attention_mask=True, return_tensors="pt"
    )
    device = next(text_encoder.parameters()).device
    mask = batch.attention_mask.to(device)
    states = text_encoder(input_ids=batch.input_ids.to(device), attention_mask=mask)[0]
    return states.to(dtype), mask.bool()
