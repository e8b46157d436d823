"A device as an index, a text or a `torch.device`, wherever one is named. A machine without GPU has stand-ins for PyTorch's answers about them."
import numpy as np
import pytest
import torch
from fastai.torch_core import default_device, defaults
from typer.testing import CliRunner

from resnet_fastai.augment import ColorStats
from resnet_fastai.core import ResNet, train
from resnet_fastai.data import resnet_dls
from resnet_fastai.engine.device import as_device, use_device
from resnet_fastai.engine.files import DataError
from resnet_fastai.engine.precision import precision_and_layout
from resnet_fastai.practice.cli import app
from resnet_fastai.training import resnet_learner

pytestmark = pytest.mark.usefixtures('one_thread')
cpu = torch.device('cpu')
tiny = dict(arch='cifar_resnet8', size=32, bs=8, micro_bs=8, num_workers=0)


@pytest.fixture
def four_gpus(monkeypatch):
    "What PyTorch says where there are four; nothing is sent to them"
    chosen = []
    for name, answer in dict(is_available=True, device_count=4, current_device=0, get_device_capability=(9, 0)).items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    monkeypatch.setattr('fastai.data.core.to_device', lambda b, device: b)
    monkeypatch.setattr(defaults, 'use_cuda', None)
    return chosen


@pytest.mark.parametrize('device,index', [(0, 0), (3, 3), (np.int64(2), 2), ('1', 1), ('cuda:1', 1), ('cuda', None), (torch.device('cuda', 2), 2),
                                          (None, 0)])
def test_a_gpu_by_all_its_names(four_gpus, device, index):
    assert as_device(device) == torch.device('cuda' if index is None else f'cuda:{index}')


@pytest.mark.parametrize('device', [4, '4', 'cuda:7'])
def test_a_gpu_that_is_not_there(four_gpus, device):
    with pytest.raises(DataError, match=f'device is {device!r}, and PyTorch finds 4 GPUs here'): as_device(device)


@pytest.mark.parametrize('device', ['gpu', True, -1, 1.5, 'cuda:x', 'cpu '*500])
def test_what_is_no_device(device):
    with pytest.raises(DataError, match="^device is .*; it must be 'cpu', 'cuda', 'cuda:1', the index of a GPU, or a torch.device$") as e:
        as_device(device)
    assert len(str(e.value)) < 200


def test_a_machine_without_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for device in (0, 'cuda', '1'):
        with pytest.raises(DataError, match='PyTorch finds no GPUs here'): as_device(device)
    assert as_device('cpu') == as_device(cpu) == cpu


def test_the_first_gpu_is_no_cpu(four_gpus):
    "Its index is false"
    assert precision_and_layout(0) == ('bf16', True) and precision_and_layout(0, 'fp32') == ('fp32', False)      # NHWC in fp32 is for a CPU
    assert precision_and_layout(None, 'fp32') == precision_and_layout('cpu', 'fp32') == ('fp32', True)


def test_loaders_of_an_index(four_gpus, drawn):
    stats = ColorStats([.5]*3, [.1, .02, .003], np.eye(3))
    for device, at in ((0, 0), ('3', 3), (None, 0)):
        dls = resnet_dls(*drawn, size=32, micro_bs=8, num_workers=0, stats=stats, device=device)
        assert dls.device == dls.train.device == dls.valid.device == torch.device('cuda', at) and dls.train.pin_memory


@pytest.mark.parametrize('device', ['cpu', cpu])
def test_train_save_and_load(device, drawn, tmp_path):
    learn = train(*drawn, epochs=1, device=device, **tiny)
    assert learn.dls.device == cpu and not learn.dls.train.pin_memory
    model = ResNet(*drawn, device=device, **tiny)
    assert next(model.net.parameters()).device == cpu and model.learn.precision.kind == precision_and_layout(cpu)[0]
    assert resnet_learner(model.learn.dls, 'cifar_resnet8', bs=8).dls.device == cpu
    with model.learn.no_bar(), model.learn.no_logging(): model.fit(1)
    loaded = ResNet.load(model.save(tmp_path/'model'), device=device)
    assert next(loaded.net.parameters()).device == cpu and loaded.predict(drawn.data_path/'test', protocol='1crop').shape == (4, 1000)


def test_a_wrong_one_is_said_before_photos_are_read(drawn, tmp_path):
    for act in (lambda: ResNet(*drawn._replace(data_path=tmp_path/'nowhere'), device='gpu', **tiny), lambda: train(*drawn, device='gpu', **tiny)):
        with pytest.raises(DataError, match="device is 'gpu'"): act()


def test_the_device_of_a_command(four_gpus, drawn):
    for text, chosen in (('2', [torch.device('cuda', 2)]), ('cuda', []), ('cpu', [])):
        four_gpus.clear()
        use_device(text)
        assert four_gpus == chosen and default_device().type == ('cpu' if text == 'cpu' else 'cuda')
    done = CliRunner().invoke(app, ['--device', 'gpu', 'stats', str(drawn.data_path)])
    assert done.exit_code == 1 and "error: device is 'gpu'; it must be" in done.stderr
    assert CliRunner().invoke(app, ['--device', 'cpu', 'stats', str(drawn.data_path), '--json']).exit_code == 0
