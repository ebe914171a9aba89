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
from lifelong_moe.storage.verified import verify_directory
from lifelong_moe.store.stages import StageStore, load_weights
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
