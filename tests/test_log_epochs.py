"Trackers get the rows of the history, each once, in the order of the epochs, also after a resume; one that fails ends no run."

import pandas as pd
import pytest

from resnet_fastai.core import ResNet
from resnet_fastai.data import demo_data
from resnet_fastai.engine.log_epochs import LogEpochs

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def demo(tmp_path_factory): return demo_data(tmp_path_factory.mktemp('log')/'demo', sizes=dict(train=20, val=8, test=4))


def made(demo, *cbs, **kw):
    return ResNet(*demo, arch='cifar_resnet8', size=32, bs=8, micro_bs=4, num_workers=0, n_out=None, cbs=[*cbs], **kw)      # two micro-batches an update


def fit(model, epochs=2, **kw):
    with model.learn.no_bar(), model.learn.no_logging(): model.fit(epochs, **kw)
    return model


def logged(model): return model.history.drop(columns='epoch')


def test_each_row_once_also_after_a_resume(demo, tmp_path):
    seen = []
    cb = lambda: LogEpochs(lambda row, step: seen.append(row | dict(epoch=step)))
    model = fit(made(demo, cb(), run_folder=tmp_path/'run'))
    model.learn.validate()
    model.learn.get_preds()
    again = fit(made(demo, cb(), run_folder=tmp_path/'run'), 3, resume=True)
    assert [row['epoch'] for row in seen] == [0, 1, 2]
    pd.testing.assert_frame_equal(pd.DataFrame(seen)[list(again.history)], again.history)


def test_a_tracker_that_fails_ends_no_run(demo, capsys):
    def log(row, step): raise ConnectionError('no way to the server')
    model = fit(made(demo, LogEpochs(log)))
    assert len(model.history) == 2 and capsys.readouterr().out.count('epoch 0 was not logged: ConnectionError: no way to the server') == 1


def test_tensorboard(demo, tmp_path):
    pytest.importorskip('tensorboard', reason='tensorboard is not installed')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    model = fit(made(demo, LogEpochs.tensorboard(tmp_path/'tb')))
    model.learn.export(tmp_path/'learner.pkl')                                   # the open file is no part of it
    (events := EventAccumulator(str(tmp_path/'tb'))).Reload()
    assert {*events.Tags()['scalars']} == {*logged(model)}
    for name, values in logged(model).items():
        found = events.Scalars(name)
        assert [e.step for e in found] == [0, 1] and [e.value for e in found] == pytest.approx(values.tolist())


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    module = pytest.importorskip('wandb', reason='wandb is not installed')
    for name, value in dict(WANDB_MODE='offline', WANDB_DIR=str(tmp_path), WANDB_SILENT='true', WANDB_CONSOLE='off').items(): monkeypatch.setenv(name, value)
    run = module.init(project='resnet', dir=str(tmp_path))
    yield module
    run.finish()
    if hasattr(module, 'teardown'): module.teardown()


def test_weights_and_biases_offline(demo, tmp_path, wandb):
    "Its summary holds the last row, and the run lies in a folder of this machine"
    model = fit(made(demo, LogEpochs(wandb.log)))
    wandb.log({'over': 1}, step=2)                                               # a step is written when the next one begins, or at the end
    for name, value in logged(model).iloc[-1].items(): assert dict(wandb.run.summary)[name] == pytest.approx(value), name
    assert list(tmp_path.glob('wandb/offline-run-*/*.wandb'))


def test_mlflow_in_a_folder(demo, tmp_path, monkeypatch):
    mlflow = pytest.importorskip('mlflow', reason='mlflow is not installed')
    monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
    mlflow.set_tracking_uri((tmp_path/'mlruns').as_uri())
    with mlflow.start_run() as run: model = fit(made(demo, LogEpochs(mlflow.log_metrics)))
    client = mlflow.MlflowClient()
    for name, values in logged(model).items():
        found = sorted(client.get_metric_history(run.info.run_id, name), key=lambda m: m.step)
        assert [m.step for m in found] == [0, 1] and [m.value for m in found] == pytest.approx(values.tolist())
    assert (tmp_path/'mlruns').is_dir()
