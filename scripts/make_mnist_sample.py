"""Make fnnlite/mnist/sample.npz, the sample of MNIST that comes with the package, from all of MNIST.

    python scripts/make_mnist_sample.py PATH   # whatever `load_mnist` reads, such as a folder with the four IDX files
"""
import sys
import numpy as np
from pathlib import Path
from fnnlite import load_mnist

def pick(y, n, rng):
    "Indices of `n` rows, in their order, each class of `y` in proportion"
    share = np.bincount(y)*n/len(y)
    counts = share.astype(int)
    counts[np.argsort(-(share-counts), kind='stable')[:n-counts.sum()]] += 1 # largest remainders
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(y==c))[:k] for c,k in enumerate(counts)]))

def main(source, dest):
    rng = np.random.RandomState(42) # its stream is frozen, unlike default_rng's
    xt,yt,xv,yv = load_mnist(source)
    arrays = {}
    for part,x,y,n in ('train',xt,yt,10_000),('test',xv,yv,2_000):
        idx = pick(y.numpy(), n, rng)
        arrays[f'x_{part}'] = (x[idx]*255).round().byte().view(-1, 28, 28).numpy()
        arrays[f'y_{part}'] = y[idx].byte().numpy()
    dest.parent.mkdir(exist_ok=True)
    np.savez_compressed(dest, **arrays)
    print(f'{dest.name}: {dest.stat().st_size} bytes')

if __name__=='__main__': main(sys.argv[1], Path(__file__).parents[1]/'fnnlite'/'mnist'/'sample.npz')
