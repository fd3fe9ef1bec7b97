import torch

torch.set_num_threads(1) # the nets are small; on a busy machine two threads spend their time waiting for each other
