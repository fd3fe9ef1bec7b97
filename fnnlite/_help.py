"The comments beside the parameters, for `help`. Made by scripts/make_help.py"

params = {
 "fnnlite.core.record": {
  "tensors": {
   "o": "a tensor, or nested tuples, lists and dicts of them",
   "openly": "refuse an object of another kind that holds some?"
  },
  "const": {
   "t": "any tensor"
  },
  "as_it_is": {
   "numbers": "those in tensors too?"
  }
 },
 "fnnlite.core.rules": {
  "form_of": {
   "laid_out": "as this, if `t` is the stand-in for one that was let go"
  },
  "Rule": {
   "grad": "assigns `.g` to the arguments, from `out.g`",
   "saves": "what it reads the numbers of; None: of everything",
   "forward": "in place of the function",
   "kernel": "torch's own, for the same gradients",
   "exact": "is it meant to be the gradient?"
  },
  "gradient_of": {
   "*fs": "functions and methods of torch's, or ones of your own that are `recorded`",
   "saves": "what the rule reads: arguments, `out`, what `forward` keeps; None: all",
   "forward": "runs in place of the function, and keeps on its output what the rule needs",
   "kernel": "torch's routine: returns the first gradient, or a tuple; None: the rule does it",
   "exact": "is the rule meant to be the gradient?"
  },
  "elementwise": {
   "fs": "a function of one tensor, or several that are the same one",
   "of_inp": "its derivative, from the input",
   "of_out": "or from the output",
   "kernel": "see `gradient_of`"
  }
 },
 "fnnlite.core.backward": {
  "walk": {
   "starts": "pairs of a source, (call, output) or leaf, and the gradient to start from there",
   "calls": "of a record, to walk over; each leaves the list when its turn has come",
   "before": "is called with each call before its rule runs, and may replace `call.out.g`",
   "after": "and after it; may replace its share, the `.g` of `call.args` and `call.params`",
   "free": "keep no gradient longer than it is needed?",
   "ready": "is called with each parameter as soon as it has its `.g`",
   "returns": "the gradient of each source: (call, output) or leaf"
  },
  "publish": {
   "rec": "a record",
   "grads": "from `walk`",
   "calls": "that were walked",
   "asked": "leaves whose gradients are handed to autograd instead"
  },
  "shares": {
   "call": "of a record",
   "gs": "the gradients of its outputs; None: zeros",
   "before, after": "see `walk`",
   "returns": "a gradient for each source of the call, None for constants"
  }
 },
 "fnnlite.core.surroundings": {
  "running": {
   "within": "the `id` of the frame to stop at",
   "frame": "where to begin; default: here"
  }
 },
 "fnnlite.core.calls": {
  "Record": {
   "is_outermost": "a node of autograd's? Then `t.requires_grad` is as without a record",
   "lean": "keep only what rules read?",
   "root": "the module that is called"
  },
  "Record.backward": {
   "out": "a tensor in the record, or several",
   "g": "its gradient; default: 1, for a single number",
   "before, after": "see `walk`"
  },
  "recording": {
   "*inps": "if given, no other tensor from outside may come in, but parameters",
   "audit": "notice what is computed unseen? It takes time"
  }
 },
 "fnnlite.core.boundary": {
  "recorded_call": {
   "f": "a module, or a function",
   "*args, **kwargs": "what it gets; besides them only parameters and buffers of modules may come in",
   "returns": "what it returns, as autograd's; the record; what it returned inside of the record"
  }
 },
 "fnnlite.core.stand_ins": {
  "stand_in": {
   "module": "any module",
   "aliases": "for its parameters, and those of the modules in it",
   "called": "see `as_called`",
   "named": "its own parameters as they were at the call",
   "inside": "does it stand for a module inside of the one whose bwd runs?"
  }
 },
 "fnnlite.core.nodes": {
  "as_node": {
   "module": "with a `bwd` of its own"
  }
 },
 "fnnlite.core.module": {
  "Module": {
   "saves": "what `bwd` reads: names of arguments, `out`, what is kept on `out`; None: all",
   "exact": "is `bwd` meant to be the gradient?"
  },
  "Module.backward": {
   "g": "gradient of the output, or of each; default: its `.g`, or 1 for a single number",
   "free": "let go of each call's record as soon as the walk has passed it?",
   "ready": "is called with each parameter as soon as the walk has all of its `.g`",
   "before, after": "see `walk`"
  },
  "Module.retain": {
   "on": "or let go of what no rule will read, and of each call that is walked?"
  },
  "Module.as_nodes": {
   "on": "or the whole call as one node?"
  }
 },
 "fnnlite.core.checks": {
  "check_inp": {
   "module": "who asks",
   "inp": "its input",
   "like": "a parameter of the same dtype (autocast may mix them) and device",
   "name": "the argument's name"
  },
  "test_near": {
   "a": "a tensor, or what can become one",
   "b": "what it should be; a plain number takes `a`'s dtype",
   "rtol": "relative tolerance",
   "atol": "absolute tolerance"
  },
  "check_grads": {
   "module": "a module, which is copied, or a function",
   "*args": "its input; copied too; what is marked by `const` needs no gradient",
   "rtol": "relative tolerance",
   "atol": "absolute tolerance",
   "eps": "step of the finite differences",
   "most": "elements a tensor that finite differences try, drawn at random from more",
   "show": "print the table?",
   "hints": "for an exercise: say what is wrong, and return whether all is right"
  },
  "autograd_gap": {
   "module": "a module, which is copied, or a function",
   "*args": "its input; copied too"
  }
 },
 "fnnlite.ops.routes": {
  "amd_family": {
   "info": "what Linux says of the processor"
  },
  "onednn_is_faster": {
   "by_columns": "does the left side lie in memory by columns?"
  }
 },
 "fnnlite.ops.inits": {
  "kaiming_normal": {
   "ni": "inputs",
   "nf": "outputs",
   "nonlinearity": "what follows, as in `torch.nn.init.calculate_gain`",
   "leak": "slope below zero, for 'leaky_relu'",
   "device": "default: `torch.get_default_device()`",
   "dtype": "default: `torch.get_default_dtype()`"
  }
 },
 "fnnlite.ops.linears": {
  "Lin": {
   "w": "weights (ni,nf), or the number of inputs",
   "b": "bias (nf), or the number of outputs",
   "bias": "a bias, where the layer makes its own?",
   "nonlinearity": "what follows, for the scale of the weights (see `kaiming_normal`)",
   "device": "where to make them; default: `torch.get_default_device()`",
   "dtype": "default: `torch.get_default_dtype()`"
  }
 },
 "fnnlite.ops.activations": {
  "Relu": {
   "leak": "slope below zero",
   "sub": "subtracted from the result",
   "maxv": "the result is capped here"
  }
 },
 "fnnlite.ops.dropouts": {
  "keeping": {
   "dropout": "torch's, of any kind",
   "masked": "what it computes: the output, and the mask",
   "train": "the default of its `training`"
  }
 },
 "fnnlite.ops.embeddings": {
  "Embedding": {
   "n": "rows: indices go from 0 to n-1",
   "nf": "numbers in a row",
   "padding_idx": "a row that stays as it is, zeros",
   "std": "of the normal distribution that the rows are from",
   "device": "where to make them; default: `torch.get_default_device()`",
   "dtype": "default: `torch.get_default_dtype()`"
  }
 },
 "fnnlite.ops.normalisations": {
  "LayerNorm": {
   "shape": "of the last dimensions; an int for one",
   "eps": "added to the variance",
   "bias": "add `b`?",
   "device": "where to make them; default: `torch.get_default_device()`",
   "dtype": "default: `torch.get_default_dtype()`"
  },
  "BatchNorm": {
   "nf": "channels",
   "eps": "added to the variance",
   "momentum": "the share of a batch in the running mean and variance",
   "device": "where to make them; default: `torch.get_default_device()`",
   "dtype": "default: `torch.get_default_dtype()`"
  }
 },
 "fnnlite.ops.convolutions": {
  "Conv2d": {
   "ni": "channels in",
   "nf": "channels out: filters",
   "ks": "size of the kernel, in both directions",
   "stride": "from one place to the next",
   "padding": "zeros on each side; default: `ks//2`",
   "bias": "add a number to each channel?",
   "nonlinearity": "what follows, for the scale of the weights (see `kaiming_normal`)",
   "device": "where to make them; default: `torch.get_default_device()`",
   "dtype": "default: `torch.get_default_dtype()`"
  }
 },
 "fnnlite.ops.attentions": {
  "Attention": {
   "nf": "numbers of an item",
   "n_heads": "each with nf/n_heads of them",
   "causal": "does an item see only those before it, and itself?",
   "dropout": "of the weights of attention, in training",
   "bias": "of the linear layers",
   "device": "where to make them; default: `torch.get_default_device()`",
   "dtype": "default: `torch.get_default_dtype()`"
  }
 },
 "fnnlite.ops.recurrences": {
  "LSTM": {
   "ni": "numbers of a step",
   "nf": "numbers of a state",
   "bias": "add two biases, as torch does?",
   "device": "where to make them; default: `torch.get_default_device()`",
   "dtype": "default: `torch.get_default_dtype()`"
  },
  "LSTM.forward": {
   "inp": "(n,T,ni)",
   "h": "the state to begin with (n,nf); default: zeros",
   "c": "the memory to begin with (n,nf); default: zeros"
  }
 },
 "fnnlite.ops.losses": {
  "Loss": {
   "reduction": "'mean' or 'sum'"
  },
  "CrossEntropy": {
   "reduction": "over the items: 'mean' or 'sum'",
   "smoothing": "of the labels, 0 to 1"
  }
 },
 "fnnlite.ops.wraps": {
  "Wrap": {
   "f": "a `torch.nn.Module`, or a function of tensors"
  }
 },
 "fnnlite.nets.seeing": {
  "summary": {
   "module": "any module",
   "*inps": "its input",
   "depth": "modules to this depth, equal ones in a row as one; default: each layer"
  }
 },
 "fnnlite.nets.containers": {
  "Model": {
   "layers": "a list of modules, or one module, of torch's or one's own",
   "loss": "a module or function of output and target; None: the layers return the loss"
  }
 },
 "fnnlite.nets.tables": {
  "Model.table": {
   "*args, **kwargs": "what the model gets; without any, the table is of its last call"
  },
  "Model.blame": {
   "*args": "what the model gets",
   "against": "compare with a run in this dtype, without autocast",
   "tol": "how far off it may be, as a part of the largest number"
  }
 },
 "fnnlite.nets.pictures": {
  "mlp": {
   "widths": "from the input's to the output's",
   "dropout": "before each layer but the first"
  },
  "ResBlock": {
   "ni": "channels in",
   "nf": "channels out",
   "ks": "size of the kernels",
   "stride": "2 halves the picture"
  },
  "resnet": {
   "ni": "channels of the pictures",
   "classes": "of pictures",
   "widths": "channels of the blocks; each but the first halves the picture"
  }
 },
 "fnnlite.nets.drawings": {
  "Model.draw": {
   "*args": "what the model gets, or the input alone; without any, its last call is drawn",
   "depth": "draw modules to this depth; default: all that is in them",
   "returns": "its `save(path)` writes an SVG file"
  }
 },
 "fnnlite.nets.texts": {
  "CharLSTM": {
   "n_symbols": "that there are",
   "n_emb": "numbers of a symbol",
   "nf": "numbers of the state"
  },
  "GPT": {
   "n_symbols": "that there are",
   "n_ctx": "places that it can look at",
   "n_layers": "blocks",
   "n_heads": "in each block's attention",
   "nf": "numbers of a place",
   "dropout": "in training"
  },
  "GPT.from_folder": {
   "folder": "with `config.json` and `model.safetensors`, as Hugging Face has GPT-2"
  },
  "GPT.generate": {
   "ids": "a beginning (n,T)",
   "n": "how many symbols to add",
   "temperature": "below 1: likely ones more often; 0: always the likeliest",
   "top_k": "draw from the likeliest `top_k`; default: from all",
   "seed": "of the draws; default: torch's generator goes on"
  }
 },
 "fnnlite.nets.codes": {
  "Model.as_code": {
   "*args, **kwargs": "what the model gets",
   "returns": "a program; its `step(w, inp, targ)` returns the loss, and the gradients by name"
  }
 },
 "fnnlite.data.files": {
  "one_line": {
   "o": "a text, or what has one",
   "n": "characters at most"
  }
 },
 "fnnlite.data.digits": {
  "Mnist": {
   "x_train": "(N,784) float32",
   "y_train": "(N,) int64",
   "x_valid": "(M,784) float32",
   "y_valid": "(M,) int64"
  },
  "load_mnist": {
   "source": "a path, 'full' or 'local'; default: the sample that comes with fnnlite"
  },
  "ArrayDL": {
   "x": "inputs, (N,...)",
   "y": "targets, (N,...)",
   "bs": "rows in a batch",
   "shuffle": "a new order each epoch?",
   "device": "default: `torch.get_default_device()`",
   "seed": "of the shuffling, not negative",
   "drop_last": "leave out a last batch shorter than `bs`?"
  },
  "DataLoaders.from_arrays": {
   "x_train, y_train, x_valid, y_valid": "as in `Mnist`",
   "bs": "rows in a training batch",
   "valid_bs": "rows in a validation batch, default `2*bs`",
   "device": "default: `torch.get_default_device()`",
   "seed": "of the training set's shuffling",
   "shuffle": "shuffle the training set?",
   "drop_last": "leave out a shorter last training batch?"
  }
 },
 "fnnlite.data.images": {
  "read_image": {
   "path": "an image file of one digit, in one of the `FORMATS`",
   "returns": "(784,) float32 in [0,1]"
  }
 },
 "fnnlite.data.texts": {
  "Text": {
   "train": "the first nine tenths (N)",
   "valid": "the last tenth",
   "symbols": "every character once"
  },
  "load_text": {
   "path": "of a text file in UTF-8; default: the one in the package",
   "least": "characters that it must have",
   "most": "bytes that it may have"
  },
  "Pieces": {
   "ids": "numbers of symbols (N)",
   "T": "symbols in a piece",
   "bs": "pieces in a batch",
   "n": "batches in an epoch",
   "device": "default: `torch.get_default_device()`",
   "seed": "of the places, not negative"
  },
  "text_loaders": {
   "T": "symbols in a piece",
   "bs": "pieces in a training batch",
   "n": "batches in an epoch",
   "device": "default: `torch.get_default_device()`",
   "seed": "of the places in the training text"
  }
 },
 "fnnlite.train.optimizers": {
  "clip": {
   "params": "parameters with gradients",
   "max_norm": "the largest norm that is left alone"
  },
  "Optimizer": {
   "params": "parameters, or groups: dicts with 'params' and options of their own",
   "**options": "of all groups that don't have their own"
  }
 },
 "fnnlite.train.assumptions": {
  "Seen": {
   "varying": "options whose numbers are inputs, each as the group's index and its name",
   "fs": "functions and methods that a step calls besides"
  }
 },
 "fnnlite.train.checkpoints": {
  "write_file": {
   "path": "where to",
   "data": "all of it"
  },
  "save_tensors": {
   "path": "where to",
   "tensors": "names to tensors",
   "**about": "anything that JSON can hold"
  },
  "read_tensors": {
   "path": "a safetensors file, whoever wrote it",
   "device": "where the tensors go",
   "expected": "for the error",
   "returns": "(tensors, metadata)"
  },
  "load_tensors": {
   "path": "a file that `save_tensors` wrote",
   "device": "where the tensors go",
   "returns": "(tensors, about)"
  },
  "check_fit": {
   "have": "names to the tensors that are to be replaced",
   "tensors": "by these",
   "path": "where they came from, for the error"
  },
  "put_state": {
   "module": "a module",
   "tensors": "its `state_dict`, perhaps",
   "path": "where that came from, for the error"
  },
  "save_weights": {
   "module": "any module, torch's too",
   "path": "where to"
  },
  "load_weights": {
   "module": "any module, torch's too",
   "path": "a safetensors file, whoever wrote it"
  },
  "generators": {
   "dls": "with `train` and `valid`",
   "returns": "names to generators"
  },
  "rng_state": {
   "g": "a generator of torch's, Python's or numpy's; or the module `random` or `numpy.random`"
  },
  "set_rng_state": {
   "g": "as in `rng_state`",
   "state": "what that gave"
  }
 },
 "fnnlite.train.libraries": {
  "refuse_others": {
   "folder": "an absolute path"
  },
  "found": {
   "folder": "of libraries",
   "key": "the first part of a library's name"
  },
  "kept": {
   "folder": "of libraries",
   "key": "the first part of its name",
   "code": "the library",
   "calls": "what torch has to know of the operations of our own that it calls"
  },
  "compiler_works_in": {
   "folder": "that nobody else can write in"
  },
  "compile_library": {
   "gm": "a graph",
   "ts": "its inputs",
   "returns": "bytes of the library, and of what torch has to know of the operations of our own in it"
  },
  "library": {
   "gm": "a graph",
   "ts": "its inputs"
  }
 },
 "fnnlite.train.graphs": {
  "tidied": {
   "gm": "a graph that `make_fx` made"
  },
  "lifted": {
   "gm": "a graph that `make_fx` made"
  },
  "same_graph": {
   "a, b": "graphs"
  },
  "trace": {
   "f": "a function of tensors that returns tensors",
   "*ts": "its arguments",
   "returns": "what it returned, its graph, the graph's inputs beyond `ts`"
  },
  "changed_by": {
   "gm": "a graph",
   "start": "of its inputs, the first to look at"
  },
  "captured": {
   "f": "a function of a list of tensors, which may change them in place, on a GPU",
   "ts": "the list",
   "batch": "the indices of those that come from another place each time",
   "graph": "default: a `torch.cuda.CUDAGraph`",
   "capture": "default: `torch.cuda.graph`"
  },
  "op_by_op": {
   "gm": "a graph"
  },
  "machine_code": {
   "gm": "a graph",
   "ts": "its inputs"
  }
 },
 "fnnlite.train.compiled": {
  "CompiledStep": {
   "most": "graphs, after which it gives up",
   "model": "a `Model`, or any module whose output is a loss",
   "opt": "of `fnnlite.train.optimizers`",
   "keep": "names of modules and parameters whose gradients are put in `step.g`",
   "compiler": "machine code, or the graph's operations one by one?",
   "before, after, max_norm": "see `compile_step`"
  },
  "compile_step": {
   "model": "a `Model`, or any module whose output is a loss",
   "opt": "of `fnnlite.train.optimizers`",
   "keep": "names of parameters, and of modules for their output: `step.g` has the gradients",
   "compiler": "machine code? If not, operations one by one: no wait, but slower steps",
   "before": "a function of each call before its rule runs (see `walk`)",
   "after": "the same, after its rule; what the two do to tensors is part of the graph",
   "max_norm": "scale all gradients down together where their norm exceeds it"
  }
 },
 "fnnlite.train.callbacks": {
  "Callback": {
   "once": "events at which only the first of several processes calls it"
  },
  "OneCycle": {
   "lr": "at the top",
   "pct": "the share of the fit in which it rises",
   "div": "the start is `lr/div`",
   "div_final": "the end is `lr/div_final`"
  },
  "ClipGrads": {
   "max_norm": "the largest norm that is left alone"
  }
 },
 "fnnlite.train.resuming": {
  "on_signals": {
   "f": "a function of the number and the frame, or one of `signal`'s constants",
   "returns": "signals to what they called before"
  },
  "first_signal": {
   "f": "called with its number"
  },
  "Checkpoint": {
   "folder": "where `checkpoint.safetensors` is, or will be",
   "resume": "go on from the checkpoint in `folder`, if there is one?",
   "settings": "of the run; going on with other settings is refused"
  }
 },
 "fnnlite.train.learners": {
  "accuracy": {
   "pred": "scores of two classes or more, (n,C)",
   "targ": "each row's class, (n)"
  },
  "Learner": {
   "model": "a `Model`: layers and a loss",
   "dls": "`DataLoaders`, or anything with `.train` and `.valid` that give (xb,yb)",
   "opt": "an optimizer over the model's parameters, or a function of them that makes one",
   "metrics": "functions of (pred, targ), or objects like torchmetrics'",
   "cbs": "callbacks",
   "compiled": "one graph for each step? ('graph': without a compiler)",
   "before, after": "functions of each call in the walk back (see `walk`)"
  },
  "Learner.fit": {
   "n": "epochs in all; a fit that goes on from a checkpoint does those that are left"
  },
  "Learner.predict": {
   "x": "rows of inputs",
   "bs": "how many at a time"
  }
 },
 "fnnlite.train.watching": {
  "GradStats": {
   "every": "look at one batch in this many"
  }
 },
 "fnnlite.train.distributed": {
  "share": {
   "n": "rows in the batch of all",
   "rank": "which process",
   "world": "of how many",
   "returns": "first row, and the one after the last"
  },
  "own_device": {
   "kind": "'cuda', 'cpu' or another that `torch.device` knows"
  },
  "processes": {
   "device": "from `own_device`",
   "timeout": "seconds to wait for another process"
  },
  "Distributed": {
   "bucket": "send gradients together once they have so many bytes"
  }
 }
}
