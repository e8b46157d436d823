"Steps that merely help (a cache, an fsync of a folder, a note) may fail in every way a disk knows; the run goes on. What must hold is still checked."
import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from resnet_fastai.data import resnet_dls
from resnet_fastai.engine.files import atomic_write, sync_folder, write_json
from resnet_fastai.engine.layout import list_photos
from resnet_fastai.practice.prepare import shrink_photos

codes = ['EACCES', 'EPERM', 'EROFS', 'EINVAL', 'ENOSPC', 'ENAMETOOLONG', 'EIO', 'ENOTSUP']
small = dict(size=32, micro_bs=4, num_workers=0)


def error(code): return OSError(getattr(errno, code), os.strerror(getattr(errno, code)))


@contextmanager
def failing(monkeypatch, name, code, when=lambda *a: True):
    "os.NAME raises this error where `when` says so"
    real = getattr(os, name)
    def fails(*args, **kwargs):
        if when(*args): raise error(code)
        return real(*args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(os, name, fails)
        yield


def of_folder(fd):
    import stat
    return stat.S_ISDIR(os.fstat(fd).st_mode)


# ── The fsync of a folder ────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize('code', codes)
def test_a_folder_that_cannot_be_synced(tmp_path, monkeypatch, code):
    "Network drives answer EINVAL"
    with failing(monkeypatch, 'fsync', code, of_folder): sync_folder(tmp_path)
    with failing(monkeypatch, 'open', code): sync_folder(tmp_path)
    monkeypatch.delattr(os, 'O_DIRECTORY')                                       # Windows
    sync_folder(tmp_path)


@pytest.mark.parametrize('code', ['EINVAL', 'ENOTSUP'])
def test_a_file_system_without_fsync(tmp_path, monkeypatch, code):
    with failing(monkeypatch, 'fsync', code): write_json(tmp_path/'a.json', dict(a=1))
    assert (tmp_path/'a.json').read_text() == '{\n "a": 1\n}'


@pytest.mark.parametrize('code', ['EIO', 'ENOSPC'])
def test_a_write_that_did_not_reach_the_disk_is_an_error(tmp_path, monkeypatch, code):
    (tmp_path/'a.json').write_text('{}')
    with failing(monkeypatch, 'fsync', code), pytest.raises(OSError): write_json(tmp_path/'a.json', dict(a=1))
    assert (tmp_path/'a.json').read_text() == '{}' and os.listdir(tmp_path) == ['a.json']


# ── Long names, and several writers ──────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize('name', ['x'*251 + '.jpg', 'é'*125 + '.jpg', '写'*83 + '.jpg', 'x'*255], ids=['ascii', 'two bytes', 'three bytes', 'no suffix'])
def test_names_as_long_as_a_disk_takes(tmp_path, name):
    with atomic_write(tmp_path/name) as part: part.write_bytes(b'whole')
    assert os.listdir(tmp_path) == [name] and (tmp_path/name).read_bytes() == b'whole'


def test_photos_with_long_names_are_shrunk(tmp_path):
    from PIL import Image
    for split in ('train', 'val'):
        (tmp_path/'data'/split).mkdir(parents=True)
        Image.new('RGB', (90, 60)).save(tmp_path/'data'/split/('n'*246 + '.jpg'))
    dest = shrink_photos(tmp_path/'data', tmp_path/'small', short_side=30)
    assert [Image.open(p).size for p in list_photos(dest)] == [(45, 30)]*2


def test_several_writers_of_one_file(tmp_path):
    "Threads of one process, or containers whose processes have one number"
    def write(i):
        with atomic_write(tmp_path/'a') as part:
            part.write_bytes(bytes([i])*100_000)
            assert part.read_bytes() == bytes([i])*100_000                        # nobody else writes there
    with ThreadPoolExecutor(8) as pool: list(pool.map(write, range(64)))
    assert os.listdir(tmp_path) == ['a'] and len(set((tmp_path/'a').read_bytes())) == 1


# ── fastai's folder ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize('code', codes)
@pytest.mark.parametrize('step', ['mkdir', 'replace', 'open'])
def test_the_colours_are_computed_where_they_cannot_be_kept(drawn, monkeypatch, code, step):
    home = os.environ['FASTAI_HOME']
    inside = lambda p, *a, **k: str(p).startswith(home)
    first = resnet_dls(*drawn, **small).stats
    for p in Path(home).rglob('color_stats/*'): p.unlink()
    with failing(monkeypatch, step, code, inside): again = resnet_dls(*drawn, **small).stats
    assert (again.mean == first.mean).all()


no_home = """
import os, sys
os.environ.pop('FASTAI_HOME', None)
os.environ.update(HOME=sys.argv[1], TMPDIR=sys.argv[2])
from resnet_fastai.data import resnet_dls, resolve_data
from resnet_fastai.engine.layout import list_photos
dls = resnet_dls(*sys.argv[3:6], size=32, micro_bs=4, num_workers=0)
print(dls.stats)
found = resolve_data('file://' + sys.argv[6])
print(len(list_photos(found)), 'photos in', found)
"""


def test_a_home_that_cannot_be_written(drawn, tmp_path):
    "As `docker run -u 1000` has it: there is none, and nobody may make it"
    import shutil
    archive = shutil.make_archive(str(tmp_path/'set'), 'zip', drawn.data_path)
    (tmp_path/'file').write_text('in the way')
    (tmp_path/'scratch').mkdir()
    said = subprocess.run([sys.executable, '-W', 'ignore', '-c', no_home, str(tmp_path/'file'/'home'), str(tmp_path/'scratch'), *map(str, drawn), archive],
                          capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent)
    assert said.returncode == 0, said.stderr[-2000:]
    assert 'ColorStats(' in said.stdout and f'28 photos in {tmp_path/"scratch"}' in said.stdout


# ── Photos that cannot be linked, notes that cannot be written ───────────────────────────────────────────────────────────────

@pytest.mark.parametrize('code', codes)
def test_links_that_are_not_possible_become_copies(tmp_path, monkeypatch, code):
    from resnet_fastai.engine.layout import link_photo
    (tmp_path/'a').write_bytes(b'a photo')
    with failing(monkeypatch, 'link', code), failing(monkeypatch, 'symlink', code): link_photo(tmp_path/'a', tmp_path/'b'/'c')
    assert (tmp_path/'b'/'c').read_bytes() == b'a photo' and not (tmp_path/'b'/'c').is_symlink()


def test_imagenette_without_a_home(tmp_path, monkeypatch):
    from PIL import Image
    from resnet_fastai.practice import sources
    for split in ('train', 'val'):
        for wnid in ('n01440764', 'n03888257'):
            (at := tmp_path/'fetched'/split/wnid).mkdir(parents=True)
            Image.new('RGB', (9, 9)).save(at/f'{split}_{wnid}.JPEG')
    def refuse(url): raise error('EACCES')
    monkeypatch.setattr(sources, 'untar_data', refuse)
    asked = []
    monkeypatch.setattr(sources, 'resolve_data', lambda url: asked.append(url) or tmp_path/'fetched')
    assert len(list_photos(sources.imagenette(tmp_path/'dest').data_path)) == 4 and asked[0].endswith('imagenette2-160.tgz')


def test_an_empty_folder_is_filled(tmp_path, monkeypatch):
    "Windows does not replace a folder, not even an empty one"
    from resnet_fastai.engine.demo_photos import demo_data
    replace = Path.replace
    def windows(self, to):
        if Path(to).is_dir(): raise error('EACCES')
        return replace(self, to)
    monkeypatch.setattr(Path, 'replace', windows)
    (tmp_path/'dest').mkdir()
    assert len(list_photos(demo_data(tmp_path/'dest', sizes=dict(train=2, val=1, test=0)).data_path)) == 3


@pytest.mark.parametrize('code', ['EINVAL', 'EACCES', 'EIO'])
def test_a_checkpoint_where_folders_cannot_be_synced(drawn, tmp_path, monkeypatch, one_thread, code):
    from resnet_fastai.core import ResNet
    model = ResNet(*drawn, arch='cifar_resnet8', run_folder=tmp_path/'run', **small)
    with failing(monkeypatch, 'fsync', code, of_folder), model.learn.no_bar(), model.learn.no_logging(): model.fit(1)
    assert len(list((tmp_path/'run').glob('checkpoint-*.pt'))) == 1
