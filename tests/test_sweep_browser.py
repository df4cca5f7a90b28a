"""report.html in a real browser, at two widths: all pictures and tables are whole, and no network is asked."""

import contextlib
import json
import os
import shutil
import subprocess

import pytest

from tests.sweep_fakes import Fakes

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(not BROWSER, reason=f"no browser on PATH, such as {NAMES[0]}")

LOOK = """
({
  title: document.title,
  pictures: [...document.images].map(i => [i.complete, i.naturalWidth, i.width]),
  tables: [...document.querySelectorAll('table')].map(t => [t.rows.length, t.rows[1].innerText]),
  logs: [...document.querySelectorAll('details')].map(d => { d.open = true; return d.innerText; }),
  beyond: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  hidden: [...document.querySelectorAll('.wide')].map(w => w.scrollWidth - w.clientWidth),
  fetched: performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).map(e => e.name),
})
"""
# The column `trial` of the first table after clicks on the metric's heading.
SORT = """
(() => {
  const table = document.querySelector('table');
  const trials = () => [...table.tBodies[0].rows].map(row => row.cells[1].textContent);
  const click = column => { table.tHead.rows[0].cells[column].firstElementChild.click(); return trials(); };
  return [trials(), click(3), click(3), click(1)];
})()
"""
WIDE, NARROW = 1280, 500  # pixels of a window


class Browser:
    """A headless Chromium, spoken to over its debugging pipe: JSON messages that end with a zero byte."""

    def __init__(self, profile):
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        # It reads descriptor 3 and writes descriptor 4.
        shell = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, BROWSER, *flags, "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._number, self._rest, self.events = 0, b"", []

    def call(self, method: str, session: str | None = None, **params) -> dict:
        """The result of a command; events that come before it are kept in `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def wait(self, event: str) -> None:
        while not any(seen["method"] == event for seen in self.events):
            self.events.append(self._read())

    def _read(self) -> dict:
        while b"\0" not in self._rest:
            piece = os.read(self._in, 1 << 16)
            assert piece, "the browser is gone"
            self._rest += piece
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._out, b'{"id": 0, "method": "Browser.close"}\0')
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._out)
        os.close(self._in)


@pytest.fixture
def browser(tmp_path):
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


def test_report_in_a_browser(tmp_path, browser):
    fakes = Fakes(tmp_path, ("fine", "better", "full disk"), pictures=True)
    fakes.run("--seeds=2", status=1)
    target = browser.call("Target.createTarget", url="about:blank")["targetId"]
    session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Network", "Log", "Runtime"):
        browser.call(f"{domain}.enable", session)
    url = (fakes.out / "report.html").absolute().as_uri()

    def evaluate(code):
        return browser.call("Runtime.evaluate", session, expression=code, returnByValue=True)["result"]["value"]

    def look(width):
        size = dict(width=width, height=1000, deviceScaleFactor=1, mobile=False)
        browser.call("Emulation.setDeviceMetricsOverride", session, **size)
        return evaluate(LOOK)

    browser.call("Page.navigate", session, url=url)
    browser.wait("Page.loadEventFired")
    seen = look(WIDE)
    assert seen["title"] == "ablation of fake.py"
    assert [rows for rows, _ in seen["tables"]] == [1 + 3, 1 + 3, 1 + 2]  # trials, their costs, those that are not done
    assert seen["tables"][0][1].startswith("1\tprompt=fine\t2\t4.0625 ± 0.0884")
    assert sum(log.startswith("End of") and "No space left on device" in log for log in seen["logs"]) == 2
    assert seen["hidden"] == [0, 0, 0]  # tables are whole, and not cut at the side
    narrow = look(NARROW)
    for state, least in ((seen, 450), (narrow, NARROW - 40)):
        assert len(state["pictures"]) == 8
        assert all(complete and natural > 900 and least < shown for complete, natural, shown in state["pictures"])
        assert state["beyond"] <= 0  # the page does not scroll sideways

    fine, better, full = ("prompt=fine", "prompt=better", "prompt=full disk")
    assert evaluate(SORT) == [[fine, better, full], [fine, better, full], [better, fine, full], [better, fine, full]]

    assert seen["fetched"] == []
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert asked[0] == url and all(other.startswith("data:") for other in asked[1:])
    complaints = [e for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    assert complaints == []
