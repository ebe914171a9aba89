"""Every kind of bad input costs one line, exit code 2, and nothing is written."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lifelong_moe.data.formats.compression import COMPRESSED
from pipelines.cli import app, exit_code
from tests.e2e.conftest import Cli
from tests.retrain_lab import RETRAIN, base_config
from tests.tiny import tiny_config, write_config, write_corpora

GOOD = '{"text": "apple pear plum"}\n'


def zstd(data: bytes) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def row(**fields: Any) -> str:
    return json.dumps(fields)


# Name of the file, its content, what the line must hold.
FILES: dict[str, tuple[str, str | bytes, str]] = {
    "malformed JSON": ("bad.jsonl", GOOD + '{"text": "a" "b"}\n', "bad.jsonl:2: malformed JSON at column 14"),
    "cut off JSON": ("bad.jsonl", GOOD + '{"text": "a', "bad.jsonl:2: "),
    "not an object": ("bad.jsonl", "[1]\n", "bad.jsonl:1: must be one JSON object; got a list"),
    "a bare string": ("bad.jsonl", '"text"\n', "bad.jsonl:1: "),
    "an empty line": ("bad.jsonl", GOOD + "\n" + GOOD, "bad.jsonl:2: line is empty"),
    "invalid UTF-8": ("bad.jsonl", GOOD.encode() + b'{"text": "\xff"}\n', "bad.jsonl:2: "),
    "UTF-16": ("bad.jsonl", GOOD.encode("utf-16"), "bad.jsonl"),
    "UTF-16 text without its mark": ("bad.txt", "apple".encode("utf-16-le"), "bad.txt"),
    "a line without end": ("bad.jsonl", '{"text": "' + "a" * (16 << 20) + '"}', "1: line is longer than 16 MiB"),
    "deep nesting": ("bad.jsonl", '{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "nested too deeply"),
    "a huge integer": ("bad.jsonl", '{"text": "a", "n": ' + "9" * 5000 + "}\n", "integer of 5000 digits"),
    "NaN": ("bad.jsonl", '{"text": "a", "n": NaN}\n', "bad.jsonl:1: NaN is not JSON"),
    "Infinity": ("bad.jsonl", '{"text": "a", "n": -Infinity}\n', "-Infinity is not JSON"),
    "overflow": ("bad.jsonl", '{"text": "a", "n": 1e999}\n', "not finite"),
    "a lone surrogate": ("bad.jsonl", '{"text": "a\\ud800"}\n', "bad.jsonl:1: "),
    "a key twice": ("bad.jsonl", '{"text": "a", "text": "b"}\n', "occurs twice"),
    "an escaped NUL": ("bad.jsonl", '{"text": "a\\u0000b"}\n', "bad.jsonl:1: "),
    "no text": ("bad.jsonl", row(body="a") + "\n", 'there is no field "text"; fields: body'),
    "text of another kind": ("bad.jsonl", row(text=5) + "\n", "bad.jsonl:1: "),
    "null text": ("bad.jsonl", row(text=None) + "\n", "bad.jsonl:1: "),
    "blank text": ("bad.jsonl", row(text=" \n\t ") + "\n", "bad.jsonl:1: "),
    "source of another kind": ("bad.jsonl", row(text="a", source=[1]) + "\n", "bad.jsonl:1: "),
    "nothing at all": ("bad.jsonl", "", "there are no documents"),
    "an empty text file": ("bad.txt", "", "bad.txt"),
    "a NUL in text": ("bad.txt", "a\0b", "bad.txt"),
    "truncated gzip": ("bad.jsonl.gz", gzip.compress(GOOD.encode() * 500)[:-9], "bad.jsonl.gz"),
    "not gzip": ("bad.jsonl.gz", b"plain", "bad.jsonl.gz"),
    "a gzip bomb": ("bad.jsonl.gz", gzip.compress(b'{"text": "' + b"a" * (40 << 20)), "bad.jsonl.gz"),
    "truncated zstd": ("bad.jsonl.zst", zstd(GOOD.encode() * 500)[:-9], "bad.jsonl.zst"),
    "not zstd": ("bad.jsonl.zst", b"plain", "bad.jsonl.zst"),
    "not Parquet": ("bad.parquet", b"PAR1 no PAR1", "bad.parquet: not a readable Parquet file"),
    "a pickle": ("bad.pkl", b"\x80\x04.", "bad.pkl"),
    "a torch file": ("bad.pt", b"PK", "bad.pt"),
    "an index": ("bad.faiss", b"IxFI", "bad.faiss"),
    "an unknown kind": ("bad.docx", b"PK", "unknown kind of file"),
    "too few documents": ("bad.jsonl", GOOD, "too few"),
    "too few tokens": ("bad.jsonl", "".join(row(text=f"a{i}") + "\n" for i in range(9)), "too few tokens"),
    "mostly duplicates": ("bad.jsonl", GOOD * 20 + '{"text": "other"}\n', "are duplicates of others"),
}  # fmt: skip

CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an unknown key": (lambda c: c["model"].update(widht=3), "no key 'widht'"),
    "an unknown section": (lambda c: c.update(modle={}), "Did you mean model?"),
    "a mistyped value": (lambda c: c["model"].update(width="wide"), "model.width"),
    "infinite": (lambda c: c["stage_defaults"]["optim"].update(lr=float("inf")), "must be finite"),
    "not a number": (lambda c: c["stage_defaults"]["optim"].update(lr=float("nan")), "lr=nan"),
    "an unknown distribution": (lambda c: c["stages"].append({"data": "fruits"}), "Did you mean fruit?"),
    "a mixture of an unknown distribution": (
        lambda c: c["stages"].append({"data": {"fruit": 1, "cod": 1}}), "Did you mean code?"),
    "a mixture of one": (lambda c: c["stages"].append({"data": {"fruit": 1}}), "one alone is data: NAME"),
    "a weight that is no number": (lambda c: c["stages"].append({"data": {"fruit": "a", "code": 1}}), "positive"),
    "a share of less than a block": (
        lambda c: c["stages"].append({"data": {"fruit": 1, "code": 100_000}}), "less than a block"),
    "no such file": (lambda c: c["distributions"]["fruit"].update(files="none.jsonl"), "none.jsonl: no such file"),
    "a folder": (lambda c: c["distributions"]["fruit"].update(files="."), "is a directory"),
    "two sources": (lambda c: c["distributions"]["fruit"].update(builtin="english_docs"), "exactly one of builtin"),
    "held-out text that is trained on": (
        lambda c: c["distributions"]["fruit"].update(heldout_files="fruit.jsonl"), "is also in the held-out set"),
    "one text in two distributions": (
        lambda c: c["distributions"]["code"].update(files="fruit.jsonl", heldout_fraction=0.5), "is held out in"),
    "another vocabulary": (lambda c: c["tokenizer"].update(file="tokenizer.json"), "tokenizer.json"),
    "a negative fraction": (lambda c: c["stage_defaults"]["replay"].update(fraction=-1), "replay.fraction=-1"),
    "no such variable": (lambda c: c["distributions"]["fruit"].update(files="${oc.env:NO_SUCH}"), "NO_SUCH"),
    "no stages": (lambda c: c.update(stages=[]), "stages is empty"),
}  # fmt: skip

TEXTS = {
    "an alias bomb": ("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)), "tiny.yaml"),
    "a key twice": ("run: a\nrun: b\n", "tiny.yaml:2"),
    "tabs": ("run: a\n\tmodel: {}\n", "tiny.yaml:2"),
    "not UTF-8": (b"run: \xff\n", "tiny.yaml:1: invalid UTF-8"),
    "a list": ("- a\n", "must hold a mapping"),
    "empty": ("", "must hold a mapping"),
    "deeply nested": ("run: " + "[" * 3000, "nested over"),
}  # fmt: skip


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_corpora(tmp_path)
    return tmp_path


def listing(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def refused(cli: Cli, lab: Path, *arguments: str) -> str:
    """The one line that it cost."""
    before = listing(lab)
    result = cli(*arguments)
    assert result.code == 2, result
    lines = result.err.strip().splitlines()
    assert len(lines) == 1 and len(lines[0]) < 1200, result.err
    assert listing(lab) == before
    return lines[0]


@pytest.mark.parametrize("kind", FILES)
def test_files(kind: str, lab: Path, cli: Cli) -> None:
    name, content, message = FILES[kind]
    (lab / name).write_bytes(content.encode() if isinstance(content, str) else content)
    config = tiny_config()
    config["distributions"]["fruit"]["files"] = name
    write_config(config)
    line = refused(cli, lab, "plan", "tiny.yaml")
    assert message in line and "distributions.fruit: " in line


@pytest.mark.parametrize("kind", CONFIGS)
def test_configurations(kind: str, lab: Path, cli: Cli) -> None:
    change, message = CONFIGS[kind]
    config = tiny_config()
    (lab / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    change(config)
    write_config(config)
    assert message in refused(cli, lab, "plan", "tiny.yaml")


@pytest.mark.parametrize("kind", TEXTS)
def test_yaml(kind: str, lab: Path, cli: Cli) -> None:
    content, message = TEXTS[kind]
    (lab / "tiny.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused(cli, lab, "plan", "tiny.yaml")


@pytest.mark.parametrize("name", ["link.jsonl", "fifo.jsonl", "device.jsonl"])
def test_what_is_no_regular_file(name: str, lab: Path, cli: Cli) -> None:
    if name == "fifo.jsonl":
        os.mkfifo(name)
    else:
        Path(name).symlink_to("/dev/zero" if name == "device.jsonl" else "nowhere")
    config = tiny_config()
    config["distributions"]["fruit"]["files"] = name
    write_config(config)
    assert name in refused(cli, lab, "plan", "tiny.yaml")


def test_a_valid_line_with_a_line_separator_is_one_line(lab: Path, cli: Cli) -> None:
    rows = [row(text=f"{i} apple\u2028pear plum cherry ripe sweet tree orchard basket") for i in range(60)]
    (lab / "good.jsonl").write_text("\n".join(rows).replace("\\u2028", "\u2028") + "\n", encoding="utf-8")
    config = tiny_config()
    config["distributions"]["fruit"]["files"] = "good.jsonl"
    write_config(config)
    assert cli("plan", "tiny.yaml").code == 0


def test_scripts_with_vowel_signs_and_sums_are_no_duplicates(lab: Path, cli: Cli) -> None:
    """By hand: 49 lines that differ in vowel signs alone, 25 decomposed copies of composed lines, 200 sums."""
    signs = ["ा", "ि", "ी", "ु", "ू", "े", "ै"]
    lines = [f"द{a}न क{b}ल फल और पेड़ की कहानी है" for a in signs for b in signs]
    composed = [f"l'élève numéro {n} a mangé une pêche mûre à Orléans" for n in range(25)]
    lines += composed + [unicodedata.normalize("NFD", line) for line in composed]
    lines += [f"{a} {sign} {b} = ?" for a in range(10) for b in range(10) for sign in "+-"]
    (lab / "good.jsonl").write_text("".join(row(text=line) + "\n" for line in lines))
    config = tiny_config()
    config["distributions"]["fruit"]["files"] = "good.jsonl"
    write_config(config)
    result = cli("prepare", "tiny.yaml", "--json")
    assert result.code == 0 and "fruit: 25 documents are duplicates and left out" in result.err
    prepared = json.loads(result.out)["distributions"]
    assert (prepared["fruit"]["duplicates"], prepared["code"]["duplicates"]) == (25, 0)


@pytest.mark.parametrize("command", ["retrain", "run"])
def test_retraining_and_runs_refuse_the_same_way(command: str, lab: Path, cli: Cli) -> None:
    write_config(base_config())
    Path("retrain.yaml").write_text(yaml.safe_dump({**RETRAIN, "drift": {"auc": 2}}))
    shutil.copy("fruit.jsonl", "fruit.pkl")
    if command == "retrain":
        assert "drift.auc=2" in refused(cli, lab, "retrain", "retrain.yaml")
    else:
        assert "fruit.pkl" in refused(cli, lab, "run", "tiny.yaml", "distributions.fruit.files=fruit.pkl")


@pytest.mark.parametrize("setting", ["accelerator=tpu", "strategy=xla", "profiler=xla", "num_nodes=2"])
@pytest.mark.parametrize("command", ["run", "compare"])
def test_what_this_machine_cannot_do(command: str, setting: str, lab: Path, cli: Cli) -> None:
    write_config(tiny_config())
    Path("compare.yaml").write_text("compare: c\nbase: tiny.yaml\nseeds: [0]\narms: {a: []}\n")
    files = {"run": "tiny.yaml", "compare": "compare.yaml"}
    assert "trainer" in refused(cli, lab, command, files[command], f"trainer.{setting}")


def test_a_tick_takes_one_machine(lab: Path, cli: Cli) -> None:
    write_config(base_config())
    Path("retrain.yaml").write_text(yaml.safe_dump(RETRAIN))
    for arguments in ((), ("--dry-run",)):
        assert "only `lifelong-moe run`" in refused(
            cli, lab, "retrain", "retrain.yaml", "trainer.num_nodes=2", *arguments
        )


def test_torchrun_starts_one_process_a_machine(lab: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tiny_config())
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "torchrun has started 4 processes" in refused(cli, lab, "run", "tiny.yaml", "trainer.devices=4")
    write_config(base_config())
    Path("retrain.yaml").write_text(yaml.safe_dump(RETRAIN))
    assert "torchrun has started 4 processes" in refused(cli, lab, "retrain", "retrain.yaml")


@pytest.mark.parametrize("place", ["mlruns", "data"])
def test_a_place_that_leads_nowhere(place: str, lab: Path, cli: Cli) -> None:
    write_config(tiny_config())
    Path(place).symlink_to(place)
    result = cli("run", "tiny.yaml")
    assert result.code == 2 and result.err.startswith("AccessError: ") and result.err.count("\n") == 1


def test_an_override_that_is_not_utf8(lab: Path, cli: Cli) -> None:
    write_config(tiny_config())
    files = os.fsdecode(b"distributions.fruit.files=caf\xe9.jsonl")
    assert "caf\\udce9" in refused(cli, lab, "run", "tiny.yaml", files)


def test_what_ctrl_c_says_is_printed(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt("stopped after step 6")

    monkeypatch.setattr("pipelines.preflight.read_config", stop)
    monkeypatch.setattr("sys.argv", ["lifelong-moe", "plan", "tiny.yaml"])
    assert exit_code(app) == 130
    assert capsys.readouterr().err == "interrupted: stopped after step 6\n"


@pytest.mark.parametrize("error", [KeyError("\udcff"), RuntimeError("two\nlines"), KeyboardInterrupt(), MemoryError()])
def test_whatever_fails_the_last_line_of_a_tick_is_json(
    error: BaseException, lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("pipelines.preflight.load_retraining", fail)
    monkeypatch.setattr("sys.argv", ["lifelong-moe", "retrain", "retrain.yaml"])
    if isinstance(error, KeyError | RuntimeError):
        with pytest.raises(type(error)):
            exit_code(app)
    else:
        assert exit_code(app) == {KeyboardInterrupt: 130, MemoryError: 8}[type(error)]
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    name = "ResourceError" if isinstance(error, MemoryError) else type(error).__name__
    assert (told["outcome"], told["error"]) == ("failed", name)


def test_there_are_over_fifty() -> None:
    assert len(FILES) + len(CONFIGS) + len(TEXTS) + 3 > 50 and ".zst" in str(COMPRESSED)
