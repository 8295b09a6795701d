"""What tasks on clips share: where clips come from, their prompts, strips of frames to look at."""

from __future__ import annotations

from torch import Tensor

from genkit.data.clips import ClipDataset, SpriteClips, TurntableClips, open_clips, read_sprites
from genkit.data.moving_sprites import MovingSprites
from genkit.data.prompts import PromptBuilder


def check_sources(data: str | None, sprites: str | None) -> None:
    """Refuse settings that name no source of clips, or two.

    Raises:
        ValueError: showing both.
    """
    if (data is None) == (sprites is None):
        raise ValueError(f"give data or sprites, one of them, got data={data!r} and sprites={sprites!r}.")


def training_clips(data: str | None, sprites: str | None, size: int, frames: int, stride: int, sequences: int, seed: int) -> ClipDataset:
    """Open clips, or set sprites in motion.

    Args:
        data: see `open_clips`; None for sprites.
        sprites: see `read_sprites`; None for data.
        size: side of the frames in pixels.
        frames: of a clip.
        stride: step between frames.
        sequences: number of sequences of sprites.
        seed: of the sprites' ways.
    """
    if sprites is not None:
        return SpriteClips(MovingSprites(read_sprites(sprites), frames, size, length=sequences, seed=seed))
    return open_clips(str(data), size, frames, stride)


def clip_prompts(data: ClipDataset, per_clip: int) -> list[tuple[str, ...]]:
    """Return prompts for every clip: of turntables the plain one and random ones that name no side, of others their caption.

    Raises:
        ValueError: if no clip has a caption.
    """
    if not any(data.captions):
        raise ValueError("these clips have no captions to learn text from; leave text_encoder and tokenizer out.")
    if not isinstance(data, TurntableClips):
        return [(caption,) for caption in data.captions]
    builder = PromptBuilder.from_views(data.views)
    return [
        (builder.plain(thing), *(builder.build(thing, None, thing * per_clip + k) for k in range(1, per_clip)))
        for thing in range(len(data))
    ]


def to_strips(clips: Tensor) -> Tensor:
    """Lay the frames of clips [m, f, c, h, w] side by side: [m, 3, h, f w]; grey becomes three channels."""
    return clips.expand(-1, -1, 3, -1, -1).permute(0, 2, 3, 1, 4).flatten(3)
