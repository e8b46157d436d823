"The Python lines of the README, run on a folder of the form that it describes, with one epoch for five."
import json
import re
from pathlib import Path

import pandas as pd

from resnet_fastai.data import demo_data

readme = (Path(__file__).resolve().parent.parent/'README.md').read_text(encoding='utf-8')


def test_the_ten_lines_run(tmp_path, monkeypatch):
    paths = demo_data(tmp_path/'photos', sizes=dict(train=4, val=2, test=1))
    for p in paths[1:]: p.rename(tmp_path/p.name)
    labels = json.loads((tmp_path/'labels.json').read_text())
    labels['IMG_0042'] = labels.pop('test_00000')
    (tmp_path/'labels.json').write_text(json.dumps(labels))
    (paths.data_path/'test'/'test_00000.jpg').rename(paths.data_path/'test'/'IMG_0042.jpg')
    monkeypatch.chdir(tmp_path)
    code = '\n'.join(re.findall(r'```python\n(.*?)```', readme, re.S))
    names = {}
    assert code.count('epochs=5') == 3 and code.count("weights='imagenet'") == 1
    exec(code.replace('epochs=5', 'epochs=1').replace("'imagenet'", "'my_model'"), names)      # which have to be fetched
    assert isinstance(names['history'], pd.DataFrame) and len(names['history']) == 1
    assert len(names['learn'].recorder.values) == 1
    assert names['model'].learn.weights['origin'] == 'the saved model my_model' and len(names['model'].history) == 2
    assert (tmp_path/'my_model'/'model.safetensors').exists()
    assert len(list((tmp_path/'photos-480').rglob('*.jpg'))) == 7
