"What is drawn holds the numbers that predictions give; maps and matrices are those worked out by hand; nothing is changed by looking."
import copy
import random
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import torchvision
from fastai.torch_core import set_seed
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_tensor

from resnet_fastai.core import ResNet
from resnet_fastai.data import LabelMap, demo_data
from resnet_fastai.engine.demo_photos import draw_photo
from resnet_fastai.engine.files import DataError, read_json_object, write_json
from resnet_fastai.engine.photo import open_photo
from resnet_fastai.inference import fifty_crop, predict_probs
from resnet_fastai.practice.look import grad_cam, interpretation, show_cam, show_crops, show_prediction
from resnet_fastai.model import build_net

SIZE = 32


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "A model whose encoding has gaps, trained a little"
    folder = tmp_path_factory.mktemp('look')
    paths = demo_data(folder/'drawn', sizes=dict(train=48, val=21, test=5))        # five of the eight labels occur in test/
    model = ResNet(*paths, arch='cifar_resnet8', size=SIZE, bs=8, num_workers=0, precision='fp32', lr=.05)
    with model.learn.no_bar(), model.learn.no_logging(): model.fit(3)
    return model


@pytest.fixture(autouse=True)
def no_figures():
    yield
    plt.close('all')


def state(net):
    "All that looking must leave as it is"
    own = {k: v.clone() for k, v in net.state_dict().items()}
    return own, [(m.training, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in net.modules()], \
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in net.parameters()]


def same(a, b):
    return all(torch.equal(a[0][k], b[0][k]) for k in a[0]) and a[1] == b[1] and all(
        p == q and (g is h is None or torch.equal(g, h)) for (p, g), (q, h) in zip(a[2], b[2]))


def settled(net):
    with torch.no_grad(): net.train()(torch.rand(4, 3, 32, 32) - .5)
    return net.eval()


# Grad-CAM

@pytest.mark.parametrize('arch', ['resnet18', 'resnet50', 'plain18', 'cifar_resnet8'])
def test_grad_cam_at_the_last_maps_is_cam(arch):
    "For a network that ends in one global average and one linear layer, written out place by place"
    set_seed(1)
    net, x = settled(build_net(arch, 7)), torch.rand(2, 3, 64, 40) - .5
    with torch.no_grad(): maps, targets = net[:-3](x), [6, 2]
    h, w = maps.shape[2:]
    cam = torch.stack([torch.stack([torch.stack([net.fc.weight[c]@m[:, i, j] for j in range(w)]) for i in range(h)]) for m, c in zip(maps, targets)])
    torch.testing.assert_close(grad_cam(net, x, targets), cam.relu().detach()/(h*w), atol=1e-6, rtol=1e-4)
    top = net(x).argmax(1)
    torch.testing.assert_close(grad_cam(net, x), grad_cam(net, x, top), atol=0, rtol=0)


def test_grad_cam_in_the_middle_is_the_definition():
    "Selvaraju's formula by numerical derivatives, at a layer whose output a later layer overwrites"
    set_seed(2)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5*4, 3))
    x, head = torch.rand(1, 3, 6, 6), copy.deepcopy(net[2:]).double()
    with torch.no_grad():
        net[1].running_mean.fill_(.1)
        maps = net.eval()[:2](x).double()
        weights = torch.zeros(4)
        for k in range(4):
            for i, j in np.ndindex(4, 4):
                step = torch.zeros_like(maps)
                step[0, k, i, j] = 1e-6
                weights[k] += ((head(maps + step) - head(maps - step))[0, 1]/2e-6/16).float()
    torch.testing.assert_close(grad_cam(net, x, 1, '1')[0], (weights[:, None, None]*maps[0].float()).sum(0).relu(), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(grad_cam(net, x, 1, net[1]), grad_cam(net, x, 1, '1'), atol=0, rtol=0)


def test_grad_cam_leaves_the_network_alone():
    net, seen = torchvision.models.resnet18(num_classes=4).train(), []
    net.layer1.eval(), net.conv1.weight.requires_grad_(False)
    net(torch.rand(4, 3, 32, 32)).sum().backward()
    net.fc.register_forward_hook(lambda m, args, out: seen.append(1))
    before, x = state(net), torch.rand(2, 3, 40, 40)
    first = grad_cam(net, x)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            torch.testing.assert_close(grad_cam(net, x + 0), first, atol=0, rtol=0)
            assert torch.is_inference_mode_enabled() == (off is torch.inference_mode)
    for bad in (dict(target=4), dict(layer='fc'), dict(layer=nn.ReLU())):
        with pytest.raises(DataError): grad_cam(net, x, **bad)
    assert same(state(net), before) and not first.requires_grad and not x.requires_grad
    frozen = copy.deepcopy(net).requires_grad_(False)                              # nothing of it needs gradients
    torch.testing.assert_close(grad_cam(frozen, x), first, atol=0, rtol=0)


@pytest.mark.parametrize('bad,says', [
    (dict(target=7), 'from 0 to 6'), (dict(target=-1), 'from 0 to 6'), (dict(target=[1, 2, 3]), '2 of them'), (dict(target=1.), 'an index'),
    (dict(target='dog'), 'an index'), (dict(layer='layer9'), "do you mean 'layer"), (dict(layer='fc'), 'no maps'), (dict(layer=nn.ReLU()), 'no layer')])
def test_grad_cam_says_what_is_wrong(bad, says):
    with pytest.raises(DataError, match=says): grad_cam(build_net('cifar_resnet8', 7), torch.rand(2, 3, 32, 32), **bad)


# Figures

def bars(fig): return [[(t.get_text(), b.get_width()) for t, b in zip(ax.get_yticklabels(), ax.patches)] for ax in fig.axes[1::2] if ax.patches]


def test_bars_are_what_predict_n_says(model, tmp_path):
    photos = model.learn.dls.photos['test']
    known = read_json_object(model.learn.dls.path/'labels.json')
    fig = model.show_prediction(photos, n=3)
    assert len(bars(fig)) == 5
    for p, b, ax in zip(photos, bars(fig), fig.axes[1::2]):
        best = model.predict_n(p, 3)
        assert [label for label, _ in b] == [label for label, _ in best]
        assert [v for _, v in b] == pytest.approx([v for _, v in best], abs=2e-3)
        truth = known[Path(p).stem]
        assert ax.get_title('left') == best[0][0] + (', as labelled' if truth == best[0][0] else f', labelled {truth}')
    plain = bars(show_prediction(model.learn, str(photos[0]), 3))[0]               # a learner, a text
    assert [v for _, v in plain] == pytest.approx([v for _, v in bars(fig)[0]], abs=2e-3)
    alone = show_prediction(model, np.array(open_photo(photos[0])), n=50)          # an array has no name, and there are eight labels
    assert len(bars(alone)[0]) == 8 and ', ' not in alone.axes[1].get_title('left')
    shutil.copy(photos[0], tmp_path/Path(photos[0]).name)                          # the same name elsewhere is another photo
    assert ', ' not in model.show_prediction(tmp_path/Path(photos[0]).name).axes[1].get_title('left')


def test_labels_are_drawn_as_they_are_written(model, tmp_path):
    "No mathematics, no second line, no end"
    labels = LabelMap({}, {'$5 or $6': 0, 'two\nlines': 7, 'x'*60: 3, r'$\frac': 9})
    fig = show_prediction(model.trained._replace(labels=labels), draw_photo('dots', np.random.default_rng(0)))
    fig.savefig(tmp_path/'a.png')
    said = [label for label, _ in bars(fig)[0]]
    assert sorted(map(len, said))[-1] <= 18 and r'\$5 or \$6' in said and 'two lines' in said


def test_crops_add_up_to_the_average(model):
    photo = model.learn.dls.photos['val'][3]
    fig = model.show_crops(photo)
    crops = fifty_crop(photo, size=SIZE) - torch.tensor(model.stats.mean, dtype=torch.float32)[:, None, None]
    with torch.no_grad(): probs = copy.deepcopy(model.net).eval()(crops).softmax(1).numpy()
    names, outputs = list(model.labels.encoding), list(model.labels.encoding.values())
    own, best = probs[:, outputs].argmax(1), probs.mean(0)[outputs].argmax()
    said = [ax.get_title().split('\n') for ax in fig.axes]
    sure = np.ptp(np.sort(probs[:, outputs])[:, -2:], axis=1) > .02                # the default precision may turn a tie
    assert len(said) == 50 and sure.sum() > 30
    for (label, percent), i, p, ok in zip(said, own, probs, sure):
        if ok: assert label == names[i] and int(percent[:-1]) == pytest.approx(100*p[outputs[i]], abs=1.2)
    agree = sum(label == names[best] for label, _ in said)
    assert fig.get_suptitle().startswith(names[best]) and f'{agree} of 50 crops agree' in fig.get_suptitle()
    mean = float(fig.get_suptitle().split(': ')[1].split('%')[0])
    assert mean == pytest.approx(100*model.predict(photo)[outputs[best]], abs=.3)
    frames = [ax.spines['top'].get_edgecolor() for ax in fig.axes]
    assert len({f for f, (label, _) in zip(frames, said) if label == names[best]}) == 1
    assert not {f for f, (label, _) in zip(frames, said) if label == names[best]} & {f for f, (label, _) in zip(frames, said) if label != names[best]}
    for ax, side in zip(fig.axes[::10], (32, 37, 55, 69, 91)): assert ax.get_ylabel().startswith(f'side {side}\n')


def test_the_heat_lies_where_cam_says(model):
    photo = draw_photo('mesh', np.random.default_rng(3)).resize((90, 60))
    fig = model.show_cam(photo, 'mesh')
    small = photo.resize((48, 32), Image.Resampling.BILINEAR)                      # short side 32, upright, whole
    net = copy.deepcopy(model.net).eval()
    with torch.no_grad(): maps = net[:-3](to_tensor(small)[None] - torch.tensor(model.stats.mean, dtype=torch.float32)[:, None, None])
    cam = torch.einsum('k,bkij->bij', net.fc.weight[999], maps).relu()[None].detach()
    expected = F.interpolate(cam, (32, 48), mode='bilinear')[0, 0]
    shown = fig.axes[1].images[1].get_array()
    assert shown.shape == (32, 48)
    np.testing.assert_allclose(shown, expected/expected.max(), atol=1e-4)
    assert f"for mesh, {model.predict(photo)[999]:.1%}" in fig.get_suptitle()
    assert f'for {model.predict_n(photo, 1)[0][0]},' in model.show_cam(photo).get_suptitle()


def test_a_loaded_model_shows_the_same(model, tmp_path):
    loaded, photo = ResNet.load(model.save(tmp_path/'model'), device='cpu'), model.learn.dls.photos['test'][1]
    for a, b in zip(bars(loaded.show_prediction(photo))[0], bars(model.show_prediction(photo))[0]):
        assert a[0] == b[0] and a[1] == pytest.approx(b[1], abs=2e-3)
    assert loaded.show_crops(photo).get_suptitle().split(': ')[1] == model.show_crops(photo).get_suptitle().split(': ')[1]
    np.testing.assert_allclose(*(m.show_cam(photo, 'dots').axes[1].images[1].get_array() for m in (loaded, model)), atol=1e-5)
    with pytest.raises(DataError, match='has no photos'): loaded.interpretation()


# Confusions

def forwarded(model, split):
    "Logits of the network's own forward pass over the central crops of a split, and the labels' indices"
    dls, net = model.learn.dls, copy.deepcopy(model.net).eval()
    dl = dls.test_dl(dls.photos[split], with_labels=True)
    with torch.no_grad(): return torch.cat([net(x.as_subclass(torch.Tensor)) for x, _ in dl]), [dls.labels(p) for p in dls.photos[split]]


@pytest.mark.parametrize('split,n', [('val', 21), ('test', 5), ('train', 48)])
def test_the_matrix_counts_the_labels_that_occur(model, split, n):
    logits, truth = forwarded(model, split)
    names = model.learn.dls.vocab
    taken = [names[i] for i in logits.argmax(1)]
    interp = interpretation(model, split)
    wanted = pd.crosstab(pd.Series(truth), pd.Series(taken))
    assert set(interp.vocab) == {*truth, *taken}
    found = pd.DataFrame(interp.confusion_matrix(), [*interp.vocab], [*interp.vocab])
    assert found.to_numpy().sum() == n == wanted.to_numpy().sum()
    for a in wanted.index:
        for b in wanted.columns: assert found.loc[a, b] == wanted.loc[a, b]
    interp.plot_confusion_matrix()
    assert [t.get_text() for t in plt.gca().get_xticklabels()] == [*interp.vocab] and plt.gca().images[0].get_array().shape == found.shape
    worst = interp.most_confused()
    if worst: assert worst[0][2] == max(found.loc[a, b] for a in found for b in found if a != b)


def test_top_losses_are_cross_entropies(model):
    logits, truth = forwarded(model, 'val')
    target = torch.tensor([model.labels.encoding[t] for t in truth])
    wanted = F.cross_entropy(logits, target, reduction='none')
    interp = model.interpretation()
    losses, idx = interp.top_losses()
    torch.testing.assert_close(torch.as_tensor(losses), wanted[idx], atol=1e-4, rtol=1e-4)
    assert sorted(idx.tolist()) == list(range(21)) and list(losses) == sorted(losses, reverse=True)
    interp.plot_top_losses(4)
    said = [ax.get_title() for ax in plt.gcf().axes]
    for title, i in zip(said, idx):
        taken = model.learn.dls.vocab[logits[i].argmax()]
        assert title == f'{taken}/{truth[i]} / {wanted[i].item():.2f} / {logits[i].softmax(0).max().item():.2f}'
    interp.show_results([0, 1])


def test_the_report_names_the_labels_that_occur(model, capsys):
    interp = interpretation(model.learn)
    interp.print_classification_report()
    said = capsys.readouterr().out
    assert all(name in said for name in interp.vocab) and 'unused' not in said


def test_looking_changes_nothing(model):
    learn, photo = model.learn, model.learn.dls.photos['val'][0]
    before, rows, train = state(learn.model), copy.deepcopy(learn.history.rows), learn.dls.train
    values, tfms = list(map(list, learn.recorder.values)), train.after_batch.fs
    for show in (show_prediction, show_crops, show_cam): show(learn, photo)
    interpretation(learn, 'train').plot_top_losses(2)
    assert same(state(learn.model), before) and learn.history.rows == rows and list(map(list, learn.recorder.values)) == values
    assert learn.dls.train is train and train.after_batch.fs == tfms and train.split_idx == 0 and train.shuffle


# What cannot be done

def test_wrong_inputs_are_named(model, drawn, tmp_path):
    photo = model.learn.dls.photos['val'][0]
    fresh = ResNet(*drawn, arch='cifar_resnet8', size=SIZE, bs=8, num_workers=0)
    for ask in (fresh.show_prediction, fresh.show_crops, fresh.show_cam, fresh.predict):
        with pytest.raises(DataError, match='has not been trained'): ask(photo)
    for ask in (fresh.interpretation, lambda: fresh.predict_folder(drawn[0]/'test')):
        with pytest.raises(DataError, match='has not been trained'): ask()
    for ask, says in [(lambda: model.show_cam(photo, 'chekcs'), "there is no label 'chekcs'; do you mean 'checks'"),
                      (lambda: model.show_cam(photo, 'WEAVES'), "do you mean 'weave'"), (lambda: model.show_cam(photo, '§'), "there is 'stripes'"),
                      (lambda: model.show_cam(photo, ['dots']), 'there is no label'), (lambda: model.interpretation('vla'), "split is 'vla'; it must be one of 'train', 'val', 'test'"),
                      (lambda: model.show_prediction([photo]*25), '25 photos do not fit'), (lambda: model.show_prediction([]), 'no photos in this list'),
                      (lambda: model.show_prediction(photo, 0), 'n is 0'), (lambda: model.show_crops([photo]), 'not a photo'),
                      (lambda: model.show_crops(tmp_path), 'is a folder'), (lambda: model.show_cam(tmp_path/'gone.jpg'), 'does not exist'),
                      (lambda: show_crops(model.net, photo), 'not a model')]:
        with pytest.raises(DataError, match=says): ask()
    labels = read_json_object(drawn[1])
    write_json(drawn[1], {k: v for k, v in labels.items() if not k.startswith('test')})
    secret = ResNet(*drawn, arch='cifar_resnet8', size=SIZE, bs=8, num_workers=0)
    with secret.learn.no_bar(), secret.learn.no_logging(): secret.fit(1)
    with pytest.raises(DataError, match='has no label|names none'): secret.interpretation('test')


# `predict` and its kin take what `Photo` takes

def test_every_kind_of_photo_gets_the_same_answer(model, tmp_path):
    photo = model.learn.dls.photos['test'][2]
    one = model.predict(photo)
    kinds = [str(photo), Path(photo).read_bytes(), open_photo(photo), np.array(open_photo(photo))]
    random.Random(0).shuffle(kinds)
    for kind in kinds: np.testing.assert_allclose(model.predict(kind), one, atol=2e-3)
    many = predict_probs(model.net, tuple(kinds), model.stats, SIZE)
    assert many.shape == (4, 1000) and abs(many - one).max() < 2e-3
    (tmp_path/'some/deep').mkdir(parents=True)
    for name in ('some/b.jpg', 'some/deep/c.jpg'): (tmp_path/name).write_bytes(Path(photo).read_bytes())
    assert predict_probs(model.net, tmp_path/'some', model.stats, SIZE).shape == (2, 1000)
    table = model.predict_folder(tmp_path/'some', n=2)
    assert table.id.tolist() == ['b.jpg', 'deep/c.jpg'] and table.label_1.tolist() == [model.predict_n(photo, 1)[0][0]]*2


def test_one_of_several_processes_saves(model, tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '1')                        # fastai's `rank_distrib` reads it
    assert model.save(tmp_path/'theirs') == tmp_path/'theirs' and not (tmp_path/'theirs').exists()
    monkeypatch.setenv('RANK', '0')
    assert (model.save(tmp_path/'theirs')/'config.json').exists()


def test_the_heat_map_says_how_its_probability_was_found(model):
    photo, before = next(iter(model.learn.dls.valid.items)), model.protocol
    assert model.show_cam(photo).get_suptitle().endswith('on the average of 50 crops')
    model.protocol = '1crop'
    assert model.show_cam(photo).get_suptitle().endswith('by 1crop')
    model.protocol = before
