"Nets that nobody here wrote, as they are: Hugging Face's, tiny and with random weights."
import copy
from functools import partial
import pytest, torch
import transformers as T
from fnnlite import AdamW, Model, Module, compile_step
from helpers import close, rand

T.logging.set_verbosity_error()
T.logging.disable_progress_bar()
same_as_torchs = dict(rtol=1e-9, atol=1e-10)

small = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
no_dropout = dict(hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
ids,pixels,classes = torch.randint(0, 50, (2, 9)),rand(2, 3, 32, 32),torch.tensor([0,2])
text,picture = dict(input_ids=ids, labels=ids),dict(pixel_values=pixels, labels=classes)
stages = dict(hidden_sizes=[8,16,16,16], depths=[1,1,1,1], num_labels=3)

def gpt2(): return T.GPT2LMHeadModel(T.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32,
    resid_pdrop=0., embd_pdrop=0., attn_pdrop=0., bos_token_id=0, eos_token_id=0)),text
def bert(): return T.BertForMaskedLM(T.BertConfig(**small, **no_dropout)),text
def llama(): return T.LlamaForCausalLM(T.LlamaConfig(**small, num_key_value_heads=1, tie_word_embeddings=True)),text
def t5(): return T.T5ForConditionalGeneration(T.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2,
    num_heads=2, dropout_rate=0., decoder_start_token_id=0)),text
def vit(): return T.ViTForImageClassification(T.ViTConfig(**{**small, **no_dropout}, image_size=32, patch_size=8, num_labels=3)),picture
def convnext(): return T.ConvNextForImageClassification(T.ConvNextConfig(**stages)),picture
def resnet(): return T.ResNetForImageClassification(T.ResNetConfig(embedding_size=8, **stages)),picture
def whisper():
    c = T.WhisperConfig(vocab_size=50, num_mel_bins=8, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=10, max_target_positions=16,
        pad_token_id=0, bos_token_id=0, eos_token_id=1, decoder_start_token_id=0, dropout=0.)
    return T.WhisperForConditionalGeneration(c),dict(input_features=rand(2, 8, 20), labels=ids)
nets = pytest.mark.parametrize('make', [gpt2,bert,llama,t5,vit,convnext,resnet,whisper], ids=lambda f: f.__name__)

def twins(make):
    "The net in double precision, and a copy of it for torch."
    torch.manual_seed(0)
    net,kw = make()
    net = net.double().train()
    return net,copy.deepcopy(net),kw

def same_grads(net, ref):
    for (n,p),(_,q) in zip(net.named_parameters(), ref.named_parameters(), strict=True):
        assert (p.grad is None)==(q.grad is None), n
        if q.grad is not None: torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=lambda m: f"{n}: {m}")
    for a,b in zip(net.buffers(), ref.buffers(), strict=True): close(a, b)

@nets
def test_gradients(make):
    "From a random upstream gradient on the logits, in double precision; some make their loss in single precision."
    net,ref,kw = twins(make)
    before = list(net.state_dict())
    m = Model(net)
    out,want = m(**kw),ref(**kw)
    assert type(out) is type(want) and m.layers is net
    close(out.loss, want.loss, rtol=1e-6, atol=1e-6)
    close(out.logits, want.logits, **same_as_torchs)
    g = torch.randn_like(want.logits)
    for logits in (out.logits,want.logits): logits.backward(g)
    same_grads(net, ref)
    assert list(net.state_dict())==before and all(not n._forward_hooks for n in net.modules())

@nets
def test_three_steps_and_the_files(make, tmp_path):
    net,ref,kw = twins(make)
    m = Model(net)
    opts = [AdamW(m.parameters(), lr=1e-3, weight_decay=.01, eps=1e-3),torch.optim.AdamW(ref.parameters(), lr=1e-3, weight_decay=.01, eps=1e-3)]
    for _ in range(3):
        for f,opt in zip((m,ref), opts):
            f(**kw).loss.backward()
            opt.step()
            opt.zero_grad()
    for p,q in zip(net.parameters(), ref.parameters()): close(p, q, rtol=1e-6, atol=1e-7)
    net.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path).double()
    for (n,p),(_,q) in zip(again.state_dict().items(), net.state_dict().items(), strict=True): assert torch.equal(p, q), n
    if getattr(net.config, 'tie_word_embeddings', False) and net.get_output_embeddings() is not None:
        assert net.get_output_embeddings().weight is net.get_input_embeddings().weight

class Loss(Module):
    "A net that makes its own loss, of tensors in a fixed order."
    def __init__(self, net, names): self.net,self.names = net,names
    def forward(self, *ts): return self.net(**dict(zip(self.names, ts))).loss

@pytest.mark.parametrize('make', [gpt2,bert,pytest.param(resnet, marks=pytest.mark.slow)], ids=lambda f: f.__name__)
def test_compiled(make):
    net,ref,kw = twins(make)
    m = Model(Loss(net, list(kw)))
    adam = partial(torch.optim.AdamW, lr=1e-3, weight_decay=.01, eps=1e-3)
    step,opt = compile_step(m, AdamW(m.parameters(), lr=1e-3, weight_decay=.01, eps=1e-3), compiler=False),adam(ref.parameters())
    for _ in range(3):
        loss = step(*kw.values())
        want = ref(**kw).loss
        want.backward()
        opt.step()
        opt.zero_grad()
        close(loss, want, rtol=1e-6, atol=1e-7)
    assert step.n_graphs==1 and step.why_not is None
    for p,q in zip(net.parameters(), ref.parameters()): close(p, q, rtol=1e-6, atol=1e-7)
    for p,q in zip(net.buffers(), ref.buffers()): close(p, q, rtol=1e-6, atol=1e-7)
