"The page that leads from the paper to code and tests: it would notice what is lost, and what it shows is what the files hold."
import json
import re
import shutil
import subprocess
import sys
from html import unescape
from importlib.util import module_from_spec, spec_from_file_location
from inspect import signature
from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_fastai.core import ResNet
from resnet_fastai.model import ProjectionBlock, build_net
from resnet_fastai.training import Accumulate, resnet_learner

root = Path(__file__).resolve().parent.parent
spec = spec_from_file_location('paper_script', root/'nbs'/'experiments'/'paper.py')
paper = module_from_spec(spec)
spec.loader.exec_module(paper)


# ── Rules that no other test proves ──────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.paper('3.3-cost')
def test_a_layer_costs_the_same_at_every_size():
    with torch.device('meta'): net, x, found = build_net('plain34'), torch.empty(1, 3, 224, 224), {}
    def look(m, i, out): found.setdefault(out.shape[-1], []).append((out.shape[1], out[0].numel()*m.weight[0].numel()))
    for m in net.modules():
        if isinstance(m, nn.Conv2d) and m.stride == (1, 1): m.register_forward_hook(look)
    net(x)
    assert list(found) == [56, 28, 14, 7] and len({cost for layers in found.values() for _, cost in layers}) == 1
    assert [{filters for filters, _ in layers} for layers in found.values()] == [{64}, {128}, {256}, {512}]


@pytest.mark.paper('3.4-dropout')
def test_nothing_is_dropped():
    "In training a net says the same of the same photos twice"
    for net in (build_net('cifar_resnet8', 5), build_net('cifar_plain8', 5), ProjectionBlock(3, 16)):
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad(): assert torch.equal(net.train()(x), net(x))
    for arch in ('resnet34', 'resnet50', 'plain34'):
        with torch.device('meta'): net = build_net(arch)
        assert not any('drop' in type(m).__name__.lower() for m in net.modules())


@pytest.mark.paper('3.4-batch')
def test_the_default_batch_is_the_papers(drawn):
    for f in (resnet_learner, Accumulate): assert signature(f).parameters['bs'].default == 256
    assert ResNet(*drawn, arch='cifar_resnet8', size=32, num_workers=0).learn.accumulate.bs == 256


# ── What the page rests on ───────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "The files that the page is made of; notebooks without what they show"
    dest = tmp_path_factory.mktemp('files')
    for p in [root/'settings.ini', *(root/'resnet_fastai').rglob('*.py'), *(root/'tests').rglob('test_*.py'),
              *(root/'nbs').glob('*.ipynb'), *(root/'nbs').glob('*/*.*')]:
        new = dest/p.relative_to(root)
        new.parent.mkdir(parents=True, exist_ok=True)
        if p.suffix != '.ipynb': shutil.copy(p, new); continue
        cells = [dict(cell_type=c['cell_type'], source=c['source']) for c in json.loads(p.read_text(encoding='utf-8'))['cells']]
        new.write_text(json.dumps(dict(cells=cells), ensure_ascii=False), encoding='utf-8')
    return dest


@pytest.fixture
def copy(files, tmp_path): return Path(shutil.copytree(files, tmp_path/'files'))


def edit(file, old, new):
    text = file.read_text(encoding='utf-8')
    assert text.count(old) == 1, f'{file.name} has {old!r} {text.count(old)} times'
    file.write_text(text.replace(old, new), encoding='utf-8')


def test_every_rule_has_its_line_and_its_test(): assert paper.problems(root) == []


hold_out, tested = "@pytest.mark.paper('4.2-hold-out')\n", 'tests/test_cifar.py'
rule, rules = '"id": "4.2-hold-out"', 'nbs/experiments/paper.json'


@pytest.mark.parametrize('file,old,new,says', [
    (tested, hold_out, '', '4.2-hold-out has no test'),
    (tested, hold_out, "@pytest.mark.paper('4.2-hold')\n", "test_hold_out is marked '4.2-hold', which is no rule"),
    (tested, hold_out, '@pytest.mark.paper(RULE)\n', 'should name rules of paper.json, as texts'),
    (tested, hold_out, '@pytest.mark.paper()\n', 'should name rules of paper.json, as texts'),
    (tested, 'def test_hold_out(', 'def look_at_hold_out(', 'look_at_hold_out is marked and is no test'),
    (tested, hold_out, f'@pytest.mark.skip(reason="slow")\n{hold_out}', 'test_hold_out is marked, and always skipped'),
    ('resnet_fastai/practice/sources.py', 'def from_imagenet(', 'def from_ilsvrc(', "4.1-data: resnet_fastai/practice/sources.py has 0 lines with 'def from_imagenet('"),
    ('resnet_fastai/practice/sources.py', 'def from_imagenet(', 'def from_imagenet(): pass\ndef from_imagenet(', '4.1-data: resnet_fastai/practice/sources.py has 2 lines'),
    (rules, rule, '"id": "4.2-test"', '4.2-test is in paper.json twice'),
    (rules, '"code": [],\n  "but": "a prediction is', '"code": [],\n  "why": "a prediction is', '4.1-ensemble has neither code nor a word'),
    (tested, hold_out, "@pytest.mark.paper('4.2-hold-out', '4.1-ensemble')\n", '4.1-ensemble is said to be not built, and test_hold_out proves it'),
    (rules, 'nbs/experiments/cifar10.py: return updates//2', 'nbs/experiments/cifar.py: return updates//2', '4.2-rate: there is no file nbs/experiments/cifar.py')])
def test_what_is_lost_is_noticed(copy, file, old, new, says):
    edit(copy/file, old, new)
    found = paper.problems(copy)
    assert any(says in f for f in found), found


def test_the_marks_are_those_that_pytest_sees(request):
    "Of the tests that this run has collected"
    seen = {(i, item.originalname, item.path) for item in request.session.items for m in item.iter_markers('paper') for i in m.args}
    read = {(i, place.text, root/place.file) for i, place in paper.marked_functions(root)}
    mine = {item.path for item in request.session.items}
    assert seen and seen <= read
    if not request.config.option.keyword and not any('::' in a for a in request.config.args): assert {r for r in read if r[2] in mine} == seen


# ── The page ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_the_stored_page_is_what_the_files_hold():
    assert paper.stored(root) == [*paper.pages(root).values()], f'lines or tests have moved; run: {paper.stale}'


def test_a_moved_line_makes_the_page_stale(copy):
    edit(copy/'resnet_fastai'/'practice'/'sources.py', 'def from_imagenet(', '\ndef from_imagenet(')
    assert paper.problems(copy) == []
    before, after = paper.pages(root), paper.pages(copy)
    assert [s for s in before if after[s] != before[s]] == ['4.1']


def test_links_lead_to_the_line():
    "Each number is that of the line shown beside it"
    found = [x for page in paper.pages(root).values() for x in re.findall(r'/blob/main/([^"#]+)#L(\d+)">[^<]*</a><br><code>(.*?)</code>', page)]
    assert len(found) > 30
    for file, line, text in found: assert (root/file).read_text(encoding='utf-8').splitlines()[int(line)-1].strip() == unescape(text)


def test_the_script_refuses_a_page_with_gaps(copy):
    edit(copy/tested, hold_out, '')
    done = subprocess.run([sys.executable, copy/'nbs'/'experiments'/'paper.py'], capture_output=True, text=True)
    assert done.returncode == 1 and '4.2-hold-out has no test' in done.stderr and 'Traceback' not in done.stderr
