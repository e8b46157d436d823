"The built site as a reader meets it: every page, search, mathematics, dark mode, a phone."
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[2]
if sys.version_info < (3, 11): pytest.skip('needs the site, which needs Python 3.11 or newer', allow_module_level=True)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


@pytest.fixture(scope='module')
def site(browser):
    "The site's address on this machine; it is built where `make docs` has not been run"
    if not (root/'_docs'/'index.html').exists(): subprocess.run([sys.executable, 'tools/docs.py'], cwd=root, check=True, timeout=300)
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=root/'_docs'))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


def pages(page): return page.eval_on_selector_all('#quarto-sidebar a.sidebar-link[href]', 'links => links.map(a => a.href)')


def pictures(page):
    "How wide each picture is; 0 for one that did not load"
    return page.eval_on_selector_all('main img', 'all => Promise.all(all.map(i => i.decode().catch(() => 0).then(() => i.naturalWidth)))')


def test_front_page(site, visit):
    v = visit()
    v.page.goto(site)
    assert v.page.locator('h1').first.inner_text() == 'resnet_fastai'
    assert pictures(v.page) and all(pictures(v.page))
    assert v.page.locator('main img').first.get_attribute('alt')
    links = pages(v.page)
    names = [link.rpartition('/')[2] for link in links]
    assert names[:2] == ['index.html', 'data.html'] and names.index('training.html') < names.index('core.html')
    assert sum('/experiments/' in link for link in links) >= 3 and len(set(links)) == len(links)


def test_every_page(site, visit):
    "Each opens from the sidebar with its headings, pictures with words for who cannot see them, and a link to Colab that names its notebook"
    v = visit()
    v.page.goto(site)
    for link in pages(v.page):
        v.page.goto(link)
        assert v.page.locator('h1').count() == 1 and v.page.locator('main').inner_text(), link
        assert all(pictures(v.page)), link
        silent = v.page.eval_on_selector_all('main img', 'all => all.filter(i => !i.alt.trim()).length')
        assert not silent, f'{silent} pictures without alt text: {link}'
        colab = v.page.locator('a[href^="https://colab.research.google.com/github/"]').get_attribute('href')
        notebook = colab.partition('/blob/main/')[2]
        assert (root/notebook).is_file(), colab
        v.shot(link.removeprefix(site).strip('/').replace('/', '-'), full_page=True)


def test_search_finds_a_class(site, visit):
    v = visit()
    v.page.goto(site)
    v.page.locator('#quarto-search input, #quarto-search button').first.click()
    v.page.keyboard.type('PCALighting')
    v.page.locator('a[href*="augment.html"]:visible', has_text='PCALighting').first.wait_for(timeout=10_000)
    v.shot('found')
    v.page.locator('a[href*="augment.html"]:visible', has_text='PCALighting').first.click()
    v.page.wait_for_url('**/augment.html*')


def test_mathematics_is_drawn(site, visit):
    v = visit()
    v.page.goto(site + '/augment.html')
    drawn = v.page.eval_on_selector_all('math', 'all => all.map(m => m.getBoundingClientRect()).map(r => [r.width, r.height])')
    assert drawn and all(w > 4 and h > 8 for w, h in drawn)
    assert '\\[' not in v.page.locator('main').inner_text()


def brightness(page): return page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).slice(0, 3).map(Number).reduce((a, b) => a + b)/765")


def test_dark_mode(site, visit):
    "It toggles, stays on the next page, and leaves text and pictures readable"
    v = visit(color_scheme='light')
    v.page.goto(site + '/augment.html')
    assert brightness(v.page) > .9
    v.page.locator('.quarto-color-scheme-toggle:visible').first.click()
    v.page.wait_for_function("document.documentElement.classList.contains('quarto-dark')")
    assert brightness(v.page) < .3
    v.page.goto(site + '/model.html')
    assert brightness(v.page) < .3
    text = "getComputedStyle(document.querySelector('main p')).color.match(/[0-9.]+/g).slice(0, 3).map(Number).reduce((a, b) => a + b)/765"
    assert v.page.evaluate(text) > .6


def test_a_phone(site, visit):
    "No page scrolls sideways"
    v = visit(390, 844, is_mobile=True, has_touch=True)
    v.page.goto(site)
    for link in pages(v.page):
        v.page.goto(link)
        wide, room = v.page.evaluate('[document.documentElement.scrollWidth, document.documentElement.clientWidth]')
        assert wide <= room, f'{link}: {wide} pixels in a window of {room}'
