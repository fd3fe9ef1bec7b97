"The site: Sphinx reads what scripts/make_site.py wrote into _proc/pages"
import re
from importlib import import_module
from importlib.resources import files
from docutils import nodes
from sphinx.addnodes import desc
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode
from fnnlite import __all__ as top
from fnnlite._modidx import d

rooms = d['syms']

project,author = 'fnnlite','The fnnlite authors'
html_title = 'fnnlite'
extensions = ['myst_nb', 'sphinx.ext.mathjax', 'sphinx_copybutton']
html_theme = 'furo'
html_static_path = ['static', str(files('mathjax')/'static'/'mathjax'/'es5'/'tex-svg.js')]
html_extra_path = ['../nbs'] # the notebooks, beside their pages
html_copy_source = html_show_sphinx = html_show_copyright = False
html_css_files = ['site.css']
mathjax_path = 'tex-svg.js' # in one file, with its fonts
nb_execution_mode = 'off'
nb_code_prompt_show,nb_code_prompt_hide = 'Show the code','Hide the code'
myst_enable_extensions = ['amsmath', 'colon_fence', 'dollarmath']
myst_heading_anchors = 3
smartquotes = False # '' is what it is
add_module_names = False
toc_object_entries_show_parents = 'hide'
suppress_warnings = ['ref.python'] # a class in an annotation whose name two rooms have
exclude_patterns = ['**.ipynb_checkpoints']

class LinkNames(SphinxPostTransform):
    "A name in backticks leads to its entry in the reference. A plain word does so where it means that entry, and isn't a name of the page's own"
    default_priority = 20
    def run(self):
        home,names = self.env.docname,{}
        for full,o in self.env.domains.python_domain.objects.items():
            if o.objtype!='module': names.setdefault(full.split('.', 3)[-1], []).append((full,o))
        code = '\n'.join(c.astext() for c in self.document.findall(nodes.literal_block))
        own = {name for names in re.findall(r'(?m)^(?:def |class )(\w+)|^(\w+) = ', code) for name in names}
        room = f"fnnlite.{home.replace('/', '.')}"
        imported = {n for line in re.findall(r'import (.*)', code) for n in re.findall(r'\w+', line)}
        if room in rooms: imported |= {*vars(import_module(room))}
        for node in [*self.document.findall(nodes.literal)]:
            name = re.sub(r'\(.*\)$', '', node.astext())
            found = names.get(name, [])
            if len(found)!=1 or isinstance(node.parent, (nodes.title,nodes.reference)): continue
            (full,o), = found
            here = o.docname==f'api/{home}' # the room of that name
            if not home.startswith('api/') and name in own and not here: continue
            if re.fullmatch('[a-z]+', node.astext()):
                if home=='api/index' or not home.startswith('api/'): known = name in imported or name in top
                else: known = name not in params(node)
                if not known: continue
            node.replace_self(make_refnode(self.app.builder, home, o.docname, o.node_id, node.deepcopy(), full))

def params(node):
    "The names of the parameters of the entries around `node`"
    while (node := node.parent) is not None:
        if isinstance(node, desc): yield from re.findall(r'\w+', node[0].astext())

class WrapFormulas(SphinxPostTransform):
    "Formulas beside one another, with \\qquad between them, stand below one another where the window is narrow"
    default_priority = 5
    def run(self):
        for node in [*self.document.findall(nodes.math_block)]:
            parts = node.astext().split(r'\qquad')
            if len(parts)==1 or any(o.count('{')!=o.count('}') or o.count(r'\begin')!=o.count(r'\end') for o in parts): continue
            each = [nodes.math('', rf'\displaystyle {o.strip()}') for o in parts]
            node.replace_self(nodes.paragraph('', '', *each, classes=['formulas']))

def setup(app):
    app.add_post_transform(LinkNames)
    app.add_post_transform(WrapFormulas)
