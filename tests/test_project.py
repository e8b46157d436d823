"The project's facts have one home, and their copies agree with it."
import base64
import json
import re
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from email import message_from_string
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from nbdev.config import get_config
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import resnet_fastai

if sys.version_info >= (3, 11): import tomllib
else: import tomli as tomllib                                            # pytest needs it there

root = Path(__file__).resolve().parent.parent
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
names = lambda reqs: {canonicalize_name(Requirement(r).name) for r in reqs}


def test_pyproject_repeats_settings_only():
    toml = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))
    project = toml['project']
    assert project['name'] == cfg['lib_name']
    assert toml['tool']['nbdev']['lib_path'] == cfg['lib_path']
    assert project['urls'] == {'Repository': cfg['git_url'], 'Documentation': cfg['doc_host'] + cfg['doc_baseurl'] + '/'}
    assert set(project) == {'name', 'dynamic', 'urls'}                  # everything else is dynamic: setup.py reads settings.ini


@pytest.mark.parametrize('key', ['lib_name', 'title', 'user', 'branch', 'git_url', 'doc_host', 'doc_baseurl', 'version'])
def test_nbdev_sees_what_settings_say(key): assert getattr(get_config(root), key) == cfg[key]


@pytest.mark.parametrize('key', ['lib_path', 'nbs_path', 'doc_path'])
def test_nbdev_finds_the_folders_of_settings(key): assert getattr(get_config(root), key) == root/cfg[key]


def test_version(): assert resnet_fastai.__version__ == cfg['version']


@pytest.fixture(scope='module')
def sdist(tmp_path_factory):
    "The files that a release would contain"
    out = tmp_path_factory.mktemp('sdist')
    copy = out/'project'
    shutil.copytree(root/'resnet_fastai', copy/'resnet_fastai')
    for p in root.iterdir():
        if p.is_file(): shutil.copy(p, copy)
    run = lambda *args: subprocess.run([sys.executable, 'setup.py', '-q', *args], cwd=copy, check=True, capture_output=True)
    run('sdist', '--formats=gztar', '--dist-dir', str(out))
    shutil.unpack_archive(next(out.glob('*.tar.gz')), out)
    return next(p for p in out.iterdir() if p.is_dir() and p != copy)


def test_the_release_describes_itself_as_settings_do(sdist):
    meta = message_from_string((sdist/'PKG-INFO').read_text(encoding='utf-8'))
    assert (meta['Name'], meta['Version'], meta['Summary']) == (cfg['lib_name'], cfg['version'], cfg['description'])
    assert (meta['Author'], meta['Author-email']) == (cfg['author'], cfg['author_email'])
    assert meta['Requires-Python'] == '>=' + cfg['min_python'] and meta['License-Expression'] == 'Apache-2.0'
    required = meta.get_all('Requires-Dist')
    assert names(r for r in required if 'extra ==' not in r) == names(shlex.split(cfg['requirements']))
    assert names(r for r in required if 'extra ==' in r) == names(shlex.split(cfg['dev_requirements']))
    entry_points = (sdist/f"{cfg['lib_name']}.egg-info"/'entry_points.txt').read_text()
    assert cfg['console_scripts'].replace('=', ' = ') in entry_points


def test_the_release_can_be_built_from(sdist):
    for name in ['settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'resnet_fastai/core.py']:
        assert (sdist/name).read_bytes() == (root/name).read_bytes(), name


def test_the_release_has_no_relative_links(sdist):
    "Its page elsewhere shows the README, whose pictures lie in the repository"
    text = message_from_string((sdist/'PKG-INFO').read_text(encoding='utf-8')).get_payload()
    targets = re.findall(r'\]\(([^)\s]+)\)', text)
    assert targets and all(re.match('https?://', t) for t in targets)
    assert f"{cfg['git_url']}/raw/{cfg['branch']}/nbs/images/" in text


def constraints():
    lines = (root/'constraints.txt').read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith('#')]


def test_constraints_are_exact():
    for r in constraints(): assert [s.operator for s in r.specifier] == ['=='] and '*' not in str(r.specifier), r


def test_constraints_cover_all_that_gets_installed():
    pinned = {canonicalize_name(r.name) for r in constraints() if not r.marker or r.marker.evaluate()}
    todo, seen = [*shlex.split(cfg['requirements']), *shlex.split(cfg['dev_requirements'])], set()
    while todo:
        r = Requirement(todo.pop())
        wanted = any(not r.marker or r.marker.evaluate({'extra': e}) for e in ('', *r.extras))
        name = canonicalize_name(r.name)
        if not wanted or name in seen: continue
        seen.add(name)
        try: todo += [q for q in requires(name) or [] if 'extra ==' not in q]
        except PackageNotFoundError: pytest.fail(f'{name} is required and not installed')
    assert len(seen) > 50 and not seen - pinned


def test_readme_links_to_what_exists():
    links = re.findall(r'(!?)\[([^\]]*)\]\((?!\w+:)([^)\s]+)\)', (root/'README.md').read_text(encoding='utf-8'))
    assert any(picture for picture, _, _ in links)
    for _, words, path in links: assert words and (root/path).is_file(), path


@pytest.fixture
def docs(monkeypatch):
    "tools/docs.py as a module"
    monkeypatch.syspath_prepend(str(root/'tools'))                      # it imports from the file beside it
    spec = spec_from_file_location('docs', root/'tools'/'docs.py')
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('line,complaint', [
    ('<a href="b.html#two">', None),
    ('<a href="sub/">', None),
    ('<a href="https://example.org/any">', None),
    ('<img src="data:image/png;base64,AA==">', None),
    ('<a href="c.html">', 'dead link'),
    ('<a href="b.html#three">', 'dead link'),
    ('<a href="#nowhere">', 'dead link'),
    ('<a href="../outside.html">', 'dead link'),
    ('<img src="gone.png">', 'missing file'),
    ('<script src="https://example.org/a.js"></script>', 'another host'),
    ('<link rel="stylesheet" href="//example.org/a.css">', 'another host'),
    ('<style>@import url(https://example.org/a.css);</style>', 'another host'),
    ('<img srcset="https://example.org/a.png 2x">', 'another host'),
    ('<p>see [<code>Accumulate</code>](training.ipynb)</p>', 'stayed Markdown'),
    ('<p>see [this](https://example.org/any)</p>', 'stayed Markdown'),
    ('<p><a href="b.html"><code>A.b</code></a>{#a.b}</p>', 'stayed Markdown'),
    ('<pre>print("[e](https://example.org/f)")</pre>', None),
    ('<div class="cell-output"><div><table><tr><td>[e](a.html)</td></tr></table></div></div>', None),
    ('<p>(see [1](and more))</p>', None),
    ('<pre>opt=&lt;function SGD at 0x7f3a5c1e2d40&gt;</pre>', 'left by a run'),
    ('<p><code>-&gt; __main__.Block</code></p>', 'left by a run'),
    ('<pre>/home/me/.venv/lib/python3.11/site-packages/torch/jit.py:14: Warning</pre>', 'left by a run'),
    ("<pre>if __name__ == '__main__': main()</pre>", None)])
def test_the_link_check_of_the_site(docs, tmp_path, line, complaint):
    (tmp_path/'sub').mkdir()
    for name, text in {'a.html': line, 'b.html': '<p id="two">', 'sub/index.html': '<a href="../a.html">'}.items():
        (tmp_path/name).write_text(text)
    found = list(docs.problems(tmp_path))
    assert len(found) == (complaint is not None) and all(complaint in f for f in found)


def test_formulas_become_mathml(docs):
    page = r'<p><span class="math inline">\(x_l &lt; 2\)</span> <span class="math display">\[\begin{aligned} a &amp;= b \\ c &amp;= d \end{aligned}\]</span></p>'
    made = docs.mathml(page)
    assert made.count('<math') == 2 and made.count('<mtr>') == 2 and 'span' not in made and '\\' not in made
    with pytest.raises(SystemExit, match='nosuchthing'): docs.mathml(r'<span class="math inline">\(\nosuchthing x\)</span>')


@pytest.mark.parametrize('text, linked', [
    ('See `Block` and `Block()`.', 'See [`Block`](/m#block) and [`Block()`](/m#block).'),
    ('[`Block`](a.ipynb), [the `Block` here](a.ipynb), ![a `Block`](a.png)', None),
    ('# `Block`\n\n```python\n`Block`\n```\n\n<summary>`Block`</summary>', None),
    ('a link [over\ntwo lines, `Block`](a.ipynb)', None),
    ('`unknown`, ``a `Block` b``, `Block(3)`', None)])
def test_names_in_backticks_become_links(docs, text, linked):
    assert docs.linkify(text, {'Block': '/m#block'}.get) == (linked or text)


module = '''"Says what. Docs: nowhere"
__all__ = ['Whole', 'paper_sgd', 'run']
# %% some cell
paper_sgd = partial(SGD, mom=.9) # §3.4
hidden = 1
def run(
    x, # The input
    *more:int, # Further ones
    opt=SGD, # Of
    # two lines
    deep:bool=False,
    **kwargs, # The rest
) -> int: # The result
    "Run it"      # §3.2
class Whole(Base):
    "A whole"
    def __init__(self, n:int=3): self.n = n
    def __call__(self,
        x:int, # To add
    ): return self.n + x
    def _inner(self): pass
    def before_fit(self): pass
@patch
def save(self:Whole|Other, path): pass
def _private(): pass
'''


@pytest.fixture
def reference(docs, tmp_path):
    import reference
    (tmp_path/'m.py').write_text(module)
    return reference.Module(tmp_path/'m.py', 'm')


def test_the_reference_reads_a_module(reference):
    sgd, run, whole, other = reference.entries
    assert (sgd.name, sgd.kind, sgd.source, sgd.says) == ('paper_sgd', 'value', 'paper_sgd = partial(SGD, mom=.9) # §3.4', '§3.4')
    assert run.signature == 'run(x, *more, opt=SGD, deep=False, **kwargs)' and run.says == 'Run it (§3.2)'
    assert [(p.name, p.type, p.says) for p in run.params] == [('x', '', 'The input'), ('*more', 'int', 'Further ones'), ('opt', '', 'Of'),
                                                            ('deep', 'bool', 'two lines'), ('**kwargs', '', 'The rest')]
    assert (run.returns.type, run.returns.says) == ('int', 'The result')
    assert whole.signature == 'Whole(n=3)' and [m.name for m in whole.members] == ['Whole.__call__', 'Whole.before_fit', 'Whole.save']
    assert whole.members[0].signature == 'Whole.__call__(x)' and whole.members[2].patched and not whole.members[1].patched
    assert other.name == 'Other.save'


def test_a_reference_page_has_each_name_in_the_order_of_the_code(reference):
    import reference as r
    text = r.page(reference, 'pack', lambda line: f'https://example.org/m.py#L{line}')
    assert re.findall(r'^#+ (.*?) ', text, re.M) == [r'paper\_sgd', 'run', 'Whole', r'Whole.\_\_call\_\_', 'Whole.save', 'Other.save']
    assert 'from pack.m import paper_sgd, run, Whole' in text and 'Also: `before_fit`' in text and '#L6)' in text
    assert 'default `SGD`' in text and ' at 0x' not in text


def test_an_exported_cell_names_what_others_may_use(docs):
    cell = 'import x\nA = 1\nb = c = 2\nclass D:\n    def e(self): pass\n@patch\ndef __call__(self:D): pass\n@patch\ndef _f(self:D): pass\n@patch(as_prop=True)\ndef g(self:D): pass\ndef _h(): pass'
    assert docs.names_of(cell) == ['A', 'D', 'D.__call__', 'D.g']


def test_the_reading_order(docs, tmp_path):
    "Lessons by number, the rest as the front page has them, and what it forgets at the end of its part"
    for name in ('02_b', '01_a', 'index', 'engine', 'practice/x', 'practice/y', 'practice/z', 'experiments/w'):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        text = '# T\n\n[w](experiments/w.ipynb) [y](practice/y.ipynb) [x](practice/x.ipynb) [gone](practice/gone.ipynb)'
        (tmp_path/f'{name}.ipynb').write_text(json.dumps(dict(cells=[dict(cell_type='markdown', metadata={}, source=text)], metadata={}, nbformat=4, nbformat_minor=4)))
    order = docs.notebooks(tmp_path)
    assert order == {'': ['index.ipynb'], 'The paper': ['01_a.ipynb', '02_b.ipynb'], 'Practice': [f'practice/{c}.ipynb' for c in 'yxz'],
                     'Experiments': ['experiments/w.ipynb'], 'Engine': ['engine.ipynb']}
    assert docs.numbers(order) == {'01_a.ipynb': 1, '02_b.ipynb': 2, 'practice/y.ipynb': 3, 'practice/x.ipynb': 4, 'practice/z.ipynb': 5, 'experiments/w.ipynb': 6}


def test_the_front_page_links_to_every_notebook_by_its_title(docs):
    order = docs.notebooks(root/'nbs')
    front = '\n'.join(''.join(c['source']) for c in json.loads((root/'nbs'/'index.ipynb').read_text(encoding='utf-8'))['cells'])
    links = {(path, ' '.join(words.split())) for words, path in re.findall(r'\[([^\]]+)\]\(([\w/]+\.ipynb)\)', front)}
    titles = {(p, docs.title_of(root/'nbs'/p)) for part, paths in order.items() if part for p in paths}
    assert titles <= links, f'nbs/index.ipynb should have the links {sorted(titles - links)}; then run: make readme'


def test_stored_outputs_name_no_file_of_a_machine():
    "Run a notebook with PYTHONWARNINGS=ignore, and where it lies"
    strange = r'/site-packages/[^\s"]*| at 0x[0-9a-f]{8,}>|/(?:tmp|var/folders)/[^\s"]*\btmp\w{8}[^\s"]*'                # the last: what tempfile makes
    texts = {p.name: re.findall(strange, p.read_text(encoding='utf-8')) for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts}
    assert len(texts) > 15 and {name: found for name, found in texts.items() if found} == {}


def stored_pictures():
    for p in (root/'nbs').rglob('*.ipynb'):
        for i,c in enumerate(json.loads(p.read_text(encoding='utf-8'))['cells']):
            for o in c.get('outputs', []):
                for kind,data in o.get('data', {}).items():
                    if kind.startswith('image/'): yield f'{p.name}, cell {i}', len(''.join(data) if kind.endswith('xml') else base64.b64decode(''.join(data)))
    for p in (root/'nbs'/'images').iterdir(): yield p.name, p.stat().st_size


def test_pictures_are_small():
    sizes = list(stored_pictures())
    assert len(sizes) > 20 and [s for s in sizes if s[1] > 200*1024] == []
