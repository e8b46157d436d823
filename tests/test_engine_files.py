"JSON that is read strictly, and files that appear whole or not at all."
import pytest

from resnet_fastai.engine.files import LabelError, read_json_object, write_json


@pytest.mark.parametrize('text,says', [('{"b": 1, "b": 1}', "repeats the key 'b'"), ('["b"]', 'JSON list'), ('{"b": 1', 'is not JSON')])
def test_what_is_no_json_object(tmp_path, text, says):
    (tmp_path/'a.json').write_text(text)
    with pytest.raises(LabelError, match=rf'a\.json.* {says}'): read_json_object(tmp_path/'a.json')


def test_a_json_object_or_none(tmp_path):
    (tmp_path/'a.json').write_text('{"b": {"c": 1}}')
    assert read_json_object(tmp_path/'a.json') == {'b': {'c': 1}}
    with pytest.raises(LabelError, match='cannot be read: No such file'): read_json_object(tmp_path/'none.json')


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    write_json(tmp_path/'b.json', {'é': [1.5]})
    assert read_json_object(tmp_path/'b.json') == {'é': [1.5]}
    with pytest.raises(TypeError): write_json(tmp_path/'b.json', {'x': {1, 2}})                 # JSON has no sets
    assert read_json_object(tmp_path/'b.json') == {'é': [1.5]} and len(list(tmp_path.iterdir())) == 1
