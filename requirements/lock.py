"""Write the lock files beside this one: every version that an installation takes, with the hashes of its files.

``make lock`` runs it with uv, from the versions that are locked already; ``make lock UPGRADE=1`` takes newer ones. What
is resolved holds for Python 3.11 to 3.13 on Linux and macOS. It needs a network; installing needs it once.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

FOLDER = Path(__file__).parent
PROJECT = FOLDER.parent / "pyproject.toml"
TORCH = re.compile(r"torch$|nvidia-|cuda-|triton$")
"""Torch and what only its CUDA build needs, by the beginning of their names."""

# The index of packages has torch's CUDA build for Linux. The CPU build of the same version, called +cpu, comes from
# torch's own index or from a file, so uv does not find these hashes: take them from that index. Order: Python 3.11,
# 3.12 and 3.13 for x86_64, then for aarch64.
TORCH_CPU = {
    "2.13.0": (
        "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
        "4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2",
        "3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6",
        "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7",
        "6f307c2c32d764ffc6ff6893b801fad6d4752f3e67966cb8abf1843427c02604",
        "0b8f7d0423027ae8b90c7977c627f3379f325363a08224dffad9b4b2d684a83d",
    )
}
"""SHA-256 of the wheels of torch's CPU build, by version."""

Entries = dict[str, str]
"""The lines of each package, by its name."""

TITLES = {
    "base.txt": "What lifelong-moe runs with besides torch, and what builds it.",
    "torch.txt": "Torch as the index of packages has it: for Linux with CUDA and its libraries.",
    "torch-cpu.txt": "Torch's CPU build for Linux, in place of torch.txt where pip finds it.",
    "dev.txt": "The extras dev, transformers, gguf and signing, besides base.txt and torch.",
    "release.txt": "The tools of a release, in an environment of their own.",
}


def resolve(requirements: Iterable[str], *arguments: str, known: Entries, upgrade: bool) -> Entries:
    """Resolve requirements, and return the packages with their hashes.

    Args:
        requirements: More of them, as in a requirements file.
        arguments: For ``uv pip compile``, such as further files.
        known: What is locked now, and stays unless it no longer fits.
        upgrade: Take the newest versions instead.
    """
    with tempfile.TemporaryDirectory() as folder:
        # uv prefers the versions that its output file has already.
        output = Path(folder) / "lock.txt"
        output.write_text("".join(known.values()), encoding="utf-8")
        command = [sys.executable, "-m", "uv", "pip", "compile", *arguments, "-", "--output-file", str(output)]
        command += ["--universal", "--python-version=3.11", "--generate-hashes", "--no-header", "--no-annotate"]
        command += ["--upgrade"] if upgrade else []
        done = subprocess.run([*command, "--quiet"], input="\n".join(requirements), text=True)
        if done.returncode:
            raise SystemExit(done.returncode)
        return entries(output.read_text(encoding="utf-8"))


def entries(text: str) -> Entries:
    """The packages of a requirements file with hashes."""
    # A package is a line with its version, and one for each hash.
    found = re.finditer(r"^([\w.-]+)==.*\n(?: +--hash=.*\n)*", text, re.MULTILINE)
    return {match[1]: match.group() for match in found}


def cpu_build(entry: str) -> str:
    """The CPU build of the version of torch that an entry locks."""
    version = entry.removeprefix("torch==").split()[0]
    if version not in TORCH_CPU:
        raise SystemExit(f"torch=={version}: add the hashes of its CPU build to TORCH_CPU in {__file__}")
    # A file of its own: pip prefers files whose hashes the index states, and so CUDA, if both stand in one entry.
    return " \\\n    ".join([f"torch=={version}+cpu", *(f"--hash=sha256:{one}" for one in TORCH_CPU[version])]) + "\n"


def read(names: Iterable[str]) -> Entries:
    """What lock files hold; those that are absent hold nothing."""
    paths = [FOLDER / name for name in names]
    return entries("".join(path.read_text(encoding="utf-8") for path in paths if path.is_file()))


def write(locks: Mapping[str, Entries]) -> None:
    """Write the lock files."""
    for name, packages in locks.items():
        lines = "".join(packages[one] for one in sorted(packages))
        text = f"# {TITLES[name]}\n# Made by make lock; see requirements/lock.py. Not to be edited.\n{lines}"
        (FOLDER / name).write_text(text, encoding="utf-8")


def main() -> None:
    """Resolve and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    upgrade = parser.parse_args().upgrade
    known = read(("base.txt", "torch.txt", "dev.txt"))
    build = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["build-system"]["requires"]
    extras = [f"--extra={name}" for name in ("dev", "transformers", "gguf", "signing")]
    # All extras together first, so that the base has the same versions with and without them.
    everything = resolve(build, str(PROJECT), *extras, known=known, upgrade=upgrade)
    needed = resolve(build, str(PROJECT), known=everything, upgrade=False)
    tools = resolve([], str(FOLDER / "release.in"), known=read(["release.txt"]), upgrade=upgrade)
    torch = {name: entry for name, entry in needed.items() if TORCH.match(name)}
    base = {name: entry for name, entry in needed.items() if name not in torch}
    more = {name: entry for name, entry in everything.items() if name not in needed}
    cpu = {"torch": cpu_build(torch["torch"])}
    write({"base.txt": base, "torch.txt": torch, "torch-cpu.txt": cpu, "dev.txt": more, "release.txt": tools})


if __name__ == "__main__":
    main()
