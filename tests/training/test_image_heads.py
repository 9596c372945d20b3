"""What the heads make a loss of, on packed batches of images of several shapes."""

from dataclasses import replace

import pytest
import torch

from rope_mm.data.documents import Visual
from rope_mm.losses import energy_distance, energy_score, follow_field
from rope_mm.models import RopeMMForConditionalGeneration, RopeMMProcessor, load_tokenizer, read_config
from rope_mm.training.collator import Packer
from rope_mm.training.image_heads import IMAGE_HEADS, EnergyConfig, FieldConfig, FlowConfig, near_noise

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


def pack_groups(model, texts=("a", "b", "a", "b", "a", "c", "c"), size=(4, 4), samples=2):
    """Documents of an image after each text, or after a text and an image."""
    processor = RopeMMProcessor.from_config(model.config, load_tokenizer())
    made = [[text, Visual(pixels(1, *size, seed=number), generate=True)] for number, text in enumerate(texts)]
    made.append(["c", Visual(pixels(1, 4, 8, seed=9), generate=True)])
    made.append(["c", Visual(pixels(1, 4, 8, seed=10), generate=True)])
    packer = Packer(processor, 200, ENERGY.sample_time, samples=samples, conditions=True)
    return packer(made, [torch.Generator().manual_seed(number) for number in range(len(made))])


def followed(batch, generated, field, **options):
    """The loss and its gradient by the generated patches, each condition written out by itself."""
    expected, sizes, value = torch.zeros_like(generated), [], torch.zeros(())
    for condition in batch.condition.unique().tolist():
        images = (batch.condition == condition).nonzero()[:, 0].tolist()
        sizes.append(len(images))

        def vectors(patches, sample, images=images):
            mine = [patches[(batch.image == image) & (batch.sample == sample)].flatten() for image in images]
            return torch.stack(mine)

        first, second = (vectors(generated, sample).requires_grad_() for sample in (0, 1))
        real = vectors(batch.target, 0)
        for x, other, sample in ((first, second.detach(), 0), (second, first.detach(), 1)):
            found = follow_field(x, real, other, field, **options)
            share = found.loss * found.scale * len(images) / generated.shape[1]
            (gradient,) = torch.autograd.grad(share, x)
            apart = energy_distance(x.detach(), other, real) / x.shape[1] ** 0.5
            value += apart * x.numel() / generated.shape[1]
            for image, row in zip(images, gradient, strict=True):
                place = (batch.image == image) & (batch.sample == sample)
                expected[place] = row.view(-1, generated.shape[1])
    return sizes, expected, value


@pytest.mark.parametrize(
    ("field", "settings", "options"),
    [
        ("drift", {}, {"widths": [0.02, 0.05, 0.2]}),
        ("drift", {"widths": [0.1]}, {"widths": [0.1]}),
        ("wflow", {}, {"widths": [0.01], "iterations": 10}),
        ("wflow", {"widths": [0.2, 0.3], "iterations": 4}, {"widths": [0.2, 0.3], "iterations": 4}),
    ],
    ids=str,
)
def test_every_sample_follows_the_field_of_the_real_and_the_other_images_of_its_text(
    model, field, settings, options
):
    batch = pack_groups(model)
    generated = pixels(*batch.noise.shape, seed=19).requires_grad_()
    loss = IMAGE_HEADS[field].loss(generated, batch, FieldConfig(**settings))
    loss.backward()
    sizes, expected, value = followed(batch, generated.detach(), field, **options)
    assert sorted(sizes) == [2, 2, 2, 3]  # a, b, and c in two shapes
    torch.testing.assert_close(generated.grad, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(loss.detach(), value)  # of how far the laws are, as the field's size is not


@pytest.mark.parametrize("name", ["energy", "drift", "wflow"])
def test_a_head_without_settings_takes_its_defaults(model, name):
    batch, default = pack_groups(model), EnergyConfig() if name == "energy" else FieldConfig()
    generated = pixels(*batch.noise.shape, seed=19)
    assert IMAGE_HEADS[name].loss(generated, batch) == IMAGE_HEADS[name].loss(generated, batch, default)


def test_images_have_one_condition_where_all_before_them_and_their_places_agree(model):
    processor = RopeMMProcessor.from_config(model.config, load_tokenizer())
    packer = Packer(processor, 200, ENERGY.sample_time, conditions=True)
    shown, other = (Visual(pixels(1, 4, 4, seed=seed)) for seed in (1, 2))

    def generated(seed, *shape):
        return Visual(pixels(1, *(shape or (4, 4)), seed=seed), generate=True)

    rows = {
        "a": ["a", generated(3)],
        "a again": ["a", generated(4)],
        "what stands after the image": ["a", generated(5), "b"],
        "another text": ["b", generated(6)],
        "another shape": ["a", generated(7, 4, 8)],
        "the same number of patches": ["a", generated(8, 8, 4)],
        "after an image": [shown, "a", generated(9)],
        "after it again": [shown, "a", generated(10)],
        "after another image": [other, "a", generated(11)],
    }
    found = {}
    seeds = [torch.Generator() for _ in rows]
    for name, number in zip(rows, packer(list(rows.values()), seeds).condition.tolist(), strict=True):
        found.setdefault(number, []).append(name)
    assert list(found.values()) == [
        ["a", "a again", "what stands after the image"],
        ["another text"],
        ["another shape"],
        ["the same number of patches"],
        ["after an image", "after it again"],
        ["after another image"],
    ]


def test_an_image_that_is_alone_with_its_text_has_no_part_in_the_loss_of_a_field(model):
    batch = pack_groups(model, texts=["a", "a", "b"])
    generated = pixels(*batch.noise.shape, seed=19).requires_grad_()
    IMAGE_HEADS["drift"].loss(generated, batch, FieldConfig()).backward()
    still = batch.image == 2
    assert batch.alone.tolist() == [False, False, True, False, False] and int(still.sum()) == 8
    assert batch.learned_patches == len(batch.noise) - 8 and batch.counts[2:4] == (10, 2)
    assert not generated.grad[still].any() and generated.grad[~still].any(1).all()


@pytest.mark.parametrize("field", ["drift", "wflow"])
def test_a_condition_has_gradients_of_one_size_however_near_its_images_are_to_one_another(model, field):
    batch, sizes = pack_groups(model, texts=["a"] * 8), {}
    rows = batch.image < 8
    for spread in (1.0, 1e-3):
        near = replace(batch, patches=batch.patches.clone())
        near.patches[near.noisy] = 0.2 + spread * batch.target
        generated = (0.2 + spread * pixels(*batch.noise.shape, seed=19)).requires_grad_()
        IMAGE_HEADS[field].loss(generated, near, FieldConfig()).backward()
        sizes[spread] = generated.grad[rows].norm()
    torch.testing.assert_close(sizes[1e-3], sizes[1.0], rtol=1e-2, atol=0)


@pytest.mark.parametrize("field", ["drift", "wflow"])
def test_images_that_equal_the_real_ones_have_no_gradient_and_end_no_training(model, field):
    batch = pack_groups(model, texts=["a"] * 40)
    batch.patches[batch.noisy] = 0.3
    generated = torch.full_like(batch.target, 0.3).requires_grad_()
    loss = IMAGE_HEADS[field].loss(generated, batch, FieldConfig())
    loss.backward()
    assert loss.item() == 0 and not generated.grad.any()


def test_widths_at_which_the_field_vanishes_for_all_images_are_refused_and_nan_is_left_to_the_training(model):
    batch = pack_groups(model, texts=["a"] * 8)
    generated = pixels(*batch.noise.shape, seed=19)
    with pytest.raises(ValueError, match=r"zero at field.widths \[1e-06\] for all images .* give wider ones"):
        IMAGE_HEADS["drift"].loss(generated + 3, batch, FieldConfig(widths=[1e-6]))
    assert IMAGE_HEADS["drift"].loss(generated * torch.nan, batch, FieldConfig()).isnan()


def test_a_field_head_refuses_a_batch_that_was_packed_without_conditions(model):
    with pytest.raises(ValueError, match=r"conditions=True"):
        IMAGE_HEADS["drift"].loss(torch.zeros(28, 4), pack(model), FieldConfig())


def test_a_batch_without_images_has_no_field(model):
    processor = RopeMMProcessor.from_config(model.config, load_tokenizer())
    packer = Packer(processor, 20, ENERGY.sample_time, samples=2, conditions=True)
    generated = torch.zeros(0, 4, requires_grad=True)
    loss = IMAGE_HEADS["wflow"].loss(generated, packer([["text"]], [torch.Generator()]), FieldConfig())
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("wrong", [{"widths": [0.1, 0.0]}, {"iterations": 0}], ids=str)
def test_field_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"field.{next(iter(wrong))} must be"):
        FieldConfig(**wrong)


@pytest.mark.parametrize("name", ["energy", "drift", "wflow"])
def test_a_head_without_a_critic_learns_the_law_of_the_images_of_each_text(name):
    """Images of "a" are dark or bright, half of each; those of "b" are all grey."""
    torch.manual_seed(0)
    config = read_config(hidden_size=32, intermediate_size=48, num_hidden_layers=1, patch_size=2)
    model = RopeMMForConditionalGeneration(config)
    processor = RopeMMProcessor.from_config(config, load_tokenizer())
    head = IMAGE_HEADS[name]
    packer = Packer(processor, 20, head.sample_time, samples=2, conditions=head.conditions)
    settings = {"energy": EnergyConfig()}.get(name, FieldConfig())
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    random = torch.Generator().manual_seed(1)
    texts, levels = ["a"] * 32 + ["b"] * 32, [0.8, -0.8] * 16 + [0.1] * 32
    made = [
        [text, Visual(torch.full((1, 2, 2), level), generate=True)]
        for text, level in zip(texts, levels, strict=True)
    ]
    batch = packer(made, [random] * len(made))
    for _ in range(200):
        batch = replace(batch, noise=torch.randn(batch.noise.shape, generator=random))
        generated = model(**batch.inputs(), return_logits=False).patches[batch.noisy]
        optimizer.zero_grad()
        (head.loss(generated, batch, settings) / len(generated)).backward()
        optimizer.step()
    means = generated.detach()[batch.sample == 0].mean(1)  # a document has one patch
    order = batch.target[batch.sample == 0].mean(1).sub(0.1).abs() > 0.1
    two, one = means[order], means[~order]
    assert len(two) == len(one) == 32
    assert 0.25 <= (two > 0).float().mean() <= 0.75
    assert (two.abs() - 0.8).abs().mean() < 0.1
    assert (one - 0.1).abs().mean() < 0.1
