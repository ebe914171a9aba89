"""The record of a committed stage: its ``config.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from lifelong_moe.data.tokens.identity import TokenizerIdentity
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.storage.grammars import Key, Name, Sha256
from lifelong_moe.storage.plain import PlainError, from_plain


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """The origin of a stage and the model that it produced."""

    key: Key
    name: Name
    parent: Key | None
    """Key of the stage that it continues or is derived from."""
    spec: StageSpec
    """A derived stage repeats the spec of its source, which still describes the training."""
    architecture: Architecture
    data: dict[Name, Sha256]
    """Hash of the training documents by distribution; empty if it read none."""
    split: dict[Name, Sha256]
    """:attr:`lifelong_moe.data.text.documents.Corpus.split_hash` by distribution, of the text that it read."""
    read_near_copies: bool = False
    """Whether near copies of held-out text were trained on, as stages of earlier versions did."""
    tokenizer: TokenizerIdentity
    removed: tuple[str, ...] | None = None
    """Names of the parent's tensors that this model does not have; all others that the stage does not hold itself are
    the parent's (:meth:`lifelong_moe.store.stages.StageStore.holders`). None if it takes none from its parent."""
    borrowed: dict[str, Key] = field(default_factory=dict)
    """As earlier versions wrote it: for each tensor that another stage holds, the key of that stage."""
    derived: dict[str, Any] | None = None
    """How a stage that was not trained was made, and from what; its key is a hash of this."""
    schema: int | None = None
    """Version of the key's recipe; None for a derived stage."""

    @property
    def is_imported(self) -> bool:
        """Whether it is the model of a checkpoint, which no text trained here."""
        return self.derived is not None and self.derived.get("derived") == "import"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        data = dataclasses.asdict(self) | {"spec": self.spec.to_json(), "architecture": self.architecture.to_json()}
        # Near copies are a fact about old files, never written; of ``derived`` and ``schema`` a stage has one.
        left_out = {"read_near_copies", *(name for name in ("derived", "schema", "removed") if data[name] is None)}
        # A name a tensor would make each file longer than the one before it.
        left_out |= {"borrowed"} if self.removed is not None else set()
        return {name: value for name, value in data.items() if name not in left_out}

    @classmethod
    def from_json(cls, data: Any, **more: Any) -> Self:
        """The inverse of :meth:`to_json`; ``more`` holds the fields of a subclass.

        Raises:
            PlainError: If the data is no record.
        """
        if not isinstance(data, Mapping) or "data" not in data:
            raise PlainError("not the record of a stage")
        # Before near copies were left out, the text given and the text read were the same.
        return from_plain(cls, {"split": data["data"], "read_near_copies": "split" not in data, **data, **more})
