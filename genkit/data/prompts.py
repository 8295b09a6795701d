"""Prompts people type, built from what a data set of assets knows: names, packs, colours and the camera.

"chest gold" of the pack Dungeon-Remastered-1.0, seen from azimuth 90, becomes "a golden chest", "treasure chest in a dungeon", "a picture
of a gold chest seen from the right". The word tables are in `genkit.data.words`; the noun is never dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from genkit.data import words as tables
from genkit.data.colours import COLOURS, colour_shares, face_areas, picture_colours

if TYPE_CHECKING:
    from genkit.data.views import ViewDataset

T = TypeVar("T")

# Probabilities of one draw. Everything but the noun can be missing in what people type.
KEEP_ADJECTIVE, KEEP_ADDITION = 0.8, 0.75
CANONICAL = 0.5  # else any of the forms
COLOUR, MATERIAL, SETTING_BEHIND, SETTING_BEFORE, VIEW = 0.3, 0.35, 0.15, 0.08, 0.25
DOMINANT, SECOND = 0.3, 0.25  # least share of the surface for a colour to be named
SETTING_RANK = 3.5


@dataclass(frozen=True)
class Phrase:
    """A parsed name.

    Attributes:
        heads: noun phrases that mean the thing, canonical first.
        adjectives: (rank, forms) each.
        nouns: words in front of the noun that no table knows, kept as compounds ("dirt floor").
        additions: phrases behind the noun.
        verbatim: the caption was a sentence already ("a red chair"); only frames and views are added.
    """

    heads: tuple[str, ...]
    adjectives: tuple[tuple[float, tuple[str, ...]], ...] = ()
    nouns: tuple[str, ...] = ()
    additions: tuple[str, ...] = ()
    verbatim: bool = False


def longest_match(tokens: Sequence[str], table: Iterable[str] | Mapping[str, object], start: int = 0) -> int:
    """Return how many tokens from `start` on form the longest key of a table, 0 if none does."""
    known = table if isinstance(table, (dict, frozenset)) else set(table)
    return next((n for n in range(min(5, len(tokens) - start), 0, -1) if " ".join(tokens[start : start + n]) in known), 0)


def parse(caption: str) -> Phrase:
    """Parse an asset's name in the order noun, modifiers ("table medium long decorated").

    Args:
        caption: lower-case words; a caption that starts with an article is taken as it is.

    Raises:
        ValueError: if the caption is empty.
    """
    words = caption.lower().split()
    if not words:
        raise ValueError("a caption is empty; every object needs at least a noun to build prompts from.")
    if words[0] in ("a", "an", "the"):
        return Phrase((" ".join(words[1:]) or words[0],), verbatim=True)
    tokens = [part for word in words for part in tables.GLUED.get(word, word).split()]
    start = 0
    while len(tokens) - start > 1 and (skip := longest_match(tokens, tables.LEADING, start)) and skip < len(tokens) - start:
        if longest_match(tokens, tables.HEADS, start) > skip:
            break
        start += skip
    adjectives: list[tuple[float, tuple[str, ...]]] = []
    while len(tokens) - start > 1 and not longest_match(tokens, tables.HEADS, start) and tokens[start] in tables.ADJECTIVES:
        adjectives.append(tables.ADJECTIVES[tokens[start]])
        start += 1
    count = max(longest_match(tokens, tables.HEADS, start), longest_match(tokens, frozenset(tables.GLUED.values()), start), 1)
    noun = " ".join(tokens[start : start + count])
    heads = tables.HEADS.get(noun, (noun,))
    return _modifiers(tokens[start + count :], heads, adjectives)


def _modifiers(tokens: list[str], heads: tuple[str, ...], adjectives: list[tuple[float, tuple[str, ...]]]) -> Phrase:
    """Sort the words behind the noun into adjectives, tails, contents, additions and unknown words."""
    nouns: list[str] = []
    additions: list[str] = []
    tails: list[str] = []
    place = 0
    while place < len(tokens):
        addition = longest_match(tokens, tables.AFTER, place)
        adjective = longest_match(tokens, tables.ADJECTIVES, place)
        count = max(addition, adjective, 1)
        text = " ".join(tokens[place : place + count])
        if adjective and adjective >= addition:
            adjectives.append(tables.ADJECTIVES[text])
        elif text in tables.TAILS:
            tails.append(text)
        elif heads[0] in tables.CONTAINERS:
            additions.append(f"of {text}")
        elif addition:
            additions.append(tables.AFTER[text])
        else:
            nouns.insert(0, text)
        place += count
    if tails:
        heads = tuple(f"{head} {' '.join(tails)}" for head in heads if " of " not in head and " with " not in head) or heads
    return Phrase(heads, tuple(adjectives), tuple(nouns), tuple(additions))


def with_article(text: str, head: str) -> str:
    """Put "a" or "an" in front of a noun phrase unless its noun is plural or has no article."""
    noun = re.split(r" (?:of|with|for) ", head)[0].split()[-1]
    is_plural = noun.endswith("s") and not noun.endswith(("ss", "us")) and noun not in tables.SINGULAR_S
    if is_plural or noun in tables.UNCOUNTABLE:
        return text
    vowel = text[0] in "aeiou" and not re.match(r"(?:uni|use|one|eu)", text)
    return f"{'an' if vowel else 'a'} {text}"


def compose(head: str, before: Iterable[tuple[float, str]], nouns: Sequence[str], behind: Sequence[str]) -> str:
    """Put a noun phrase together: adjectives by rank, compounds, noun, "of ...", then "with ... and ..."."""
    adjectives = [text for _, text in sorted(before, key=lambda item: item[0])]
    contents = [text for text in behind if text.startswith("of ")]
    having = [text.removeprefix("with ") for text in behind if text.startswith("with ")]
    others = [text for text in behind if not text.startswith(("of ", "with "))]
    joined = [f"with {' and '.join(having)}"] if having else []
    return " ".join([*adjectives, *nouns, head, *contents, *joined, *others])


def settings_of(pack: str) -> tuple[tuple[str, ...], str]:
    """Return the setting phrases and the word in front for a pack's name; nothing if no table entry fits."""
    lowered = pack.lower()
    return next((found for key, found in tables.SETTINGS.items() if key in lowered), ((), ""))


def view_phrases(azimuth: float) -> tuple[str, ...]:
    """Return phrases for a camera azimuth in degrees; the four sides reach 22.5 degrees around them, the corners take the rest."""
    side = round(azimuth / 90)
    if abs(azimuth - 90 * side) <= 22.5 + 1e-6:
        return tables.VIEWS[2 * side % 8]
    return tables.VIEWS[(2 * int(azimuth // 90) + 1) % 8]


class Draws:
    """Uniform numbers of one prompt, all drawn at once, so that a generator moves on by the same amount whatever is built."""

    def __init__(self, rng: torch.Generator | int) -> None:
        generator = torch.Generator().manual_seed(rng) if isinstance(rng, int) else rng
        self._values: Iterator[float] = iter(torch.rand(64, generator=generator, dtype=torch.float64).tolist())

    def chance(self, probability: float) -> bool:
        """Return True with a probability."""
        return next(self._values) < probability

    def pick(self, choices: Sequence[T]) -> T:
        """Return one of the choices, all equally likely."""
        return choices[int(next(self._values) * len(choices))]

    def weighted(self, choices: Sequence[tuple[str, float]]) -> str:
        """Return one of (choice, weight), with probabilities in proportion to the weights."""
        left = next(self._values) * sum(weight for _, weight in choices)
        for choice, weight in choices:
            left -= weight
            if left < 0:
                return choice
        return choices[-1][0]

    def form(self, forms: Sequence[str]) -> str:
        """Return the first form with probability `CANONICAL`, else any."""
        first, other = self.chance(CANONICAL), self.pick(forms)
        return forms[0] if first else other


@dataclass
class PromptBuilder:
    """Build prompts for the objects of a data set.

    Args:
        captions: name of each object, noun first; captions that start with an article are kept as they are.
        packs: pack of each object, the setting; "" where unknown.
        colours: returns an object's colour shares by name (largest first); None if colours are unknown.
        num_views: views around an object, in equal steps of azimuth from the front towards the viewer's right.

    Example:
        >>> builder = PromptBuilder(["table medium long", "chest gold"], ["Dungeon-Remastered-1.0"] * 2)
        >>> builder.plain(0)
        'a medium-sized long table'
        >>> builder.build(1, None, 3) == builder.build(1, None, 3)
        True
    """

    captions: Sequence[str]
    packs: Sequence[str]
    colours: Callable[[int], Mapping[str, float]] | None = None
    num_views: int = 16
    phrases: tuple[Phrase, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.captions) != len(self.packs):
            raise ValueError(
                f"PromptBuilder: captions and packs must have one entry per object, got {len(self.captions)} and {len(self.packs)}."
            )
        self.phrases = tuple(parse(caption) for caption in self.captions)

    @classmethod
    def from_views(cls, data: ViewDataset) -> PromptBuilder:
        """Build for a `ViewDataset`; colours come from the faces where the data has them, else from the pictures."""
        return cls(data.captions, data.packs, ObjectColours(data), len(data.views_of(0)))

    def plain(self, object_index: int) -> str:
        """Return the canonical prompt: everything the name says in natural order, without setting, colour or view."""
        phrase = self.phrases[object_index]
        before = [(rank, forms[0]) for rank, forms in phrase.adjectives]
        return with_article(compose(phrase.heads[0], before, phrase.nouns, phrase.additions), phrase.heads[0])

    def build(self, object_index: int, view: int | None, rng: torch.Generator | int) -> str:
        """Draw a prompt.

        Args:
            object_index: which object.
            view: which of its views, 0..num_views - 1, may be told; None to say nothing about the camera.
            rng: generator (moves on by 64 numbers) or seed.

        Returns:
            Lower-case text that contains the object's noun or a synonym of it.
        """
        draws = Draws(rng)
        phrase = self.phrases[object_index]
        head = draws.form(phrase.heads)
        before = [(rank, draws.form(forms)) for rank, forms in phrase.adjectives if draws.chance(KEEP_ADJECTIVE)]
        behind = [text for text in phrase.additions if draws.chance(KEEP_ADDITION)]
        if not phrase.verbatim:
            before += self._look(object_index, head, {int(rank) for rank, _ in phrase.adjectives}, draws)
            places, front = settings_of(self.packs[object_index])
            if places and draws.chance(SETTING_BEHIND):
                behind.append(draws.pick(places))
            elif front and draws.chance(SETTING_BEFORE) and front not in head:
                before.append((SETTING_RANK, front))
        text = compose(head, before, phrase.nouns, behind)
        if view is not None and draws.chance(VIEW):
            shown = draws.pick(view_phrases(360.0 * view / self.num_views))
            text += f", {shown}" if shown.endswith("view") else f" {shown}"
        return draws.weighted(tables.TEMPLATES).format(a=with_article(text, head), bare=text)

    def _look(self, object_index: int, head: str, ranks: set[int], draws: Draws) -> list[tuple[float, str]]:
        """Return the material or colours as adjectives, unless the name says them."""
        material_drawn, colour_drawn, second_drawn = draws.chance(MATERIAL), draws.chance(COLOUR), draws.chance(0.5)
        if self.colours is None or ranks & {3, 4} or not (material_drawn or colour_drawn):
            return []
        shares = self.colours(object_index)
        named = [name for name, share in shares.items() if share >= SECOND]
        if not named or shares[named[0]] < DOMINANT:
            return []
        if material_drawn:
            for material, (seen, nouns, ruled_out) in tables.MATERIALS.items():
                said = set(head.split())
                if named[0] in seen and nouns & said and not ruled_out & said:
                    return [(4.0, material)]
        if not colour_drawn or named[0] in head:
            return []
        both = len(named) > 1 and second_drawn
        return [(3.0, f"{named[0]} and {named[1]}" if both else named[0])]

    def all_words(self) -> list[str]:
        """Return every word that a prompt of these objects can contain, sorted."""
        texts: list[str] = ["a an with and", *COLOURS, *tables.MATERIALS]
        for phrase in self.phrases:
            texts += [*phrase.heads, *phrase.nouns, *phrase.additions, *(form for _, forms in phrase.adjectives for form in forms)]
        for pack in set(self.packs):
            places, front = settings_of(pack)
            texts += [*places, front]
        texts += [text for forms in tables.VIEWS for text in forms]
        texts += [re.sub(r"\{\w+\}", " ", text) for text, _ in tables.TEMPLATES]
        return sorted({word for text in texts for word in text.replace(",", " ").split()})


class ObjectColours:
    """Colour shares of the objects of a `ViewDataset`, computed when first asked for.

    Faces weighted by area where the data has `vertices`, `faces` and `face_colors`; else the pixels of the views that are not white.
    """

    def __init__(self, data: ViewDataset) -> None:
        columns = ("vertices", "faces", "face_colors")
        self._data = data
        self._meshes = data.rows.select_columns(list(columns)) if set(columns) <= set(data.rows.column_names) else None
        self._shares: dict[int, dict[str, float]] = {}

    def __call__(self, object_index: int) -> dict[str, float]:
        if object_index not in self._shares:
            self._shares[object_index] = self._measure(object_index)
        return self._shares[object_index]

    def _measure(self, object_index: int) -> dict[str, float]:
        if self._meshes is None:
            views = self._data.views_of(object_index)
            return picture_colours(self._data.images_u8[views.start : views.stop])
        mesh = self._meshes[object_index]
        areas = face_areas(np.asarray(mesh["vertices"], dtype=np.float64), np.asarray(mesh["faces"], dtype=np.int64))
        return colour_shares(np.asarray(mesh["face_colors"], dtype=np.uint8).reshape(-1, 3), areas)
