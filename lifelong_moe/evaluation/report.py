"""The machine-readable result of a run. Pure: from numbers and names to plain JSON data.

Keys of ``report.json`` (schema 3; in schema 2 there was no ``dead_experts`` but for each distribution by itself, where
it now is ``unused_experts``); matrices have a row after each stage and a column for each distribution:

===========================  ==================================================================================
``schema``                   3
``run``, ``method``          names
``seed``                     of the run
``distributions``            columns: the trained ones in order of first use, then those only evaluated
``not_measured``             those that would be columns, but their held-out text is gone
``loss_at_init``             nats per token of the untrained model, by column
``bits_per_byte_at_init``    the same in bits per byte of source text
``loss_nats_per_token``      the loss matrix R
``bits_per_byte``            the same in bits per byte
``forgetting``               {distribution: R[last, j] − R[j, j]} in nats, trained distributions
``backward_transfer``        mean over earlier distributions of R[j, j] − R[last, j]; null with one stage
``forward_transfer``         mean over later distributions of R_init[j] − R[j−1, j]; null with one stage
``bytes_per_token``          {distribution: bytes of text a token}, held-out text
``from_scratch``             {distribution: {``nats_per_token``, ``bits_per_byte``, ``tokens``, ``active_flops``}} of
                             models that learned nothing else, at the same tokens; empty but for ``unrestrained``
``stages``                   a list, one object a stage: ``name``, ``data``, ``learns`` (every distribution it was
                             there to learn: ``[data]``, or all of a joint run), ``key``, ``routing``,
                             ``experts_per_layer``, ``parameters_total``, ``parameters_active``,
                             ``parameters_trainable``, ``tokens``, ``active_flops``, ``tokens_per_second``,
                             ``seconds``, ``epochs``, ``shared`` (trained by another run), ``weights_sha256``,
                             ``training`` (what else training measured)
``routing``                  {distribution: {``entropy``, ``max_over_mean``, ``unused_experts``, ``leak``}} after the
                             last stage
``expert_counts``            {distribution: assignments per layer and expert} after the last stage
``dead_experts``             experts, over all layers, that no distribution uses after the last stage
===========================  ==================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lifelong_moe.evaluation.matrix import backward_transfer, forgetting, forward_transfer
from lifelong_moe.evaluation.routing import dead_experts, routing_statistics

if TYPE_CHECKING:  # torch is imported there
    from lifelong_moe.evaluation.loss import Evaluation

SCHEMA = 3


def build_report(
    *,
    run: str,
    method: str,
    seed: int,
    distributions: Sequence[str],
    not_measured: Sequence[str] = (),
    init: Mapping[str, Evaluation],
    evaluations: Sequence[Mapping[str, Evaluation]],
    stages: Sequence[Mapping[str, Any]],
    births: Sequence[Sequence[int]],
    from_scratch: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Build the report of the stages there are so far.

    Args:
        run: Name of the run.
        method: Its method.
        seed: Its seed.
        distributions: Columns.
        not_measured: Distributions that can be measured no more.
        init: Evaluation of the untrained model by distribution.
        evaluations: For each stage, evaluations by distribution.
        stages: For each stage, the fields that the table above lists.
        births: Stage in which each expert of each layer was born, after the last stage.
        from_scratch: Evaluation of the model that learned one distribution alone, by distribution.
    """
    trained = [stage["learns"] for stage in stages]
    columns = [name for name in distributions if any(name in learned for learned in trained)]
    learning = {name: [i for i, learned in enumerate(trained) if name in learned] for name in columns}
    learned_after = [learning[name][-1] for name in columns]
    first_learned = [learning[name][0] for name in columns]
    nats = [[row[name].nats_per_token for name in distributions] for row in evaluations]
    init_nats = [init[name].nats_per_token for name in distributions]
    last = evaluations[-1]
    statistics = {
        name: asdict(
            routing_statistics(
                last[name].expert_counts,
                births,
                learned_after[columns.index(name)] if name in columns else len(stages),
            )
        )
        for name in distributions
    }
    return {
        "schema": SCHEMA,
        "run": run,
        "method": method,
        "seed": seed,
        "distributions": list(distributions),
        "not_measured": list(not_measured),
        "loss_at_init": init_nats,
        "bits_per_byte_at_init": [init[name].bits_per_byte for name in distributions],
        "loss_nats_per_token": nats,
        "bits_per_byte": [[row[name].bits_per_byte for name in distributions] for row in evaluations],
        "forgetting": dict(zip(columns, forgetting(nats, learned_after).tolist(), strict=True)),
        "backward_transfer": backward_transfer(nats, learned_after),
        "forward_transfer": forward_transfer(nats, init_nats, first_learned),
        "from_scratch": {name: dict(values) for name, values in from_scratch.items()},
        "bytes_per_token": {name: init[name].bytes / init[name].tokens for name in distributions},
        "stages": [dict(stage) for stage in stages],
        "routing": statistics,
        "expert_counts": {name: last[name].expert_counts for name in distributions},
        "dead_experts": dead_experts([last[name].expert_counts for name in distributions]),
    }
