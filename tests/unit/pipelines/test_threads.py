"""How many threads a container may start: over copies of the kernel's files. No torch is timed here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import cli
from pipelines.shared import threads

V1 = "4:memory:/docker/a\n3:cpu,cpuacct:{path}\n2:cpuset:/docker/a\n1:name=systemd:/x\n"


def kernel(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """A root with ``/proc/self/cgroup`` and files under ``/sys/fs/cgroup``."""
    for name, text in {"proc/self/cgroup": cgroup, **{f"sys/fs/cgroup/{n}": t for n, t in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1_FILES = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
V2 = "0::/pods/a/b\n"
CASES: dict[str, tuple[str, dict[str, str], float | None]] = {
    "no limit": ("0::/\n", {"cpu.max": "max 100000\n"}, None),
    "a container's own namespace": ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0),
    "a part of a processor": ("0::/\n", {"cpu.max": "25000 50000\n"}, 0.5),
    "its own group": (V2, {"pods/a/b/cpu.max": "150000 100000\n", "pods/a/cpu.max": "max 100000\n"}, 1.5),
    "a group above is stricter": (V2, {"pods/a/b/cpu.max": "800000 100000\n", "pods/cpu.max": "300000 100000\n"}, 3.0),
    "the host's path, and another mount": (V2, {"cpu.max": "400000 100000\n"}, 4.0),
    "a path above the namespace's root": ("0::/../../x\n", {"cpu.max": "400000 100000\n"}, 4.0),
    "the root group of a host, which has no limit": ("0::/\n", {}, None),
    "version 1": (V1.format(path="/docker/a"), {f"cpu,cpuacct/docker/a/{V1_FILES[0]}": "350000", f"cpu,cpuacct/docker/a/{V1_FILES[1]}": "100000"}, 3.5),  # noqa: E501
    "version 1, mounted under one name": (V1.format(path="/"), {f"cpu/{V1_FILES[0]}": "100000", f"cpu/{V1_FILES[1]}": "100000"}, 1.0),  # noqa: E501
    "version 1 without a limit": (V1.format(path="/"), {f"cpu/{V1_FILES[0]}": "-1", f"cpu/{V1_FILES[1]}": "100000"}, None),  # noqa: E501
    "both, of which version 1 has the processors": (V1.format(path="/") + "0::/\n", {f"cpu/{V1_FILES[0]}": "700000", f"cpu/{V1_FILES[1]}": "100000"}, 7.0),  # noqa: E501
    "what nobody writes": ("0::/\n", {"cpu.max": "many 0\n"}, None),
    "a line cut short": ("0", {"cpu.max": "1"}, None),
}  # fmt: skip


@pytest.mark.parametrize(("cgroup", "files", "quota"), CASES.values(), ids=CASES.keys())
def test_the_quota_of_processors(tmp_path: Path, cgroup: str, files: dict[str, str], quota: float | None) -> None:
    assert threads.processor_quota(kernel(tmp_path, cgroup, files)) == quota


def test_where_there_is_no_such_kernel(tmp_path: Path) -> None:
    assert threads.processor_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("processors", "quota", "number"),
    [(64, 2.0, "2"), (64, 2.9, "2"), (64, 0.5, "1"), (2, 2.0, None), (2, 8.0, None), (8, None, None), (2, 1.5, "1")],
)
def test_never_more_threads_than_the_quota(processors: int, quota: float | None, number: str | None) -> None:
    settings = threads.thread_settings({"PATH": "x"}, processors, quota)
    assert settings.get("OMP_NUM_THREADS") == number and settings["GOMP_SPINCOUNT"] == threads.SPINS


def test_what_a_user_set_is_left_alone() -> None:
    for name in threads.HOW_TO_WAIT:
        assert threads.thread_settings({name: "x"}, 64, 2.0) == {"OMP_NUM_THREADS": "2"}
    for name in threads.HOW_MANY:
        assert threads.thread_settings({name: "8"}, 64, 2.0) == {"GOMP_SPINCOUNT": threads.SPINS}
    assert threads.thread_settings({"OMP_NUM_THREADS": "8", "OMP_WAIT_POLICY": "ACTIVE"}, 64, 2.0) == {}


def test_it_is_said_once_where_threads_become_fewer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(threads, "schedulable", lambda: 64)
    environ: dict[str, str] = {}
    threads.configure(environ, kernel(tmp_path, "0::/\n", {"cpu.max": "250000 100000\n"}))
    assert environ == {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": threads.SPINS}
    threads.say()
    told = capsys.readouterr().err
    assert told.startswith("threads: 2, ") and "2.5 of 64 processors" in told and told.count("\n") == 1
    threads.say()
    threads.configure(environ, tmp_path)  # a child finds it set
    threads.configure(unlimited := {}, tmp_path / "nowhere")
    threads.say()
    assert capsys.readouterr().err == "" and list(unlimited) == ["GOMP_SPINCOUNT"]


def test_a_program_that_has_torch_keeps_its_environment(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    assert "torch" in sys.modules
    threads.configure(environ, kernel(tmp_path, "0::/\n", {"cpu.max": "50000 100000\n"}))
    assert environ == {}


def test_the_command_sets_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(cli.threads, "configure", lambda: seen.append("threads"))
    monkeypatch.setattr(cli, "app", lambda: seen.append("command"))
    monkeypatch.setattr(cli.output, "make_robust", lambda: None)
    with pytest.raises(SystemExit):
        cli.main()
    assert seen == ["threads", "command"]


def test_torch_s_openmp_reads_it() -> None:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    library = Path(spec.origin).parent / "lib" / "libgomp.so.1"
    if not library.is_file():
        pytest.skip("this torch has another OpenMP")
    code = (
        "import ctypes, sys\nimport pipelines.cli as cli\nassert 'torch' not in sys.modules\n"
        f"cli.threads.configure()\nctypes.CDLL({str(library)!r})"
    )
    taken = (*threads.HOW_TO_WAIT, *threads.HOW_MANY)
    environment = {n: v for n, v in os.environ.items() if n not in taken} | {"OMP_DISPLAY_ENV": "verbose"}
    command = [sys.executable, "-c", code]
    root = Path(threads.__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = '{threads.SPINS}'" in done.stderr
