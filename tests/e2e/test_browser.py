"""Pages as a browser shows them; skipped where there is none."""

from __future__ import annotations

import html
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from lifelong_moe.config.tracking import TrackingConfig
from lifelong_moe.reports.pages.run import SECTIONS
from lifelong_moe.reports.pages.shell import POLICY
from lifelong_moe.tracking.pages.links import view_url
from lifelong_moe.tracking.pages.server import serve_command, serving, wait_until_up
from lifelong_moe.tracking.pages.views import RUNS, SECTION, comparison_view
from lifelong_moe.tracking.tracker import Tracker
from tests.e2e.conftest import Cli

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; install chromium to see the pages in a browser"),
]
TEXT = "apple <script>document.title='ran'</script> pear"
NARROW = 400
"""Width of a telephone."""


def browse(page: Path | str, tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page without a network and without a profile of the user's."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0", "--hide-scrollbars"]
    # Names resolve to nothing: a page that asks for one would say so.
    command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", *options]
    command.append(page if isinstance(page, str) else page.resolve().as_uri())
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(scope="module")
def pages(trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the trained directory, because inspecting writes."""
    root = tmp_path_factory.mktemp("browsed") / "lab"
    shutil.copytree(trained_once, root)
    return root


@pytest.fixture
def page(pages: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """The page of a run, or of a text."""
    monkeypatch.chdir(pages)
    if request.param == "run":
        return pages / "mlruns/runs/tiny/report.html"
    result = cli("inspect", "tiny", "--text", TEXT, "--html", "text.html")
    assert result.code == 0, result.err
    return pages / "text.html"


@pytest.mark.parametrize("page", ["run", "text"], indirect=True)
def test_a_browser_shows_the_page_and_asks_for_nothing(page: Path, tmp_path: Path) -> None:
    shown = browse(page, tmp_path, "--dump-dom")
    assert "<h1>" in shown.stdout and "<title>ran" not in shown.stdout
    said = SECTIONS if "report" in page.name else ("Legend", "apple <script>document.title")
    text = re.sub(r"<sup>\d</sup>|<[^>]*>", "", shown.stdout)
    text = html.unescape(text)
    assert all(one in text for one in said)
    # What a page is refused or lacks stands in the console.
    assert not re.search(r"CONSOLE|Refused|ERR_", shown.stderr), shown.stderr


def test_mlflow_opens_with_the_columns_and_charts_of_a_view(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    root = tmp_path / "mlruns"
    tracker = Tracker.connect(TrackingConfig(), root)
    for arm, loss in (("worse", 2.5), ("better", 1.25)):
        run = tracker.start_run(f"{arm} arm", tags={"comparison": "c"})
        tracker.log_metrics(
            run, [("all/heldout_mean_bits_per_byte", loss, 0), ("all/forgetting_worst_percent", 7.0, 0)]
        )
    tracker.save_view(run, "comparison", "c")
    other = tracker.start_run("another run")
    assert tracker.problem is None and other is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command, environment = serve_command(None, root, port, "127.0.0.1")
    shown = []
    with serving(command, environment) as server:
        base = f"http://127.0.0.1:{port}"
        assert wait_until_up(base, 90, server, lambda: MlflowClient(base).search_experiments() != [])
        for view in (RUNS, comparison_view("comparison", "c")):
            address = view_url(base, str(tracker.experiment_id), view)
            shown.append(browse(address, tmp_path, "--dump-dom", "--virtual-time-budget=30000").stdout)
    assert all("Error loading shared view state" not in page for page in shown)
    for page in shown:
        assert 0 < page.index("better arm") < page.index("worse arm")
    assert "Best held-out loss first" in shown[0] and "another run" in shown[0] and "forgetting_worst" in shown[0]
    assert "Comparison c" in shown[1] and SECTION in shown[1] and "another run" not in shown[1]


@pytest.mark.parametrize("page", ["run", "text"], indirect=True)
def test_both_schemes_are_shown(page: Path, tmp_path: Path) -> None:
    images = []
    for scheme in (1, 0):  # light, dark
        image = tmp_path / f"{scheme}.png"
        browse(page, tmp_path, f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={image}")
        images.append(image.read_bytes())
    assert images[0] != images[1] and all(image.startswith(b"\x89PNG") for image in images)


@pytest.mark.parametrize("page", ["run", "text"], indirect=True)
def test_nothing_reaches_over_a_narrow_screen(page: Path, tmp_path: Path) -> None:
    # The page runs no script, so a copy without its policy measures itself.
    measure = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    copy = tmp_path / "copy.html"
    copy.write_text(page.read_text("utf-8").replace(POLICY, "").replace("</body>", measure), "utf-8")
    frame = tmp_path / "frame.html"
    # A window has a least width; a frame has none.
    frame.write_text(
        f'<iframe src="copy.html" style="border:0" width={NARROW} height=2000></iframe>'
        "<script>onload = () => document.title = frames[0].document.title</script>"
    )
    shown = browse(frame, tmp_path, "--dump-dom", "--allow-file-access-from-files")
    assert f"<title>{NARROW} of {NARROW}</title>" in shown.stdout, shown.stdout[:300]
