"Work is waited for, however slow; a hang is not."
import subprocess
import sys
import time

import pytest

import patience

python = lambda code: [sys.executable, '-c', code]


def test_what_a_command_says_and_how_it_ends():
    done = patience.run(python('import sys; print("a"); print("b", file=sys.stderr); sys.exit(3)'))
    assert (done.returncode, done.stdout, done.stderr) == (3, 'a\n', 'b\n')


def test_work_may_take_longer_than_the_limit_for_a_hang():
    "Also where a child does it"
    work = 'import time\nend = time.process_time() + 2.5\nwhile time.process_time() < end: pass'
    child = f'import subprocess, sys; subprocess.run([sys.executable, "-c", {work!r}]); print("done")'
    assert patience.run(python(child), still=2).stdout == 'done\n'


def test_a_hang_is_ended():
    process = subprocess.Popen(python('import time; time.sleep(1000)'), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    patience.until(lambda: (patience.used(process.pid) or 0) > 0)
    with pytest.raises(AssertionError, match='nothing has moved for 3 s'): patience.communicate(process, still=3)
    assert process.wait() and patience.used(process.pid) is None


def test_until_fails_only_when_nothing_moves():
    steps, start = iter(range(10**9)), time.monotonic()
    assert patience.until(lambda: time.monotonic() - start > 1.5, lambda: next(steps), still=1)
    with pytest.raises(AssertionError, match='nothing has moved'): patience.until(lambda: False, lambda: 0, still=.2)
