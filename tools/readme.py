"README.md from nbs/index.ipynb, by way of nbdev's processing and nbconvert."
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from nbdev.serve import proc_nbs


def main():
    cfg = get_config()
    nb = nbformat.read(Path(proc_nbs(cfg.nbs_path, file_glob='index.ipynb', force=True, n_workers=0))/'index.ipynb', 4)
    title = nbformat.read(cfg.nbs_path/'index.ipynb', 4).cells[0].source                # processing makes it front matter
    nb.cells = [nbformat.v4.new_markdown_cell(title)] + [c for c in nb.cells if c.cell_type != 'raw']
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'\]\((?=[\w/]+\.(?:ipynb|png)\))', '](nbs/', text)                   # links that are relative to nbs/
    text = '<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook. -->\n\n' + re.sub(r'\n{3,}', '\n\n', text.strip())
    (cfg.config_path/'README.md').write_text(text + '\n', encoding='utf-8')


if __name__ == '__main__': main()
