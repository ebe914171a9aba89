"""The limits that keep the code readable, and the measure of them that docs/design.md shows."""

from __future__ import annotations

from pathlib import Path

from tests import house


def test_no_folder_holds_more_files_than_one_overlooks() -> None:
    assert {folder: num for folder, num in house.folders(house.ROOT).items() if num > 18} == {}


def test_no_function_takes_eight_arguments_or_is_longer_than_a_page() -> None:
    assert house.many_parameters(house.ROOT) == []
    assert house.long_functions(house.ROOT) == []


def test_signatures_name_what_they_carry() -> None:
    assert house.untyped_dicts(house.ROOT).total() <= 60


def test_comments_stand_beside_the_lines_that_need_them() -> None:
    assert house.measure_text(house.ROOT)["comment_percent"] >= 3


def test_what_is_measured(tmp_path: Path) -> None:
    room = tmp_path / "lifelong_moe" / "ops"
    room.mkdir(parents=True)
    body = "\n".join(f"    x{i} = {i}" for i in range(60))
    (room / "a.py").write_text(
        "# Why.\n"
        "x = 1  # beside\n"
        "# noqa: E501\n"
        "def wide(self, a, b, c, d, e, f, /, g, *, h): ...\n"
        "def narrow(self, a, b, c, d, e, f, g): ...\n"
        f"def long():\n{body}\n"
        "def untyped(a: dict[str, Any], b: list[dict[str, Any]]) -> dict[str, Any]: ...\n"
    )
    assert house.many_parameters(tmp_path) == ["lifelong_moe/ops/a.py:wide"]
    assert house.long_functions(tmp_path) == ["lifelong_moe/ops/a.py:long"]
    assert house.untyped_dicts(tmp_path) == {"lifelong_moe/ops/a.py": 3}
    assert house.comment_lines((room / "a.py").read_text()) == 1
    assert house.folders(tmp_path) == {"lifelong_moe/ops": 1}
