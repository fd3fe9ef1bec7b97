"Builds the package from settings.ini; the version is read from fnnlite/__init__.py."
import configparser,re
from pathlib import Path
from setuptools import find_packages,setup

root = Path(__file__).parent
cfg = configparser.ConfigParser(delimiters=['='])
cfg.read(root/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
init = (root/cfg['lib_name']/'__init__.py').read_text(encoding='utf-8')

setup(
    name=cfg['lib_name'],
    version=re.search(r'^__version__ = "(.+)"$', init, re.M)[1],
    keywords=cfg['keywords'].split(),
    author=cfg['author'],
    license=cfg['license'],
    long_description=(root/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=find_packages(include=[cfg['lib_name']+'*']),
    package_data={cfg['lib_name']: ['mnist/*','texts/*']},
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split(), 'bench': cfg['bench_requirements'].split(),
                    'docs': cfg['docs_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split(),
                  'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]})
