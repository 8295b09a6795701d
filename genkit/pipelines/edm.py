"""EDMPipeline and OneStepPipeline: text, class names, class ids or nothing to pictures, by a denoiser in many steps or a student in one.

Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al. 2022, arXiv 2206.00364); one-step students as in SiD
(arXiv 2404.04057) and SIM (arXiv 2410.16794): one evaluation at the noise level `sigma_init`, no guidance.

- the first numbers of a sample's stream are its latents, then those of the churn, as in the reference
- on a CPU every sample is evaluated by itself, so that its bits do not depend on the batch
- the conditional and the unconditional branch run as one batch, and the unconditional one not at all where guidance is off

Legend: b samples, c channels, h w rows and columns, l width of the condition.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from diffusers import SchedulerMixin
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genkit.checks import choose
from genkit.conditioners.text import condition_vector, encode_text
from genkit.generators.edm import EDMUNet2DModel
from genkit.pipelines.base import Callback, GenPipeline, samples_at_once_or_default
from genkit.pipelines.outputs import OUTPUT_TYPES, ImageOutput, MemoryEstimate, StepState, to_output_type
from genkit.pipelines.prompts import Prompt, as_prompts, resolve_prompts
from genkit.pipelines.seeds import SampleStreams, Seeds, resolve_seeds
from genkit.schedulers.edm_heun import EDMHeunScheduler


@dataclass(frozen=True)
class EDMRun:
    """What stays the same during one loop.

    Args:
        labels: [b, l] conditions of the samples, or None.
        guidance_scale: 1 = off.
        at_once: samples that are evaluated together.
        steps: N.
    """

    labels: Tensor | None = field(repr=False)
    guidance_scale: float
    at_once: int
    steps: int


@dataclass
class EDMStepState(StepState):
    """The loop after a step; `sample` is the noisy state [b, c, h, w], in the scheduler's type. Change it, and the loop follows.

    Args:
        denoised: [b, c, h, w] the network's last estimate of the pictures.
        run: the settings of the loop.
    """

    denoised: Tensor
    run: EDMRun = field(repr=False)

    def clone(self) -> EDMStepState:
        """Return a copy to go on from later with `iterate(state=...)`."""
        return replace(self, sample=self.sample.clone(), denoised=self.denoised.clone())


class ConditionedPipeline(GenPipeline):
    """What pipelines around an `EDMUNet2DModel` share: prompts, seeds, latents, evaluation in groups."""

    model_cpu_offload_seq = "text_encoder->unet"
    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["sample", "denoised"]

    def check_components(self, unet: EDMUNet2DModel, text_encoder: Any, tokenizer: Any, id2label: dict[Any, str] | None) -> None:
        """Refuse components that do not fit together.

        Raises:
            ValueError: naming the widths or numbers that differ.
        """
        name, width = type(self).__name__, unet.config["label_dim"]
        if (text_encoder is None) != (tokenizer is None):
            raise ValueError(f"{name}: a text model has both text_encoder and tokenizer; one of them is missing.")
        if text_encoder is not None and text_encoder.config.projection_dim != width:
            given = text_encoder.config.projection_dim
            raise ValueError(f"{name}: the denoiser takes conditions of width {width}, the text encoder gives {given}.")
        if text_encoder is None and id2label and len(id2label) != width:
            raise ValueError(f"{name}: the denoiser takes {width} classes, id2label names {len(id2label)}.")

    @property
    def is_text_model(self) -> bool:
        """Whether prompts are text."""
        return self.text_encoder is not None

    @property
    def class_names(self) -> list[str]:
        """Names that prompts of a class model may use."""
        return list((self.config["id2label"] or {}).values())

    @property
    def image_size(self) -> tuple[int, int]:
        """(h, w) of the pictures."""
        size = self.unet.config["sample_size"]
        return size, size

    def start(
        self, prompt: Prompt | Sequence[Prompt] | None, num_images_per_prompt: int, generator: Seeds
    ) -> tuple[Tensor | None, list[int]]:
        """Return the conditions [b, l] (None for none) and the seeds of a call.

        Raises:
            ValueError: for unknown classes, a prompt to an unconditional model, or fewer than one picture.
        """
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}.")
        if prompt is None:
            return None, resolve_seeds(generator, num_images_per_prompt)
        width = self.unet.config["label_dim"]
        prompts = as_prompts(prompt)
        if not width:
            raise ValueError(f"{type(self).__name__}: this model is unconditional and takes no prompt, got {prompts[0]!r}.")
        meanings = resolve_prompts(prompts, self.config["id2label"], None if self.is_text_model else width)
        seeds = resolve_seeds(generator, len(prompts) * num_images_per_prompt)
        distinct = list(dict.fromkeys(meanings))
        with torch.no_grad():
            rows = self.encode_prompt(distinct)
        return rows[[distinct.index(meaning) for meaning in meanings for _ in range(num_images_per_prompt)]], seeds

    def encode_prompt(self, meanings: Sequence[Prompt], at_once: int = 1) -> Tensor:
        """Return condition rows [b, l] of class ids, or of texts, `at_once` together (bits may depend on it). Differentiable."""
        if self.is_text_model:
            parts = [[str(text) for text in meanings[start : start + at_once]] for start in range(0, len(meanings), at_once)]
            encoded = [encode_text(part, self.tokenizer, self.text_encoder).pooled for part in parts]
            return condition_vector(torch.cat(encoded)).to(self._execution_device)
        ids = torch.tensor([int(meaning) for meaning in meanings], device=self._execution_device)
        return torch.nn.functional.one_hot(ids, self.unet.config["label_dim"]).float()

    def noise(self, streams: SampleStreams) -> Tensor:
        """Return standard normal numbers [b, c, h, w] of every sample's stream, on the device."""
        return streams.normal(self.unet.config["in_channels"], *self.image_size).to(self._execution_device)

    def denoise(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None, guidance_scale: float, at_once: int) -> Tensor:
        """Evaluate the network on samples in groups, with guidance where it is not 1.

        D = D(null) + guidance_scale (D(condition) - D(null)).
        """
        parts = []
        for start in range(0, len(x), at_once):
            group = x[start : start + at_once]
            own = None if labels is None else labels[start : start + at_once]
            if own is None or guidance_scale == 1:
                parts.append(self.unet(group, sigma, own).sample)
            else:
                both = self.unet(torch.cat([group, group]), sigma, torch.cat([own, torch.zeros_like(own)])).sample
                cond, null = both.chunk(2)
                parts.append(null + guidance_scale * (cond - null))
        return torch.cat(parts)

    def estimate_memory(self, num_images: int = 1, *, guidance: bool = False, samples_at_once: int | None = None) -> MemoryEstimate:
        """Estimate the peak memory of a call before it runs.

        Args:
            num_images: pictures in all.
            guidance: whether guidance is used.
            samples_at_once: as in a call.
        """
        group = min(num_images, samples_at_once_or_default(samples_at_once, self._execution_device)) * (2 if guidance else 1)
        h, w = self.image_size
        picture, patch = self.unet.config["in_channels"] * h * w, self.unet.config["patch_size"]
        network, size = self.unet.unet, self.unet.unet.map_layer0.weight.element_size()
        top = max(block.weight.shape[0] for block in network.enc.values() if isinstance(block, torch.nn.Conv2d))
        inside = group * size * (h // patch) * (w // patch) * top * (8 + len(network.enc))  # skips, and what a block holds at once
        sampling = int(inside + 8 * 6 * num_images * picture)
        return MemoryEstimate(weights=self.weight_bytes(), sampling=sampling, decoding=4 * 3 * num_images * picture)


class EDMPipeline(ConditionedPipeline):
    """Pictures by iterated denoising.

    Args:
        unet: the denoiser.
        scheduler: `EDMHeunScheduler`, or one of diffusers' EDM schedulers (`EDMDPMSolverMultistepScheduler`, `EDMEulerScheduler`).
        text_encoder: of a text model, with a projection as wide as the denoiser's condition.
        tokenizer: of the text encoder.
        id2label: class names by id, for a class model.
        num_inference_steps: used when a call gives none.
        guidance_scale: used when a call gives none; 1 = off.

    Raises:
        ValueError: if the components do not fit together.

    Example:
        >>> unet = {"name": "song", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
        >>> model = EDMUNet2DModel(sample_size=8, label_dim=2, unet_config=unet).eval()
        >>> pipe = EDMPipeline(model, EDMHeunScheduler(), id2label={0: "chest", 1: "table"})
        >>> pipe.set_progress_bar_config(disable=True)
        >>> output = pipe("chest", num_inference_steps=2, generator=[1])
        >>> output.images[0].size, output.seeds
        ((8, 8), [1])
    """

    def __init__(
        self,
        unet: EDMUNet2DModel,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        id2label: dict[Any, str] | None = None,
        num_inference_steps: int = 18,
        guidance_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.check_components(unet, text_encoder, tokenizer, id2label)
        self.register_modules(unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)
        labels = {str(key): label for key, label in id2label.items()} if id2label else None
        self.register_to_config(id2label=labels, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)

    @classmethod
    def complete(cls, components: dict[str, Any]) -> dict[str, Any]:
        """Add the published sampler to an official denoiser."""
        return {"scheduler": EDMHeunScheduler(), **components}

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
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
            prompt: text, class name or class id, or a list of them; None makes pictures without a condition.
            num_inference_steps: N, 2 N - 1 network evaluations with the Heun scheduler; the pipeline's own if None.
            guidance_scale: 1 = off; the pipeline's own if None.
            num_images_per_prompt: pictures per prompt, or in all without one.
            generator: int or `torch.Generator` that draws one seed per picture, or a list of seeds, one per picture.
            samples_at_once: samples that the network evaluates together. None: one on a CPU, where a sample's bits then do not depend on
                its batch; all elsewhere.
            output_type: 'pil', 'np' ([b, h, w, 3] in [0, 1]) or 'pt' ([b, 3, h, w] in [-1, 1]).
            return_dict: False returns a tuple (images, seeds).
            callback_on_step_end: called as callback(pipe, step, timestep, fields) after each step; may return {"sample": state}.
            callback_on_step_end_tensor_inputs: fields of the step's state that the callback gets.

        Returns:
            Pictures in the order of the prompts, those of one prompt together, with their seeds.

        Raises:
            ValueError: for unknown classes and values out of range, before any work is done.
        """
        choose(output_type, OUTPUT_TYPES, "output type")
        self.check_callback_inputs(callback_on_step_end_tensor_inputs)
        states = self.iterate(
            prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            samples_at_once=samples_at_once,
        )
        steps = self.config["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        last = self.drain(states, steps, callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.maybe_free_model_hooks()
        output = ImageOutput(images=to_output_type(last.sample, output_type), seeds=last.seeds)
        return output if return_dict else output.to_tuple()

    def iterate(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        *,
        state: EDMStepState | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Seeds = None,
        samples_at_once: int | None = None,
    ) -> Generator[EDMStepState, None, None]:
        """Run the loop step by step, without gradients.

        The inputs are checked at once; the first step runs when the first state is asked for. `close()` cancels.

        Args:
            prompt: as in a call; the other arguments too.
            state: one of the states that a loop yielded, or a `clone()` of it, to go on from: then nothing else is given.

        Yields:
            The state after each step. The loop goes on from its `sample`.

        Raises:
            ValueError: for unknown classes and values out of range, or a state with other arguments or after its last step.
        """
        if state is not None:
            if any(item is not None for item in (prompt, num_inference_steps, guidance_scale, generator, samples_at_once)):
                raise ValueError("iterate(state=...) goes on with the settings of the saved loop; leave prompt and other arguments out.")
            if state.index + 1 >= state.num_steps:
                raise ValueError(f"iterate(state=...): the state is after the last of {state.num_steps} steps; nothing is left to do.")
            return self._loop(state.run, state.seeds, state)
        steps = self.config["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        scale = self.config["guidance_scale"] if guidance_scale is None else guidance_scale
        if not math.isfinite(scale):
            raise ValueError(f"guidance_scale must be a finite number (1 = off), got {scale}.")
        if steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {steps}.")
        labels, seeds = self.start(prompt, num_images_per_prompt, generator)
        run = EDMRun(labels, scale, samples_at_once_or_default(samples_at_once, self._execution_device), steps)
        return self._loop(run, seeds, None)

    @torch.no_grad()
    def _loop(self, run: EDMRun, seeds: list[int], state: EDMStepState | None) -> Generator[EDMStepState, None, None]:
        """Yield after each step; a resumed loop draws its streams anew up to where it stands."""
        scheduler, streams, device = copy.deepcopy(self.scheduler), SampleStreams(seeds), self._execution_device
        latents, first = self.noise(streams), 0 if state is None else state.index + 1
        if not isinstance(scheduler, EDMHeunScheduler):
            yield from self._foreign_loop(scheduler, run, seeds, latents, state)
            return
        scheduler.set_timesteps(run.steps, preconditioner=self.unet.preconditioner)
        wide = torch.float64 if device.type != "mps" else torch.float32
        sample = latents.to(wide) * scheduler.init_noise_sigma if state is None else state.sample
        has_churn = scheduler.config["s_churn"] > 0
        for _ in range(first if has_churn else 0):
            self.noise(streams)
        scheduler.go_to(first)
        sigmas = iter(scheduler.timesteps.tolist()[first * (2 if scheduler.config["solver"] == "heun" else 1) :])
        for index in range(first, run.steps):
            noise = self.noise(streams) if has_churn else None
            sigma, result = 0.0, None
            while result is None or scheduler.is_between:
                sigma = next(sigmas)
                x = scheduler.scale_model_input(sample if result is None else result.prev_sample, sigma, noise=noise)
                denoised = self.denoise(x, sigma, run.labels, run.guidance_scale, run.at_once)
                result = cast(Any, scheduler.step(denoised, sigma, x if result is None else result.prev_sample))
            state = EDMStepState(index, run.steps, sigma, result.prev_sample, seeds, result.pred_original_sample, run)
            yield state
            sample = state.sample

    def _foreign_loop(
        self, scheduler: Any, run: EDMRun, seeds: list[int], latents: Tensor, state: EDMStepState | None
    ) -> Generator[EDMStepState, None, None]:
        """Run one of diffusers' EDM schedulers, which want the bare network's output and undo its preconditioning themselves.

        Raises:
            ValueError: for schedulers of another kind, and for resuming, which their history does not allow.
        """
        if not hasattr(scheduler, "precondition_outputs"):
            raise ValueError(
                f"EDMPipeline: {type(scheduler).__name__} does not work on noise levels; take EDMHeunScheduler, EDMEulerScheduler or "
                "EDMDPMSolverMultistepScheduler."
            )
        if state is not None:
            raise ValueError(f"iterate(state=...): {type(scheduler).__name__} keeps earlier steps, so a loop cannot be resumed.")
        scheduler.set_timesteps(run.steps, device=latents.device)
        sample, sigmas, data = latents * scheduler.init_noise_sigma, scheduler.sigmas.tolist(), scheduler.config["sigma_data"]
        for index, (timestep, sigma) in enumerate(zip(scheduler.timesteps, sigmas, strict=False)):
            scheduler.scale_model_input(sample, timestep)  # its state advances here; the network scales its input itself
            denoised = self.denoise(sample, sigma, run.labels, run.guidance_scale, run.at_once)
            skip, out = data**2 / (sigma**2 + data**2), sigma * data / math.sqrt(sigma**2 + data**2)
            sample = scheduler.step((denoised - skip * sample) / out, timestep, sample).prev_sample
            state = EDMStepState(index, run.steps, sigma, sample, seeds, denoised, run)
            yield state
            sample = state.sample

    def preview(self, state: EDMStepState, output_type: str = "pil") -> Any:
        """Return the network's present estimate of the pictures of a running loop."""
        return to_output_type(state.denoised, output_type)


class OneStepPipeline(ConditionedPipeline):
    """Pictures by one evaluation of a distilled student, G(sigma_init z; sigma_init, condition).

    Args:
        unet: the student.
        text_encoder: of a text model, with a projection as wide as the student's condition.
        tokenizer: of the text encoder.
        id2label: class names by id, for a class model.
        sigma_init: noise level that the student was trained at.

    Raises:
        ValueError: if the components do not fit together, or sigma_init is not above 0.

    Example:
        >>> unet = {"name": "song", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
        >>> pipe = OneStepPipeline(EDMUNet2DModel(sample_size=8, unet_config=unet).eval())
        >>> pipe(num_images_per_prompt=2, generator=[1, 2], output_type="pt").images.shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        unet: EDMUNet2DModel,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        id2label: dict[Any, str] | None = None,
        sigma_init: float = 2.5,
    ) -> None:
        super().__init__()
        self.check_components(unet, text_encoder, tokenizer, id2label)
        if not sigma_init > 0:
            raise ValueError(f"OneStepPipeline: sigma_init must be above 0, got {sigma_init}.")
        self.register_modules(unet=unet, text_encoder=text_encoder, tokenizer=tokenizer)
        labels = {str(key): label for key, label in id2label.items()} if id2label else None
        self.register_to_config(id2label=labels, sigma_init=sigma_init)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        *,
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
            prompt: text, class name or class id, or a list of them; None makes pictures without a condition.
            num_images_per_prompt: pictures per prompt, or in all without one.
            generator: int or `torch.Generator` that draws one seed per picture, or a list of seeds, one per picture.
            num_inference_steps: 1; a student of one step has no others.
            guidance_scale: None or 1; guidance is part of what the student learnt.
            samples_at_once: samples that the network evaluates together; None: one on a CPU, all elsewhere.
            output_type: 'pil', 'np' ([b, h, w, 3] in [0, 1]) or 'pt' ([b, 3, h, w] in [-1, 1]).
            return_dict: False returns a tuple (images, seeds).

        Returns:
            Pictures in the order of the prompts, those of one prompt together, with their seeds.

        Raises:
            ValueError: for unknown classes and values out of range, before any work is done.
        """
        choose(output_type, OUTPUT_TYPES, "output type")
        if num_inference_steps != 1 or guidance_scale not in (None, 1):
            given = f"num_inference_steps={num_inference_steps}, guidance_scale={guidance_scale}"
            raise ValueError(f"OneStepPipeline: a one-step student takes one step and no guidance, got {given}; leave them out.")
        labels, seeds = self.start(prompt, num_images_per_prompt, generator)
        at_once = samples_at_once_or_default(samples_at_once, self._execution_device)
        sigma = self.config["sigma_init"]
        images = self.denoise(sigma * self.noise(SampleStreams(seeds)), sigma, labels, 1.0, at_once)
        self.maybe_free_model_hooks()
        output = ImageOutput(images=to_output_type(images, output_type), seeds=seeds)
        return output if return_dict else output.to_tuple()
