"Write fnnlite/_help.py, from which `help(f)` has the comments beside the parameters; scripts/make_site.py reads the same here."
import ast, io, json, re, tokenize
from pathlib import Path

root = Path(__file__).parent.parent

def comments(source):
    "The comments in `source`, by line"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]:t.string.lstrip('# ') for t in tokens if t.type==tokenize.COMMENT}

class Entry:
    "A function, class, method or constant in the source of a room"
    def __init__(self, node, source, owner=''):
        self.marks = [ast.unparse(d) for d in getattr(node, 'decorator_list', [])]
        self.patched = 'patch' in self.marks # a method, outside its class
        if self.patched: owner = ast.unparse(node.args.args[0].annotation)+'.'
        self.node,self.source,self.lines = node,source,source.splitlines()
        self.name = owner+(node.name if hasattr(node, 'name') else ast.unparse(node.targets[0]))
        self.is_class,self.is_function = isinstance(node, ast.ClassDef),isinstance(node, ast.FunctionDef)
        self.doc = ast.get_docstring(node) or '' if self.is_class or self.is_function else ''

    @property
    def code(self):
        first = min(n.lineno for n in [self.node, *getattr(self.node, 'decorator_list', [])])
        return '\n'.join(self.lines[first-1:self.node.end_lineno])

    def beside(self, said):
        "The comment on the line of a function's `def`, which rules have in place of a docstring"
        line = self.node.lineno
        return said.get(line, '') if self.is_function and line<self.node.body[0].lineno and not self._is_of_parameters(line) else ''

    def members(self):
        "The methods of a class"
        return [Entry(n, self.source, self.name+'.') for n in self.node.body if isinstance(n, ast.FunctionDef)] if self.is_class else []
    def init(self): return next((m for m in self.members() if m.name.endswith('.__init__')), None)

    def signature(self):
        "The arguments, as they are written"
        if self.is_class: return init.signature() if (init := self.init()) else ''
        bound = '.' in self.name and 'staticmethod' not in self.marks
        args = ast.unparse(self.node.args)
        if bound: args = args.partition(', ')[2]
        return f"({args})" + (f' -> {ast.unparse(self.node.returns)}' if self.node.returns else '')

    def params(self, said):
        "The comment of each parameter, or field of a class; parameters on one line share theirs. `said`: the file's comments"
        if self.is_class:
            fields = [n for n in self.node.body if isinstance(n, (ast.AnnAssign,ast.Assign)) and n.lineno in said]
            names = [(ast.unparse(getattr(n, 'target', None) or n.targets[0]),n.lineno) for n in fields]
            return {n:said[l] for n,l in names if not n.startswith('_')} | (init.params(said) if (init := self.init()) else {})
        a = self.node.args
        args = [o for o in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg) if o and o.arg!='self']
        names = {}
        for o in args: names.setdefault(o.end_lineno, []).append(('*' if o is a.vararg else '**' if o is a.kwarg else '')+o.arg)
        res = {}
        for line,ns in names.items():
            above = line-1
            while above>self.node.lineno and self.lines[above-1].lstrip().startswith('#'): above -= 1
            text = said.get(line) if self._is_of_parameters(line) else None
            text = text or ' '.join(said[i] for i in range(above+1, line))
            if text: res[', '.join(ns)] = text
        if self.node.returns and self.node.returns.lineno in said and self.lines[self.node.returns.lineno-1].lstrip().startswith(')'):
            res['returns'] = said[self.node.returns.lineno]
        return res

    def _is_of_parameters(self, line): # and not of a body on the same line
        return line<self.node.body[0].lineno and self.lines[line-1].partition(' # ')[0].rstrip()[-1:] in ',('

def rooms():
    "Of each module that is exported from a notebook, in the order of the book: its name, its docstring, what its `__all__` names, and its comments"
    sources = [(p,p.read_text(encoding='utf-8')) for p in (root/'fnnlite').rglob('*.py')]
    made = [(int(m[1]),p,source) for p,source in sources if (m := re.search(r'File to edit: .*?(\d+)_\w+\.ipynb', source))]
    for _,p,source in sorted(made):
        tree = ast.parse(source)
        entries = {e.name:e for n in tree.body if hasattr(n, 'name') or isinstance(n, ast.Assign) for e in [Entry(n, source)]}
        names = ast.literal_eval(entries['__all__'].node.value)
        entries = [e for e in entries.values() if e.name in names or e.patched]
        yield '.'.join(p.relative_to(root).with_suffix('').parts),ast.get_docstring(tree),entries,comments(source)

def helps():
    "The parameters' comments by room and name; the commands have them in their --help"
    res = {}
    for room,_,entries,said in rooms():
        if room=='fnnlite.commands': continue
        for e in entries:
            for o in (e, *e.members()) if not e.name.endswith('.__init__') else ():
                if (e.is_class or e.is_function) and not o.name.endswith('.__init__') and (params := o.params(said)):
                    res.setdefault(room, {})[o.name] = params
    return res

def text(): return f'"The comments beside the parameters, for `help`. Made by scripts/make_help.py"\n\nparams = {json.dumps(helps(), indent=1)}\n'

if __name__=='__main__': (root/'fnnlite'/'_help.py').write_text(text(), encoding='utf-8')
