"""Each rule of the paper, the line of code that implements it, and the tests that check it, as `from_the_paper.ipynb` shows them.

    python nbs/experiments/paper.py          # check the files, and make the page again

The rules are in `paper.json`. A test names the rules that it checks: `@pytest.mark.paper('3.4-crop')` above a function in
`tests/`, or the line `# paper: 3.4-crop` in a notebook's cell."""
import ast
import json
import os
import re
import subprocess
import sys
from collections import namedtuple
from configparser import ConfigParser
from html import escape
from pathlib import Path

root = Path(__file__).resolve().parents[2]
stale = 'python nbs/experiments/paper.py'

Rule = namedtuple('Rule', 'id section says code but')                # code: ['FILE: part of its line', …]; but: how this project differs
Place = namedtuple('Place', 'file line text')                        # line: its number; None in a notebook


class PaperError(ValueError): "A rule without its line or test, or a test of no rule"


# --- Rules and their lines

def read_rules(
    root:Path=root, # Of the checkout
) -> list: # Of `Rule`, in the paper's order
    "The rules of paper.json"
    rules = json.loads((root/'nbs'/'experiments'/'paper.json').read_text(encoding='utf-8'))
    return [Rule(r['id'], r['id'].split('-')[0], r['says'], r.get('code', []), r.get('but', '')) for r in rules]


def kept(rule):
    "Whether a rule is implemented: as written, with a difference, or not"
    return 'not built' if not rule.code else 'differs' if rule.but else 'as written'


def cells(file, kind='code'):
    "The sources of a notebook's cells of one kind"
    return [''.join(c['source']) for c in json.loads(file.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == kind]


def find_line(
    root:Path, # Of the checkout
    code:str, # 'FILE: part of its line'
) -> Place: # Where it is now
    "The one line of a file that contains this part; a `PaperError` if there is none, or more than one"
    name, part = code.split(': ', 1)
    if not (root/name).is_file(): raise PaperError(f"there is no file {name}")
    notebook = name.endswith('.ipynb')
    text = '\n'.join(cells(root/name)) if notebook else (root/name).read_text(encoding='utf-8')
    found = [(i, line) for i, line in enumerate(text.splitlines(), 1) if part in line]
    if len(found) != 1: raise PaperError(f"{name} has {len(found)} lines with {part!r}; one is needed")
    return Place(name, None if notebook else found[0][0], found[0][1].strip())


# --- Tests and their marks

def _marks(function):
    "The rules that a test function's decorators name; a mark that is not a string is an error"
    for d in function.decorator_list:
        if isinstance(d, ast.Call) and ast.unparse(d.func) == 'pytest.mark.paper':
            if not d.args or d.keywords or not all(isinstance(a, ast.Constant) and isinstance(a.value, str) for a in d.args):
                raise PaperError(f"line {d.lineno}: {ast.unparse(d)} should name rules of paper.json, as texts")
            yield from (a.value for a in d.args)


def marked_functions(
    root:Path=root, # Of the checkout
): # Of (rule's id, `Place`)
    "The marked tests of tests/"
    for file in sorted((root/'tests').rglob('test_*.py')):
        name = file.relative_to(root).as_posix()
        nodes = ast.walk(ast.parse(file.read_text(encoding='utf-8')))
        try: functions = [(f, list(_marks(f))) for f in nodes if isinstance(f, ast.FunctionDef)]
        except PaperError as e: raise PaperError(f"{name}, {e}") from None
        for f, ids in functions:
            if not ids: continue
            if not f.name.startswith('test'): raise PaperError(f"{name}: {f.name} is marked and is no test that pytest would run")
            if any(re.match(r'pytest\.mark\.skip\b', ast.unparse(d)) for d in f.decorator_list):
                raise PaperError(f"{name}: {f.name} is marked, and always skipped")
            yield from ((i, Place(name, f.lineno, f.name)) for i in ids)


def marked_cells(
    root:Path=root, # Of the checkout
): # Of (rule's id, `Place`)
    "The marked cells of the notebooks"
    for file in sorted((root/'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' in file.parts: continue
        for cell in cells(file):
            for ids in re.findall(r'^# paper: (.+)$', cell, re.M):
                name = file.relative_to(root).as_posix()
                if not re.search(r'\bassert\b|\btest_\w+\(', cell) or re.search(r'^#\| *(export|eval: *false)', cell, re.M):
                    raise PaperError(f"{name}: the cell marked {ids!r} is none that tests anything")
                yield from ((i.strip(), Place(name, None, Path(name).stem)) for i in ids.split(','))


def read_proofs(
    root:Path=root, # Of the checkout
) -> dict: # {rule's id: [Place, …]}
    "The tests of each rule"
    proofs = {}
    for i, place in [*marked_functions(root), *marked_cells(root)]:
        if place not in proofs.setdefault(i, []): proofs[i].append(place)
    return proofs


def problems(
    root:Path=root, # Of the checkout
) -> list: # A sentence for each error
    "Errors in the rules, their lines and their tests"
    try: rules, proofs = read_rules(root), read_proofs(root)
    except PaperError as e: return [str(e)]
    ids, found = [r.id for r in rules], []
    found += [f"{i} is in paper.json twice" for i in dict.fromkeys(ids) if ids.count(i) > 1]
    found += [f"{at[0].file}: {at[0].text} is marked {i!r}, which is no rule of paper.json" for i, at in proofs.items() if i not in ids]
    for r in rules:
        if not r.code and not r.but: found.append(f"{r.id} has neither code nor a word on why it is not built")
        if not r.code and r.id in proofs: found.append(f"{r.id} is said to be not built, and {proofs[r.id][0].text} proves it")
        if r.code and r.id not in proofs: 
            found.append(f"{r.id} has no test; mark one: @pytest.mark.paper({r.id!r}) in tests/, or # paper: {r.id} in a cell")
        for code in r.code:
            try: find_line(root, code)
            except PaperError as e: found.append(f"{r.id}: {e}")
    return found


# --- The page

def _links(root):
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini', encoding='utf-8')
    cfg = ini['DEFAULT']
    def link(place, text):
        at = f"{cfg['git_url']}/blob/{cfg['branch']}/{place.file}" + (f'#L{place.line}' if place.line else '')
        return f'<a href="{at}">{escape(text).replace("_", "_<wbr>")}</a>'
    return link


def _card(rule, proofs, root, link):
    "A rule as HTML: three columns on a wide screen, below each other on a phone and where styles are removed"
    lines = [find_line(root, c) for c in rule.code]
    code = [f"{link(p, Path(p.file).name + (f':{p.line}' if p.line else ''))}<br><code>{escape(p.text)}</code>" for p in lines]
    tests = [link(p, f'{Path(p.file).name}, a cell' if p.line is None else p.text) for p in proofs.get(rule.id, [])]
    but = f"<br><em>{'Differs' if rule.code else 'Not built'}: {escape(rule.but)}</em>" if rule.but else ''
    parts = {escape(rule.id): [escape(rule.says) + but], 'code': code, 'tests': tests}
    columns = ''.join(f"<div><small>{head}</small><br>{'<br>'.join(found)}</div>" for head, found in parts.items() if found)
    style = ('display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,13rem),1fr));gap:.3rem 1.2rem;padding:.6rem 0;'
             'text-align:left;overflow-wrap:anywhere;border-top:1px solid rgba(128,128,128,.4)')
    return f'<div style="{style}">{columns}</div>'


def pages(
    root:Path=root, # Of the checkout
) -> dict: # {section: HTML}
    "A card for each rule: what the paper asks, the line that implements it, the tests that check it"
    link, proofs, cards = _links(root), read_proofs(root), {}
    for r in read_rules(root): cards.setdefault(r.section, []).append(_card(r, proofs, root, link))
    return {section: '\n'.join(['<div class="paper">', *found, '</div>']) for section, found in cards.items()}


def stored(root=root):
    "The pages that are stored in the notebook"
    nb = json.loads((root/'nbs'/'experiments'/'from_the_paper.ipynb').read_text(encoding='utf-8'))
    outs = [o for c in nb['cells'] for o in c.get('outputs', [])]
    texts = [''.join(o.get('data', {}).get('text/html', '')) for o in outs]
    return [t for t in texts if t.startswith('<div class="paper"')]


def main():
    "Run the notebook in its folder and store its outputs"
    import nbformat
    from nbclient import NotebookClient
    if found := problems(): sys.exit('\n'.join(found))
    file = root/'nbs'/'experiments'/'from_the_paper.ipynb'
    nb = nbformat.read(file, 4)
    os.environ.pop('MPLBACKEND', None)                                  # of a terminal without a screen: it would draw nothing here
    NotebookClient(nb, kernel_name='python3', resources={'metadata': {'path': str(file.parent)}}).execute()
    nbformat.write(nb, file)
    subprocess.run(['nbdev-clean', '--fname', str(file)], check=True)


if __name__ == '__main__': main()
