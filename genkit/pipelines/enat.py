"""ENATPipeline: text, class names or class ids to pictures with a masked-token generator.

Rethinking Spatial-temporal Interactions in Token-based Image Synthesis (NeurIPS 2024, arXiv 2411.06959), sampled exactly and fast:

- the conditional and the unconditional branch run as one batch, and the unconditional one not at all where guidance is off
- step 0 depends on the prompt only: it runs once per distinct prompt
- what depends on the prompt alone is computed once per call, logits for masked tokens only, token counts are known in advance
- every sample draws from its own stream; on a CPU every sample is evaluated by itself, so that its bits do not depend on the batch
- part of a picture can be repainted: visible tokens stay, the schedule counts the masked ones

Legend: b samples, n tokens, k masked tokens, K codes, m text tokens, s step of T.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genkit.blocks.nested import Width, check_width
from genkit.checks import choose
from genkit.conditioners.text import EncodedText, encode_text
from genkit.generators.enat import ENATCondition, ENATTransformer2DModel
from genkit.generators.nat import SIZES, STRATEGIES, NATTransformer2DModel
from genkit.pipelines.base import Callback, GenPipeline, samples_at_once_or_default
from genkit.pipelines.enat_loop import ENATRun, ENATStepState, check_grid, chunks, loop, pair, state_tokens
from genkit.pipelines.outputs import OUTPUT_TYPES, ImageOutput, MemoryEstimate, to_output_type
from genkit.pipelines.prompts import (
    Picture,
    Prompt,
    as_prompts,
    picture_tensor,
    repaint_mask,
    resolve_prompts,
)
from genkit.pipelines.seeds import Seeds, resolve_seeds
from genkit.schedulers.masked_token import MaskedTokenScheduler
from genkit.tokenizers.vq_model import VQModel

DECODE_AT_ONCE = 16


class ENATPipeline(GenPipeline):
    """Pictures from text, class names or class ids.

    Args:
        transformer: the generator; a class model or a text model.
        vqvae: turns its tokens into pixels.
        scheduler: masked-token schedule.
        text_encoder: for a text model, such as `CLIPTextModelWithProjection`.
        tokenizer: of the text encoder.
        id2label: class names by id, for a class model.
        num_inference_steps: used when a call gives none.
        guidance_scale: used when a call gives none; 1 = off.

    Raises:
        ValueError: if the components do not fit together.

    Example:
        >>> tower = {"dim": 16, "depth": 1, "heads": 1, "mlp_dim": 16, "dim_head": 16}
        >>> codes = {"name": "simvq", "codebook_size": 8, "dim": 4}
        >>> pipe = ENATPipeline(
        ...     ENATTransformer2DModel(
        ...         sample_size=4, hidden_size=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, codebook_size=8, num_classes=2
        ...     ).eval(),
        ...     ViTVQModel(
        ...         patch_size=4, encoder_config=tower, decoder_config=tower, quantizer_config=codes
        ...     ).eval(),
        ...     MaskedTokenScheduler(mask_token_id=8),
        ...     id2label={0: "chest", 1: "table"},
        ... )
        >>> pipe.set_progress_bar_config(disable=True)
        >>> output = pipe("chest", num_inference_steps=2, generator=[1])
        >>> output.images[0].size, output.seeds
        ((16, 16), [1])
    """

    model_cpu_offload_seq = "text_encoder->transformer->vqvae"
    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["sample", "predicted", "masked_index", "revealed_index"]

    def __init__(
        self,
        transformer: ENATTransformer2DModel | NATTransformer2DModel,
        vqvae: VQModel,
        scheduler: MaskedTokenScheduler,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        id2label: dict[Any, str] | None = None,
        num_inference_steps: int = 8,
        guidance_scale: float = 3.5,
    ) -> None:
        super().__init__()
        codes = {
            "transformer.config.codebook_size": transformer.config["codebook_size"],
            "vqvae.quantizer.codebook_size": vqvae.quantizer.codebook_size,
            "scheduler.config.mask_token_id": scheduler.config["mask_token_id"],
        }
        if len(set(codes.values())) > 1:
            raise ValueError(f"ENATPipeline: generator, tokenizer and scheduler must have the same number of codes, got {codes}.")
        self.is_text_model = transformer.config["text_dim"] is not None
        if self.is_text_model and (text_encoder is None or tokenizer is None):
            raise ValueError("ENATPipeline: this generator takes text; give its text_encoder and tokenizer.")
        self.register_modules(transformer=transformer, vqvae=vqvae, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)
        labels = {str(key): label for key, label in id2label.items()} if id2label else None
        self.register_to_config(id2label=labels, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)

    @classmethod
    def complete(cls, components: dict[str, Any]) -> dict[str, Any]:
        """Add the published schedule to an official generator."""
        transformer = components.get("transformer")
        if transformer is not None and components.get("scheduler") is None:
            components["scheduler"] = published_schedule(transformer)
        return components

    @property
    def image_size(self) -> tuple[int, int]:
        """(h, w) of the pictures."""
        (rows, columns), patch = self.transformer.grid, self.vqvae.patch
        return rows * patch[0], columns * patch[1]

    @property
    def class_names(self) -> list[str]:
        """Names that prompts of a class model may use."""
        return list((self.config["id2label"] or {}).values())

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Seeds = None,
        token_temperature: float | None = None,
        mask_temperature: float | None = None,
        image: Picture | None = None,
        mask_image: Picture | None = None,
        init_tokens: Tensor | None = None,
        width: Width | Sequence[Width] = None,
        samples_at_once: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("sample",),
    ) -> ImageOutput | tuple[Any, ...]:
        """Make pictures.

        Args:
            prompt: text, class name or class id, or a list of them. A text model takes class ids where it has class names.
            num_inference_steps: T; the pipeline's own if None.
            guidance_scale: 1 = off; the scheduler says how it grows over the steps. The pipeline's own if None.
            num_images_per_prompt: pictures per prompt.
            generator: int or `torch.Generator` that draws one seed per picture, or a list of seeds, one per picture.
            token_temperature: temperature of the code draw before step 0, instead of the scheduler's.
            mask_temperature: strength of the confidence noise before step 0, instead of the scheduler's.
            image: picture to repaint, one for all or [b, 3, h, w].
            mask_image: white = repaint; needs `image`. Every picture must have equally many tokens to repaint.
            init_tokens: [n], [h, w], [b, n] or [b, h, w] tokens to start from, the mask id where they are to be predicted.
            width: nested width of a generator that has some (NAT with a stack of `mlp(nested=...)`): one for all steps, or a list with one
                for each step, itself a number or one for each block.
            samples_at_once: samples that the networks evaluate together. None: one on a CPU, where a sample's bits then do not depend on
                its batch; all elsewhere. 1 makes that so on any device, and takes the least memory.
            output_type: 'pil', 'np' ([b, h, w, 3] in [0, 1]) or 'pt' ([b, 3, h, w] in [-1, 1]).
            return_dict: False returns a tuple (images, seeds, tokens).
            callback_on_step_end: called as callback(pipe, step, timestep, fields) after each step; may return {"sample": grid}.
            callback_on_step_end_tensor_inputs: fields of the step's state that the callback gets.

        Returns:
            Pictures in the order of the prompts, those of one prompt together, with their seeds and tokens.

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
            token_temperature=token_temperature,
            mask_temperature=mask_temperature,
            image=image,
            mask_image=mask_image,
            init_tokens=init_tokens,
            width=width,
            samples_at_once=samples_at_once,
        )
        steps = self._num_steps(num_inference_steps)
        last = self.drain(states, steps, callback_on_step_end, callback_on_step_end_tensor_inputs)
        tokens = state_tokens(last, self.transformer.mask_token_id)
        images = to_output_type(self.decode(tokens, last.run.at_once), output_type)
        self.maybe_free_model_hooks()
        output = ImageOutput(images=images, seeds=last.seeds, tokens=tokens.view(-1, *self.transformer.grid))
        return output if return_dict else output.to_tuple()

    def iterate(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        *,
        state: ENATStepState | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Seeds = None,
        token_temperature: float | None = None,
        mask_temperature: float | None = None,
        image: Picture | None = None,
        mask_image: Picture | None = None,
        init_tokens: Tensor | None = None,
        width: Width | Sequence[Width] = None,
        samples_at_once: int | None = None,
    ) -> Generator[ENATStepState, None, None]:
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
            given = (
                prompt,
                num_inference_steps,
                guidance_scale,
                generator,
                token_temperature,
                mask_temperature,
                image,
                mask_image,
                init_tokens,
                width,
            )
            if any(item is not None for item in given):
                raise ValueError("iterate(state=...) goes on with the settings of the saved loop; leave prompt and other arguments out.")
            if state.index + 1 >= state.num_steps:
                raise ValueError(f"iterate(state=...): the state is after the last of {state.num_steps} steps; nothing is left to do.")
            return loop(state.run, state.seeds, state)
        if prompt is None:
            raise ValueError("iterate needs a prompt, or state=... of an earlier loop.")
        scheduler, factors = self._schedule(num_inference_steps, guidance_scale, token_temperature, mask_temperature)
        prompts = as_prompts(prompt)
        keys = resolve_prompts(prompts, self.config["id2label"], None if self.is_text_model else self.transformer.config["num_classes"])
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}.")
        at_once = samples_at_once_or_default(samples_at_once, self._execution_device)
        repeated = [key for key in keys for _ in range(num_images_per_prompt)]
        seeds = resolve_seeds(generator, len(repeated))
        start = self._start_tokens(len(repeated), image, mask_image, init_tokens)
        distinct = list(dict.fromkeys(repeated))
        with torch.no_grad():
            cond, null = self.prepare_conditions(distinct, at_once)
        prompt_of = [distinct.index(key) for key in repeated]
        pictures = {row: index for index, row in enumerate(dict.fromkeys(map(tuple, start.tolist())))}
        picture_of = [pictures[tuple(row)] for row in start.tolist()]
        widths = self._widths(width, len(factors))
        init = start.to(self._execution_device)
        run = ENATRun(self.transformer, scheduler, factors, cond, null, prompt_of, init, picture_of, at_once, widths, [])
        run.pairs.extend(pair(run, rows) for rows in run.groups())
        return loop(run, seeds, None)

    def preview(self, state: ENATStepState, output_type: str = "pil") -> Any:
        """Decode a running loop: masked tokens show their most probable code.

        Args:
            state: what `iterate` yielded.
            output_type: as in a call.

        Returns:
            The pictures.
        """
        with torch.no_grad():
            return to_output_type(self.decode(state_tokens(state, self.transformer.mask_token_id), state.run.at_once), output_type)

    def prepare_conditions(self, prompts: Sequence[Prompt], at_once: int) -> tuple[ENATCondition, ENATCondition]:
        """Compute what depends on the prompts alone.

        Args:
            prompts: p distinct class ids, or texts.
            at_once: prompts that are encoded together.

        Returns:
            Condition of p rows, and the empty condition of one row.
        """
        prepare = self.transformer.prepare_condition
        if not self.is_text_model:
            labels = torch.tensor([*prompts, self.transformer.null_class], device=self._execution_device)
            parts = [prepare(labels[rows]) for rows in chunks(range(len(prompts)), at_once)]
            return ENATCondition.cat(parts), prepare(labels[-1:])
        parts = []
        for rows in [*chunks(range(len(prompts)), at_once), None]:
            text = self.encode_prompt([""] if rows is None else [str(prompts[i]) for i in rows])
            dtype = self.transformer.dtype
            parts.append(prepare(text=text.tokens.to(dtype), text_mask=text.mask, pooled=text.pooled.to(dtype)))
        return ENATCondition.cat(parts[:-1]), parts[-1]

    def encode_prompt(self, texts: Sequence[str]) -> EncodedText:
        """Encode texts for a text model, padded to one length. Differentiable."""
        return encode_text(texts, self.tokenizer, self.text_encoder)

    def decode(self, tokens: Tensor, at_once: int = DECODE_AT_ONCE) -> Tensor:
        """Decode tokens [b, n] to pictures [b, 3, h, w], about [-1, 1], at most DECODE_AT_ONCE at a time. Differentiable in the weights."""
        grids = tokens.view(-1, *self.transformer.grid)
        parts = grids.split(min(at_once, DECODE_AT_ONCE))
        return torch.cat([self.vqvae.decode(part).sample for part in parts])

    def estimate_memory(self, num_images: int = 1, *, guidance: bool = True, samples_at_once: int | None = None) -> MemoryEstimate:
        """Estimate the peak memory of a call before it runs, from the sizes of the networks.

        Args:
            num_images: pictures in all.
            guidance: whether guidance is used.
            samples_at_once: as in a call.
        """
        net, config = self.transformer, self.transformer.config
        size, dim, branches = next(net.parameters()).element_size(), config["hidden_size"], 2 if guidance else 1
        blocks, is_plain = len(net.blocks), isinstance(net, NATTransformer2DModel)
        tokens = net.num_tokens + (min(self.tokenizer.model_max_length, 512) if self.is_text_model else 0)
        group = min(num_images, samples_at_once_or_default(samples_at_once, self._execution_device))
        rows = branches * group
        context = 0 if is_plain else 2 * blocks * dim * dim + blocks * min(rows * tokens, 2048) * dim  # projections, keys and values of all
        kept = branches * num_images * (tokens + 2 * 8 * blocks) * dim  # states before and after the step, modulation vectors
        inside = rows * tokens * dim * (3 + config["mlp_ratio"])
        logits = 4 * num_images * net.num_tokens * config["codebook_size"] * 5  # fp32: guided, and the draw
        height, width = self.image_size
        picture, per_picture = 3 * height * width, self.vqvae.decoding_numbers(height, width)
        chunk = min(num_images, samples_at_once_or_default(samples_at_once, self._execution_device), DECODE_AT_ONCE)
        return MemoryEstimate(
            weights=self.weight_bytes(),
            sampling=int(size * (context + kept + inside) + logits),
            decoding=int(4 * num_images * picture * 3 + next(self.vqvae.parameters()).element_size() * chunk * per_picture),
        )

    def _num_steps(self, num_inference_steps: int | None) -> int:
        if num_inference_steps is not None:
            return num_inference_steps
        return int(self.scheduler.listed_steps or self.config["num_inference_steps"])

    def _widths(self, width: Width | Sequence[Width], steps: int) -> list[Width]:
        """Return the width of each step, checked."""
        if width is None:
            return [None] * steps
        if not isinstance(self.transformer, NATTransformer2DModel):
            raise ValueError(f"width needs a generator with nested widths (NATTransformer2DModel), got {type(self.transformer).__name__}.")
        widths: list[Width] = [width] * steps if isinstance(width, (int, float)) else list(width)
        if len(widths) != steps:
            raise ValueError(f"width must be one number, or one for each of {steps} steps, got {len(widths)}.")
        for value in widths:
            check_width(value, cast(Sequence[Any], self.transformer.blocks), type(self.transformer).__name__)
        return widths

    def _schedule(
        self, num_inference_steps: int | None, guidance_scale: float | None, token_temperature: float | None, mask_temperature: float | None
    ) -> tuple[MaskedTokenScheduler, list[float]]:
        """Return a scheduler for one loop, and the guidance factor of each step."""
        steps = self._num_steps(num_inference_steps)
        if not isinstance(steps, int) or isinstance(steps, bool):
            raise TypeError(f"num_inference_steps must be an int, got {steps!r}.")
        scheduler = copy.copy(self.scheduler)
        scheduler.set_timesteps(steps, token_temperature=token_temperature, mask_temperature=mask_temperature)
        if guidance_scale is None and scheduler.config["guidance"] != "lists":
            guidance_scale = self.config["guidance_scale"]
        if guidance_scale is not None and not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number of at least 1 (1 = off), got {guidance_scale}.")
        return scheduler, [scheduler.guidance_at(s, guidance_scale) for s in range(steps)]

    def _start_tokens(self, count: int, image: Picture | None, mask_image: Picture | None, init_tokens: Tensor | None) -> Tensor:
        """Return the grid [b, n] before step 0."""
        n, mask_id = self.transformer.num_tokens, self.transformer.mask_token_id
        if (image is None) != (mask_image is None):
            raise ValueError("repainting needs both image and mask_image (white = repaint); one of them is missing.")
        if image is not None and init_tokens is not None:
            raise ValueError("give either image and mask_image, or init_tokens, not both.")
        if image is not None and mask_image is not None:
            picture = picture_tensor(image, self.image_size)
            hidden = repaint_mask(mask_image, self.image_size, self.transformer.grid)
            weight = next(self.vqvae.parameters())
            with torch.no_grad():
                parts = [self.vqvae.encode(part).indices for part in picture.to(weight.device, weight.dtype).split(1)]
            start = torch.where(hidden, mask_id, torch.cat(parts).flatten(1).cpu())
        elif init_tokens is not None:
            start = init_tokens.cpu().reshape(-1, n) if init_tokens.numel() and init_tokens.numel() % n == 0 else init_tokens
        else:
            start = torch.full((1, n), mask_id)
        check_grid(start, n, mask_id)
        if len(start) not in (1, count):
            raise ValueError(f"one start picture, or one per sample: expected 1 or {count}, got {len(start)}.")
        return start.expand(count, n).contiguous()


def published_schedule(transformer: ENATTransformer2DModel | NATTransformer2DModel) -> MaskedTokenScheduler:
    """Return the schedule that an official generator was published with: ENAT's rule, or AutoNAT's searched strategy for its size."""
    codes = transformer.config["codebook_size"]
    if isinstance(transformer, NATTransformer2DModel):
        for name, strategy in STRATEGIES.items():
            if all(transformer.config[key] == value for key, value in SIZES[name].items()):
                return MaskedTokenScheduler.from_strategy(strategy, codes)
    return MaskedTokenScheduler(mask_token_id=codes)
