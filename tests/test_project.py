"The project's facts have one home, and their copies agree with it."
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import resnet_fastai

if sys.version_info >= (3, 11): import tomllib
else: tomllib = pytest.importorskip('tomli')

root = Path(__file__).resolve().parent.parent
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']


def test_pyproject_repeats_settings_only():
    toml = tomllib.loads((root/'pyproject.toml').read_text())
    project = toml['project']
    assert project['name'] == cfg['lib_name']
    assert toml['tool']['nbdev']['lib_path'] == cfg['lib_path']
    assert project['urls'] == {'Repository': cfg['git_url'], 'Documentation': cfg['doc_host'] + cfg['doc_baseurl'] + '/'}
    assert set(project) == {'name', 'dynamic', 'urls'}                  # everything else is dynamic: setup.py reads settings.ini


def test_version(): assert resnet_fastai.__version__ == cfg['version']


@pytest.fixture(scope='module')
def metadata(tmp_path_factory):
    "What setup.py says, as an installer would see it"
    out = tmp_path_factory.mktemp('metadata')
    subprocess.run([sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', str(out)], cwd=root, check=True, capture_output=True)
    info = out/f"{cfg['lib_name']}.egg-info"
    return (info/'PKG-INFO').read_text(encoding='utf-8'), (info/'entry_points.txt').read_text()


def test_setup_reads_settings(metadata):
    text, entry_points = metadata
    headers = text.split('\n\n')[0]
    get = lambda name: re.findall(rf'^{name}: (.*)$', headers, re.M)
    assert get('Name') == [cfg['lib_name']] and get('Version') == [cfg['version']]
    assert get('Requires-Python') == ['>=' + cfg['min_python']]
    assert get('License-Expression') == ['Apache-2.0'] or get('License') == ['Apache-2.0']
    names = lambda reqs: {re.match(r'[\w-]+', r)[0].lower() for r in reqs}
    required = get('Requires-Dist')
    assert names(r for r in required if 'extra ==' not in r) == names(cfg['requirements'].split())
    assert names(r for r in required if 'extra ==' in r) == names(cfg['dev_requirements'].split())
    assert cfg['console_scripts'].replace('=', ' = ') in entry_points


def test_constraints_are_exact_and_cover_the_requirements():
    lines = (root/'constraints.txt').read_text().split()
    assert all(re.fullmatch(r'[\w.-]+==[\w.+!-]+', line) for line in lines)
    pinned = {line.split('==')[0].lower().replace('_', '-') for line in lines}
    wanted = re.findall(r'(?:^|\s)([\w-]+)', cfg['requirements'] + ' ' + cfg['dev_requirements'])
    assert {w.lower().replace('_', '-') for w in wanted if not w[0].isdigit()} <= pinned


def test_modules_import_from_lower_chapters_only():
    order = {p.stem.split('_', 1)[1]: int(p.stem.split('_')[0]) for p in (root/'nbs').glob('[0-9]*.ipynb')}
    for name, number in order.items():
        text = (root/'resnet_fastai'/f'{name}.py').read_text()
        used = re.findall(r'^from resnet_fastai\.(\w+) import', text, re.M)
        assert all(order[u] < number for u in used), f'{name} imports {used}'


def test_readme_shows_a_picture_that_exists():
    pictures = re.findall(r'!\[([^\]]*)\]\(([^)]+)\)', (root/'README.md').read_text(encoding='utf-8'))
    assert pictures and all(alt and (root/path).exists() for alt, path in pictures)
