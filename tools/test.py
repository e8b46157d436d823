"""Everything that has to be right, as one command: every step runs, and one that fails makes the whole fail."""
import os
import subprocess
import sys
import time

steps = {'in step': [sys.executable, 'tools/in_step.py'],
         'notebooks': ['nbdev-test', '--n-workers', '2', '--do-print', '--timing', '--pause', '0'],
         'docs': [sys.executable, 'tools/docs.py'],
         'pytest': [sys.executable, '-m', 'pytest']}                  # last, so that its closing line can be seen
one_thread = {'notebooks': dict(OMP_NUM_THREADS='1')}                # two run side by side: threads of one wait for those of the other
if sys.version_info < (3, 11): del steps['docs']


def main():
    failed = []
    for name, cmd in steps.items():
        start = time.time()
        print(f'── {name}: {" ".join(cmd[1:] if cmd[0] == sys.executable else cmd)}', flush=True)
        if subprocess.run(cmd, env=os.environ | one_thread.get(name, {})).returncode: failed.append(name)
        print(f'── {name}: {"failed" if name in failed else "passed"} in {time.time()-start:.0f} s', flush=True)
    if 'docs' not in steps: print('── docs: left out, since the site needs Python 3.11 or newer')
    if failed: sys.exit(f'failed: {", ".join(failed)}')


if __name__ == '__main__': main()
