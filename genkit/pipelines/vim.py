"""VIMPipeline: pictures code by code with an autoregressive generator, from classes or from nothing.

Yu et al. 2022, "Vector-quantized Image Modeling with Improved VQGAN" (arXiv 2110.04627).

- caches of a fixed length: a code costs one evaluation of one token, nothing is copied
- temperature, top-k, top-p; guidance for models that have a null class (ours)
- `iterate` yields after every code, `preview` shows the picture so far; a saved state, or one with other codes, goes on
- every sample draws from its own stream; on a CPU every sample is evaluated by itself

Legend: b samples, t codes so far, T codes of a picture, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from genkit.checks import choose
from genkit.generators.vim import CodeStepper, VIMCaches, VIMTransformer2DModel
from genkit.pipelines.base import Callback, GenPipeline, samples_at_once_or_default
from genkit.pipelines.outputs import OUTPUT_TYPES, ImageOutput, MemoryEstimate, StepState, to_output_type
from genkit.pipelines.prompts import Prompt, as_prompts, resolve_prompts
from genkit.pipelines.seeds import SampleStreams, Seeds, resolve_seeds
from genkit.pipelines.token_draws import DrawRule, inverse_cdf
from genkit.schedulers.masked_token import guide
from genkit.tokenizers.vq_model import VQModel


class CodeWriter:
    """Codes of some pictures, and the caches of what is evaluated.

    Args:
        transformer: the generator.
        conds: [b, m] labels.
        guidance_scale: 1 = off; else every picture is also evaluated under the null class.
    """

    def __init__(self, transformer: VIMTransformer2DModel, conds: Tensor, guidance_scale: float = 1.0) -> None:
        self.transformer, self.guidance_scale, self.count = transformer, guidance_scale, len(conds)
        null = [torch.full_like(conds, transformer.null_class)] if guidance_scale != 1 else []
        self.conds = torch.cat([conds, *null])
        self.stepper = CodeStepper(transformer)
        self.cache: VIMCaches = transformer.new_cache(len(self.conds))
        self.done: int | None = None  # codes that were evaluated

    @torch.no_grad()
    def logits(self, codes: Tensor) -> Tensor:
        """Return logits [b, K], fp32, of the code after codes [b, t], of which earlier calls have seen all but the last."""
        new = codes[:, self.done or 0 :].repeat(len(self.conds) // self.count, 1)
        if self.done is None:
            found = self.transformer(new, self.conds, cache=self.cache, last_only=True).logits[:, 0].float()
        else:
            found = self.stepper(new, self.cache).float()
        self.done = codes.shape[1]
        if len(found) == self.count:
            return found
        cond, uncond = found.chunk(2)
        return guide(cond, uncond, self.guidance_scale)


@dataclass(frozen=True)
class VIMRun:
    """What stays the same during one loop.

    Args:
        transformer: the generator.
        rule: how codes are drawn.
        guidance_scale: 1 = off.
        conds: [b, m] labels.
        at_once: samples that are evaluated together.
    """

    transformer: VIMTransformer2DModel = field(repr=False)
    rule: DrawRule
    guidance_scale: float
    conds: Tensor
    at_once: int


@dataclass
class VIMStepState(StepState):
    """The loop after a code; `sample` is [b, t], the codes so far. Change the last one, and the loop follows.

    Args:
        run: the settings of the loop.
    """

    run: VIMRun = field(repr=False)

    def clone(self) -> VIMStepState:
        """Return a copy to go on from later with `iterate(state=...)`."""
        return replace(self, sample=self.sample.clone())


class VIMPipeline(GenPipeline):
    """Pictures from class names, class ids, or nothing.

    Args:
        transformer: the generator.
        vqvae: turns its codes into pixels.
        id2label: class names by id.
        temperature, top_k, top_p: used when a call gives none; published: 1, all, all.
        guidance_scale: used when a call gives none; 1 = off.

    Raises:
        ValueError: if the components do not fit together.
    """

    model_cpu_offload_seq = "transformer->vqvae"
    _callback_tensor_inputs: ClassVar[list[str]] = ["sample"]

    def __init__(
        self,
        transformer: VIMTransformer2DModel,
        vqvae: VQModel,
        id2label: dict[Any, str] | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        guidance_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if transformer.config["codebook_size"] != vqvae.quantizer.codebook_size:
            codes = f"{transformer.config['codebook_size']} and {vqvae.quantizer.codebook_size}"
            raise ValueError(f"VIMPipeline: generator and tokenizer must have the same number of codes, got {codes}.")
        DrawRule(temperature, top_k, top_p)
        self.register_modules(transformer=transformer, vqvae=vqvae)
        labels = {str(key): label for key, label in id2label.items()} if id2label else None
        self.register_to_config(id2label=labels, temperature=temperature, top_k=top_k, top_p=top_p, guidance_scale=guidance_scale)

    @property
    def image_size(self) -> tuple[int, int]:
        """(h, w) of the pictures."""
        (rows, columns), patch = self.transformer.grid, self.vqvae.patch
        return rows * patch[0], columns * patch[1]

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        *,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Seeds = None,
        samples_at_once: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("sample",),
    ) -> ImageOutput | tuple[Any, ...]:
        """Make pictures.

        Args:
            prompt: class name or class id, or a list of them; None for the only class of an unconditional model.
            guidance_scale: 1 = off; needs a model with a null class.
            temperature, top_k, top_p: see `DrawRule`; the pipeline's own if None.
            num_images_per_prompt: pictures per prompt, or in all without one.
            generator: int or `torch.Generator` that draws one seed per picture, or a list of seeds, one per picture.
            samples_at_once: samples that the network evaluates together; None: one on a CPU, all elsewhere.
            output_type: 'pil', 'np' ([b, h, w, 3] in [0, 1]) or 'pt' ([b, 3, h, w] in [-1, 1]).
            return_dict: False returns a tuple (images, seeds, tokens).
            callback_on_step_end: called as callback(pipe, step, timestep, fields) after each code; may return {"sample": codes}.
            callback_on_step_end_tensor_inputs: fields of the step's state that the callback gets.

        Returns:
            Pictures in the order of the prompts, those of one prompt together, with their seeds and codes.

        Raises:
            ValueError: for unknown classes and values out of range, before any work is done.
        """
        choose(output_type, OUTPUT_TYPES, "output type")
        self.check_callback_inputs(callback_on_step_end_tensor_inputs)
        states = self.iterate(
            prompt, guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p,
            num_images_per_prompt=num_images_per_prompt, generator=generator, samples_at_once=samples_at_once,
        )  # fmt: skip
        last = self.drain(states, self.transformer.num_tokens, callback_on_step_end, callback_on_step_end_tensor_inputs)
        images = to_output_type(self.decode(last.sample), output_type)
        self.maybe_free_model_hooks()
        output = ImageOutput(images=images, seeds=last.seeds, tokens=last.sample.view(-1, *self.transformer.grid))
        return output if return_dict else output.to_tuple()

    def iterate(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        *,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Seeds = None,
        samples_at_once: int | None = None,
        state: VIMStepState | None = None,
    ) -> Generator[VIMStepState, None, None]:
        """Run the loop code by code, without gradients; arguments as in a call.

        Args:
            prompt, guidance_scale, temperature, top_k, top_p, num_images_per_prompt, generator, samples_at_once: as in a call.
            state: one of the states that a loop yielded, or a `clone()` of it, to go on from: then nothing else is given.

        Yields:
            The state after each code. The loop goes on from its `sample`; `close()` cancels.

        Raises:
            ValueError: for what cannot be used, or a state with other arguments or after its last code.
        """
        if state is not None:
            others = (prompt, guidance_scale, temperature, top_k, top_p, generator, samples_at_once)
            if any(item is not None for item in others) or num_images_per_prompt != 1:
                raise ValueError("iterate(state=...) goes on with the settings of the saved loop; leave prompt and other arguments out.")
            if state.index + 1 >= state.num_steps:
                raise ValueError(f"iterate(state=...): the state is after the last of {state.num_steps} steps; nothing is left to do.")
            return self._loop(state.run, state.seeds, state)
        own = self.config
        rule = DrawRule(
            own["temperature"] if temperature is None else temperature,
            own["top_k"] if top_k is None else top_k,
            own["top_p"] if top_p is None else top_p,
        )
        scale = own["guidance_scale"] if guidance_scale is None else guidance_scale
        if not math.isfinite(scale) or num_images_per_prompt < 1:
            raise ValueError(f"guidance_scale must be finite and num_images_per_prompt at least 1, got {scale}, {num_images_per_prompt}.")
        if scale != 1:
            _ = self.transformer.null_class
        labels = self._labels(prompt)
        conds = torch.tensor([label for label in labels for _ in range(num_images_per_prompt)], device=self._execution_device)
        seeds = resolve_seeds(generator, len(conds))
        at_once = samples_at_once_or_default(samples_at_once, self._execution_device)
        m = self.transformer.config["num_cond_tokens"]
        return self._loop(VIMRun(self.transformer, rule, scale, conds[:, None].expand(-1, m), at_once), seeds)

    def _labels(self, prompt: Prompt | Sequence[Prompt] | None) -> list[int]:
        """Return the class ids of prompts."""
        count = self.transformer.config["num_classes"]
        if prompt is None:
            if count > 1:
                raise ValueError(f"VIMPipeline: this model knows {count} classes; give a class name or id as prompt.")
            return [0]
        return [int(meaning) for meaning in resolve_prompts(as_prompts(prompt), self.config["id2label"], count)]

    @torch.no_grad()
    def _loop(self, run: VIMRun, seeds: list[int], state: VIMStepState | None = None) -> Generator[VIMStepState, None, None]:
        """Yield after each code, from the start or from a saved state."""
        groups = [slice(i, i + run.at_once) for i in range(0, len(seeds), run.at_once)]
        writers = [CodeWriter(run.transformer, run.conds[rows], run.guidance_scale) for rows in groups]
        total = run.transformer.num_tokens
        uniforms = SampleStreams(seeds).uniform(total)
        sample = torch.zeros(len(seeds), 0, dtype=torch.long, device=run.conds.device) if state is None else state.sample
        for t in range(sample.shape[1], total):
            logits = torch.cat([writer.logits(sample[rows]) for writer, rows in zip(writers, groups, strict=True)])
            drawn = inverse_cdf(run.rule.filtered(logits), uniforms[:, t].to(logits.device))
            state = VIMStepState(t, total, float(t), torch.cat([sample, drawn[:, None]], dim=1), seeds, run)
            yield state
            sample = checked_codes(state.sample, (len(seeds), t + 1), run.transformer.config["codebook_size"])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Return pictures [b, 3, h, w] of codes [b, T], a few at a time."""
        return torch.cat([self.vqvae.decode(part, self.transformer.grid).sample for part in codes.split(16)])

    def preview(self, state: VIMStepState, output_type: str = "pil") -> Any:
        """Return the pictures so far; what has no code yet is grey."""
        (rows, columns), (h, w) = self.transformer.grid, self.vqvae.patch
        known = torch.arange(rows * columns, device=state.sample.device) < state.sample.shape[1]
        codes = torch.nn.functional.pad(state.sample, (0, rows * columns - state.sample.shape[1]))
        area = known.view(rows, columns).repeat_interleave(h, 0).repeat_interleave(w, 1)
        return to_output_type(self.decode(codes) * area, output_type)

    def estimate_memory(self, num_images: int = 1, *, guidance: bool = False, samples_at_once: int | None = None) -> MemoryEstimate:
        """Estimate the peak memory of a call before it runs; see the other pipelines."""
        config, size = self.transformer.config, self.transformer.head.weight.element_size()
        group = min(num_images, samples_at_once_or_default(samples_at_once, self._execution_device))
        places = self.transformer.num_tokens + config["num_cond_tokens"]
        branches = 2 if guidance else 1
        caches = 2 * branches * num_images * config["depth"] * places * config["hidden_size"] * size
        inside = branches * group * config["hidden_size"] * (4 + config["mlp_ratio"]) * size + 4 * num_images * config["codebook_size"] * 4
        height, width = self.image_size
        decoding = 4 * num_images * 3 * height * width + min(num_images, 16) * self.vqvae.decoding_numbers(height, width) * 4
        return MemoryEstimate(weights=self.weight_bytes(), sampling=int(caches + inside), decoding=int(decoding))


def checked_codes(codes: Tensor, shape: tuple[int, int], count: int) -> Tensor:
    """Return codes that a caller may have changed.

    Raises:
        ValueError: for another shape, or codes that do not exist.
    """
    if tuple(codes.shape) != shape or bool((codes < 0).any()) or bool((codes >= count).any()):
        raise ValueError(f"the loop's sample must stay {list(shape)} codes in 0 .. {count - 1}, got {list(codes.shape)}.")
    return codes
