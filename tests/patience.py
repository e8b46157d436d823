"""Waiting for processes on a machine that may be busy: not for a number of seconds, but as long as anything moves.

What moves is a process that uses the processor. One that has used less than a hundredth of it for `still` seconds hangs: an idle
JupyterLab uses less than that, and one that works gets more even beside thirty others."""
import os
import subprocess
import threading
import time

import psutil

still = 600                                                             # seconds without any movement that mean a hang


def used(pid):
    "Processor seconds of a process and those that it started; None where it is gone"
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess: return None
    total = 0
    for p in family:
        try: total += sum(p.cpu_times()[:2])
        except psutil.Error: pass
    return total


def used_by_children():
    "Processor seconds of all that this process has started and that still runs"
    return sum(used(p.pid) or 0 for p in psutil.Process().children())


def until(
    what, # Called again and again, until it returns something true
    moved=used_by_children, # Returns processor seconds, which grow as long as there is progress; None where the process is gone
    still=still, # Seconds without a change after which this fails
    every=.01, # Seconds between two looks
):
    "Wait as long as something moves"
    last, idle, looked = moved() or 0, 0, time.monotonic()
    while not (found := what()):
        time.sleep(every)
        if (waited := time.monotonic() - looked) < min(1, still/10): continue        # a look through all processes takes a little time itself
        now, looked = moved() or 0, time.monotonic()
        idle += min(waited, still/10)                                   # where the whole machine stood still, its clock may have jumped
        if now < last or now - last >= still/100: last, idle = now, 0
        else: assert idle < still, f'nothing has moved for {still} s'
    return found


def communicate(
    process, # A Popen with pipes
    still=still, # As for `until`
) -> tuple: # (stdout, stderr)
    "What a process says until its end, however long that takes; it is killed when it hangs"
    said = []
    reader = threading.Thread(target=lambda: said.append(process.communicate()), daemon=True)
    reader.start()
    try: until(lambda: not reader.is_alive(), lambda: used(process.pid), still)
    except BaseException:
        kill(process)
        raise
    return said[0]


def kill(process):
    "End a Popen, and all that it has started, at once"
    try: family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess: return
    for p in family:
        try: p.kill()
        except psutil.NoSuchProcess: pass


def run(cmd, still=still, **kwargs):
    "`subprocess.run` with captured text, and no limit on the time of a command that works"
    process = subprocess.Popen([os.fspath(c) for c in cmd], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)
    out, err = communicate(process, still)
    return subprocess.CompletedProcess(cmd, process.returncode, out, err)
