"""`lifelong-moe inspect` as a user runs it."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet
from rich.console import Console

from pipelines.inspect import tables as inspect_tables
from pipelines.inspect.inspect import inspect_stage
from pipelines.shared.options import InspectionRequest
from tests.e2e.conftest import Cli
from tests.tiny import train

# One expert a token: none is chosen together with another.
FIGURES = ["information", "leak", "saturation", "similarity"]


@pytest.fixture(scope="module")
def copy(trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained directory once more, because inspecting writes."""
    root = tmp_path_factory.mktemp("inspected") / "lab"
    shutil.copytree(trained_once, root)
    return root


@pytest.fixture
def here(copy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(copy)
    return copy


def test_heldout_text(here: Path, cli: Cli) -> None:
    result = cli("inspect", "tiny", "--tokens", "400", "--save", "routing.parquet", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    folder = here / "mlruns/runs/tiny"
    assert found == json.loads((folder / "inspection.json").read_text())
    assert sorted(path.stem for path in (folder / "inspection").iterdir()) == FIGURES
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (folder / "inspection").iterdir())
    assert (found["stage"], found["mlflow_run"]) == ("code", None)
    for index, layer in enumerate(found["layers"]):
        assert layer["experts"] == [f"{stage}/L{index}/E{e}" for stage, e in zip(STAGES, range(4), strict=True)]
        # The two texts share few words, so experts that know tokens know distributions, at most ln 2 of it.
        assert 0 < layer["distribution"]["nats"] < 0.694 and layer["token"]["nats"] > layer["token"]["null_95"]
        assert layer["leak"]["code"] == 0.0 <= layer["leak"]["fruit"] <= 1.0
        assert {name: sum(counts) for name, counts in layer["counts"].items()} == found["tokens"]
    assert list(found["saturation"]) == ["fruit"]
    assert all(0 <= share <= 1 for row in found["saturation"]["fruit"].values() for share in row)
    assert set(found["shuffled"]) == {"fruit", "code"}
    rows = parquet.read_table("routing.parquet").to_pylist()
    assert len(rows) == 2 * sum(found["tokens"].values())
    assert sum(row["experts"] == ["code/L1/E2"] for row in rows) == sum(
        counts[2] for counts in found["layers"][1]["counts"].values()
    )


STAGES = ["fruit", "fruit", "code", "code"]


def test_tables_and_repetition(here: Path, cli: Cli) -> None:
    first = cli("inspect", "tiny", "--tokens", "200")
    assert first.code == 0, first.err
    for text in ("tiny, stage code", "leak L0", "experts shuffled", "after stage", "Tokens that experts prefer"):
        assert text in first.out
    assert cli("inspect", "tiny", "--tokens", "200").out == first.out
    begun = cli("inspect", "tiny", "--tokens", "200", "--stage", "fruit", "--json")
    # Nothing of the later stage stays beside what is now in inspection.json.
    figures = {path.stem for path in (here / "mlruns/runs/tiny/inspection").iterdir()}
    assert figures <= set(FIGURES) - {"saturation", "leak"}
    assert json.loads(begun.out)["saturation"] == {}
    # One generation of experts: nothing can leak.
    assert all(set(layer["leak"].values()) == {0.0} for layer in json.loads(begun.out)["layers"])


def test_the_way_from_a_stage_s_first_weights_to_its_last(here: Path, cli: Cli) -> None:
    result = cli("inspect", "naive", "--interpolate", "--json")
    assert result.code == 0, result.err
    found, folder = json.loads(result.out), here / "mlruns/runs/naive"
    report = json.loads((folder / "report.json").read_text())
    assert (found["began_with"], found["learned"], found["shares"]) == ("fruit", ["code"], [0.0, 0.25, 0.5, 0.75, 1.0])
    # Without growth the ends are the models that the report is about.
    for place, row in ((0, 0), (-1, 1)):
        ends = [found["bits_per_byte"][name][place] for name in report["distributions"]]
        assert ends == pytest.approx(report["bits_per_byte"][row], rel=1e-6)
    assert len({round(loss, 6) for loss in found["bits_per_byte"]["fruit"]}) == 5
    kept = json.loads((folder / "interpolation/code.json").read_text())
    assert kept["bits_per_byte"] == found["bits_per_byte"] and kept["stage_key"] == found["key"]
    assert (folder / "interpolation/code.png").read_bytes().startswith(b"\x89PNG")
    shown = cli("inspect", "naive", "--interpolate", "--tokens", "200").out
    assert "code (learned here)" in shown and "0.75" in shown and "average=S" in shown


def test_new_experts_stay_at_both_ends_of_the_way(here: Path, cli: Cli) -> None:
    found = json.loads(cli("inspect", "tiny", "--interpolate", "--json").out)
    report = json.loads((here / "mlruns/runs/tiny/report.json").read_text())
    for name, losses in zip(report["distributions"], zip(*report["bits_per_byte"], strict=True), strict=True):
        assert found["bits_per_byte"][name][-1] == pytest.approx(losses[1], rel=1e-6)
        assert abs(found["bits_per_byte"][name][0] - losses[0]) > 1e-4


def test_where_no_weight_changed_there_is_no_way(here: Path, cli: Cli) -> None:
    train("tiny.yaml", "run=still", "stage_defaults.trunk.train=frozen")
    result = cli("inspect", "still", "--interpolate")
    assert result.code == 2 and "no weight of stage fruit changed in stage code" in result.err
    assert result.err.count("\n") == 1 and not (here / "mlruns/runs/still/interpolation").exists()


TEXT = "apple <b> & [bold]pear[/bold] 漢"


def test_a_text_token_by_token(here: Path, cli: Cli) -> None:
    before = (here / "mlruns/runs/tiny/head.json").read_text()
    result = cli("inspect", "tiny", "--text", TEXT, "--html", "t.html", "--save", "t.parquet", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert "".join(token["text"] for token in found["tokens"]) == TEXT
    assert {token["owner"] for token in found["tokens"]} <= {"fruit", "code"}
    assert found["layers"] == [0, 1] and all(len(token["experts"]) == 2 for token in found["tokens"])
    page = Path("t.html").read_text(encoding="utf-8")
    assert "<b>" not in page and "&lt;" in page and "/L1/E" in page
    rows = parquet.read_table("t.parquet").to_pylist()
    assert [row["position"] for row in rows] == 2 * list(range(1, len(found["tokens"]) + 1))
    assert (here / "mlruns/runs/tiny/head.json").read_text() == before
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    one = json.loads(cli("inspect", "tiny", "--text-file", "text.txt", "--layer", "1", "--json").out)
    for token, other in zip(one["tokens"], found["tokens"], strict=True):
        assert list(token["experts"][0]) == [token["owner"]] and token["experts"][0] == other["experts"][1]
    plain = cli("inspect", "tiny", "--text", TEXT)
    # As short as the text: what it says of each token's experts is in the files.
    *about, legend, empty, shown = plain.out.splitlines()
    assert plain.code == 0 and len(about) == 1 and empty == "" and legend.startswith("⟨")
    assert re.sub(r"⟨[12]⟩", "", shown) == TEXT and shown.startswith("⟨")


def inspected(console: Console, **options: Any) -> None:
    inspect_stage("tiny", None, InspectionRequest(**options), console)


def test_a_terminal_shows_colours_and_obeys_nothing_in_the_text(here: Path) -> None:
    shown = io.StringIO()
    inspected(Console(file=shown, force_terminal=True, color_system="truecolor", width=200), text="a[red]\x1b[2J\nb")
    out = shown.getvalue()
    assert "\x1b[2J" not in out and "\\x1b" in out and "⏎" in out
    assert out.count("\x1b[30;48;2;") >= 5
    assert "fruit" in out or "code" in out
    shown = io.StringIO()
    inspected(Console(file=shown, force_terminal=True, color_system="standard", width=200), text="a b c d e f g h")
    assert "\x1b[30;101m" in shown.getvalue() or "\x1b[30;102m" in shown.getvalue()  # a light red, a light green


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("nosuch",), "run nosuch does not exist"),
        (("tiny", "--stage", "sea"), "there are fruit, code."),
        (("tiny", "--layer", "1"), "--layer=1 needs a text"),
        (("tiny", "--html", "x.html"), "--html=x.html needs a text"),
        (("tiny", "--label", "fruit"), "--label=fruit needs a text"),
        (("tiny", "--text", "a", "--label", "fruit"), "ignores labels"),
        (("tiny", "--text", "a", "--tokens", "9"), "--tokens=9 limits held-out text"),
        (("tiny", "--text-file", "binary", "--tokens", "8192"), "--tokens=8192 limits held-out text"),
        (("tiny", "--text", "a", "--text-file", "b"), "exclude each other"),
        (("tiny", "--text", ""), "the text has no token"),
        (("tiny", "--text", "a \udcff"), "not UTF-8"),
        (("tiny", "--text", "a", "--layer", "2"), "the layers of code are 0 to 1"),
        (("tiny", "--text-file", "nosuch.txt"), "no such file"),
        (("tiny", "--text-file", "binary"), "not UTF-8 at byte 1"),
        (("tiny", "--text", "a", "--save", "nosuch/t.parquet"), "no such directory: nosuch"),
        (("tiny", "--text", "a", "--save", "t.csv"), "a file that ends in .parquet"),
        (("tiny", "--text", "a", "--html", ""), "a file that ends in .html"),
        (("tiny", "--text", "a", "--html", "mlruns"), "a file that ends in .html"),
        (("tiny", "--interpolate", "--text", "a"), "--interpolate reads held-out text"),
        (("tiny", "--interpolate", "--save", "t.parquet"), "--interpolate reads held-out text"),
        (("tiny", "--interpolate", "--stage", "fruit"), "stage fruit began with random weights"),
        (("tiny", "--text-file", "mlruns"), "a directory, neither a file nor a pipe"),
    ],
)
def test_mistakes_cost_one_line(here: Path, cli: Cli, arguments: tuple[str, ...], reason: str) -> None:
    Path("binary").write_bytes(b"a\xff")
    result = cli("inspect", *arguments)
    assert result.code == 2 and reason in result.err and result.err.count("\n") == 1, result.err


def test_changed_text_is_refused(here: Path, cli: Cli) -> None:
    original = Path("fruit.jsonl").read_text()
    try:
        Path("fruit.jsonl").write_text(original + json.dumps({"text": "quite new words " * 20}) + "\n")
        result = cli("inspect", "tiny")
    finally:
        Path("fruit.jsonl").write_text(original)
    assert result.code == 2 and "has changed since stage code was trained" in result.err


def test_part_of_a_character_is_named_by_its_id() -> None:
    tokens = [
        {"token_id": 7, "text": "\N{REPLACEMENT CHARACTER}", "lift": 2.0},
        {"token_id": 8, "text": "a", "lift": 1.5},
    ]
    table = inspect_tables._top_tokens({"layers": [{"layer": 0, "top_tokens": {"s/L0/E0": tokens}}]})
    assert [str(cell) for cell in table.columns[1].cells] == ["#7 ×2.0  'a' ×1.5"]


def test_many_experts_are_cut_short() -> None:
    layer = {"layer": 0, "top_tokens": {f"s/L0/E{e}": [] for e in range(60)}}
    table = inspect_tables._top_tokens({"layers": [layer]})
    assert table.row_count == 48 and table.caption == "12 more experts in inspection.json"
