"The pages of the site, from the notebooks and the package, and a check of its links: `scripts/site` calls both"
import ast, os, re, shutil, sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag
from fastcore.nbio import dict2nb, mk_cell, read_nb, write_nb
from make_help import Entry, rooms, root

nbs,proc,docs = root/'nbs',root/'_proc'/'pages',root/'_docs'
texts = ['CONTRIBUTING.md', 'CHANGELOG.md', 'benchmarks/RESULTS.md'] # pages that are no notebooks

# Which pages there are

def numbered(p): return int(m[0]) if (m := re.match(r'\d+', p.stem)) else 1000
def sources():
    "Notebooks and other pages by folder, in the order of the book: the lessons, the folders of rooms, the rest"
    found = [p for ext in ('ipynb','md') for p in nbs.rglob(f'*.{ext}') if not any(o.startswith(('.','_')) for o in p.relative_to(nbs).parts)]
    folders = defaultdict(list)
    for p in sorted(found, key=lambda p: (numbered(p), p)):
        if p!=nbs/'index.ipynb': folders[p.parent.relative_to(nbs).as_posix()].append(p)
    rank = lambda folder: (not folder.startswith('lessons'), folder=='.', numbered(folders[folder][0]))
    return {folder:folders[folder] for folder in sorted(folders, key=rank)}

def page(p):
    "The page of a file, without the numbers"
    folder = p.relative_to(nbs) if nbs in p.parents else Path(p.name.lower())
    return '/'.join(re.sub(r'^\d+_', '', o) for o in folder.parts)

def linked(text, home, pages):
    "The links in `text`, which are from the folder `home`, as links between pages"
    def link(m):
        if (path := home/m[2]) and path.resolve() in pages: return f"{m[1]}](/{pages[path.resolve()]}{m[3] or ''})"
        raise FileNotFoundError(f"{home.relative_to(root)}: a link to {m[2]}, which is no page")
    return re.sub(r'(\[[^\]]*)\]\(([\w./-]+\.(?:ipynb|md))(#[^)]*)?\)', link, text)

# A page from a notebook

def anchors(code):
    "Where nbdev's index `_modidx` points to"
    for n in ast.parse(code).body:
        if isinstance(n, (ast.FunctionDef,ast.ClassDef)):
            e = Entry(n, code)
            yield from (o.name.lower() for o in (e, *e.members()))

def prepared(nb, source, pages):
    "The notebook as the site shows it: what isn't for readers left out, links between pages, an anchor before each definition"
    cells,titles = [],{h.lower().replace(' ', '-') for c in nb.cells if c.cell_type=='markdown' for h in re.findall(r'(?m)^#+ (.*)', c.source)}
    home = root if source.name=='index.ipynb' else source.parent
    for c in nb.cells:
        if c.cell_type=='markdown': cells.append(mk_cell(linked(c.source, home, pages), 'markdown'))
        if c.cell_type!='code': continue
        marks = re.findall(r'(?m)^#\s*\|\s*([\w-]+)', c.source)
        c.source = re.sub(r'(?m)^#\s*\|.*\n?', '', c.source).strip()
        if {'export','exports'} & {*marks}:
            ids = [f'<span id="{o}"></span>' for o in anchors(c.source) if o not in titles]
            if ids: cells.append(mk_cell(''.join(ids), 'markdown'))
        if 'code-fold' in marks: c.metadata['tags'] = ['hide-input'] # the solution of an exercise
        if c.source and not {'export','hide','default_exp'} & {*marks}: cells.append(c)
    if source.name!='index.ipynb': cells[0].source += f'\n\n<a class="notebook" href="{source.name}" download>This page as a notebook</a>'
    return dict2nb(nb | {'cells':cells})

def tree(caption, pages, depth=1):
    "A part of the sidebar"
    return f'```{{toctree}}\n:hidden:\n:caption: {caption}\n:maxdepth: {depth}\n\n' + '\n'.join(pages) + '\n```\n'

# The reference

def plain(text): return re.sub(r'([*_<$`[{])', r'\\\1', text)
def cell(text): return text.replace('|', '\\|')
def table(params): return '| | |\n| --- | --- |\n' + '\n'.join(f'| `{k}` | {cell(v)} |' for k,v in params.items()) + '\n' if params else ''

def message(node):
    "The text of an error, with … for what is filled in"
    if isinstance(node, ast.Constant): return str(node.value)
    if isinstance(node, ast.JoinedStr): return ''.join(o.value if isinstance(o, ast.Constant) else '…' for o in node.values)
    return '…'

def errors(entry):
    "What is raised in its code"
    raised = [n.exc for n in ast.walk(entry.node) if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call)]
    lines = {f'- `{ast.unparse(e.func)}`: {plain(message(e.args[0]))}' for e in raised if e.args}
    return 'Errors:\n\n' + '\n'.join(sorted(lines)) + '\n' if lines else ''

more = defaultdict(list) # methods that other rooms put on a class
def reference(room, e, said, rules, depth=5):
    "The entry of a function, a class or a constant"
    kind = 'class' if e.is_class else 'property' if 'property' in e.marks else 'method' if '.' in e.name else 'function' if e.is_function else 'data'
    name = e.name if e.patched else e.name.rpartition('.')[2]
    if kind=='data':
        doc = said.get(e.node.lineno, '')
        return f'{":"*depth}{{py:data}} {name}\n{doc}\n{":"*depth}\n' if doc else ''
    sign = '' if kind=='property' else e.signature()
    parts = [f'{":"*depth}{{py:{kind}}} {name}{sign}']
    if 'classmethod' in e.marks: parts.append(':classmethod:')
    if 'staticmethod' in e.marks: parts.append(':staticmethod:')
    bases = [ast.unparse(b) for b in e.node.bases] if e.is_class else []
    parts += ['', f'From {", ".join(f"`{b}`" for b in bases)}.\n' if bases else '', e.doc or plain(e.beside(said)), '',
        *rules.get((room,e.name), ()), '', table(e.params(said))]
    if kind!='class' and '.' not in e.name or kind=='method': parts.append(errors(e))
    for m in e.members():
        if not (short := m.name.rpartition('.')[2]).startswith('_') and (m.doc or m.params(said) or short in ('forward','bwd')):
            parts.append(reference(room, m, said, rules, depth-1))
    if e.patched or '.' not in e.name:
        if e.is_class and e.init(): parts.append(errors(e.init()))
        if e.is_class and e.name in more: parts.append(f"Other rooms add {', '.join(more[e.name])}.\n")
        path = room.removeprefix('fnnlite.').replace('.', '/')
        where = f'<a href="{"../"*(path.count("/")+1)}{path}.html#{e.name.lower()}">in the book</a>'
        parts.append(f'<details><summary>Source, and {where}</summary>\n\n```python\n{e.code}\n```\n\n</details>\n')
    return '\n'.join([*parts, ':'*depth, ''])

def rules_by_gradient():
    "For each rule, in words, which functions of torch's it is the gradient of"
    import fnnlite
    from fnnlite.core.rules import name_of, registry
    found,res = defaultdict(dict),{}
    for f,rule in registry.items(): found[rule.grad].setdefault(rule, []).append(name_of(f))
    for grad,rules in found.items():
        names = sorted({n for ns in rules.values() for n in ns})
        saves = sorted({f'`{r.saves}`' for r in rules if r.saves})
        res[grad.__module__,grad.__qualname__] = [f"The gradient of {', '.join(f'`{n}`' for n in names)}.", f"It reads {', '.join(saves)}." if saves else '']
    return res, fnnlite.__all__

def api():
    "The pages of the reference, and their names"
    rules,top = rules_by_gradient()
    (proc/'api').mkdir()
    pages,heads,every = [],{},[*rooms()]
    for e in (e for _,_,entries,_ in every for e in entries if e.patched): more[e.name.partition('.')[0]].append(f'`{e.name}`')
    for room,doc,entries,said in every:
        path = room.removeprefix('fnnlite.').replace('.', '/')
        file = proc/'api'/f'{path}.md'
        file.parent.mkdir(exist_ok=True)
        body = [reference(room, e, said, rules) for e in entries]
        file.write_text('\n'.join([f'# {path.replace("/", ".")}', '', doc or '', '', f'The room itself is [{path}](/{path}.ipynb).', '',
            f'```{{py:module}} {room}\n```', *body]), encoding='utf-8')
        pages.append(path)
        heads |= {e.name:(e.doc.splitlines() or [''])[0] for e in entries if e.name in top}
    rows = '\n'.join(f'| `{n}` | {cell(heads[n])} |' for n in sorted(top, key=str.lower) if n in heads)
    (proc/'api'/'index.md').write_text('# API reference\n\nWhat `from fnnlite import ...` has:\n\n| | |\n| --- | --- |\n' + rows +
        '\n\nAnd everything, by room:\n\n```{toctree}\n:maxdepth: 1\n\n' + '\n'.join(pages) + '\n```\n', encoding='utf-8')

def make():
    "All pages, in _proc/pages"
    proc.mkdir(parents=True)
    parts = sources()
    pages = {p:page(p) for p in [nbs/'index.ipynb', *(p for ps in parts.values() for p in ps), *(root/t for t in texts)]}
    assert len({*pages.values()})==len(pages), 'two pages have one name'
    for p,name in pages.items():
        (proc/name).parent.mkdir(parents=True, exist_ok=True)
        if p.suffix=='.md':
            text = p.read_text(encoding='utf-8')
            for image in re.findall(r'!\[[^\]]*\]\((\S+)\)', text): shutil.copy(p.parent/image, (proc/name).parent)
            (proc/name).write_text(linked(text, p.parent, pages), encoding='utf-8')
        else:
            nb = prepared(read_nb(p), p, pages)
            if name=='index.ipynb':
                trees = [tree('More' if f=='.' else f.capitalize(), [pages[p].rpartition('.')[0] for p in ps]) for f,ps in parts.items()]
                trees += [tree('Reference', ['api/index']), tree('Project', [pages[root/t].removesuffix('.md') for t in texts])]
                nb.cells.append(mk_cell('\n'.join(trees), 'markdown'))
            write_nb(nb, proc/name)
    api()

# The links of the finished site

class Page(HTMLParser):
    "The links and anchors of a page"
    def __init__(self, text):
        super().__init__()
        self.links,self.ids = set(),set()
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ('id','name') if attrs.get(k)}
        self.links |= {attrs[k] for k in ('href','src') if attrs.get(k)}

def check():
    "Refuse a link to a page or a place that isn't there, in the site and in `_modidx`"
    from fnnlite._modidx import d
    pages = {p.relative_to(docs).as_posix():Page(p.read_text(encoding='utf-8')) for p in docs.rglob('*.html')}
    links = {('_modidx',link) for names in d['syms'].values() for link,_ in names.values()} | {(p,link) for p,o in pages.items() for link in o.links}
    wrong = []
    for home,link in sorted(links):
        if re.match(r'\w+:|//', link): continue
        path,place = map(unquote, urldefrag(link))
        target = os.path.normpath(os.path.join(os.path.dirname(home), path.partition('?')[0])) if path else home
        if not (docs/target).is_file() or (place and target in pages and place not in pages[target].ids): wrong.append(f'{home}: {link}')
    if wrong: sys.exit('\n'.join(['these links lead nowhere:', *wrong]))
    size = sum(p.stat().st_size for p in docs.rglob('*') if p.is_file())
    print(f'{len(pages)} pages, {size/1e6:.1f} MB, {len(links)} links: _docs/index.html')

if __name__=='__main__': {'pages':make, 'check':check}[sys.argv[1]]()
