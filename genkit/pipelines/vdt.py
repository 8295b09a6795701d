"""VDTPipeline: make, continue, interpolate, animate and complete clips with a video diffusion transformer.

VDT: General-purpose Video Diffusion Transformers via Mask Modeling (Lu et al., ICLR 2024, arXiv 2305.13311). One model and one mask: what
is given enters every step clean and comes out exactly as it went in; the rest is made.

- any of diffusers' schedulers that takes predicted noise: DPM-Solver++ by default, DDIM, or DDPM with learned variances
- pixels, latents of any `AutoencoderKL`, or of an image tokenizer; frames are encoded and decoded a few at a time
- longer clips by windows that overlap: each is given the last frames of the one before

Legend: b clips, f frames, c channels, h w rows and columns of a latent.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from diffusers import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genkit.checks import choose
from genkit.conditioners.text import condition_vector, encode_text
from genkit.generators.vdt import VDTTransformer3DModel
from genkit.pipelines.base import Callback, GenPipeline, check_sampling, samples_at_once_or_default
from genkit.pipelines.clips import Clip, clip_tensor, pixel_mask, place_frames, reduce_mask, to_video
from genkit.pipelines.frame_latents import FRAMES_AT_ONCE, FrameCoder, FrameLatents
from genkit.pipelines.outputs import OUTPUT_TYPES, MemoryEstimate, StepState
from genkit.pipelines.prompts import Prompt, as_prompts, resolve_prompts
from genkit.pipelines.seeds import SampleStreams, Seeds, resolve_seeds
from genkit.schedulers.named import exact_tables, noise_scheduler


@dataclass
class VideoOutput(BaseOutput):
    """Clips.

    Attributes:
        frames: list of lists of PIL images; or [b, f, h, w, 3] in [0, 1] (np); or [b, f, 3, h, w] in [-1, 1] (pt).
        seeds: seed of each clip; give them as `generator` to get the same clips again.
    """

    frames: Any
    seeds: list[int]


@dataclass(frozen=True)
class VDTRun:
    """What stays the same during one loop.

    Args:
        given: [b, f, c, h, w] clean latents.
        mask: [b, f, h, w] bool, True = to be made.
        pixels: [b, f, 3, H, W] given frames, and `pixel_mask` [b, f, H, W], True = to be made; None where nothing is given.
        cond: arguments of the transformer for the samples.
        null: the same for the unconditional branch, None without guidance.
        guidance_scale: 1 = off.
        at_once: clips that are evaluated together.
        steps: of the scheduler.
    """

    given: Tensor = field(repr=False)
    mask: Tensor = field(repr=False)
    cond: dict[str, Tensor] = field(repr=False)
    null: dict[str, Tensor] | None = field(repr=False)
    guidance_scale: float
    at_once: int
    steps: int
    pixels: Tensor | None = field(default=None, repr=False)
    pixel_mask: Tensor | None = field(default=None, repr=False)


@dataclass
class VDTStepState(StepState):
    """The loop after a step; `sample` is the noisy state [b, f, c, h, w]. Change it, and the loop follows; what is given stays.

    Args:
        run: the settings of the loop.
        scheduler: as this step left it, with what it remembers of earlier ones.
        draws: states of the samples' generators after this step.
    """

    run: VDTRun = field(repr=False)
    scheduler: Any = field(repr=False)
    draws: list[Tensor] = field(repr=False)

    @property
    def composed(self) -> Tensor:
        """The state with what is given in its place."""
        return torch.where(self.run.mask[:, :, None], self.sample, self.run.given.to(self.sample))

    def clone(self) -> VDTStepState:
        """Return a copy to go on from later with `iterate(state=...)`."""
        return replace(self, sample=self.sample.clone())


class VDTPipeline(GenPipeline):
    """Clips from frames, text, classes or nothing.

    Args:
        transformer: the network.
        scheduler: of diffusers, predicting noise.
        vae: for models of latents: diffusers' VAE, or an image tokenizer; None for models of pixels.
        text_encoder: of a text model, with a projection as wide as the transformer's text.
        tokenizer: of the text encoder.
        id2label: class names by id, for a class model.
        num_inference_steps: used when a call gives none.
        guidance_scale: used when a call gives none; 1 = off.
        latents_mean, latents_std: of a tokenizer's latents, by channel.
        snap_latents: whether a tokenizer's latents snap to codes before they are decoded.

    Raises:
        ValueError: if the components do not fit together.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> model = VDTTransformer3DModel(sample_size=4, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_frames=3).eval()
        >>> pipe = VDTPipeline(model, DDIMScheduler(clip_sample=False))
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe(num_inference_steps=2, generator=[1], output_type="pt").frames.shape
        torch.Size([1, 3, 3, 4, 4])
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae", "text_encoder", "tokenizer"]

    def __init__(
        self,
        transformer: VDTTransformer3DModel,
        scheduler: SchedulerMixin,
        vae: FrameCoder | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        id2label: dict[Any, str] | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        snap_latents: bool = False,
    ) -> None:
        super().__init__()
        channels = FrameLatents(vae, latents_mean, latents_std).channels
        if transformer.config["in_channels"] != channels:
            what = "pixels have 3; pass the VAE of its latents as vae=..." if vae is None else f"the VAE makes latents of {channels}."
            raise ValueError(f"VDTPipeline: the transformer takes {transformer.config['in_channels']} channels, {what}")
        if (text_encoder is None) != (tokenizer is None) or (text_encoder is None) != (transformer.config["text_dim"] is None):
            raise ValueError("VDTPipeline: a text model has text_encoder and tokenizer and a transformer with text_dim; give all or none.")
        if text_encoder is not None and text_encoder.config.projection_dim != transformer.config["text_dim"]:
            widths = f"{transformer.config['text_dim']} and {text_encoder.config.projection_dim}"
            raise ValueError(f"VDTPipeline: transformer and text encoder differ in the width of text: {widths}.")
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        labels = {str(key): label for key, label in id2label.items()} if id2label else None
        self.register_to_config(
            id2label=labels, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, latents_mean=latents_mean,
            latents_std=latents_std, snap_latents=snap_latents,
        )  # fmt: skip

    @property
    def latents(self) -> FrameLatents:
        """The way from frames to latents and back."""
        config = self.config
        return FrameLatents(self.vae, config["latents_mean"], config["latents_std"], FRAMES_AT_ONCE, config["snap_latents"])

    @property
    def factor(self) -> int:
        """Pixels of a latent's side."""
        return self.latents.factor

    @property
    def image_size(self) -> tuple[int, int]:
        """(h, w) of the frames at the trained size."""
        (rows, columns), patch = self.transformer.grid, self.transformer.config["patch_size"]
        return rows * patch * self.factor, columns * patch * self.factor

    @property
    def is_text_model(self) -> bool:
        """Whether prompts are text."""
        return self.text_encoder is not None

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        *,
        frames: Clip | None = None,
        mask: str | Tensor | None = None,
        num_frames: int | None = None,
        overlap: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Seeds = None,
        samples_at_once: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("sample",),
    ) -> VideoOutput | tuple[Any, ...]:
        """Make clips.

        Args:
            prompt: text, class name or class id, or a list of them; None makes clips without.
            frames: what is given, one clip for all samples or [b, ...]: PIL images, [f, h, w, 3] bytes or in [0, 1], or [f, 3, h, w] in
                [-1, 1].
            mask: what to do with them. "predict": they are the first frames; "backward": the last; "interpolate": key frames spread evenly,
                first and last included; "animate": the first frame; or a bool tensor [f, h, w] or [b, f, h, w] in pixels, True = to be
                made, with a whole clip ("complete"). None is "predict" with frames and "generate" without. A mask that is True everywhere
                is "generate".
            num_frames: frames of the result; with a tensor mask those of the clip, else the trained number if None. More than the trained
                number are made window by window (generate, predict, animate).
            overlap: frames that a window is given from the one before; half a window if None.
            num_inference_steps: of the scheduler; the pipeline's own if None.
            guidance_scale: 1 = off; the pipeline's own if None.
            num_images_per_prompt: clips per prompt, or in all without one.
            generator: int or `torch.Generator` that draws one seed per clip, or a list of seeds, one per clip.
            samples_at_once: clips that the networks evaluate together; None: one on a CPU, all elsewhere.
            output_type: 'pil', 'np' ([b, f, h, w, 3] in [0, 1]) or 'pt' ([b, f, 3, h, w] in [-1, 1]).
            return_dict: False returns a tuple (frames, seeds).
            callback_on_step_end: called as callback(pipe, step, timestep, fields) after each step of the first window.
            callback_on_step_end_tensor_inputs: fields of the step's state that the callback gets.

        Returns:
            Clips in the order of the prompts, those of one prompt together, with their seeds. What was given is in them unchanged.

        Raises:
            ValueError: for what does not fit together, before any work is done.
        """
        choose(output_type, OUTPUT_TYPES, "output type")
        self.check_callback_inputs(callback_on_step_end_tensor_inputs)
        steps = self.config["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        total, shared = self._windows(mask, num_frames, overlap)
        before = None
        window = self.transformer.config["num_frames"]
        if total is not None and total > window and frames is not None:
            frames = clip_tensor(frames)
            if frames.shape[1] >= window:  # more is given than a window holds: go on from its end
                before, frames = frames[:, :-shared], frames[:, -shared:]
                total -= before.shape[1]
        states = self.iterate(
            prompt,
            frames=frames,
            mask=mask,
            num_frames=None if total is None else min(total, window),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            samples_at_once=samples_at_once,
        )
        last = self.drain(states, steps, callback_on_step_end, callback_on_step_end_tensor_inputs)
        latents = last.composed
        while total is not None and latents.shape[1] < total:
            latents = self._continue(latents, last.run, last.seeds, shared, total)
        video = self.finish(latents, last.run)
        if before is not None:
            video = torch.cat([before.to(video).expand(len(video), *before.shape[1:]), video], dim=1)
        self.maybe_free_model_hooks()
        output = VideoOutput(frames=to_video(video, output_type), seeds=last.seeds)
        return output if return_dict else output.to_tuple()

    def _windows(self, mask: str | Tensor | None, num_frames: int | None, overlap: int | None) -> tuple[int | None, int]:
        """Return the frames in all (None: as many as the clip has), and how many a window takes from the one before.

        Raises:
            ValueError: for fewer than one, and where windows cannot follow each other.
        """
        window = self.transformer.config["num_frames"]
        shared = max(window // 2, 1) if overlap is None else overlap
        if isinstance(mask, Tensor) and num_frames is None:
            return None, shared
        total = window if num_frames is None else num_frames
        if total < 1:
            raise ValueError(f"num_frames must be at least 1, got {total}.")
        if total > window and not 1 <= shared < window:
            raise ValueError(f"overlap must lie in 1 .. {window - 1}, so that windows of {window} frames follow each other, got {shared}.")
        if total > window and (isinstance(mask, Tensor) or mask in ("backward", "interpolate")):
            word = "a mask in pixels" if isinstance(mask, Tensor) else f"mask={mask!r}"
            raise ValueError(f"{word} fills one window of at most {window} frames, got num_frames={total}; predict and animate go on.")
        return total, shared

    def _continue(self, latents: Tensor, run: VDTRun, seeds: list[int], shared: int, total: int) -> Tensor:
        """Return clips with one more window behind them, whose first frames are their last."""
        count, window = latents.shape[1], self.transformer.config["num_frames"]
        given = torch.zeros(len(latents), window, *latents.shape[2:]).to(latents)
        given[:, :shared] = latents[:, -shared:]
        mask = torch.ones(len(latents), window, *latents.shape[3:], dtype=torch.bool, device=latents.device)
        mask[:, :shared] = False
        *_, last = self._loop(replace(run, given=given, mask=mask), [(seed + count) % 2**63 for seed in seeds])
        return torch.cat([latents, last.composed[:, shared:]], dim=1)[:, :total]

    def iterate(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        *,
        frames: Clip | None = None,
        mask: str | Tensor | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Seeds = None,
        samples_at_once: int | None = None,
        state: VDTStepState | None = None,
    ) -> Generator[VDTStepState, None, None]:
        """Run the loop of one window step by step, without gradients; arguments as in a call.

        Args:
            prompt, frames, mask, num_frames, num_inference_steps, guidance_scale, num_images_per_prompt, generator, samples_at_once: as in
                a call.
            state: one of the states that a loop yielded, or a `clone()` of it, to go on from: then nothing else is given.

        Yields:
            The state after each step. The loop goes on from its `sample`; `close()` cancels.

        Raises:
            ValueError: for what does not fit together, a state with other arguments, or one after its last step.
        """
        if state is not None:
            others = (prompt, frames, mask, num_frames, num_inference_steps, guidance_scale, generator, samples_at_once)
            if any(item is not None for item in others) or num_images_per_prompt != 1:
                raise ValueError("iterate(state=...) goes on with the settings of the saved loop; leave prompt and other arguments out.")
            if state.index + 1 >= state.num_steps:
                raise ValueError(f"iterate(state=...): the state is after the last of {state.num_steps} steps; nothing is left to do.")
            return self._loop(state.run, state.seeds, state)
        steps = self.config["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        own = 1.0 if prompt is None else self.config["guidance_scale"]
        scale = own if guidance_scale is None else guidance_scale
        check_sampling(steps, num_images_per_prompt, scale)
        prompts = [None] if prompt is None else as_prompts(prompt)
        seeds = resolve_seeds(generator, len(prompts) * num_images_per_prompt)
        with torch.no_grad():
            cond, null = self.prepare_conditions(prompts, num_images_per_prompt, scale)
            pixels, hidden = self.prepare_frames(frames, mask, num_frames, len(seeds))
            run = VDTRun(
                given=self.encode(pixels),
                mask=reduce_mask(hidden, self.factor),
                cond=cond,
                null=null,
                guidance_scale=scale,
                at_once=samples_at_once_or_default(samples_at_once, self._execution_device),
                steps=steps,
                pixels=pixels,
                pixel_mask=hidden,
            )
        return self._loop(run, seeds)

    @torch.no_grad()
    def _loop(self, run: VDTRun, seeds: list[int], state: VDTStepState | None = None) -> Generator[VDTStepState, None, None]:
        """Yield after each step of the scheduler, whose tables are exact here, from the start or from a saved state."""
        streams = SampleStreams(seeds)
        if state is None:
            scheduler: Any = exact_tables(copy.deepcopy(self.scheduler))
            scheduler.set_timesteps(run.steps)
            sample = streams.normal(*run.given.shape[1:]).to(run.given) * scheduler.init_noise_sigma
        else:
            scheduler, sample = copy.deepcopy(state.scheduler), state.sample
            for stream, saved in zip(streams.generators, state.draws, strict=True):
                stream.set_state(saved)
        learned = getattr(scheduler.config, "variance_type", None) in ("learned", "learned_range")
        draws = {"generator": streams.generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
        first = 0 if state is None else state.index + 1
        for index, timestep in enumerate(scheduler.timesteps[first:], first):
            scaled = scheduler.scale_model_input(sample, timestep)
            parts = [self._evaluate(run, scaled, timestep, slice(i, i + run.at_once)) for i in range(0, len(sample), run.at_once)]
            output = torch.cat(parts)
            output = output if learned else output[:, :, : sample.shape[2]]
            # channels in front of frames, where schedulers look for variances
            step = scheduler.step(output.transpose(1, 2), timestep, sample.transpose(1, 2), **draws).prev_sample.transpose(1, 2)
            states = [stream.get_state() for stream in streams.generators]
            state = VDTStepState(
                index, len(scheduler.timesteps), float(timestep), step.to(sample.dtype), seeds, run, copy.deepcopy(scheduler), states
            )
            yield state
            sample = state.sample

    def _evaluate(self, run: VDTRun, sample: Tensor, timestep: Tensor, rows: slice) -> Tensor:
        """Evaluate the network on some clips, what is given in its place, with guidance on the noise where it is not 1."""
        x = torch.where(run.mask[rows, :, None], sample[rows], run.given[rows]).to(self.transformer.dtype)
        cond = {name: value[rows] for name, value in run.cond.items()}
        if run.null is None:
            return self.transformer(x, timestep, **cond).sample.float()
        null = {name: value[rows] for name, value in run.null.items()}
        both = {name: torch.cat([value, null[name]]) for name, value in cond.items()}
        found, empty = self.transformer(torch.cat([x, x]), timestep, **both).sample.float().chunk(2)
        c = x.shape[2]
        eps = empty[:, :, :c] + run.guidance_scale * (found[:, :, :c] - empty[:, :, :c])
        return torch.cat([eps, found[:, :, c:]], dim=2)

    def prepare_conditions(
        self, prompts: Sequence[Prompt | None], per_prompt: int, guidance_scale: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """Return the transformer's conditions of every clip, and of the unconditional branch where guidance needs it.

        Raises:
            ValueError: for prompts or guidance that the model has no use for.
        """
        count, device, config = len(prompts) * per_prompt, self._execution_device, self.transformer.config
        has_classes = config["num_classes"] > 1
        if prompts[0] is None:
            if guidance_scale != 1:
                raise ValueError(f"guidance_scale={guidance_scale} needs a prompt.")
            return {}, None
        if not self.is_text_model and not has_classes:
            raise ValueError(f"VDTPipeline: this model takes no prompt, got {prompts[0]!r}.")
        meanings = resolve_prompts(
            [p for p in prompts if p is not None], self.config["id2label"], None if self.is_text_model else config["num_classes"]
        )
        if self.is_text_model:
            rows = torch.cat([condition_vector(encode_text([str(text)], self.tokenizer, self.text_encoder).pooled) for text in meanings])
            cond = {"pooled": rows.repeat_interleave(per_prompt, 0).to(device)}
            return cond, None if guidance_scale == 1 else {"pooled": torch.zeros_like(cond["pooled"])}
        labels = torch.tensor([int(meaning) for meaning in meanings for _ in range(per_prompt)], device=device)
        null = None if guidance_scale == 1 else {"class_labels": torch.full((count,), self.transformer.null_class, device=device)}
        return {"class_labels": labels}, null

    def prepare_frames(self, frames: Clip | None, mask: str | Tensor | None, num_frames: int | None, count: int) -> tuple[Tensor, Tensor]:
        """Return clips [b, f, 3, h, w], zero where nothing is given, and the mask [b, f, h, w], True = to be made.

        Raises:
            ValueError: for frames or masks that do not fit together or are of a size that the model cannot take.
        """
        device, trained = self._execution_device, self.transformer.config["num_frames"]
        if frames is None:
            if isinstance(mask, Tensor) or mask not in (None, "generate"):
                raise ValueError(f"mask={mask!r:.60} says what to do with frames, but none are given.")
            f, (height, width) = num_frames or trained, self.image_size
            return torch.zeros(count, f, 3, height, width, device=device), torch.ones(
                count, f, height, width, dtype=torch.bool, device=device
            )
        video = clip_tensor(frames).to(device)
        if len(video) not in (1, count):
            raise ValueError(f"frames: one clip, or one per sample: expected 1 or {count}, got {len(video)}.")
        step = self.factor * self.transformer.config["patch_size"]
        if video.shape[3] % step or video.shape[4] % step:
            raise ValueError(f"frames: rows and columns must be multiples of {step}, got {list(video.shape[3:])}; resize them first.")
        if isinstance(mask, Tensor):
            if num_frames not in (None, video.shape[1]):
                raise ValueError(f"a mask in pixels goes with a whole clip: num_frames={num_frames}, frames {video.shape[1]}.")
            whole, hidden = video, pixel_mask(mask.to(device), video.shape)
            if len(hidden) not in (1, count):
                raise ValueError(f"mask: one, or one per sample: expected 1 or {count}, got {len(hidden)}.")
        else:
            f = num_frames or trained
            places = place_frames(video.shape[1], "predict" if mask is None else mask, f)
            whole, hidden = (
                video.new_zeros(len(video), f, *video.shape[2:]),
                torch.ones(1, f, *video.shape[3:], dtype=torch.bool, device=device),
            )
            whole[:, places], hidden[:, places] = video, False
        return whole.expand(count, *whole.shape[1:]), hidden.expand(count, *hidden.shape[1:])

    def encode(self, video: Tensor) -> Tensor:
        """Return latents [b, f, c, h, w] of frames [b, f, 3, H, W] in [-1, 1], a few frames at a time: the mean of the VAE's posterior."""
        return self.latents.encode(video)

    def decode(self, latents: Tensor) -> Tensor:
        """Return frames [b, f, 3, H, W] of latents, a few frames at a time."""
        return self.latents.decode(latents)

    def finish(self, latents: Tensor, run: VDTRun) -> Tensor:
        """Return frames [b, f, 3, H, W] of latents, with the given pixels in their places exactly as they came."""
        video = self.decode(latents)
        if run.pixels is None or run.pixel_mask is None:
            return video
        f = min(video.shape[1], run.pixels.shape[1])
        first = torch.where(run.pixel_mask[:, :f, None], video[:, :f], run.pixels[:, :f].to(video))
        return torch.cat([first, video[:, f:]], dim=1)

    def preview(self, state: VDTStepState, output_type: str = "pil") -> Any:
        """Decode a running loop."""
        with torch.no_grad():
            return to_video(self.finish(state.composed, state.run), output_type)

    @classmethod
    def complete(cls, components: dict[str, Any]) -> dict[str, Any]:
        """Add DPM-Solver++ to a transformer."""
        return {"scheduler": noise_scheduler("dpm-solver++"), **components}

    def estimate_memory(self, num_clips: int = 1, *, guidance: bool = False, samples_at_once: int | None = None) -> MemoryEstimate:
        """Estimate the peak memory of a call before it runs.

        Args:
            num_clips: clips in all.
            guidance: whether guidance is used.
            samples_at_once: as in a call.
        """
        config, size = self.transformer.config, next(self.transformer.parameters()).element_size()
        tokens = config["num_frames"] * self.transformer.grid[0] * self.transformer.grid[1]
        rows = min(num_clips, samples_at_once_or_default(samples_at_once, self._execution_device)) * (2 if guidance else 1)
        inside = rows * tokens * config["hidden_size"] * (4 + config["mlp_ratio"]) * size
        height, width = self.image_size
        frame = 3 * height * width
        top = self.latents.decoding_bytes(height, width)
        decoding = 4 * num_clips * config["num_frames"] * frame * 2 + min(FRAMES_AT_ONCE, num_clips * config["num_frames"]) * top
        return MemoryEstimate(weights=self.weight_bytes(), sampling=int(inside), decoding=int(decoding))
