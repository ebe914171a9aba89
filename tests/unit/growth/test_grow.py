from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from scipy.stats import kstest, norm
from torch import Tensor

from lifelong_moe.config.growth import ExpertInit, GrowConfig, RouterInit
from lifelong_moe.config.load import build_config
from lifelong_moe.config.run import RunConfig
from lifelong_moe.config.yaml_file import apply_override
from lifelong_moe.errors import ConfigError
from lifelong_moe.growth import grow as grow_module
from lifelong_moe.growth import noop
from lifelong_moe.growth.grow import grow, most_used
from lifelong_moe.growth.noop import behavior, check_noop
from lifelong_moe.growth.observe import observe
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Generation
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.routing.base import Router, Routing
from lifelong_moe.training.loop.optimizer import build_optimizer
from tests.conftest import build_raw

Make = Callable[..., LanguageModel]
Batch = Callable[..., dict[str, Tensor]]


def rows(router: Router) -> list[Tensor]:
    return [p.detach() for p in router.parameters()]


def logits_of(model: LanguageModel, sample: dict[str, Tensor]) -> Tensor:
    return logits_in(behavior(model, sample), sample)


def logits_in(found: noop.Behavior, sample: dict[str, Tensor]) -> Tensor:
    """Logits of all tokens."""
    return found.head.logits(found.hidden_BSD, sample["domain_ids"]).detach()


def add(model: LanguageModel, config: GrowConfig, sample: dict[str, Tensor], seed: int, **generation: Any) -> None:
    grow(model, Generation("new", config.experts, **generation), config, sample, seed)


@pytest.mark.parametrize("init", list(ExpertInit))
@pytest.mark.parametrize("generations", [(4,), (4, 2)])
def test_growth_changes_nothing_until_the_new_experts_are_let_in(
    make_model: Make, make_batch: Batch, any_router_kind: str, init: ExpertInit, generations: tuple[int, ...]
) -> None:
    model, sample = make_model(any_router_kind, generations), make_batch(domains=len(generations))
    before, old = behavior(model, sample), {n: p.clone() for n, p in model.state_dict().items()}
    add(model, GrowConfig(experts=2, init=init), sample, seed=3)
    for layer in model.moe_layers():
        assert layer.router.generations == [*generations, 2] and not layer.router.masks_newest
        assert len(layer.banks) == sum(generations) + 2 and [g.trains for g in layer.banks.born] == [False] * len(
            generations
        ) + [True]
    assert model.training
    assert model.architecture.generations[-1].stage == "new" and model.architecture.frozen == len(generations)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in old.items())
    assert check_noop(model, sample, before) == 0


@pytest.mark.parametrize("router", list(RouterInit))
def test_every_router_init_is_a_no_op_too(make_model: Make, make_batch: Batch, router: RouterInit) -> None:
    model = make_model()
    add(model, GrowConfig(experts=3, router=router), make_batch(), seed=0)
    assert all(bool(layer.router.parameters()) and rows(layer.router)[-1].any() for layer in model.moe_layers())


def test_new_learned_rows_do_change_the_logits_afterwards(make_model: Make, make_batch: Batch) -> None:
    model, sample = make_model(), make_batch()
    before = logits_of(model, sample)
    add(model, GrowConfig(experts=2, init=ExpertInit.random), sample, seed=0)
    assert float((logits_of(model, sample) - before).abs().max()) > 0.1


def test_a_broken_growth_is_noticed(make_model: Make, make_batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sample = make_model(), make_batch()
    begin = grow_module._begin_experts

    def clumsy(layer, *args):  # type: ignore[no-untyped-def]
        begin(layer, *args)
        layer.banks.matrices()[0][0][0, 0] += 1.0

    monkeypatch.setattr(grow_module, "_begin_experts", clumsy)
    with pytest.raises(RuntimeError, match=r"growth changed the logits by .* at most 1e-5 is allowed"):
        add(model, GrowConfig(experts=2), sample, seed=0)


def test_a_not_a_number_counts_as_a_change(make_model: Make, make_batch: Batch) -> None:
    model, sample = make_model(), make_batch()
    before = behavior(model, sample)
    add(model, GrowConfig(experts=2), sample, seed=0)
    with pytest.raises(RuntimeError, match="growth changed the logits by nan"):
        check_noop(model, sample, replace(before, hidden_BSD=before.hidden_BSD * float("nan")))


@pytest.mark.parametrize("kind", ["learned", "gshard", "relu"])
def test_the_proof_holds_to_the_bit(
    make_model: Make, make_batch: Batch, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lifelong_moe.growth.noop.TOLERANCE", 0.0)
    add(make_model(kind), GrowConfig(experts=2), make_batch(), seed=0)


def test_gates_of_experts_that_are_not_used_are_zero() -> None:
    routing = Routing(torch.tensor([[2, 0], [-1, 1], [-1, -1]]), torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.5, 0.5]]), 3)
    expected = torch.tensor([[0.3, 0, 0.7, 0], [0, 0.6, 0, 0], [0, 0, 0, 0]])
    assert torch.equal(noop._gates(routing, 4), expected)


@pytest.mark.parametrize("generations", [(8,), (8, 8)])
def test_no_bit_of_the_logits_depends_on_what_came_later(
    make_model: Make, make_batch: Batch, any_router_kind: str, generations: tuple[int, ...]
) -> None:
    # BLAS rounds a product with 16 rows otherwise than one with 8, and top-k breaks exact ties otherwise.
    shape = {"layers": 6, "width": 64}
    model, sample = make_model(any_router_kind, generations, model=shape), make_batch(domains=len(generations))
    for layer in model.moe_layers():
        if layer.router.row_generations():
            newest_ED = layer.router.row_generations()[-1].detach()
            layer.router.set_rows(newest_ED[[0, 0, 2, 3, 4, 5, 6, 6]])
    before = logits_of(model, sample)
    add(model, GrowConfig(experts=8, init=ExpertInit.random), sample, seed=0)
    with ExitStack() as held:
        for layer in model.moe_layers():
            held.enter_context(layer.router.masking_newest())
        assert torch.equal(logits_of(model, sample), before)


def test_text_of_a_dense_model_uses_its_one_network_with_weight_1_whatever_grows(
    make_model: Make, make_batch: Batch
) -> None:
    model, sample = make_model("labelled_bundles", (1,)), make_batch()
    before = logits_of(model, sample)
    add(model, GrowConfig(experts=3), sample, seed=0)
    assert torch.equal(logits_of(model, sample), before)
    decided = behavior(model, sample).decisions.values()
    for x_TD, _, routing in decided:
        # top_k is 2: no expert of another generation runs in the place of a second one.
        assert routing.counts_E.tolist() == [len(x_TD), 0, 0, 0]
        assert torch.equal(routing.weights_TK, torch.tensor([[1.0, 0.0]]).expand(len(x_TD), 2))


def tied(make_model: Make) -> LanguageModel:
    """Experts 0 and 1, and 2 and 3, have equal logits, and are nothing like each other.

    Their rows differ in coordinate 0 alone, which is 0 in what routers are given.
    """
    model = make_model(model={"layers": 4}, routing={"top_k": 1, "renormalize": False})
    with torch.no_grad():
        for block, layer in zip(model.blocks, model.moe_layers(), strict=True):
            block.moe_norm.weight[0] = 0.0  # type: ignore[index, union-attr]
            (rows_ED,) = layer.router.row_generations()
            rows_ED[1], rows_ED[2], rows_ED[3] = rows_ED[0], -rows_ED[0], -rows_ED[0]
            rows_ED[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    return model


@contextmanager
def rounded_otherwise(model: LanguageModel) -> Iterator[None]:
    """As by other kernels: what routers are given differs by some millionths, up and down in turn."""

    def nudge(_: torch.nn.Module, given: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        x_TD, context = given[0].clone(), given[1]
        x_TD[:, 0] += 1e-6 * (1 - 2.0 * (torch.arange(len(x_TD)) % 2))
        return x_TD, context

    with ExitStack() as nudged:
        for layer in model.moe_layers():
            nudged.callback(layer.router.register_forward_pre_hook(nudge).remove)
        yield


def test_near_ties_are_counted_and_change_nothing(make_model: Make, make_batch: Batch) -> None:
    model, sample = tied(make_model), make_batch()
    before = behavior(model, sample)
    add(model, GrowConfig(experts=2), sample, seed=0)
    with rounded_otherwise(model):
        with ExitStack() as held:
            for layer in model.moe_layers():
                held.enter_context(layer.router.masking_newest())
            alone = float((logits_of(model, sample) - logits_in(before, sample)).abs().max())
        assert alone > 0.1  # many tokens have the other expert, and what follows from there is something else
        # Tokens of even number are nudged to even experts, those of odd number to odd ones.
        chosen = torch.stack([routing.expert_ids_TK[:, 0] for _, _, routing in before.decisions.values()])
        wrong = int((chosen % 2 != torch.arange(64) % 2).sum())
        assert check_noop(model, sample, before) == wrong > 64


@pytest.mark.parametrize("fault", ["experts", "rows", "new rows", "biases"])
def test_a_fault_is_none_of_them(make_model: Make, make_batch: Batch, fault: str) -> None:
    model = make_model("sigmoid") if fault == "biases" else tied(make_model)
    sample = make_batch()
    before = behavior(model, sample)
    add(model, GrowConfig(experts=2), sample, seed=0)
    layer = list(model.moe_layers())[1]
    with torch.no_grad(), ExitStack() as faulty:
        if fault == "experts":
            layer.banks.born[0].down.mul_(1.01)
        elif fault == "rows":
            layer.router.row_generations()[0][:2, 1].add_(0.01)
        elif fault == "biases":
            layer.router.bias_0[0] += 0.5  # type: ignore[index, operator]
        else:
            faulty.enter_context(pytest.MonkeyPatch.context()).setattr(Router, "available", property(born))
        said = "logits" if fault == "experts" else "what layer .'s router decides"
        faulty.enter_context(rounded_otherwise(model))
        with pytest.raises(RuntimeError, match=f"growth changed (the )?{said}"):
            check_noop(model, sample, before)


def born(router: Router) -> list[int]:
    """All generations, the masked one among them."""
    return router.generations


def test_most_used_by_hand() -> None:
    assert most_used(torch.tensor([3, 9, 9, 1]), 3) == [1, 2, 0]  # a tie goes to the lower index
    assert most_used(torch.full((3000,), 5), 2) == [0, 1]
    assert most_used(torch.tensor([1, 2]), 5) == [1, 0, 1, 0, 1]


def test_a_bundle_copies_the_most_used_of_the_bundle_before_it(make_model: Make, make_batch: Batch) -> None:
    model, sample = make_model("bundles", (2, 4)), make_batch(domains=2)
    counts = usage(model, sample)
    config = GrowConfig(experts=2, init=ExpertInit.copy, noise=0.0, router=RouterInit.copy)
    add(model, config, sample, seed=0)
    orders = [sorted(range(2, 6), key=lambda e: -counts_E[e])[:2] for counts_E in counts]
    assert orders != [[2, 3], [2, 3]]  # else it could be by index alone
    for layer, order in zip(model.moe_layers(), orders, strict=True):
        experts = layer.banks.matrices()
        for (gate_up, _), source in zip(experts[-2:], order, strict=True):
            assert torch.equal(gate_up, experts[source][0])
        assert torch.equal(rows(layer.router)[-1], rows(layer.router)[1][[e - 2 for e in order]])


def usage(model: LanguageModel, sample: dict[str, Tensor]) -> list[list[int]]:
    return [seen.counts_E.tolist() for seen in observe(model, sample)]


def test_copies_of_the_most_used_experts(make_model: Make, make_batch: Batch) -> None:
    model, sample = make_model(), make_batch()
    counts = usage(model, sample)
    add(model, GrowConfig(experts=2, init=ExpertInit.copy, noise=0.0, router=RouterInit.copy), sample, seed=0)
    for layer, counts_E in zip(model.moe_layers(), counts, strict=True):
        order = sorted(range(4), key=lambda e: -counts_E[e])
        experts = layer.banks.matrices()
        for copied, source in zip(experts[-2:], order[:2], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(copied, experts[source], strict=True))
        old_rows, new_rows = rows(layer.router)
        assert torch.equal(new_rows, old_rows[order[:2]])


def test_noise_is_relative_to_the_copied_matrix(make_model: Make, make_batch: Batch) -> None:
    model = make_model(model={"width": 64, "expert_width": 64})
    sample = make_batch()
    counts, drawn = usage(model, sample), []
    add(model, GrowConfig(experts=1, init=ExpertInit.copy, noise=0.1), sample, seed=0)
    for layer, counts_E in zip(model.moe_layers(), counts, strict=True):
        experts = layer.banks.matrices()
        for new, old in zip(experts[-1], experts[counts_E.index(max(counts_E))], strict=True):
            drawn.append(((new - old) / old.std()).flatten())
            assert float(drawn[-1].std()) == pytest.approx(0.1, rel=0.03)
    assert kstest(torch.cat(drawn).numpy(), norm(scale=0.1).cdf).pvalue > 0.05


def test_random_experts_and_rows(make_model: Make, make_batch: Batch) -> None:
    model, sample = make_model(model={"width": 64, "expert_width": 64}), make_batch()
    add(model, GrowConfig(experts=32, init=ExpertInit.random, router=RouterInit.random), sample, seed=0)
    drawn = []
    for layer in model.moe_layers():
        gate_up, down = (matrix.detach() for matrix in layer.banks.born[1].parameters())
        assert float(gate_up.std()) == pytest.approx(0.3, rel=0.01)  # init_std of the fixture
        assert float(down.std()) == pytest.approx(0.3 / (2 * 2) ** 0.5, rel=0.01)  # two layers of two residuals each
        old_rows, new_rows = rows(layer.router)
        drawn.append((new_rows / old_rows.std()).flatten())
    assert kstest(torch.cat(drawn).numpy(), norm.cdf).pvalue > 0.05


def test_centroid_rows_point_at_the_new_data(make_model: Make, make_batch: Batch) -> None:
    model, sample = make_model(), make_batch()
    inputs = [seen.inputs_ND for seen in observe(model, sample, range(2))]
    add(model, GrowConfig(experts=2, router=RouterInit.centroid), sample, seed=0)
    for layer, x in zip(model.moe_layers(), inputs, strict=True):
        assert x is not None
        old_rows, new_rows = rows(layer.router)
        torch.testing.assert_close(new_rows.norm(dim=1), old_rows.norm(dim=1).mean().expand(2))
        # Each hidden state is nearer to one of two centroids than to the mean of them all.
        unit = torch.nn.functional.normalize(x, dim=-1)
        nearest = (unit @ torch.nn.functional.normalize(new_rows, dim=-1).t()).max(dim=1).values
        assert float(nearest.mean()) > float((unit @ torch.nn.functional.normalize(x.mean(0), dim=0)).mean())


def test_a_seed_decides(make_model: Make, make_batch: Batch) -> None:
    grown = []
    for seed in (1, 1, 2):
        model = make_model()
        add(model, GrowConfig(experts=2), make_batch(), seed=seed)
        grown.append(model.state_dict())
    assert all(torch.equal(grown[0][name], grown[1][name]) for name in grown[0])
    differing = {name for name in grown[0] if not torch.equal(grown[0][name], grown[2][name])}
    assert differing == {n for n in grown[0] if "experts.4." in n or "experts.5." in n or "rows.1" in n}


def test_frozen_tensors_do_not_train_and_stay_the_same_bits(
    make_run: Callable[..., RunConfig], make_model: Make, make_batch: Batch, any_router_kind: str
) -> None:
    model, batch = make_model(any_router_kind), make_batch(domains=2)
    spec = stage_specs(make_run(*(f"stage_defaults.{kv}" for kv in ("optim.lr=0.1", "optim.weight_decay=0.5"))))[1]
    old = {name for name, _ in model.named_parameters() if ".moe." in name}
    add(model, GrowConfig(experts=2), make_batch(), seed=0)
    optimizer, _ = build_optimizer(model, spec, spec.phases()[0])
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(4):
        optimizer.zero_grad()
        hidden = model(TokenBatch(batch["token_ids"], domain_ids_BS=batch["domain_ids"])).hidden_BSD
        logits = model.head.logits(hidden).flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, batch["target_ids"].flatten()).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name in old:
            assert id(parameter) not in known and parameter.grad is None, name
            assert torch.equal(parameter, before[name]), name
        else:
            assert id(parameter) in known, name
            assert not torch.equal(parameter, before[name]), name


def test_only_some_layers_grow(make_model: Make, make_batch: Batch) -> None:
    model, sample = make_model(model={"layers": 3}), make_batch()
    before = behavior(model, sample)
    add(model, GrowConfig(experts=2, router=RouterInit.random), sample, seed=0, layers=(1,))
    assert [len(layer.banks) for layer in model.moe_layers()] == [4, 6, 4]
    assert [layer.router.generations for layer in model.moe_layers()] == [[4, 0], [4, 2], [4, 0]]
    assert all([g.trains for g in layer.banks.born] == [False, True] for layer in model.moe_layers())
    assert [len(rows(layer.router)[-1]) for layer in model.moe_layers()] == [0, 2, 0]
    assert set(model.parameters_of(generation=1)) == {
        *(f"blocks.1.moe.banks.generations.1.{name}" for name in ("gate_up", "down")),
        "blocks.1.moe.router.rows.1",
    }
    assert check_noop(model, sample, before) == 0
    add(model, GrowConfig(experts=1), sample, seed=0, layers=(0,))
    assert [model.architecture.experts_in(layer) for layer in range(3)] == [5, 6, 4]


def test_growth_that_freezes_nothing(make_model: Make, make_batch: Batch) -> None:
    model, sample = make_model(), make_batch()
    before = behavior(model, sample)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    add(model, GrowConfig(experts=2, old_lr_scale=0.1), sample, seed=0)
    assert model.architecture.frozen == 0 and all(p.requires_grad for p in model.parameters())
    assert all(generation.trains for layer in model.moe_layers() for generation in layer.banks.born)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in old.items())
    assert check_noop(model, sample, before) == 0


def test_what_was_frozen_stays_frozen(make_model: Make, make_batch: Batch) -> None:
    model = make_model("learned", (4, 2))
    add(model, GrowConfig(experts=2, old_lr_scale=0.1), make_batch(), seed=0)
    assert model.architecture.frozen == 1
    trained = {name for name in model.stored_names(trained=True) if ".experts." in name}
    assert {int(name.split(".experts.")[1].split(".")[0]) for name in trained} == {4, 5, 6, 7}


def test_observing_leaves_the_model_as_it_was(make_model: Make, make_batch: Batch) -> None:
    for training in (True, False):
        model, sample = make_model().train(training), make_batch(blocks=3)
        seen = [*observe(model, sample, [1])]
        assert model.training is training
        assert not any(layer._forward_pre_hooks for layer in model.moe_layers())
        assert seen[0].inputs_ND is None  # not asked for
        assert seen[1].inputs_ND is not None and seen[1].inputs_ND.shape == (48, 16)
        assert all(int(one.counts_E.sum()) == 48 * 2 for one in seen)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"experts": -1}, r"grow\.experts=-1"),
        ({"noise": -0.1}, r"grow\.noise=-0\.1"),
        ({"sample_tokens": 0}, "positive"),
        ({"old_lr_scale": 1.5}, r"grow\.old_lr_scale=1\.5 must lie in \[0, 1\]"),
        ({"old_until": -0.5}, r"grow\.old_until=-0\.5 must lie in \[0, 1\]"),
        ({"layers": []}, r"grow\.layers=\[\] must name layers in ascending order, each once"),
        ({"layers": [1, 0]}, r"grow\.layers=\[1, 0\] must name layers in ascending order"),
        ({"layers": [1, 1]}, r"grow\.layers=\[1, 1\] must name layers in ascending order"),
    ],
)
def test_values_out_of_range(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GrowConfig(**keys)


@pytest.mark.parametrize("router", [RouterInit.random, RouterInit.centroid])
def test_an_upcycled_model_is_the_dense_one_at_first(make_model: Make, make_batch: Batch, router: RouterInit) -> None:
    model, sample = make_model("learned", (1,)), make_batch()
    before = logits_of(model, sample)
    config = GrowConfig(experts=7, init=ExpertInit.upcycle, router=router, old_lr_scale=1.0)
    add(model, config, sample, seed=0)
    routings = model(TokenBatch(sample["token_ids"])).routings
    assert all(routing.expert_ids_TK.shape[1] == 2 for routing in routings)  # the dense model had one to choose
    assert len(routings[0].expert_ids_TK.unique()) > 4  # and the new ones are used
    torch.testing.assert_close(logits_of(model, sample), before, atol=2e-6, rtol=0)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.experts=2", "copies a dense model: set model.experts=1"),
        ("routing.renormalize=false", "needs gates that sum to 1"),
        ("routing.gate_scale=2.0", "needs gates that sum to 1"),
    ],
)
def test_what_cannot_be_upcycled(override: str, message: str) -> None:
    raw = OmegaConf.create(build_raw())
    for one in ("model.experts=1", "routing.mode=learned", "stages[1].grow.init=upcycle", override):
        apply_override(raw, one)
    with pytest.raises(ConfigError, match=message):
        build_config(raw)
