"""Build the docs site into _docs/: nbdev prepares the notebooks, smalldocs renders them from the same _quarto.yml that Quarto
would read. Nothing is fetched, and no page asks another host for anything: mathematics becomes MathML here."""
import html
import re
import shutil
import sys
from pathlib import Path

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
    "Processed notebooks → HTML; a warning is a failure"
    sys.argv = ['smalldocs', 'render', str(proc), '--strict']
    try: smalldocs()
    except SystemExit as e:
        if e.code: sys.exit(f'smalldocs failed with exit code {e.code}')
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


def dead_links(site):
    "(page, link) of each internal link without a target, and of each file that would come from another host"
    pages = {p.relative_to(site).as_posix(): p.read_text(encoding='utf-8') for p in site.rglob('*.html')}
    ids = {name: set(re.findall(r'\bid="([^"]+)"', text)) for name, text in pages.items()}
    base = get_config().doc_host.rstrip('/') + get_config().doc_baseurl
    for name, text in pages.items():
        body = re.sub(r'<script.*?</script>', '', text, flags=re.S)
        for tag, link in re.findall(r'<(\w+)\b[^>]*?\s(?:href|src)="([^"]+)"', re.sub(r'<pre.*?</pre>', '', body, flags=re.S)) + re.findall(r'<(script)\b[^>]*\ssrc="([^"]+)"', text):
            link = html.unescape(link)
            if tag in ('link', 'script', 'img') and re.match(r'(https?:)?//', link) and not link.startswith(base): yield name, link
            if link.startswith(base): link = '/' + link[len(base):].lstrip('/')
            if re.match(r'[a-z+]+:|//', link): continue
            path, _, anchor = link.partition('#')
            path = path.split('?')[0]
            target = name if not path else (site/path.lstrip('/') if path.startswith('/') else (site/name).parent/path)
            if path: target = target.resolve().relative_to(site.resolve()).as_posix() if target.resolve().is_relative_to(site.resolve()) else link
            if path and (site/target).is_dir(): target = (Path(target)/'index.html').as_posix()
            if not (site/target).exists() or (anchor and target in ids and anchor not in ids[target]): yield name, link


def main():
    site = render(prepare())
    mathml(site)
    bad = sorted(set(dead_links(site)))
    for page, link in bad: print(f'{page}: dead or foreign: {link}', file=sys.stderr)
    if bad: sys.exit(f'{len(bad)} links of the site lead nowhere')
    docs = get_config().config_path/get_config().doc_path.name
    shutil.rmtree(docs, ignore_errors=True)
    shutil.copytree(site, docs)
    print(f'{len(list(docs.rglob("*.html")))} pages in {docs.name}/')


if __name__ == '__main__': main()
