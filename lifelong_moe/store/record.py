"""What a stage says of itself once it is committed: its ``config.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from lifelong_moe.data.tokens.identity import TokenizerIdentity
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.storage.plain import from_plain


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """Where a stage comes from and what model it left."""

    key: str
    name: str
    parent: str | None
    """Key of the stage that it continues or was derived from."""
    spec: StageSpec
    """Of a derived stage its source's, which says what the model still was trained by."""
    architecture: Architecture
    data: dict[str, str]
    """By distribution, the hash of the training documents that it was given; empty if it read none."""
    split: dict[str, str]
    """The same of the text that it read: :attr:`lifelong_moe.data.text.documents.Corpus.split_hash`."""
    read_near_copies: bool = False
    """Stages of earlier versions left no near copies out."""
    tokenizer: TokenizerIdentity
    borrowed: dict[str, str] = field(default_factory=dict)
    """For each tensor of the model that it does not hold itself, the key of the stage that does."""
    derived: dict[str, Any] | None = None
    """What a stage that was not trained was made from and how; its address."""
    schema: int | None = None
    """Version of what the key is made of; None if the stage is derived."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        data = dataclasses.asdict(self) | {"spec": self.spec.to_json(), "architecture": self.architecture.to_json()}
        left_out = {"read_near_copies", *(name for name in ("derived", "schema") if data[name] is None)}
        return {name: value for name, value in data.items() if name not in left_out}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], **more: Any) -> Self:
        """The inverse of :meth:`to_json`; ``more`` are fields of a subclass."""
        return from_plain(cls, {"split": data["data"], "read_near_copies": "split" not in data, **data, **more})
