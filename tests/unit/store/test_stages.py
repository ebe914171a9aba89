"""What a store says of stages that are there, and of those that are not."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lifelong_moe.data.tokens.identity import TokenizerIdentity
from lifelong_moe.data.tokens.tokenizer import train_tokenizer
from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.directories import write_directory
from lifelong_moe.storage.plain import PlainError
from lifelong_moe.storage.tensors import load_weights
from lifelong_moe.storage.verified import VerifiedDirectory, verify_directory
from lifelong_moe.store.checks import require_own_key
from lifelong_moe.store.record import StageRecord
from lifelong_moe.store.stages import StageStore
from tests.records import METRICS, made_record

KEY, OTHER = "ab" * 32, "cd" * 32


@pytest.fixture
def store(tmp_path: Path) -> StageStore:
    store = StageStore(tmp_path)
    store.commit(made_record(KEY, borrowed={"v": OTHER}), METRICS, {"w": torch.arange(3.0)})
    return store


def test_a_committed_stage_is_what_was_committed(store: StageStore) -> None:
    stage = StageStore(store.root.parent).get(KEY)
    assert (stage.key, stage.name, stage.metrics, stage.borrowed) == (KEY, "one", METRICS, {"v": OTHER})


def test_a_stage_that_is_not_there_is_none_to_find_and_an_error_to_get(store: StageStore) -> None:
    assert store.find(OTHER) is None
    with pytest.raises(CorruptError, match=r"stage cd\w+ is referred to, but is not in"):
        store.get(OTHER)


def test_the_whole_key_counts_not_its_first_digits(store: StageStore) -> None:
    assert store.find(KEY[:-1] + "c") is None


def test_a_second_commit_leaves_the_first_one(store: StageStore) -> None:
    again = store.commit(made_record(KEY), METRICS | {"epochs": 9.0}, {"w": torch.zeros(3)})
    assert again.metrics == METRICS


def test_the_oldest_ancestor_keeps_the_tokenizer_and_whoever_holds_a_tensor_has_it(store: StageStore) -> None:
    first, second = "11" * 32, "22" * 32
    made = train_tokenizer(["é"], 257)
    identity = TokenizerIdentity({}, made.hash)
    store.commit(made_record(first, "a", tokenizer=identity), METRICS, {"w": torch.ones(2)}, tokenizer=made.text)
    record = made_record(second, "b", parent=first, borrowed={"w": first}, tokenizer=identity)
    child = store.commit(record, METRICS, {"v": torch.zeros(1)})
    assert [stage.name for stage in store.chain(second)] == ["a", "b"] and store.tokenizer(child).text == made.text
    assert (store.holder(child, "w"), store.holder(child, "v")) == (first, second)
    assert {name: tensor.tolist() for name, tensor in store.tensors(child).items()} == {"v": [0.0], "w": [1.0, 1.0]}
    third = store.commit(made_record("33" * 32, "c", parent=second, borrowed={"gone": first}), METRICS, {})
    with pytest.raises(CorruptError, match="tensor gone is borrowed but missing"):
        store.tensors(third)


def chain_of(store: StageStore, stages: int) -> list[str]:
    """Keys of stages each of which changes one tensor, ``w``, and adds one of its own; the fourth has no ``w0``."""
    keys = [f"{place:02x}" * 32 for place in range(1, stages + 1)]
    for place, key in enumerate(keys):
        removed = None if not place else ("w0",) if place == 3 else ()
        record = made_record(key, f"s{place}", parent=keys[place - 1] if place else None, removed=removed)
        store.commit(record, METRICS, {"w": torch.full((1,), place), f"w{place}": torch.full((1,), place)})
    return keys


def test_who_holds_a_tensor_follows_from_what_the_chain_stores(store: StageStore) -> None:
    keys, again = chain_of(store, 5), StageStore(store.root.parent)
    stage = again.get(keys[4])
    assert again.holders(stage) == {"w1": keys[1], "w2": keys[2], "w3": keys[3]}
    assert again.holders(again.get(keys[2])) == {"w0": keys[0], "w1": keys[1]}
    assert {name: tensor.item() for name, tensor in again.tensors(stage).items()} == {
        "w": 4, "w1": 1, "w2": 2, "w3": 3, "w4": 4,
    }  # fmt: skip
    assert {one.key for one in again.needs(keys[4])} == {*keys}
    # A later stage with the map of an earlier version, and one without on top of it.
    old = made_record("aa" * 32, "old", parent=keys[2], borrowed={"w0": keys[0], "w1": keys[1], "w2": keys[2]})
    again.commit(old, METRICS, {"w": torch.ones(1)})
    new = again.commit(made_record("bb" * 32, "new", parent=old.key, removed=()), METRICS, {"w2": torch.ones(1)})
    assert again.holders(new) == {"w0": keys[0], "w1": keys[1], "w": old.key}


def test_a_record_is_as_short_after_fifty_stages_and_is_read_once(
    store: StageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, again, read = chain_of(store, 50), StageStore(store.root.parent), list[str]()
    sizes = [(again.get(key).path / "config.json").stat().st_size for key in (keys[4], keys[49])]
    assert sizes[1] - sizes[0] < 20  # of names with one more digit
    opened = VerifiedDirectory.read
    monkeypatch.setattr(VerifiedDirectory, "read", lambda self, name: (read.append(name), opened(self, name))[1])
    again = StageStore(store.root.parent)
    for _ in range(2):
        assert len(again.holders(again.get(keys[49]))) == 48 and len(again.tensors(again.get(keys[49]))) == 50
    assert read.count("config.json") == 50


def test_no_record_names_a_holder_that_is_no_ancestor(store: StageStore) -> None:
    keys = chain_of(store, 2)
    other = store.commit(made_record("aa" * 32, "other"), METRICS, {"w9": torch.zeros(1)})
    forged = made_record("bb" * 32, "forged", parent=keys[1], borrowed={"w9": other.key})
    stage = store.commit(forged, METRICS, {"w": torch.ones(1)})
    for ask in (store.holders, store.tensors):
        with pytest.raises(CorruptError, match=r"forged-b+/config\.json: the holder of w9 is no ancestor"):
            ask(stage)
    # Stages of earlier versions are taken at their word, and may say that they descend from each other.
    for key, parent in (("cc", "dd"), ("dd", "cc")):
        record = made_record(key * 32, key, parent=parent * 32, removed=())
        store.commit(record, METRICS, {key: torch.ones(1)})
    with pytest.raises(CorruptError, match="is its own ancestor"):
        store.holders(store.get("cc" * 32))
    alone = store.commit(made_record("ee" * 32, "alone", parent="ff" * 32, removed=()), METRICS, {})
    with pytest.raises(CorruptError, match="stage ffffffffffffffff is referred to"):
        store.holders(alone)
    for wrong in ({"parent": None}, {"parent": keys[0], "borrowed": {"w": keys[0]}}):
        record = made_record("99" * 32, "wrong", removed=(), **wrong)
        written = record.to_json() | {"borrowed": record.borrowed}
        with pytest.raises(PlainError, match="removed: a stage takes its parent's tensors, or names"):
            require_own_key(StageRecord.from_json(written), written["spec"])


def test_the_tokenizer_is_the_one_of_the_record_and_no_larger_than_the_model(store: StageStore) -> None:
    made, key = train_tokenizer(["é"], 257), "11" * 32
    stage = store.commit(made_record(key, "a"), METRICS, {}, tokenizer=made.text)
    with pytest.raises(CorruptError, match=rf"tokenizer\.json: is {made.hash[:16]}, but stage a was trained with 7777"):
        store.tokenizer(stage)
    # Whoever writes the record may have hashed another one.
    small = replace(stage.architecture, vocab_size=256)
    named = made_record("22" * 32, "b", tokenizer=TokenizerIdentity({}, made.hash), architecture=small)
    stage = store.commit(named, METRICS, {}, tokenizer=made.text)
    with pytest.raises(CorruptError, match=r"tokenizer\.json: has 257 entries, and stage b's model 256"):
        store.tokenizer(stage)


def test_only_safetensors_are_loaded(tmp_path: Path) -> None:
    write_directory(tmp_path / "a", {"pickle.safetensors": lambda path: path.write_bytes(pickle.dumps({"w": 1}))})
    files = verify_directory(tmp_path / "a")
    with pytest.raises(CorruptError, match=r"pickle\.safetensors: not a safetensors file"):
        load_weights(files, "pickle.safetensors")
    with pytest.raises(CorruptError, match=r"manifest\.json: lists no b\.safetensors"):
        load_weights(files, "b.safetensors")
