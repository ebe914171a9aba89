"""The first generation's centroids: fitted on its own text alone, and committed apart from the stage.

While there is one generation, nothing chooses among generations: the first stage is the same with ``routing.bundles``
and without, has one key, and is trained once. What tells its text from later text is fitted as soon as the stage is
there, so that no later stage needs the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch

from lifelong_moe.config.parts import document_centroids
from lifelong_moe.config.routing.base import Bundles, Centroids, RoutingConfig
from lifelong_moe.config.routing.shared import TextClusterConfig
from lifelong_moe.data.tokens.shards import ShardDocuments, TokenizedCorpus
from lifelong_moe.errors import ConfigError
from lifelong_moe.growth.clusters import unigram_centroids
from lifelong_moe.storage.keys import SHORT, content_key
from lifelong_moe.store.record import StageRecord
from lifelong_moe.store.stages import CommittedStage, StageStore

FIRST_CENTROIDS = document_centroids(0)
"""Name of the tensor, here and in the models of later stages."""


def needs_first_centroids(routing: RoutingConfig) -> TypeGuard[TextClusterConfig]:
    """Whether a stage that grows with this routing needs centroids of the first stage's text."""
    if not isinstance(routing, TextClusterConfig):
        return False
    return routing.bundles == Bundles.cluster and routing.centroids == Centroids.fitted


def find_centroids(store: StageStore, first: CommittedStage, routing: TextClusterConfig) -> CommittedStage | None:
    """The centroids of a first stage's text if they were fitted before; arguments as for :func:`first_centroids`."""
    return store.find(content_key(_identity(first, routing)))


def _identity(first: CommittedStage, routing: TextClusterConfig) -> dict[str, Any]:
    clusters = routing.num_clusters(first.architecture.generations[0].experts)
    return {
        "derived": "centroids",
        "from": first.key,
        "clusters": clusters,
        "feature_width": routing.feature_width,
    }


def first_centroids(
    store: StageStore, first: CommittedStage, routing: TextClusterConfig, corpora: Mapping[str, TokenizedCorpus]
) -> CommittedStage:
    """Fit the centroids of a first stage's text and commit them, or find them committed.

    Args:
        store: Where stages are.
        first: A stage without a parent.
        routing: With ``bundles=cluster`` and fitted centroids; ``clusters`` and ``feature_width`` matter.
        corpora: Tokenized text by distribution; read only if there is something to fit.

    Raises:
        ConfigError: If the text is no longer what the stage learned from.
        DataError: If it has fewer documents than there are clusters.
    """
    if (found := find_centroids(store, first, routing)) is not None:
        return found
    identity = _identity(first, routing)
    for name, text in first.split.items():
        if name not in corpora or corpora[name].split_hash != text:
            raise ConfigError(
                f"routing.bundles=cluster needs centroids of the text that stage {first.name} learned, and "
                f"distributions.{name} is not that text ({text[:SHORT]}) any more. Bring it back, or set "
                f"routing.bundles=none."
            )
    documents = ShardDocuments([corpora[name].train for name in first.spec.learns])
    centroids = unigram_centroids(
        documents,
        first.architecture.vocab_size,
        identity["clusters"],
        width=routing.feature_width,
        seed=first.spec.seed,
    )
    record = StageRecord(
        key=content_key(identity),
        name=f"{first.name}.centroids",
        parent=first.key,
        spec=first.spec,
        architecture=first.architecture,
        data=first.data,
        split=first.split,
        tokenizer=first.tokenizer,
        derived=identity,
    )
    return store.commit(record, {}, {FIRST_CENTROIDS: torch.from_numpy(centroids)})
