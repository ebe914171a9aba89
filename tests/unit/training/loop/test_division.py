"""A step has one objective, however it is divided into micro-batches: weights, gradient and curves, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong_moe.data.tokens.blocks import BlockDataset
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.phase import Trains
from lifelong_moe.training.loop.module import StageModule
from lifelong_moe.training.loop.optimizer import phase_parameters
from tests.divided import CASES, SEQUENCES, STEPS, MakeModel, MakeRun, second_stage, take_steps


@pytest.fixture(autouse=True)
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in float32 by contract is so here, too, or rounding would hide what is compared."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def router_scores(model: LanguageModel, sample: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Logits of one sequence, and the scores that each layer's router gave its tokens."""
    inputs: list[Tensor] = []
    layers = list(model.moe_layers())
    hooks = [layer.router.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in layers]
    ids_BS, documents_BS = sample["token_ids"].unsqueeze(0), sample["document_ids"].unsqueeze(0)
    hidden_SD = model(TokenBatch(ids_BS, document_ids_BS=documents_BS)).hidden_BSD[0]
    for hook in hooks:
        hook.remove()
    rows = [torch.cat(layer.router.row_generations()) for layer in layers]
    return hidden_SD @ model.head.weight.t(), [x_SD @ r.t() for x_SD, r in zip(inputs, rows, strict=True)]


def by_hand(module: StageModule, dataset: BlockDataset) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The first step's curves and gradient: sums over its sequences, one at a time, by their number of tokens."""
    model, teacher, spec, phase = module.model, module._teacher[0], module.spec, module.phase
    nats, kl, old, z = ([torch.empty(0)] for _ in range(4))
    seen = {True: 0, False: 0}  # old and new sequences
    asked = 0
    for n in range(SEQUENCES):
        sample = dataset[n]
        is_old, scored, real = bool(sample["replayed"]), sample["scored"], sample["mask"]
        logits, scores = router_scores(model, sample)
        nats.append(F.cross_entropy(logits, sample["target_ids"], reduction="none")[scored])
        z += [s[real].logsumexp(1) ** 2 for s in scores]
        if is_old:
            old += [-s[real].softmax(1)[:, :4].sum(1).log() for s in scores]
        seen[is_old] += 1
        if teacher is not None and spec.distill is not None and phase.trains == Trains.stage:
            every = round(1 / spec.distill.fraction)
            if is_old == (spec.distill.text == "replay") and seen[is_old] % every == 0:
                with torch.no_grad():
                    told = (router_scores(teacher, sample)[0] / 2).log_softmax(1)  # the temperature is 2
                kl.append(4 * (told.exp() * (told - (logits / 2).log_softmax(1))).sum(1)[scored])
                asked += 1
    curves = {"loss": torch.cat(nats).mean(), "z_loss": torch.cat(z).mean()}
    objective = curves["loss"] + 2 * 0.00025 * curves["z_loss"]  # the sum of two layers
    if asked:
        assert spec.distill is not None
        share = 0.25 if spec.distill.text == "replay" else (1 - spec.replay.fraction) * spec.distill.fraction
        curves["distill_loss"] = torch.cat(kl).mean()
        objective = objective + spec.distill.weight * curves["distill_loss"] * asked / (SEQUENCES * share)
    if phase.old_loss:
        curves["old_loss"] = torch.cat(old).mean()
        objective = objective + phase.old_loss * curves["old_loss"]
    if module._anchor is not None:
        named, anchors = dict(model.named_parameters()), module._anchor.anchors
        pulls = [(named[name] - anchor).flatten() for name, anchor in anchors.items()]
        curves["penalty"] = 0.05 / 2 * torch.cat(pulls).square().sum()
        objective = objective + curves["penalty"]
    objective.backward()
    trained = phase_parameters(model, phase)
    detached = {name: value.detach() for name, value in curves.items()}
    return detached, {name: p.grad for name, p in trained.items() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_same_however_it_is_divided(make_run: MakeRun, make_model: MakeModel, case: str) -> None:
    begin = second_stage(make_run, make_model, case, balance_loss=0.0)  # balance is one of each micro-batch
    curves, gradient = by_hand(*begin())
    assert ("distill_loss" in curves) == ("distilled" in case)
    runs = []
    for accumulate in (1, 2, 4, 8):
        weights, watch = take_steps(begin, accumulate)
        assert set(watch.gradient) == set(gradient) and len(watch.curves) == STEPS
        for name, grad in gradient.items():
            torch.testing.assert_close(watch.gradient[name], grad, rtol=1e-9, atol=1e-12)
        expected = {name: pytest.approx(float(value), rel=1e-9) for name, value in curves.items()}
        norm = float(torch.nn.utils.get_total_norm(gradient.values()))
        known = {"imbalance": watch.curves[0]["imbalance"], "grad_norm": pytest.approx(norm, rel=1e-9)}
        assert watch.curves[0] == expected | known
        runs.append((weights, watch.curves))
    for weights, seen in runs[1:]:
        for name, tensor in runs[0][0].items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-8, atol=1e-10)
        assert seen == [pytest.approx(curve, rel=1e-8) for curve in runs[0][1]]
