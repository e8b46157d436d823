"""How the book is written: a table of measures of the notebooks, the limits of lessons, guides and experiments, and the package's imports.

    python tools/book.py              # a row a notebook, then what breaks a limit
    python tools/book.py imports      # who imports whom, floor by floor, and what runs upwards or in a circle

Cells are those that a reader sees: without hidden ones and `default_exp`. Lines are those that are not blank, without `#|`."""
import ast
import json
import re
import statistics
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
lessons, guides, experiments = '0[1-6]_*.ipynb', 'practice/*.ipynb', 'experiments/*.ipynb'

# What a lesson keeps: measure → (lowest, highest). `screen` is where its first picture begins, in pixels at a width of 1280.
limits = dict(cells=(1, 45), exported=(0, 250), width=(0, 100), function=(0, 40), exercises=(5, 8), words_for_10=(30, None),
              cells_a_figure=(0, 15), screen=(0, 900))
# What guides and experiments keep; `shown` is where the first picture or table begins
guide_limits = dict(cells=(1, 45), exported=(0, 250), width=(0, 100), function=(0, 40), shown=(0, 900))
# From the bottom up: a module imports from its own floor and from those below. The commands of the shell call everything.
floors = ('engine',), ('model',), ('augment',), ('data',), ('training',), ('inference',), ('practice',), ('core',), ('practice.cli',), ('__main__',)


# --- Notebooks

def source(cell): return ''.join(cell['source'])
def directives(cell): return dict((m[1], m[2].strip()) for m in re.finditer(r'^#\| *(\w[\w-]*):? *(.*)$', source(cell), re.M))
def code_lines(cell): return [s for s in source(cell).splitlines() if s.strip() and not s.startswith('#|')]
def is_exported(cell): return bool({'export', 'exports', 'exporti'} & directives(cell).keys())


def visible_cells(nb):
    "The cells that a reader meets"
    hidden = lambda c: c['cell_type'] == 'code' and ({'hide', 'default_exp'} & directives(c).keys() or directives(c).get('include') == 'false')
    return [c for c in nb['cells'] if source(c).strip() and c['cell_type'] != 'raw' and not hidden(c)]


def pictures(cell):
    "How many pictures a cell shows"
    if cell['cell_type'] == 'markdown': return len(re.findall(r'!\[[^\]]*\]\([^)]+\)|<img\b', source(cell)))
    shown = [o.get('data', {}) for o in cell['outputs']]
    return sum(any(k.startswith('image/') for k in d) or bool(re.search(r'<(img|svg)\b', ''.join(d.get('text/html', '')))) for d in shown)


def _output_height(cell):
    "Pixels of what a code cell prints and shows, pictures left out"
    height = 0
    for o in cell['outputs']:
        data = o.get('data', {})
        if 'text/html' in data: height += 30*''.join(data['text/html']).count('<tr') + 20
        elif o['output_type'] == 'stream' or set(data) == {'text/plain'}:
            height += 22*(''.join(o.get('text', data.get('text/plain', ''))).count('\n') + 1) + 20
    return height


def _text_height(text):
    "Pixels of Markdown in a column of 95 characters a line"
    height = 0
    for block in re.split(r'\n\s*\n', text.strip()):
        if m := re.match(r'(#+) ', block): height += {1: 75, 2: 75}.get(len(m[1]), 55)
        elif re.match(r'\s*([-*|>]|\d+\.) ?', block): height += sum(26*(len(s)//92 + 1) for s in block.splitlines()) + 17
        else: height += 26*(len(' '.join(block.split()))//95 + 1) + 17
    return height


def shows_table(cell):
    "Does what a code cell shows hold a table?"
    return any('<table' in ''.join(o.get('data', {}).get('text/html', '')) for o in cell['outputs'])


def first_picture(cells, tables=False):
    "Where the first picture (or table) begins, in pixels from the top, as estimated for a window 1280 pixels wide; None without one"
    top = 75                                                             # the bar above the page
    mark = r'!\[[^\]]*\]\(|<img\b' + (r'|^\|[ :-]+\|' if tables else '')
    for c in cells:
        if c['cell_type'] == 'markdown':
            before = re.split(mark, source(c), maxsplit=1, flags=re.M)
            if len(before) > 1: return top + _text_height(before[0])
            top += _text_height(source(c))
        else:
            if directives(c).get('echo') != 'false': top += 50 + 21*len(code_lines(c))*(directives(c).get('code-fold') != 'true')   # folded: a line to click
            if pictures(c) or tables and shows_table(c): return top
            top += _output_height(c)


def functions(cell):
    "(name, lines that are not blank) of each function and method in a cell"
    try: tree = ast.parse('\n'.join(s if not re.match(r'\s*[!%]', s) else '' for s in source(cell).splitlines()))
    except SyntaxError: return
    lines = source(cell).splitlines()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, sum(bool(s.strip()) for s in lines[node.lineno-1:node.end_lineno])


def exercises(cells):
    "How many numbered exercises there are, answers not counted"
    text = '\n\n'.join(source(c) for c in cells if c['cell_type'] == 'markdown')
    found = re.search(r'^#+ Exercises\b.*?$(.*?)(?=^#{1,2} |<details|\Z)', text, re.M | re.S)
    return len(re.findall(r'^\d+\. ', found[1], re.M)) if found else 0


def measures(
    path:Path, # Of a notebook
) -> dict: # Of numbers, those of `limits` among them
    "How a notebook is written"
    cells = visible_cells(json.loads(path.read_text(encoding='utf-8')))
    code = [c for c in cells if c['cell_type'] == 'code']
    exported = [c for c in code if is_exported(c)]
    sizes = sorted(len(code_lines(c)) for c in code) or [0]
    lines, out = sum(sizes), sum(len(code_lines(c)) for c in exported)
    words = sum(len(re.findall(r'\b[\w’\'-]+\b', source(c))) for c in cells if c['cell_type'] == 'markdown')
    figures = sum(pictures(c) for c in cells)
    longest = max((f for c in exported for f in functions(c)), key=lambda f: f[1], default=('', 0))
    return dict(cells=len(cells), code_cells=len(code), lines=lines, median=statistics.median(sizes), most=sizes[int(.9*(len(sizes)-1))],
                words=words, figures=figures, exported=out, share=out/lines if lines else 0, exercises=exercises(cells),
                function=longest[1], longest=longest[0], width=max((len(s) for c in code for s in code_lines(c)), default=0),
                screen=first_picture(cells), shown=first_picture(cells, tables=True), words_for_10=10*words/lines if lines else None,
                cells_a_figure=len(cells)/figures if figures else None)


def broken_limits(
    path:Path, # Of a lesson, a guide or an experiment
    limits:dict=limits, # Measure → (lowest, highest)
) -> list: # A sentence for each
    "Which limits a notebook breaks"
    m = measures(path)
    words = dict(cells='cells', exported='exported lines', width='characters in its widest line', exercises='exercises',
                 function=f"lines in its longest exported function, {m['longest']}", words_for_10='words for 10 lines of code',
                 cells_a_figure='cells for each figure', screen='pixels above its first picture', shown='pixels above its first picture or table')
    found = []
    for key, (low, high) in limits.items():
        value = m[key]
        if value is None: found.append(f'{path.name} has no figure' if key != 'words_for_10' else f'{path.name} has no code')
        elif value < low or high is not None and value > high:
            found.append(f"{path.name} has {value:.0f} {words[key]}; " + (f'at most {high}' if high is not None and value > high else f'at least {low}'))
    return list(dict.fromkeys(found))


def notebooks():
    "All of them, lessons first"
    found = [p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts]
    return sorted(found, key=lambda p: (len(p.relative_to(root).parts), p))


def table(paths):
    "The measures as Markdown"
    heads = ['notebook', 'cells', 'code cells', 'lines of code', 'cell median/90 %', 'words', 'figures', 'exported lines',
             'exported, %', 'exercises', 'longest exported function', 'widest line', 'first picture, px']
    rows = [heads, ['---'] + ['--:']*(len(heads)-1)]
    for p in paths:
        m = measures(p)
        top = '–' if m['screen'] is None else f"{m['screen']:.0f}"
        rows.append([p.relative_to(root/'nbs').as_posix(), m['cells'], m['code_cells'], m['lines'], f"{m['median']:g}/{m['most']}", f"{m['words']:,}",
                     m['figures'], m['exported'], f"{100*m['share']:.0f}", m['exercises'], m['function'] or '–', m['width'], top])
    return '\n'.join('| ' + ' | '.join(map(str, r)) + ' |' for r in rows)


# --- Imports

def _type_checking(tree):
    "The nodes that only a type checker reads"
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and 'TYPE_CHECKING' in ast.unparse(n.test)]
    return {id(m) for b in blocks for s in b.body for m in ast.walk(s)}


def _named(node, name, package):
    "The modules of a package that an import statement of its module `name` may mean, longest path first"
    if isinstance(node, ast.Import): return [a.name for a in node.names]
    base = name.split('.')[:-node.level] if node.level else []
    base = '.'.join(base + ([node.module] if node.module else []))
    return [f'{base}.{a.name}' for a in node.names] + [base]


def import_graph(
    package:Path=root/'resnet_fastai', # Its folder
) -> dict: # {module: {modules of the package that it imports anywhere, also within functions}}
    "Who imports whom"
    files = {'.'.join([package.name, *p.relative_to(package).with_suffix('').parts]).removesuffix('.__init__'): p for p in package.rglob('*.py')}
    graph = {}
    for name, file in sorted(files.items()):
        tree = ast.parse(file.read_text(encoding='utf-8'))
        inner, skip = (name + '.__init__' if file.name == '__init__.py' else name), _type_checking(tree)
        nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) and id(n) not in skip]
        named = {n for node in nodes for n in _named(node, inner, package.name)}
        graph[name] = {n for n in named if n in files and n not in (name, package.name)}
    return graph


def floor(module):
    "Its number, from the bottom; None for what is no part of the house, such as `_modidx`"
    name = module.partition('.')[2]
    found = [(len(p), i) for i, names in enumerate(floors) for p in names if name == p or name.startswith(p + '.')]
    return max(found)[1] if found else None


def upward(graph):
    "(module, imported) where the imported one is on a floor above"
    pairs = [(a, b) for a, all_b in graph.items() for b in sorted(all_b)]
    return [(a, b) for a, b in pairs if None not in (floor(a), floor(b)) and floor(a) < floor(b)]


def circles(graph):
    "Each set of modules that reach each other by imports"
    reach = {a: set(b) for a, b in graph.items()}
    for k in graph:
        for a in graph:
            if k in reach[a]: reach[a] |= reach[k]
    found = {frozenset(b for b in graph if b in reach[a] and a in reach[b]) for a in graph}
    return sorted((sorted(f) for f in found if f), key=str)


def show_imports():
    graph = import_graph()
    short = lambda m: m.partition('.')[2] or m
    for a in sorted(graph, key=lambda m: (floor(m) if floor(m) is not None else -1, m), reverse=True):
        if floor(a) is not None: print(f"{short(a)} ← {', '.join(sorted(map(short, graph[a]))) or 'nothing of ours'}")
    for a, b in upward(graph): print(f'upwards: {short(a)} imports {short(b)}')
    for c in circles(graph): print(f"circle: {', '.join(map(short, c))}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv == ['imports']: return show_imports()
    if argv: sys.exit(__doc__)
    print(table(notebooks()) + '\n')
    found = [f for p in sorted((root/'nbs').glob(lessons)) for f in broken_limits(p)]
    found += [f for kind in (guides, experiments) for p in sorted((root/'nbs').glob(kind)) for f in broken_limits(p, guide_limits)]
    print(*found, sep='\n')


if __name__ == '__main__': main()
