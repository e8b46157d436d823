"Files that are no photos, or hardly: only clear complaints, no crash, no hang, no growing memory."
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostile import wholes
from patience import run
from resnet_fastai.engine.files import PhotoError
from resnet_fastai.engine.photo import Photo, open_photo


@pytest.fixture(scope='module')
def said(tmp_path_factory):
    "What ten thousand of them led to, in a process of its own"
    script = Path(__file__).with_name('hostile.py')
    out = run([sys.executable, script, tmp_path_factory.mktemp('hostile'), '10000'])
    assert not out.returncode, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])


def test_each_is_answered_or_named(said):
    "predict and predict_folder agree on which can be read, and the table has a row for each with the file's name in its complaint"
    assert said['n'] == 10_000 and not said['unlike'] and not said['unnamed'] and not said['long']


def test_the_turns_are_bad_ones(said):
    "Unharmed photos are all read, no text is, and each other turn spoils some"
    kinds = said['kinds']
    assert kinds['whole'][0] == kinds['whole'][1] > 500 and kinds['text'][1] == 0
    assert all(0 <= ok < n for kind, (n, ok) in kinds.items() if kind != 'whole')
    assert .2 < said['ok']/said['n'] < .8


def test_memory_stays(said):
    "MB at each tenth: what the first tenths need is allocated once"
    early, late = max(said['levels'][:3]), max(said['levels'][-3:])
    assert late - early < 60 and said['after'] - early < 300, said


found = wholes()


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(range(len(found))), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=8), st.integers(0, 40)), max_size=5))
def test_any_edit_of_a_photo(which, edits):
    "Bytes put in and taken out anywhere: pixels of the size that the file says, or a PhotoError of one line"
    data = bytearray(found[which][1])
    for at, put, gone in edits: data[int(at*len(data)):int(at*len(data)) + gone] = put
    try: photo = open_photo(bytes(data))
    except PhotoError as e:
        assert '\n' not in str(e) and str(e).startswith('these bytes')
        return
    assert photo.mode == 'RGB' and np.array(photo).shape == (photo.height, photo.width, 3) and photo.size == Photo(bytes(data)).size


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.dictionaries(st.text(), st.integers()), st.text(max_size=40),
                 st.sets(st.integers()), st.functions(), st.binary(max_size=100)))
@settings(max_examples=300, deadline=None)
def test_anything_else_is_refused_by_name(thing):
    with pytest.raises(PhotoError) as e: open_photo(thing)
    assert len(str(e.value)) < 600
