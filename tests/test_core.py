"`ResNet` and `train`: what people type, beside the functions that do the work and beside torchvision."
import shutil
import sys
from inspect import signature
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torchvision
from fastcore.docments import docments
from pandas.testing import assert_frame_equal

from resnet_fastai import inference
from resnet_fastai.core import ResNet, train
from resnet_fastai.data import demo_data, resnet_dls
from resnet_fastai.engine.files import DataError
from resnet_fastai.engine.layout import list_photos
from resnet_fastai.engine.photo import open_photo
from resnet_fastai.practice import look
from resnet_fastai.practice.methods import Practice
from resnet_fastai.training import resnet_learner

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'tools'))
import reference  # noqa: E402

pytestmark = pytest.mark.usefixtures('one_thread')
tiny = dict(arch='cifar_resnet8', size=32, bs=16, micro_bs=16, num_workers=0)


@pytest.fixture(scope='module')
def demo(tmp_path_factory): return demo_data(tmp_path_factory.mktemp('core')/'demo', sizes=dict(train=64, val=24, test=24))


@pytest.fixture(scope='module')
def model(demo):
    model = ResNet(*demo, **tiny)
    with model.learn.no_bar(), model.learn.no_logging():
        for epochs in (1, 2): model.fit(epochs)
    return model


@pytest.fixture
def photo(demo): return list_photos(demo.data_path/'test')[3]


def test_it_takes_what_its_parts_take():
    takes, docs = signature(ResNet).parameters, docments(ResNet)
    for f in (resnet_learner, resnet_dls):
        theirs = {k: p for k, p in signature(f).parameters.items() if p.default is not p.empty and k not in ('arch', 'bs', 'micro_bs')}
        assert len(theirs) > 5 and all(takes[k].default is p.default and docs[k] == docments(f)[k] for k, p in theirs.items())
    assert all(docs[k] for k in takes) and 'kwargs' not in takes
    with pytest.raises(TypeError, match="unexpected keyword argument 'wings'"): ResNet('photos', 'labels.json', 'encoding.json', wings=2)


@pytest.mark.parametrize('theirs, ours', [(look.show_prediction, ResNet.show_prediction), (look.show_cam, ResNet.show_cam),
                                          (look.interpretation, ResNet.interpretation)], ids=lambda f: f.__name__)
def test_pictures_take_what_their_functions_take(theirs, ours):
    defaults = lambda f: {k: (p.default, docments(f)[k]) for k, p in signature(f).parameters.items() if p.default is not p.empty}
    assert defaults(ours) == defaults(theirs)


def test_each_method_of_practice_says_what_it_takes():
    "Signatures as people see them: no `kwargs` left, a comment for each parameter, and the reference page lists the method"
    page = next(m for m in reference.read_modules(root/'resnet_fastai') if m.name == 'practice.methods')
    listed = {m.name.partition('.')[2]: m for e in page.entries for m in e.members}
    methods = {name: f for name in vars(Practice) if not name.startswith('_') and callable(f := getattr(ResNet, name))}
    assert {'show_prediction', 'show_crops', 'show_cam', 'interpretation', 'export', 'to_torchvision', 'predict_folder', 'choose_protocol'} <= {*methods}
    for name, f in methods.items():
        takes, docs = signature(f).parameters, docments(f)
        assert 'kwargs' not in takes and f.__doc__ and listed[name].says == f.__doc__, name
        assert all(docs[k] for k in takes if k not in ('self', 'cls')), name


def test_history_goes_on_over_fits(model):
    h = model.history
    assert list(h)[:8] == ['epoch', 'train_loss', 'valid_loss', 'top1_error', 'top5_error', 'lr', 'seconds', 'train_error']
    assert h.epoch.tolist() == [0, 1, 2] and model.learn.recorder.values[-1][1] == h.valid_loss.iloc[-1]
    assert model.learn.validate()[0] == pytest.approx(h.valid_loss.iloc[-1], rel=1e-4)


@pytest.mark.parametrize('epochs', [0, -1, 1.5, True, '2'])
def test_epochs_are_whole_numbers(model, epochs):
    with pytest.raises(DataError, match=f'epochs is {epochs!r}'): model.fit(epochs)


@pytest.mark.parametrize('kw', [dict(bs='4'), dict(bs=0), dict(micro_bs=2.5), dict(micro_bs=-1)], ids=str)
def test_batches_are_whole_numbers(demo, kw):
    with pytest.raises(DataError, match='must be 1 or more'): ResNet(*demo, **tiny | kw)


def test_a_run_in_two_sessions_is_one_run(demo, tmp_path):
    whole = ResNet(*demo, **tiny)
    with whole.learn.no_bar(), whole.learn.no_logging(): whole.fit(2)
    for epochs in (1, 2): learn = train(*demo, epochs=epochs, resume=tmp_path/'run', **tiny)
    assert_frame_equal(learn.history.df.drop(columns='seconds'), whole.history.drop(columns='seconds'), check_exact=True)
    for k, v in whole.net.state_dict().items(): assert torch.equal(learn.model.state_dict()[k], v), k
    with pytest.raises(DataError, match='no folder to resume from'): whole.fit(3, resume=True)


def test_predict(model, demo, photo, tmp_path):
    probs = model.predict(photo)
    assert probs.shape == (1000,) and probs.dtype == np.float32 and probs.sum() == pytest.approx(1, abs=1e-5)
    same = model.predict([photo, photo.read_bytes(), np.array(open_photo(photo))])
    np.testing.assert_allclose(same, np.stack([probs]*3), atol=1e-6)
    (tmp_path/'new/deep').mkdir(parents=True)
    shutil.copy(photo, tmp_path/'new/deep/a.jpg')
    shutil.copy(list_photos(demo.data_path/'test')[0], tmp_path/'new/z.jpg')
    one_by_one = model.predict([tmp_path/'new/deep/a.jpg', tmp_path/'new/z.jpg'])
    np.testing.assert_allclose(model.predict(tmp_path/'new'), one_by_one, atol=1e-6)
    table = model.predict_folder(tmp_path/'new', dest=tmp_path/'new.csv', n=2)
    assert table.id.tolist() == ['deep/a.jpg', 'z.jpg'] and table.prob_1[0] == pytest.approx(probs.max(), rel=1e-4)
    assert_frame_equal(model.predict_folder(tmp_path/'new', dest=tmp_path/'new.csv', n=2), table)


def test_predict_n(model, photo):
    probs, best = model.predict(photo), model.predict_n(photo)
    assert len(best) == 5 and [p for _, p in best] == sorted((p for _, p in best), reverse=True)
    for label, p in best: assert p == pytest.approx(float(probs[model.labels.encoding[label]]), abs=1e-6)
    assert [[label for label, _ in ps] for ps in model.predict_n([photo, photo], 2)] == [[label for label, _ in best[:2]]]*2


def test_predict_n_of_few_labels(tmp_path, demo, photo):
    "The default is as many labels as there are; only a number that somebody gives is refused"
    few = ResNet.from_torchvision(torchvision.models.resnet18(num_classes=3).state_dict(), {'cat': 0, 'dog': 2}, size=64, device='cpu')
    assert {label for label, _ in few.predict_n(photo)} == {'cat', 'dog'}
    with pytest.raises(DataError, match='n is 5; this model knows 2 labels'): few.predict_n(photo, 5)


@pytest.mark.parametrize('n', [9, 0, -1, 2.0])
def test_predict_n_refuses(model, photo, n):
    with pytest.raises(DataError, match='this model knows 8 labels'): model.predict_n(photo, n)


def test_what_cannot_be_asked(model, demo, photo, tmp_path):
    (tmp_path/'empty').mkdir()
    with pytest.raises(DataError, match='holds no photos'): model.predict(tmp_path/'empty')
    with pytest.raises(DataError, match='has not been trained'): ResNet(*demo, **tiny).predict(photo)


def test_pictures_and_evaluation(model, photo):
    best = model.predict_n(photo, 1)[0][0]
    assert model.interpretation('test').confusion_matrix().sum() == 24
    assert model.show_crops(photo).get_suptitle().startswith(best) and 'mesh' in model.show_cam(photo, 'mesh').get_suptitle()
    plt.close('all')
    errors = model.evaluate(protocol=['1crop', '10crop', '50crop'])
    assert_frame_equal(errors[:1], inference.evaluate(model, protocol='1crop'))
    assert {'split', 'protocol'} < {*signature(ResNet.evaluate).parameters}


def test_save_and_load(model, demo, photo, tmp_path):
    probs, best, folder = model.predict(photo), model.predict_n(photo), model.save(tmp_path/'model')
    elsewhere = tmp_path/'elsewhere.jpg'
    shutil.copy(photo, elsewhere)
    loaded = ResNet.load(folder, device='cpu')
    np.testing.assert_allclose(loaded.predict(elsewhere), probs, atol=1e-5)
    assert [label for label, _ in loaded.predict_n(elsewhere, 2)] == [label for label, _ in best[:2]] and len(loaded.history) == 3
    with pytest.raises(DataError, match='has no photos to train on'): loaded.fit(1)
    with pytest.raises(DataError, match='holds a model already'): model.save(folder)
    model.save(folder, overwrite=True)
    model.save(tmp_path/'model2')
    assert all((tmp_path/'model2'/p.name).read_bytes() == p.read_bytes() for p in folder.iterdir())
    (folder/'model.safetensors').write_bytes(b'')
    with pytest.raises(DataError, match='holds no whole model'): ResNet.load(folder)


def test_torchvisions_network_there_and_back(photo):
    theirs = torchvision.models.resnet18(num_classes=8).eval()
    ours = ResNet.from_torchvision(theirs.state_dict(), {'cat': 0, 'dog': 7}, size=64, device='cpu')
    theirs.load_state_dict(ours.to_torchvision())                        # for x/255 - mean
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad(): torch.testing.assert_close(theirs(x), ours.net(x), atol=1e-4, rtol=1e-4)
    cat, dog = ours.predict(photo)[[0, 7]]
    assert ours.predict_n(photo, 1)[0][0] == ('cat' if cat > dog else 'dog')
