"""Build the docs site into _docs/: nbdev prepares the notebooks, smalldocs renders them from the same _quarto.yml that Quarto
would read. Nothing is fetched, and no page asks another host for anything: mathematics becomes MathML here."""
import html
import re
import shutil
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from latex2mathml.converter import convert
from nbdev.config import get_config, nbpath2html
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

# What smalldocs says of every nbdev site; Quarto does read these
expected = 'unknown key format-links', 'format commonmark is not built', 'format.html.html-math-method is ignored'


def page_links(text):
    "Links to notebooks under the names that their pages get, here as in nbdev and Quarto: 01_data.ipynb → data.ipynb"
    return re.sub(r'(\]\(|^\s*(?:- |href: ))([^()\s:]+\.ipynb)\b', lambda m: m[1] + nbpath2html(m[2]).with_suffix('.ipynb').as_posix(),
                  text, flags=re.M)


def colab(path):
    "Where Google's Colab opens a notebook of the repository"
    repo = get_config().git_url.removeprefix('https://github.com/')
    return f'https://colab.research.google.com/github/{repo}/blob/{get_config().branch}/{path.as_posix()}'


def rename(nb_path, proc):
    "Give a processed notebook the name of its page, which smalldocs does not read in `output-file`, and a link to Colab"
    nb, cfg = nbformat.read(nb_path, 4), get_config()
    here = cfg.nbs_path.relative_to(cfg.config_path)/nb_path.relative_to(proc)
    links = f'code-links:\n  - text: Open in Colab\n    icon: box-arrow-up-right\n    href: {colab(here)}\n'
    for c in nb.cells:
        if c.cell_type == 'raw': c.source = re.sub(r'^output-file:.*\n', links, c.source, flags=re.M)
        if c.cell_type == 'markdown': c.source = page_links(c.source)
    new = nbpath2html(nb_path).with_suffix('.ipynb')
    if new != nb_path:
        if new.exists(): sys.exit(f'{nb_path.name} and another notebook would both be the page {new.stem}.html')
        nb_path.rename(new)
    nbformat.write(nb, new)


def reading_order():
    "Chapters by their numbers, tutorials as the front page links to them; one that it does not name is an error"
    nbs = get_config().nbs_path
    front = '\n'.join(c.source for c in nbformat.read(nbs/'index.ipynb', 4).cells if c.cell_type == 'markdown')
    links = dict.fromkeys(re.findall(r'\]\(([\w/]+\.ipynb)\)', front))
    order = ['index.ipynb', *sorted(p for p in links if '/' not in p), *(p for p in links if '/' in p)]
    there = {p.relative_to(nbs).as_posix() for p in nbs.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts}
    if lost := there ^ set(order): sys.exit(f'nbs/index.ipynb should link to each notebook that there is: {", ".join(sorted(lost))}')
    return order


def sidebar():
    "The sidebar in reading order: chapters, then tutorials"
    order = reading_order()
    items = [f'      - {p}' for p in order if '/' not in p]
    items += ['      - section: Tutorials', '        contents:'] + [f'          - {p}' for p in order if '/' in p]
    return '\n'.join(['website:', '  sidebar:', '    contents:', *items, ''])


def prepare():
    "Notebooks → processed notebooks, sidebar and options in _proc/"
    cfg = get_config()
    refresh_quarto_yml()
    (cfg.nbs_path/'sidebar.yml').write_text(sidebar(), encoding='utf-8')
    proc = Path(proc_nbs(cfg.nbs_path, force=True, n_workers=0))
    for p in sorted(proc.rglob('*.ipynb')): rename(p, proc)
    rewrite(proc/'sidebar.yml', page_links)
    ini = ConfigParser(delimiters=['='])
    ini.read(cfg.config_path/'settings.ini', encoding='utf-8')
    rewrite(proc/'nbdev.yml', lambda text: text.replace('description: ""', f"description: \"{ini['DEFAULT']['description']}\""))
    return proc


def render(proc):
    "Processed notebooks → HTML; a warning is an error"
    from smalldocs.config import load
    from smalldocs.site import Site
    site = Site(load(proc), quiet=True)
    site.build()
    found = [w for w in site.warnings if not w.startswith(expected)]
    if found: sys.exit('\n'.join(['smalldocs warns:', *found]))
    return proc/get_config().doc_path.name


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


class Page(HTMLParser):
    "The ids of a page, what it links to, and what it loads"
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads, self.style = set(), [], [], False
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        at = {k: v or '' for k, v in attrs}
        self.style = tag == 'style'
        self.ids |= {at[k] for k in ('id', 'name') if k in at}
        if tag == 'a' or at.get('rel') == 'canonical': self.links += [at['href']] if 'href' in at else []
        else: self.loads += [at[k] for k in ('src', 'href', 'data', 'poster') if k in at and (k != 'data' or tag == 'object')]
        self.loads += [s.split()[0] for s in at.get('srcset', '').split(',') if s.strip()] + css_urls(at.get('style', ''))

    def handle_data(self, data):
        if self.style: self.loads += css_urls(data)

    def handle_endtag(self, tag): self.style = False


def is_dead(link, page, site, pages):
    "Does a link of a page to the site itself lead nowhere?"
    url = urlsplit(link)
    if url.scheme or url.netloc: return False
    path, anchor = unquote(url.path), unquote(url.fragment)
    target = (page if not path else site/path.lstrip('/') if path.startswith('/') else page.parent/path).resolve()
    if target.is_dir(): target /= 'index.html'
    return not target.is_file() or bool(anchor and target in pages and anchor not in pages[target].ids)


def problems(site):
    "A sentence for each internal link without a target and for each file that would come from another host"
    site = site.resolve()
    pages = {p: Page(p) for p in sorted(site.rglob('*.html'))}
    loads = {p: page.loads for p, page in pages.items()} | {p: css_urls(p.read_text(encoding='utf-8')) for p in site.rglob('*.css')}
    for p, page in pages.items():
        yield from (f'{p.relative_to(site)}: dead link: {link}' for link in page.links if is_dead(link, p, site, pages))
    for p, links in loads.items():
        for link in links:
            if re.match(r'(https?:)?//', link): yield f'{p.relative_to(site)}: comes from another host: {link}'
            elif is_dead(link, p, site, pages): yield f'{p.relative_to(site)}: missing file: {link}'


def main():
    if sys.version_info < (3, 11): sys.exit('The site needs Python 3.11 or newer, as smalldocs does')
    site = render(prepare())
    local(site)
    found = sorted(set(problems(site)))
    if found: sys.exit('\n'.join([*found, f'the site has {len(found)} dead or foreign links']))
    docs = get_config().doc_path
    shutil.rmtree(docs, ignore_errors=True)
    shutil.copytree(site, docs)
    print(f'{len(list(docs.rglob("*.html")))} pages in {docs.name}/')


if __name__ == '__main__': main()
