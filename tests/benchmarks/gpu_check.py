"""One GPU, nine minutes: is the CUDA path right, then how fast. Run in the root of the repository:

    make gpu-check                                                  # or, without the project's environment:
    python -m tests.benchmarks.gpu_check FOLDER [--budget 540] [--device cpu]

Parts run in this order, correctness first; each writes ``FOLDER/<part>.json`` as soon as it ends, and one for which the
time left does not suffice is left out. Speed counts only where every part before it is sound: the exit code is 1 where
one is not. ``--device cpu`` is the rehearsal, which a test runs: the same code at toy sizes.

MLflow and ``datasets`` are not needed. What else a machine lacks (``omegaconf``, ``faiss-cpu``) may come as wheels:
``pip install --no-index --no-deps --target SITE *.whl``, and ``SITE`` in ``PYTHONPATH``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lifelong_moe.config.model import ExpertsImplementation, ModelConfig
from lifelong_moe.config.routing.base import Bundles, RoutingConfig
from lifelong_moe.config.routing.topk import LearnedConfig
from lifelong_moe.errors import TryAgainError
from lifelong_moe.model.transformer import LanguageModel, initialize
from lifelong_moe.plan.architecture import Architecture, Generation
from lifelong_moe.training.callbacks.progress import StepCheckpoint
from lifelong_moe.training.loop.module import StageModule
from lifelong_moe.training.loop.shares import with_shares
from tests import tiny
from tests.benchmarks.performance import subjects
from tests.benchmarks.provenance import hardware
from tests.conftest import ROUTER_KINDS, build_batch, build_model

ROOT = Path(__file__).resolve().parents[2]
Found = dict[str, Any]
SHAPE = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "expert_width": 32, "context": 32}
BUNDLES = tuple(Generation(f"s{g}", n, delta_rank=4 * (g > 0)) for g, n in enumerate((8, 4, 4)))
"""Generations of the default method."""
DRAWING = ("noisy", "gshard", "at_random", "base")
"""Kinds whose choices in training are random, or an auction's: no gradient of theirs is another run's."""
TOLERANCE = {"32-true": 1e-3, "bf16-mixed": 0.1, "bf16-true": 0.1}
"""Distance of all gradients from those in float64, over their norm, that is always allowed: in bfloat16 near ties move
tokens to other experts. Where the CPU's own distance in that precision is larger, ``AS_FAR`` times that."""
AS_FAR = 2.5


@dataclass(frozen=True)
class Machine:
    """Where the parts run."""

    device: str
    out: Path
    ends: float
    """When the time is up, by ``time.monotonic``."""

    @property
    def is_gpu(self) -> bool:
        """Whether this is no rehearsal."""
        return self.device != "cpu"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], rounds: int) -> float:
        """Median time of some work."""
        times = []
        for _ in range(rounds + 1):
            self.synchronize()
            began = time.perf_counter()
            work()
            self.synchronize()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])


def ceilings(machine: Machine) -> Found:
    """What bounds everything else: copies, and products in bfloat16."""
    size, width = (2**30, 8192) if machine.is_gpu else (2**20, 128)
    x = torch.empty(size, dtype=torch.int8, device=machine.device)
    y = torch.empty_like(x)
    a, b = (torch.randn(width, width, device=machine.device).bfloat16() for _ in range(2))
    return {
        **hardware(),
        "copy_tb_per_second": 2 * size / machine.seconds(lambda: y.copy_(x), 10) / 1e12,
        "bf16_tflops": 2 * width**3 / machine.seconds(lambda: a @ b, 10) / 1e12,
        "sound": True,
    }


def marked_tests(machine: Machine) -> Found:
    """The tests that need a GPU; without one they skip themselves."""
    files = [p for p in sorted((ROOT / "tests").glob("*/**/test_*.py")) if "@pytest.mark.gpu" in p.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
    return {"last": done.stdout.splitlines()[-1:], "sound": done.returncode == 0}


@contextlib.contextmanager
def computing(precision: str, device: str) -> Iterator[torch.dtype]:
    """Context with the precision's products; yields the dtype of weights."""
    mixed = torch.autocast(device, dtype=torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()
    with mixed:
        yield torch.bfloat16 if precision == "bf16-true" else torch.float32


def made(kind: str) -> LanguageModel:
    """A small model; ``default`` has three generations of which the newest trains."""
    if kind != "default":
        return build_model(kind, (8,), model=SHAPE)
    model = build_model("bundles", BUNDLES, model=SHAPE)
    for name, place in model.places().items():
        model.get_parameter(name).requires_grad_(place.generation == len(BUNDLES) - 1)
    return model


def module_of(model: LanguageModel, size: subjects.Size) -> StageModule:
    """A stage that trains it, without distillation."""
    spec = replace(subjects.stage_spec(size), routing=model.architecture.routing, model=model.architecture.model)
    module = StageModule(model.train(), spec, spec.phases()[0])
    module.on_fit_start()
    return module


def batch_of(module: StageModule, device: str) -> Any:
    """Text as the data module hands it over."""
    weighted = with_shares(build_batch(4, 32, domains=len(module.model.architecture.generations)), module.spec)  # type: ignore[arg-type]
    return {name: one.to(device) if isinstance(one, Tensor) else one for name, one in weighted.items()}


SMALL = subjects.Size(context=32, sequences=4)


def gradients(
    kind: str, device: str, precision: str, dtype: torch.dtype | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Loss, and each parameter's gradient in float64 on the CPU."""
    torch.manual_seed(0)
    with computing(precision, device) as weights:
        model = made(kind).to(device, dtype or weights)
        module = module_of(model, SMALL)
        loss = module.training_step(batch_of(module, device), 0)["loss"]
    loss.backward()
    grads = {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), grads


def against_float64(machine: Machine) -> Found:
    """Loss and gradients of every router in every precision, against float64 on the CPU."""
    kinds = [kind for kind in ROUTER_KINDS if kind not in DRAWING] if machine.is_gpu else ["learned", "switch"]
    found: Found = {}
    bad = []
    for kind in ("default", *kinds):
        loss, expected = gradients(kind, "cpu", "32-true", torch.float64)
        for precision, allowed in TOLERANCE.items():
            mine, there = gradients(kind, machine.device, precision)
            there_on_cpu = gradients(kind, "cpu", precision)[1] if machine.is_gpu else there
            apart, on_cpu = (_apart(grads, expected) for grads in (there, there_on_cpu))
            other = sorted(there.keys() - expected.keys())
            found[f"{kind} {precision}"] = {"gradients": apart, "on_cpu": on_cpu, "loss": abs(mine - loss)}
            # `not <=`, so that NaN fails.
            if other or not apart <= max(allowed, AS_FAR * on_cpu):
                bad.append(f"{kind} {precision} {other}")
    return {"found": found, "bad": bad, "sound": not bad}


def _apart(grads: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    # An unused parameter has a gradient of zero, or none.
    none = torch.zeros((), dtype=torch.float64)
    return _norm(grads.get(name, none) - grad for name, grad in expected.items()) / _norm(expected.values())


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(one.norm()) ** 2 for one in tensors))


def idle_experts(machine: Machine) -> Found:
    """Gradients of experts without a token, in memory that held something else: zero, and not what was there."""
    dtype = torch.bfloat16
    model = build_model("learned", (8,), model=SHAPE).to(machine.device, dtype)
    for layer in model.moe_layers():
        layer.banks.implementation = ExpertsImplementation.grouped_mm
        with torch.no_grad():  # no token chooses experts 2 to 7: their logits are the least
            layer.router.get_parameter("rows.0").zero_()[2:] = -1.0
    module = module_of(model, SMALL)
    batch, largest = batch_of(module, machine.device), 0.0
    for layer in model.moe_layers():  # positive inputs, so that a row of -1 scores below one of 0
        layer.register_forward_pre_hook(lambda _, args: (args[0].abs(), *args[1:]))
    for _ in range(3):
        dirty = [torch.full((2**k,), math.nan, device=machine.device, dtype=dtype) for k in range(8, 20)]
        del dirty
        model.zero_grad()
        module.training_step(batch, 0)["loss"].backward()
        for layer in model.moe_layers():
            for parameter in layer.banks.parameters():
                assert parameter.grad is not None
                largest = max(largest, float(parameter.grad[2:].abs().nan_to_num(math.inf).max()))
    return {"largest_gradient": largest, "sound": largest == 0.0}


def waits(machine: Machine) -> Found:
    """Times that the host waits in a step, by torch's own count; one in bfloat16 with the default method."""
    if not machine.is_gpu:
        return {"left_out": "no device to wait for", "sound": True}
    found: dict[str, Any] = {}
    for kind in ("default", "learned", "switch", "relu", "expert_choice"):
        for precision in TOLERANCE:
            with computing(precision, machine.device) as dtype:
                module = module_of(made(kind).to(machine.device, dtype), SMALL)
                optimizer, batch = module.configure_optimizers()["optimizer"], batch_of(module, machine.device)
                _step(module, optimizer, batch)  # what is made once is made here
                torch.cuda.set_sync_debug_mode("warn")
                with warnings.catch_warnings(record=True) as seen:
                    warnings.simplefilter("always")
                    _step(module, optimizer, batch)
                torch.cuda.set_sync_debug_mode("default")
            lines = sorted({f"{Path(one.filename).name}:{one.lineno}" for one in seen})
            found[f"{kind} {precision}"] = {"waits": len(seen), "at": lines}
    return {"found": found, "sound": found["default bf16-mixed"]["waits"] <= 1}


def _step(module: StageModule, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    module.training_step(batch, 0)["loss"].backward()
    module.configure_gradient_clipping(optimizer)
    optimizer.step()
    optimizer.zero_grad()


def continued(machine: Machine) -> Found:
    """A run whose router draws noise, whole, and stopped in its second stage and continued: the same weights."""
    found: Found = {}
    for precision in ("32-true", "bf16-mixed") if machine.is_gpu else ("32-true",):
        hashes = []
        for stops in (False, True):
            root = machine.out / f"run-{precision}-{stops}"
            root.mkdir(parents=True)
            with contextlib.chdir(root):
                tiny.write_corpora(Path())
                trainer = {"accelerator": "gpu" if machine.is_gpu else "cpu", "precision": precision}
                config = tiny.tiny_config(trainer=trainer, evaluate={"tokens": 100})
                config["routing"] |= {"jitter": 0.1}
                config["stage_defaults"]["tokens"] = (12 if machine.is_gpu else 4) * tiny.SEQUENCES * tiny.CONTEXT
                path = tiny.write_config(config)
                if stops:
                    with _stopped_after(18 if machine.is_gpu else 6), contextlib.suppress(TryAgainError):
                        tiny.train(path)
                    torch.manual_seed(99)  # another process begins with other numbers
                tiny.train(path)
                hashes.append(tiny.hashes())
        found[precision] = {"same": hashes[0] == hashes[1], "stages": len(hashes[0])}
    return {"found": found, "sound": all(one["same"] for one in found.values())}


@contextlib.contextmanager
def _stopped_after(steps: int) -> Iterator[None]:
    """Context in which a run is asked to end, as by SIGTERM, after so many steps of all its stages."""
    original, taken = StepCheckpoint.on_train_batch_end, [0]

    def stopping(self: StepCheckpoint, *args: Any) -> None:
        taken[0] += 1
        if taken[0] == steps:
            self.interrupt.requested = True
        original(self, *args)

    StepCheckpoint.on_train_batch_end = stopping  # type: ignore[method-assign]
    try:
        yield
    finally:
        StepCheckpoint.on_train_batch_end = original  # type: ignore[method-assign]


def steps(machine: Machine) -> Found:
    """A step of thirty layers: without generations, with a frozen one, and by the default method."""
    shape: dict[str, Any] = SHAPE | {"layers": 3}
    if machine.is_gpu:
        shape = {"layers": 30, "width": 576, "heads": 9, "kv_heads": 3, "expert_width": 1536, "context": 2048}
    vocab, sequences = (49_152, 8) if machine.is_gpu else (64, 2)
    size = subjects.Size(context=shape["context"], sequences=sequences, vocab=vocab)
    found: Found = {}
    for name, born, bundles in (("8", (8,), False), ("8 + 4", (8, 4), False), ("default, 8 + 4 + 4", (8, 4, 4), True)):
        module = module_of(_large(shape, born, bundles, vocab).to(machine.device), size)
        optimizer = module.configure_optimizers()["optimizer"]
        batch = subjects.batches(size)[0]
        batch["domain_ids"] = torch.full_like(batch["domain_ids"], len(born) - 1 if bundles else 0)
        moved = {
            k: v.to(machine.device) if isinstance(v, Tensor) else v
            for k, v in with_shares(batch, module.spec).items()  # type: ignore[arg-type]
        }
        if machine.is_gpu:
            torch.cuda.reset_peak_memory_stats()

        def step(module: StageModule = module, optimizer: Any = optimizer, moved: Any = moved) -> None:
            with torch.autocast(machine.device, dtype=torch.bfloat16):
                loss = module.training_step(moved, 0)["loss"]
            loss.backward()
            module.configure_gradient_clipping(optimizer)
            optimizer.step()
            optimizer.zero_grad()

        step()
        seconds = machine.seconds(step, 8 if machine.is_gpu else 1)
        peak = torch.cuda.max_memory_allocated() / 2**30 if machine.is_gpu else None
        found[name] = {"ms": 1e3 * seconds, "tokens_per_second": size.tokens / seconds, "peak_gib": peak}
    return {"found": found, "sound": True}


def _large(shape: dict[str, Any], born: tuple[int, ...], bundles: bool, vocab: int) -> LanguageModel:
    """Its newest generation trains, and the trunk where there are no bundles."""
    generations = tuple(
        Generation(f"s{g}", num, delta_rank=(44 if shape["width"] > 64 else 4) if bundles and g else 0)
        for g, num in enumerate(born)
    )
    routing: RoutingConfig = LearnedConfig(top_k=2, bundles=Bundles.label if bundles else Bundles.none)
    labels = tuple((f"d{g}", g) for g in range(len(born))) if bundles else ()
    config = ModelConfig(experts=born[0], document_mask=bundles, **shape)
    model = LanguageModel(Architecture(config, routing, vocab, 0, generations, len(born) - 1, labels=labels))
    initialize(model, seed=0)
    for name, place in model.places().items():
        trains = place.generation == len(born) - 1 or (place.is_trunk and not bundles)
        model.get_parameter(name).requires_grad_(trains)
    return model


def figures(machine: Machine) -> Found:
    """The project's own figures, as ``make bench`` takes them, the most telling first."""
    if not machine.is_gpu:
        return {"left_out": "a rehearsal measures nothing", "sound": True}
    found: Found = {}
    for name in ("layer", "lifelong", "attention_by_document", "overhead", "inference", "step"):
        if machine.left < 45:
            found[name] = "left out"
            continue
        command = [sys.executable, "-m", f"tests.benchmarks.performance.{name}"]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=min(machine.left - 15, 150), env=os.environ
            )
        except subprocess.TimeoutExpired:
            found[name] = "took too long"
            continue
        good = done.returncode == 0
        found[name] = json.loads(done.stdout.splitlines()[-1])["goals"] if good else done.stderr[-300:]
        (machine.out / "figures.json").write_text(json.dumps(found, indent=1))
    return {"found": found, "sound": True}


PARTS: dict[str, tuple[float, Callable[[Machine], Found]]] = {
    "0-ceilings": (5, ceilings),
    "1-marked-tests": (30, marked_tests),
    "2-against-float64": (40, against_float64),
    "3-idle-experts": (5, idle_experts),
    "4-waits": (15, waits),
    "5-continued": (40, continued),
    "6-steps": (60, steps),
    "7-figures": (60, figures),
}
"""By name: the seconds without which it is not begun, and the part."""


def check(machine: Machine) -> dict[str, Found]:
    """Run the parts in order; what each found, also on the disk."""
    found: dict[str, Found] = {}
    for name, (least, part) in PARTS.items():
        began = time.monotonic()
        if machine.left < least:
            found[name] = {"left_out": f"{machine.left:.0f} s left, needs {least:.0f}", "sound": False}
        else:
            try:
                found[name] = part(machine)
            except Exception as error:  # the next part may still find something
                where = traceback.format_exc().splitlines()[-8:]
                found[name] = {"error": f"{type(error).__name__}: {error}"[:500], "where": where, "sound": False}
        found[name]["seconds"] = round(time.monotonic() - began, 1)
        (machine.out / f"{name}.json").write_text(json.dumps(found[name], indent=1) + "\n")
        print(f"{name}: {json.dumps(found[name])[:1500]}", flush=True)
    return found


def main() -> int:
    """Run all parts; 1 if one is not sound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--budget", type=float, default=540.0, help="seconds")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    machine = Machine(asked.device, asked.out.resolve(), time.monotonic() + asked.budget)
    found = check(machine)
    print(json.dumps({name: [one["sound"], one["seconds"]] for name, one in found.items()}))
    return 0 if all(one["sound"] for one in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
