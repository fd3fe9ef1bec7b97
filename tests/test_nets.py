"The nets of fnnlite: against Hugging Face's GPT-2, torch's layers, and what they are to compute."
import pytest, torch, transformers as T
from torch import nn
from fnnlite import CrossEntropy, Model, SGD
from fnnlite.nets.pictures import ResBlock, resnet
from fnnlite.nets.texts import CharLSTM, GPT
from helpers import close, rand

T.logging.set_verbosity_error()
T.logging.disable_progress_bar()

@pytest.fixture
def theirs(tmp_path):
    torch.manual_seed(0)
    net = T.GPT2LMHeadModel(T.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=None, eos_token_id=None)).eval()
    net.save_pretrained(tmp_path)
    return net,tmp_path

def test_gpt_is_gpt2(theirs):
    "Published weights load, under their names; scores and gradients are theirs; what it writes, too."
    net,folder = theirs
    gpt,ids = GPT.from_folder(folder),torch.randint(0, 50, (2, 9))
    assert {f'transformer.{n}' for n in gpt.state_dict()}=={*net.state_dict()}-{'lm_head.weight'}
    gpt,net = gpt.double(),net.double()
    want,g = net(ids).logits,rand(2, 9, 50)
    out = Model(gpt)(ids)
    close(out, want, rtol=1e-10, atol=1e-12)
    out.backward(g)
    want.backward(g)
    theirs = dict(net.transformer.named_parameters())
    for n,p in gpt.named_parameters(): close(p.grad, theirs[n].grad, rtol=1e-9, atol=1e-11)
    assert torch.equal(gpt.generate(ids[:1], 8, temperature=0), net.generate(ids[:1], max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=50,
        attention_mask=torch.ones_like(ids[:1])))

def test_gpt_folder_of_another_net(theirs):
    _,folder = theirs
    T.BertConfig().save_pretrained(folder)
    with pytest.raises(ValueError, match="of a 'bert', expected 'gpt2'"): GPT.from_folder(folder)

def test_sampling():
    torch.manual_seed(0)
    gpt,ids = GPT(20, 8, 1, 2, 8).train(),torch.zeros(1, 1, dtype=torch.long)
    a,b,c = (gpt.generate(ids, 20, seed=s) for s in (1,1,2))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape==(1,21) and gpt.training
    likely = {gpt.eval()(ids)[0,-1].topk(2).indices.tolist()[i] for i in (0,1)}
    assert {gpt.generate(ids, 1, top_k=2, seed=s)[0,-1].item() for s in range(20)}==likely
    state = torch.get_rng_state()
    gpt.generate(ids, 3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)

def test_resnet():
    "Blocks halve the picture, odd sizes up; a block of one size adds to its input as it is."
    x = torch.randn(2, 1, 28, 28)
    net = resnet()
    shapes = []
    for layer in net: shapes.append((x := layer(x)).shape)
    assert [s[1:] for s in shapes[:5]]==[(8,28,28),(16,14,14),(32,7,7),(64,4,4),(64,2,2)] and shapes[-1]==(2,10)
    assert isinstance(ResBlock(4, 4).fit, nn.Identity) and resnet(3, 5)(torch.randn(2, 3, 40, 33)).shape==(2,5)

@pytest.mark.parametrize('net,batch', [(lambda: resnet(widths=(4,8)), lambda: (torch.randn(16, 1, 8, 8), torch.arange(16)%10)),
    (lambda: CharLSTM(10, 8, 16), lambda: [t:=torch.randint(0, 10, (4, 9)), t.roll(-1, 1)]),
    (lambda: GPT(10, 9, 1, 2, 16), lambda: [t:=torch.randint(0, 10, (4, 9)), t.roll(-1, 1)])], ids=['resnet','lstm','gpt'])
def test_nets_learn_a_batch_by_heart(net, batch):
    torch.manual_seed(0)
    model,(x,y) = Model(net(), CrossEntropy()),batch()
    opt,losses = SGD(model.parameters(), lr=.1, momentum=.9),[]
    for _ in range(60):
        losses.append(model(x, y).item())
        model.backward()
        opt.step()
        opt.zero_grad()
    assert losses[-1]<losses[0]/2
