"""lm-evaluation-harness on stages of a run, and on their exports by its own ``--model hf``: the same scores."""

from __future__ import annotations

import io
import json
import random
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("lm_eval", reason="lm-evaluation-harness (the extra `lm-eval`) is not installed")
pytest.importorskip("transformers", reason="both sides are compared with the extra `transformers`")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import model_registry
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from lifelong_moe.errors import ConfigError
from lifelong_moe.model.sampling import sample
from pipelines.cli import app, exit_code
from pipelines.export.export import export_run
from pipelines.inspect.harness import LifelongModel
from pipelines.inspect.tasks import evaluate_tasks
from pipelines.lm_eval import MODEL, command_line
from pipelines.shared.options import ExportRequest
from pipelines.shared.output import SafeConsole, silent
from tests.checkpoints import config_of, write_checkpoint
from tests.tiny import CONTEXT, VOCABULARIES, tiny_config, train, working_in, write_config, write_corpora

ROOT = Path(__file__).parents[2]
TASKS = ("choice", "write", "sampled", "roll")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub is asked, and nothing is written outside the test's folder."""
    import datasets
    import huggingface_hub.constants

    for switch in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TQDM_DISABLE"):
        monkeypatch.setenv(switch, "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(VOCABULARIES["code"].split(), k=count))


def write_tasks() -> None:
    """A task of each kind; some questions are empty, and some longer than the context."""
    draw = random.Random(0)
    lengths = [0, 2, 5, 9, 40]
    rows: dict[str, list[Any]] = {
        "choice": [
            {"question": words(draw, lengths[i % 5]), "choices": [words(draw, k) for k in (1, 2, 3)], "answer": i % 3}
            for i in range(25)
        ],
        "write": [{"question": words(draw, lengths[i % 5]), "answer": words(draw, 1)} for i in range(10)],
        "roll": [{"text": words(draw, k)} for k in (1, 6, 50)],
    }
    rows["sampled"] = rows["write"]
    kinds: dict[str, dict[str, Any]] = {
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "write": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "answer",
            "generation_kwargs": {"until": ["re", "=="], "max_gen_toks": 9},
            "metric_list": [{"metric": "exact_match"}],
        },
        "roll": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
        },
    }
    kinds["sampled"] = kinds["write"] | {"generation_kwargs": {"until": ["re"], "max_gen_toks": 9, "temperature": 1.0}}
    for name in TASKS:
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}}
        task = {"task": f"my_{name}", "test_split": "test", "metadata": {"version": 1}, **files, **kinds[name]}
        Path(f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that grew a generation on a checkpoint, and the export of it; to be copied."""
    root = tmp_path_factory.mktemp("grown") / "lab"
    root.mkdir()
    with working_in(root):
        write_corpora(root)
        write_checkpoint("llama")
        config = config_of(bundles=True)
        config["stages"] = [{"data": "code"}]
        config["stage_defaults"]["trunk"] = {"train": "deltas", "rank": 2}
        train(write_config(config))
        export_run("tiny", ExportRequest(to="out", generation="code"), silent())
        write_tasks()
    return root


@pytest.fixture
def lab(grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that to work in."""
    shutil.copytree(grown, tmp_path / "lab")
    monkeypatch.chdir(tmp_path / "lab")
    return tmp_path / "lab"


def harness(model: str, arguments: str, tasks: tuple[str, ...], batch_size: int = 4) -> Any:
    """What the harness itself finds."""
    if "lifelong-moe" not in model_registry:
        model_registry.register("lifelong-moe", target=MODEL)
    return simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=[f"{name}.yaml" for name in tasks],
        task_manager=TaskManager(include_defaults=False),
        batch_size=batch_size,
        bootstrap_iters=0,
    )


def answers(found: Any) -> list[Any]:
    """Each answer's log likelihood, or text."""
    return [one[0] for task in sorted(found["samples"]) for sample in found["samples"][task] for one in sample["resps"]]


def ours(*tasks: str, **more: Any) -> tuple[Any, str]:
    """Put tasks to the run; returns the result and what was printed."""
    printed = io.StringIO()
    result = evaluate_tasks("tiny", more.pop("stage", None), tasks, more.pop("label", None),
                            SafeConsole(printed, width=200), **more)  # fmt: skip
    return json.loads(json.dumps(result)), printed.getvalue()


def test_scores_are_those_of_the_export(lab: Path) -> None:
    tasks = ("choice", "write", "roll")
    mine = harness("lifelong-moe", "run=tiny,stage=code,label=code", tasks)
    # The export has the checkpoint's context, which is longer than the run's.
    theirs = harness("hf", f"pretrained=out,dtype=float32,device=cpu,max_length={CONTEXT}", tasks)
    texts = 0
    for one, other in zip(answers(mine), answers(theirs), strict=True):
        if isinstance(one, str):
            assert one == other
            texts += bool(one)
        else:
            assert one == pytest.approx(other, abs=1e-3)
    assert texts > 5  # else nothing was compared
    result, printed = ours("choice.yaml,write.yaml", "roll.yaml", label="code")
    assert [*result["scores"]] == ["base", "code"]
    for task, scores in theirs["results"].items():
        found = result["scores"]["code"][task]["scores"]
        known = {key.split(",")[0]: value for key, value in scores.items() if key.endswith(",none")}
        known = {key: value for key, value in known.items() if not key.endswith("_stderr")}
        assert found.keys() == known.keys() and found == pytest.approx(known, rel=1e-3)
        assert all(metric in printed for metric in known)
    # The two stages differ, or the comparison would show nothing.
    assert result["scores"]["base"]["my_roll"] != result["scores"]["code"]["my_roll"]


def test_the_checkpoint_as_it_came_has_the_scores_of_its_folder(lab: Path) -> None:
    mine = harness("lifelong-moe", "run=tiny,stage=base", ("choice", "roll"))
    shutil.copy("out/tokenizer.json", "ck/tokenizer.json")
    shutil.copy("out/tokenizer_config.json", "ck/tokenizer_config.json")
    theirs = harness("hf", f"pretrained=ck,dtype=float32,device=cpu,max_length={CONTEXT}", ("choice", "roll"))
    for one, other in zip(answers(mine), answers(theirs), strict=True):
        assert one == pytest.approx(other, abs=1e-3)


def test_bos_stands_where_the_tokenizer_or_the_user_puts_it(lab: Path) -> None:
    """A tokenizer that puts none before a text, as Qwen's, has none here either."""
    arguments = {"add_bos_token": False, "prefix_token_id": 7}
    said = ",".join(f"{key}={value}" for key, value in arguments.items())
    mine = harness("lifelong-moe", f"run=tiny,stage=code,label=code,{said}", ("choice", "write", "roll"))
    content = json.loads(Path("out/tokenizer.json").read_text())
    content["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    Path("out/tokenizer.json").write_text(json.dumps(content))
    theirs = harness("hf", f"pretrained=out,dtype=float32,device=cpu,max_length={CONTEXT},{said}", ("choice", "roll"))
    kept = {task: rows for task, rows in mine["samples"].items() if task != "my_write"}
    for one, other in zip(answers({"samples": kept}), answers(theirs), strict=True):
        assert one == pytest.approx(other, abs=1e-3)
    usual = harness("lifelong-moe", "run=tiny,stage=code,label=code", ("choice",))
    assert answers(usual) != answers({"samples": {"my_choice": mine["samples"]["my_choice"]}})


def test_batches_change_nothing(lab: Path) -> None:
    one, many = (harness("lifelong-moe", "run=tiny,label=code", TASKS, batch) for batch in (1, 9))
    for first, second in zip(answers(one), answers(many), strict=True):
        assert first == (second if isinstance(first, str) else pytest.approx(second, abs=1e-4))
    greedy, sampled = ([sample["resps"] for sample in one["samples"][name]] for name in ("my_write", "my_sampled"))
    assert greedy != sampled


def test_a_token_that_ends_texts_ends_an_answer(lab: Path) -> None:
    asked = [Instance("generate_until", {}, ("def self x", {"until": [], "max_gen_toks": 9}), 0)]
    model = LifelongModel(run="tiny", label="code")
    tokenizer = model.subject.tokenizer
    prompt = tokenizer.encode("def self x")
    ids = [*sample(model.subject.model, prompt, max_new_tokens=9, temperature=0.0, distribution="code")]
    assert model.generate_until(asked) == [tokenizer.decode(ids)]
    model.subject = replace(model.subject, ends=frozenset({ids[-1]}))
    (cut,) = model.generate_until(asked)
    assert cut == tokenizer.decode(ids[: ids.index(ids[-1])]) != tokenizer.decode(ids)


def test_scores_that_are_stored_are_not_computed_again(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = ours("choice.yaml")
    monkeypatch.setattr("pipelines.inspect.harness.load_on_device", lambda *_, **__: pytest.fail("a model is loaded"))
    assert ours("choice.yaml") == (first, ours("choice.yaml")[1])
    assert ours("choice.yaml", stage="code")[0]["scores"] == {"code": first["scores"]["code"]}
    # Another label, other numbers, another text, another task: measured again.
    for change in ({"label": "code"}, {"int8": True}):
        with pytest.raises(pytest.fail.Exception):
            ours("choice.yaml", **change)
    with Path("choice.jsonl").open("a") as file:
        file.write(json.dumps({"question": "x", "choices": ["y", "z", "x"], "answer": 0}) + "\n")
    with pytest.raises(pytest.fail.Exception):
        ours("choice.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_path": "nobody/nothing", "dataset_kwargs": None}, r"--tasks=choice\.yaml: cannot be loaded: "),
        (
            {"dataset_kwargs": {"data_files": {"test": "nosuch.jsonl"}}},
            r"cannot be loaded: FileNotFoundError: .*nosuch",
        ),
        ({"dataset_kwargs": {"data_files": {"test": "https://x.invalid/a.jsonl"}}}, r"cannot be loaded: "),
        ({"doc_to_text": "{{nosuch}}"}, r"cannot be loaded: UndefinedError"),
        ({"unsafe_code": True}, r"my_choice runs code that models write"),
    ],
)
def test_what_cannot_be_loaded_is_told_in_a_line(lab: Path, change: Any, message: str) -> None:
    task = yaml.safe_load(Path("choice.yaml").read_text())
    Path("choice.yaml").write_text(yaml.safe_dump(task | change))
    with pytest.raises(ConfigError, match=message) as caught:
        ours("choice.yaml")
    assert "\n" not in str(caught.value)
    assert not Path("mlruns/runs/tiny/tasks.json").exists()


def test_mistakes_about_tasks(lab: Path) -> None:
    shutil.copy("choice.yaml", "again.yaml")
    for tasks, said in (
        (["choice.yaml", "again.yaml"], r"--tasks=again\.yaml: there are two tasks my_choice"),
        ([","], "names no task"),
        (["a/b"], r"--tasks=a/b: no such file"),
    ):
        with pytest.raises(ConfigError, match=said):
            ours(*tasks)
    with pytest.raises(ConfigError, match=r"no committed stage sea; there are code"):
        ours("choice.yaml", stage="sea")
    with pytest.raises(ConfigError, match=r"--label=sea is unknown"):
        ours("choice.yaml", label="sea")
    for arguments, said in (
        ({"run": "tiny", "size": 3}, "--model_args size: there is no such argument"),
        ({"run": "tony"}, "run tony does not exist"),
        ({"run": "tiny", "max_length": 99}, "max_length=99: must be 2 to 32"),
    ):
        with pytest.raises(ConfigError, match=said):
            LifelongModel(**arguments)
    for change, said in (
        ({"max_gen_toks": 32}, "max_gen_toks=32 leaves no room for a question: the context is 32"),
        ({"top_k": 5}, r"generation_kwargs\.top_k is not known"),
    ):
        task = yaml.safe_load(Path("write.yaml").read_text())
        task["generation_kwargs"] |= change
        Path("wrong.yaml").write_text(yaml.safe_dump(task))
        with pytest.raises(ConfigError, match=said):
            ours("wrong.yaml")


def test_the_example_in_the_documentation(lab: Path) -> None:
    shutil.copytree(ROOT / "configs/tasks", "configs/tasks")
    result, printed = ours("configs/tasks/arithmetic.yaml", stage="base")
    found = result["scores"]["base"]["arithmetic_choices"]
    assert found["documents"] == 200 and 0 <= found["scores"]["acc"] <= 1
    assert found["standard_errors"]["acc"] == pytest.approx(0.03, abs=0.01) and "arithmetic_choices" in printed


def test_tasks_of_held_out_text(lab: Path) -> None:
    """Made of a run's configuration: the right end stands in the text, and the others elsewhere."""
    config = tiny_config(("fruit", "sea"))
    for name, source in config["distributions"].items():
        long = [json.loads(line)["text"] for line in Path(f"{name}.jsonl").read_text().splitlines()]
        rows = [json.dumps({"text": " ".join(long[i : i + 3])}) for i in range(0, len(long), 3)]
        Path(f"{name}_long.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        source |= {"files": f"{name}_long.jsonl", "heldout_fraction": 0.2}
    made = runpy.run_path(str(ROOT / "configs/tasks/continuations.py"))
    made["main"](write_config(config, "long.yaml"))
    files = {path.name: path.read_text() for path in Path("data/tasks").iterdir()}
    made["main"]("long.yaml")
    assert files == {path.name: path.read_text() for path in Path("data/tasks").iterdir()}
    texts = Path("fruit_long.jsonl").read_text()
    asked = [json.loads(line) for line in files["tiny_fruit.jsonl"].splitlines()]
    assert len(asked) > 190 and {row["answer"] for row in asked} == {0, 1, 2, 3}
    for row in asked:
        ends = [f"{row['text']} {choice}" in texts for choice in row["choices"]]
        assert ends[row["answer"]] and sum(ends) == 1
    result, _ = ours("data/tasks/tiny_fruit.yaml", stage="base")
    assert result["scores"]["base"]["tiny_fruit"]["documents"] == len(asked)


def test_the_harness_finds_the_model(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its own command line."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **given: TaskManager(**given | {"include_defaults": False}))
    arguments = "run=tiny,stage=code,label=code"
    given = ["--model", "lifelong-moe", "--model_args", arguments, "--tasks", "roll.yaml", "--batch_size", "auto"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *given])
    command_line()
    printed = capsys.readouterr().out
    result, _ = ours("roll.yaml", label="code", stage="code")
    value = result["scores"]["code"]["my_roll"]["scores"]["bits_per_byte"]
    assert f"{value:.4f}" in printed
    assert f'lifelong-moe = "{MODEL}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_command_prints_and_records(
    lab: Path, template: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    shutil.rmtree("mlruns")
    Path("mlruns").mkdir()
    shutil.copy(template, "mlruns/mlflow.db")
    train(write_config(tiny_config(tracking={"enabled": True})))
    for _ in range(2):
        command = ["evaluate", "tiny", "--tasks", "choice.yaml", "--tasks", "roll.yaml", "--json"]
        assert exit_code(lambda: app(command, prog_name="lifelong-moe")) == 0  # noqa: B023
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [*result["scores"]] == ["fruit", "code"]
    assert result["tasks"]["my_choice"]["higher_is_better"] == {"acc": True, "acc_norm": True}
    head = json.loads(Path("mlruns/runs/tiny/head.json").read_text())
    client = MlflowClient(f"sqlite:///{Path('mlruns/mlflow.db').absolute()}")
    for metric in ("acc", "acc_norm"):
        expected = [
            (i, result["scores"][name]["my_choice"]["scores"][metric]) for i, name in enumerate(result["scores"])
        ]
        history = client.get_metric_history(head["mlflow"]["run"], f"tasks/my_choice/{metric}")
        assert [(point.step, point.value) for point in history] == expected
        # A stage's own page begins with its training curves, and repeats nothing of the run's.
        child = head["mlflow"]["stages"][head["stages"][1]]
        assert not client.get_metric_history(child, f"tasks/my_choice/{metric}")
