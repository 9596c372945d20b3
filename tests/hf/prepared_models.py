"""Models with weights so large that positions matter, for several tests."""

import torch


@torch.no_grad()
def enlarged(model, std=0.3):
    """The model with matrices of random numbers of this size, in evaluation."""
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(0, std)
    return model.eval()


def weighted(model):
    """The model with the same large weights at each call."""
    torch.manual_seed(0)
    return enlarged(model, 0.2)


def prepared(make):
    """A model that `make()` gives, in evaluation, with its inputs."""
    torch.manual_seed(0)
    model, inputs = make()
    return enlarged(model), inputs
