"""What the heads make a loss of, on packed batches of images of several shapes."""

import pytest
import torch

from rope_mm.data.documents import Visual
from rope_mm.losses import energy_score
from rope_mm.models import RopeMMForConditionalGeneration, RopeMMProcessor, load_tokenizer, read_config
from rope_mm.training.collator import Packer
from rope_mm.training.image_heads import IMAGE_HEADS, EnergyConfig, FlowConfig, near_noise

ENERGY = IMAGE_HEADS["energy"]
SIZES = ((4, 4), (4, 8), (8, 4))  # pixels y, x: 4, 8 and 8 patches of 2


def pixels(*shape, seed):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def documents():
    """Two documents: an image and a video; an image between texts."""
    video = Visual(pixels(2, 1, *SIZES[2], seed=3), generate=True)
    first = ["a", Visual(pixels(1, *SIZES[0], seed=1), generate=True), "b", video]
    return [first, ["c", Visual(pixels(1, *SIZES[1], seed=2), generate=True), "d"]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = read_config(hidden_size=32, intermediate_size=48, patch_size=2)
    return RopeMMForConditionalGeneration(config).eval()


def pack(model, samples=2, sample_time=ENERGY.sample_time):
    processor = RopeMMProcessor.from_config(model.config, load_tokenizer())
    packer = Packer(processor, 200, sample_time, samples=samples)
    return packer(documents(), [torch.Generator().manual_seed(i) for i in range(2)])


def test_each_image_has_two_noisy_copies_with_noise_of_their_own_and_one_target(model):
    batch = pack(model)
    images = [4, 8, 8, 8]
    assert batch.image[batch.sample == 0].bincount().tolist() == images
    first, second = (batch.sample == number for number in (0, 1))
    assert torch.equal(batch.image[first], batch.image[second])
    assert torch.equal(batch.target[first], batch.target[second])
    assert (batch.noise[first] - batch.noise[second]).abs().min() > 0
    assert int(batch.noisy.sum()) == len(batch.noise) == 2 * sum(images)


def test_a_sample_is_what_it_would_be_without_the_others(model):
    batch, inputs = pack(model, 2, near_noise), []
    single = pack(model, 1, near_noise)
    with torch.no_grad():
        both = model(**batch.inputs())
        for number in (0, 1):
            mine = batch.sample == number
            single.noise[:], single.time[:] = batch.noise[mine], batch.time[mine]
            inputs.append(model(**single.inputs()))
    for number, alone in enumerate(inputs):
        found = both.patches[batch.noisy][batch.sample == number]
        torch.testing.assert_close(found, alone.patches[single.noisy], atol=1e-5, rtol=1e-5)
    shown = single.labels != -100
    here = batch.labels != -100
    torch.testing.assert_close(both.logits[here], inputs[0].logits[shown], atol=1e-5, rtol=1e-5)


def test_every_copy_of_an_image_has_a_time_of_its_own_which_its_patches_share(model):
    batch = pack(model, 3, near_noise)
    images = batch.image * 3 + batch.sample
    assert images.unique().tolist() == list(range(3 * 4))
    of_each = [batch.time[images == number].unique() for number in range(3 * 4)]
    assert all(len(times) == 1 for times in of_each)
    assert len(torch.cat(of_each).unique()) == 3 * 4


def test_the_times_of_the_flow_have_the_quantiles_of_their_law():
    cubic, normal = (FlowConfig(times=name, mean=-1.0, deviation=0.5) for name in ("cubic", "logit-normal"))
    levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    truth = {cubic: levels**3, normal: (-1 + 0.5 * torch.special.ndtri(levels)).sigmoid()}
    for config, quantiles in truth.items():
        times = config.sample_time(100_000, torch.Generator().manual_seed(0))
        torch.testing.assert_close(times.quantile(levels), quantiles, atol=0.006, rtol=0)


def energies(batch, generated, **settings):
    """The energy score of each image by itself, written out."""
    for number in range(int(batch.image.max()) + 1):
        mine = batch.image == number
        samples = [generated[mine & (batch.sample == sample)].flatten() for sample in (0, 1)]
        target = batch.target[mine & (batch.sample == 0)].flatten()
        yield len(target), energy_score(torch.stack(samples)[:, None], target[None], **settings)[0]


@pytest.mark.parametrize("settings", [{}, {"exponent": 0.5, "repulsion": 0.9}], ids=str)
def test_the_loss_is_the_energy_score_of_whole_images_weighed_by_their_patches(model, settings):
    batch = pack(model)
    generated = pixels(*batch.noise.shape, seed=9).double()
    exponent = settings.get("exponent", 1.0)
    parts = [
        score / size ** (exponent / 2) * 2 * size / generated.shape[1]
        for size, score in energies(batch, generated, **settings)
    ]
    assert len(parts) == 4
    found = ENERGY.loss(generated, batch, EnergyConfig(**settings))
    torch.testing.assert_close(found.double(), torch.stack(parts).sum(), atol=1e-4, rtol=1e-6)


def test_a_batch_without_images_has_an_energy_of_zero(model):
    processor = RopeMMProcessor.from_config(model.config, load_tokenizer())
    batch = Packer(processor, 20, ENERGY.sample_time, samples=2)([["text"]], [torch.Generator()])
    generated = torch.zeros(0, 4, requires_grad=True)
    loss = ENERGY.loss(generated, batch, EnergyConfig())
    loss.backward()
    assert loss.item() == 0


def test_the_head_of_a_critic_has_no_distance_as_its_loss(model):
    with pytest.raises(ValueError, match="the loss of this head is a critic's"):
        IMAGE_HEADS["adversarial"].loss(torch.zeros(1, 4), pack(model), EnergyConfig())


@pytest.mark.parametrize("wrong", [{"exponent": 2.0}, {"repulsion": 1.5}], ids=str)
def test_energy_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"energy.{next(iter(wrong))} must be"):
        EnergyConfig(**wrong)
