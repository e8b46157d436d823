"ImageNet, CSVs and Imagenette as people have them, built here in small: every label, every complaint, and nothing touched."
import json
import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from resnet_fastai.engine import convert
from resnet_fastai.practice import sources
from resnet_fastai.data import LabelMap, resnet_dls
from resnet_fastai.engine.files import DataError, LabelError
from resnet_fastai.engine.layout import split_photos
from resnet_fastai.practice.sources import from_csv, from_imagenet, imagenette

# wnid: (words, label, official number, place among the sorted wnids)
classes = {
    'n01440764': ('tench, Tinca tinca', 'tench, Tinca tinca', 4, 0),
    'n01751748': ('sea snake', 'sea snake', 3, 1),
    'n02012849': ('crane', 'crane (n02012849)', 6, 2),
    'n02119789': ('kit fox, Vulpes macrotis', 'kit fox, Vulpes macrotis', 1, 3),
    'n03126707': ('crane', 'crane (n03126707)', 2, 4),
    'n03445777': ('golf ball', 'golf ball', 5, 5)}
train = {'n01440764': (18, 190, 3), 'n01751748': (7, 10026), 'n02012849': (1, 2), 'n03126707': (1, 2), 'n03445777': (5,)}
val = {1: 'n01751748', 2: 'n03126707', 3: 'n02012849', 4: 'n01440764', 5: 'n02119789'}
cls_loc = 'ILSVRC/Data/CLS-LOC'


def photo(path, colour=(90, 120, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (40, 30), colour).save(path, 'JPEG')


def photos(train_folder, val_folder, sort_val=False):
    for wnid, numbers in train.items():
        for n in numbers: photo(train_folder/wnid/f'{wnid}_{n}.JPEG', (n % 256, 10, 200))
    for i, wnid in val.items(): photo(val_folder/(wnid if sort_val else '.')/f'ILSVRC2012_val_{i:08}.JPEG', (10, i*20, 50))


def kaggle(root):
    photos(root/cls_loc/'train', root/cls_loc/'val')
    photo(root/cls_loc/'test/ILSVRC2012_test_00000001.JPEG')
    (root/'LOC_synset_mapping.txt').write_text(''.join(f'{w} {c[0]}\n' for w, c in classes.items()))
    rows = [f'ILSVRC2012_val_{i:08},{val[i]} 1 2 30 40 {val[i]} 5 6 7 8 \n' for i in (4, 2, 5, 1, 3)]
    (root/'LOC_val_solution.csv').write_text('ImageId,PredictionString\n' + ''.join(rows))
    return root


def devkit(root):
    data = root/'ILSVRC2012_devkit_t12/data'
    data.mkdir(parents=True)
    fields = 'ILSVRC2012_ID WNID words gloss num_children children wordnet_height num_train_images'.split()
    rows = [(c[2], w, c[0], 'a thing', 0, np.zeros((1, 0)), 0, 1300) for w, c in classes.items()]
    rows += [(1001, 'n01503061', 'bird', 'feathers', 2, np.array([[6, 1002]]), 3, 0),
             (1002, 'n00015388', 'animal', 'it lives', 1, np.array([[1]]), 5, 0)]
    savemat(data/'meta.mat', {'synsets': np.array(rows, [(f, 'O') for f in fields])[:, None]})
    (data/'ILSVRC2012_validation_ground_truth.txt').write_text(''.join(f'{classes[val[i]][2]}\n' for i in sorted(val)))
    return root


def official(root):
    photos(root/'ILSVRC2012_img_train', root/'ILSVRC2012_img_val')
    return devkit(root)


def bytes_below(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob('*')) if p.is_file()}


def listed(paths):
    "{path below dest: (label, index)} of the training and validation photos"
    labels, found = LabelMap(*paths[1:]), split_photos(paths.data_path)
    labels.match([p for s in ('train', 'val') for p in found[s]])
    return {p.relative_to(paths.data_path).as_posix(): (labels(p), labels.encoding[labels(p)]) for s in ('train', 'val') for p in found[s]}


def expected(column, shift, sort_val=False):
    rows = {f'train/{w}/{w}_{n}.JPEG': w for w, ns in train.items() for n in ns}
    rows |= {'val/' + (f'{w}/' if sort_val else '') + f'ILSVRC2012_val_{i:08}.JPEG': w for i, w in val.items()}
    return {path: (classes[w][1], classes[w][column] - shift) for path, w in rows.items()}


by_wnid, by_number = expected(3, 0), expected(2, 1)


@pytest.mark.paper('4.1-data')
@pytest.mark.parametrize('src', ['.', 'ILSVRC', 'ILSVRC/Data', cls_loc])
def test_kaggle(tmp_path, src, monkeypatch):
    before = bytes_below(kaggle(tmp_path/'src'))
    paths = from_imagenet(tmp_path/'src'/src, tmp_path/'dest')
    assert listed(paths) == by_wnid
    assert len(LabelMap(*paths[1:])) == 6                                # the kit fox has no photo to train on and keeps its number
    assert 'n01440764_18' in json.loads(paths.label_path.read_text()) and len(split_photos(paths.data_path)['test']) == 1
    assert bytes_below(tmp_path/'src') == before


def test_a_relative_src(tmp_path, monkeypatch):
    monkeypatch.chdir(kaggle(tmp_path/'src')/cls_loc)
    paths = from_imagenet('.', '../../../../dest')
    monkeypatch.chdir(tmp_path)
    assert listed(type(paths)(*(tmp_path/'dest'/n for n in ('', 'labels.json', 'encoding.json')))) == by_wnid


@pytest.mark.paper('4.1-data')
@pytest.mark.parametrize('order, rows', [('official', by_number), ('wnid', by_wnid)])
def test_official_archives(tmp_path, order, rows):
    before = bytes_below(official(tmp_path/'src'))
    assert listed(from_imagenet(tmp_path/'src', tmp_path/'dest', order=order)) == rows
    assert bytes_below(tmp_path/'src') == before


def test_validation_photos_in_synset_folders(tmp_path):
    photos(tmp_path/'src/imagenet/train', tmp_path/'src/imagenet/val', sort_val=True)
    (tmp_path/'words.txt').write_text(''.join(f'{w} {c[0]}\r\n' for w, c in classes.items()))
    paths = from_imagenet(tmp_path/'src', tmp_path/'dest', synsets=tmp_path/'words.txt')
    assert listed(paths) == expected(3, 0, sort_val=True)


def test_named_files_win(tmp_path):
    kaggle(tmp_path/'src'), devkit(tmp_path/'elsewhere')
    data = tmp_path/'elsewhere/ILSVRC2012_devkit_t12/data'
    numbers = data/'ILSVRC2012_validation_ground_truth.txt'
    assert listed(from_imagenet(tmp_path/'src', tmp_path/'a', data/'meta.mat', numbers)) == by_number
    assert listed(from_imagenet(tmp_path/'src', tmp_path/'b', data/'meta.mat')) == by_number
    with pytest.raises(DataError, match='name meta.mat with synsets='): from_imagenet(tmp_path/'src', tmp_path/'c', ground_truth=numbers)
    assert not (tmp_path/'c').exists()


def test_splits_are_one_link_each(tmp_path):
    paths = from_imagenet(kaggle(tmp_path/'src'), tmp_path/'dest')
    assert all((paths.data_path/s).is_symlink() for s in ('train', 'val', 'test'))


def test_without_links_to_folders(tmp_path, monkeypatch):
    def refuse(*args, **kwargs): raise OSError('a required privilege is not held by the client')
    monkeypatch.setattr(os, 'symlink', refuse)
    before = bytes_below(kaggle(tmp_path/'src'))
    paths = from_imagenet(tmp_path/'src', tmp_path/'dest')
    assert not any(p.is_symlink() for p in (tmp_path/'dest').rglob('*'))
    assert listed(paths) == by_wnid and bytes_below(tmp_path/'src') == before


def solution(change):
    def apply(src): (src/'LOC_val_solution.csv').write_text(change((src/'LOC_val_solution.csv').read_text()))
    return apply


def mapping(change):
    def apply(src): (src/'LOC_synset_mapping.txt').write_text(change((src/'LOC_synset_mapping.txt').read_text()))
    return apply


def empty_train(src):
    for p in (src/cls_loc/'train').rglob('*.JPEG'): p.unlink()
    (src/cls_loc/'train/n01440764.tar').write_bytes(b'')


@pytest.mark.parametrize('change, error, says', [
    (lambda src: (src/'LOC_val_solution.csv').unlink(), DataError, r'val is flat, and there is no LOC_val_solution.csv or .*ground_truth='),
    (lambda src: (src/'LOC_synset_mapping.txt').unlink(), DataError,
     r'no list of the classes \(meta.mat, LOC_synset_mapping.txt.*synsets='),
    (lambda src: (src/cls_loc/'val/ILSVRC2012_val_00000003.JPEG').unlink(), DataError,
     r'val has no photo ILSVRC2012_val_00000003 \(4 photos; .*LOC_val_solution.csv has 5\)'),
    (lambda src: photo(src/cls_loc/'val/ILSVRC2012_val_00000006.JPEG'), LabelError,
     r'ILSVRC2012_val_00000006.JPEG is not in .*LOC_val_solution.csv \(1 of 6 photos; the file has 5\)'),
    (lambda src: photo(src/cls_loc/'val/ILSVRC2012_val_00000005.png'), LabelError, r'has the name of another photo'),
    (lambda src: photo(src/cls_loc/'train/n09999999/n09999999_1.JPEG'), LabelError, r'n09999999 is no class in .*LOC_synset_mapping.txt'),
    (lambda src: photo(src/cls_loc/'train/n01440764_5.JPEG'), LabelError, r'n01440764_5.JPEG lies in no synset folder'),
    (lambda src: photo(src/cls_loc/'train/n01751748/n01440764_18.jpg'), LabelError,
     r"has the name of another photo, 'n01440764_18'"),
    (lambda src: photo(src/cls_loc/'val/n01440764/ILSVRC2012_val_00000009.JPEG'), LabelError,
     r'val_00000001.JPEG lies in no synset folder'),
    (empty_train, DataError, r'train holds no photos, but archives; unpack .*n01440764.tar'),
    (solution(lambda t: t.replace('n03126707', 'n03126708')), LabelError,
     r"LOC_val_solution.csv gives ILSVRC2012_val_00000002 the class 'n03126708', .*\(1 of 5 photos\)"),
    (solution(lambda t: t.replace('n03126707 1 2 30 40 n03126707 5 6 7 8', '')), LabelError, r"ILSVRC2012_val_00000002 the class ''"),
    (solution(lambda t: t.replace('ImageId', 'id')), DataError, r'LOC_val_solution.csv has the columns id, PredictionString'),
    (solution(lambda t: ''), DataError, r'LOC_val_solution.csv has no rows'),
    (mapping(lambda t: t + 'n03445777 golf ball\n'), LabelError, r'LOC_synset_mapping.txt has the wnid n03445777 twice'),
    (mapping(lambda t: t + 'n03445778\n'), LabelError, r"LOC_synset_mapping.txt has the line 'n03445778'"),
    (mapping(lambda t: ' \n'), LabelError, r'LOC_synset_mapping.txt lists no classes'),
    (lambda src: (src/'LOC_synset_mapping.txt').write_bytes(b'n01440764 \xff\xfe'), DataError,
     r'LOC_synset_mapping.txt is not a text in UTF-8'),
    (lambda src: (src/cls_loc/'val').rename(src/'elsewhere'), DataError, r'has no train/ with a val/ beside it')])
def test_imagenet_complains(tmp_path, change, error, says):
    change(kaggle(tmp_path/'src'))
    before = bytes_below(tmp_path/'src')
    with pytest.raises(error, match=says): from_imagenet(tmp_path/'src', tmp_path/'dest')
    assert os.listdir(tmp_path) == ['src'] and bytes_below(tmp_path/'src') == before


def numbers(text): return lambda kit: (kit/'ILSVRC2012_validation_ground_truth.txt').write_text(text)


no_meta = r"meta.mat is not the meta.mat of ILSVRC2012's development kit"


@pytest.mark.parametrize('change, says', [
    (numbers('3\n2\n6\n4\n'), r'00000005.JPEG is not in .*\(1 of 5 photos; the file has 4\)'),
    (numbers('3\n2\n6\n4\n1\n1\n'), r'has no photo ILSVRC2012_val_00000006 \(5 photos; .*truth.txt has 6\)'),
    (numbers('3\n2\n1001\n4\n1\n'), r"line 3 of .*truth.txt is '1001', which is not the number of a class"),
    (numbers('ILSVRC2012_val_00000001.JPEG 65\n'), r'line 1 of .*truth.txt is .*00000001.JPEG 65'),
    (lambda kit: (kit/'meta.mat').write_bytes((kit/'meta.mat').read_bytes()[:300]), no_meta),
    (lambda kit: (kit/'meta.mat').write_bytes(b'n01440764 tench'), no_meta),
    (lambda kit: savemat(kit/'meta.mat', {'classes': np.arange(3)}), no_meta)])
def test_devkit_complains(tmp_path, change, says):
    change(official(tmp_path/'src')/'ILSVRC2012_devkit_t12/data')
    with pytest.raises(DataError, match=says): from_imagenet(tmp_path/'src', tmp_path/'dest')
    assert os.listdir(tmp_path) == ['src']


def test_a_lost_photo_shifts_no_label(tmp_path):
    "The number in its name places a photo in the ground truth, not its place in the listing"
    val = official(tmp_path/'src')/'ILSVRC2012_img_val'
    (val/'ILSVRC2012_val_00000001.JPEG').rename(val/'ILSVRC2012_val_00000006.JPEG')
    with pytest.raises(LabelError, match='00000006.JPEG is not in'): from_imagenet(tmp_path/'src', tmp_path/'dest')


@pytest.mark.parametrize('call, says', [
    (lambda tmp: from_imagenet(tmp/'src', tmp/'dest', order='caffe'), "order is 'caffe'"),
    (lambda tmp: from_imagenet(tmp/'nowhere', tmp/'dest'), 'is not a folder'),
    (lambda tmp: from_imagenet(tmp/'src', tmp/'dest', synsets=tmp/'none.mat'), 'cannot be read: No such file')])
def test_imagenet_arguments(tmp_path, call, says):
    kaggle(tmp_path/'src')
    with pytest.raises(DataError, match=says): call(tmp_path)
    assert not (tmp_path/'dest').exists()


def test_deleting_the_new_folder_deletes_no_photo(tmp_path):
    before = bytes_below(official(tmp_path/'src'))
    shutil.rmtree(from_imagenet(tmp_path/'src', tmp_path/'dest').data_path)
    assert bytes_below(tmp_path/'src') == before


def test_the_development_kits_classes_leave_inner_nodes_out(tmp_path):
    found = sources.read_synsets(official(tmp_path/'src')/'ILSVRC2012_devkit_t12/data/meta.mat')
    assert found.number.tolist() == [1, 2, 3, 4, 5, 6]
    assert found.words.to_dict() == {w: c[0] for w, c in classes.items()} and found.number.to_dict() == {w: c[2] for w, c in classes.items()}


def interrupted(*args): raise KeyboardInterrupt


def test_an_interrupted_conversion_deletes_links_only(tmp_path, monkeypatch):
    before = bytes_below(kaggle(tmp_path/'src'))
    monkeypatch.setattr(sources, '_finish', interrupted)
    with pytest.raises(KeyboardInterrupt): from_imagenet(tmp_path/'src', tmp_path/'dest')
    assert os.listdir(tmp_path) == ['src'] and bytes_below(tmp_path/'src') == before


def test_nothing_is_overwritten(tmp_path):
    kaggle(tmp_path/'src')
    (tmp_path/'dest').mkdir()
    (tmp_path/'dest/mine.txt').write_text('mine')
    (tmp_path/'src/labels.csv').write_text('fname,label\na.jpg,x\nb.jpg,y\nc.jpg,x\nd.jpg,y\n')
    for n in 'abcd': photo(tmp_path/f'src/{n}.jpg')
    for convert in (from_imagenet, lambda src, dest: from_csv(src/'labels.csv', dest), lambda src, dest: imagenette(dest)):
        with pytest.raises(DataError, match='exists already and is not touched'): convert(tmp_path/'src', tmp_path/'dest')
    assert bytes_below(tmp_path/'dest') == {'mine.txt': b'mine'} and sorted(os.listdir(tmp_path)) == ['dest', 'src']


def test_imagenet_is_quick(tmp_path):
    "20,000 photos in 100 folders: less of the processor's time than to touch a file for each"
    wnids = [f'n{i:08}' for i in range(100)]
    for w in wnids:
        for split in ('train', 'val'): (tmp_path/'src'/split/w).mkdir(parents=True)
        for i in range(200): (tmp_path/f'src/train/{w}/{w}_{i}.JPEG').touch()
        (tmp_path/f'src/val/{w}/{w}_v.JPEG').touch()
    (tmp_path/'src/synset_words.txt').write_text(''.join(f'{w} thing {w}\n' for w in wnids))
    start = time.process_time()
    found = [p for _, _, names in os.walk(tmp_path/'src') for p in names]
    for i in range(len(found)): (tmp_path/f'touched{i}').touch()
    plain, start = time.process_time() - start, time.process_time()
    from_imagenet(tmp_path/'src', tmp_path/'dest')
    assert time.process_time() - start < plain                            # a tenth of it, as measured


def csv_tree(root, text, names=('a/1.jpg', 'a/2.jpg', 'b/1.jpg', 'b/3.jpg', 'c.jpg')):
    for i, n in enumerate(names): photo(root/n, (i*30, 0, 0))
    (root/'labels.csv').write_text(text, encoding='utf-8')
    return root/'labels.csv'


with_valid = 'fname,label,is_valid\na/1.jpg,cat,False\na/2.jpg,dog,True\nb/1.jpg,dog,False\nb/3.jpg,cat,True\nc.jpg,"cow, brown",False\n'
cat, cow, dog = ('cat', 0), ('cow, brown', 1), ('dog', 2)


@pytest.mark.parametrize('text', [
    with_valid, '\ufeff' + with_valid, with_valid.replace('\n', '\r\n'), with_valid.replace('False', '0').replace('True', '1'),
    with_valid.replace('False', '').replace('True', 'valid').replace(',\n', ',train\n'), with_valid.replace('fname,label', 'name,breed'),
    with_valid.replace('a/', 'a\\').replace('cat', ' cat ')])
def test_csv_with_is_valid(tmp_path, text):
    csv = csv_tree(tmp_path/'src', text)
    before = bytes_below(tmp_path/'src')
    paths = from_csv(csv, tmp_path/'dest')
    assert listed(paths) == {'train/a/1.jpg': cat, 'train/b/1.jpg': dog, 'train/c.jpg': cow, 'val/a/2.jpg': dog, 'val/b/3.jpg': cat}
    assert set(json.loads(paths.label_path.read_text())) == {'a/1.jpg', 'a/2.jpg', 'b/1.jpg', 'b/3.jpg', 'c.jpg'}
    assert bytes_below(tmp_path/'src') == before
    assert all((tmp_path/'dest/train'/n).read_bytes() == before[n] for n in ('a/1.jpg', 'b/1.jpg', 'c.jpg'))


def test_csv_columns_and_folder(tmp_path):
    text = 'id,breed,when,val\n1,dog,noon,0\n2,cat,noon,1\n3,cat,dawn,0\n'
    (tmp_path/'tables').mkdir()
    csv = csv_tree(tmp_path/'src', '', ('1.jpg', '2.jpg', '3.jpg')).rename(tmp_path/'tables/l.csv')
    csv.write_text(text)
    rows = listed(from_csv(csv, tmp_path/'a', folder=tmp_path/'src', valid_col='val', suffix='.jpg'))
    assert rows == {'train/1.jpg': ('dog', 1), 'train/3.jpg': ('cat', 0), 'val/2.jpg': ('cat', 0)}
    rows = listed(from_csv(csv, tmp_path/'b', tmp_path/'src', label_col='when', fn_col=0, valid_col=3, suffix='.jpg'))
    assert rows == {'train/1.jpg': ('noon', 1), 'train/3.jpg': ('dawn', 0), 'val/2.jpg': ('noon', 1)}


def test_csv_labels_are_text(tmp_path):
    names = [f'{i}.jpg' for i in range(5)]
    csv = csv_tree(tmp_path/'src', 'fname,label,is_valid\n0.jpg,10,0\n1.jpg,9,0\n2.jpg,007,0\n3.jpg,10,1\n4.jpg,9,1\n', names)
    assert json.loads(from_csv(csv, tmp_path/'a').label_encoding.read_text()) == {'007': 0, '9': 1, '10': 2}
    csv.write_text('fname,label,is_valid\n0.jpg,NA,0\n1.jpg,nan,0\n2.jpg,None,0\n3.jpg,nan,1\n')
    assert json.loads(from_csv(csv, tmp_path/'b').label_encoding.read_text()) == {'NA': 0, 'None': 1, 'nan': 2}


def test_csv_draws_by_seed(tmp_path):
    names = [f'{i:02}.jpg' for i in range(20)]
    csv = csv_tree(tmp_path/'src', 'fname,label\n' + ''.join(f'{n},{"xy"[i % 2]}\n' for i, n in enumerate(names)), names)
    drawn = [{p.name for p in split_photos(from_csv(csv, tmp_path/str(k), seed=s).data_path)['val']} for k, s in enumerate((42, 42, 1))]
    assert drawn[0] == drawn[1] != drawn[2] and {len(d) for d in drawn} == {4}
    rows = listed(from_csv(csv, tmp_path/'half', valid_pct=.5))
    assert {p.split('/')[1]: label for p, label in rows.items()} == {n: (('x', 0), ('y', 1))[i % 2] for i, n in enumerate(names)}
    assert sum(p.startswith('val/') for p in rows) == 10


def test_csv_names_that_begin_with_a_split(tmp_path):
    "fastai's own CSVs name photos like train/x.jpg; an id must not be taken for another photo's"
    text = 'fname,label,is_valid\n1.jpg,top,0\ntrain/1.jpg,below,0\nval/1.jpg,top,1\n'
    csv = csv_tree(tmp_path/'src', text, ('1.jpg', 'train/1.jpg', 'val/1.jpg'))
    rows = listed(from_csv(csv, tmp_path/'dest'))
    assert rows == {'train/1.jpg': ('top', 1), 'train/train/1.jpg': ('below', 0), 'val/val/1.jpg': ('top', 1)}


@pytest.mark.parametrize('text, says', [
    ('fname,label\na/1.jpg,x\na/9.jpg,y\nz.jpg,y\n', r'names photos that are not in .* \(2 of 3; first: a/9.jpg\)'),
    ('fname,label\na/1.jpg,x\na/2.jpg,\n', r'has no label for a photo \(1 of 2 rows; first: row 3\)'),
    ('\nfname,label\n\n\na/1.jpg,x\n,\na/2.jpg,\n\n', r'has no label for a photo \(1 of 2 rows; first: row 7\)'),
    ('\n\nfname;label\na/1.jpg;x\na/2.jpg;\n', r'has no label for a photo \(1 of 2 rows; first: row 5\)'),
    ('sep=,\nfname,label\n\na/1.jpg,x\na/2.jpg,\n', r'has no label for a photo \(1 of 2 rows; first: row 5\)'),
    ('fname,label\na/1.jpg,x\na/2.jpg,  \n', r'has no label for a photo'),
    ('fname,label\na/1.jpg,x\na/1.jpg,y\n', r'names a photo twice, with different labels \(1 of 2 rows; first: row 3\)'),
    ('fname,label\na/1.jpg,x\n./a/1.jpg,y\n', r'names a photo twice'),
    ('fname,label\na/1.jpg,x\n../secret.jpg,y\n', r'names photos outside .*first: row 3'),
    ('fname,label\na/1.jpg,x\na/../../secret.jpg,y\n', r'names photos outside'),
    ('fname,label\na/1.jpg,x\n..\\secret.jpg,y\n', r'names photos outside'),
    ('fname,label\na/1.jpg,x\n/etc/secret.jpg,y\n', r'names photos outside'),
    ('fname,label\na/1.jpg,x\n,y\n', r'has no name for a photo'),
    ('fname,label\na/1,x\na/2,y\n', r"do not count as photos .*suffix='.jpg'"),
    ('fname,label\na/1.jpg,x\nlabels.csv,y\n', r'do not count as photos'),
    ('fname,label,is_valid\na/1.jpg,x,False\na/2.jpg,y,perhaps\n', r'neither for training nor for validation \(1 of 2 rows; .* row 3\)'),
    ('fname,label,is_valid\na/1.jpg,x,True\na/2.jpg,y,True\n', r'all its photos in one split \(2\)'),
    ('fname,label\na/1.jpg,x\n', r'names one photo'),
    ('fname,label\n', r'has no rows below its header'),
    ('', r'has no rows below its header'),
    ('fname\na/1.jpg\n', r"has the column 'fname' only"),
    ('fname,label,label\na/1.jpg,x,y\n', r'two columns of one name'),
    ('a/1.jpg,x\na/2.jpg,y\n', r'begins with a photo; put the line fname,label on top'),
    ('fname,label\na/1.jpg,x, and y\n', r"2 columns, but 3 fields in the row 'a/1.jpg,x, and y'")])
def test_csv_complains(tmp_path, text, says):
    csv = csv_tree(tmp_path/'src', text)
    photo(tmp_path/'src/../secret.jpg')
    before = bytes_below(tmp_path)
    with pytest.raises(DataError, match=says): from_csv(csv, tmp_path/'dest')
    assert sorted(os.listdir(tmp_path)) == ['secret.jpg', 'src'] and bytes_below(tmp_path) == before


@pytest.mark.parametrize('kwargs, says', [
    (dict(label_col='breed'), "no column 'breed'; it has fname, label, is_valid"), (dict(valid_col='test'), "no column 'test'"),
    (dict(fn_col=7), 'no column 7'), (dict(folder='nowhere'), r'not in nowhere \(5 of 5; first: a/1.jpg\)')])
def test_csv_arguments(tmp_path, kwargs, says):
    with pytest.raises(DataError, match=says): from_csv(csv_tree(tmp_path/'src', with_valid), tmp_path/'dest', **kwargs)
    assert os.listdir(tmp_path) == ['src']


def test_csv_that_is_none(tmp_path):
    with pytest.raises(DataError, match='none.csv cannot be read: No such file'): from_csv(tmp_path/'none.csv', tmp_path/'dest')
    (tmp_path/'l.csv').write_bytes(b'fname,label\n\xff\xfe,x\n')
    with pytest.raises(DataError, match='l.csv is not a CSV in UTF-8'): from_csv(tmp_path/'l.csv', tmp_path/'dest')
    for pct in (0, 1, 20):
        with pytest.raises(DataError, match=f'valid_pct is {pct}'):
            from_csv(csv_tree(tmp_path/'src', 'fname,label\na/1.jpg,x\na/2.jpg,y\n'), tmp_path/'dest', valid_pct=pct)
    assert not (tmp_path/'dest').exists()


def test_an_interrupted_csv_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, '_finish', interrupted)
    with pytest.raises(KeyboardInterrupt): from_csv(csv_tree(tmp_path/'src', with_valid), tmp_path/'dest')
    assert os.listdir(tmp_path) == ['src'] and len(bytes_below(tmp_path/'src')) == 6


ten = {'n01440764': ('tench', 0), 'n02102040': ('English springer', 217), 'n02979186': ('cassette player', 482),
       'n03000684': ('chain saw', 491), 'n03028079': ('church', 497), 'n03394916': ('French horn', 566),
       'n03417042': ('garbage truck', 569), 'n03425413': ('gas pump', 571), 'n03445777': ('golf ball', 574),
       'n03888257': ('parachute', 701)}


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    "fastai's folder of Imagenette, and the URLs that were asked for"
    for w in ten:
        for path in (f'train/{w}/{w}_10', f'train/{w}/ILSVRC2012_val_00000{ten[w][1]:03}', f'val/{w}/{w}_9'):
            photo(tmp_path/'cache/imagenette2'/f'{path}.JPEG')
    (tmp_path/'cache/imagenette2/noisy_imagenette.csv').write_text('path,noisy_labels_0,is_valid\n')
    urls = []
    monkeypatch.setattr(sources, 'untar_data', lambda url: urls.append(url) or tmp_path/'cache/imagenette2')
    return urls


@pytest.mark.parametrize('size, name', [(160, 'imagenette2-160.tgz'), (320, 'imagenette2-320.tgz'), (None, 'imagenette2.tgz')])
def test_imagenette(tmp_path, fetched, size, name):
    before = bytes_below(tmp_path/'cache')
    paths = imagenette(tmp_path/'dest', size)
    rows = {f'train/{w}/{w}_10.JPEG': c for w, c in ten.items()} | {f'val/{w}/{w}_9.JPEG': c for w, c in ten.items()}
    rows |= {f'train/{w}/ILSVRC2012_val_00000{c[1]:03}.JPEG': c for w, c in ten.items()}
    assert listed(paths) == rows and json.loads(paths.label_encoding.read_text()) == dict(ten.values())
    assert [u.rsplit('/', 1)[1] for u in fetched] == [name] and bytes_below(tmp_path/'cache') == before
    assert sorted(os.listdir(tmp_path)) == ['cache', 'dest']


def test_imagenette_complains(tmp_path, fetched, monkeypatch):
    for size in (224, '160', 0):
        with pytest.raises(DataError, match='size is .*; Imagenette comes with'): imagenette(tmp_path/'dest', size)
    assert fetched == []
    for s in ('train', 'val'): photo(tmp_path/f'cache/imagenette2/{s}/n02012849/1.JPEG')
    with pytest.raises(DataError, match='has the folder n02012849, which is no class of Imagenette'): imagenette(tmp_path/'dest')
    def offline(url): raise OSError('the network cannot be reached')
    monkeypatch.setattr(sources, 'untar_data', offline)
    with pytest.raises(DataError, match='imagenette2-160.tgz cannot be fetched: the network'): imagenette(tmp_path/'dest')
    assert os.listdir(tmp_path) == ['cache']


def test_batches(tmp_path, fetched):
    "What the converters write feeds `resnet_dls`, whose targets are the official indices, the CSV's and torchvision's"
    made = dict(imagenet=(from_imagenet(official(tmp_path/'i'), tmp_path/'di'), by_number),
                csv=(from_csv(csv_tree(tmp_path/'c', with_valid), tmp_path/'dc'), {'val/a/2.jpg': dog, 'val/b/3.jpg': cat}),
                imagenette=(imagenette(tmp_path/'dn'), {f'val/{w}/{w}_9.JPEG': c for w, c in ten.items()}))
    for paths, rows in made.values():
        dls = resnet_dls(*paths, micro_bs=4, size=32, num_workers=0, device='cpu')
        targets = [int(t) for _, y in dls.valid for t in y]
        assert targets == [rows[p][1] for p in sorted(rows) if p.startswith('val/')]
        x, y = next(iter(dls.train))
        assert x.shape[1:] == (3, 32, 32) and {int(t) for t in y} <= set(LabelMap(*paths[1:]).by_index)
