"""Prompts: natural word order, the noun is kept, draws depend on their seed only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from genkit.data import words
from genkit.data.colours import COLOURS, colour_shares, face_areas, name_colours
from genkit.data.prompts import PromptBuilder, parse, view_phrases, with_article
from genkit.data.views import ViewDataset
from tests.data.toy import strips, write_views

PLAIN = {
    "chest gold": "a golden chest",
    "table medium long": "a long medium-sized table",
    "table long tablecloth decorated": "a long decorated table with a tablecloth",
    "pictureframe large": "a large picture frame",
    "kitchencounter sink backsplash": "a kitchen counter with a sink and a backsplash",
    "floor wood large": "a large wooden floor",
    "pumpkin orange jackolantern": "a jack-o'-lantern",
    "car stationwagon": "a station wagon",
    "bucket water": "a bucket of water",
    "crate lid": "a crate lid",
    "crates stacked": "stacked crates",
    "building archeryrange": "an archery range",
    "building barracks": "a barracks",
    "hex river waterless": "a river hexagon tile without water",
    "food ingredient onion rings": "onion rings",
    "food ingredient lettuce chopped": "chopped lettuce",
    "fence pillar broken": "a broken fence pillar",
    "cargodepot": "a cargo depot",
    "primitive window": "a primitive window",
    "coin stack large": "a large stack of coins",
    "lamp glass": "a glass lamp",
    "wall archedwindow gated scaffold": "a wall with a barred arched window and scaffolding",
    "a red chair by the door": "a red chair by the door",
    "zeppelin": "a zeppelin",
}


@pytest.mark.parametrize(("caption", "prompt"), PLAIN.items())
def test_names_become_natural_phrases(caption: str, prompt: str) -> None:
    assert PromptBuilder([caption], [""]).plain(0) == prompt


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("umbrella", "an umbrella"),
        ("uniform", "a uniform"),
        ("trees", "trees"),
        ("glass", "a glass"),
        ("stew", "stew"),
        ("onion", "an onion"),
    ],
)
def test_articles_follow_sound_and_number(text: str, expected: str) -> None:
    assert with_article(text, text) == expected


def test_every_draw_keeps_the_noun_or_a_synonym() -> None:
    captions = [caption for caption in PLAIN if not caption.startswith("a ")]
    builder = PromptBuilder(captions, ["Dungeon-1.0"] * len(captions), lambda i: {"brown": 0.7, "grey": 0.3})
    for i, caption in enumerate(captions):
        heads = parse(caption).heads
        for seed in range(60):
            prompt = builder.build(i, seed % 16, seed)
            assert any(head in prompt for head in heads), (caption, prompt)


def test_a_draw_depends_on_its_seed_only() -> None:
    builder = PromptBuilder(["chest gold", "table medium long"], ["Dungeon-1.0", ""], lambda i: {"brown": 1.0})
    first = [builder.build(0, 3, seed) for seed in range(50)]
    assert first == [builder.build(0, 3, seed) for seed in range(50)]
    assert first == [builder.build(0, 3, torch.Generator().manual_seed(seed)) for seed in range(50)]
    assert len(set(first)) > 20
    used, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    builder.build(0, 3, used)
    builder.build(1, None, other)
    assert used.get_state().equal(other.get_state())


def test_words_are_dropped_and_added() -> None:
    builder = PromptBuilder(["table long decorated"], ["Dungeon-1.0"], lambda i: {"brown": 0.8, "blue": 0.2})
    drawn = [builder.build(0, 0, seed) for seed in range(400)]
    for word in ("long", "decorated", "wooden", "brown", "dungeon", "front"):
        share = sum(word in prompt for prompt in drawn) / len(drawn)
        assert 0.02 < share < 0.98, (word, share)
    assert not any("blue" in prompt for prompt in drawn)


def test_a_named_colour_or_material_is_not_contradicted() -> None:
    builder = PromptBuilder(["pumpkin orange", "floor wood"], ["", ""], lambda i: {"grey": 1.0})
    assert not any("grey" in builder.build(0, None, seed) for seed in range(200))
    assert not any("stone" in builder.build(1, None, seed) for seed in range(200))


def test_view_is_told_only_if_given() -> None:
    builder = PromptBuilder(["chair"], [""])
    phrases = [phrase for forms in words.VIEWS for phrase in forms]
    assert not any(phrase in builder.build(0, None, seed) for seed in range(200) for phrase in phrases)
    told = {builder.build(0, 8, seed) for seed in range(200)}
    assert any("behind" in prompt for prompt in told)
    assert not any("front" in prompt or "left" in prompt for prompt in told)


@pytest.mark.parametrize(("azimuth", "place"), [(0, 0), (22.5, 0), (45, 1), (67.5, 2), (90, 2), (180, 4), (270, 6), (315, 7), (337.5, 0)])
def test_azimuth_names_the_viewers_side(azimuth: float, place: int) -> None:
    assert view_phrases(azimuth) == words.VIEWS[place]


def test_all_words_covers_what_is_built() -> None:
    captions = [caption for caption in PLAIN if not caption.startswith("a ")]
    builder = PromptBuilder(captions, ["Halloween-1.0"] * len(captions), lambda i: {"grey": 0.6, "beige": 0.4})
    known = set(builder.all_words())
    for i in range(len(captions)):
        for seed in range(40):
            assert set(builder.build(i, seed % 16, seed).replace(",", "").split()) <= known
        assert set(builder.plain(i).split()) <= known


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        PromptBuilder([" "], [""])
    with pytest.raises(ValueError, match="2 and 1"):
        PromptBuilder(["a", "b"], [""])


@pytest.mark.parametrize(
    ("colour", "name"),
    [((154, 89, 68), "brown"), ((230, 120, 30), "orange"), ((0, 0, 0), "black"), ((255, 255, 255), "white"), ((122, 133, 138), "grey"),
     ((40, 90, 200), "blue"), ((200, 30, 40), "red"), ((60, 150, 60), "green"), ((250, 210, 60), "yellow"), ((220, 180, 140), "beige")],
)  # fmt: skip
def test_colours_have_their_everyday_names(colour: tuple[int, int, int], name: str) -> None:
    assert COLOURS[int(name_colours(np.array([colour], dtype=np.uint8))[0])] == name


def test_colour_shares_follow_the_area() -> None:
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [3, 0, 0]], dtype=np.float64)
    areas = face_areas(vertices, np.array([[0, 1, 2], [0, 3, 2]]))
    np.testing.assert_allclose(areas, [0.5, 1.5], rtol=1e-12)
    shares = colour_shares(np.array([[200, 30, 40], [40, 90, 200]], dtype=np.uint8), areas)
    assert shares == pytest.approx({"blue": 0.75, "red": 0.25})
    assert list(shares) == ["blue", "red"]


@pytest.mark.parametrize("with_mesh", [True, False])
def test_colours_come_from_faces_or_pictures(tmp_path: Path, with_mesh: bool) -> None:
    pictures = strips(1).copy()
    pictures[:] = (40, 90, 200)
    pictures[:, :, :8] = 255
    mesh = {"vertices": [[[0, 0, 0], [1, 0, 0], [0, 1, 0]]], "faces": [[[0, 1, 2]]], "face_colors": [[[200, 30, 40]]]} if with_mesh else {}
    data = ViewDataset(write_views(tmp_path / "train.parquet", list(pictures), **mesh), 8, cache=tmp_path)
    builder = PromptBuilder.from_views(data)
    assert builder.num_views == 4
    assert builder.colours is not None
    assert builder.colours(0) == {"red" if with_mesh else "blue": 1.0}
