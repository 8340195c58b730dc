"""What the tests of the repository and of the built site share."""
import functools, http.server, os, shutil, threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"

def need(condition, reason):
    "Skip the test where something is missing; on a build server that is a failure, for there the test must not silently vanish."
    if condition: return
    if os.environ.get("CI", "").lower() in ("1", "true"): pytest.fail(reason)
    pytest.skip(reason)

@pytest.fixture(scope="session")
def root():
    return ROOT

@pytest.fixture(scope="session")
def site():
    "The folder of the built site."
    need((SITE / "index.html").is_file(), "the site is not built: run `make book` first")
    return SITE

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_): pass

@pytest.fixture(scope="session")
def address(site):
    "The built site, served on this machine only."
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()

@pytest.fixture(scope="session")
def browser():
    "Chromium as the operating system installs it."
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    need(chromium, "no Chromium here; on Debian: apt install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()
