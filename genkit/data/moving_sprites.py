"""Sprites that drift and bounce in a frame: Moving MNIST by its published protocol, from any digits or other sprites.

Two sprites of 28x28 start anywhere, move a tenth of the free range per frame in any direction, and bounce off the walls; where they meet
the brighter pixel shows. Sequence i is a function of (seed, i).

Source: Srivastava et al. 2015 (arXiv 1502.04681), as the benchmarks since SimVP run it.
Letters: k sprites, f frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass
class MovingSprites:
    """Sequences of moving sprites.

    Args:
        sprites: [k, s, s] uint8, bright on black.
        frames: f.
        size: side of the frames in pixels.
        count: sprites in a frame.
        speed: way per frame as a share of the free range.
        length: number of sequences.
        seed: decides all of them.

    Raises:
        ValueError: if the sprites do not fit into a frame.

    Example:
        >>> MovingSprites(np.full((3, 4, 4), 255, np.uint8), frames=5, size=8).sequence(0).shape
        (5, 8, 8)
    """

    sprites: NDArray[np.uint8]
    frames: int = 20
    size: int = 64
    count: int = 2
    speed: float = 0.1
    length: int = 1_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        shape = self.sprites.shape
        if self.sprites.ndim != 3 or self.sprites.dtype != np.uint8 or shape[1] != shape[2] or not 0 < shape[1] <= self.size:
            raise ValueError(f"sprites must be uint8 [k, s, s] with s at most size={self.size}, got {self.sprites.dtype} {list(shape)}.")
        if min(self.frames, self.count, self.length, shape[0]) < 1 or not self.speed > 0:
            got = f"frames={self.frames}, count={self.count}, length={self.length}, speed={self.speed}, {shape[0]} sprites"
            raise ValueError(f"MovingSprites: frames, count, length, speed and the number of sprites must be above 0, got {got}.")

    def __len__(self) -> int:
        return self.length

    def sequence(self, index: int) -> NDArray[np.uint8]:
        """Return sequence `index`, [f, size, size]."""
        rng = np.random.default_rng([self.seed, index])
        side, frames = self.sprites.shape[1], np.zeros((self.frames, self.size, self.size), np.uint8)
        for _ in range(self.count):
            sprite = self.sprites[rng.integers(len(self.sprites))]
            for frame, (row, column) in zip(frames, self.path(rng), strict=True):
                part = frame[row : row + side, column : column + side]
                np.maximum(part, sprite, out=part)
        return frames

    def path(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return the top left corners [f, 2] of a sprite: one step before each frame, clamped and turned around at the walls."""
        position, angle = rng.random(2), rng.random() * 2 * np.pi
        velocity = self.speed * np.array([np.sin(angle), np.cos(angle)])
        corners = []
        for _ in range(self.frames):
            position = position + velocity
            out = (position <= 0) | (position >= 1)
            position, velocity = position.clip(0, 1), np.where(out, -velocity, velocity)
            corners.append((position * (self.size - self.sprites.shape[1])).astype(np.int64))
        return np.array(corners)
