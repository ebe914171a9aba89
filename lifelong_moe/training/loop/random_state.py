"""Random numbers of training processes: restored after an interruption, and apart for each rank.

Noise, jitter and dropout draw from the generators of the CPU and of the process's device. A step checkpoint holds both
for every rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

RANK_SEED = 1_000_003
"""Distance between the seeds of two ranks, so that no two draw the same noise."""

RandomState = dict[str, Tensor]
"""States of one rank's generators by kind of device, uint8 tensors."""


def seed_rank(seed: int, rank: int) -> None:
    """Seed all generators of this process."""
    torch.manual_seed(seed + RANK_SEED * rank)


def random_states(device: torch.device) -> list[RandomState]:
    """The states of all ranks' generators, by rank; the same list on each rank.

    Args:
        device: Of this rank.
    """
    own = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(device)
    if not dist.is_initialized():
        return [own]
    gathered = {kind: [torch.empty_like(state) for _ in range(dist.get_world_size())] for kind, state in own.items()}
    for kind, state in own.items():
        dist.all_gather(gathered[kind], state)
    return [dict(zip(gathered, states, strict=True)) for states in zip(*gathered.values(), strict=True)]


def restore_random_state(states: list[RandomState], device: torch.device, seed: int) -> None:
    """Set this rank's generators.

    Args:
        states: From :func:`random_states`.
        device: Of this rank.
        seed: For generators without a state, of a further rank or another kind of device.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    # First everything from the seed, then what is known. Another number of ranks is harmless to what a key promises:
    # where ranks draw numbers, their number is in the stage's key.
    seed_rank(seed, rank)
    own = states[rank] if rank < len(states) else {}
    if "cpu" in own:
        torch.set_rng_state(own["cpu"])
    if device.type == "cuda" and "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], device)
