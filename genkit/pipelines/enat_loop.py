"""The sampling loop of ENAT: its settings, its state after a step, and the step.

Legend: b samples, n tokens, k masked tokens, K codes, s step of T.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from genkit.blocks.nested import Width
from genkit.generators.enat import ENATCondition, ENATState, ENATTransformer2DModel
from genkit.generators.enat_index import positions_where
from genkit.generators.nat import NATTransformer2DModel
from genkit.pipelines.outputs import StepState
from genkit.pipelines.seeds import SampleStreams, gumbel
from genkit.schedulers.masked_token import MaskedTokenScheduler, guide


@dataclass(frozen=True)
class ENATRun:
    """What stays the same during one loop.

    Args:
        transformer: the generator.
        scheduler: a copy with the number of steps and temperatures of this loop.
        guidance: factor of each step, 1 = off.
        cond: conditions of the distinct prompts.
        null: the empty condition, one row.
        prompt_of: which distinct prompt each sample has.
        init: [b, n] grid before step 0.
        picture_of: which distinct start grid each sample has.
        at_once: samples that are evaluated together.
        widths: nested width of the generator at each step, None for the full one.
        pairs: per group of samples, their conditions, followed by as many null ones where guidance is used.
    """

    transformer: ENATTransformer2DModel | NATTransformer2DModel = field(repr=False)
    scheduler: MaskedTokenScheduler
    guidance: list[float]
    cond: ENATCondition
    null: ENATCondition
    prompt_of: list[int]
    init: Tensor
    picture_of: list[int]
    at_once: int
    widths: list[Width]
    pairs: list[ENATCondition] = field(repr=False)

    @property
    def is_guided(self) -> bool:
        """Whether any step needs the unconditional branch."""
        return any(factor != 1 for factor in self.guidance)

    @property
    def is_text_model(self) -> bool:
        """Whether the condition has text tokens."""
        return self.cond.tokens is not None

    def width_at(self, step: int) -> dict[str, Any]:
        """Return the arguments of the generator that say its width at a step."""
        return {} if self.widths[step] is None else {"width": self.widths[step]}

    def groups(self) -> list[list[int]]:
        """Return the samples that are evaluated together."""
        return chunks(range(len(self.prompt_of)), self.at_once)


@dataclass
class ENATStepState(StepState):
    """The loop after a step; `sample` is the grid [b, n] int64 with the mask id at masked tokens. Change it, and the loop follows.

    Args:
        predicted: [b, n], the grid with the most probable code at each masked token.
        masked_index: [b, k] positions still masked.
        revealed_index: [b, v] positions filled in this step.
        num_masked: masked tokens before step 0, what the schedule counts from.
        features: what the network keeps, per group of samples; None makes it start anew.
        run: the settings of the loop.
    """

    predicted: Tensor
    masked_index: Tensor
    revealed_index: Tensor
    num_masked: int
    features: list[ENATState | None] = field(repr=False)
    run: ENATRun = field(repr=False)

    def __post_init__(self) -> None:
        self._handed = self.sample.clone()
        self._mark = (self.sample, _version(self.sample))

    def clone(self) -> ENATStepState:
        """Return a copy to go on from later with `iterate(state=...)`."""
        twin = replace(self, sample=self._handed)
        twin.sample = self.sample.clone()
        return twin

    def is_edited(self) -> bool:
        """Tell whether `sample` was changed since the step. Waits for the device only if it was touched."""
        tensor, version = self._mark
        if self.sample is tensor and version is not None and version == _version(tensor):
            return False
        return self.sample.shape != self._handed.shape or not torch.equal(self.sample, self._handed)


def check_grid(grid: Tensor, num_tokens: int, mask_token_id: int) -> int:
    """Return how many tokens of each row are masked, after checking a grid [b, n] that came from outside."""
    if grid.ndim != 2 or grid.shape[1] != num_tokens or grid.is_floating_point():
        raise ValueError(f"tokens must be int64 [b, {num_tokens}], got {grid.dtype} {list(grid.shape)}.")
    low, high = int(grid.min()), int(grid.max())
    if low < 0 or high > mask_token_id:
        raise ValueError(f"tokens must lie in 0 .. {mask_token_id} ({mask_token_id} = masked), got {low} .. {high}.")
    counts = (grid == mask_token_id).sum(1).tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"all samples must have the same number of masked tokens, got {counts}; run samples with other masks in a call of their own."
        )
    return int(counts[0])


def pair(run: ENATRun, rows: list[int]) -> ENATCondition:
    """Return the conditions of some samples, followed by as many null ones where guidance is used."""
    cond = run.cond.rows(torch.tensor([run.prompt_of[i] for i in rows], device=run.init.device))
    if not run.is_guided:
        return cond
    return ENATCondition.cat([cond, run.null.rows(torch.zeros(len(rows), dtype=torch.int64, device=run.init.device))])


def loop(run: ENATRun, seeds: list[int], state: ENATStepState | None) -> Generator[ENATStepState, None, None]:
    """Yield the state after each step, starting after `state` or from the beginning."""
    streams, num_steps = SampleStreams(seeds), len(run.guidance)
    for _ in range(0 if state is None else state.index + 1):
        streams.uniform(2, run.transformer.num_tokens)
    if state is None:
        count = check_grid(run.init, run.transformer.num_tokens, run.transformer.mask_token_id)
        state = _state(run, seeds, run.init, positions_where(run.init == run.transformer.mask_token_id, count), count)
    else:
        state = state.clone()
    while state.index + 1 < num_steps:
        if state.is_edited():
            state = _follow_edit(state)
        with torch.no_grad():
            state = _step(state, streams.uniform(2, run.transformer.num_tokens))
        yield state


def _state(run: ENATRun, seeds: list[int], sample: Tensor, masked_index: Tensor, num_masked: int) -> ENATStepState:
    """Return the state before the first step."""
    return ENATStepState(
        -1, len(run.guidance), -1, sample, seeds, sample, masked_index, masked_index[:, :0], num_masked, [None] * len(run.groups()), run
    )


def _follow_edit(state: ENATStepState) -> ENATStepState:
    """Return a state that goes on from a changed grid: masks are counted again, and the network starts anew from what is visible."""
    sample = state.sample.to(state.run.init.device)
    mask_token_id = state.run.transformer.mask_token_id
    if sample.shape != state.run.init.shape:
        raise ValueError(f"state.sample must stay {list(state.run.init.shape)}, got {list(sample.shape)}.")
    count = check_grid(sample, state.run.transformer.num_tokens, mask_token_id)
    num_masked, index = max(state.num_masked, count), state.index + 1
    while num_masked > 0 and state.run.scheduler.masked_counts(num_masked)[index] > count:
        num_masked -= 1  # a person filled tokens: the schedule counts from fewer
    masked_index = positions_where(sample == mask_token_id, count)
    return replace(state, sample=sample, masked_index=masked_index, num_masked=num_masked, features=[None] * len(state.features))


def _step(state: ENATStepState, uniforms: Tensor) -> ENATStepState:
    """Return the state after the next step.

    Args:
        state: before it.
        uniforms: [b, 2, n] on the CPU: draws for the codes and for the confidences, at all positions.
    """
    run, s, masked = state.run, state.index + 1, state.masked_index
    if masked.shape[1] == 0:
        return replace(state, index=s, timestep=s, revealed_index=masked)
    if s == 0:
        logits, features = _first_logits(state)
    else:
        logits, features = _logits(state)
    device = state.sample.device
    codes, noise = uniforms[:, 0].to(device), gumbel(uniforms[:, 1]).to(device)
    result = run.scheduler.step(
        logits,
        s,
        state.sample,
        masked,
        token_uniforms=codes.gather(1, masked),
        confidence_gumbel=noise.gather(1, masked),
        num_masked=state.num_masked,
    )
    likely = state.sample.scatter(1, masked, logits.argmax(-1))
    return ENATStepState(
        index=s,
        num_steps=state.num_steps,
        timestep=s,
        sample=result.ids,
        seeds=state.seeds,
        predicted=torch.where(result.ids == run.transformer.mask_token_id, likely, result.ids),
        masked_index=result.masked_index,
        revealed_index=result.revealed_index,
        num_masked=state.num_masked,
        features=features,
        run=run,
    )


def _logits(state: ENATStepState) -> tuple[Tensor, list[ENATState | None]]:
    """Evaluate both branches of every sample, a group at a time.

    Returns:
        Guided logits [b, k, K], and the features of each group.
    """
    run, parts, features = state.run, [], []
    factor, branches = run.guidance[state.index + 1], 2 if run.is_guided else 1
    for rows, condition, feature in zip(run.groups(), run.pairs, state.features, strict=True):
        new = None if feature is None else state.revealed_index[rows].repeat(branches, 1)
        output = run.transformer(
            state.sample[rows].repeat(branches, 1),
            condition,
            feature,
            masked_index=state.masked_index[rows].repeat(branches, 1),
            new_index=new,
            logits_at="masked",
            **run.width_at(state.index + 1),
        )
        both = output.logits.chunk(branches)
        parts.append(guide(both[0], both[-1], factor))
        features.append(output.state)
    return torch.cat(parts), features


def _first_logits(state: ENATStepState) -> tuple[Tensor, list[ENATState | None]]:
    """Evaluate step 0, once per distinct prompt and start grid, and the null branch only as far as something needs it.

    Returns:
        Guided logits [b, k, K], and the features of each group.
    """
    run, factor = state.run, state.run.guidance[0]
    keys = list(zip(run.prompt_of, run.picture_of, strict=True))
    logits, cond_state = _distinct(state, keys, run.cond, run.prompt_of, "masked")
    all_masked = state.masked_index.shape[1] == run.transformer.num_tokens
    if all_masked and not run.is_text_model and factor == 1:
        return logits.float(), [None] * len(run.groups())  # nothing was visible, so there is nothing to keep
    if not run.is_guided:
        return logits.float(), [cond_state.rows(torch.tensor(rows, device=logits.device)) for rows in run.groups()]
    nobody = [0] * len(keys)
    null_logits, null_state = _distinct(state, list(run.picture_of), run.null, nobody, "none" if factor == 1 else "masked")
    guided = logits.float() if factor == 1 else guide(logits, null_logits, factor)
    index = [torch.tensor(rows, device=logits.device) for rows in run.groups()]
    return guided, [ENATState.cat([cond_state.rows(rows), null_state.rows(rows)]) for rows in index]


def _distinct(
    state: ENATStepState, keys: Sequence[Any], conditions: ENATCondition, condition_of: list[int], logits_at: str
) -> tuple[Tensor, ENATState]:
    """Evaluate one sample per distinct key without features.

    Returns:
        Logits [b, k, K] and features of all samples; the logits are empty for logits_at='none'.
    """
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    chosen = sorted(first.values())
    place = {keys[i]: position for position, i in enumerate(chosen)}
    outputs = [
        state.run.transformer(
            state.sample[rows],
            conditions.rows(torch.tensor([condition_of[i] for i in rows], device=state.sample.device)),
            masked_index=state.masked_index[rows],
            logits_at=logits_at,
            **state.run.width_at(0),
        )
        for rows in (chosen[start : start + state.run.at_once] for start in range(0, len(chosen), state.run.at_once))
    ]
    back = torch.tensor([place[key] for key in keys], device=state.sample.device)
    logits = state.sample.new_empty(0) if logits_at == "none" else torch.cat([output.logits for output in outputs])[back]
    return logits, ENATState.cat([output.state for output in outputs]).rows(back)


def chunks(items: range, size: int) -> list[list[int]]:
    """Return consecutive numbers in lists of at most `size`."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def state_tokens(state: ENATStepState, mask_token_id: int) -> Tensor:
    """Return the grid [b, n] of a state without masks: its own tokens, and the most probable codes where it has none."""
    return torch.where(state.sample == mask_token_id, state.predicted.clamp(max=mask_token_id - 1), state.sample)


def _version(tensor: Tensor) -> int | None:
    """Return a tensor's count of in-place changes, or None where torch keeps none."""
    return None if tensor.is_inference() else tensor._version
