"The package's metadata, all of it read from settings.ini."
import re
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']


def readme():
    "README.md with links that work away from the repository too"
    def absolute(m): return f"{m[1]}[{m[2]}]({cfg['git_url']}/{'raw' if m[1] else 'blob'}/{cfg['branch']}/{m[3]})"
    text = (here/'README.md').read_text(encoding='utf-8')
    return re.sub(r'(!?)\[([^\]]*)\]\((?!#|\w+:)([^)\s]+)\)', absolute, text)


setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], url=cfg['git_url'],
    author=cfg['author'], author_email=cfg['author_email'], keywords=cfg['keywords'].split(),
    license_expression={'apache2': 'Apache-2.0'}[cfg['license']], license_files=['LICENSE'],
    long_description=readme(), long_description_content_type='text/markdown',
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']), zip_safe=False,
    python_requires='>=' + cfg['min_python'],
    install_requires=shlex.split(cfg['requirements']),
    extras_require={k: shlex.split(cfg[k + '_requirements']) for k in ('app', 'clean', 'dev', 'heic', 'hub', 'onnx')},
    entry_points={'console_scripts': shlex.split(cfg['console_scripts']),
                  'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    classifiers=['Programming Language :: Python :: 3', 'Framework :: Jupyter', 'Topic :: Scientific/Engineering :: Image Recognition'],
)
