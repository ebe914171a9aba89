"""Losses of models on held-out text, by distribution or by document, each measured once and then stored.

Models are named by their keys; a model is loaded only if a measurement is missing. Until then nothing imports torch,
which commands do without that find all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.config.run import RunConfig
from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.tokens.prepare import PreparedData
from lifelong_moe.data.tokens.shards import TokenShard, tokenize_documents
from lifelong_moe.data.tokens.windows import EvaluationSet, evaluation_windows, first_documents
from lifelong_moe.evaluation.evaluation import EVALUATION_SCHEMA, Evaluation, per_token_of
from lifelong_moe.evaluation.spread import spread_shard
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.retraining.bounds import DocumentLosses
from lifelong_moe.retraining.structure import shuffled_text
from lifelong_moe.storage.keys import content_key
from lifelong_moe.storage.plain import PlainError, from_plain
from lifelong_moe.store.evaluations import EvaluationStore
from lifelong_moe.store.readings import ReadingCache

if TYPE_CHECKING:
    from torch import Tensor

    from lifelong_moe.evaluation.readings import KeptReadings, Reading
    from lifelong_moe.model.transformer import LanguageModel

Load = Callable[[str], "LanguageModel"]
"""Returns the model of a key, on the device where it is measured."""
KEPT_SECONDS = 60.0
"""After this much time what was measured is stored, though more is to be measured."""
What = Literal["distribution", "documents", "shuffled documents"]


@dataclass(frozen=True, kw_only=True)
class StoredLosses:
    """Losses by document and assignments by expert, as they are stored."""

    nats: list[float]
    tokens: list[int]
    """Scored tokens of each document."""
    document: list[int]
    """Place of each among the distribution's held-out documents."""
    expert_counts: list[list[float]]
    """Assignments of scored tokens per layer and expert."""

    @classmethod
    def read(cls, data: Any, architecture: Architecture, documents: float) -> StoredLosses:
        """From plain JSON data.

        Args:
            data: What was stored.
            architecture: Of the model that was measured.
            documents: Number of held-out documents; infinite if it is not known.

        Raises:
            PlainError: If it is something else.
        """
        found = from_plain(cls, data)
        if not len(found.nats) == len(found.tokens) == len(found.document):
            raise PlainError("a loss, a number of tokens and a place belong to each document")
        if not all(0 <= place < documents for place in found.document):
            raise PlainError(f"must be below {documents}", ".document")
        if not found.tokens or min(found.tokens) < 0 or not any(found.tokens):
            raise PlainError("must count tokens, and some", ".tokens")
        _require_counts(found.expert_counts, architecture)
        return found


def read_evaluation(data: Any, architecture: Architecture) -> Evaluation:
    """An evaluation from plain JSON data; arguments and errors as for :meth:`StoredLosses.read`."""
    found = from_plain(Evaluation, data)
    for name in ("tokens", "bytes", "documents"):
        if getattr(found, name) < 1:
            raise PlainError("must be positive", f".{name}")
    _require_counts(found.expert_counts, architecture)
    return found


def _readings(wanted: Collection[int], architecture: Architecture, tensors: Mapping[str, Tensor]) -> dict[int, Reading]:
    """What stored tensors hold of some generations; raises a ValueError if they are something else."""
    from lifelong_moe.evaluation.readings import Reading

    there = {generation for generation in wanted if f"places.{generation}" in tensors}
    return {generation: Reading.from_tensors(tensors, generation, architecture) for generation in there}


def _require_counts(counts: Sequence[Sequence[float]], architecture: Architecture) -> None:
    """Require assignments in every layer that has experts, a number for each of them."""
    wanted = [architecture.experts_in(layer) for layer in range(architecture.model.layers)]
    if [len(layer) for layer in counts] != wanted or any(layer and min(layer) < 0 for layer in counts):
        raise PlainError(f"must have a count for each of {wanted} experts of the layers", ".expert_counts")
    if not all(sum(layer) for layer in counts if layer):
        raise PlainError("must count assignments in each layer with experts", ".expert_counts")


@dataclass(frozen=True)
class Measurements:
    """Measures models on a run's held-out text."""

    config: RunConfig
    data: PreparedData
    store: EvaluationStore
    load: Load
    architecture: Callable[[str], Architecture]
    """Of the model of a key; what is stored of a model with other experts is not believed."""
    cache: ReadingCache
    """What generations of mixtures said of held-out text."""

    @cached_property
    def kept(self) -> KeptReadings:
        """What these measurements read before."""
        from lifelong_moe.evaluation.readings import KeptReadings

        return KeptReadings()

    def measurable(self, without: Collection[str] = ()) -> list[str]:
        """Distributions with held-out text, in the run's order, except ``without``."""
        return [name for name in self.config.evaluated if name in self.data.heldout and name not in without]

    def unmeasurable(self) -> list[str]:
        """A sentence on each distribution without held-out text."""
        return [
            f"{name} is not measured: its text is gone, and no held-out text of it was kept."
            for name in self.config.evaluated
            if name not in self.data.heldout
        ]

    def known(self, models: Sequence[str]) -> list[str]:
        """Distributions with held-out text, or whose stored measurements cover all of these models."""
        return [
            name
            for name in self.config.evaluated
            if name in self.data.heldout or all(self._stored(model, name) is not None for model in models)
        ]

    def key(self, distribution: str, what: What = "distribution") -> str:
        """Hash of everything besides the model that a measurement depends on."""
        settings: dict[str, Any] = {
            "schema": EVALUATION_SCHEMA,
            "heldout": self.data.records[distribution].heldout_hash,
            "tokenizer": self.data.tokenizer.hash,
            "tokens": self.config.evaluate.tokens,
            "context": self.config.model.context,
        }
        if self.config.routing.by_label:
            # Routing by label makes the loss depend on the distribution's name, too.
            settings["label"] = distribution
        if what != "distribution":
            text = "shuffled" if what == "shuffled documents" else "as they are"
            # Without a label the entry is null, so that measurements of earlier versions are found.
            settings = {"label": None, **settings, "documents": text, "spread": "over sources"}
        return content_key(settings)

    def evaluations(
        self, model: str, distributions: Sequence[str], told: Callable[[str], None] = lambda _: None
    ) -> dict[str, Evaluation]:
        """A model's loss on each of these distributions; ``told`` hears which one is measured now, and of how many."""
        loaded, readers, found, new = None, [], dict[str, Evaluation](), dict[str, dict[str, Any]]()
        saved = time.monotonic()
        for place, name in enumerate(distributions, 1):
            if (result := self._stored(model, name)) is None:
                # Loading costs more than measuring: once, and only if something is missing.
                if loaded is None:
                    loaded = self.load(model).eval()
                    mixture = loaded.architecture.mixture
                    from lifelong_moe.evaluation.readings import reader_hashes

                    # Where nobody is ever left out, no weight says how far a generation was heard.
                    readers = reader_hashes(loaded) if mixture is not None and mixture.drop else []
                told(f"{name}, {place} of {len(distributions)}")
                result = self._evaluate(loaded, readers, name)
                new[self.key(name)] = result.to_json()
            found[name] = result
            # A kill may cost a minute of measuring, not all of it.
            if new and time.monotonic() > saved + KEPT_SECONDS:
                self.store.add_together(model, new)
                saved, new = time.monotonic(), {}
        # In one file, since the disk is waited for with each.
        if new:
            self.store.add_together(model, new)
        return found

    def _stored(self, model: str, name: str) -> Evaluation | None:
        read = partial(read_evaluation, architecture=self.architecture(model))
        return self.store.find(model, self.key(name), read)

    def _evaluate(self, model: LanguageModel, readers: list[str], name: str) -> Evaluation:
        from lifelong_moe.evaluation.loss import evaluate

        settings, vocabulary = self.config.evaluate, model.architecture.vocabulary_of(name)
        windows = evaluation_windows(self.data.heldout[name], self.config.model.context, settings.tokens)
        if readers:
            return self._evaluate_mixture(model, readers, name, windows)
        if not vocabulary:
            return evaluate(model, windows, distribution=name, batch_tokens=settings.batch_tokens)
        # The same documents in other tokens, of which there are fewer.
        shard = first_documents(self.data.heldout_by(name, vocabulary), windows.shard.num_documents)
        own = evaluation_windows(shard, self.config.model.context, shard.num_tokens)
        found = evaluate(model, own, distribution=name, batch_tokens=settings.batch_tokens)
        return per_token_of(found, windows.num_tokens)

    def _evaluate_mixture(
        self, model: LanguageModel, readers: list[str], name: str, windows: EvaluationSet
    ) -> Evaluation:
        """Let only those generations read of which it is not known what they say of the text."""
        from lifelong_moe.evaluation.loss import evaluate
        from lifelong_moe.evaluation.readings import Readings

        key = self.key(name)
        known = self.kept.of(key, readers)
        # A mixture of the first n of these generations: what it heard of each, the one with one more needs to hear.
        for number in range(len(readers), 0, -1):
            if not (missing := set(range(number)) - known.keys()):
                break
            known |= self.cache.find(key, readers[:number], partial(_readings, missing, model.architecture)) or {}
        readings = Readings(windows, model.architecture, known)
        tokens = self.config.evaluate.batch_tokens
        found = evaluate(model, windows, distribution=name, batch_tokens=tokens, readings=readings)
        if made := readings.made():
            each = [reading.tensors(generation) for generation, reading in made.items()]
            self.cache.add(key, readers, {name: tensor for one in each for name, tensor in one.items()})
        self.kept.keep(key, readers, known | made)
        return found

    def losses(self, model: str, distribution: str, *, shuffled: bool = False) -> DocumentLosses:
        """A model's loss on each held-out document with a scored token, and the document's source.

        Args:
            model: Its key.
            distribution: Which held-out text.
            shuffled: Score each document with its characters in random order; tokens are counted as they were.
        """
        found = self._documents(model, distribution, shuffled=shuffled)
        heldout = self.data.heldout_documents[distribution]
        # A bound divides by a document's tokens, so documents without a scored one are left out.
        scored = [i for i, tokens in enumerate(found.tokens) if tokens]
        return DocumentLosses(
            np.array(found.nats)[scored],
            np.array(found.tokens)[scored],
            [heldout[found.document[i]].source for i in scored],
        )

    def expert_counts(self, model: str, distribution: str) -> list[list[float]]:
        """Assignments of the held-out documents' scored tokens, per layer and expert."""
        return self._documents(model, distribution).expert_counts

    def _documents(self, model: str, distribution: str, *, shuffled: bool = False) -> StoredLosses:
        """Losses by document and assignments by expert, as they are stored."""
        key = self.key(distribution, "shuffled documents" if shuffled else "documents")
        # Where the documents are gone, only the counts are read.
        there = self.data.heldout_documents.get(distribution)
        known = math.inf if there is None else len(there)
        read = partial(StoredLosses.read, architecture=self.architecture(model), documents=known)
        if (found := self.store.find(model, key, read)) is not None:
            return found
        from lifelong_moe.evaluation.documents import measure_documents

        sources = [document.source for document in self.data.heldout_documents[distribution]]
        text = self.data.heldout_by(distribution, self.architecture(model).vocabulary_of(distribution))
        shard, chosen = spread_shard(text, sources, self.config.evaluate.tokens)
        plain = self._documents(model, distribution) if shuffled else None
        if plain is not None:
            shard = self._shuffled(distribution, shard, chosen)
        measured = measure_documents(
            self.load(model),
            evaluation_windows(shard, self.config.model.context, shard.num_tokens),
            distribution=distribution,
            batch_tokens=self.config.evaluate.batch_tokens,
        )
        found = StoredLosses(
            nats=measured.nats.tolist(),
            # Shuffled characters make more tokens; per original token the two losses compare.
            tokens=measured.tokens.tolist() if plain is None else plain.tokens,
            document=chosen[measured.document].tolist(),
            expert_counts=measured.expert_counts,
        )
        self.store.add(model, key, asdict(found))
        return found

    def _shuffled(self, distribution: str, shard: TokenShard, documents: NDArray[np.int64]) -> TokenShard:
        """The scored part of held-out documents with its characters in random order."""
        # A fixed seed: a measurement is stored, so it must be the same whenever it is made.
        rng, tokenizer = np.random.default_rng(0), self.data.tokenizer
        whole, mixed = self.data.heldout[distribution], []
        for place, i in enumerate(documents.tolist()):
            document, ids = self.data.heldout_documents[distribution][i], shard.document(place)
            text = document.text
            if len(ids) < len(whole.document(i)):  # the cut may split a character
                text = text[: max(1, len(tokenizer.decode(ids.tolist()).rstrip("\ufffd")))]
            mixed.append(Document(shuffled_text(text, rng=rng), document.source))
        return tokenize_documents(mixed, tokenizer)
