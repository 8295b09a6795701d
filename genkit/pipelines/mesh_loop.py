"""The loop that writes meshes token by token: its settings, its state after a token, and the sampling rules.

Legend: b samples, t ids so far, m prefix tokens, d width, k ids of the model.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from genkit.blocks.caches import KVCache
from genkit.generators.mesh_stepper import MeshStepper
from genkit.generators.mesh_transformer import MeshCaches, MeshTransformer
from genkit.pipelines.outputs import StepState
from genkit.pipelines.seeds import SampleStreams
from genkit.pipelines.token_draws import DrawRule, inverse_cdf
from genkit.tokenizers.mesh_grammar import MeshGrammar
from genkit.tokenizers.mesh_tokens import EOS, PAD, FaceTokens

FIRST_CACHE = 1024  # places; doubled when full
UNIFORMS = 1024  # drawn at a time


@dataclass(frozen=True)
class TokenSampling(DrawRule):
    """How the next id is chosen.

    Args:
        temperature, top_k, top_p: see `DrawRule`.
        do_sample: draw it; else the most probable.
        face_target: faces to aim at; None for none.
        face_bias: added to the logit of the end per whole target beyond it, subtracted below it.

    Raises:
        ValueError: for values out of range.
    """

    top_k: int = 50
    top_p: float = 0.95
    do_sample: bool = False
    face_target: int | None = None
    face_bias: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.face_target is not None and self.face_target < 1) or not self.face_bias >= 0:
            raise ValueError(f"face_target and face_bias must be positive, got {self.face_target} and {self.face_bias}.")


class SequenceWriter:
    """Sequences of one length behind their prefixes, and the caches of what is evaluated.

    Args:
        transformer: the network.
        prefix: [b, m, d].

    Attributes:
        ids: [b, t] all ids.
        evaluations: calls of the network so far.
    """

    def __init__(self, transformer: MeshTransformer, prefix: Tensor) -> None:
        self.transformer, self.prefix, self.stepper = transformer, prefix, MeshStepper(transformer)
        self.ids = torch.zeros(len(prefix), 0, dtype=torch.long, device=prefix.device)
        self.most = int(transformer.config["num_points"]) + int(transformer.config["max_tokens"])
        self.cache: MeshCaches | None = None
        self.places = self.done = 0  # rows in the caches, ids that are in them
        self.evaluations = 0

    def push(self, ids: Tensor) -> None:
        """Append ids [b]."""
        self.ids = torch.cat([self.ids, ids[:, None]], dim=1)

    def keep(self, rows: list[int]) -> None:
        """Leave out all sequences but these."""
        index = torch.tensor(rows, device=self.ids.device)
        self.ids, self.prefix = self.ids[index], self.prefix[index]
        for cache in self._caches():
            cache.reorder(index)

    def logits(self) -> Tensor:
        """Return the logits [b, k] of the next id; evaluates the ids that were pushed since."""
        fresh = self.ids.shape[1] - self.done
        if self.cache is None or self.places + fresh > self.most:
            return self._restart()
        self._grow(self.places + fresh)
        slots = self.transformer.tokens.slots(self.ids)
        return self._evaluate(self.ids[:, -fresh:], slots[:, -fresh:], None)

    def _restart(self) -> Tensor:
        """Evaluate prefix and ids anew: all of them, or bos and the last half of what the positions hold.

        Beyond the trained length a sequence goes on from such a window, again and again.
        """
        t, m = self.ids.shape[1], self.prefix.shape[1]
        slots, columns = self.transformer.tokens.slots(self.ids), torch.arange(t, device=self.ids.device)
        if m + t > self.most:
            kept = (self.most - m) // 2
            if isinstance(self.transformer.tokens, FaceTokens):
                kept -= (kept - (t - 1)) % 9  # from the start of a face
            columns = torch.cat([columns[:1], columns[-kept:]])
        for cache in self._caches():
            cache.reset()
        if self.cache is None:
            self.cache = self.transformer.new_cache(len(self.ids), min(self.most, max(FIRST_CACHE, m + len(columns))))
        self.places = 0
        self._grow(m + len(columns))
        return self._evaluate(self.ids[:, columns], slots[:, columns], self.prefix)

    def _evaluate(self, ids: Tensor, slots: Tensor, prefix: Tensor | None) -> Tensor:
        if prefix is None and ids.shape[1] == 1 and self.cache is not None:
            found = self.stepper(ids, slots, self.places, self.cache)
        else:
            out = self.transformer(ids, prefix, slots=slots, start=self.places, cache=self.cache, last_only=True)
            found = out.logits[:, -1]
        self.places += ids.shape[1] + (0 if prefix is None else prefix.shape[1])
        self.done = self.ids.shape[1]
        self.evaluations += 1
        return found.float()

    def _grow(self, places: int) -> None:
        for cache in self._caches():
            if cache.max_len < places:
                cache.grow(min(self.most, max(2 * cache.max_len, places)))

    def _caches(self) -> list[KVCache]:
        return [cache for block in self.cache or () for cache in block if isinstance(cache, KVCache)]


@dataclass(frozen=True)
class MeshRun:
    """What stays the same during one loop.

    Args:
        transformer: the network.
        prefixes: [b, m, d] of all samples.
        sampling: how ids are chosen.
        limit: ids of a sequence, bos and eos included.
        max_faces: a sequence has to end with so many; None for no limit.
        use_grammar: only legal ids.
        at_once: samples that are evaluated together.
    """

    transformer: MeshTransformer = field(repr=False)
    prefixes: Tensor = field(repr=False)
    sampling: TokenSampling
    limit: int
    max_faces: int | None
    use_grammar: bool
    at_once: int

    def grammar(self) -> MeshGrammar | None:
        """Return the grammar of a sequence that begins."""
        if not self.use_grammar:
            return None
        return MeshGrammar(self.transformer.tokens, self.max_faces, self.limit)


@dataclass
class MeshStepState(StepState):
    """The loop after a token; `sample` [b, t] are the ids so far, pad behind an end.

    The last column may be changed, to ids that the grammar allows; the loop goes on from it.

    Args:
        is_done: of each sample.
        evaluations: calls of the network so far, of all samples.
        run: the settings of the loop.
    """

    is_done: list[bool]
    evaluations: int
    run: MeshRun = field(repr=False)

    def clone(self) -> MeshStepState:
        """Return a copy."""
        return replace(self, sample=self.sample.clone(), is_done=list(self.is_done))


class _Group:
    """Samples that are evaluated together."""

    def __init__(self, run: MeshRun, rows: list[int], seeds: Sequence[int], ids: Tensor) -> None:
        self.run, self.rows = run, rows
        self.streams = SampleStreams([seeds[row] for row in rows])
        self.uniforms = torch.zeros(len(rows), 0)
        self.grammars = [run.grammar() for _ in rows]
        self.places = list(range(len(rows)))  # of the rows in `streams` and `grammars`
        self.writer = SequenceWriter(run.transformer, run.prefixes[rows])
        for column in ids.T:
            if self.rows:
                self.push(column[self.rows])

    def push(self, ids: Tensor) -> None:
        """Go on with ids [r] of all rows of this group; rows that end leave it.

        Raises:
            ValueError: for an id that the grammar does not allow.
        """
        for row, token in zip(self.places, ids.tolist(), strict=True):
            grammar = self.grammars[row]
            if grammar is not None:
                grammar.push(token)
        self.writer.push(ids.to(self.writer.ids.device))
        left = [i for i, token in enumerate(ids.tolist()) if token != EOS]
        if len(left) < len(self.rows):
            self.rows = [self.rows[i] for i in left]
            self.places = [self.places[i] for i in left]
            if left:
                self.writer.keep(left)

    def choose(self, t: int) -> Tensor:
        """Return the next ids [r], the t-th of their sequences."""
        grammars = [self.grammars[place] for place in self.places]
        legal = np.stack([grammar.legal() for grammar in grammars if grammar is not None]) if self.run.use_grammar else None
        if legal is not None and (legal.sum(1) == 1).all():
            return torch.from_numpy(legal.argmax(1))
        logits, sampling = self.writer.logits().cpu(), self.run.sampling
        if sampling.face_target is not None:
            faces = torch.tensor([grammar.faces for grammar in grammars if grammar is not None])
            logits[:, EOS] += sampling.face_bias * (faces / sampling.face_target - 1)
        if legal is not None:
            logits = logits.masked_fill(torch.from_numpy(~legal), -torch.inf)
        if not sampling.do_sample:
            return logits.argmax(-1)
        while self.uniforms.shape[1] <= t:
            self.uniforms = torch.cat([self.uniforms, self.streams.uniform(UNIFORMS)], dim=1)
        return inverse_cdf(sampling.filtered(logits), self.uniforms[self.places, t])


@torch.no_grad()
def loop(run: MeshRun, seeds: list[int], state: MeshStepState | None = None) -> Generator[MeshStepState, None, None]:
    """Write sequences until all have ended or are as long as they may be.

    Args:
        run: the settings.
        seeds: of each sample.
        state: to go on from.

    Yields:
        The state after each id.
    """
    count = len(run.prefixes)
    buffer = torch.full((count, run.limit), PAD)
    ids = buffer[:, :0] if state is None else state.sample
    buffer[:, : ids.shape[1]] = ids
    groups = _groups(run, seeds, ids)
    for t in range(ids.shape[1], run.limit):
        active = [group for group in groups if group.rows]
        if not active:
            return
        for group in active:
            buffer[group.rows, t] = group.choose(t)
        evaluations = sum(group.writer.evaluations for group in groups)
        is_done = (buffer[:, : t + 1] == EOS).any(1).tolist()
        state = MeshStepState(t, run.limit, float(t), buffer[:, : t + 1], seeds, is_done, evaluations, run)
        yield state
        if state.sample.shape != (count, t + 1):
            raise ValueError(f"the loop's sample must stay [{count}, {t + 1}], got {list(state.sample.shape)}.")
        buffer[:, : t + 1] = state.sample
        for group in active:
            group.push(buffer[group.rows, t])


def _groups(run: MeshRun, seeds: Sequence[int], ids: Tensor) -> list[_Group]:
    """Return the groups of all samples after the ids [b, t]; those of a group go on together."""
    rows = list(range(len(run.prefixes)))
    size = max(1, min(run.at_once, len(rows)))
    return [_Group(run, rows[i : i + size], seeds, ids) for i in range(0, len(rows), size)]


def sequences(sample: Tensor) -> list[np.ndarray]:
    """Return the tokens of each sample [b, t] without first id (bos), special ids and shift."""
    found = []
    for row in sample.cpu().numpy():
        body = row[1:]
        ends = np.flatnonzero(body < 3)
        found.append((body[: ends[0]] if len(ends) else body) - 3)
    return found
