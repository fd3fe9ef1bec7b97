"""Flips one bit after the other in a checkpoint and in weights that fnnlite saved, and loads what is left.

    python scripts/flip_bits.py --n 1000     # at random places, half of them in the tensors, half in the header

Prints how many were found, and how many made no difference: a file may say the same in other bytes. Exits with 1 if one made a difference and wasn't
found. Half a minute."""
import random, sys, tempfile
from functools import partial
from pathlib import Path
import torch
from fastcore.script import call_parse
from fnnlite import AdamW, CrossEntropy, DataLoaders, Learner, Lin, Model, Relu
from fnnlite.train.resuming import Checkpoint
from fnnlite.train.checkpoints import CheckpointError, load_tensors, load_weights, save_weights

def net(): return Model([Lin(20, 30), Relu(), Lin(30, 3)], CrossEntropy())

def weights(path):
    "What `load_weights` puts into a net"
    model = net()
    load_weights(model, path)
    return dict(model.state_dict()),None

@call_parse
def main(
    n:int=1000, # How many bits of each file
    seed:int=0, # Of the places
):
    rng,missed = random.Random(seed),0
    with tempfile.TemporaryDirectory() as d:
        x,y = torch.randn(64, 20),torch.randint(3, (64,))
        learn = Learner(net(), DataLoaders.from_arrays(x, y, x, y), partial(AdamW, lr=.01), cbs=[Checkpoint(d)]).fit(2)
        save_weights(learn.model, Path(d)/'weights')
        for name,load in ('checkpoint.safetensors',load_tensors),('weights',weights):
            path = Path(d)/name
            raw,(tensors,about) = path.read_bytes(),load(path)
            data = 8+int.from_bytes(raw[:8], 'little') # where the tensors begin
            for part,a,b in ('header',0,data),('tensors',data,len(raw)):
                found = same = 0
                for _ in range(n//2):
                    flipped,i = bytearray(raw),rng.randrange(8*a, 8*b)
                    flipped[i//8] ^= 1<<i%8
                    path.write_bytes(flipped)
                    try: ts,ab = load(path)
                    except CheckpointError: found += 1
                    else: same += ab==about and ts.keys()==tensors.keys() and all(ts[k].dtype==t.dtype and torch.equal(ts[k], t) for k,t in tensors.items())
                missed += n//2-found-same
                print(f'{name}, {part}: of {n//2} flipped bits {found} were found, {same} made no difference, {n//2-found-same} were missed')
    sys.exit(bool(missed))
