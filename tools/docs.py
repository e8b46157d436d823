"""Build the docs site into _docs/: nbdev prepares the notebooks, smalldocs renders them from the same _quarto.yml that Quarto
would read. Nothing is fetched, and no page asks another host for anything: mathematics becomes MathML here."""
import html
import json
import re
import shutil
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import yaml
from fastcore.nbio import read_nb
from latex2mathml.converter import convert
from nbdev.config import get_config, nbpath2html
from nbdev.doclinks import NbdevLookup
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, populate_language, rm_header_dash, strip_ansi
from nbdev.quarto import refresh_quarto_yml

from reference import names_of, page, read_modules

# What smalldocs says of every nbdev site; Quarto does read these
expected = 'unknown key format-links', 'format commonmark is not built', 'format.html.html-math-method is ignored'
parts = {'practice': 'Practice', 'experiments': 'Experiments'}          # folder below nbs/ → its part of the sidebar
exports = {'export', 'exports', 'exporti'}


# --- The order of reading

def notebooks(
    nbs:Path, # Folder of the notebooks
) -> dict: # {part: [paths below nbs]}; '' holds the front page
    "The notebooks in reading order: lessons by their numbers, the others as the front page links to them, then those that it forgets"
    there = {p.relative_to(nbs).as_posix() for p in nbs.rglob('*.ipynb') if not any(q.startswith(('.', '_')) for q in p.relative_to(nbs).parts)}
    front = '\n'.join(c.source for c in nbformat.read(nbs/'index.ipynb', 4).cells if c.cell_type == 'markdown')
    named = [p for p in dict.fromkeys(re.findall(r'\]\(([\w/]+\.ipynb)\)', front)) if p in there]
    order = ['index.ipynb', *named, *sorted(there - {*named, 'index.ipynb'})]
    lessons = sorted(p for p in order if re.match(r'\d[^/]*$', p))
    found = {'': ['index.ipynb'], 'The paper': lessons} | {title: [p for p in order if p.startswith(f'{folder}/')] for folder, title in parts.items()}
    lost = [p for p in order if not any(p in ps for ps in found.values())]
    if strange := [p for p in lost if '/' in p]: sys.exit(f'nbs/{strange[0]} lies in none of the folders {", ".join(parts)}')
    return found | {'Engine': lost}


def page_of(path):
    "The path of a notebook's page, as nbdev names it: 03_data.ipynb → data.ipynb"
    return nbpath2html(Path(path)).with_suffix('.ipynb').as_posix()


def numbers(
    order:dict, # From `notebooks`
) -> dict: # {path: number}
    "Every notebook of the book has a number, lessons first; the front page and the engine have none"
    book = [p for part, paths in order.items() if part not in ('', 'Engine') for p in paths]
    return {p: i for i, p in enumerate(book, 1)}


def title_of(nb_path):
    "A notebook's title, from its first heading"
    cells = nbformat.read(nb_path, 4).cells
    found = next((m for c in cells if c.cell_type == 'markdown' and (m := re.match(r'# (.+)', c.source))), None)
    if not found: sys.exit(f'{nb_path} has no title: its first cell should begin with "# "')
    return found[1].strip()


def sidebar(order, modules):
    "The sidebar: four parts, and the reference below the engine"
    lines = ['website:', '  sidebar:', '    contents:']
    for part, paths in order.items():
        if part: lines += [f'      - section: {part}', '        contents:']
        lines += [f"{' '*(10 if part else 6)}- {page_of(p)}" for p in paths]
    lines += ['          - api/index.md']
    for folder, title in (('engine', 'resnet_fastai.engine'), ('practice', 'resnet_fastai.practice'), ('', 'resnet_fastai')):
        inside = [m.name for m in modules if m.name.rpartition('.')[0] == folder]
        if inside: lines += [f'          - section: {title}', '            contents:'] + [f'              - api/{n}.md' for n in inside]
    return '\n'.join(lines) + '\n'


# --- Names and links

def page_links(text):
    "Links to notebooks under the names that their pages get"
    return re.sub(r'(\]\()([^()\s:]+\.ipynb)\b', lambda m: m[1] + page_of(m[2]), text)


def known_names(
    modules:list, # Of `reference.Module`
    taught:dict, # {module: page of the notebook that exports it}
) -> dict: # {name: (link from the site's root, docstring)}
    "Where each public name of the package is explained: in its notebook, or else on its reference page"
    found = {}
    for m in sorted(modules, key=lambda m: m.name in taught):               # a lesson's name wins
        page = f'/{taught[m.name]}' if m.name in taught else f'/api/{m.name}.md'
        for e in m.entries:
            found |= {n.name: (f'{page}#{n.anchor}', n.says) for n in (e, *(x for x in e.members if x.patched or page.endswith('.md')))}
    return found


def linkify(
    text:str, # Markdown
    where, # From a name to its address, or None
) -> str: # Markdown
    "Names in backticks become links, outside code, headings and what is a link already"
    keep = r'^(?:```|:::|#).*$|!?\[(?:[^\[\]]|\[[^\]]*\])*\]\([^)]*\)|<(a|summary|details|code|pre)\b.*?>.*?</\1>|``.+?``'
    def link(m):
        address = m[2] and where(m[2])
        return f'[{m[0]}]({address})' if address else m[0]
    blocks = re.split(r'^(```.*?^```\s*$)', text, flags=re.M | re.S)
    name = r'`([A-Za-z_][\w.]*)(?:\(\))?`'
    return ''.join(b if b.startswith('```') else re.sub(f'{keep}|{name}', link, b, flags=re.M) for b in blocks)


def colab(path):
    "Where Google's Colab opens a notebook of the repository"
    repo = get_config().git_url.removeprefix('https://github.com/')
    return f'https://colab.research.google.com/github/{repo}/blob/{get_config().branch}/{path}'


# --- Pages

def shown_exports(cell, module, lesson, seen):
    "An exported cell as the site shows it: its names, which lead to the reference, above the source; guides fold the source"
    names = [n for n in names_of(cell.source) if n not in seen]
    seen.update(names)
    place = lambda n: f'<span id="{n.lower()}"></span>'          # an attribute, {#…}, may have no dot and no double underscore
    links = ' '.join(f'{place(n)}[`{n}`](/api/{module}.md#{n.lower()})' for n in names)
    bar = [nbformat.v4.new_markdown_cell(f'::: {{.exported}}\n{links} [{module}](/api/{module}.md)\n:::')] if names else []
    if not lesson and 'exports' not in cell.directives_:
        summary = f"Source of {', '.join(names)}" if names else 'Source of helpers' if re.search(r'^(def|class) ', cell.source, re.M) else 'Imports'
        cell.source = f'#| code-fold: true\n#| code-summary: "{summary}"\n{cell.source}'
    return [*bar, cell]


def without_warnings(outputs):
    "Outputs without what Python's warnings wrote, which names files of the machine"
    noise = lambda o: o['output_type'] == 'stream' and o['name'] == 'stderr' and re.search(r'\S+\.py:\d+: \w*Warning', ''.join(o['text']))
    return [o for o in outputs if not noise(o)]


def default_exp(nb_path):
    "The module that a notebook exports; '' for one that exports nothing"
    found = re.search(r'^#\| *default_exp +(\S+)', '\n'.join(c.source for c in nbformat.read(nb_path, 4).cells if c.cell_type == 'code'), re.M)
    return found[1] if found else ''


def explains(
    nb_path:Path, # Of a notebook
    modules:set, # Names below the package
) -> str: # A module, or ''
    "The module that a notebook exports, or the one that a guide has its name from: practice/share.ipynb → practice.share"
    named = f'{nb_path.parent.name}.{nb_path.stem}'
    return default_exp(nb_path) or (named if named in modules else '')


def processed(
    nb_path:Path, # Of a notebook
    number:int|None, # Its place in the book
    where, # From a name to its address, or None
):
    "A notebook as the site shows it; nothing is run, the stored outputs stay"
    cfg, nb = get_config(), read_nb(nb_path)
    module, lesson, seen = default_exp(nb_path), nb_path.parent == cfg.nbs_path, set()
    NBProcessor(nb=nb, procs=[FrontmatterProc, populate_language, strip_ansi, hide_line, filter_stream_, rm_header_dash, clean_magics, hide_],
                rm_directives='quarto').process()
    cells = []
    for c in nb.cells:
        if c.cell_type == 'markdown': c.source = linkify(page_links(c.source), where)
        else: c.outputs = without_warnings(c.get('outputs', []))
        kinds = c.directives_.keys() if c.cell_type == 'code' and hasattr(c, 'directives_') else set()
        if 'default_exp' in kinds or c.cell_type == 'code' and not c.source.strip(): continue
        cells += shown_exports(c, module, lesson, seen) if exports & kinds else [c]
    front = yaml.safe_load(cells[0].source.strip('- \n'))
    front.pop('output-file', None)
    if number: front['title'] = f"{number} · {front['title']}"
    link = dict(text='Open in Colab', icon='box-arrow-up-right', href=colab(nb_path.relative_to(cfg.config_path).as_posix()))
    front |= {'code-links': [link]}
    cells[0].source = f'---\n{yaml.safe_dump(front, allow_unicode=True)}---\n'
    out = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name='python3', language='python', display_name='Python')))
    out.cells = [nbformat.from_dict({k: v for k, v in c.items() if not k.endswith('_')}) for c in cells]
    return out


def reference_pages(proc, modules, titles, where):
    "The page of each module, and one that lists them all"
    cfg, api = get_config(), proc/'api'
    api.mkdir()
    for m in modules:
        at = f'{cfg.git_url}/blob/{cfg.branch}/{m.path.relative_to(cfg.config_path).as_posix()}'
        explained = f'[{titles[m.name][0]}](/{titles[m.name][1]})' if m.name in titles else ''
        text = page(m, cfg.lib_path.name, lambda line: f'{at}#L{line}', explained)
        (api/f'{m.name}.md').write_text(linkify(text, where), encoding='utf-8')
    rows = [f"- [`{m.name}`](/api/{m.name}.md) " + m.says.split('\n')[0] for m in modules]
    head = '---\ntitle: Reference\n---\n\nWhat each module defines, from its docstrings and the comments beside its parameters.\n\n'
    (api/'index.md').write_text(head + '\n'.join(rows) + '\n', encoding='utf-8')


def prepare():
    "Notebooks and modules → pages, sidebar and options in _proc/"
    cfg = get_config()
    nbs, proc, modules = cfg.nbs_path, cfg.config_path/'_proc', read_modules(cfg.lib_path)
    refresh_quarto_yml()
    order = notebooks(nbs)
    number, paths = numbers(order), [p for ps in order.values() for p in ps]
    taught = {m: page_of(p) for p in paths if (m := default_exp(nbs/p))}
    names, fastai = known_names(modules, taught), NbdevLookup(strip_libs=('fastai', 'fastcore'), incl_libs=('fastai', 'fastcore'))
    where = lambda name: names[name][0] if name in names else fastai.doc(name) if name[:1].isupper() else None   # `Learner`, not `patch`
    shutil.rmtree(proc, ignore_errors=True)
    shutil.copytree(nbs, proc, ignore=shutil.ignore_patterns('*.ipynb', '*.md', '.*', '__pycache__', 'models', '_proc', '_docs'))
    for p in paths:
        new = proc/page_of(p)
        if new.exists(): sys.exit(f'nbs/{p} and another notebook would both be the page {new.stem}.html')
        nbformat.write(processed(nbs/p, number.get(p), where), new)
    known = {m.name for m in modules}
    titles = {m: (f"{number[p]} · {title_of(nbs/p)}" if p in number else title_of(nbs/p), page_of(p)) for p in paths if (m := explains(nbs/p, known))}
    reference_pages(proc, modules, titles, where)
    (proc/'sidebar.yml').write_text(sidebar(order, modules), encoding='utf-8')
    ini = ConfigParser(delimiters=['='])
    ini.read(cfg.config_path/'settings.ini', encoding='utf-8')
    rewrite(proc/'nbdev.yml', lambda text: text.replace('description: ""', f"description: \"{ini['DEFAULT']['description']}\""))
    return proc, names


def in_order(site):
    "The pages as the sidebar has them, by part: {part: [Page, …]}"
    from smalldocs.layout import SiteNav
    items = SiteNav(site).sidebars[0]['items']
    found = {'': [p for i in items if not i.children for p in i.pages()]}
    return found | {i.text: i.pages() for i in items if i.children}


def write_llms(site, out):
    "llms.txt in reading order"
    base, web = doc_base(), site.project.website
    lines = [f"# {web['title']}", '', f"> {web['description']}"]
    for part, pages in in_order(site).items():
        lines += ['', f"## {part or 'Start here'}", ''] + [f"- [{p.title}]({base}/{str(p.out).removesuffix('.html')}.llms.md)" for p in pages]
    (out/'llms.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    for p in out.rglob('*.llms.md'): rewrite(p, lambda text: re.sub(r'<div class="interactive".*?</script>\n*', '', text, flags=re.S))   # the picture stays


def write_search(site, out, names):
    "The search finds each definition by its name; the sources in the reference are left out, or each would be found twice"
    entries = json.loads((out/'search.json').read_text(encoding='utf-8'))
    titles = {p.out.as_posix(): p.title for p in site.pages.values()}
    found = []
    for name, (address, says) in names.items():
        page, _, anchor = address.lstrip('/').partition('#')
        href = f"{Path(page).with_suffix('.html').as_posix()}#{anchor}"
        found.append(dict(objectID=href, href=href, title=titles[href.partition('#')[0]], section=name, text=says))
    kept = [e for e in entries if not e['href'].startswith('api/')]
    (out/'search.json').write_text(json.dumps(found + kept, ensure_ascii=False), encoding='utf-8')


def render(
    proc:Path, # Pages and options, as `prepare` leaves them
    names:dict, # From `known_names`
) -> Path: # The site's folder
    "Pages → HTML; a warning is an error"
    from smalldocs.config import load
    from smalldocs.site import Site
    site = Site(load(proc), quiet=True)
    site.build()
    found = [w for w in site.warnings if not w.startswith(expected)]
    if found: sys.exit('\n'.join(['smalldocs warns:', *found]))
    out = proc/get_config().doc_path.name
    write_llms(site, out)
    write_search(site, out, names)
    return out


def rewrite(path, change):
    text = path.read_text(encoding='utf-8')
    path.write_text(change(text), encoding='utf-8')


def mathml(text):
    "TeX → MathML, which browsers draw by themselves; the script that would have fetched KaTeX goes"
    def to_mathml(m):
        tex = re.sub(r'(\\(?:begin|end)){aligned}', r'\1{split}', html.unescape(m[2]))
        out = convert(tex, display='block' if m[1] == 'display' else 'inline')
        if re.search(r'\\|>&<', out): sys.exit(f'no MathML for this TeX: {tex}')
        return out
    text = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', to_mathml, text, flags=re.S)
    katex = r'<link[^>]*katex[^>]*>|<script[^>]*katex[^>]*></script>|<script[^>]*>[^<]*renderMathInElement[^<]*</script>'
    return re.sub(katex, '', text)


def doc_base(): return get_config().doc_host.rstrip('/') + get_config().doc_baseurl.rstrip('/')


def api_link(link, site):
    "A link of nbdev's to a name: to the class, where a method has no heading of its own"
    path, _, anchor = link.partition('#')
    cls, _, method = anchor.rpartition('.')
    page = site/path
    if method and cls and page.is_file() and f'id="{anchor}"' not in page.read_text(encoding='utf-8'): anchor = cls
    return f'{path}#{anchor}' if anchor else path


def local(site):
    "Nothing comes from another host, and nbdev's links to the documentation's host become relative: the site works anywhere"
    for page in site.rglob('*.html'):
        up = '../'*(len(page.relative_to(site).parts)-1)
        relative = lambda m: f'{m[1]}{up}{api_link(m[2], site)}"'
        rewrite(page, lambda text: re.sub(rf'(<a [^>]*?href="){re.escape(doc_base())}/([^"]+)"', relative, mathml(text)))
    for css in site.rglob('*.css'): rewrite(css, lambda text: re.sub(r'@import url\(["\']?(https?:)?//[^)]*\);?', '', text))


def css_urls(text): return re.findall(r'(?:@import\s+(?:url\()?|url\()\s*["\']?([^"\')\s;]+)', text)


# What no reader should see: Markdown that stayed Markdown, and names and paths that a run on some machine left behind
raw_link = re.compile(r'\]\((?:https?://|#|[\w./-]+\.(?:ipynb|html|md|py|json)\b)[^)]*\)|\{#[\w.-]+\}')
leftover = re.compile(r'<[^<>]* at 0x[0-9a-f]{6,}>|\b__main__\.\w+|\S*/site-packages/\S*')


class Page(HTMLParser):
    "The ids of a page, what it links to, what it loads, its prose and its code"
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads, self.inside = set(), [], [], []
        self.prose, self.code = '', ''
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        at = {k: v or '' for k, v in attrs}
        shown = 'cell-output' in at.get('class', '') or 'div' in self.inside      # what a cell printed is no prose
        if tag in ('style', 'script', 'code', 'pre', 'textarea') or tag == 'div' and shown: self.inside.append(tag)
        self.ids |= {at[k] for k in ('id', 'name') if k in at}
        if tag == 'a' or at.get('rel') == 'canonical': self.links += [at['href']] if 'href' in at else []
        else: self.loads += [at[k] for k in ('src', 'href', 'data', 'poster') if k in at and (k != 'data' or tag == 'object')]
        self.loads += [s.split()[0] for s in at.get('srcset', '').split(',') if s.strip()] + css_urls(at.get('style', ''))

    def handle_data(self, data):
        if 'style' in self.inside: self.loads += css_urls(data)
        elif not self.inside: self.prose += data
        elif 'script' not in self.inside: self.code += data

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag: self.inside.pop()


def is_dead(link, page, site, pages):
    "Does a link of a page to the site itself lead nowhere?"
    url = urlsplit(link)
    if url.scheme or url.netloc: return False
    path, anchor = unquote(url.path), unquote(url.fragment)
    target = (page if not path else site/path.lstrip('/') if path.startswith('/') else page.parent/path).resolve()
    if target.is_dir(): target /= 'index.html'
    return not target.is_file() or bool(anchor and target in pages and anchor not in pages[target].ids)


def problems(site):
    "A sentence for each internal link without a target, each file from another host, and each piece of text that no reader should see"
    site = site.resolve()
    pages = {p: Page(p) for p in sorted(site.rglob('*.html'))}
    loads = {p: page.loads for p, page in pages.items()} | {p: css_urls(p.read_text(encoding='utf-8')) for p in site.rglob('*.css')}
    for p, page in pages.items():
        yield from (f'{p.relative_to(site)}: dead link: {link}' for link in page.links if is_dead(link, p, site, pages))
        yield from (f'{p.relative_to(site)}: a link that stayed Markdown: {m[0]}' for m in raw_link.finditer(page.prose))
        yield from (f'{p.relative_to(site)}: left by a run: {m[0]}' for m in leftover.finditer(page.prose + ' ' + page.code))
    for p, links in loads.items():
        for link in links:
            if re.match(r'(https?:)?//', link): yield f'{p.relative_to(site)}: comes from another host: {link}'
            elif is_dead(link, p, site, pages): yield f'{p.relative_to(site)}: missing file: {link}'


def main():
    if sys.version_info < (3, 11): sys.exit('The site needs Python 3.11 or newer, as smalldocs does')
    site = render(*prepare())
    local(site)
    found = sorted(set(problems(site)))
    if found: sys.exit('\n'.join([*found, f'the site has {len(found)} problems']))
    docs = get_config().doc_path
    shutil.rmtree(docs, ignore_errors=True)
    shutil.copytree(site, docs)
    print(f'{len(list(docs.rglob("*.html")))} pages in {docs.name}/')


if __name__ == '__main__': main()
