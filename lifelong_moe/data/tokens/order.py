"""Decide the order of samples: a pure function of (sizes, weights, replay fraction, seed, sample number).

Nothing is carried from step to step, so a run resumes at any step, and neither data workers nor the number of
processes change what is seen.
"""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np


class MixtureTurns:
    """Whose turn it is in a mixture: after any number of turns, no source is a whole turn ahead of its share or behind.

    The ``j``-th turn of a source with share ``s``, counted from 0, lies in the slots from ``floor(j / s)`` up to
    ``ceil((j + 1) / s)``, and of the sources that may have a slot, the one whose time ends first has it. Shares of
    whole rounds are exact.

    Source:
        Pfair scheduling on one processor (Baruah et al., Proportionate progress, Algorithmica 15, 1996), where the
        earliest deadline first meets all deadlines.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        """Fix the shares.

        Args:
            weights: Positive; a round has as many turns as their sum.

        Raises:
            ValueError: No weights, or one that is not positive.
        """
        if not weights or min(weights) < 1:
            raise ValueError(f"weights={list(weights)} must be positive")
        self._weights = tuple(weights)
        self._round = sum(weights)
        # Made as far as it was asked for, since a round may be longer than any stage.
        self._sources, self._earlier = array("i"), array("q")
        self._ready: list[tuple[int, int]] = []
        """Sources that may have the next slot, with the end of their time for it."""
        self._later = [(0, source) for source in range(len(weights))]
        """The other sources, with the slot from which on they may have one; those of slot 0 are in order."""
        self._taken = [0] * len(weights)

    def at(self, n: int) -> tuple[int, int]:
        """Return the source of turn ``n``, counted from 0, and how many turns it has had before."""
        rounds, turn = divmod(n, self._round)
        while len(self._sources) <= turn:
            self._next()
        source = self._sources[turn]
        return source, rounds * self._weights[source] + self._earlier[turn]

    def _next(self) -> None:
        """Give away one more slot."""
        slot = len(self._sources)
        while self._later and self._later[0][0] <= slot:
            source = heapq.heappop(self._later)[1]
            # Rounded up.
            heapq.heappush(self._ready, (-(-(self._taken[source] + 1) * self._round // self._weights[source]), source))
        source = heapq.heappop(self._ready)[1]
        self._sources.append(source)
        self._earlier.append(self._taken[source])
        self._taken[source] += 1
        heapq.heappush(self._later, (self._taken[source] * self._round // self._weights[source], source))


class SampleOrder:
    """Order of a stage's samples: new text, with replayed text spread evenly through it."""

    def __init__(
        self,
        blocks: Sequence[int],
        replay_fraction: float,
        seed: int,
        replay_weights: Sequence[int] | None = None,
        new_weights: Sequence[int] = (1,),
    ) -> None:
        """Fix the order.

        Args:
            blocks: Blocks of each source. The first ones are the new text, the others are replayed.
            replay_fraction: Share of samples that are replayed, 0 to 1; read as the decimal number that it prints as.
            seed: Not negative.
            replay_weights: How often each replayed source has its turn in a round; once each by default.
            new_weights: Shares of the sources of new text, one each, in proportion; see :class:`MixtureTurns`.

        Raises:
            ValueError: An empty source, a share outside 0 to 1, weights that do not fit, or a share above 0 with
                nothing to replay.
        """
        if not blocks or min(blocks) < 1:
            raise ValueError(f"every source needs at least one block; got {list(blocks)}")
        if not 0 <= replay_fraction <= 1:
            raise ValueError(f"replay_fraction={replay_fraction} must lie between 0 and 1")
        replayed = len(blocks) - len(new_weights)
        if replayed < 0:
            raise ValueError(f"new_weights={list(new_weights)} must hold a number for some of {len(blocks)} sources")
        if replay_fraction > 0 and not replayed:
            raise ValueError(f"replay_fraction={replay_fraction}, but there is no source to replay")
        self._blocks = tuple(int(size) for size in blocks)
        # Decimal, so that 0.05 means exactly one in twenty.
        self._replay = Fraction(str(replay_fraction))
        weights = [1] * replayed if replay_weights is None else list(replay_weights)
        if len(weights) != replayed or any(weight < 1 for weight in weights):
            raise ValueError(f"replay_weights={weights} must hold a positive number for each of {replayed} sources")
        self._new, self._mixture = len(new_weights), MixtureTurns(new_weights)
        self._round = _round(weights)
        self._turns = _earlier_turns(self._round)
        self._weights = weights
        self._seed = seed
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}

    def num_replayed(self, n: int) -> int:
        """Return how many of the first ``n`` samples are replayed."""
        # Integers, since a product of floats may be off by one.
        return n * self._replay.numerator // self._replay.denominator

    def at(self, n: int) -> tuple[int, int]:
        """Return (source, block) of sample ``n``, counted from 0 over the whole stage.

        Every source is gone through in a fresh permutation each epoch; replays go round the replayed sources.
        """
        source, index = self._turn(n)
        epoch, position = divmod(index, self._blocks[source])
        return source, int(self._permutation(source, epoch)[position])

    def place(self, n: int) -> tuple[bool, int]:
        """Return whether sample ``n`` is replayed, and how many samples of its kind come before it.

        A kind is all that is replayed, or a source of new text.
        """
        source, index = self._turn(n)
        return (True, self.num_replayed(n)) if source >= self._new else (False, index)

    def _turn(self, n: int) -> tuple[int, int]:
        """The source of sample ``n``, and how many samples of that source come before it."""
        if n < 0:
            raise ValueError(f"sample {n} does not exist")
        replayed = self.num_replayed(n)
        if self.num_replayed(n + 1) == replayed:
            return self._mixture.at(n - replayed)
        # Arithmetic in place of a stored position: any sample can be asked for without those before it.
        rounds, turn = divmod(replayed, len(self._round))
        source = self._round[turn]
        return self._new + source, rounds * self._weights[source] + self._turns[turn]

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        # One permutation per source is kept: samples come in order, so an older epoch is rarely asked for again.
        held = self._permutations.get(source)
        if held is None or held[0] != epoch:
            # PCG64 by name: NumPy may change its default generator, and the order must stay the same for a resume.
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, source, epoch])))
            held = (epoch, generator.permutation(self._blocks[source]))
            self._permutations[source] = held
        return held[1]


def _round(weights: Sequence[int]) -> list[int]:
    """A round of turns in which each index has as many as its weight, spread as evenly as it goes."""
    # Each index's turns lie in the middle of equal parts of the round; equal places go by index.
    turns = [((turn + 0.5) / weight, index) for index, weight in enumerate(weights) for turn in range(weight)]
    return [index for _, index in sorted(turns)]


def _earlier_turns(turns: Sequence[int]) -> list[int]:
    """For each turn, how many turns of the same index come before it."""
    seen: Counter[int] = Counter()
    earlier = []
    for index in turns:
        earlier.append(seen[index])
        seen[index] += 1
    return earlier


def batch_indices(step: int, micro: int, *, global_batch: int, accumulate: int, rank: int, world: int) -> range:
    """Return the sample numbers of one micro-batch on one process.

    The global batch of a step is samples ``step * global_batch`` and on; micro-batch after micro-batch, and within
    one rank after rank, they are dealt in contiguous slices. So a step sees the same samples however it is divided.

    Args:
        step: Optimizer step, from 0.
        micro: Micro-batch within the step, from 0.
        global_batch: Samples a step, over all processes and micro-batches.
        accumulate: Micro-batches a step.
        rank: This process, from 0.
        world: Processes.

    Raises:
        ValueError: ``global_batch`` is not divisible, or an index is out of range.
    """
    if min(global_batch, accumulate, world) < 1 or global_batch % (accumulate * world):
        raise ValueError(
            f"a global batch of {global_batch} samples cannot be divided among accumulate={accumulate} micro-batches "
            f"of world={world} processes"
        )
    if step < 0 or not 0 <= micro < accumulate or not 0 <= rank < world:
        raise ValueError(f"step={step}, micro={micro} of {accumulate}, rank={rank} of {world} is out of range")
    size = global_batch // (accumulate * world)
    # Micro-batch outside, rank inside: accumulation and processes share the same samples of a step.
    start = step * global_batch + (micro * world + rank) * size
    return range(start, start + size)


class StepBatchSampler:
    """Micro-batches of one process, as lists of sample numbers, from ``start_step`` to the end of the stage.

    The length is that of the whole stage even when it starts later: a progress bar and a schedule count from 0.
    """

    def __init__(
        self,
        num_steps: int,
        global_batch: int,
        accumulate: int = 1,
        start_step: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Fix the division; see ``batch_indices``.

        Raises:
            ValueError: ``global_batch`` is not divisible, or ``start_step`` lies beyond the stage.
        """
        if not 0 <= start_step <= num_steps:
            raise ValueError(f"start_step={start_step} lies outside the stage's {num_steps} steps")
        # Called for its checks: a wrong division fails here and not at the first step.
        batch_indices(0, 0, global_batch=global_batch, accumulate=accumulate, rank=rank, world=world)
        self.num_steps = num_steps
        self.global_batch = global_batch
        self.accumulate = accumulate
        self.start_step = start_step
        self.rank = rank
        self.world = world

    def __len__(self) -> int:
        return self.num_steps * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.num_steps):
            for micro in range(self.accumulate):
                yield list(
                    batch_indices(
                        step,
                        micro,
                        global_batch=self.global_batch,
                        accumulate=self.accumulate,
                        rank=self.rank,
                        world=self.world,
                    )
                )
