"""Draws the README's pictures of the dashboard: ``python verification/m3_dashboard/draw_images.py RUN [FOLDER]``.

RUN is the folder of a finished run, as ``make demo`` leaves it.
"""

import sys
import tempfile
from pathlib import Path

from dashboard_server import CHROMIUM, ROOT, Server, environment, free_port, started
from playwright.sync_api import sync_playwright

VIEWS = {"metrics": "Metrics", "completions": "Completions"}
WIDTH, HEIGHT = 1440, 900


def draw(run: Path, out: Path) -> None:
    """Write a picture of each view, the whole page in a light browser window of ``WIDTH`` pixels."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        port = free_port()
        command = [sys.executable, "-m", "streamlit", "run", str(ROOT / "dashboard" / "app.py")]
        command += ["--server.port", str(port), "--", str(run.parent)]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        with started(command, Server(run.parent, port, 0, Path(folder) / "log"), environment()) as server:
            page = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
            for name, view in VIEWS.items():
                page.goto(f"{server.url}/?run={run.name}&view={view}&pause=true")
                page.wait_for_selector("canvas.marks", timeout=60_000)
                page.wait_for_timeout(5000)  # until all charts are drawn
                page.screenshot(path=out / f"{name}.png")
        chromium.close()


if __name__ == "__main__":
    draw(
        Path(sys.argv[1]).resolve(),
        Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "dashboard" / "images",
    )
