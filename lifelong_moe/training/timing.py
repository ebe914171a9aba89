"""How fast this machine trains a model, by a few steps of it: for a plan, before any stage was trained here."""

from __future__ import annotations

import time

import torch
from torch.optim import AdamW

from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.cost import training_flops
from lifelong_moe.training.loop.device import on_configured_device, rounds_products
from lifelong_moe.training.restore import initial_model

LEAST_STEPS = 2
"""Timed ones; one more goes before them, in which memory is taken and kernels are chosen."""


def timed_speed(architecture: Architecture, sequences: int, trainer: TrainerConfig, seconds: float) -> float:
    """Active FLOPs a second of steps on random tokens, in this process alone.

    All parameters train, at a rate of zero. Reading data, checkpoints and Lightning, which a stage has besides, are
    left out; they take a few percent.

    Args:
        architecture: With one generation, as first stages have.
        sequences: Of a micro-batch, each as long as the context.
        trainer: Its accelerator and precision.
        seconds: No step begins after so much time.
    """
    model = on_configured_device(initial_model(architecture, 0), trainer).train()
    if trainer.precision == "bf16-true":
        model = model.bfloat16()
    optimizer = AdamW(model.parameters(), lr=0.0, fused=True)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(architecture.vocab_size, (sequences, architecture.model.context), generator=generator)
    ids_BS = ids_BS.to(device)
    # Each sequence is one document.
    batch = TokenBatch(ids_BS, torch.zeros_like(ids_BS), torch.zeros_like(ids_BS))
    rounds = trainer.precision == "bf16-mixed" or rounds_products(trainer)
    began, steps = time.perf_counter(), -1
    while steps < LEAST_STEPS or time.perf_counter() - began < seconds:
        with torch.autocast(device.type, torch.bfloat16, enabled=rounds):
            output = model(batch)
            hidden_TD = output.hidden_BSD.flatten(0, 1)
            loss = model.head.cross_entropy(hidden_TD, ids_BS.flatten(), torch.zeros_like(ids_BS.flatten()))
            for routing in output.routings:
                loss = loss + sum(one.value * one.coefficient for one in routing.losses.values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        steps += 1
        if steps == 0:
            began = time.perf_counter()
    spent = time.perf_counter() - began
    return training_flops(architecture, steps * ids_BS.numel(), None, 0) / spent
