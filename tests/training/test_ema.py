import pytest
import torch
from torch import nn

from rope_mm.training.ema import Ema


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)


def train(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
        model(torch.randn(8, 3, dtype=next(model.parameters()).dtype))


@pytest.mark.parametrize("warm_up", [True, False])
def test_the_average_follows_the_formula(warm_up):
    model = net()
    ema = Ema(model, decay=0.5, warm_up=warm_up)
    expected = [p.detach().double() for p in model.parameters()]
    for n in range(12):
        train(model)
        d = min(0.5, (1 + n) / (10 + n)) if warm_up else 0.5
        expected = [
            d * e + (1 - d) * p.detach().double() for e, p in zip(expected, model.parameters(), strict=True)
        ]
        ema.update(model)
    torch.testing.assert_close([p.double() for p in ema.model.parameters()], expected)


def test_the_average_has_the_buffers_of_the_model():
    model = net()
    ema = Ema(model)
    train(model)
    ema.update(model)
    torch.testing.assert_close(list(ema.model.buffers()), list(model.buffers()), rtol=0, atol=0)


def test_the_average_of_a_bfloat16_model_is_kept_in_float32():
    model = net(torch.bfloat16)
    ema = Ema(model, decay=0.999, warm_up=False)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
        for p in ema.model.parameters():
            p.fill_(0.0)
    for _ in range(10):
        ema.update(model)
    averages = list(ema.model.parameters())
    assert averages
    for p in averages:
        torch.testing.assert_close(p, torch.full_like(p, 1 - 0.999**10, dtype=torch.float32))


def test_a_model_in_float64_is_averaged_in_float64():
    assert next(Ema(net(torch.float64)).model.parameters()).dtype == torch.float64


def test_the_copy_is_in_eval_mode_without_gradients_and_leaves_the_model_alone():
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    ema = Ema(model)
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())
    assert model.training and all(p.requires_grad for p in model.parameters())
    ema.update(model)
    torch.testing.assert_close([p.detach() for p in model.parameters()], before, rtol=0, atol=0)


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    ema = Ema(model)
    ema.update(model)
    assert ema.model[0].weight is ema.model[1].weight


def test_the_average_resumes_from_its_state():
    model = net()
    whole = Ema(model)
    train(model)
    whole.update(model)
    resumed = Ema(net())
    resumed.load_state_dict(whole.state_dict())
    train(model)
    whole.update(model)
    resumed.update(model)
    assert resumed.updates == 2
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 999])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(ValueError, match="decay must be in"):
        Ema(net(), decay=decay)
