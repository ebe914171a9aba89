"""Committed stages: immutable directories of safetensors and JSON, found by key.

A stage stores only the tensors that it changed. All others, frozen experts above all, it *borrows* from its parent,
which may have borrowed them itself: who holds a tensor follows from what each stage of the chain stores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lifelong_moe.data.tokens.tokenizer import Tokenizer
from lifelong_moe.errors import CorruptError
from lifelong_moe.interop.layout.folder import CONFIG as CHECKPOINT_CONFIG
from lifelong_moe.interop.layout.kept import Kept
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.storage.directories import write_directory
from lifelong_moe.storage.keys import SHORT, canonical_json, content_key
from lifelong_moe.storage.plain import from_plain, require_same
from lifelong_moe.storage.remembered import VERIFIED, Remembered
from lifelong_moe.storage.signing import SigningKeys, signed_by
from lifelong_moe.storage.stored import naming, parse_json
from lifelong_moe.storage.tensors import forms_of, load_weights, names_of, read_into
from lifelong_moe.storage.verified import VerifiedDirectory, verify_directory
from lifelong_moe.store.checks import measured, require_own_key
from lifelong_moe.store.record import StageRecord
from lifelong_moe.store.reference import REFERENCE, Reference, read_referred, referred_forms

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
CONFIG, METRICS = "config.json", "metrics.json"


@dataclass(frozen=True, kw_only=True)
class CommittedStage(StageRecord):
    """A stage on disk whose manifest was verified on opening, and its signature where public keys are given."""

    path: Path
    metrics: dict[str, Any]
    """Measured in training: tokens, seconds, final losses."""
    weights_hash: str
    """SHA-256 of ``model.safetensors``."""


class StageStore:
    """The stages under ``mlruns/stages/``, and their signatures under ``mlruns/signatures/``.

    Args:
        root: The ``mlruns/`` directory.
        keys: Keys to sign and to verify stages with; by default those that the environment names.
        reads_all: Hash every file, also those that were verified before and that nothing has touched since.

    Raises:
        ConfigError: If the environment names unusable keys.
    """

    def __init__(self, root: Path, keys: SigningKeys | None = None, *, reads_all: bool = False) -> None:
        self.root = root / "stages"
        # Apart from the stages, whose manifests list their files and whose content does not depend on who signs.
        self._signatures = root / "signatures"
        # From the environment here, where every reader of stages passes, so that none can forget to verify.
        self.keys = SigningKeys.from_environment() if keys is None else keys
        self._verified = root / VERIFIED
        # A signature covers what the files hold now, which no note of the store may replace.
        self._reads_all = reads_all or bool(self.keys.public)
        # Stages are immutable, so a process verifies each of them once.
        self._open: dict[str, CommittedStage] = {}
        self._files: dict[str, VerifiedDirectory] = {}
        self._held: dict[str, frozenset[str]] = {}
        self._borrowed: dict[str, Mapping[str, str]] = {}

    def find(self, key: str) -> CommittedStage | None:
        """The committed stage with this key, verified; None if there is none.

        Raises:
            CorruptError: If it is there but damaged, or not signed by a trusted key where there are any.
        """
        if key in self._open:
            return self._open[key]
        # Directory names end in 16 digits of the key, so the full key inside decides.
        for path in self.root.glob(f"*-{key[:SHORT]}"):
            remembered = None if self._reads_all else Remembered(self._verified / f"{key}.json")
            files = verify_directory(path, remembered)
            if (stage := _read(files)).key == key:
                read = {name: entry.sha256 for name, entry in files.manifest.files.items()}
                self.keys.verify(path, self.signature(key), read)
                self._open[key], self._files[key] = stage, files
                return stage
        return None

    def get(self, key: str) -> CommittedStage:
        """Like :meth:`find`, but the stage must exist."""
        stage = self.find(key)
        if stage is None:
            raise CorruptError(f"stage {key[:SHORT]} is referred to, but is not in {self.root}.")
        return stage

    def architecture(self, key: str) -> Architecture:
        """The architecture of a stage's model; errors as for :meth:`get`."""
        return self.get(key).architecture

    def commit(
        self,
        record: StageRecord,
        metrics: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        tokenizer: str | None = None,
        kept: Mapping[str, str] | None = None,
    ) -> CommittedStage:
        """Write a stage atomically.

        Args:
            record: Describes the stage, and which of its parent's tensors it does without.
            metrics: Plain JSON data.
            tensors: The stage's own tensors by name.
            tokenizer: Text of ``tokenizer.json``; a first stage keeps it for its whole chain, and a stage that adds
                tokens for itself and its descendants.
            kept: Further texts by file name, which a first stage keeps for its whole chain.
        """
        from safetensors.torch import save_file  # imports torch, which commands that only list stages do without

        # safetensors stores contiguous tensors only.
        own = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
        files: dict[str, Callable[[Path], object]] = {
            WEIGHTS: lambda path: save_file(own, path),
            CONFIG: lambda path: _write_json(path, record.to_json()),
            METRICS: lambda path: _write_json(path, metrics),
        }
        for name, text in [(TOKENIZER, tokenizer), *(kept or {}).items()]:
            if text is not None:
                files[name] = partial(Path.write_text, data=text, encoding="utf-8")
        # Written aside and renamed: a killed commit leaves no stage.
        target = self.root / f"{record.name}-{record.key[:SHORT]}"
        write_directory(target, files, lambda path: self.keys.sign(path, self.signature(record.key)))
        return self.get(record.key)

    def sign(self, *keys: str | None) -> None:
        """Sign stages and all others that they need, if there is a private key; signatures that exist stay."""
        for stage in self.needs(*keys) if self.keys.private is not None else ():
            if self.signed_by(stage.key) is None:
                self.keys.sign(stage.path, self.signature(stage.key))

    def needs(self, *keys: str | None) -> list[CommittedStage]:
        """Stages, and all others that they borrow from or descend from, each once.

        Raises:
            CorruptError: If one is missing or damaged.
        """
        open_, found = [key for key in keys if key is not None], dict[str, CommittedStage]()
        while open_:
            stage = self.get(open_.pop())
            found[stage.key] = stage
            open_ += {*stage.borrowed.values(), *filter(None, [stage.parent])} - {*found}
        return list(found.values())

    def manifest_hash(self, key: str) -> str:
        """SHA-256 of the manifest by which a stage was verified, which holds the hashes of all its files."""
        self.get(key)
        return content_key(dataclasses.asdict(self._files[key].manifest))

    def signed_by(self, key: str) -> str | None:
        """Fingerprint of the key that signed a stage, verified only where public keys are given; None if unsigned."""
        return signed_by(self.signature(key))

    def tensors(self, stage: CommittedStage) -> dict[str, Tensor]:
        """All tensors of a stage's model, borrowed ones included.

        Raises:
            CorruptError: If a file is damaged, or a borrowed tensor is not with its holder.
        """
        return self._gathered(stage, self._weights)

    def forms(self, stage: CommittedStage) -> dict[str, Tensor]:
        """The same without memory, on the device ``meta``: names, kinds and shapes alone are read."""
        return self._gathered(stage, self._forms)

    def read_into(self, stage: CommittedStage, targets: Mapping[str, Tensor]) -> None:
        """Read tensors of a stage's model into memory that is there: none is held twice, whoever holds it.

        Args:
            stage: The stage.
            targets: Tensors on the CPU by name, of the shapes that :meth:`forms` tells.

        Raises:
            CorruptError: If a file is damaged, or a number not finite.
        """
        holders = self.holders(stage)
        by_holder: dict[str, dict[str, Tensor]] = {}
        for name, target in targets.items():
            by_holder.setdefault(holders.get(name, stage.key), {})[name] = target
        for key, theirs in by_holder.items():
            self._read_into(key, theirs)

    def _gathered(self, stage: CommittedStage, held_by: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
        tensors = held_by(stage.key)
        by_holder: dict[str, list[str]] = {}
        for name, key in self.holders(stage).items():
            by_holder.setdefault(key, []).append(name)
        # Each holder's file is read once, however many tensors it lends.
        for key, names in by_holder.items():
            held = held_by(key)
            missing = [name for name in names if name not in held]
            if missing:
                raise CorruptError(f"{self.get(key).path / WEIGHTS}: tensor {missing[0]} is borrowed but missing.")
            tensors.update({name: held[name] for name in names})
        return tensors

    def _weights(self, key: str) -> dict[str, Tensor]:
        """The tensors that a stage holds itself, or that a checkpoint's files hold for it."""
        import torch

        own = load_weights(self._files[self.get(key).key], WEIGHTS)
        if self._reference(self.get(key)) is None:  # all that it holds, without reading the file's header again
            return own
        forms = {n: form for n, form in self._forms(key).items() if n not in own}
        lying = {n: torch.empty(form.shape, dtype=form.dtype) for n, form in forms.items()}
        if lying:
            self._read_into(key, lying)
        return lying | own

    def _forms(self, key: str) -> dict[str, Tensor]:
        """The same without memory."""
        stage = self.get(key)
        own, reference = forms_of(self._files[key], WEIGHTS), self._reference(stage)
        return own if reference is None else referred_forms(reference) | own

    def _read_into(self, key: str, targets: Mapping[str, Tensor]) -> None:
        stage, own = self.get(key), names_of(self._files[key], WEIGHTS)
        read_into(self._files[key], WEIGHTS, {name: one for name, one in targets.items() if name in own})
        if (reference := self._reference(stage)) is None or not (
            lying := {n: targets[n] for n in targets.keys() - own}
        ):
            return
        sha256, kept = (stage.derived or {}).get("sha256"), Kept(partial(self.kept_text, stage))
        read_referred(reference, lying, kept.text(CHECKPOINT_CONFIG), sha256, str(stage.path / REFERENCE))

    def _reference(self, stage: CommittedStage) -> Reference | None:
        if REFERENCE not in self._files[stage.key].manifest.files:
            return None
        path = stage.path / REFERENCE
        with naming(path):
            return from_plain(Reference, parse_json(self._files[stage.key].read(REFERENCE), path))

    def holders(self, stage: CommittedStage) -> Mapping[str, str]:
        """The tensors of a stage's model that other stages hold, each with the key of its holder.

        Holders are ancestors, so that no record can name a stage of somebody else's.

        Raises:
            CorruptError: If an ancestor is missing or damaged, or a record of an earlier version names another holder.
        """
        if stage.key in self._borrowed:
            return self._borrowed[stage.key]
        chain, ancestors = self.chain(stage.key), set[str]()
        # Once along the chain: each stage's file is asked for its names, however many stages build on it.
        for parent, one in zip([None, *chain], chain, strict=False):
            if one.key not in self._borrowed:
                found: Mapping[str, str] = one.borrowed
                if parent is not None and one.removed is not None:
                    gone = self._names(one.key).union(one.removed)
                    known = {**self._borrowed[parent.key], **dict.fromkeys(self._names(parent.key), parent.key)}
                    found = {name: key for name, key in known.items() if name not in gone}
                for name, key in found.items():
                    if key not in ancestors:
                        raise CorruptError(f"{one.path / CONFIG}: the holder of {name} is no ancestor of the stage.")
                self._borrowed[one.key] = found
            ancestors.add(one.key)
        return self._borrowed[stage.key]

    def _names(self, key: str) -> frozenset[str]:
        """Names of the tensors that a stage holds itself, from the beginning of its file."""
        if key not in self._held:
            reference = self._reference(self.get(key))
            names = names_of(self._files[key], WEIGHTS)
            self._held[key] = names if reference is None else names.union(reference.tensors)
        return self._held[key]

    def chain(self, key: str) -> list[CommittedStage]:
        """The stage's ancestors and the stage itself, oldest first.

        Raises:
            CorruptError: If one is missing or damaged, or is its own ancestor.
        """
        found = {key: self.get(key)}
        while (parent := next(reversed(found.values())).parent) is not None:
            if parent in found:
                raise CorruptError(f"stage {parent[:SHORT]} in {self.root} is its own ancestor.")
            found[parent] = self.get(parent)
        return list(found.values())[::-1]

    def tokenizer(self, stage: CommittedStage, label: str | None = None) -> Tokenizer:
        """The tokenizer that a stage reads a text with.

        Args:
            stage: The stage.
            label: The text's distribution, if it is known; only a model to whose vocabulary stages have added looks at
                it, and reads text of unknown origin with the first one.

        Raises:
            CorruptError: As for :meth:`tokenizers`.
        """
        return self.tokenizers(stage)[stage.architecture.vocabulary_of(label)]

    def tokenizers(self, stage: CommittedStage) -> list[Tokenizer]:
        """The tokenizers of a stage's vocabularies, each kept by the ancestor that made it, the oldest first.

        Raises:
            CorruptError: If one is missing, or not the one that a stage's record says.
        """
        chain, architecture = self.chain(stage.key), stage.architecture
        sizes = [architecture.tokens_of(g) for g, one in enumerate(architecture.generations) if one.tokens or not g]
        # A derived stage repeats what its source says of training, and adds no tokens.
        holders = [chain[0], *(one for one in chain[1:] if one.spec.vocabulary is not None and one.derived is None)]
        found = [Tokenizer.stored(self._text(holder, TOKENIZER), architecture.bos_id) for holder in holders]
        for number, (tokenizer, holder) in enumerate(zip(found, holders, strict=True)):
            path = holder.path / TOKENIZER
            # A manifest can be mended, and the tokens of another tokenizer would be read as other text. The newest one
            # is what the stage itself names.
            owner = stage if number == len(found) - 1 else holder
            if tokenizer.hash != (wanted := owner.tokenizer.hash):
                raise CorruptError(
                    f"{path}: is {tokenizer.hash[:SHORT]}, but stage {owner.name} was trained with {wanted[:SHORT]}."
                )
            known = sizes[number] if number < len(sizes) else 0
            # A checkpoint may have rows without a token; a stage adds none of these.
            if tokenizer.vocab_size > known or (number and tokenizer.vocab_size < known):
                raise CorruptError(
                    f"{path}: has {tokenizer.vocab_size:,} entries, and stage {stage.name}'s model {known:,}."
                )
        if len(found) < len(sizes):
            raise CorruptError(f"{stage.path}: has {len(sizes)} vocabularies and {len(found)} {TOKENIZER}.")
        return found

    def kept_text(self, stage: CommittedStage, name: str) -> str | None:
        """Text of a further file that a stage's oldest ancestor keeps; None if it keeps none of this name."""
        first = self.chain(stage.key)[0]
        return self._text(first, name) if name in self._files[first.key].manifest.files else None

    def _text(self, stage: CommittedStage, name: str) -> str:
        try:
            return self._files[stage.key].read(name).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptError(f"{stage.path / name}: {error}.") from None

    def signature(self, key: str) -> Path:
        """Where a stage's signature is, if it has one."""
        return self._signatures / f"{key}.sig"

    def holder(self, stage: CommittedStage, tensor: str) -> str:
        """Key of the stage that stores a tensor of ``stage``'s model."""
        return self.holders(stage).get(tensor, stage.key)


def _read(files: VerifiedDirectory) -> CommittedStage:
    """The stage in a verified directory."""
    files.require(WEIGHTS, CONFIG, METRICS)
    config, metrics = (parse_json(files.read(name), files.path / name) for name in (CONFIG, METRICS))
    weights_hash = files.manifest.files[WEIGHTS].sha256
    with naming(files.path / CONFIG):
        stage = CommittedStage.from_json(config, path=files.path, metrics={}, weights_hash=weights_hash)
        require_own_key(stage, config["spec"])
        require_same("name", f"{stage.name}-{stage.key[:SHORT]}", files.path.name)
    with naming(files.path / METRICS):
        return replace(stage, metrics=measured(metrics, stage))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(canonical_json(value), encoding="utf-8")
