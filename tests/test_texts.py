"A text as numbers, and the command that trains a net to write."
import csv, re
import pytest, torch
from fnnlite import commands as cli
from fnnlite.data.files import DataError
from fnnlite.data.texts import Pieces, load_text, text_loaders
from fnnlite.train.checkpoints import load_tensors
from test_cli import one_line, run, tidy # noqa: F401 (fixtures)

def test_the_packages_text():
    text = load_text()
    assert (len(text.train),len(text.valid),len(text.symbols))==(1_003_854,111_540,65)
    assert text.decode(text.train[:14])=='First Citizen:' and torch.equal(text.encode('First'), text.train[:5])
    with pytest.raises(ValueError, match="got 'é'"): text.encode('café')

def test_a_text_of_ones_own(tmp_path):
    "In any script; a mark at the start of the file is no character."
    (tmp_path/'t.txt').write_bytes('\ufeffπάντα ῥεῖ 🌊\r\n'.encode()*100)
    text = load_text(tmp_path/'t.txt', least=10)
    assert text.decode(torch.cat([text.train, text.valid])).startswith('πάντα ῥεῖ 🌊\r\n') and len(text.valid)==-(-len(text.train)//9)

@pytest.mark.parametrize('data,said', [(b'short', '5 characters'), (b'\xff'*2000, 'UnicodeDecodeError'), (b'x'*5000, 'a larger file'),
    (''.join(map(chr, range(40, 5800))).encode(), 'different characters'), (b'', '0 characters')])
def test_files_that_are_no_text(data, said, tmp_path):
    (tmp_path/'t').write_bytes(data)
    with pytest.raises(DataError, match=said) as e: load_text(tmp_path/'t', most=4000 if data[:1]==b'x' else 10**6)
    assert str(e.value).isprintable() and len(str(e.value))<=600

def test_no_regular_file(tmp_path):
    with pytest.raises(DataError, match='directory'): load_text(tmp_path)
    with pytest.raises(DataError, match='No such file'): load_text(tmp_path/'no')

def test_pieces():
    "Each with its continuation; the same ones for a seed and an epoch, and others for others."
    ids = torch.arange(1000)
    a,b = Pieces(ids, 8, 4, 5, seed=1),Pieces(ids, 8, 4, 5, seed=2)
    first,again,other = list(a),list(a),list(b)
    for xb,yb in first: assert xb.shape==(4,8) and torch.equal(xb+1, yb) and torch.equal(xb[:,1:], xb[:,:-1]+1)
    assert len(first)==len(a)==5 and not torch.equal(first[0][0], again[0][0]) and not torch.equal(first[0][0], other[0][0])
    a.epoch = 0
    assert torch.equal(a.one_batch()[0], first[0][0]) and a.epoch==0
    ends = torch.cat([xb.reshape(-1) for _ in range(200) for xb,_ in Pieces(torch.arange(12), 8, 4, 1, seed=_)])
    assert {*ends.tolist()}=={*range(11)} # all places but the last, which is a target only
    with pytest.raises(ValueError, match='expected more than T'): Pieces(ids[:8], 8, 4, 5)

def test_all_of_the_held_out_part_is_validated_with():
    text = load_text()
    valid = text_loaders(text, T=64).valid
    x,y = (torch.cat([b[i].reshape(-1) for b in valid]) for i in (0,1))
    assert len(text.valid)-len(x)<=64 and torch.equal(x, text.valid[:len(x)]) and torch.equal(y, text.valid[1:len(x)+1])
    with pytest.raises(ValueError, match='held-out part'): text_loaders(text._replace(valid=text.valid[:64]))

@pytest.fixture
def small(tmp_path):
    (tmp_path/'t.txt').write_text('the cat sat on the mat. '*200)
    return ['--data', tmp_path/'t.txt', '--steps', 600, '--bs', 4, '--places', 16, '--blocks', 1, '--heads', 2, '--width', 16, '--lr', .01, '--n', 40]

def test_it_learns_a_text_and_writes_it(run, small, tmp_path): # noqa: F811
    code,out,err = run('fnnlite_write', *small, '--out', tmp_path/'out', '--temperature', .1)
    assert (code,err)==(0,'') and 'the cat sat on the mat.' in out
    rows = list(csv.DictReader((tmp_path/'out'/'history.csv').read_text().splitlines()))
    assert len(rows)==3 and float(rows[-1]['valid_loss'])<.3 and f"{float(rows[-1]['valid_loss']):.3f} nats" in out
    assert float(re.search(r'at most (\de-\d+)', out)[1])<1e-9

@pytest.mark.slow
def test_a_stopped_run_goes_on(run, small, tmp_path, monkeypatch): # noqa: F811
    "And ends with the same weights, bit by bit."
    assert run('fnnlite_write', *small, '--out', tmp_path/'whole')[0]==0
    save = cli.Checkpoint.save
    def once(self):
        save(self)
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(cli.Checkpoint, 'save', once)
        assert run('fnnlite_write', *small, '--out', tmp_path/'stopped')[0]==130
    assert run('fnnlite_write', *small, '--out', tmp_path/'stopped', '--resume')[0]==0
    a,b = (load_tensors(tmp_path/o/'model.safetensors')[0] for o in ('whole','stopped'))
    assert all(torch.equal(a[k], b[k]) for k in a)
    one_line(run('fnnlite_write', *small, '--width', 32, '--out', tmp_path/'stopped', '--resume'), 'fnnlite_write', 'width 16, now 32')

@pytest.mark.parametrize('option,value,said', [('steps',0,'steps is 0'), ('heads',3,'multiple of n_heads'), ('dropout',1,'dropout is 1'),
    ('places',10**5,'held-out part'), ('data','/nowhere','No such file'), ('lr',-1,'lr')])
def test_bad_options(option, value, said, run, small, tmp_path): # noqa: F811
    one_line(run('fnnlite_write', *small, '--out', tmp_path/'out', f'--{option}', value), 'fnnlite_write', said)
    assert not (tmp_path/'out').exists()
