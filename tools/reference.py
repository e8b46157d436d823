"""The API reference: what each module of the package defines, read from its source without importing it.

Signatures, docstrings and the comment beside each parameter become a page a module, in the order of the code."""
import ast
import io
import re
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

Function = ast.FunctionDef, ast.AsyncFunctionDef


@dataclass
class Param:
    "A parameter or field: its name as it is written, type, default and comment; each may be empty"
    name: str
    type: str = ''
    default: str = ''
    says: str = ''


@dataclass
class Entry:
    "A function, class, method, property or value that a module defines"
    name: str  # With the class before it: `LabelMap.__call__`
    kind: str
    source: str
    line: int  # Its first line in the file
    says: str = ''
    params: list = field(default_factory=list)
    returns: Param | None = None
    members: list = field(default_factory=list)
    patched: bool = False  # Was it given to its class from outside?

    @property
    def anchor(self): return self.name.lower()

    @property
    def signature(self):
        "Names and defaults, on one line where they fit; the bases of a class that takes nothing"
        if self.kind not in ('function', 'class'): return self.name
        if self.kind == 'class' and not self.params: return re.search(rf'^class {self.name}\b[^:]*', self.source, re.M)[0]
        parts = [p.name + (f'={p.default}' if p.default else '') for p in self.params]
        short = f"{self.name}({', '.join(parts)})"
        return short if len(short) <= 80 else f'{self.name}(\n    ' + ',\n    '.join(parts) + ',\n)'


class Module:
    "A module's docstring and entries, read from its file"
    def __init__(self,
        path:Path, # Of the file
        name:str, # Below the package, such as 'engine.files'
    ):
        self.name, self.path, self.text = name, path, path.read_text(encoding='utf-8')
        self.lines, self.tree, self.entries = self.text.splitlines(), ast.parse(self.text), []
        self.says = ast.get_docstring(self.tree) or ''
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        self.comments = {t.start[0]: t.string.lstrip('#').strip() for t in tokens if t.type == tokenize.COMMENT}
        exported = next((ast.literal_eval(n.value) for n in self.tree.body if _target(n) == '__all__'), None)
        self.public = lambda name: not name.startswith('_') and (exported is None or name in exported)
        for node in self.tree.body: self._add(node)

    def _add(self, node):
        if isinstance(node, Function):
            owners = _patched(node)
            for owner in owners:
                if self._shown(node.name) and owner.split('.')[0][:1] != '_': self._member(owner, self._function(node, f'{owner}.{node.name}', method=True))
            if not owners and self.public(node.name): self.entries.append(self._function(node, node.name))
        elif isinstance(node, ast.ClassDef) and self.public(node.name): self.entries.append(self._class(node))
        elif (name := _target(node)) and self.public(name): self.entries.append(self._value(node, name))

    def _shown(self, name): return not name.startswith('_') or name in ('__call__', '__getitem__', '__len__', '__iter__', '__init__')

    def _member(self, owner, entry):
        "Put a patched method where its class is; `__init__` gives the class its parameters"
        cls = next((e for e in self.entries if e.kind == 'class' and e.name == owner), None)
        if cls is None: self.entries.append(entry)
        elif entry.name.endswith('.__init__'): cls.params = entry.params
        else: cls.members.append(entry)
        entry.patched = True

    def _segment(self, node):
        first = min([node.lineno, *(d.lineno for d in getattr(node, 'decorator_list', []))])
        return '\n'.join(self.lines[first-1:node.end_lineno])

    def _says(self, node):
        "The docstring, and the paper's section where a comment beside it names one"
        says = ast.get_docstring(node) or ''
        comment = self.comments.get(node.body[0].end_lineno, '') if says else ''
        return f'{says} ({comment})' if comment.startswith(('§', 'Table', 'Figure', 'eq.')) else says

    def _beside(self, line):
        "The comment at the end of a line, or the lines of comment above it"
        if line in self.comments and not self.lines[line-1].lstrip().startswith('#'): return self.comments[line]
        above = []
        while line-1 in self.comments and self.lines[line-2].lstrip().startswith('#') and not self.comments[line-1].startswith('%%'):
            line -= 1
            above.insert(0, self.comments[line])
        return ' '.join(above)

    def _params(self, node, method):
        "The parameters of a function, as (Param, last line)"
        a, found = node.args, []
        plain = a.posonlyargs + a.args
        defaults = [None]*(len(plain) - len(a.defaults)) + a.defaults
        everything = [*zip(plain, defaults, ['']*len(plain)), *([(a.vararg, None, '*')] if a.vararg else []),
                      *zip(a.kwonlyargs, a.kw_defaults, ['']*len(a.kwonlyargs)), *([(a.kwarg, None, '**')] if a.kwarg else [])]
        static = any(isinstance(d, ast.Name) and d.id == 'staticmethod' for d in node.decorator_list)
        if method and plain and not static: everything = everything[1:]
        for arg, default, stars in everything:
            last = max(n.end_lineno for n in (arg, default) if n is not None)
            found.append((Param(stars + arg.arg, _written(arg.annotation), _written(default)), arg.lineno, last))
        if a.kwonlyargs and not a.vararg:
            star = next(i for i, f in enumerate(found) if f[0].name == a.kwonlyargs[0].arg)
            found.insert(star, (Param('*'), found[star][1], 0))
        return found

    def _function(self, node, name, method=False):
        found = self._params(node, method)
        starts, inside = [s for p, s, _ in found if p.name != '*'], node.args.args or node.args.kwonlyargs
        body = node.body[0].lineno
        for i, (p, start, last) in enumerate(found):
            alone = not any(s == last for s in starts[i+1:]) and last < body and last > node.lineno
            if alone and p.name != '*': p.says = self._beside(last)
        lasts = {last for _, _, last in found} | {a.end_lineno for a in inside}
        end = node.returns.end_lineno if node.returns else body - 1
        says = self.comments.get(end, '') if end not in lasts and node.lineno <= end < body else ''
        returns = Param('returns', _written(node.returns), says=says) if node.returns or says else None
        prop = any(_written(d) in ('property', 'cached_property', 'functools.cached_property', 'patch(as_prop=True)') for d in node.decorator_list)
        return Entry(name, 'property' if prop else 'function', self._segment(node), node.lineno, self._says(node), [f[0] for f in found], returns)

    def _class(self, node):
        entry = Entry(node.name, 'class', self._segment(node), node.lineno, self._says(node))
        for n in node.body:
            if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and not n.target.id.startswith('_'):
                entry.params.append(Param(n.target.id, _written(n.annotation), _written(n.value), self._beside(n.lineno)))
        for n in node.body:
            if not isinstance(n, Function) or not self._shown(n.name): continue
            member = self._function(n, f'{node.name}.{n.name}', method=True)
            if n.name == '__init__': entry.params = member.params
            else: entry.members.append(member)
        return entry

    def _value(self, node, name):
        return Entry(name, 'value', self._segment(node), node.lineno, self._beside(node.lineno))


def _target(node):
    "The one name that an assignment gives a value; None for any other statement"
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return targets[0].id if len(targets) == 1 and isinstance(targets[0], ast.Name) else None


def _written(node): return '' if node is None else ast.unparse(node)


def _patched(node):
    "The classes that fastcore's `patch` or `patch_to` gives a function to"
    for d in node.decorator_list:
        called = d.func if isinstance(d, ast.Call) else d
        if _written(called) == 'patch_to': return [_written(d.args[0])]
        if _written(called) == 'patch' and node.args.args:
            kind = node.args.args[0].annotation
            return [_written(k) for k in (kind.elts if isinstance(kind, ast.Tuple) else _either(kind))]
    return []


def _either(node):
    "`A|B` → [A, B]"
    return [*_either(node.left), *_either(node.right)] if isinstance(node, ast.BinOp) else [node]


def read_modules(
    package:Path, # Its folder
) -> list: # Of `Module`s that define anything, in order of their names
    "What the modules of a package define"
    files = sorted(p for p in package.rglob('*.py') if not p.stem.startswith('_'))
    found = [Module(p, '.'.join(p.relative_to(package).with_suffix('').parts)) for p in files]
    return [m for m in found if m.entries]


def names_of(
    source:str, # Of an exported cell
) -> list: # Of the names that others may use, methods that are patched in with their class before them; in order
    "What a cell defines"
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, Function) and (owners := _patched(node)): found += [f'{o}.{node.name}' for o in owners]
        elif isinstance(node, (*Function, ast.ClassDef)): found.append(node.name)
        elif name := _target(node): found.append(name)
    special = lambda n: n.startswith('__') and n.endswith('__')
    return [n for n in found if n != '__all__' and not any(part.startswith('_') and not special(part) for part in n.split('.'))]


# --- Markdown

def _code(text): return f'`{text}`' if text else ''


def _param(p):
    "A bullet for a parameter"
    default = f', default {_code(p.default)}' if p.default else ''
    head = '*returns*' if p.name == 'returns' else f'**{_code(p.name)}**'
    return f'- {head}' + (f' {_code(p.type)}' if p.type else '') + default + (f'\\\n  {p.says}' if p.says else '')


def _documented(e): return bool(e.says or any(p.says for p in e.params) or e.returns and e.returns.says)


def _fold(e): return '' if e.kind == 'value' else ' .cell-code code-fold="true" code-summary="Source"'


def entry_markdown(
    e:Entry, # To describe
    level:int, # Of its heading
    link, # From a line number to the address of the source
) -> str: # Markdown
    "An entry and its methods; methods that have nothing to say are named on one line"
    name = e.name.replace('_', r'\_')
    parts = [f"{'#'*level} {name} {{#{e.anchor}}}"]
    if e.kind in ('function', 'class'): parts.append(f'```{{.python .signature}}\n{e.signature}\n```')
    if e.says: parts.append(e.says)
    listed = [p for p in e.params if p.name != '*']
    if e.returns and e.kind == 'function': listed.append(e.returns)
    if any(p.says or p.type for p in listed): parts.append('::: {.params}\n' + '\n'.join(map(_param, listed)) + '\n:::')
    told = [m for m in e.members if _documented(m) or m.patched]
    plain = [m.name.rpartition('.')[2] for m in e.members if m not in told]
    if plain: parts.append('Also: ' + ', '.join(f'`{n}`' for n in plain) + '.')
    if '.' not in e.name or e.patched: parts.append(f'```{{.python{_fold(e)}}}\n{e.source}\n```\n\n::: {{.source-link}}\n[{name} on GitHub]({link(e.line)})\n:::')
    return '\n\n'.join(parts + [entry_markdown(m, level + 1, link) for m in told])


def page(
    module:Module, # To describe
    package:str, # Its name
    link, # From a line number to the address of the source
    explained:str='', # A link in Markdown to the notebook that explains it
) -> str: # Markdown with front matter
    "The reference page of a module"
    names = [e.name for e in module.entries if '.' not in e.name]
    says = re.sub(r'\n*^Docs: \S+$', '', module.says, flags=re.M).strip()
    parts = [f'---\ntitle: {module.name}\n---', f"```python\nfrom {package}.{module.name} import {', '.join(names[:4])}{', …' if len(names) > 4 else ''}\n```"]
    if says: parts.append(says)
    if explained: parts.append(f'Explained in {explained}.')
    return '\n\n'.join(parts + [entry_markdown(e, 2, link) for e in module.entries]) + '\n'
