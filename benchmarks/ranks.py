"""Training on one process against two of the same machine: `ResNet.fit`, loading and validation included, the same 128 photos in an
update. Each process has one thread. The efficiency is the rate of two over twice that of one, in the same round; 1 would be perfect.

Two processes need two idle cores. The machine's load before each turn is stored: two processes get more of a busy machine than one
does, so that the efficiency is too high there."""
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path[0] = str(root)                                        # not this folder: its `statistics` is not Python's

from statistics import median

from benchmarks.common import alternate, arguments, compare, write


def work(folder, arch):
    "A process: an epoch for each line that comes in"
    import torch
    from resnet_fastai.core import ResNet
    torch.set_num_threads(1)
    paths = folder, folder/'labels.json', folder/'encoding.json'
    learn = ResNet(*paths, arch=arch, size=32, bs=128, micro_bs=128//int(os.environ['WORLD_SIZE']), num_workers=0, n_out=None, precision='fp32', device='cpu').learn
    with learn.no_bar(), learn.no_logging():
        for _ in sys.stdin:
            learn.fit(1)
            os.write(int(os.environ['ANSWER']), b'.')


def group(n, folder, arch):
    "Start n processes that train together; a function that lets them train for an epoch"
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    members = []
    for rank in range(n):
        answer, theirs = os.pipe()
        env = os.environ | dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port),
                                OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', ANSWER=str(theirs))
        p = subprocess.Popen([sys.executable, __file__, '--worker', folder, arch], env=env, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                             pass_fds=[theirs], text=True)
        os.close(theirs)
        members.append((p, answer))
    def epoch():
        for p, _ in members: p.stdin.write('go\n'); p.stdin.flush()
        for p, answer in members:
            if os.read(answer, 1) != b'.': raise SystemExit(f'a process of {n} has ended')
    return epoch, members


def main():
    args = arguments(__doc__, arch=('cifar_resnet20', 'the network'), items=(512, 'photos in an epoch'))
    from resnet_fastai.data import demo_data
    loads = []
    def noting(f):
        def noted():
            loads.append(os.getloadavg()[0])
            f()
        return noted
    with tempfile.TemporaryDirectory() as tmp:
        demo_data(Path(tmp)/'photos', sizes=dict(train=args.items, val=8, test=2))
        groups = {f'{n} process{"es"[:2*(n > 1)]}': group(n, f'{tmp}/photos', args.arch) for n in (1, 2)}
        seconds = alternate({name: noting(epoch) for name, (epoch, _) in groups.items()}, args.rounds)
        for _, members in groups.values():
            for p, _ in members: p.stdin.close()
            for p, _ in members: p.wait()
    found = compare(seconds, '2 processes', args.items)
    each = [a/b/2 for a, b in zip(seconds['1 process'], seconds['2 processes'])]
    efficiency = dict(median=median(each), least=min(each), most=max(each))
    load = dict(median=median(loads), least=min(loads), most=max(loads))
    print(f'  efficiency {efficiency["median"]:.2f} ({efficiency["least"]:.2f} to {efficiency["most"]:.2f}); '
          f'load of the machine {load["median"]:.1f} ({load["least"]:.1f} to {load["most"]:.1f}) on {os.cpu_count()} cores, these processes included')
    write(args, arch=args.arch, **found, efficiency=efficiency, load=load)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--worker']: work(Path(sys.argv[2]), sys.argv[3])
    else: main()
