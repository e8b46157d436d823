"""Are notebooks, modules and README in step, and the notebooks clean? Looks at copies; changes nothing."""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
kept_out = shutil.ignore_patterns('.git', '.venv', '_docs', '_proc', 'runs', '__pycache__', '.*_cache', '*.egg-info', 'build', 'models')


def differing(copy, pattern):
    "Files under either root that are not the same in both"
    names = {p.relative_to(base) for base in (root, copy) for p in base.glob(pattern) if '.ipynb_checkpoints' not in p.parts}
    read = lambda p: p.read_bytes() if p.exists() else None
    return sorted(str(n) for n in names if read(root/n) != read(copy/n))


def problems():
    "(file, what to run) for each file that is out of step"
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/'copy'
        shutil.copytree(root, copy, ignore=kept_out)
        for p in (copy/'resnet_fastai').glob('*.py'):
            if p.name != '__init__.py': p.unlink()
        run = lambda *cmd: subprocess.run(cmd, cwd=copy, check=True, stdout=subprocess.DEVNULL)
        run('nbdev-export')
        yield from ((f, 'nbdev-export') for f in differing(copy, 'resnet_fastai/**/*.py'))
        run('nbdev-clean')
        yield from ((f, 'nbdev-clean') for f in differing(copy, 'nbs/**/*.ipynb'))
        run(sys.executable, 'tools/readme.py')
        yield from ((f, 'make readme') for f in differing(copy, 'README.md'))


def main():
    found = list(problems())
    for file, cmd in found: print(f'{file} is out of step; run: {cmd}')
    if found: sys.exit(1)
    print('notebooks, modules and README are in step')


if __name__ == '__main__': main()
