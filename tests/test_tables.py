"Tables and exports as they are handed out in public: the right label for every photo, or a sentence that says what to choose."
import json
import os
from collections import Counter

import pytest
from PIL import Image

from resnet_fastai.data import DataError, LabelMap, split_photos
from resnet_fastai.practice.exports import from_export
from resnet_fastai.practice.tables import from_csv


def photo(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 6), (len(path.name), 9, 9)).save(path, 'JPEG')


def made(folder, names, text='', file='labels.csv', encoding='utf-8'):
    "A folder of photos and a file beside them"
    for n in names: photo(folder/n)
    (folder/file).write_bytes(text.encode(encoding))
    return folder/file


def labels_of(paths):
    "{name of a photo: its label}, of all splits; None where it has none"
    labels, photos = LabelMap(*paths[1:]), split_photos(paths.data_path)
    return {p.name: labels.labels.get(labels.find_id(p)) for s in photos for p in photos[s]}


def splits_of(paths): return {s: sorted(p.name for p in photos) for s, photos in split_photos(paths.data_path).items()}


names = [f'{i}.jpg' for i in range(1, 7)]
animals = dict(zip(names, ['cat', 'dog', 'cat', 'dog', 'cat', 'dog']))


def lines(header, *rows): return '\n'.join([header, *(','.join(map(str, r)) for r in rows)]) + '\n'


def sports():
    where = ['train', 'train', 'train', 'train', 'valid', 'test']
    return lines('class id,filepaths,labels,card type,data set', *((int(animals[n] == 'dog'), n, animals[n], 'lawn', w) for n, w in zip(names, where)))


forms = { # what it is: (the CSV, arguments)
    'fastai: fname,label,is_valid': (lines('fname,label,is_valid', *((n, animals[n], n in names[:2]) for n in names)), {}),
    'TensorFlow object detection, a row a box': (lines('filename,width,height,class,xmin,ymin,xmax,ymax', *(
        (n, 640, 480, animals[n], i, 2, 30, 40) for n in names for i in (1, 5))), {}),
    'filename,split,label': (lines('filename,split,label', *((n, 'val' if n in names[:2] else 'train', animals[n]) for n in names)), {}),
    '100 sports: class id,filepaths,labels,card type,data set': (sports(), {}),
    'GTSRB: …,ClassId,Path': (lines('Width,Height,Roi.X1,Roi.Y1,Roi.X2,Roi.Y2,ClassId,Path', *((27, 26, 5, 5, 22, 20, animals[n], n) for n in names)), {}),
    'dog breeds: id,breed': (lines('id,breed', *((n[0], animals[n]) for n in names)), dict(suffix='.jpg')),
    'cassava: image_id,label': (lines('image_id,label', *((n, animals[n]) for n in names)), {}),
    'HAM10000: lesion_id,image_id,dx,…': (lines('lesion_id,image_id,dx,dx_type,age,sex', *(
        (f'HAM_{i}', n[0], animals[n], 'histo', 60 + i, 'f') for i, n in enumerate(names))), dict(label_col='dx', suffix='.jpg')),
    "pandas' index in front": (lines(',filename,label', *((i, n, animals[n]) for i, n in enumerate(names))), {}),
    'Label Studio: image,id,choice,…': (lines('image,id,choice,annotator,annotation_id,created_at,lead_time', *(
        (n, i, animals[n], 1, i + 7, '2024-01-01', 1.5 + i) for i, n in enumerate(names))), {}),
    'a spreadsheet: sep=;': ('sep=;\r\n' + lines('file;category;note', *((f'{n};{animals[n]};"a, b"',) for n in names)), {}),
    'semicolons alone': (lines('image;target', *((f'{n};{animals[n]}',) for n in names)), {}),
    'tabs': (lines('image\tclass\tconfidence', *((f'{n}\t{animals[n]}\t.9',) for n in names)), {})}


@pytest.mark.parametrize('form', forms)
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
def test_public_tables_get_their_labels(tmp_path, form, encoding):
    text, more = forms[form]
    csv = made(tmp_path/'src', names, text, encoding=encoding)
    paths = from_csv(csv, tmp_path/'dest', **more)
    assert labels_of(paths) == animals
    assert json.loads(paths.label_encoding.read_text()) == {'cat': 0, 'dog': 1}


def test_split_columns_are_used(tmp_path, capsys):
    assert splits_of(from_csv(made(tmp_path/'a', names, sports()), tmp_path/'da')) == dict(train=names[:4], val=['5.jpg'], test=['6.jpg'])
    said = capsys.readouterr().out
    assert "photos by 'filepaths', labels by 'labels', splits by 'data set'" in said
    found = splits_of(from_csv(made(tmp_path/'b', names, forms['filename,split,label'][0]), tmp_path/'db'))
    assert found == dict(train=names[2:], val=names[:2], test=[])
    assert splits_of(from_csv(made(tmp_path/'c', names, sports().replace('valid', 'train')), tmp_path/'dc'))['test'] == ['6.jpg']     # val is drawn


def test_test_rows_may_lack_a_label(tmp_path, capsys):
    text = lines('fname,split,label', *((n, s, l) for n, s, l in zip(names, ['train', 'train', 'val', 'val', 'test', 'test'], ['a', 'b', 'a', 'b', '', 'zebra'])))
    paths = from_csv(made(tmp_path/'src', names, text), tmp_path/'dest')
    assert labels_of(paths) == {'1.jpg': 'a', '2.jpg': 'b', '3.jpg': 'a', '4.jpg': 'b', '5.jpg': None, '6.jpg': None}
    assert '1 test photos stay without a label' in capsys.readouterr().out and 'zebra' not in paths.label_encoding.read_text()


unclear = { # what it is: (the CSV, what the error message says)
    'two columns that differ': (lines('fname,label,category', *((n, animals[n], i//2) for i, n in enumerate(names))), 'label, category; choose one with label_col='),
    'none called so': (lines('lesion_id,image_id,dx,dx_type,age', *((i, n, animals[n], 'histo', 60 + i) for i, n in enumerate(names))),
                       'no column called label or class; .*dx.*label_col='),
    'noisy Imagenette': (lines('path,noisy_labels_0,noisy_labels_1,noisy_labels_5,is_valid', *((n, animals[n], animals[n], 'x', i < 2) for i, n in enumerate(names))),
                         'no column called label or class'),
    'one-hot': (lines('image,MEL,NV,BCC', *((n, f'{i % 3 == 0:.1f}', f'{i % 3 == 1:.1f}', f'{i % 3 == 2:.1f}') for i, n in enumerate(names))),
                'a column for each class .MEL, NV, BCC.*label_col='),
    'attributes of faces': (lines('image_id,Bald,Smiling,Young', *((n, 1, -1, 1 - 2*(i % 2)) for i, n in enumerate(names))), 'a column for each class'),
    'plant pathology': (lines('image,labels', *zip(names, ['scab', 'rust', 'scab rust', 'healthy', 'rust', 'scab'])), "several labels at once, like 'scab rust'"),
    'PASCAL': (lines('fname,labels,is_valid', *zip(names, ['chair', 'car', 'person', 'chair person', 'car person', 'chair'], '010101')), 'several labels at once'),
    'many tags': (lines('image_name,tags', *zip(names, ['haze primary', 'clear agriculture', 'clear', 'haze water', 'clear', 'clear'])), 'several labels at once'),
    'captions': (lines('image,caption', *((f'c{i}.jpg', f'a dog number {i}') for i in range(24))), '24 different labels for 24 photos'),
    'one class': (lines('fname,label', *((n, 'cat') for n in names)), "all its photos the label 'cat'"),
    'a class for validation only': (lines('fname,label,is_valid', *zip(names, 'abcabb', '001100')), 'validation photos of c, and no training photos'),
    'two photos': (lines('left,right,label', *((n, n, animals[n]) for n in names)), 'which column names the photos; it has left, right; choose one with fn_col='),
    'two labels for a photo': (lines('fname,label', *((n, animals[n]) for n in names), ('1.jpg', 'dog')), 'names a photo twice, with different labels'),
    'no header': (lines('TRAIN,1.jpg,cat', ('TRAIN', '2.jpg', 'dog')), 'begins with a photo')}


@pytest.mark.parametrize('form', unclear)
def test_what_is_not_clear_is_refused(tmp_path, form):
    text, says = unclear[form]
    csv = made(tmp_path/'src', [*names, *(f'c{i}.jpg' for i in range(24))], text)
    with pytest.raises(DataError, match=says): from_csv(csv, tmp_path/'dest')
    assert os.listdir(tmp_path) == ['src']


def test_a_column_that_is_named_is_taken_as_it_is(tmp_path):
    csv = made(tmp_path/'src', names, unclear['plant pathology'][0])
    assert Counter(labels_of(from_csv(csv, tmp_path/'dest', label_col='labels')).values())['scab rust'] == 1


def test_no_label_loses_its_last_training_photo(tmp_path):
    text = lines('fname,label', *((f'{i}.jpg', 'rare' if i == 0 else 'often') for i in range(10)))
    csv = made(tmp_path/'src', [f'{i}.jpg' for i in range(10)], text)
    for seed in range(12): assert '0.jpg' in splits_of(from_csv(csv, tmp_path/str(seed), seed=seed, valid_pct=.5))['train']


# ── Exports of labelling tools ───────────────────────────────────────────────────────────────────────────────────────────────

def coco(extra=()):
    cats = dict(cat=3, dog=8)
    return json.dumps(dict(info={}, images=[dict(id=i + 50, file_name=n, width=8, height=6) for i, n in enumerate(names)],
                           categories=[dict(id=k, name=c) for c, k in cats.items()],
                           annotations=[dict(id=j, image_id=i + 50, category_id=cats[animals[n]], bbox=[0, 0, 1, 1])
                                        for j, (i, n) in enumerate([*enumerate(names)]*2)] + list(extra)))


def studio(address='/data/upload/1/1b2c3d4e-{}'):
    return json.dumps([dict(id=i, data=dict(image=address.format(n)), annotations=[
        dict(id=i, was_cancelled=True, result=[dict(type='choices', value=dict(choices=['wrong']))]),
        dict(id=i + 9, was_cancelled=False, result=[dict(type='choices', from_name='c', value=dict(choices=[animals[n]]))])]) for i, n in enumerate(names)])


exports = {
    'COCO': ('coco.json', coco()), 'Label Studio': ('ls.json', studio()), 'Label Studio, local files': ('ls.json', studio('/data/local-files/?d=photos%2F{}')),
    'Label Studio, in a bucket': ('ls.json', studio('s3://bucket/some/where/{}')),
    'Label Studio, JSON-MIN': ('ls.json', json.dumps([dict(image=f'/data/upload/{n}', id=i, choice=animals[n], annotator=1) for i, n in enumerate(names)])),
    'CVAT for images': ('annotations.xml', '<?xml version="1.0"?><annotations><version>1.1</version><meta/>' + ''.join(
        f'<image id="{i}" name="{n}" width="8" height="6"><tag label="{animals[n]}" source="manual"></tag></image>' for i, n in enumerate(names)) + '</annotations>'),
    'a column for each class (Roboflow, ISIC)': ('_classes.csv', lines('filename, cat, dog', *((n, int(animals[n] == 'cat'), int(animals[n] == 'dog')) for n in names))),
    'the same, 1.0 and no suffix': ('truth.csv', lines('image,cat,dog', *((n[0], f"{animals[n] == 'cat':.1f}", f"{animals[n] == 'dog':.1f}") for n in names)))}


@pytest.mark.parametrize('kind', exports)
def test_exports_get_their_labels(tmp_path, kind):
    file, text = exports[kind]
    made(tmp_path/'src', [f'photos/{n}' for n in names], text, file)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/'src').rglob('*')}
    assert labels_of(from_export(tmp_path/'src'/file, tmp_path/'a')) == animals
    assert labels_of(from_export(tmp_path/'src', tmp_path/'b')) == animals                           # the folder says it as well
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path/'src').rglob('*')}


@pytest.mark.parametrize('file,text', [('_classes.csv', 'filename,cat,dog\n{}.jpg,1,0\n{}b.jpg,0,1\n'), ('_annotations.coco.json', '')])
def test_roboflow_folders(tmp_path, file, text):
    for i, split in enumerate(('train', 'valid', 'test')):
        for n in (f'{i}.jpg', f'{i}b.jpg'): photo(tmp_path/'src'/split/n)
        whole = text.format(i, i) or json.dumps(dict(images=[dict(id=1, file_name=f'{i}.jpg'), dict(id=2, file_name=f'{i}b.jpg')], categories=[
            dict(id=0, name='animals'), dict(id=1, name='cat'), dict(id=2, name='dog')], annotations=[dict(image_id=k, category_id=k) for k in (1, 2)]))
        (tmp_path/'src'/split/file).write_text(whole)
    paths = from_export(tmp_path/'src', tmp_path/'dest')
    assert splits_of(paths) == {s: [f'{i}.jpg', f'{i}b.jpg'] for i, s in enumerate(('train', 'val', 'test'))}
    assert labels_of(paths) == {f'{i}{b}.jpg': 'dog' if b else 'cat' for i in range(3) for b in ('', 'b')}


@pytest.mark.parametrize('file,text,says', [
    ('c.json', coco([dict(id=99, image_id=50, category_id=8)]), "gives '1.jpg' the labels cat, dog; this network knows one"),
    ('c.json', coco().replace('"1.jpg"', '"../../secret.jpg"'), "names '../../secret.jpg', which is not in"),
    ('c.json', coco().replace('"category_id": 3', '"category_id": 4'), 'is not a whole export: KeyError: 4'),
    ('c.json', '{"a": 1}', 'is no export that is known'), ('c.json', '[1]', 'is no export that is known'), ('c.json', '[' * 100_000, 'is not a whole export'),
    ('c.xml', '<annotations><image', 'is not a whole export: ParseError'), ('c.csv', 'image,label\n1.jpg,cat\n', 'from_csv reads other tables')])
def test_exports_that_do_not_fit(tmp_path, file, text, says):
    photo(tmp_path/'secret.jpg')
    src = made(tmp_path/'src', names, text, file)
    with pytest.raises(DataError, match=says) as e: from_export(src, tmp_path/'dest')
    assert len(str(e.value)) < 500 and sorted(os.listdir(tmp_path)) == ['secret.jpg', 'src']
