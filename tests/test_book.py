"Lessons, guides and experiments keep their limits and imports run downwards; tools/book.py measures both."
import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
spec = spec_from_file_location('book', root/'tools'/'book.py')
book = module_from_spec(spec)
spec.loader.exec_module(book)
lessons, guides, experiments = (sorted((root/'nbs').glob(pattern)) for pattern in (book.lessons, book.guides, book.experiments))

# Still to be rewritten; a lesson that keeps every limit has to leave this list, and an import that is gone the other two
not_yet, guides_not_yet = [], []
upward_yet = set()
circles_yet = []


# ── The book ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_there_are_six_lessons():
    assert [p.stem for p in lessons] == ['01_model', '02_augment', '03_data', '04_training', '05_inference', '06_core']
    assert set(not_yet) <= {p.stem for p in lessons}


@pytest.mark.parametrize('path', lessons, ids=lambda p: p.stem)
def test_a_lesson_keeps_its_limits(path):
    found = book.broken_limits(path)
    if path.stem in not_yet: assert found, f'{path.name} keeps every limit: take it out of not_yet'
    else: assert not found, '\n'.join(found)


@pytest.mark.parametrize('path', guides + experiments, ids=lambda p: p.stem)
def test_guides_and_experiments_keep_their_limits(path):
    found = book.broken_limits(path, book.guide_limits)
    if path.stem in guides_not_yet: assert found, f'{path.name} keeps every limit: take it out of guides_not_yet'
    else: assert not found, '\n'.join(found)


def test_imports_run_downwards():
    found = {tuple(m.removeprefix('resnet_fastai.') for m in pair) for pair in book.upward(book.import_graph())}
    assert found == upward_yet


def test_there_is_no_circle():
    assert [[m.removeprefix('resnet_fastai.') for m in c] for c in book.circles(book.import_graph())] == circles_yet


def test_every_module_has_a_floor():
    "Only the package itself and nbdev's index lie outside the house"
    assert {m for m in book.import_graph() if book.floor(m) is None} == {'resnet_fastai', 'resnet_fastai._modidx'}


# ── The measures ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def code(source, picture=False):
    shown = [dict(output_type='display_data', data={'image/png': 'AA==', 'text/plain': '<Figure>'}, metadata={})] if picture else []
    return dict(cell_type='code', source=source, outputs=shown, metadata={}, execution_count=None)


def text(source): return dict(cell_type='markdown', source=source, metadata={})


def good_lesson():
    "Within every limit"
    cells = [text('# A\n\n> lesson'), code('draw()', picture=True), text('word '*60), code('#| exports\ndef f(x):\n    return x\n\n\na = 1')]
    return cells + [text('## Exercises\n\n' + '\n'.join(f'{i}. Do it.' for i in range(1, 6)) + '\n\n<details>\n\n1. Answer.\n\n</details>')]


@pytest.fixture
def lesson(tmp_path):
    "lesson(cells): a file of them"
    def write(cells):
        (path := tmp_path/'01_x.ipynb').write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
        return path
    return write


def test_measures(lesson):
    m = book.measures(lesson([code('#| default_exp x'), code('#| hide\nsecret()'), *good_lesson()]))
    assert (m['cells'], m['code_cells'], m['lines'], m['exported'], m['figures'], m['exercises']) == (5, 2, 4, 3, 1, 5)
    assert (m['function'], m['longest'], m['width'], m['share']) == (2, 'f', 12, .75) and 60 < m['words'] < 90
    assert book.broken_limits(lesson(good_lesson())) == []


def without(key, cells): return [c for c in cells if key not in c['source']]


@pytest.mark.parametrize('cells, says', [
    (good_lesson() + [text('More.')]*41, 'has 46 cells; at most 45'),
    (good_lesson() + [text('word '*1000)] + [code('#| export\n' + 'a = 1\n'*248)], 'has 251 exported lines; at most 250'),
    (good_lesson() + [code('a' + ' '*100 + '= 1')], 'has 104 characters in its widest line'),
    (good_lesson() + [text('word '*300), code('#| export\nclass A:\n    def long(self):\n' + '        a = 1\n'*40)], 'has 41 lines in its longest exported function, long'),
    (without('Exercises', good_lesson()), 'has 0 exercises; at least 5'),
    (without('word', good_lesson()) + [code('a = 1\n'*20)], 'words for 10 lines of code; at least 30'),
    (without('draw', good_lesson()), 'has no figure'),
    ([text('Before. '*800), *good_lesson()], 'pixels above its first picture'),
    ([*good_lesson()] + [text('More.')]*15, 'has 20 cells for each figure')])
def test_what_breaks_a_limit(lesson, cells, says):
    found = book.broken_limits(lesson(cells))
    assert any(says in f for f in found), found


def html(source): return dict(code(source), outputs=[dict(output_type='execute_result', data={'text/html': '<table><tr><td>1'}, metadata={})])


@pytest.mark.parametrize('cells, ok', [
    ([text('# A\n\n| you have | call |\n|:--|---|\n| a | b |')], True), ([text('# A'), html('table()')], True), ([text('# A'), code('draw()', picture=True)], True),
    ([text('Before. '*800), text('| a |\n|---|\n| b |')], False), ([text('# A'), code('a | b')], False), ([text('a | b | c')], False)])
def test_a_guide_shows_a_picture_or_a_table_early(cells, ok, lesson):
    assert (book.broken_limits(lesson(cells + [code('a = 1')]), book.guide_limits) == []) == ok


def test_an_unnumbered_answer_is_no_exercise(lesson):
    answers = '\n'.join(f'{i}. Answer.' for i in range(1, 7))
    m = book.measures(lesson([text(f'## Exercises\n\n1. One\n2. Two\n\n<details><summary>Answers</summary>\n\n{answers}\n\n</details>')]))
    assert m['exercises'] == 2


def test_the_table_has_a_row_for_every_notebook():
    rows = book.table(book.notebooks()).splitlines()
    there = [p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts]
    assert len(rows) == 2 + len(there) and len({r.count('|') for r in rows}) == 1


# ── The imports ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def package(tmp_path):
    "package({file: text}): the import graph of such a package"
    def build(files):
        for name, content in files.items():
            (tmp_path/'p'/name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path/'p'/name).write_text(content)
        return book.import_graph(tmp_path/'p')
    return build


def test_every_way_to_import_is_seen(package):
    graph = package({'__init__.py': '', 'engine/__init__.py': '', 'engine/files.py': '', 'model.py': '', 'data.py': 'import json, torch',
                     'core.py': 'from .model import a\nfrom . import data\ndef f():\n    from p.engine.files import b\n',
                     'practice/x.py': 'from ..engine import files\nimport p.data as d\nclass A:\n    def g(self):\n        from ..core import z\n',
                     'training.py': 'from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .core import z\n'})
    assert graph['p.core'] == {'p.model', 'p.data', 'p.engine.files'}
    assert graph['p.practice.x'] == {'p.engine', 'p.engine.files', 'p.data', 'p.core'}
    assert graph['p.data'] == graph['p.training'] == set()


def test_what_runs_upwards_or_in_a_circle(package):
    graph = package({'__init__.py': '', 'engine/a.py': 'def f():\n    from ..core import x', 'core.py': 'from .data import y',
                     'data.py': 'from .engine.a import f', 'augment.py': 'from .engine import a'})
    assert book.upward(graph) == [('p.engine.a', 'p.core')]
    assert book.circles(graph) == [['p.core', 'p.data', 'p.engine.a']]
