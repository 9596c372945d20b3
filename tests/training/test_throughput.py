"""Operations against torch's own count of them; and which events of a profile are rotation."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from rope_mm.models import RopeMMForConditionalGeneration, read_config
from rope_mm.training.rotary_profile import WARM, Share, measure_share, profiled, rotary_share
from rope_mm.training.throughput import FlopCounter, Speed, count_pairs, peak_flops


def make(**settings):
    config = read_config(hidden_size=32, intermediate_size=48, vocab_size=64, image_token_id=63, **settings)
    model = RopeMMForConditionalGeneration(config)
    model.set_attn_implementation("eager")  # whose products torch counts on every device
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_flops_of_text_are_those_that_torch_counts(tied, kv_heads):
    model = make(tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    ids = torch.randint(60, (2, 7))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    unused = [*model.patch_head.parameters(), model.model.embed.patches.weight]  # no patch came
    norms = [p for name, p in model.named_parameters() if "norm" in name and "patch_head" not in name]
    rest = sum(p.numel() for p in [*unused, *norms])  # of which torch counts no product
    mine = FlopCounter.of(model).flops(14, 2 * 7 * 7) - 6 * 14 * rest
    assert mine == pytest.approx(counter.get_total_flops(), rel=2e-4)  # it counts the angles, too


def test_attention_pairs_are_counted_within_documents_and_without_padding():
    document = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 2, 2, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    assert count_pairs(document, mask) == 4 + 9 + 1 + 4 + 9


def test_utilisation_is_the_share_of_a_known_peak():
    assert Speed(None)(100, 0, 4e9, 2.0) == {"tokens/s": 50.0, "GFLOP/s": 2.0}
    assert Speed(8e9)(100, 6, 4e9, 2.0) == {"tokens/s": 50.0, "images/s": 3.0, "MFU": 0.25}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Some GPU", None),
    ],
)
def test_the_peak_is_looked_up_by_the_name_of_the_gpu(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None


def test_a_rotation_within_a_rotation_counts_once():
    def event(name, total, own, parent=None):
        return SimpleNamespace(
            name=name, cpu_time_total=total, self_cpu_time_total=own, cpu_parent=parent,
            device_type=DeviceType.CPU,
        )  # fmt: skip

    step = event("step", 1000, 600)
    back = event("ApplyRotaryBackward", 300, 100, step)
    between = event("aten::any", 200, 0, back)
    inner = event("ApplyRotary", 200, 200, between)
    angles = event("rotary angles", 100, 100, step)
    share = rotary_share([step, back, between, inner, angles], 2, "cpu")
    assert share == Share(0.2, 0.5, "cpu")
    assert "40.0% (0.20 of 0.50 ms a step" in str(share)


def test_a_step_of_the_model_shows_its_rotations_and_compiled_ones_are_not_guessed():
    model, ids = make(), torch.randint(60, (1, 8))
    share = measure_share(lambda: model(ids, labels=ids).loss.backward(), 1)
    assert 0 < share.rotary < share.total
    assert "unknown; compiled code" in str(measure_share(lambda: torch.ones(3).sum(), 1))


def test_profiled_steps_are_steps_of_the_run():
    said, taken = [], []

    def step(number):
        taken.append(number)
        return number * 2

    call = profiled(step, 2, said.append)
    assert [call(n) for n in range(WARM + 4)] == [2 * n for n in range(WARM + 4)]
    assert taken == list(range(WARM + 4))
    assert len(said) == 1
