"""P12: prefill and cached greedy decoding over transformers' on the same weights, and what more experts cost.

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.performance.inference --rounds 5

In float32 on one thread, or in bfloat16 on a GPU. Transformers computes experts in one of several ways: each case is
held against its best. Time of the process includes making the cache, choosing tokens and giving them to the caller, on
both sides.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lifelong_moe.interop.checkpoint import to_checkpoint
from lifelong_moe.model.sampling import sample_batch
from lifelong_moe.model.transformer import LanguageModel
from tests.benchmarks.performance.clock import Ratio, ratio, timed
from tests.benchmarks.performance.subjects import DEVICE, DTYPE, REFERENCE, load_mixtral

PROMPT, NEW = 256, 64
EXPERTS, BATCHES = (4, 8, 32, 64), (1, 32)
IMPLEMENTATIONS = {1: ("eager", "grouped_mm", "batched_mm"), 32: ("eager", "grouped_mm")}
"""By batch: ``batched_mm`` copies a matrix for every row, which 32 prompts have no memory for."""
SIZE = replace(REFERENCE, context=PROMPT + NEW)
"""The reference, with room for what is decoded."""

Action = Callable[[], Any]


def build(experts: int) -> LanguageModel:
    """A random model that never ends its text."""
    model = replace(SIZE, experts=experts).model().eval().requires_grad_(False)
    model.head.weight[SIZE.architecture().bos_id] = 0
    return model.to(DEVICE, DTYPE)


def build_prompts(batch: int) -> list[list[int]]:
    """Random prompts, without the BOS that is put before them."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, SIZE.vocab, (batch, PROMPT - 1), generator=generator).tolist()


def ours(model: LanguageModel, batch: int, new: int) -> Action:
    """Our greedy continuation."""
    prompts = build_prompts(batch)
    return lambda: sample_batch(model, prompts, max_new_tokens=new, temperature=0)


def build_peer(model: LanguageModel) -> Any:
    """The same weights in transformers."""
    import transformers

    config, tensors = to_checkpoint(model)
    peer = transformers.MixtralForCausalLM._from_config(
        transformers.MixtralConfig(**config), experts_implementation="eager", attn_implementation="sdpa"
    )
    load_mixtral(peer, tensors)
    peer.generation_config.eos_token_id = None
    peer.generation_config.pad_token_id = 0
    return peer.eval().requires_grad_(False).to(DEVICE, DTYPE)


def theirs(peer: Any, implementation: str, batch: int, new: int) -> Action:
    """Transformers' greedy continuation."""
    ids = torch.tensor([[0, *prompt] for prompt in build_prompts(batch)], device=DEVICE)

    def action() -> list[list[int]]:
        peer.set_experts_implementation(implementation)
        found: Tensor = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        return found[:, PROMPT:].tolist()

    return action


def interleaved(arms: dict[str, Action], rounds: int) -> dict[str, list[float]]:
    """Seconds of each arm, all in turn; a first round is not counted."""
    for action in arms.values():
        action()
    found: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, action in arms.items():
            found[name].append(timed(action))
    return found


def differences(whole: list[float], part: list[float]) -> list[float]:
    """Decoding alone: everything less prefill with its first token."""
    return [a - b for a, b in zip(whole, part, strict=True)]


def against_peer(experts: int, batch: int, rounds: int) -> dict[str, Any]:
    """Throughput over transformers' best, of prefill, of decoding and of both."""
    model = build(experts)
    peer = build_peer(model)
    expected = {name: theirs(peer, name, batch, NEW)() for name in IMPLEMENTATIONS[batch]}
    same = {name: found == ours(model, batch, NEW)() for name, found in expected.items()}
    if DEVICE == "cpu" and not all(same.values()):
        raise RuntimeError(f"batch {batch}: both sides should choose the same tokens, but {same}")
    arms = {f"ours {new}": ours(model, batch, new) for new in (1, NEW)}
    arms |= {f"{name} {new}": theirs(peer, name, batch, new) for name in IMPLEMENTATIONS[batch] for new in (1, NEW)}
    times = interleaved(arms, rounds)
    of_kinds = {
        "prefill": lambda name: times[f"{name} 1"],
        "decode": lambda name: differences(times[f"{name} {NEW}"], times[f"{name} 1"]),
        "both": lambda name: times[f"{name} {NEW}"],
    }
    found: dict[str, Any] = {"same_tokens": same}
    for kind, of in of_kinds.items():
        best = min(IMPLEMENTATIONS[batch], key=lambda name: statistics.median(of(name)))
        found[kind] = {"over": best, **ratio(of(best), of("ours")).json()}
    return found


def cost_of_experts(batch: int, rounds: int) -> dict[str, Ratio]:
    """Seconds of decoding with each number of experts over those with the fewest."""
    arms = {}
    for experts in EXPERTS:
        model = build(experts)
        arms |= {f"{experts} {new}": ours(model, batch, new) for new in (1, NEW)}
    times = interleaved(arms, rounds)
    decode = {experts: differences(times[f"{experts} {NEW}"], times[f"{experts} 1"]) for experts in EXPERTS}
    return {f"{experts} over {EXPERTS[0]}": ratio(decode[experts], decode[EXPERTS[0]]) for experts in EXPERTS[1:]}


def routing_share(experts: int, batch: int, rounds: int) -> dict[str, Any]:
    """Routing alone, as often as decoding does it, over decoding: choice, dispatch and combine without experts."""
    model = build(experts)
    layers, contexts = list(model.moe_layers()), []
    hooks = [layer.router.register_forward_pre_hook(lambda _, args: contexts.append(args)) for layer in layers]
    ours(model, batch, 2)()
    for hook in hooks:
        hook.remove()
    last = contexts[-len(layers) :]

    def route() -> None:
        for _ in range(NEW - 1):
            for layer, (x_TD, context) in zip(layers, last, strict=True):
                routing = layer.router(x_TD, context)
                routing.combine(routing.dispatch(x_TD))

    arms = {"routing": route, "all": ours(model, batch, NEW), "prefill": ours(model, batch, 1)}
    times = interleaved(arms, rounds)
    return ratio(times["routing"], differences(times["all"], times["prefill"])).json()


def verdict(found: dict[str, Any], bound: float, *, at_most: bool) -> dict[str, Any]:
    """One goal, as every part reports it."""
    value = found["ratio"]
    met = value <= bound if at_most else value >= bound
    goal = f"{'<=' if at_most else '>='} {bound}"
    return {"value": value, "low": found["low"], "high": found["high"], "goal": goal, "met": met, "unit": "x"}


@torch.no_grad()
def measure(rounds: int = 5) -> dict[str, Any]:
    """Everything above; one prompt, which is short work, three times as often."""
    torch.set_num_threads(1)
    goals, detail = {}, {}
    for batch in BATCHES:
        turns = 3 * rounds if batch == 1 else rounds
        peer = against_peer(SIZE.experts, batch, turns)
        costs = {name: found.json() for name, found in cost_of_experts(batch, turns).items()}
        shares = {f"{experts} experts": routing_share(experts, batch, turns) for experts in EXPERTS}
        detail[f"batch {batch}"] = {"over_transformers": peer, "experts": costs, "routing_share": shares}
        goals[f"P12 batch {batch}"] = verdict(peer["both"], 1.0, at_most=False)
        most = costs[f"{EXPERTS[-1]} over {EXPERTS[0]}"]
        goals[f"P12 4 to 64 experts, batch {batch}"] = verdict(most, 1.1, at_most=True)
    return {"goals": goals, "detail": detail}


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    print(json.dumps(measure(parser.parse_args().rounds)))


if __name__ == "__main__":
    main()
