"Limits: copies that are never stale, strips and large files that cost no memory, models of few labels, tables that spreadsheets open."
import hashlib
import io
import json
import os
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.torch_core import set_seed
from PIL import Image

from resnet_fastai.augment import ColorStats, resize_short
from resnet_fastai.core import ResNet
from resnet_fastai.data import LabelMap, from_folders
from resnet_fastai.engine import fast_net
from resnet_fastai.engine.demo_photos import draw_photo
from resnet_fastai.engine.dense import Dense
from resnet_fastai.engine.fast_crop import cutter, short_size
from resnet_fastai.engine.fast_net import inference_copy, weights_hash
from resnet_fastai.engine.files import DataError, PhotoError
from resnet_fastai.engine.photo import Photo, open_photo
from resnet_fastai.inference import dense_logits, predict_probs
from resnet_fastai.model import build_net
from resnet_fastai.practice.shards import pack_photos
from resnet_fastai.practice.predict_folder import ResumableCSV, predict_folder
from resnet_fastai.practice.share import load_model

stats = ColorStats([.5, .4, .3], [.2, .02, .005], np.eye(3))
pytestmark = pytest.mark.usefixtures('one_thread')


def a_net(arch='resnet18', n_out=6):
    set_seed(0)
    net = build_net(arch, n_out)
    with torch.no_grad(): net.train()(torch.rand(8, 3, 64, 64)*2 - 1)
    return net.eval()


# ── The copy that predicts ───────────────────────────────────────────────────────────────────────────────────────────────────

class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.scale, self.act = torch.nn.Conv2d(3, 1021, 3), torch.nn.Linear(1021, 6), 2., torch.relu
        self.kept = torch.ones(1)                                                 # a tensor that is neither a parameter nor a buffer
    def forward(self, x): return self.fc(self.act(self.conv(x)).mean((2, 3))*self.scale*self.kept)


def swap(t): t.data[[3, 700]] = t.data[[700, 3]]


changes = {
    'rows are permuted': lambda n: swap(n.fc.weight.T), 'channels are permuted': lambda n: swap(n.conv.weight), 'one weight': lambda n: n.fc.weight.data[0, 0].add_(1e-6),
    'a zero changes its sign': lambda n: n.conv.bias.data.copy_(-n.conv.bias.data), 'through numpy': lambda n: n.fc.bias.detach().numpy().__setitem__(0, 5.),
    'a setting': lambda n: setattr(n, 'scale', 3.), 'a function': lambda n: setattr(n, 'act', torch.sigmoid), 'a layer': lambda n: setattr(n, 'fc', torch.nn.Linear(1021, 6)),
    'a stride': lambda n: setattr(n.conv, 'stride', (2, 2)), 'a plain tensor': lambda n: n.kept.mul_(2), 'a method': lambda n: setattr(n, 'forward', lambda x: torch.zeros(1, 6)),
    'the class': lambda n: setattr(n, '__class__', type('Other', (Wide,), dict(forward=lambda self, x: x.mean((2, 3)).repeat(1, 2)))),
    'a hook': lambda n: n.fc.register_forward_hook(lambda m, a, out: out*0), 'a layer is taken out': lambda n: setattr(n, 'conv', torch.nn.Identity()) or setattr(n, 'fc', torch.nn.Linear(3, 6))}


@pytest.mark.parametrize('what', changes)
def test_the_copy_is_never_stale(what):
    set_seed(0)
    net, x = Wide().eval(), torch.rand(2, 3, 16, 16)
    net.conv.bias.data[:3] = 0
    with torch.no_grad():
        assert torch.allclose(inference_copy(net, size=16)(x), net(x), atol=1e-5)
        first = inference_copy(net, size=16)
        assert inference_copy(net, size=16) is first                             # nothing has changed: nothing is made
        changes[what](net)
        assert inference_copy(net, size=16) is not first
        assert torch.allclose(inference_copy(net, size=16)(x), net(x), atol=1e-5)


def test_no_copy_is_made_for_another_size(monkeypatch):
    made, make = [], fast_net._make
    monkeypatch.setattr(fast_net, '_make', lambda *args: made.append(args[1:]) or make(*args))
    net, img = a_net(), draw_photo('bricks', np.random.default_rng(0)).resize((150, 110))
    for size in (64, 32, 64, 48): predict_probs(net, img, stats, size, precision='fp32')
    assert len(made) == 1
    predict_probs(net, img, stats, 32, precision='bf16')
    assert len(made) == 2


def test_the_hash_is_sha256_of_every_bit():
    net = Wide()
    digest = hashlib.sha256()
    for name, t in (*net.named_parameters(), *net.named_buffers()):
        digest.update(json.dumps([name, str(t.dtype), list(t.shape)]).encode() + t.detach().numpy().tobytes())
    assert weights_hash(net) == digest.hexdigest()
    before = weights_hash(net)
    swap(net.conv.weight)
    assert weights_hash(net) != before


# ── Strips ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def strip(w=300, h=1):
    out = io.BytesIO()
    Image.fromarray((np.arange(w*h) % 256).astype(np.uint8).reshape(h, w)).convert('RGB').save(out, 'PNG')
    return out.getvalue()


@pytest.mark.parametrize('wh', [(300, 1), (1, 300), (900, 3)])
def test_fifty_crops_of_a_strip_cost_no_memory(monkeypatch, wh):
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, 'resize', lambda img, size, *args, **kwargs: sizes.append(size[0]*size[1]) or resize(img, size, *args, **kwargs))
    probs = predict_probs(a_net('cifar_resnet8'), strip(*wh), stats, 224, bs=10)
    assert abs(probs.sum() - 1) < 1e-5 and max(sizes) <= 1 << 24


@pytest.mark.parametrize('wh', [(3000, 10), (10, 3000), (100, 75)])
def test_parts_of_a_resized_photo_are_parts_of_the_whole(wh):
    img = draw_photo('dots', np.random.default_rng(0)).resize(wh)
    for side in (64, 183):
        (W, H), part, whole = short_size(*wh, side), cutter(img, side, 1), np.asarray(resize_short(img, side)).astype(int)
        for x, y in ((0, 0), (W - 64, H - 64), ((W - 64)//2, (H - 64)//3)):
            assert np.abs(part(x, y, 64, 64) - whole[y:y+64, x:x+64]).max() <= 1


@pytest.mark.parametrize('arch', ['resnet18', 'cifar_resnet8'])
@pytest.mark.parametrize('wh', [(700, 64), (64, 700), (731, 80), (90, 64)])
def test_dense_in_tiles_is_dense_at_once(monkeypatch, arch, wh):
    img, net = draw_photo('bricks', np.random.default_rng(1)).resize(wh), a_net(arch)
    dense, whole = dense_logits(net, stats, 64), np.stack([np.asarray(resize_short(im, 64)) for im in (img, img.transpose(Image.Transpose.FLIP_LEFT_RIGHT))])
    x = torch.from_numpy(whole).permute(0, 3, 1, 2)
    expected = dense(x).double().softmax(1).mean(2)
    assert torch.allclose(dense.mean(img, 64), expected, atol=1e-6)
    monkeypatch.setattr(Dense, 'most', 64*100)
    monkeypatch.setattr(Dense, 'halo', 256)                                       # a unit of ResNet-18's last maps sees 435 pixels
    assert sum(1 for _ in dense.pieces(img, 64)) > (1 if max(wh) < 100 else 3) - (max(wh) < 100)
    assert torch.allclose(dense.mean(img, 64), expected, atol=1e-5)


def test_dense_of_a_strip_passes_in_pieces():
    net = a_net('cifar_resnet8')
    dense, seen = dense_logits(net, stats, 64), []
    maps = dense.maps
    dense.maps = lambda x: seen.append(x.shape[2]*x.shape[3]) or maps(x[..., ::8, ::8])     # an eighth of the work is enough here
    dense._tile = lambda x, places, wide: seen.append(x.shape[2]*x.shape[3]) or torch.zeros(2, 6, 1)
    dense.mean(open_photo(strip()), 183)
    assert len(seen) > 4 and max(seen) < 4*Dense.most


# ── Large files and large photos ─────────────────────────────────────────────────────────────────────────────────────────────

def test_a_large_file_that_is_no_photo_is_not_read(tmp_path):
    with open(tmp_path/'zeros.jpg', 'wb') as f: f.truncate(3 << 30)               # takes no room on the disk
    tracemalloc.start()
    try:
        with pytest.raises(PhotoError, match="zeros.jpg' cannot be read as a photo: not an image, or damaged"): open_photo(tmp_path/'zeros.jpg')
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally: tracemalloc.stop()


def test_photos_above_pillows_limit(monkeypatch, tmp_path):
    "A JPEG of up to twice the limit is decoded at 1/2 or less; nothing else is taken, least of all a small file that claims so many"
    img = draw_photo('dots', np.random.default_rng(0)).resize((400, 300))
    data = {}
    for kind in ('JPEG', 'PNG'):
        img.save(out := io.BytesIO(), kind, quality=95)
        data[kind] = out.getvalue()
    half = np.asarray(open_photo(data['JPEG']).resize((200, 150), Image.Resampling.BOX)).astype(int)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 30_000)                        # Pillow refuses at twice this; these are 120,000
    rgb, f = Photo(data['JPEG']).pixels()
    assert f == 2 and Photo(data['JPEG']).size == (400, 300) and np.abs(np.asarray(open_photo(data['JPEG'])) - half).mean() < 3
    assert Photo(data['JPEG']).pixels(20)[1] == 8
    with pytest.raises(PhotoError, match='too large to be a photo: .*--max-pixels'): open_photo(data['PNG'])
    at = data['JPEG'].index(b'\xff\xc0') + 5
    huge = data['JPEG'][:at] + (16_000).to_bytes(2, 'big') + (16_000).to_bytes(2, 'big') + data['JPEG'][at + 4:]
    with monkeypatch.context() as m:
        m.setattr(Image, 'MAX_IMAGE_PIXELS', 100_000_000)
        with pytest.raises(PhotoError, match='too large to be a photo: Its 256,000,000 pixels are more than the limit'): Photo(huge).pixels(20)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10_000)
    with pytest.raises(PhotoError, match=r'too large to be a photo: Its 120,000 pixels are more than twice the limit'): open_photo(data['JPEG'])
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)                          # no limit at all
    assert open_photo(data['PNG']).size == open_photo(data['JPEG']).size == (400, 300)


def test_the_shell_has_an_option_for_it(drawn):
    from typer.testing import CliRunner
    from resnet_fastai.practice.cli import app
    was = Image.MAX_IMAGE_PIXELS
    try:
        for limit, code in ((1000, 1), (10**6, 0)):
            for args in ({}, dict(env=dict(RESNET_FASTAI_MAX_PIXELS=str(limit)))):
                said = CliRunner().invoke(app, [*([] if args else ['--max-pixels', str(limit)]), 'check', *map(str, drawn)], **args)
                assert said.exit_code == code, said.output
    finally: Image.MAX_IMAGE_PIXELS = was


# ── Files that never end, and models that cannot be ──────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_pipes_in_the_place_of_files(tmp_path, name):
    (tmp_path/'config.json').write_text('{}')
    (tmp_path/'model.safetensors').write_bytes(b'')
    (tmp_path/name).unlink()
    os.mkfifo(tmp_path/name)
    with pytest.raises(DataError, match=f'{name} is not a file'): load_model(tmp_path)
    with pytest.raises(DataError, match='a pipe or a device'): LabelMap('/dev/zero', {'x': 0})


def test_pipes_in_the_place_of_photos(tmp_path):
    "Nobody waits for them: the heap is laid out with the others, and packing names the first"
    for label in ('dots', 'rings'):
        (tmp_path/'heap'/label).mkdir(parents=True)
        for i in range(6): Image.new('RGB', (32, 32), (40*i, 9, 9 if label == 'dots' else 99)).save(tmp_path/'heap'/label/f'{i}.png')
        os.mkfifo(tmp_path/'heap'/label/'pipe.jpg')
    paths = from_folders(tmp_path/'heap', tmp_path/'laid')
    assert len(list((tmp_path/'laid').rglob('*.png'))) == 12
    with pytest.raises(PhotoError, match="pipe.jpg' cannot be read"): pack_photos(paths.data_path, tmp_path/'packed')


def test_a_small_file_of_a_deep_network_is_refused_before_it_is_built(tmp_path, monkeypatch):
    from safetensors.torch import save
    from resnet_fastai.practice import share
    weights = save({f't{i}': torch.zeros(1) for i in range(21_000)})
    config = dict(format=2, arch='cifar_resnet20000', net_args={}, n_out=10, size=32, scales=list(share.paper_scales(32)), encoding={'x': 0}, stats=stats.as_dict(),
                  training={}, history={}, weights_bytes=len(weights), weights_sha256=hashlib.sha256(weights).hexdigest())
    body = json.dumps({k: config[k] for k in sorted(config)}, ensure_ascii=False, indent=1).encode()
    (tmp_path/'config.json').write_text(json.dumps(config | dict(sha256=hashlib.sha256(body).hexdigest())))
    (tmp_path/'model.safetensors').write_bytes(weights)
    def refuse(*args, **kwargs): raise AssertionError('built')
    monkeypatch.setattr(share, 'build_net', refuse)
    with pytest.raises(DataError, match="there is no network 'cifar_resnet20000' with 21000 tensors"): load_model(tmp_path)


# ── Few labels, and tables ───────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize('n', [2, 3, 4, 7])
def test_models_of_few_labels_answer_by_default(tmp_path, n):
    model = ResNet.__new__(ResNet)
    trained = SimpleNamespace(net=a_net('cifar_resnet8', 7), labels=LabelMap({}, {f'l{i}': i for i in range(n)}), stats=stats, size=64, history=[1], training={})
    model.learn, model._loaded, model.labels, model.stats, model.size = None, trained, trained.labels, stats, 64
    img = draw_photo('dots', np.random.default_rng(0)).resize((80, 70))
    from resnet_fastai.practice import look
    top = look.top_labels(predict_probs(trained.net, img, stats, 64), model.labels, min(n, 5))
    simple = SimpleNamespace(learn=None, net=trained.net, stats=stats, size=64, labels=trained.labels)
    for name in 'ab': img.save(tmp_path/f'{name}.png')
    table = predict_folder(simple, tmp_path, protocol='1crop')
    assert [c for c in table if c.startswith('label')] == [f'label_{i}' for i in range(1, min(n, 5) + 1)] and len(top) == min(n, 5)
    with pytest.raises(DataError, match=f'this model knows {n} labels'): predict_folder(simple, tmp_path, n=n + 1)


@pytest.fixture
def simple():
    labels = LabelMap({}, {'=1+1': 0, '+up': 1, '-1': 2, '@x': 3, "'=q": 4, 'plain': 5})
    return SimpleNamespace(learn=None, net=a_net('cifar_resnet8'), stats=stats, size=64, labels=labels)


def test_photos_that_are_named_twice(simple, tmp_path):
    for i, name in enumerate('ab'): draw_photo('dots', np.random.default_rng(i)).save(tmp_path/f'{name}.png')
    a, b = (str(tmp_path/f'{n}.png') for n in 'ab')
    asked = [a, b, a]
    memory = predict_folder(simple, asked, n=1, protocol='1crop')
    for _ in range(2): table = predict_folder(simple, asked, tmp_path/'t.csv', n=1, protocol='1crop')
    assert memory.id.tolist() == table.id.tolist() == asked
    predict_folder(simple, [a], tmp_path/'u.csv', n=1, protocol='1crop')
    assert predict_folder(simple, asked, tmp_path/'u.csv', n=1, protocol='1crop').id.tolist() == [a, b, a]


def test_cells_are_no_formulas(simple, tmp_path):
    (tmp_path/'photos').mkdir()
    names = ['=HYPERLINK("x").png', '+1.png', '-a.png', '@b.png', "'=c.png", "''=d.png", "'e.png", 'f.png', '\tg.png']
    for i, n in enumerate(names): draw_photo('dots', np.random.default_rng(i)).save(tmp_path/'photos'/n)
    (tmp_path/'photos'/'=bad.jpg').write_bytes(b'no')
    memory = predict_folder(simple, tmp_path/'photos', n=6, protocol='1crop')
    for _ in range(2): table = predict_folder(simple, tmp_path/'photos', tmp_path/'t.csv', n=6, protocol='1crop')
    pd.testing.assert_frame_equal(table, memory)
    assert set(memory.id) == {*names, '=bad.jpg'} and set(memory.label_1) <= {*simple.labels.encoding, ''}
    for cell in pd.read_csv(tmp_path/'t.csv', dtype=str, keep_default_na=False).to_numpy().ravel():
        assert cell[:1] not in tuple('=+-@\t\r') or cell == '-1' or cell == '', cell
    predict_folder(simple, tmp_path/'photos', tmp_path/'t.parquet', n=6, protocol='1crop')
    assert set(pd.read_parquet(tmp_path/'t.parquet').id) == set(memory.id)


def test_resumed_rows_are_counted(tmp_path):
    rows = ResumableCSV(tmp_path/'a.csv', ['id', 'label'], {})
    rows.add([['=a', 'x'], ["'=a", 'x'], ['=a', 'x']])
    assert rows.ids() == {'=a': 2, "'=a": 1}
