"""What the layers cost one by one is what the model costs as a whole."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from lightning_compress.lab.evaluation.cost import macs
from lightning_compress.lab.evaluation.profile import profile_layers
from lightning_compress.lab.models import DCGAN, VAE, RecurrentVAE


class Attending(nn.Module):
    def forward(self, x):
        return scaled_dot_product_attention(x, x, x)


PARTS = {
    "generator": lambda: DCGAN(image_size=16, width=8).parts()["generator"],
    "encoder": lambda: VAE(image_size=16, width=8).parts()["encoder"],
    "recurrent": lambda: RecurrentVAE(steps=4, features=3, hidden=8).parts()["decoder"],
    "attention": lambda: (nn.Sequential(nn.Linear(8, 8), Attending()), (torch.randn(2, 5, 8),)),
}


@pytest.mark.parametrize("name", PARTS)
def test_the_layers_sum_up_to_the_whole(name):
    module, inputs = PARTS[name]()
    module.train()
    found = profile_layers({name: (module, inputs)}, repeats=1)
    assert sum(one.macs for one in found) == macs(module, inputs) > 0
    tensors = [*module.parameters(), *module.buffers()]
    assert sum(one.bytes for one in found) == sum(t.numel() * t.element_size() for t in tensors)
    assert module.training
    assert all(one.path.startswith(name) for one in found)
    assert sum(one.ms for one in found) > 0
