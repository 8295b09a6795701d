"""ShapePipeline: a picture, several views or text to a mesh.

Hunyuan3D 2.0 (arXiv 2501.12202) and FlashVDM (arXiv 2503.16302): a flow-matching transformer makes the latent tokens of a shape, a vecset
VAE turns them into a field, marching cubes into a mesh. Shapes span [-1, 1].

- guidance costs one more token, and empty steps nothing (`genkit.pipelines.shape_flow`)
- after guidance distillation the scale is an input of the network, after step distillation five steps do

Letters: b shapes, n latent tokens, e width of a latent, m condition tokens, w width of one.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genkit.checks import choose
from genkit.conditioners.pictures import BORDER, VIEWS, encode_pictures, encode_views, object_rgba, recentred, to_condition
from genkit.conditioners.text import encode_text
from genkit.generators.shape_dit import ShapeDiT
from genkit.pipelines.base import Callback, check_sampling, samples_at_once_or_default
from genkit.pipelines.outputs import MemoryEstimate, StepState
from genkit.pipelines.seeds import SampleStreams, Seeds, resolve_seeds
from genkit.pipelines.shape_decoding import ShapeOutput, ShapePipelineBase
from genkit.pipelines.shape_flow import ShapeFlow
from genkit.schedulers.flow_matching import FlowMatchingScheduler
from genkit.tokenizers.shape_vae import ShapeVAE

ShapePrompt = str | Image.Image | Sequence[Image.Image]
"""Text, a picture, or several views of one object."""


@dataclass(frozen=True)
class ShapeRun:
    """What stays the same during one loop.

    Args:
        flows: velocity of groups of samples that follow each other.
        scheduler: with the times of this run.
        groups: samples of each flow.
    """

    flows: list[ShapeFlow] = field(repr=False)
    scheduler: FlowMatchingScheduler = field(repr=False)
    groups: list[int]


@dataclass
class ShapeStepState(StepState):
    """The loop after a step; `sample` is the noisy state [b, n, e]. Change it, and the loop follows.

    Args:
        predicted: [b, n, e] where the velocity leads.
        run: the settings of the loop.
    """

    predicted: Tensor = field(repr=False)
    run: ShapeRun = field(repr=False)

    def clone(self) -> ShapeStepState:
        """Return a copy."""
        return replace(self, sample=self.sample.clone())


class ShapePipeline(ShapePipelineBase):
    """Meshes from pictures, views or text.

    Args:
        transformer: the velocity field.
        vae: of the latents; a decoder does.
        scheduler: times of the steps.
        image_encoder: DINOv2, for pictures.
        text_encoder: for text, its tokens as wide as the transformer's condition.
        tokenizer: of the text encoder.
        slim_vae: decodes the same latents with a slim head.
        condition_size: side of the cut-out pictures.
        octree_resolution, decoder, head: used when a call gives none.
        num_inference_steps, guidance_scale: used when a call gives none; 1 = off.
        takes_views: whether prompts may be several views of an object; False for models that have learned from single pictures alone.
        max_guidance_scale: the largest that a guidance-distilled transformer has learned; larger ones are refused. None: any.

    Raises:
        ValueError: if the components do not fit together.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->transformer->vae->slim_vae"
    _optional_components: ClassVar[list[str]] = ["image_encoder", "text_encoder", "tokenizer", "slim_vae"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["sample", "predicted"]

    def __init__(
        self,
        transformer: ShapeDiT,
        vae: ShapeVAE,
        scheduler: FlowMatchingScheduler,
        image_encoder: PreTrainedModel | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        slim_vae: ShapeVAE | None = None,
        condition_size: int = 512,
        octree_resolution: int = 256,
        decoder: str = "flash",
        head: str = "base",
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        takes_views: bool = True,
        max_guidance_scale: float | None = None,
    ) -> None:
        super().__init__()
        width, latent = transformer.config["context_in_dim"], transformer.config["in_channels"]
        if latent != vae.config["embed_dim"]:
            raise ValueError(f"ShapePipeline: the transformer makes latents of width {latent}, the VAE takes {vae.config['embed_dim']}.")
        if (text_encoder is None) != (tokenizer is None):
            raise ValueError("ShapePipeline: a text model has both text_encoder and tokenizer; one of them is missing.")
        for name, encoder in (("image_encoder", image_encoder), ("text_encoder", text_encoder)):
            if encoder is not None and encoder.config.hidden_size != width:
                given = f"{name} gives {encoder.config.hidden_size}"
                raise ValueError(f"ShapePipeline: the transformer takes conditions of width {width}, {given}.")
        if image_encoder is None and text_encoder is None:
            raise ValueError("ShapePipeline: give image_encoder, or text_encoder with tokenizer, or both.")
        self.check_decoding(vae, slim_vae, octree_resolution, decoder, head)
        encoders = {"image_encoder": image_encoder, "text_encoder": text_encoder, "tokenizer": tokenizer}
        self.register_modules(transformer=transformer, vae=vae, slim_vae=slim_vae, scheduler=scheduler, **encoders)
        self.register_to_config(
            condition_size=condition_size, octree_resolution=octree_resolution, decoder=decoder, head=head,
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, takes_views=takes_views,
            max_guidance_scale=max_guidance_scale,
        )  # fmt: skip

    @property
    def is_text_model(self) -> bool:
        """Whether prompts may be text."""
        return self.text_encoder is not None

    @torch.no_grad()
    def __call__(
        self,
        prompt: ShapePrompt | Sequence[ShapePrompt],
        *,
        views: Sequence[str | int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Seeds = None,
        samples_at_once: int | None = None,
        octree_resolution: int | None = None,
        decoder: str | None = None,
        decoder_options: dict[str, Any] | None = None,
        head: str | None = None,
        max_faces: int | None = None,
        keep_floaters: bool = False,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("sample",),
    ) -> ShapeOutput:
        """Make shapes.

        Args:
            prompt: text or picture, or a list of them, a shape each; with `views` a list of pictures of one object, or several such lists.
            views: which side each picture of an object shows: names of `VIEWS` or their numbers.
            num_inference_steps, guidance_scale: the pipeline's own if None.
            num_images_per_prompt: shapes per prompt.
            generator: int or `torch.Generator` that draws one seed per shape, or a list of seeds, one per shape.
            samples_at_once: shapes that the transformer evaluates together; None: one on a CPU, all elsewhere.
            octree_resolution: cells of the grid a side; the pipeline's own if None.
            decoder: "dense", "hierarchical" or "flash"; the pipeline's own if None.
            decoder_options: of its constructor, `num_chunks` say.
            head: "base" or "slim"; the pipeline's own if None.
            max_faces: budget of each mesh; None for as many as come.
            keep_floaters: keep connected parts with less than half a percent of the faces.
            callback_on_step_end: called as callback(pipe, step, timestep, fields) after each step.
            callback_on_step_end_tensor_inputs: fields of the step's state that the callback gets.

        Returns:
            Meshes in the order of the prompts, those of one prompt together, with latents, fields and seeds.

        Raises:
            ValueError: for what does not fit together, before any work is done; where no surface is found.
        """
        self.check_callback_inputs(callback_on_step_end_tensor_inputs)
        extraction = self.extraction(octree_resolution, decoder, decoder_options, max_faces, keep_floaters, head)
        steps = self.config["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        states = self.iterate(
            prompt, views=views, num_inference_steps=steps, guidance_scale=guidance_scale, num_images_per_prompt=num_images_per_prompt,
            generator=generator, samples_at_once=samples_at_once,
        )  # fmt: skip
        last = self.drain(states, steps, callback_on_step_end, callback_on_step_end_tensor_inputs)
        latents = last.sample.to(self.vae.dtype) / self.vae.config["scale_factor"]
        found = [self.to_shape(latents[i : i + 1], extraction) for i in range(len(latents))]
        self.maybe_free_model_hooks()
        return ShapeOutput(meshes=[mesh for mesh, _ in found], latents=latents, fields=[grid for _, grid in found], seeds=last.seeds)

    def iterate(
        self,
        prompt: ShapePrompt | Sequence[ShapePrompt],
        *,
        views: Sequence[str | int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Seeds = None,
        samples_at_once: int | None = None,
    ) -> Generator[ShapeStepState, None, None]:
        """Run the loop step by step, without gradients; arguments as in a call.

        Yields:
            The state after each step. The loop goes on from its `sample`; `close()` cancels.

        Raises:
            ValueError: for what does not fit together.
        """
        steps = self.config["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        scale = self.config["guidance_scale"] if guidance_scale is None else guidance_scale
        check_sampling(steps, num_images_per_prompt, scale)
        most = self.config["max_guidance_scale"]
        if most is not None and scale > most:
            raise ValueError(f"this model is guidance-distilled and has learned scales up to {most:g}, got guidance_scale={scale:g}.")
        with torch.no_grad():
            contexts = [tokens for tokens in self.encode_prompt(prompt, views) for _ in range(num_images_per_prompt)]
        seeds = resolve_seeds(generator, len(contexts))
        return self.run(contexts, seeds, steps, scale, samples_at_once_or_default(samples_at_once, self._execution_device))

    @torch.no_grad()
    def run(
        self, contexts: Sequence[Tensor], seeds: list[int], steps: int, guidance_scale: float, at_once: int
    ) -> Generator[ShapeStepState, None, None]:
        """Start the loop on condition tokens.

        Args:
            contexts: [1, m, w] of every shape.
            seeds: of every shape.
            steps: of the scheduler.
            guidance_scale: 1 = off.
            at_once: shapes that are evaluated together.
        """
        scheduler: FlowMatchingScheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps)
        groups = equal_runs([tokens.shape[1] for tokens in contexts], at_once)
        flows, start = [], 0
        for count in groups:
            context = torch.cat(list(contexts[start : start + count])).to(self.transformer.dtype)
            flows.append(ShapeFlow.of(self.transformer, scheduler, context, guidance_scale))
            start += count
        return self._loop(ShapeRun(flows, scheduler, groups), seeds)

    @torch.no_grad()
    def _loop(self, run: ShapeRun, seeds: list[int]) -> Generator[ShapeStepState, None, None]:
        """Yield after each step."""
        config = self.vae.config
        sample = SampleStreams(seeds).normal(config["num_latents"], config["embed_dim"]).to(self._execution_device)
        scheduler = run.scheduler
        for index, timestep in enumerate(scheduler.timesteps):
            predicted = sample
            if scheduler.interval(index):
                parts = sample.to(self.transformer.dtype).split(run.groups)
                velocity = torch.cat([flow.velocity(part, index) for flow, part in zip(run.flows, parts, strict=True)])
                step = scheduler.step(velocity, index, sample)
                sample, predicted = step.prev_sample, step.pred_original_sample
            state = ShapeStepState(index, len(scheduler.timesteps), float(timestep), sample, seeds, predicted, run)
            yield state
            sample = state.sample

    def encode_prompt(self, prompt: ShapePrompt | Sequence[ShapePrompt], views: Sequence[str | int] | None = None) -> list[Tensor]:
        """Return condition tokens [1, m, w] of every prompt; arguments as in a call.

        Raises:
            TypeError: for prompts of other types. ValueError: for prompts that the model has no encoder for, or that show nothing.
        """
        if views is not None and not self.config["takes_views"]:
            raise ValueError(
                f"this model takes one picture of an object, got views={list(views)}; leave views out, or use a model of views."
            )
        prompts = as_shape_prompts(prompt, views)
        found = []
        for item in prompts:
            if isinstance(item, str):
                found.append(self._text_tokens(item))
                continue
            if self.image_encoder is None:
                raise ValueError("ShapePipeline: this model takes text, not pictures.")
            if isinstance(item, Image.Image):
                found.append(encode_pictures(self._cut_out(item), self.image_encoder))
            else:
                numbers = [view if isinstance(view, int) else VIEWS.index(choose(view, VIEWS, "view")) for view in views or ()]
                images = torch.cat([self._cut_out(part) for part in item])
                found.append(encode_views(images[None], numbers, self.image_encoder))
        return found

    def _text_tokens(self, text: str) -> Tensor:
        """Return the real tokens [1, m, w] of a text."""
        if self.text_encoder is None:
            raise ValueError(f"ShapePipeline: this model takes pictures, not text, got {text!r:.60}.")
        encoded = encode_text([text], self.tokenizer, self.text_encoder)
        return encoded.tokens[:, encoded.mask[0]]

    def _cut_out(self, image: Image.Image) -> Tensor:
        """Return an object [1, 3, s, s] in [-1, 1] on white."""
        picture, _ = recentred(object_rgba(image), BORDER)
        return to_condition(picture, self.config["condition_size"]).to(self._execution_device)

    def estimate_memory(
        self, num_images: int = 1, *, octree_resolution: int | None = None, samples_at_once: int | None = None
    ) -> MemoryEstimate:
        """Estimate the peak memory of a call before it runs.

        Args:
            num_images: shapes.
            octree_resolution, samples_at_once: as in a call.
        """
        config = self.transformer.config
        tokens = self.vae.config["num_latents"] + 1 + (self.config["condition_size"] // 14) ** 2
        at_once = min(num_images, samples_at_once_or_default(samples_at_once, self._execution_device))
        size = next(self.transformer.parameters()).element_size()
        sampling = at_once * tokens * config["hidden_size"] * (8 + 2 * config["mlp_ratio"]) * size
        return MemoryEstimate(self.weight_bytes(), sampling=int(sampling), decoding=self.decoding_bytes(octree_resolution))


def as_shape_prompts(prompt: ShapePrompt | Sequence[ShapePrompt], views: Sequence[str | int] | None) -> list[Any]:
    """Return prompts one by one: texts, pictures, or lists of views.

    Raises:
        TypeError: for other types. ValueError: for none, or views whose number differs from the pictures'.
    """
    if views is not None:
        listed = list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, str) else [prompt]
        objects: list[Any] = [listed] if listed and all(isinstance(item, Image.Image) for item in listed) else listed
        for item in objects:
            if not isinstance(item, Sequence) or isinstance(item, str) or not all(isinstance(part, Image.Image) for part in item):
                raise TypeError(f"with views={list(views)} a prompt is a list of pictures of one object, or a list of such lists.")
            if len(item) != len(views):
                raise ValueError(f"views={list(views)} name {len(views)} pictures of an object, got {len(item)}.")
        found = objects
    else:
        found = [prompt] if isinstance(prompt, str | Image.Image) else list(prompt)
        wrong = next((item for item in found if not isinstance(item, str | Image.Image)), None)
        if wrong is not None:
            hint = "; for several views of one object give views=" if isinstance(wrong, Sequence) else ""
            raise TypeError(f"a prompt is text or a PIL picture, got {type(wrong).__name__}{hint}.")
    if not found:
        raise ValueError("the prompt is empty; give text or a picture.")
    return found


def equal_runs(lengths: Sequence[int], most: int) -> list[int]:
    """Return how many neighbours of equal length go together, at most so many.

    Example:
        >>> equal_runs([3, 3, 3, 5, 3], 2)
        [2, 1, 1, 1]
    """
    groups: list[int] = []
    for i, length in enumerate(lengths):
        if i and length == lengths[i - 1] and groups[-1] < most:
            groups[-1] += 1
        else:
            groups.append(1)
    return groups
