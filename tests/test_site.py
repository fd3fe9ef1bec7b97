"The site, built by its one command and looked at in a browser."
import html, os, re, shutil, subprocess, sys, threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
import pytest

root = Path(__file__).parent.parent
browsers = 'chromium','chromium-browser','google-chrome','/Applications/Google Chrome.app/Contents/MacOS/Google Chrome'
chromium = next(filter(None, map(shutil.which, browsers)), None)
missing = [n for n in ('sphinx','myst_nb','furo','sphinx_copybutton','mathjax') if not find_spec(n)]+['a chromium']*(not chromium)
needed = pytest.mark.skipif(bool(missing) and os.environ.get('CI')!='true', reason=f"the site needs {', '.join(missing)}: pip install '.[docs]'")

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@needed
def test_site(tmp_path):
    "One command builds it; search finds, a formula is drawn, a rule's code is there, and on a phone nothing but code scrolls sideways."
    if 'SITE_IS_BUILT' not in os.environ: # as CI has done it, by the README's line
        p = subprocess.run([root/'scripts'/'site'], env={**os.environ, 'VIRTUAL_ENV':sys.prefix}, capture_output=True, text=True)
        assert p.returncode==0, p.stdout+p.stderr
    site = tmp_path/'site'
    shutil.copytree(root/'_docs', site)
    for f in site.rglob('*.html'):
        shown = html.unescape(re.sub('<[^>]+>', '', f.read_text(encoding='utf-8')))
        assert '#| export' not in shown and 'In [' not in shown, f
    assert sum(f.stat().st_size for f in site.rglob('*'))<30e6
    pages = sorted(f'/{f.relative_to(site)}' for f in site.rglob('*.html') if not f.name.startswith(('search','genindex','py-modindex')))
    (site/'phone.html').write_text((root/'tests'/'phone.html').read_text().replace('PAGES', str(pages)))
    server = ThreadingHTTPServer(('127.0.0.1',0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def seen(path, seconds=10):
        "The page as the browser has made it"
        alone = '''--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
            --disable-component-update --disable-sync --dump-dom'''.split()
        return subprocess.run([chromium, *alone, f'--user-data-dir={tmp_path/"browser"}', f'--virtual-time-budget={seconds*1000}',
            f'http://127.0.0.1:{server.server_port}/{path}'], capture_output=True, text=True, check=True).stdout
    try:
        for word,entry in ('backward','api/core/module.html#fnnlite.core.module.Module.backward'), ('check_grads','api/core/checks.html'), (
                'gradient_of','api/core/rules.html#fnnlite.core.rules.gradient_of'):
            results = re.findall(r'<li[^>]*>\s*<a href="([^"?]*)', seen(f'search.html?q={word}'))
            assert any(entry in r for r in results), f"{word}: {results}"
        linears = seen('ops/linears.html')
        assert '<mjx-container' in linears and 'Math input error' not in linears and 'data-mjx-error' not in linears
        assert 'def lin_grad(out, inp, w, b=None):' in html.unescape(re.sub('<[^>]+>', '', linears))
        report = re.search('(?s)<pre>(.*?)</pre>', seen('phone.html', 600))[1]
        assert report.strip()==f'looked at {len(pages)}', report
    finally: server.shutdown(), server.server_close()
