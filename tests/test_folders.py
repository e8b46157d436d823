"Class folders that mean something else are refused with the reason; what is understood gets its labels; many names cost little."
import json
import os
import unicodedata

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from resnet_fastai.data import DataError, LabelError, LabelMap, from_folders, labelled_photos, split_photos
from resnet_fastai.engine import convert
from resnet_fastai.engine.files import _unique
from resnet_fastai.practice.prepare import check_data


def tree(root, *paths):
    for i, p in enumerate(paths):
        (root/p).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (40, 32), (i, 9, 9)).save(root/p, 'JPEG')
    return root


def labels_of(paths):
    labels, photos = LabelMap(*paths[1:]), split_photos(paths.data_path)
    return {p.relative_to(paths.data_path).as_posix(): labels.labels.get(labels.find_id(p)) for s in photos for p in photos[s]}


good = ('train/cat/1.jpg', 'train/dog/2.jpg', 'val/cat/3.jpg', 'val/dog/4.jpg')


@pytest.mark.parametrize('paths,says', [
    (('train/train/cat/1.jpg', 'train/train/dog/2.jpg', 'val/val/cat/3.jpg', 'val/val/dog/4.jpg'), 'one class folder, train/, with cat, dog in it; .*move them up'),
    (('train/images/cat/1.jpg', 'train/images/dog/2.jpg', 'val/images/cat/3.jpg'), 'one class folder, images/, with cat, dog in it'),
    (('train/cat/1.jpg', 'val/cat/3.jpg'), "all its photos the label 'cat'; at least two"),
    (('train/cat/1.jpg', 'train/dog/1.jpg', 'val/Cat/3.jpg', 'val/Dog/3.jpg'), 'no label in common .*cat, dog.*Cat, Dog'),
    ((*good, 'val/cow/5.jpg'), 'validation photos of cow, and no training photos'),
    (('train/cat/1.jpg', 'train/dog/1.jpg'), 'no class with two photos that may lie in different splits')])
def test_folders_that_mean_something_else(tmp_path, paths, says):
    tree(tmp_path/'src', *paths)
    with pytest.raises(DataError, match=says): from_folders(tmp_path/'src', tmp_path/'dest')
    assert os.listdir(tmp_path) == ['src']


def test_unknown_folders_of_test_photos_are_no_class(tmp_path, capsys):
    tree(tmp_path/'src', *good, 'test/unknown/5.jpg', 'test/cat/6.jpg', 'test/7.jpg')
    paths = from_folders(tmp_path/'src', tmp_path/'dest')
    assert labels_of(paths) == {**{p: p.split('/')[1] for p in good}, 'test/unknown/5.jpg': None, 'test/cat/6.jpg': 'cat', 'test/7.jpg': None}
    assert json.loads(paths.label_encoding.read_text()) == {'cat': 0, 'dog': 1}
    assert '1 test photos stay without a label; no training photo has theirs: unknown' in capsys.readouterr().out


def test_deeper_folders_below_the_classes_are_fine(tmp_path):
    paths = from_folders(tree(tmp_path/'src', 'train/cat/a/1.jpg', 'train/cat/b/2.jpg', 'train/dog/a/1.jpg', 'val/cat/9.jpg', 'val/dog/9.jpg'), tmp_path/'dest')
    assert set(labels_of(paths).values()) == {'cat', 'dog'} and len(labels_of(paths)) == 5


@pytest.mark.parametrize('train,val,test', [('Train', 'Valid', 'Test'), ('training', 'validation', 'testing'), ('TRAIN', 'dev', 'test')])
def test_splits_by_their_other_names(tmp_path, train, val, test):
    tree(tmp_path/'src', *(f'{s}/{c}/1.jpg' for s in (train, val, test) for c in ('cat', 'dog')))
    assert labels_of(from_folders(tmp_path/'src', tmp_path/'dest')) == {f'{s}/{c}/1.jpg': c for s in ('train', 'val', 'test') for c in ('cat', 'dog')}


def test_one_class_in_two_spellings_of_its_accent(tmp_path):
    nfc, nfd = (unicodedata.normalize(f, 'café') for f in ('NFC', 'NFD'))
    tree(tmp_path/'src', f'train/{nfc}/1.jpg', 'train/bar/2.jpg', f'val/{nfd}/3.jpg', 'val/bar/4.jpg')
    assert set(labels_of(from_folders(tmp_path/'src', tmp_path/'dest')).values()) == {nfc, 'bar'}
    tree(tmp_path/'both', f'train/{nfc}/1.jpg', f'train/{nfd}/1.jpg', 'train/bar/2.jpg', f'val/{nfd}/3.jpg')
    with pytest.raises(DataError, match='another spelling of its accents'): from_folders(tmp_path/'both', tmp_path/'no')


# ── Ids that people call equal ───────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def photos(tmp_path): return tree(tmp_path/'data', 'train/café.jpg', 'train/b.jpg', 'train/7.jpg', 'val/sub/c.jpg')


right = {'train/café.jpg': 'x', 'train/b.jpg': 'y', 'train/7.jpg': 'x', 'val/sub/c.jpg': 'y'}
nfd = lambda d: {unicodedata.normalize('NFD', k): v for k, v in d.items()}


@pytest.mark.parametrize('labels', [
    right, nfd(right), {f'./{k}': v for k, v in right.items()}, {k.replace('/', '\\'): v for k, v in right.items()}, {f'.\\{k}': v for k, v in right.items()},
    {k.replace('/', '//'): v for k, v in right.items()}, {f'/kaggle/input/set/{k}': v for k, v in right.items()},
    {'C:\\photos\\' + k.replace('/', '\\'): v for k, v in right.items()}, {'café': 'x', 'b': 'y', 7: 'x', 'c.jpg': 'y'},
    {np.str_('café.jpg'): np.str_('x'), np.str_('b'): 'y', np.int64(7): 'x', 'sub/c': 'y'}], ids=lambda d: str(next(iter(d))))
@pytest.mark.parametrize('kind', ['dict', 'table', 'file'])
def test_ids_that_people_call_equal(photos, labels, kind):
    encoding = {'x': np.int64(3), 'y': np.int32(0)}
    if kind == 'table': labels, encoding = pd.DataFrame(labels.items()), pd.DataFrame(encoding.items())
    if kind == 'file':
        (photos/'labels.json').write_text(json.dumps({str(k): v for k, v in labels.items()}))
        labels = photos/'labels.json'
    found = labelled_photos(photos, LabelMap(labels, encoding))
    assert {p.name: p.label for s in found for p in found[s]} == {'café.jpg': 'x', 'b.jpg': 'y', '7.jpg': 'x', 'c.jpg': 'y'}
    assert [type(i) for i in LabelMap(labels, encoding).encoding.values()] == [int, int]


def test_paths_and_whole_paths_of_this_machine(photos, monkeypatch):
    for labels in ({photos/k: v for k, v in right.items()}, {str(photos/k): v for k, v in right.items()}):
        assert sorted(p.label for s in ('train', 'val') for p in labelled_photos(photos, LabelMap(labels, {'x': 0, 'y': 1}))[s]) == ['x', 'x', 'y', 'y']
    monkeypatch.chdir(photos)
    assert len(labelled_photos('.', LabelMap({str(photos/k): v for k, v in right.items()}, {'x': 0, 'y': 1}))['train']) == 3


def test_files_whose_names_are_nfd(tmp_path):
    "As macOS writes them to a disk that keeps the bytes"
    root = tree(tmp_path/'data', *nfd(right))
    found = labelled_photos(root, LabelMap(right, {'x': 0, 'y': 1}))
    assert sorted(p.label for s in ('train', 'val') for p in found[s]) == ['x', 'x', 'y', 'y']


def test_two_keys_for_one_photo(photos):
    LabelMap(right | {'./train/b.jpg': 'y'}, {'x': 0, 'y': 1})                                       # they say the same
    with pytest.raises(LabelError, match=r"gives 'train/b.jpg' two labels, 'x' and 'y'"): LabelMap(right | {'train\\b.jpg': 'x'}, {'x': 0, 'y': 1})


@pytest.mark.parametrize('key,label', [(1.5, 'x'), (None, 'x'), (True, 'x'), ((1,), 'x'), ('a', 1.5), ('a', None), ('a', ['x']), ('a', True)])
def test_what_is_no_name_is_refused(key, label):
    with pytest.raises(LabelError): LabelMap({key: label}, {'x': 0})


def test_whole_numbers_as_labels(photos):
    "{'b.jpg': 3} with the encoding {'3': 3}, or {3: 3}"
    for encoding in ({'3': 3, '5': 5}, {3: 3, 5: np.int64(5)}):
        found = labelled_photos(photos, LabelMap(dict(zip(right, (3, 5, np.int64(3), 5))), encoding))
        assert sorted(p.label for s in ('train', 'val') for p in found[s]) == ['3', '3', '5', '5']


def test_labels_that_differ_in_case_space_or_accents_are_reported(photos, capsys):
    labels = {'train/café': 'Cat', 'b': 'cat ', '7': 'dog', 'c': unicodedata.normalize('NFD', 'é')}
    found = check_data(photos, labels, {'Cat': 0, 'cat ': 1, 'dog': 2, 'é': 3})
    assert found[['problem', 'detail']].values.tolist() == [['labels alike', "'Cat' and 'cat ' differ only in case or space"]]


# ── Many names, and long ones ────────────────────────────────────────────────────────────────────────────────────────────────

class Counted(str):
    "A text that counts how often it is compared"
    compared = 0
    def __eq__(self, other):
        Counted.compared += 1
        return str.__eq__(self, other)
    __hash__ = str.__hash__


@pytest.mark.parametrize('n', [1000, 8000])
def test_a_repeated_key_among_many_costs_little(n):
    "A few comparisons for each key, not one with every other"
    Counted.compared = 0
    pairs = [(Counted(f'photo_{i}'), 'x') for i in [*range(n), n - 1]]
    with pytest.raises(LabelError, match=f"repeats the key 'photo_{n-1}'"): _unique(pairs)
    assert Counted.compared < 5*n


@pytest.mark.parametrize('n', [500, 4000])
def test_a_name_in_two_splits_among_many_costs_little(tmp_path, monkeypatch, n):
    monkeypatch.setattr(convert, 'link_photo', lambda src, dest: None)
    rows = [convert.Row(Counted(f'cat/{i}.jpg'), 'nowhere', 'ab'[i % 2], s) for s in ('train', 'val') for i in range(n)]
    Counted.compared = 0
    paths = convert.lay_out(rows, 'many', tmp_path/'dest')
    assert len(json.loads(paths.label_path.read_text())) == 2*n and Counted.compared < 10*n


def test_messages_quote_at_most_80_characters(photos):
    "A COCO file, or anything else large, as labels"
    coco = dict(images=[dict(id=i, file_name=f'{i}.jpg') for i in range(2000)], annotations=[dict(image_id=i, category_id=0) for i in range(2000)],
                categories=[dict(id=0, name='x')])
    (photos/'coco.json').write_text(json.dumps(coco))
    long = 'x'*100_000
    for labels, encoding, says in [(photos/'coco.json', {'x': 0}, 'from_export'), (coco, {'x': 0}, 'from_export'), ({'b': long}, {'x': 0}, 'has no index'),
                                   ({long: 1.5}, {'x': 0}, 'not with a text'), ({'b': [long]}, {'x': 0}, 'not with a text'), ({'b': 'x'}, {'x': long}, 'whole number'),
                                   ({'b': 'x'}, {long: -1}, 'whole number'), ({'b': 'x'}, {long: 1, 'x': 1}, 'same index')]:
        with pytest.raises(LabelError, match=says) as e: LabelMap(labels, encoding)
        assert len(str(e.value)) < 600 and '\n' not in str(e.value)
    with pytest.raises(LabelError) as e: labelled_photos(photos, LabelMap({long: 'x'}, {'x': 0}))
    assert len(str(e.value)) < 600
    (photos/'list.json').write_text(json.dumps([dict(data=dict(image='a.jpg'), annotations=[])]))
    with pytest.raises(LabelError, match='Label Studio.*from_export'): LabelMap(photos/'list.json', {'x': 0})
    (photos/'twice.json').write_text(f'{{"{long}": "x", "{long}": "x"}}')
    with pytest.raises(LabelError, match='repeats the key') as e: LabelMap(photos/'twice.json', {'x': 0})
    assert len(str(e.value)) < 600
