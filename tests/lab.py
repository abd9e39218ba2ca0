"""JupyterLab in headless Chromium, as a person would use it: for the test of the viewer and for its screenshot."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--force-color-profile=srgb")
TOKEN = "lab"
WAIT_MS = 120_000  # for anything, on a busy machine too; what does not come in this time does not come


def chromium() -> str | None:
    """The path of a Chromium, None where the machine has none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextlib.contextmanager
def server(folder: Path):
    """JupyterLab on a free port, its files in `folder`, its settings and state nowhere else: its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = folder / ".lab"
    settings = own / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    options = {
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.open_browser": False,
        "ServerApp.root_dir": folder,
        "IdentityProvider.token": TOKEN,
        "LabApp.user_settings_dir": own / "settings",
        "LabApp.workspaces_dir": own / "workspaces",
    }
    homes = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    env = {**os.environ, **{name: str(own / name.lower()) for name in homes}}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), env.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "jupyterlab", *(f"--{key}={value}" for key, value in options.items())]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    with open(own / "server.log", "wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api?token={TOKEN}", process, own / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()  # it ends its kernels too
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + WAIT_MS / 1000
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"JupyterLab does not start:\n{log.read_text()[-2000:]}")


@contextlib.contextmanager
def notebook(folder: Path, cells: list[str], width: int = 1500, height: int = 1100):
    """A page of JupyterLab with a notebook of these code cells open, none of them run yet."""
    from playwright.sync_api import sync_playwright

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, folder / "book.ipynb")
    with server(folder) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(WAIT_MS)
        page.goto(f"{address}/lab/tree/book.ipynb?reset&token={TOKEN}")
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()  # a cell run sooner is not run at all
        try:
            yield page
        finally:
            browser.close()


def run_cell(page, number: int) -> None:
    """Runs a cell, and comes back before it has ended."""
    page.locator(".jp-Notebook .jp-Cell").nth(number).locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")


class ViewerPage:
    """The viewer on a page, by what a person sees and does."""

    def __init__(self, page):
        self.page, self.root = page, page.locator(".pathfm-viewer")
        self.slide = self.root.locator(".pathfm-slide")
        self.message, self.closeup = self.root.locator(".pathfm-message"), self.root.locator(".pathfm-closeup")

    def view(self) -> dict:
        """Where the page looks: slide_id, x, y, mpp."""
        return json.loads(self.slide.get_attribute("data-view") or "{}")

    def counts(self) -> dict:
        """Squares asked for, answered and forgotten."""
        return json.loads(self.slide.get_attribute("data-counts") or "{}")

    def until(self, script: str, *arguments) -> None:
        """Waits until JavaScript `(root, ...arguments) => truth` holds."""
        self.page.wait_for_function(
            f"(given) => ({script})(document.querySelector('.pathfm-viewer'), ...given)", arg=list(arguments)
        )

    def settled(self) -> None:
        """Waits until every square of the view has come and nothing moves."""
        self.until("(root) => root.querySelector('.pathfm-slide').dataset.waiting === '0'")
        self.page.wait_for_function(
            """() => new Promise((done) => {
                const slide = document.querySelector('.pathfm-slide');
                const place = () => slide.querySelector('.pathfm-overlay g').getAttribute('transform');
                const before = place();
                setTimeout(() => done(before === place() && slide.dataset.waiting === '0'), 250);
            })"""
        )

    def moved(self, act) -> dict:
        """Where the page looks after `act`, which must move it."""
        before = self.slide.get_attribute("data-view")
        act()
        self.until("(root, before) => root.querySelector('.pathfm-slide').dataset.view !== before", before)
        self.settled()
        return self.view()

    def middle(self) -> tuple[float, float]:
        box = self.slide.bounding_box()
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def drag(self, by_x: float, by_y: float) -> None:
        """A slow drag of the slide from its middle."""
        x, y = self.middle()
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(x + by_x, y + by_y, steps=8)
        self.page.mouse.up()

    def wheel(self, clicks: int) -> None:
        """Turns the wheel over the middle; up, and so nearer, where `clicks` is positive."""
        self.page.mouse.move(*self.middle())
        for _ in range(abs(clicks)):
            self.page.mouse.wheel(0, -100 if clicks > 0 else 100)
            self.page.wait_for_timeout(60)  # as a hand; OpenSeadragon takes one click in 50 ms

    def control(self, name: str):
        return self.root.locator(f"[data-name='{name}']")

    def press(self, name: str, key: str, times: int = 1) -> None:
        """Keys on a control, as a slider takes them."""
        self.control(name).focus()
        for _ in range(times):
            self.page.keyboard.press(key)

    def choose_slide(self, name: str) -> None:
        self.control("slide_id").fill(name)
        self.page.keyboard.press("Tab")

    def tiles(self) -> list[dict]:
        """The outlines drawn: number, colour and where on the page."""
        script = """(rects) => rects.map((rect) => {
            const box = rect.getBoundingClientRect();
            return {i: +rect.dataset.i, colour: rect.getAttribute('stroke'),
                    x: box.x, y: box.y, width: box.width, height: box.height};
        })"""
        return self.root.locator(".pathfm-overlay rect[data-i]").evaluate_all(script)

    def click_tile(self, i: int) -> None:
        """Clicks the middle of tile i's outline and waits for its close-up."""
        box = next(tile for tile in self.tiles() if tile["i"] == i)
        self.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        self.until("(root, i) => root.querySelector('.pathfm-closeup').dataset.i === i", str(i))
