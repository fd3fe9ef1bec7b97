"Processes that do what they are asked, one at a time"
import os, sys
from multiprocessing import get_context
from unittest.mock import patch

class PeerError(Exception): "What is said of a peer that can't be measured"

def answer(conn):
    "In the process: answer calls (f, args) until nobody asks any more"
    while True:
        try: f,args = conn.recv()
        except EOFError: return
        try: res = True,f(*args)
        except Exception as e: # noqa: BLE001 it's reported, and the run goes on
            res = False,': '.join([type(e).__name__, *str(e).strip().splitlines()[:1]])
        conn.send(res)

class Worker:
    "A process that runs `worker(f, *args)`; after a crash, the next call finds a new one"
    limit = 1200 # seconds for one call
    def __init__(self, **env): self.env,self.proc = env,None

    def start(self):
        ctx = get_context('spawn')
        self.conn,theirs = ctx.Pipe()
        self.proc = ctx.Process(target=answer, args=(theirs,), daemon=True)
        with patch.dict(os.environ, self.env): self.proc.start()
        theirs.close()

    def __call__(self, f, *args):
        if self.proc is None: self.start()
        try:
            self.conn.send((f, args))
            if not self.conn.poll(self.limit): raise PeerError(f'no answer in {self.limit} s')
            ok,res = self.conn.recv()
        except (EOFError, OSError): raise PeerError(f'its process ended, exit code {self.stop()}') from None
        except PeerError:
            self.stop(0)
            raise
        if not ok: raise PeerError(res)
        return res

    def stop(self, patience=5):
        "End the process, if there is one; its exit code"
        if self.proc is None: return
        self.conn.close()
        self.proc.join(patience)
        self.proc.kill()
        self.proc.join()
        code,self.proc = self.proc.exitcode,None
        return code

    def __enter__(self): return self
    def __exit__(self, *_): self.stop()

def fresh(f, *args, **env):
    "`f(*args)` in a process of its own, with `env` added to its environment"
    with Worker(**env) as worker: return worker(f, *args)

def own_cache(folder):
    "The environment of a process whose compilers find nothing but what is in `folder`; torch keeps compiled headers with temporary files"
    return dict(TORCHINDUCTOR_CACHE_DIR=folder, XDG_CACHE_HOME=folder, TMPDIR=folder)

def say(*args): print(*args, file=sys.stderr, flush=True)
