"""How a model is computed while it trains: the same losses and gradients, and memory that is kept."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from lifelong_moe.config.model import ExpertsImplementation
from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.training.loop import execution
from lifelong_moe.training.loop.device import COMPILES, require_trainer
from lifelong_moe.training.loop.execution import execution_options, isolated_documents, keep_freed_memory

Make = Callable[..., LanguageModel]
Batch = Callable[..., dict[str, Tensor]]


def gradients(model: LanguageModel, batch: dict[str, Tensor]) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    output = model(TokenBatch(batch["token_ids"], batch["document_ids"], batch["domain_ids"]))
    loss = model.head.cross_entropy(output.hidden_BSD.flatten(0, 1), batch["target_ids"].flatten())
    for routing in output.routings:
        for one in routing.losses.values():
            loss = loss + one.value
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_recomputation_changes_no_bit(make_model: Make, make_batch: Batch, router_kind: str) -> None:
    batch, plain, other = make_batch(), make_model(router_kind, (4, 4)), make_model(router_kind, (4, 4))
    expected = gradients(plain, batch)
    with execution_options([other], TrainerConfig(activation_checkpointing=True)):
        found = gradients(other, batch)
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not any(block.recomputes or block.moe.recomputes for block in other.blocks)  # type: ignore[union-attr]


def test_recomputation_keeps_less(make_model: Make, make_batch: Batch) -> None:
    def kept(model: LanguageModel) -> int:
        seen: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            gradients(model, make_batch())
        return sum(seen.values())

    model = make_model(model={"width": 16, "expert_width": 64})
    whole = kept(model)
    with execution_options([model], TrainerConfig(activation_checkpointing=True)):
        assert kept(model) < 0.8 * whole


@pytest.mark.parametrize("how", list(ExpertsImplementation))
def test_experts_are_computed_as_asked(make_model: Make, make_batch: Batch, how: ExpertsImplementation) -> None:
    batch, model = make_batch(), make_model("learned", (2, 2))
    with execution_options([model], TrainerConfig(experts_implementation=ExpertsImplementation.readable)):
        expected = gradients(model, batch)
    with execution_options([model], TrainerConfig(experts_implementation=how)):
        assert all(layer.banks.implementation == how for layer in model.moe_layers())
        found = gradients(model, batch)
    assert all(layer.banks.implementation == ExpertsImplementation.auto for layer in model.moe_layers())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_documents_are_kept_apart_for_a_while(make_model: Make) -> None:
    model = make_model().eval()
    ids = torch.randint(1, 61, (1, 12), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(12) >= 7).long().unsqueeze(0)
    with torch.no_grad():
        alone = torch.cat([model(TokenBatch(part)).hidden_BSD for part in ids.split([7, 5], dim=1)], dim=1)
        with isolated_documents([model]):
            apart = model(TokenBatch(ids, document_ids_BS=documents)).hidden_BSD
        together = model(TokenBatch(ids, document_ids_BS=documents)).hidden_BSD
    torch.testing.assert_close(apart, alone, atol=1e-5, rtol=0)
    assert not torch.allclose(together, alone, atol=1e-2)


@pytest.mark.skipif(TorchVersion(torch.__version__) < COMPILES, reason=f"trainer.compile needs torch {COMPILES}")
@pytest.mark.filterwarnings("ignore")  # torch's tracer warns of what it does itself
def test_compiled_is_the_same(make_model: Make, make_batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, model = make_batch(), make_model("learned", (2, 2))
    expected, names = gradients(model, batch), list(model.state_dict())
    # The graphs that torch.compile finds, differentiated, without the compiler, which takes minutes.
    monkeypatch.setattr(nn.Module, "compile", partial_method(backend="aot_eager"))
    with execution_options([model], TrainerConfig(compile=True)):
        assert model._compiled_call_impl is not None and list(model.state_dict()) == names
        found = gradients(model, batch)
    assert model._compiled_call_impl is None
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_an_old_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Compiled by torch 2.11 the gradients of experts were wrong, and nothing said so.
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cpu"))
    require_trainer(TrainerConfig())
    with pytest.raises(ConfigError, match=r"^trainer.compile=true: torch 2.11.0\+cpu is older than 2.13"):
        require_trainer(TrainerConfig(compile=True))


def test_a_compiler_that_fails_is_one_line(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)
    with (
        pytest.raises(ConfigError, match=r"trainer.compile=true: torch cannot compile here \(no compiler\)"),
        execution_options([make_model()], TrainerConfig(compile=True)),
    ):
        raise torch._dynamo.exc.TorchDynamoException("no compiler")
    with pytest.raises(RuntimeError, match="else"), execution_options([make_model()], TrainerConfig(compile=True)):
        raise RuntimeError("something else")


def test_a_teacher_of_a_continued_generation_moves_no_experts(make_model: Make) -> None:
    student, teacher = make_model("learned", (2, 2)), make_model("learned", (2, 2))
    student.architecture = dataclasses.replace(student.architecture, continued=0, frozen=2)
    with execution_options([student, teacher], TrainerConfig()):
        assert {layer.banks.implementation for layer in teacher.moe_layers()} == {ExpertsImplementation.slices}
        assert {layer.banks.implementation for layer in student.moe_layers()} == {ExpertsImplementation.auto}
    assert {layer.banks.implementation for layer in teacher.moe_layers()} == {ExpertsImplementation.auto}


def partial_method(**options: str) -> Callable[..., None]:
    original = nn.Module.compile
    return lambda self: partial(original, self)(**options)


def in_child(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", f"from lifelong_moe.training.loop.execution import keep_freed_memory\n{code}"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_is_kept() -> None:
    faults = """
import resource, torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4): torch.ones(16_000_000)  # 64 MB: up to 32 MiB glibc may begin to keep memory by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = faults()
assert keep_freed_memory()
print(min(faults() for _ in range(4)) * 10 < before)  # a round may find its place taken by something small
"""
    assert in_child(faults) == "True"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_kept_memory_is_given_back() -> None:
    held = """
import torch
from lifelong_moe.training.loop.execution import give_back_memory
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096 // 1_000_000
keep_freed_memory()
for _ in range(2): torch.ones(64_000_000)  # 256 MB
before = resident()
give_back_memory()
print(before - resident() > 200)
"""
    assert in_child(held) == "True"


def test_whoever_set_up_the_allocator_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_max=10")
    assert not keep_freed_memory()


class Library:
    """glibc, or another C library, that notes how it is set up."""

    def __init__(self, *answers: int, is_glibc: bool = True) -> None:
        self.answers, self.asked = list(answers), []
        if is_glibc:
            self.gnu_get_libc_version = None

    def mallopt(self, parameter: int, value: int) -> int:
        self.asked.append((parameter, value))
        return self.answers.pop(0)


@pytest.mark.parametrize(
    ("platform", "library", "asked", "done"),
    [
        ("linux", Library(1, 1), [(-4, 0), (-1, 2147483647)], True),  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
        ("linux", Library(1, 0), [(-4, 0), (-1, 2147483647)], False),
        ("linux", Library(0), [(-4, 0)], False),
        ("linux", Library(is_glibc=False), [], False),
        ("darwin", Library(1, 1), [], False),
    ],
)
def test_glibc_is_asked_to_keep_memory_and_nothing_else_is(
    monkeypatch: pytest.MonkeyPatch, platform: str, library: Library, asked: list[tuple[int, int]], done: bool
) -> None:
    for name in execution.MALLOC_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(execution.sys, "platform", platform)
    monkeypatch.setattr(execution.ctypes, "CDLL", lambda name: library)
    assert keep_freed_memory() is done and library.asked == asked
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "1")
    assert keep_freed_memory() is False and library.asked == asked  # a user has chosen
