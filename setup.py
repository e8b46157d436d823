"The package's metadata, all of it read from settings.ini."
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], url=cfg['git_url'],
    author=cfg['author'], author_email=cfg['author_email'], keywords=cfg['keywords'].split(),
    license={'apache2': 'Apache-2.0'}[cfg['license']], license_files=['LICENSE'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']), zip_safe=False,
    python_requires='>=' + cfg['min_python'],
    install_requires=shlex.split(cfg['requirements']), extras_require={'dev': shlex.split(cfg['dev_requirements'])},
    entry_points={'console_scripts': shlex.split(cfg['console_scripts']),
                  'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    classifiers=['Programming Language :: Python :: 3', 'Framework :: Jupyter', 'Topic :: Scientific/Engineering :: Image Recognition'],
)
