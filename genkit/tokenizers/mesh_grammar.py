"""Which tokens may come next in a sequence that stands for a mesh, so that whatever is sampled decodes to one.

- structure: a strip has at least three whole vertices; breaks and the end stand between vertices only; nothing is left at a length limit
- order, true of all tokenized meshes: a face that starts a strip ascends, and is greater than the one that started the strip before
- distinct: no face without area, no face twice

Source: the legality rules follow from adjacent mesh tokenization (arXiv 2408.02555); the published code has none.
Letters: k ids of the model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from genkit.tokenizers.mesh_tokens import BOS, EOS, PAD, SPECIALS, AdjacentTokens, FaceTokens, TokenLayout

Vertex = int
"""A vertex (x, y, z) as one number, z bins^2 + y bins + x: its place in the canonical order."""


class MeshGrammar:
    """The state of one sequence.

    Args:
        layout: of the tokens.
        max_faces: the sequence has to end with so many; None for no limit.
        max_tokens: ids in all, bos and eos included; None for no limit.
        use_order: keep the order rule.
        use_distinct: keep the rule of distinct faces.

    Raises:
        ValueError: for limits that leave no room for one face.

    Attributes:
        faces: whole faces so far.
        length: ids so far.
        is_done: whether eos has come.

    Example:
        >>> grammar = MeshGrammar(AdjacentTokens())
        >>> grammar.forced() == BOS
        True
    """

    def __init__(
        self,
        layout: TokenLayout,
        max_faces: int | None = None,
        max_tokens: int | None = None,
        *,
        use_order: bool = True,
        use_distinct: bool = True,
    ) -> None:
        least = 11  # bos, three vertices, eos
        if (max_faces is not None and max_faces < 1) or (max_tokens is not None and max_tokens < least):
            raise ValueError(f"a mesh has at least 1 face and {least} tokens, got max_faces={max_faces}, max_tokens={max_tokens}.")
        self.layout, self.max_faces, self.max_tokens = layout, max_faces, max_tokens
        is_codes = isinstance(layout, FaceTokens) and layout.num_codes is not None
        self.has_strips = isinstance(layout, AdjacentTokens)
        self.use_order, self.use_distinct = use_order and not is_codes, use_distinct and not is_codes
        self.faces = self.length = 0
        self.is_done = False
        self._values = layout.num_tokens - self.has_strips  # of a coordinate
        self._top = self._values**3 - 1
        self._coordinates: list[int] = []
        self._strip: list[Vertex] = []
        self._start: tuple[Vertex, ...] | None = None  # the face that started the last strip
        self._thirds: dict[tuple[Vertex, Vertex], set[Vertex]] = {}

    @property
    def num_ids(self) -> int:
        """Ids of the model."""
        return SPECIALS + self.layout.num_tokens

    @property
    def break_id(self) -> int:
        """The id between strips."""
        return SPECIALS + self._values

    def legal(self) -> NDArray[np.bool_]:
        """Return which ids may come next, [k]; never none."""
        mask = np.zeros(self.num_ids, bool)
        if not self.length or self.is_done:
            mask[PAD if self.is_done else BOS] = True
            return mask
        left = 2**62 if self.max_tokens is None else self.max_tokens - self.length
        is_whole = len(self._strip) >= 3 if self.has_strips else bool(self.faces) and not self._strip
        if is_whole and not self._coordinates:
            mask[EOS] = True
            is_full = self.max_faces is not None and self.faces >= self.max_faces
            may_start = left >= 10 + self.has_strips and self._may_start()  # a break, three vertices, the end
            if is_full or left < 4 or not (self.has_strips or may_start):
                return mask
            mask[self.break_id : self.break_id + self.has_strips] = may_start
        mask[SPECIALS : SPECIALS + self._values] = self._legal_coordinates()
        return mask

    def forced(self) -> int | None:
        """Return the next id if only one is legal."""
        found = np.flatnonzero(self.legal())
        return int(found[0]) if len(found) == 1 else None

    def push(self, token: int) -> None:
        """Go on with an id.

        Raises:
            ValueError: if it is not legal.
        """
        if not 0 <= token < self.num_ids or not self.legal()[token]:
            state = f"{self.faces} faces, {len(self._strip)} vertices and {len(self._coordinates)} coordinates of a strip"
            raise ValueError(f"id {token} cannot stand at place {self.length}, after {state}.")
        self.advance(token)

    def advance(self, token: int) -> None:
        """Go on with an id that `legal` allowed."""
        if token == PAD and self.is_done:
            return
        self.length += 1
        if token < SPECIALS:
            self.is_done = token == EOS
        elif self.has_strips and token == self.break_id:
            self._strip = []
        else:
            self._coordinates.append(token - SPECIALS)
            if len(self._coordinates) == 3:
                self._add_vertex(self._number())

    # ---- vertices ----

    def _number(self) -> int:
        """Return the number that the coordinates so far make, the missing ones 0."""
        return sum(value * self._values**place for place, value in enumerate(self._coordinates))

    def _add_vertex(self, vertex: Vertex) -> None:
        """Append a vertex, and a face where it makes one."""
        self._coordinates = []
        self._strip.append(vertex)
        if len(self._strip) < 3:
            return
        self.faces += 1
        if self.use_distinct:
            a, b, c = self._strip[-3:]
            for u, v, third in ((a, b, c), (b, c, a), (a, c, b)):
                self._thirds.setdefault((min(u, v), max(u, v)), set()).add(third)
        if len(self._strip) == 3:
            self._start = tuple(self._strip)
        if not self.has_strips:
            self._strip = []

    def _legal_coordinates(self) -> NDArray[np.bool_]:
        """Return which values the next coordinate may have: those of some vertex within the bounds that is not forbidden.

        Where a strip has begun that no distinct face can complete, any face will do.
        """
        low, high = self._bounds()
        step = self._values ** len(self._coordinates)
        period = step * self._values
        numbers = self._number() + np.arange(self._values, dtype=np.int64) * step
        allowed = (high - numbers) // period - (low - numbers) // period  # numbers in (low, high] that begin with these coordinates
        if self.use_distinct and (forbidden := [vertex for vertex in set(self._forbidden()) if low < vertex <= high]):
            begins = np.asarray(forbidden) % period
            distinct = allowed - (begins[:, None] == numbers).sum(0)
            if (distinct > 0).any() or len(self._strip) > 2:
                return distinct > 0
        return allowed > 0

    def _bounds(self) -> tuple[int, int]:
        """Return the exclusive lower and the inclusive upper bound of the next vertex by the order rule."""
        count, top, start = len(self._strip), self._top, self._start
        if not self.use_order or count > 2:
            return -1, top
        if count == 0:
            if start is None:
                return -1, top - 2
            return start[0] - (start[1:] < (top - 1, top)), top - 2
        first = self._strip[0]
        if count == 1:
            if start is None or first != start[0]:
                return first, top - 1
            return start[1] - (start[2] < top), top - 1
        second = self._strip[1]
        return (second if start is None or (first, second) != start[:2] else max(second, start[2])), top

    def _may_start(self) -> bool:
        """Tell whether a further strip can start."""
        return not self.use_order or self._start is None or self._start < (self._top - 2, self._top - 1, self._top)

    def _forbidden(self) -> list[Vertex]:
        """Return the vertices that would make a face without area, or one that is there."""
        strip = self._strip[-2:]
        if len(strip) < 2:
            return strip
        return [*strip, *self._thirds.get((min(strip), max(strip)), ())]


def check_sequence(layout: TokenLayout, ids: Any, **rules: Any) -> str:
    """Return what is wrong with the ids [n] of a sequence from bos to eos by the rules of `MeshGrammar`, or ""."""
    grammar = MeshGrammar(layout, **rules)
    for token in np.asarray(ids, np.int64).reshape(-1):
        try:
            grammar.push(int(token))
        except ValueError as error:
            return str(error)
    return "" if grammar.is_done else f"the sequence has no end after {grammar.length} ids."
