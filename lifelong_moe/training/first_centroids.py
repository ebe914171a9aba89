"""The first generation's centroids, fitted to its own text alone and committed apart from the stage.

With one generation there is nothing to choose from, so the first stage is the same with and without
``routing.bundles``: it has one key and is trained once. The centroids that tell its text from later text are fitted as
soon as it is committed, and no later stage needs that text again. Of a checkpoint there is no text: its model writes
some, from a seed, which is forgotten once the centroids are committed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.config.parts import document_centroids
from lifelong_moe.config.routing.base import Bundles, Centroids, RoutingConfig
from lifelong_moe.config.routing.shared import TextClusterConfig
from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.data.tokens.shards import ShardDocuments, TokenizedCorpus
from lifelong_moe.errors import ConfigError
from lifelong_moe.storage.keys import SHORT, content_key
from lifelong_moe.store.record import StageRecord
from lifelong_moe.store.stages import CommittedStage, StageStore

if TYPE_CHECKING:
    from torch import Tensor

FIRST_CENTROIDS = document_centroids(0)
"""Name of the tensor, here and in the models of later stages."""


def needs_first_centroids(routing: RoutingConfig) -> TypeGuard[TextClusterConfig]:
    """Whether a stage that grows with this routing needs the centroids of the first stage's text."""
    if not isinstance(routing, TextClusterConfig):
        return False
    return routing.bundles == Bundles.cluster and routing.centroids == Centroids.fitted


def find_centroids(store: StageStore, first: CommittedStage, routing: TextClusterConfig) -> CommittedStage | None:
    """The centroids of a first stage's text if they are committed; arguments as for :func:`first_centroids`."""
    return store.find(content_key(_identity(first, routing)))


def first_centroids(
    store: StageStore,
    first: CommittedStage,
    routing: TextClusterConfig,
    corpora: Mapping[str, TokenizedCorpus],
    trainer: TrainerConfig,
) -> CommittedStage:
    """Fit the centroids of a first stage's text and commit them, or find them committed.

    Args:
        store: Where stages are.
        first: A stage without a parent.
        routing: With ``bundles=cluster`` and fitted centroids; ``clusters`` and ``feature_width`` matter, for a
            checkpoint ``sample_tokens`` as well.
        corpora: Tokenized text by distribution; read only if there is something to fit, and none for a checkpoint.
        trainer: Names the device on which a checkpoint writes.

    Raises:
        ConfigError: If the text is no longer what the stage learned from.
        DataError: If it has fewer documents than there are clusters.
    """
    if (found := find_centroids(store, first, routing)) is not None:
        return found
    identity = _identity(first, routing)
    # Hashes of the training split: with other text, or another held-out part, the same key would mean other centroids.
    for name, text in first.split.items():
        if name not in corpora or corpora[name].split_hash != text:
            raise ConfigError(
                f"routing.bundles=cluster needs centroids of the text that stage {first.name} learned, but "
                f"distributions.{name} no longer is that text ({text[:SHORT]}). Restore it, or set "
                f"routing.bundles=none."
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
    # Only now torch is imported: a run whose centroids are there does without.
    return store.commit(record, {}, {FIRST_CENTROIDS: _fitted(store, first, routing, corpora, trainer)})


def _fitted(
    store: StageStore,
    first: CommittedStage,
    routing: TextClusterConfig,
    corpora: Mapping[str, TokenizedCorpus],
    trainer: TrainerConfig,
) -> Tensor:
    """The centroids of the text that a first stage learned, or that a checkpoint writes."""
    import torch

    from lifelong_moe.growth.clusters import unigram_centroids

    documents: Sequence[NDArray[np.integer]]
    if first.is_imported:
        documents = _written_documents(store, first, routing, trainer)
    else:
        documents = ShardDocuments([corpora[name].train for name in first.spec.learns])
    centroids = unigram_centroids(
        documents,
        first.architecture.vocab_size,
        routing.num_clusters(first.architecture.generations[0].experts),
        width=routing.feature_width,
        # The stage's own seed, not that of the run that asks: its centroids are the same for every run.
        seed=first.spec.seed,
    )
    return torch.from_numpy(centroids)


def _identity(first: CommittedStage, routing: TextClusterConfig) -> dict[str, str | int | list[int]]:
    """What the centroids depend on; their content address."""
    found: dict[str, str | int | list[int]] = {
        "derived": "centroids",
        "from": first.key,
        "clusters": routing.num_clusters(first.architecture.generations[0].experts),
        "feature_width": routing.feature_width,
    }
    written: dict[str, str | int | list[int]] = {"written_tokens": routing.sample_tokens, "seed": first.spec.seed}
    # Left out as in centroids from before there were such.
    written |= {"text_ends": list(first.spec.text_ends)} if first.spec.text_ends else {}
    # A checkpoint's model learned no text that is here.
    return found | written if first.is_imported else found


def _written_documents(
    store: StageStore, first: CommittedStage, routing: TextClusterConfig, trainer: TrainerConfig
) -> list[NDArray[np.integer]]:
    """Documents that a checkpoint's model writes, each with its separator first."""
    from lifelong_moe.retention.generated import generate_blocks
    from lifelong_moe.training.loop.device import on_configured_device
    from lifelong_moe.training.restore import load_model

    context, bos_id = first.architecture.model.context, first.architecture.bos_id
    model, blocks = on_configured_device(load_model(store, first), trainer), max(1, routing.sample_tokens // context)
    rows = generate_blocks(model, blocks, context=context, seed=first.spec.seed, ends=first.spec.text_ends)
    written = (part for row in rows for part in np.split(row, np.flatnonzero(row == bos_id)[1:]))
    # Two separators in a row are a document without text, by which nothing is recognized.
    return [document for document in written if len(document) > 1]
