"""The report of a run (``report.json``), built from evaluations and facts about its stages. Pure.

Keys of schema 4 (schema 3 had no ``…_bits_per_byte`` of forgetting and transfer; in schema 2, each one's
number ``unused_experts`` was called ``dead_experts``); matrices have a row for each stage and a column for each
distribution.
An old distribution is one that a stage before the last one learned, and no later one:

==================================  ===================================================================================
``schema``                          4
``run``, ``method``                 names
``seed``                            of the run
``distributions``                   columns: trained distributions in order of first use, then those only evaluated
``not_measured``                    distributions without a column because their held-out text is gone
``loss_at_init``                    nats per token of the untrained model, by column
``bits_per_byte_at_init``           the same in bits per byte of source text
``loss_nats_per_token``             the loss matrix R
``bits_per_byte``                   the same in bits per byte
``forgetting_bits_per_byte``        {old distribution: loss after the last stage − loss after it was last learned}
``forward_transfer_bits_per_byte``  mean over later distributions of the loss of the untrained model − that just before
                                    the first training; null with one stage
``forgetting``                      {distribution: R[last, j] − R[j, j]} in nats, trained distributions; 0 for those of
                                    the last stage
``backward_transfer``               mean over old distributions of R[j, j] − R[last, j] in nats; null with one stage
``forward_transfer``                as above, in nats
``bytes_per_token``                 {distribution: bytes of text a token}, held-out text
``from_scratch``                    {distribution: {``nats_per_token``, ``bits_per_byte``, ``tokens``,
                                    ``active_flops``}} of models that learned only this one, from as many tokens; only
                                    for ``unrestrained``. Of a mixture: of a model that learned only it
``stages``                          a list of the stages: see :class:`StageReport`
``routing``                         {distribution: {``entropy``, ``max_over_mean``, ``unused_experts``, ``leak``}} after
                                    the last stage
``expert_counts``                   {distribution: assignments per layer and expert} after the last stage
``mixture``                         {distribution: {``shares``: {stage: mean weight of its generation}, ``readers``:
                                    mean number of generations that read a token}} after the last stage; empty where
                                    one is selected
``dead_experts``                    number of experts, over all layers, that no distribution uses after the last stage
==================================  ===================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lifelong_moe.evaluation.evaluation import Evaluation
from lifelong_moe.evaluation.routing import RoutingStatistics, dead_experts, routing_statistics
from lifelong_moe.reports.matrix import backward_transfer, forgetting, forward_transfer
from lifelong_moe.storage.grammars import Key, Name, Sha256
from lifelong_moe.storage.plain import PlainError, from_plain

SCHEMA = 4
"""Version of the layout of ``report.json``."""
SINCE_BITS = 4
"""The first schema with forgetting in bits per byte."""
BEFORE = "(before)"
"""Row of the model before its first stage: untrained, or the checkpoint as it came. No stage is named so."""
MOST_NATS = 700
"""Largest forgetting of a token whose rise of perplexity is a number."""


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """A stage in the report, its fields in the order of the file."""

    name: Name
    data: Name
    """The stage's distribution; of a mixture, that with the largest share."""
    learns: Sequence[Name]
    """Distributions by which it is judged: ``[data]``, or all of a joint stage, or those of a mixture that no earlier
    stage learned (all of them if there are none such)."""
    key: Key
    routing: str
    experts_per_layer: int
    parameters_total: int
    parameters_active: int
    """Parameters that one token uses."""
    parameters_trainable: int
    tokens: int
    active_flops: float
    tokens_per_second: float
    seconds: float
    epochs: float
    """Passes over the stage's own text; of a mixture, the most over one of its distributions."""
    shared: bool
    """Whether another run trained it."""
    weights_sha256: Sha256
    training: Mapping[str, Any]
    """Everything else that training measured."""


@dataclass(frozen=True, kw_only=True)
class ScratchReport:
    """A model that learned one distribution and nothing else."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    active_flops: float | None = None
    """None in reports of earlier versions, which did not count it."""


@dataclass(frozen=True, kw_only=True)
class MixtureUse:
    """How a model's generations predict a distribution together."""

    shares: Mapping[Name, float]
    """Mean weight of each generation, by the stage that it was born in."""
    readers: float
    """Generations that read a token, in the mean: what predicting costs, in forward passes of one generation."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The content of ``report.json``; the table above explains the fields."""

    schema: int = SCHEMA
    run: Name
    method: Name
    seed: int
    distributions: Sequence[Name]
    not_measured: Sequence[Name] = ()
    loss_at_init: Sequence[float]
    bits_per_byte_at_init: Sequence[float]
    loss_nats_per_token: Sequence[Sequence[float]]
    bits_per_byte: Sequence[Sequence[float]]
    forgetting: Mapping[str, float]
    backward_transfer: float | None
    forward_transfer: float | None
    forgetting_bits_per_byte: Mapping[str, float] = field(default_factory=dict)
    forward_transfer_bits_per_byte: float | None = None
    from_scratch: Mapping[str, ScratchReport]
    bytes_per_token: Mapping[str, float]
    stages: tuple[StageReport, ...]
    routing: Mapping[str, RoutingStatistics]
    expert_counts: Mapping[str, Sequence[Sequence[float]]]
    mixture: Mapping[str, MixtureUse] = field(default_factory=dict)
    dead_experts: int | None = None

    @classmethod
    def from_json(cls, data: Any) -> Report:
        """Read a report of this version or an earlier one.

        Raises:
            PlainError: If it is no report, or a later version wrote it.
        """
        if not isinstance(data, Mapping) or not isinstance(schema := data.get("schema"), int):
            raise PlainError("not the report of a run")
        if schema > SCHEMA:
            raise PlainError(
                f"the report of run {data.get('run')} has schema {schema}, but this version reads up to {SCHEMA}; "
                f"update lifelong-moe"
            )
        report = from_plain(cls, {**data, "routing": _renamed(data.get("routing"))})
        _check(report)
        if schema < SINCE_BITS:
            after = _learned_after(report.distributions, report.stages)
            lost, forward = _in_bits(after, report.bits_per_byte, report.bits_per_byte_at_init)
            report = replace(report, forgetting_bits_per_byte=lost, forward_transfer_bits_per_byte=forward)
        _check_forgetting(report)
        return report

    def to_json(self) -> Mapping[str, Any]:
        """Plain JSON data, in the order of the table above."""
        return asdict(self)

    def learned_last(self) -> dict[str, int]:
        """For each measured distribution that a stage learned, the index of the last such stage."""
        return {name: places[-1] for name, places in _learned_after(self.distributions, self.stages).items()}

    def forgetting_rise(self) -> dict[str, float]:
        """Forgetting of each old distribution as a relative rise of perplexity."""
        return {name: math.expm1(self.forgetting[name]) for name in self.forgetting_bits_per_byte}

    def learned(self) -> dict[str, float]:
        """Bits per byte right after it was last learned, of each distribution that a stage after the first learned."""
        # Of the first stage's alone: nothing was there that could have held it back.
        column = {name: j for j, name in enumerate(self.distributions)}
        return {name: self.bits_per_byte[i][column[name]] for name, i in self.learned_last().items() if i > 0}

    def changed_by_training(self) -> dict[str, float]:
        """Change of the loss in bits per byte by the stage that last learned it, of those of :meth:`learned`."""
        column = {name: j for j, name in enumerate(self.distributions)}
        last, losses = self.learned_last(), self.bits_per_byte
        return {name: value - losses[last[name] - 1][column[name]] for name, value in self.learned().items()}

    def leaks(self) -> dict[str, float]:
        """Router leak of each distribution after which the model grew; any other has 0 by definition."""
        experts = [stage.experts_per_layer for stage in self.stages]
        # Where generations predict together, a text is no generation's own.
        grown = {} if self.mixture else {n: i for n, i in self.learned_last().items() if experts[-1] > experts[i]}
        return {name: self.routing[name].leak for name in grown}


def as_written(data: Any) -> Mapping[str, Any]:
    """A stored report as it was written, with every key of an earlier version; arguments and errors as for
    :meth:`Report.from_json`."""
    Report.from_json(data)
    written: Mapping[str, Any] = data
    return written


def _renamed(routing: Any) -> Any:
    """Statistics of a report under their current names."""
    # Schema 2 called a distribution's unused experts dead. What is no mapping, `from_plain` refuses.
    names = {"dead_experts": "unused_experts"}
    if not isinstance(routing, Mapping) or not all(isinstance(one, Mapping) for one in routing.values()):
        return routing
    return {name: {names.get(key, key): value for key, value in one.items()} for name, one in routing.items()}


def _check(report: Report) -> None:
    """Require that matrices have a row for each stage and a column for each distribution."""
    width, height = len(report.distributions), len(report.stages)
    for name in ("loss_nats_per_token", "bits_per_byte"):
        rows = getattr(report, name)
        if not rows or len(rows) != height or any(len(row) != width for row in rows):
            raise PlainError(f"must have {height} rows of {width} numbers", f".{name}")
    for name in ("loss_at_init", "bits_per_byte_at_init"):
        if len(getattr(report, name)) != width:
            raise PlainError(f"must have {width} numbers", f".{name}")
    for name in ("bytes_per_token", "routing", "expert_counts"):
        if set(getattr(report, name)) != set(report.distributions):
            raise PlainError("must have an entry for each distribution", f".{name}")


def _check_forgetting(report: Report) -> None:
    """Require that what was forgotten is of old distributions, and no more than a perplexity can rise."""
    old = {name for name, last in report.learned_last().items() if last < len(report.stages) - 1}
    if set(report.forgetting_bits_per_byte) != old:
        raise PlainError("must have an entry for each old distribution", ".forgetting_bits_per_byte")
    if not old <= set(report.forgetting) or any(abs(nats) > MOST_NATS for nats in report.forgetting.values()):
        raise PlainError(f"must have at most {MOST_NATS} nats for each old distribution", ".forgetting")


def _learned_after(distributions: Sequence[str], stages: Sequence[StageReport]) -> dict[str, list[int]]:
    """For each column that was learned, the indices of the stages that learned it."""
    after = {name: [i for i, stage in enumerate(stages) if name in stage.learns] for name in distributions}
    return {name: places for name, places in after.items() if places}


def _in_bits(
    after: Mapping[str, Sequence[int]], matrix: Sequence[Sequence[float]], init: Sequence[float]
) -> tuple[dict[str, float], float | None]:
    """Forgetting and forward transfer in bits per byte; ``after`` has the learned columns, which are the first ones."""
    lost = forgetting(matrix, [places[-1] for places in after.values()]).tolist()
    # What the last stage learned was not followed by anything.
    old = {
        name: value for (name, places), value in zip(after.items(), lost, strict=True) if places[-1] < len(matrix) - 1
    }
    forward = forward_transfer(matrix, init, [places[0] for places in after.values()])
    return old, forward


@dataclass(kw_only=True)
class RunResults:
    """The results of a run so far; grows stage by stage."""

    run: str
    method: str
    seed: int
    distributions: Sequence[str]
    """Columns."""
    not_measured: Sequence[str] = ()
    """Distributions whose held-out text is gone."""
    init: Mapping[str, Evaluation]
    """Evaluations of the untrained model, by distribution."""
    stages: list[StageReport] = field(default_factory=list)
    evaluations: list[Mapping[str, Evaluation]] = field(default_factory=list)
    """Evaluations after each stage, by distribution."""
    from_scratch: dict[str, ScratchReport] = field(default_factory=dict)
    """Loss and cost of the model that learned only this distribution, by distribution."""


def build_report(results: RunResults, births: Sequence[Sequence[int]]) -> Report:
    """Build the report of the stages so far.

    Args:
        results: Results of at least one stage.
        births: Birth stage of each expert of each layer of the last model, as an index.
    """
    distributions, init, evaluations = results.distributions, results.init, results.evaluations
    learned = _learned_after(distributions, results.stages)
    # Forward transfer looks at the first training on a distribution, forgetting at the last.
    first, last = [places[0] for places in learned.values()], [places[-1] for places in learned.values()]
    nats = [[row[name].nats_per_token for name in distributions] for row in evaluations]
    bits = [[row[name].bits_per_byte for name in distributions] for row in evaluations]
    init_bits = [init[name].bits_per_byte for name in distributions]
    init_nats = [init[name].nats_per_token for name in distributions]
    lost, forward = _in_bits(learned, bits, init_bits)
    counts = {name: evaluations[-1][name].expert_counts for name in distributions}
    # Each generation has experts in some layer.
    born = sorted({birth for layer in births for birth in layer})
    # A distribution that no stage learned counts as learned after the last: then no expert is born later, none leaks.
    never = [len(results.stages)]
    return Report(
        run=results.run,
        method=results.method,
        seed=results.seed,
        distributions=list(distributions),
        not_measured=list(results.not_measured),
        loss_at_init=init_nats,
        bits_per_byte_at_init=init_bits,
        loss_nats_per_token=nats,
        bits_per_byte=bits,
        forgetting=dict(zip(learned, forgetting(nats, last).tolist(), strict=True)),
        backward_transfer=backward_transfer(nats, last),
        forward_transfer=forward_transfer(nats, init_nats, first),
        forgetting_bits_per_byte=lost,
        forward_transfer_bits_per_byte=forward,
        from_scratch=dict(results.from_scratch),
        bytes_per_token={name: init[name].bytes / init[name].tokens for name in distributions},
        stages=tuple(results.stages),
        routing={
            name: routing_statistics(counts[name], births, learned.get(name, never)[-1]) for name in distributions
        },
        expert_counts=counts,
        mixture={
            name: MixtureUse(
                shares={results.stages[i].name: share for i, share in zip(born, found.shares, strict=True)},
                readers=found.readers,
            )
            for name, found in evaluations[-1].items()
            if found.shares
        },
        dead_experts=dead_experts(list(counts.values())),
    )
