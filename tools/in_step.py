"""Are notebooks, modules and README in step, and the notebooks clean? Looks at a copy; changes nothing."""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
kept_out = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'models')


def copy_sources(dest):
    for name in ('nbs', 'resnet_fastai', 'tools'): shutil.copytree(root/name, dest/name, ignore=kept_out)
    for name in ('pyproject.toml', 'settings.ini', 'README.md'): shutil.copy(root/name, dest/name)


def differing(copy, pattern):
    "Files under either root that are not the same in both"
    names = {p.relative_to(base) for base in (root, copy) for p in base.glob(pattern) if '.ipynb_checkpoints' not in p.parts}
    read = lambda p: p.read_bytes() if p.exists() else None
    return sorted(str(n) for n in names if read(root/n) != read(copy/n))


def problems(copy):
    "A sentence for each file that is out of step"
    def run(*cmd): subprocess.run(cmd, cwd=copy, check=True, stdout=subprocess.DEVNULL)
    copy_sources(copy)
    for p in (copy/'resnet_fastai').rglob('*.py'):
        if p.name != '__init__.py': p.unlink()
    run('nbdev-export')
    for f in differing(copy, 'resnet_fastai/**/*.py'):
        if (copy/f).exists(): yield f'{f} is not what the notebooks export; run: nbdev-export'
        else: yield f'{f} is exported by no notebook; delete it, or give it one'
    run('nbdev-clean')
    yield from (f'{f} is not clean; run: nbdev-clean' for f in differing(copy, 'nbs/**/*.ipynb'))
    run(sys.executable, 'tools/readme.py')
    for f in differing(copy, 'README.md') + differing(copy, 'nbs/images/index_*'):
        yield f'{f} is not what nbs/index.ipynb makes; run: make readme'


def main():
    with tempfile.TemporaryDirectory() as tmp: found = list(problems(Path(tmp)))
    if found: sys.exit('\n'.join(found))
    print('notebooks, modules and README are in step')


if __name__ == '__main__': main()
