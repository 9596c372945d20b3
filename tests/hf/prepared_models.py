"""Models with weights so large that positions matter, for several tests."""

import torch


def prepared(make):
    """A model that `make()` gives, in evaluation, with its inputs."""
    torch.manual_seed(0)
    model, inputs = make()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
    return model.eval(), inputs
