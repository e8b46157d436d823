"""Jobs of several processes: many.py imports everything once and forks them, which costs no import and no `torchrun`."""
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import torch

from patience import until, used

program = Path(__file__).parent/'many.py'
quiet = dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')


class Ranks:
    "ranks(folder, '2:failing', '1:moving', …) runs jobs, one after the other: (exit codes of each, what was said)"
    process = None

    def start(self):
        self.lines = []
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen([sys.executable, program, 'serve'], env=os.environ | quiet, **pipes)
        threading.Thread(target=lambda p, lines: lines.extend(p.stdout), args=(self.process, self.lines), daemon=True).start()

    def ask(self, kind, folder, *what):
        "What many.py answers, and what was said meanwhile"
        if not self.process: self.start()
        log, before = Path(folder)/'said.txt', len(self.lines)
        if kind == 'jobs': log.unlink(missing_ok=True)
        self.process.stdin.write(json.dumps([kind, *([str(folder)]*(kind != 'wait')), *what]) + '\n')
        self.process.stdin.flush()
        try: until(lambda: len(self.lines) > before or self.process.poll() is not None, lambda: used(self.process.pid))
        except AssertionError: self.kill(); raise
        said = log.read_text() if log.exists() else ''
        assert len(self.lines) > before, said
        return json.loads(self.lines[-1]), said

    def __call__(self, folder, *jobs): return self.ask('jobs', folder, *jobs)

    def agent(self, folder, what, *options, **env):
        "The process id of a machine: `torchrun` with options, its processes forked"
        return self.ask('agent', folder, what, env, *map(str, options))[0]

    def wait(self, folder, pid):
        "(its exit code, what was said)"
        return self.ask('wait', folder, pid)

    def kill(self):
        for p in psutil.Process(self.process.pid).children(recursive=True): p.kill()
        self.close()

    def close(self):
        "Not by the end of its input alone: processes that others have forked from this one hold that open too"
        if not self.process: return
        self.process.kill()
        self.process.stdin.close()
        self.process.wait()
        self.process = None


def left(n, what, folder): return [torch.load(folder/f'{what}-{n}-{r}.pt', weights_only=False) for r in range(n)]      # our own, just written
