"""Fine-tuning on prompts with answers: what is learned, what stays, when it stops, and that kills change nothing."""

from __future__ import annotations

import io
import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from lifelong_moe.config.load import read_config
from lifelong_moe.data.tokens.pairs import SEPARATOR, precedes_answer
from lifelong_moe.errors import ConfigError, DataError
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.plan.cost import forward_flops_per_token
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.loop.module import StageModule
from lifelong_moe.training.restore import load_model
from pipelines.inspect.generate import generate_text
from pipelines.shared.options import SamplingOptions
from pipelines.shared.workspace import prepare
from tests.tiny import (
    CONTEXT,
    SEQUENCES,
    VOCABULARIES,
    fork,
    hashes,
    kill_self,
    stored_evaluations,
    tiny_config,
    train,
    write_config,
)

STEPS = 24


def write_pairs(path: str = "pairs.jsonl", pairs: int = 200, seed: int = 0) -> None:
    """A prompt is some words, its answer the first of them twice."""
    draw, words = random.Random(seed), VOCABULARIES["fruit"].split()
    with Path(path).open("w", encoding="utf-8") as file:
        for number in range(pairs):
            chosen = draw.choices(words, k=2)
            row = {"prompt": f"{number} {' '.join(chosen)}", "answer": f"{chosen[0]} {chosen[0]}"}
            file.write(json.dumps(row) + "\n")


def configure(**finetune: Any) -> dict[str, Any]:
    config = tiny_config(("fruit",))
    config["distributions"]["pairs"] = {
        "files": "pairs.jsonl", "text_field": "prompt", "answer_field": "answer", "heldout_fraction": 0.2,
    }  # fmt: skip
    tuned = {"data": "pairs", "kind": "finetune", "tokens": STEPS * SEQUENCES * CONTEXT, "finetune": finetune}
    config["stages"].append(tuned)
    return config


@pytest.fixture
def pairs(lab: Path) -> None:
    write_pairs()


def stages(run: str = "tiny") -> list[Any]:
    head, store = json.loads(Path(f"mlruns/runs/{run}/head.json").read_text()), StageStore(Path("mlruns"))
    return [store.get(key) for key in head["stages"]]


def test_answers_by_hand() -> None:
    tokens = np.array([0, 5, 9, 6, 9, 0, 7, 0, 9, 8])  # 0 begins a document, 9 separates
    found = precedes_answer(tokens, np.array([0, 5, 7, 10]), 9)
    assert found.tolist() == [False, False, True, True, True, False, False, False, True, True]


@pytest.mark.usefixtures("pairs")
def test_answers_are_learned_and_scored_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = StageModule.training_step

    def look(self: StageModule, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        if self.spec.finetune is not None:
            seen.append((batch["target_ids"].clone(), batch["scored"].clone()))
        return original(self, batch, batch_idx)

    monkeypatch.setattr(StageModule, "training_step", look)
    report, _ = train(write_config(configure()))
    column = report["distributions"].index("pairs")
    before, after = (row[column] for row in report["loss_nats_per_token"])
    assert after < before - 1
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    # Bytes are those of answers alone.
    of_pairs = [
        e for e in stored_evaluations() if e["documents"] > 0 and e["bytes"] < sum(len(r["answer"]) for r in rows)
    ]
    assert of_pairs and all(e["bytes"] / e["documents"] < 15 for e in of_pairs)
    share = torch.cat([scored.flatten() for _, scored in seen]).float().mean()
    assert 0.1 < float(share) < 0.6


SUMS = {f"What is {a} plus {b}?": f"It is {a + b}." for a, b in ((3, 4), (1, 1), (2, 6), (5, 0), (7, 2), (4, 4))}


def test_a_model_ends_its_answers_and_is_asked_as_it_was_taught(lab: Path) -> None:
    """Each of six pairs 170 times. In front of a prompt stands BOS, behind it the separator, by itself."""
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in SUMS.items()]
    held_out = [{"prompt": "What is 9 plus 0?", "answer": "It is 9."}]
    for name, chosen in (("pairs.jsonl", rows), ("heldout.jsonl", held_out)):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in chosen))
    config, context = configure(), 2 * CONTEXT  # so that two pairs share a block
    config["model"]["context"] = context
    del config["distributions"]["pairs"]["heldout_fraction"]
    config["distributions"]["pairs"]["heldout_files"] = "heldout.jsonl"
    config["stages"][1] |= {
        "tokens": 512 * context, "replay": {"fraction": 0.0}, "distill": {"weight": 0.0},
        "optim": {"lr": 0.01, "schedule": "constant", "batch_tokens": SEQUENCES * context},
    }  # fmt: skip
    train(write_config(config))
    store, tuned = StageStore(Path("mlruns")), stages()[1]
    model, tokenizer = load_model(store, tuned).eval(), store.tokenizer(tuned)
    for prompt, answer in SUMS.items():
        ids = [tokenizer.bos_id, *tokenizer.encode(f"{prompt}\x1e{answer}")]
        with torch.no_grad():
            probs = model.head.logits(model(TokenBatch(torch.tensor([ids]))).hidden_BSD[0, -1]).softmax(-1)
        assert float(probs[tokenizer.bos_id]) > 0.95
        asked = SamplingOptions(max_new_tokens=40, temperature=0.0, top_p=1.0)
        for text in (prompt, f"{prompt}\x1e"):
            said = generate_text("tiny", None, text, asked, Console(file=io.StringIO()))
            assert said["text"] == answer and said["tokens"] < 40
    printed = io.StringIO()
    generate_text("tiny", None, "What is 3 plus 4?", asked, Console(file=printed))
    assert printed.getvalue() == "What is 3 plus 4?\nIt is 7.\n"
    # A stage before it goes on with a text.
    printed = io.StringIO()
    generate_text("tiny", "fruit", "apple", asked, Console(file=printed))
    assert printed.getvalue().startswith("apple") and not printed.getvalue().startswith("apple\n")


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize(
    ("trainable", "moves"), [("moe", ".moe."), ("attention", ".attention."), ("non_moe", "embedding")]
)
def test_only_what_is_trainable_moves(trainable: str, moves: str) -> None:
    config = configure(trainable=trainable)
    config["stage_defaults"]["optim"]["weight_decay"] = 0.5
    train(write_config(config))
    store, (before, after) = StageStore(Path("mlruns")), stages()
    old, new = store.tensors(before), store.tensors(after)
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert any(moves in name for name in moved)
    assert all((".moe." in name) == (trainable == "moe") for name in moved)
    assert trainable != "attention" or all(".attention." in name for name in moved)


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("trainable", ["moe", "non_moe"])
def test_dense_layers_and_shared_experts_are_no_mixture(trainable: str) -> None:
    config = configure(trainable=trainable)
    config["model"] |= {"moe_every": 2, "shared_experts": 1}
    config["stage_defaults"]["optim"]["weight_decay"] = 0.5
    path = write_config(config)
    plan = prepare(read_config(path)).plan
    report, _ = train(path)
    store, (before, after) = StageStore(Path("mlruns")), stages()
    old, new = store.tensors(before), store.tensors(after)
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    # Two layers, of which the second has two experts and a shared one. With one expert a token, whose weight is the
    # router's probability, all of them learn; a dense layer's own router has no rows.
    routed = {"blocks.1.moe.router.rows.0"}
    routed |= {f"blocks.1.moe.banks.experts.{e}.{matrix}" for e in range(2) for matrix in ("gate_up", "down")}
    assert moved == (routed if trainable == "moe" else {n for n in old if old[n].numel()} - routed)
    trained = sum(old[name].numel() for name in moved)
    assert plan[1].trainable == report["stages"][1]["parameters_trainable"] == trained


@pytest.mark.usefixtures("pairs")
def test_what_leaves_nothing_to_train_is_refused_before_anything_is_written() -> None:
    config = configure(trainable="attention")
    config["stages"][1]["trunk"] = {"train": "frozen"}
    with pytest.raises(ConfigError, match=r"stages\[1\]: nothing is left to train"):
        train(write_config(config))
    assert not Path("mlruns").exists()


@pytest.mark.usefixtures("pairs")
def test_it_stops_when_it_gets_no_better_and_keeps_the_best() -> None:
    config = configure(patience=1, every_steps=2)
    config["stages"][1] |= {"tokens": 200 * SEQUENCES * CONTEXT, "optim": {"lr": 0.02}}
    train(write_config(config))
    tuned = stages()[1]
    stopping = tuned.metrics["stopping"]
    curve = stopping["held_out_nats_per_token"]
    losses = [loss for _, loss in curve]
    assert curve[-1][0] < 200 and losses[-1] > min(losses) == losses[-2]
    assert stopping["best_step"] == curve[-2][0]
    told, tokens = tuned.metrics, curve[-1][0] * SEQUENCES * CONTEXT
    assert (told["steps"], told["tokens"]) == (curve[-1][0], tokens)  # what it took, not what it might have
    forward = forward_flops_per_token(tuned.architecture)
    assert told["active_flops"] == forward * (3 * tokens + tokens // 4)  # a teacher of its shape sees replayed text
    assert told["tokens_per_second"] == pytest.approx(tokens / told["seconds"])
    assert told["flops_per_second"] == pytest.approx(told["active_flops"] / told["seconds"])
    measured = stored_evaluations(f"{tuned.key[:16]}-*.json")
    assert min(losses) in [pytest.approx(one["nats_per_token"], abs=1e-6) for one in measured]


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("step", [5, 9])
def test_killed_and_continued_it_is_the_same(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    path = write_config(configure(patience=2, every_steps=3, expert_dropout=0.4))
    train(path, "run=whole")
    expected = hashes(run_name="whole")
    original = StageModule.training_step

    def training_step(self: StageModule, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
        if self.spec.finetune is not None and self.global_step == step:
            kill_self()
        return original(self, batch, batch_idx)

    for kept in Path("mlruns/stages").glob("pairs-*"):
        shutil.rmtree(kept)
    shutil.rmtree("mlruns/runs/whole")
    with monkeypatch.context() as patch:
        patch.setattr(StageModule, "training_step", training_step)
        child = fork(train)
        assert child.wait() == -signal.SIGKILL, child.output
    _, printed = train(path)
    assert "pairs: continuing from" in printed and hashes() == expected


@pytest.mark.usefixtures("pairs")
def test_dropout_is_for_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    train(write_config(configure(expert_dropout=0.4)))
    dropped = stages()[1].weights_hash
    train("tiny.yaml", "run=plain", "stages[1].finetune.expert_dropout=0")
    assert stages("plain")[1].weights_hash != dropped
    model = load_model(StageStore(Path("mlruns")), stages()[1])
    assert all(layer.banks.dropout == 0 for layer in model.moe_layers())


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages[1].kind=pretrain", r"has prompts and answers; set stages\[1\]\.kind=finetune"),
        ("stages[0].kind=finetune", r"stages\[0\]\.kind=finetune needs prompts and answers"),
        ("stages=[{data: pairs, kind: finetune}]", r"there is no model yet to fine-tune"),
        ("stages[1].finetune.expert_dropout=1", r"finetune\.expert_dropout=1\.0 must lie in \[0, 1\)"),
        ("stages[1].finetune.trainable=heads", r"trainable"),
    ],
)
def test_mistakes_in_the_configuration(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(write_config(configure()), override)
    assert not Path("mlruns").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, r'pairs\.jsonl:2: there is no field "answer"'),
        ({"prompt": "a", "answer": 3}, r"pairs\.jsonl:2: "),
        ({"prompt": "a", "answer": "  "}, r"pairs\.jsonl:2: "),
        ({"answer": "b"}, r'pairs\.jsonl:2: there is no field "prompt"'),
        ({"prompt": f"a{SEPARATOR}", "answer": "b"}, r"pairs\.jsonl:2: U\+001E stands between"),
        (
            {"prompt": "apple " * 99, "answer": "b"},
            r"pairs\.jsonl:2: prompt and answer are \d+ tokens, more than .* as are 1 of ",
        ),
    ],
)
def test_mistakes_in_pairs(lab: Path, row: dict[str, Any], message: str) -> None:
    write_pairs()
    lines = Path("pairs.jsonl").read_text().splitlines()
    lines[1] = json.dumps(row)
    Path("pairs.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=message):
        train(write_config(configure()))
    assert not Path("mlruns").exists()
