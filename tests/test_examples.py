"The scripts of examples/, with stand-ins for what a cluster has: srun, scontrol, ssh, the variables that an operator sets"
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from patience import communicate, kill, run, until
from resnet_fastai.core import ResNet
from resnet_fastai.data import demo_data
from resnet_fastai.engine import loader

examples = Path(__file__).resolve().parent.parent/'examples'
tiny = f'''"examples/my_training.py with a tiny network; FOLDER/wait is there: it waits in its second update for SIGTERM"
import os, runpy, time, warnings
warnings.filterwarnings('ignore')
from pathlib import Path
from fastai.callback.core import Callback
import resnet_fastai.core as core
flag = Path(__file__).with_name('wait')
class Wait(Callback):
    def after_step(self):
        if not flag.exists(): return
        Path(__file__).with_name('waits-' + os.environ['RANK']).touch()
        while not self.stopping: time.sleep(.1)
whole = core.ResNet.__init__
def small(self, *args, every, **kw):
    whole(self, *args, **kw, arch='cifar_resnet8', size=32, bs=12, micro_bs=4, every=1, num_workers=0, device='cpu', n_out=None, cbs=Wait)
core.ResNet.__init__ = small
runpy.run_path({str(examples/'my_training.py')!r}, run_name='__main__')
'''
srun = '''#!/bin/bash
# Each task sees its number, its place on the machine and one card; signals go to all of them; one that fails ends the others
while [[ $1 == --* ]]; do shift; done
pids=()
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$((i % SLURM_NTASKS_PER_NODE)) CUDA_VISIBLE_DEVICES= "$@" & pids+=($!)
done
trap 'kill -TERM "${pids[@]}"' TERM
code=0
for pid in "${pids[@]}"; do while kill -0 "$pid" 2>/dev/null; do wait "$pid"; code=$?; done; done
exit $code
'''
scontrol = '''#!/bin/bash
if [[ $1 == show ]]; then printf '127.0.0.1\\nnode1\\n'; else echo "$@" >> "$REQUEUED"; fi
'''
ssh = '''#!/bin/bash
shift; exec bash -c "$1"
'''


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    "A folder with photos, the scripts and the stand-ins; the environment that they need"
    folder = tmp_path_factory.mktemp('cluster')
    demo_data(folder/'photos', sizes=dict(train=42, val=12, test=2))
    for name in ('slurm.sh', 'ssh.sh'): shutil.copy(examples/name, folder)
    (folder/'my_training.py').write_text(tiny)
    (folder/'bin').mkdir()
    for name, text in dict(srun=srun, scontrol=scontrol, ssh=ssh).items():
        (folder/'bin'/name).write_text(text)
        (folder/'bin'/name).chmod(0o755)
    path = f"{folder/'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    package = f"{examples.parent}:{os.environ.get('PYTHONPATH', '')}"
    return folder, os.environ | dict(PATH=path, PYTHONPATH=package, OMP_NUM_THREADS='1', FASTAI_HOME=str(folder/'home'), REQUEUED=str(folder/'requeued'))


def free(port):
    with socket.socket() as s:
        try: s.bind(('127.0.0.1', port))
        except OSError: return False
        return True


def arguments(folder, name, epochs):
    photos = folder/'photos'
    return [photos, photos/'labels.json', photos/'encoding.json', folder/f'{name}-run', folder/f'{name}-model', str(epochs)]


@pytest.mark.slow
def test_slurm_ends_a_job_with_a_checkpoint_and_the_next_one_has_fewer_places(cluster):
    folder, env = cluster
    number = next(n for n in range(77, 20000) if free(20000 + n))                   # the job's port follows from it
    job = env | dict(SLURM_JOB_ID=str(number), SLURM_JOB_NODELIST='node[0-1]', SLURM_SUBMIT_DIR=str(folder), SLURM_NTASKS='2', SLURM_NTASKS_PER_NODE='1')
    (folder/'wait').touch()
    first = subprocess.Popen(['bash', folder/'slurm.sh', *arguments(folder, 'slurm', 2)], env=job, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: all((folder/f'waits-{r}').exists() for r in (0, 1)) or first.poll() is not None)
        first.send_signal(signal.SIGTERM)
        said = communicate(first)
    except BaseException:
        kill(first)
        print(*communicate(first))
        raise
    finally:
        (folder/'wait').unlink()                                                    # no later test waits for a signal
    assert first.returncode == 0 and (folder/'requeued').read_text() == f'requeue {number}\n', said
    assert [p.name for p in (folder/'slurm-run').glob('checkpoint*')] and not (folder/'slurm-model').exists()
    again = run(['bash', folder/'slurm.sh', *arguments(folder, 'slurm', 2)], env=job | dict(SLURM_NTASKS='1', SLURM_RESTART_COUNT='1'))
    assert again.returncode == 0 and again.stdout.count('top1_low') == 1, again.stdout + again.stderr
    assert len(ResNet.load(folder/'slurm-model', device='cpu').history) == 2
    assert pd.read_csv(folder/'slurm-run'/'resumes.csv')[['before', 'processes', 'photos']].values.tolist() == [[2, 1, 12]]


@pytest.mark.slow
def test_ssh_starts_a_machine_each(cluster):
    folder, env = cluster
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    done = run(['bash', folder/'ssh.sh', *arguments(folder, 'ssh', 1)], cwd=folder,
               env=env | dict(HOSTS='127.0.0.1 localhost', GPUS='1', MIN='2', PORT=str(port), CUDA_VISIBLE_DEVICES=''))
    assert done.returncode == 0 and done.stdout.count('top1_low') == 1, done.stdout + done.stderr
    assert ResNet.load(folder/'ssh-model', device='cpu').history.processes.tolist() == [2]


def test_the_manifest_is_what_torchrun_reads(monkeypatch):
    "With the variables that the operator sets of `elasticPolicy`"
    yaml, launcher = pytest.importorskip('yaml'), pytest.importorskip('torch.distributed.run')
    spec = yaml.safe_load((examples/'kubernetes.yaml').read_text())['spec']
    policy, worker = spec['elasticPolicy'], spec['pytorchReplicaSpecs']['Worker']
    assert policy['minReplicas'] <= worker['replicas'] <= policy['maxReplicas']
    pod = worker['template']['spec']
    container, = pod['containers']
    of_operator = dict(PET_NNODES=f"{policy['minReplicas']}:{policy['maxReplicas']}", PET_RDZV_BACKEND=policy['rdzvBackend'], PET_RDZV_ID='resnet',
                       PET_RDZV_ENDPOINT='resnet-worker-0:23456', PET_MAX_RESTARTS=str(policy['maxRestarts']))
    own = {e['name']: e['value'] for e in container['env']}
    for name, value in (of_operator | own).items(): monkeypatch.setenv(name, value)
    program, *words = container['command']
    config, cmd, args = launcher.config_from_args(launcher.parse_args(words))
    assert (program, config.min_nodes, config.max_nodes, config.max_restarts, config.rdzv_backend) == ('torchrun', 2, 4, 3, 'c10d')
    assert config.nproc_per_node == container['resources']['limits']['nvidia.com/gpu'] and args[-1] == '90'
    assert Path(args[-7]).name == 'my_training.py' and len(args[-6:]) == 6
    assert int(own['PET_SHUTDOWN_TIMEOUT']) < pod['terminationGracePeriodSeconds']
    assert {m['name'] for m in container['volumeMounts']} == {v['name'] for v in pod['volumes']}


@pytest.mark.parametrize('cards,place,card', [(8, '3', 3), (1, '3', 0), (1, '0', 0)])
def test_a_task_uses_the_one_card_that_it_sees(monkeypatch, cards, place, card):
    chosen = []
    monkeypatch.setenv('LOCAL_RANK', place)
    monkeypatch.setenv('WORLD_SIZE', '8')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: cards)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    assert loader.own_gpu() and chosen == [card]
