"""Frozen experts come layer by layer: the same numbers to the bit, two layers' copies at most, and in good time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lifelong_moe.config.model import ExpertsImplementation
from lifelong_moe.model import offload
from lifelong_moe.model.offload import CudaStreamer, offloaded
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.retention.teacher import make_teacher

Make = Callable[..., LanguageModel]
Event = tuple[str, int]


class Clones:
    """A streamer whose device is the CPU: copies hold NaN until they are waited for."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.events: list[Event] = []
        """``("begin", address of a layer's first weight)``, and what a test adds."""
        self.dtypes: set[torch.dtype | None] = set()
        self.most_alive = 0
        self._copies: list[weakref.ref[Tensor]] = []

    def prepare(self, host: Tensor) -> Tensor:
        return host

    @property
    def alive(self) -> int:
        """Copies that something still refers to."""
        return sum(copy() is not None for copy in self._copies)

    def start(self, hosts: Sequence[Tensor], dtype: torch.dtype | None) -> Clone:
        self.events.append(("begin", hosts[0].data_ptr()))
        self.dtypes.add(dtype)
        copies = [torch.full_like(host, torch.nan, dtype=dtype) for host in hosts]
        self._copies += [weakref.ref(copy) for copy in copies]
        self.most_alive = max(self.most_alive, self.alive)
        return Clone(copies, list(hosts))


class Clone:
    """Copies that come when they are waited for."""

    def __init__(self, copies: list[Tensor], hosts: list[Tensor]) -> None:
        self.copies, self.hosts = copies, hosts

    def wait(self) -> list[Tensor]:
        for copy, host in zip(self.copies, self.hosts, strict=True):
            copy.copy_(host.detach())
        self.hosts = self.copies  # from now on nothing is written
        return self.copies


def own(model: LanguageModel) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def frozen_experts(model: LanguageModel) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if ".banks." in n and not p.requires_grad}


def ids(length: int = 16) -> Tensor:
    return torch.randint(1, 61, (4, length), generator=torch.Generator().manual_seed(0))


def step(model: LanguageModel, teacher: LanguageModel | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a step that also reads a teacher, as distillation does."""
    torch.manual_seed(0)
    model.zero_grad()
    tokens = ids().to(model.embedding.weight.device)
    output = model(TokenBatch(tokens, domain_ids_BS=tokens % 2))
    loss = output.hidden_BSD.square().mean()
    for routing in output.routings:
        loss = loss + sum(one.value for one in routing.losses.values())
    if teacher is not None:
        with torch.no_grad():
            target = teacher(TokenBatch(tokens, domain_ids_BS=torch.zeros_like(tokens))).hidden_BSD
        loss = loss + output.hidden_BSD.sub(target).square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def with_teacher(model: LanguageModel) -> tuple[LanguageModel, LanguageModel]:
    """Sharing what is frozen; the teacher's copies of the rest differ, as they would after some steps."""
    teacher = make_teacher(model, [p for p in model.parameters() if not p.requires_grad])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in own(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model, teacher


def agree(model: LanguageModel, teacher: LanguageModel | None, streamer: Clones) -> None:
    """Steps with and without offload give the same bits, and change none of what is frozen."""
    loss, grads = step(model, teacher)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with offloaded([model, *([teacher] if teacher else [])], own(model), streamer):
        for _ in range(2):  # the second begins with what the first left on the device
            again, grads_again = step(model, teacher)
            assert torch.equal(again, loss)
            assert set(grads) == set(grads_again)
            assert all(torch.equal(grads[name], grads_again[name]) for name in grads)
        state = model.state_dict()
    assert set(state) == set(stored) and all(torch.equal(state[name], stored[name]) for name in stored)
    assert streamer.events and not streamer.alive


def test_the_same_bits(make_model: Make, any_router_kind: str) -> None:
    model, teacher = with_teacher(make_model(any_router_kind, (4, 4 if any_router_kind == "base" else 2)))
    agree(model, teacher, Clones())


def test_the_same_bits_of_competing_experts(make_model: Make) -> None:
    agree(make_model("dense", (4, 2), routing={"competitive": True}), None, Clones())


def test_offloaded_layers_compute_in_slices(make_model: Make) -> None:
    """A buffer of all experts would hold their copies, and free what the graph goes by to know them."""
    model, teacher = with_teacher(make_model("learned", (4, 2), model={"width": 64, "expert_width": 64}))
    for layer in model.moe_layers():
        layer.banks.implementation = ExpertsImplementation.grouped_mm
    loss, grads = step(model, teacher)
    with offloaded([model, teacher], own(model), Clones()):
        assert {layer.banks.implementation for layer in model.moe_layers()} == {ExpertsImplementation.slices}
        again, grads_again = step(model, teacher)
    assert {layer.banks.implementation for layer in model.moe_layers()} == {ExpertsImplementation.grouped_mm}
    torch.testing.assert_close(again, loss)
    for name, grad in grads.items():
        assert float((grads_again[name] - grad).norm() / grad.norm().clamp_min(1e-6)) < 1e-4, name


def test_autocast_rounds_once(make_model: Make) -> None:
    """What autocast would make of the copies for itself, and hold until the backward pass, comes already rounded."""
    streamer = Clones()
    model, teacher = with_teacher(make_model("learned", (4, 2)))
    with torch.autocast("cpu", torch.bfloat16):
        agree(model, teacher, streamer)
    assert streamer.dtypes == {torch.bfloat16}


@pytest.mark.parametrize("autocast", [False, True])
def test_the_graph_holds_no_frozen_matrix(make_model: Make, monkeypatch: pytest.MonkeyPatch, autocast: bool) -> None:
    model = make_model("learned", (4, 2), model={"expert_width": 211})
    kept: list[int] = []

    def watched(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> saved_tensors_hooks:
        def note(tensor: Tensor) -> Any:
            packed = pack(tensor)
            if isinstance(packed, Tensor) and sorted(packed.shape) in ([16, 211], [16, 422]):
                kept.append(packed.untyped_storage().data_ptr())
            return packed

        return saved_tensors_hooks(note, unpack)

    monkeypatch.setattr(offload, "saved_tensors_hooks", watched)
    with offloaded([model], own(model), Clones()), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(TokenBatch(ids()))
    assert all(bool((routing.counts_E > 0).all()) for routing in output.routings)
    # Two matrices of the active generation in two layers; of its two experts each where autocast copies them.
    assert len(set(kept)) == 2 * 2 * (2 if autocast else 1)


def test_the_next_layer_comes_while_one_computes(make_model: Make) -> None:
    model, streamer = make_model("learned", (4, 2), model={"layers": 3}), Clones()
    layers = list(model.moe_layers())
    number = {layer.banks.generations[0].gate_up.data_ptr(): i for i, layer in enumerate(layers)}

    def note(word: str, i: int) -> None:
        streamer.events.append((word, i))

    for i, (layer, block) in enumerate(zip(layers, model.blocks, strict=True)):
        layer.banks.register_forward_pre_hook(lambda *_, i=i: note("forward", i))
        layer.banks.register_forward_hook(lambda *a, i=i: a[-1].register_hook(lambda _: note("backward", i)) and None)
        block.moe_norm.register_full_backward_pre_hook(lambda *_, i=i: note("backward is done", i))
    with offloaded([model], own(model), streamer):
        step(model, None)
    seen = [(word, number.get(what, what)) for word, what in streamer.events]
    assert seen == [
        ("begin", 0),
        ("begin", 1),
        ("forward", 0),
        ("begin", 2),
        ("forward", 1),
        ("forward", 2),  # whose copies stay: the backward pass begins with them
        ("backward", 2),
        ("begin", 1),
        ("backward is done", 2),
        ("backward", 1),
        ("begin", 0),
        ("backward is done", 1),
        ("backward", 0),  # whose copies stay: the next step begins with them
        ("backward is done", 0),
    ]


def test_two_layers_at_a_time(make_model: Make) -> None:
    model, teacher = with_teacher(make_model("learned", (4, 2), model={"layers": 5}))
    streamer = Clones()
    with offloaded([model, teacher], own(model), streamer):
        step(model, teacher)
        assert streamer.alive == 2  # the matrices of the student's first layer, where the next step begins
    assert streamer.most_alive == 2 * 2 * 2  # of the teacher, of which both generations are frozen


def test_experts_stay_where_they_are(make_model: Make) -> None:
    model, teacher = with_teacher(make_model("learned", (4, 2)))
    before = dict(model.named_parameters())
    with offloaded([model, teacher], own(model), Clones()):
        for one in (model, teacher):
            one.to("meta", torch.bfloat16)
        after = dict(model.named_parameters())
        for name, parameter in after.items():
            place = "cpu" if name in frozen_experts(model) else "meta"
            assert (parameter.device.type, parameter.dtype) == (place, torch.bfloat16), name
        assert {p.device.type for n, p in teacher.named_parameters() if ".banks." in n} == {"cpu"}
    assert all(after[name] is before[name] for name in frozen_experts(model))
    shared = frozen_experts(teacher)
    assert all(shared[name] is parameter for name, parameter in frozen_experts(model).items() if name in shared)
    model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_nothing_is_left_after_an_error(make_model: Make) -> None:
    model, streamer = make_model("learned", (4, 2)), Clones()
    attributes = [set(vars(module)) for module in model.modules()]
    with pytest.raises(RuntimeError, match="out of it"), offloaded([model], own(model), streamer):
        model(TokenBatch(ids()))
        model.blocks[1].moe.banks.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of it")))
        model(TokenBatch(ids()))
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert not streamer.alive


def test_nothing_frozen_and_no_streamer(make_model: Make) -> None:
    streamer = Clones()
    for model, brings in ((make_model("learned", (4,)), streamer), (make_model("learned", (4, 2)), None)):
        with offloaded([model], own(model), brings):
            step(model, None)
            model.to("meta")
            assert {p.device.type for p in model.parameters()} == {"meta"}
    assert not streamer.events


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_same_numbers_in_less_memory(make_model: Make) -> None:
    model, teacher = with_teacher(
        make_model("learned", (16, 2), model={"layers": 8, "width": 256, "expert_width": 512})
    )
    device, found = torch.device("cuda", 0), []
    for streamer in (None, CudaStreamer(device)):
        with offloaded([model, teacher], own(model), streamer):
            model.to(device)
            teacher.to(device)
            step(model, teacher)
            torch.cuda.reset_peak_memory_stats(device)
            loss, grads = step(model, teacher)
            found.append((loss.cpu(), {n: g.cpu() for n, g in grads.items()}, torch.cuda.max_memory_allocated(device)))
            del loss, grads
            model.zero_grad()
            model.cpu()
            teacher.cpu()
    (loss, grads, peak), (loss_again, grads_again, peak_again) = found
    torch.testing.assert_close(loss_again, loss)
    torch.testing.assert_close(grads_again, grads)
    matrices = 3 * 256 * 512 * 4  # bytes of an expert
    assert peak - peak_again > (8 - 3) * 16 * matrices  # all layers' frozen experts, but for what is held at a time
