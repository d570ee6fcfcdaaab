"""Random numbers without a state: pure functions of (seed, epoch, index).

Each number comes from Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), whose counter is
(block, index, epoch, stream and lane) and whose key is the run's seed. The same index in the same epoch therefore draws the
same numbers in any number of workers, processes or restarts, and starting an epoch in its middle costs nothing.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint32]


class Stream(IntEnum):
    """What a random number is for; the value of a stream is never given to another one."""

    ORDER = 0
    FLIPS = 1
    CROPS = 2
    PATCH_SOURCE = 3
    CROP_COLOUR = 4
    PATCH_COLOUR = 5
    PATCHES = 6
    WORDS = 7
    CUTMIX = 8
    EPISODES = 9
    VOCABULARY = 10
    SIDES = 11
    REGIONS = 12


MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))


WEYL = (0x9E3779B9, 0xBB67AE85)


ROUNDS = 10


def philox4x32(counter: Words, key: Words) -> Words:
    """Return ten rounds of Philox 4x32 of every counter [N, 4] under one key [2]: random words [N, 4]."""
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = counter.astype(np.uint64).T
    k0, k1 = int(key[0]), int(key[1])
    for _ in range(ROUNDS):
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (second >> half) ^ c1 ^ np.uint64(k0), second & mask, (first >> half) ^ c3 ^ np.uint64(k1), first & mask
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def random_words(*, seed: int, epoch: int, indices: Ints, stream: Stream, count: int, lane: int = 0) -> Words:
    """Return `count` uniform 32-bit words for every index, [N, count], pure in (seed, epoch, index, stream, lane).

    Raises:
        ValueError: a number is too large for its place in the counter.
    """
    for name, value, bits in (("seed", seed, 64), ("epoch", epoch, 32), ("lane", lane, 24)):
        if not 0 <= value < 2**bits:
            raise ValueError(f"{name} {value} is not an unsigned {bits}-bit number")
    indices = np.asarray(indices, dtype=np.int64)
    blocks = -(-count // 4)
    counter = np.empty((len(indices), blocks, 4), dtype=np.uint32)
    counter[..., 0] = np.arange(blocks, dtype=np.uint32)
    counter[..., 1] = indices[:, None]
    counter[..., 2] = epoch
    counter[..., 3] = int(stream) | lane << 8
    key = np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32)
    return philox4x32(counter.reshape(-1, 4), key).reshape(len(indices), blocks * 4)[:, :count]


def uniforms(*, seed: int, epoch: int, indices: Ints, stream: Stream, count: int, lane: int = 0) -> Floats:
    """Return `count` uniform numbers in [0, 1) for every index, [N, count], pure in (seed, epoch, index, stream, lane).

    Args:
        seed: The run's seed, an unsigned 64-bit number.
        epoch: Epoch, or any other number that separates draws of one index.
        indices: Image indices, [N], below 2^32.
        stream: What the numbers are for.
        count: Numbers per index.
        lane: Separates draws of one stream, such as the views of one kind.
    """
    return (
        random_words(seed=seed, epoch=epoch, indices=indices, stream=stream, count=count, lane=lane).astype(np.float64) * 2.0**-32
    )


def epoch_order(num_images: int, *, seed: int, epoch: int) -> Ints:
    """Return the permutation of 0 .. num_images-1 in which an epoch visits its images.

    It sorts 64-bit random keys, one per position, so any version of numpy gives the same permutation.
    """
    words = random_words(seed=seed, epoch=epoch, indices=np.arange(num_images), stream=Stream.ORDER, count=2).astype(np.uint64)
    return np.argsort(words[:, 0] << np.uint64(32) | words[:, 1], kind="stable")
