"How the commands write: lines for logs, tables whatever names hold, and one ending for each kind of failure."
import io
import json
import signal
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest
import typer

from resnet_fastai.practice.cli import LogStream, answering, plain, stoppable, table

odd = 'a\nb\t\udcff.jpg'


def test_a_log_keeps_lines_and_no_bars():
    log = LogStream(io.StringIO())
    for i in range(10): print(f'\r |{"█"*i}{"-"*(10-i)}| {i}0%', end='', file=log)
    print('\r' + ' '*20, end='\r', file=log)
    print('epoch 0: done', file=log)
    assert log.to.getvalue() == 'epoch 0: done\n'
    print('half', end=' a line', file=log)
    assert log.to.getvalue() == 'epoch 0: done\n'                              # only whole lines
    print('█', end='\r', file=log)
    print('Windows', end='\r\n', file=log)
    assert log.to.getvalue() == 'epoch 0: done\nWindows\n'


def test_any_text_stays_on_its_line():
    assert plain(odd) == 'a\\nb\\t\\udcff.jpg' and plain('Straße 猫') == 'Straße 猫'
    shown = table([dict(photo=odd, n=9, error='2.50%'), dict(photo='c.jpg', n=10, error='12.50%')])
    assert shown.splitlines() == ['photo              n   error', 'a\\nb\\t\\udcff.jpg   9   2.50%', 'c.jpg             10  12.50%']
    assert table([]) == ''


def ending(e, monkeypatch, *args):
    "stdout, stderr and exit code of a command that prints, answers, and meets an exception"
    out, err, code = io.StringIO(), io.StringIO(), 0
    monkeypatch.setattr(sys, 'stderr', err)
    try:
        with redirect_stdout(out), answering(*args) as answer:
            print('\r███', end='')
            print('\r', end='')
            print('a notice')
            answer(dict(a=1), 'a is 1')
            if e: raise e
    except typer.Exit as ex: code = ex.exit_code
    return out.getvalue(), err.getvalue(), code


@pytest.mark.parametrize('args, out, err', [((False,), 'a is 1\n', 'a notice\n'), ((False, True), 'a notice\na is 1\n', ''),
                                            ((True, True), json.dumps(dict(a=1), indent=1) + '\n', 'a notice\n')], ids=['text', 'log', 'json'])
def test_where_things_are_printed(args, out, err, monkeypatch):
    assert ending(None, monkeypatch, *args) == (out, err, 0)


@pytest.mark.parametrize('e, says, code', [
    (ValueError('b.jpg is\nempty'), 'error: b.jpg is\\nempty', 1), (PermissionError(13, 'Permission denied', 'x.csv'), 'error: x.csv: Permission denied', 1),
    (KeyboardInterrupt(), 'stopped', 130), (RuntimeError('CUDA out of memory.\nmore'), 'error: CUDA out of memory.', 1)])
def test_how_a_command_ends(e, says, code, monkeypatch):
    _, err, found = ending(e, monkeypatch, False)
    assert err.splitlines()[1].startswith(says) and len(err.splitlines()) == 2 and found == code


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    with pytest.raises(TypeError, match='a fault of ours'): ending(TypeError('a fault of ours'), monkeypatch, False)


@pytest.mark.parametrize('times', [1, 2])
def test_a_first_signal_ends_nothing_at_once(times):
    "Also where another process has been told before, and both have agreed to stop: the checkpoint is still being written"
    learn, done = SimpleNamespace(stopping=False, checkpoint=SimpleNamespace(newest=lambda: 'c.pt')), []
    with pytest.raises(KeyboardInterrupt, match='stopped; c.pt holds the run; go on with: this'), stoppable(learn, 'this'):
        learn.stopping = True
        for i in range(times): signal.raise_signal(signal.SIGTERM)
        done.append('written')
    assert done == ['written'][:2-times]
