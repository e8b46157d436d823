"""Build the docs site into _docs/: nbdev prepares the notebooks, smalldocs renders them from the same _quarto.yml that Quarto
would read. Nothing is fetched, and no page asks another host for anything: mathematics becomes MathML here."""
import html
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

import nbdev.doclinks
from latex2mathml.converter import convert
from nbdev.config import get_config
from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
from nbdev.serve import proc_nbs
from smalldocs.cli import main as smalldocs


def prepare():
    "Notebooks → processed notebooks in _proc/, named as the API links name their pages: 01_data → data"
    refresh_quarto_yml()
    nbdev.doclinks._build_modidx()
    nbs = get_config().nbs_path
    nbdev_sidebar.__wrapped__(path=nbs, file_re=r'\.ipynb$')
    proc = Path(proc_nbs(nbs, force=True, n_workers=0))
    short = {p.name: re.sub(r'^\d+_', '', p.name) for p in proc.rglob('*.ipynb')}
    for p in [*proc.rglob('*.ipynb'), proc/'sidebar.yml']:
        text = p.read_text(encoding='utf-8')
        for old, new in short.items(): text = text.replace(old, new)
        p.write_text(text, encoding='utf-8')
        if p.name in short: p.rename(p.with_name(short[p.name]))
    return proc


def render(proc):
    "Processed notebooks → HTML"
    sys.argv = ['smalldocs', 'render', str(proc), '--quiet']
    try: code = smalldocs()
    except SystemExit as e: code = e.code
    if code: sys.exit(f'smalldocs failed: {code}')
    return proc/get_config().doc_path.name


def mathml(site):
    "TeX → MathML, which browsers draw by themselves; the script that would have fetched KaTeX goes"
    def to_mathml(m):
        display = 'block' if m[1] == 'display' else 'inline'
        return convert(html.unescape(m[2]), display=display)
    for page in site.rglob('*.html'):
        text = page.read_text(encoding='utf-8')
        text = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', to_mathml, text, flags=re.S)
        text = re.sub(r'<link[^>]*katex[^>]*>|<script[^>]*katex[^>]*>.*?</script>|<script[^>]*>[^<]*renderMathInElement[^<]*</script>', '', text)
        page.write_text(text, encoding='utf-8')


def local_links(site):
    "nbdev's links to the documentation's host become relative, so that the site works wherever it lies"
    base = re.escape(doc_base())
    for page in site.rglob('*.html'):
        up = '../'*(len(page.relative_to(site).parts)-1)
        text = page.read_text(encoding='utf-8')
        page.write_text(re.sub(rf'<a href="{base}/([^"]+)"', rf'<a href="{up}\1"', text), encoding='utf-8')


def doc_base(): return get_config().doc_host.rstrip('/') + get_config().doc_baseurl.rstrip('/')


def targets(text):
    "(tag, link) of everything that a page links to or loads; code listings do not count"
    text = re.sub(r'<pre.*?</pre>', '', text, flags=re.S)
    loaded = re.findall(r'<(script)\b[^>]*\ssrc="([^"]+)"', text)
    text = re.sub(r'<script.*?</script>', '', text, flags=re.S)
    return loaded + re.findall(r'<(\w+)\b[^>]*?\s(?:href|src)="([^"]+)"', text)


def dead_links(site):
    "(page, link) of each internal link without a target, and of each file that would come from another host"
    pages = {p.resolve(): p.read_text(encoding='utf-8') for p in site.rglob('*.html')}
    ids = {p: set(re.findall(r'\bid="([^"]+)"', text)) for p, text in pages.items()}
    for page, text in pages.items():
        for tag, link in targets(text):
            link = html.unescape(link)
            if re.match(r'[a-z+]+:|//', link):
                if tag in ('script', 'img', 'link') and not re.match(rf'data:|{re.escape(doc_base())}', link): yield page.name, link
                continue
            path, _, anchor = link.partition('#')
            path = unquote(path.split('?')[0])
            target = page if not path else (site/path.lstrip('/') if path.startswith('/') else page.parent/path).resolve()
            if target.is_dir(): target /= 'index.html'
            if not target.exists() or (anchor and unquote(anchor) not in ids.get(target, {unquote(anchor)})): yield page.name, link


def main():
    site = render(prepare())
    mathml(site)
    local_links(site)
    bad = sorted(set(dead_links(site)))
    for page, link in bad: print(f'{page}: dead or foreign: {link}', file=sys.stderr)
    if bad: sys.exit(f'{len(bad)} links of the site lead nowhere')
    docs = get_config().config_path/get_config().doc_path.name
    shutil.rmtree(docs, ignore_errors=True)
    shutil.copytree(site, docs)
    print(f'{len(list(docs.rglob("*.html")))} pages in {docs.name}/')


if __name__ == '__main__': main()
