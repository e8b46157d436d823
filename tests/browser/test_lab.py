"JupyterLab as a reader uses it: a chapter is opened, Run All is clicked, figures appear, a widget answers."
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from patience import still, until, used

from resnet_fastai.engine.demo_photos import draw_photo

root = Path(__file__).resolve().parents[2]


class Address(str): "Of a server, with the number of its process"


@pytest.fixture(scope='module')
def lab(browser, tmp_path_factory):
    "JupyterLab's address, over a copy of the notebooks; with settings of its own, and every cell in the page"
    tmp = tmp_path_factory.mktemp('lab')
    shutil.copytree(root/'nbs', tmp/'nbs', ignore=shutil.ignore_patterns('.*', 'models', '_proc'))
    (settings := tmp/'settings'/'@jupyterlab'/'notebook-extension').mkdir(parents=True)
    (settings/'tracker.jupyterlab-settings').write_text(json.dumps(dict(windowingMode='none')))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = os.environ | dict(JUPYTER_CONFIG_DIR=str(tmp/'config'), JUPYTERLAB_SETTINGS_DIR=str(tmp/'settings'),
                            JUPYTERLAB_WORKSPACES_DIR=str(tmp/'workspaces'), IPYTHONDIR=str(tmp/'ipython'))
    env.pop('MPLBACKEND', None)                                    # tests draw without a screen; a notebook draws into its cells
    log = open(tmp/'log', 'w')
    cmd = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--ip=127.0.0.1', f'--port={port}', '--IdentityProvider.token=t',
           f'--ServerApp.root_dir={tmp/"nbs"}', '--LabApp.news_url=', '--LabApp.extension_manager=readonly',
           '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', *(['--allow-root'] if os.geteuid() == 0 else [])]
    server = subprocess.Popen(cmd, env=env, stdout=log, stderr=subprocess.STDOUT)
    at = Address(f'http://127.0.0.1:{port}')
    at.pid = server.pid

    def answers():
        assert server.poll() is None, (tmp/'log').read_text()[-2000:]
        try: return urllib.request.urlopen(f'{at}/api/status?token=t', timeout=still)
        except OSError: return None
    until(answers, every=.25)
    yield at
    server.terminate()
    server.wait()
    log.close()


def open_notebook(v, lab, path):
    v.page.goto(f'{lab}/lab/workspaces/{Path(path).stem}/tree/{path}?token=t')
    v.page.wait_for_selector('.jp-Notebook .jp-CodeCell')
    v.page.wait_for_selector('#jp-main-statusbar >> text=/\\(ipykernel\\) \\| Idle/')             # the notebook's own sign says idle too soon


def ended(v):
    "Is the kernel idle again, with a number for every cell, or an error?"
    prompts = v.page.eval_on_selector_all('.jp-CodeCell .jp-InputPrompt', 'all => all.map(p => p.innerText.trim())')
    idle = v.page.evaluate("document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status == 'idle'")
    return idle and (all(re.fullmatch(r'\[\d+\]:', p) for p in prompts) or v.page.locator(wrong).count())


def menu(v, name, command):
    v.page.click(f'.lm-MenuBar-itemLabel:text-is("{name}")')
    v.page.click(f'.lm-Menu li[data-command="{command}"]')


figures = '.jp-OutputArea img[src^="data:image/"]'
wrong = '.jp-RenderedText[data-mime-type="application/vnd.jupyter.error"]'


def run_all(v, lab):
    "Every output is cleared and made again; the number of figures that can be seen"
    before = v.page.locator(figures).count()
    menu(v, 'Edit', 'editmenu:clear-all')
    v.page.wait_for_function(f"document.querySelectorAll('{figures}').length == 0")
    v.page.evaluate('window.same = true')                                           # until the page is loaded again
    menu(v, 'Run', 'runmenu:run-all')
    until(lambda: ended(v), lambda: used(lab.pid), every=.5)
    assert not v.page.locator(wrong).count(), v.page.locator(wrong).first.inner_text()[-2000:]
    prompts = v.page.eval_on_selector_all('.jp-CodeCell .jp-InputPrompt', 'all => all.map(p => p.innerText.trim())')
    assert prompts == [f'[{i}]:' for i in range(1, len(prompts) + 1)] and v.page.evaluate('window.same')
    widths = v.page.eval_on_selector_all(figures, 'all => all.map(i => i.naturalWidth)')
    assert len(widths) >= before and all(w > 50 for w in widths)
    return len(widths)


def test_a_chapter(lab, visit):
    v = visit(1300, 1500)
    open_notebook(v, lab, '02_augment.ipynb')
    assert run_all(v, lab) >= 3


def test_your_photos_and_its_upload_box(lab, visit, tmp_path):
    v = visit(1300, 1500)
    open_notebook(v, lab, 'practice/your_photos.ipynb')
    assert run_all(v, lab) >= 4
    draw_photo('rings', np.random.default_rng(3)).save(tmp_path/'mine.jpg')
    box = v.page.locator('.jupyter-widgets.widget-upload').last
    with v.page.expect_file_chooser() as chosen: box.click()
    chosen.value.set_files(tmp_path/'mine.jpg')
    v.page.wait_for_function("[...document.querySelectorAll('img.widget-image')].some(i => i.naturalWidth > 100)")
    assert v.page.locator('.widget-label', has_text='mine.jpg').count() == 1
    assert not v.page.locator(wrong).count()
    box.scroll_into_view_if_needed()
