"The Python in the folded answers of a lesson, run: a line `expression   # value` has to have that value."
import json
import re
from pathlib import Path

nbs = Path(__file__).resolve().parent.parent/'nbs'


def cells(name, kind): return [''.join(c['source']) for c in json.loads((nbs/name).read_text(encoding='utf-8'))['cells'] if c['cell_type'] == kind]


def run(
    name, # Of a lesson
    names:dict, # What the reader has by then; the answers' own names are put in
    cell='', # The code cell with this text runs before
) -> int: # How many values were compared
    "Run the answers"
    if cell: exec(next(s for s in cells(name, 'code') if cell in s), names)
    folded, compared = '\n'.join(cells(name, 'markdown')).partition('<details><summary>Answers')[2], 0
    for block in re.findall(r'^ *```python\n(.*?)^ *```', folded, re.M | re.S):
        block = re.sub(r'^ {3}', '', block, flags=re.M)
        exec(block, names)
        for said, value in re.findall(r'^(\S.*?) {2,}# (.+)$', block, re.M):
            assert repr(eval(said, names)) == value, said
            compared += 1
    return compared
