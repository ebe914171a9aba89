"""Random numbers of a training process: of its own generators, and the same ones after an interruption.

Noise, jitter and dropout come from the CPU's generator and from that of the process's device. A step checkpoint holds
both of every rank. If it is continued by more ranks, or on another kind of device, the generators that it does not know
begin anew, from the stage's seed, the step and the rank; of fewer ranks each goes on with its own. Where ranks draw
numbers, their number is in the stage's key, so nothing that another number of them goes on with depends on these.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

RANK_SEED = 1_000_003
"""Added to a seed once a rank, so that no two ranks draw the same noise."""

RandomState = dict[str, Tensor]
"""States of one rank's generators by kind of device, uint8."""


def seed_rank(seed: int, rank: int) -> None:
    """Seed all generators of this process."""
    torch.manual_seed(seed + RANK_SEED * rank)


def random_states(device: torch.device) -> list[RandomState]:
    """Where the generators of all ranks stand, by rank; the same on each.

    Args:
        device: That this rank trains on.
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
    """Go on with this rank's random numbers.

    Args:
        states: From :func:`random_states`.
        device: That this rank trains on.
        seed: Of generators that were not there then.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    seed_rank(seed, rank)
    own = states[rank] if rank < len(states) else {}
    if "cpu" in own:
        torch.set_rng_state(own["cpu"])
    if device.type == "cuda" and "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], device)
