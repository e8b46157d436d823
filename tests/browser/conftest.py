"The browser that these tests drive: the system's Chromium; nothing is downloaded. Screenshots go to build/screenshots."
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))
from patience import still  # noqa: E402

root = Path(__file__).resolve().parents[2]
shots = Path(os.environ.get('SCREENSHOTS') or root/'build'/'screenshots')
quiet = ('--disable-gpu --disable-background-networking --disable-component-update --disable-sync --no-first-run '
         '--disable-dev-shm-usage').split()


@pytest.fixture(scope='session')
def browser():
    path = next((p for name in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(name))), None)
    if path is None: pytest.skip('needs Chromium: no chromium, chromium-browser or google-chrome is on the PATH')
    playwright = pytest.importorskip('playwright.sync_api', reason="needs Playwright: pip install -e '.[dev]'")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=[*quiet, *(['--no-sandbox'] if os.geteuid() == 0 else [])])
        yield browser
        browser.close()


class Visit:
    "A page, and what went wrong in it: errors, failed requests, requests to other hosts"
    def __init__(self, browser, name, **kwargs):
        self.context, self.name, self.wrong = browser.new_context(**kwargs), name, []
        self.context.set_default_timeout(1000*still)                    # what a click waits for may be slow, on a busy machine
        self.page = self.context.new_page()
        self.page.on('pageerror', lambda e: self.wrong.append(f'{self.page.url}: {e}'))
        self.page.on('response', lambda r: r.status >= 400 and self.wrong.append(f'{r.status}: {r.url}'))
        self.context.route(re.compile(r'^https?://(?!127\.0\.0\.1[:/])'), self.foreign)

    def foreign(self, route):
        self.wrong.append(f'{self.page.url} asks another host: {route.request.url}')
        route.abort()

    def shot(self, what='', **kwargs):
        shots.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=shots/f'{self.name}{what and "-"}{what}.png', **kwargs)


@pytest.fixture
def visit(browser, request):
    "visit(width=…, height=…) opens an empty page; at the end there is a screenshot of each, and nothing may have gone wrong"
    visits = []

    def open_page(width=1280, height=900, **kwargs):
        name = re.sub(r'\W+', '-', request.node.name).strip('-')
        visits.append(Visit(browser, name, viewport=dict(width=width, height=height), **kwargs))
        return visits[-1]
    yield open_page
    for v in visits:
        v.shot()
        v.context.close()
    assert not [w for v in visits for w in v.wrong]
