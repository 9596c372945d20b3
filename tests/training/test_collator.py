"""Packed documents and the noisy copies of their images: what they see, and that sampling makes the same."""

from dataclasses import replace

import pytest
import torch

from rope_mm import SCHEMES, Image, Text, Video
from rope_mm.data.documents import Visual
from rope_mm.models import (
    RopeMMForConditionalGeneration,
    RopeMMProcessor,
    build_batch,
    load_tokenizer,
    read_config,
)
from rope_mm.models.image_generation import sample_frames
from rope_mm.nn.attention import make_block_ids, make_mask_fn
from rope_mm.training.collator import Packer
from rope_mm.training.image_heads import IMAGE_HEADS

TOKENIZER = load_tokenizer()
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def make(scheme="rope-tv", **settings):
    torch.manual_seed(0)
    rope = {"scheme": scheme}
    config = read_config(hidden_size=32, intermediate_size=48, rope_parameters=rope, **settings)
    return RopeMMForConditionalGeneration(config).eval()


def seeds(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


def packer(model, length=200, head="mse", for_critic=False):
    processor = RopeMMProcessor.from_config(model.config, TOKENIZER)
    return Packer(processor, length, IMAGE_HEADS[head].sample_time, for_critic)


def pixels(*shape, seed=5):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def image(generate=False, seed=5, y=4, x=8):
    return Visual(pixels(1, y, x, seed=seed), generate)


def video(frames=3, generate=False, seed=6):
    return Visual(pixels(frames, 1, 4, 4, seed=seed), generate)


def test_a_noisy_copy_attends_to_itself_and_to_the_context_of_its_image_and_nothing_attends_to_it():
    rank = make_block_ids([Text(1), Video(2, 1, 2), Text(1)])
    rank, token = torch.cat([rank, -rank[1:5]])[None], torch.arange(10)
    seen = make_mask_fn(rank)(torch.tensor(0), torch.tensor(0), token[:, None], token)
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 1, 1, 0, 0],
        [1, 0, 0, 0, 0, 0, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 1, 1],
        [1, 1, 1, 0, 0, 0, 0, 0, 1, 1],
    ]


def double(pack):
    """The inputs of a pack in float64."""
    return {name: x.double() if x.is_floating_point() else x for name, x in pack.inputs().items()}


def sampled(model, pack, steps=1):
    """The video of `SEEN`, sampled frame after frame from the noise of its copies."""
    sequences = build_batch([["see ", Image(2, 4), " go ", Video(3, 2, 2)]], TOKENIZER, model.config.scheme)
    noise, shown = pack.noise.view(1, 3, 4, -1).double(), pack.patches[None, :8].double()
    return sample_frames(model, sequences, noise, steps, shown).flatten(0, 2)


SEEN = ["see ", image(), " go ", video(3, generate=True), " and on"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_outputs_for_noisy_copies_are_the_frames_sampled_one_after_another(scheme):
    model = make(scheme).double()
    pack = packer(model)([SEEN], seeds(1))
    with torch.no_grad():
        drawn = sampled(model, pack)
        pack.patches[8:20] = drawn  # what comes after a frame sees it as it was sampled
        copies = model(**double(pack)).patches[pack.noisy]
    torch.testing.assert_close(copies, drawn, atol=1e-6, rtol=1e-5)
    assert (copies[:4] - copies[4:8]).abs().max() > 1e-3


def test_steps_of_a_flow_are_copies_at_later_times():
    model = make().double()
    pack = packer(model, head="flow")([SEEN], seeds(1))
    with torch.no_grad():
        drawn = sampled(model, pack, steps=4)
        patches, here = pack.patches.double(), pack.noise.double()
        patches[8:20] = drawn
        for step in range(4):
            now = replace(pack, patches=patches, noise=here, time=torch.zeros(12, 1, dtype=torch.double))
            here = here + (model(**double(now)).patches[pack.noisy] - here) / (4 - step)
    torch.testing.assert_close(here, drawn, atol=1e-6, rtol=1e-5)


def test_a_noisy_copy_is_between_noise_and_its_patch_and_a_frame_has_one_time():
    pack = packer(make(), head="flow")([SEEN], seeds(1))
    begun = pack.inputs()["patches"]
    torch.testing.assert_close(begun[20:], (1 - pack.time) * pack.noise + pack.time * pack.patches[8:20])
    assert torch.equal(begun[:20], pack.patches[:20])
    times = pack.time.view(3, 4)
    assert torch.equal(times, times[:, :1].expand(3, 4))
    assert len(times.unique()) == 3


def test_text_is_predicted_as_if_there_were_no_noisy_copies():
    model = make()
    with torch.no_grad():
        pack = packer(model)([SEEN], seeds(1))
        plain = packer(model)(
            [[part if isinstance(part, str) else Visual(part.pixels) for part in SEEN]], seeds(1)
        )
        size = plain.input_ids.shape[1]
        assert pack.input_ids.shape[1] == size + 12
        one, two = (model(**p.inputs()).logits[:, :size] for p in (pack, plain))
    torch.testing.assert_close(one, two, **CLOSE)
    assert pack.labels[0, -12:].eq(-100).all()


def test_all_text_tokens_but_the_first_are_predicted_and_so_is_the_end():
    model = make()
    documents = [["ab", image(), "c"], [image(), "d"], ["e"], ["f", image()]]
    pack = packer(model)(documents, seeds(4))
    b, c, d, e = TOKENIZER("bcde", add_special_tokens=False).input_ids
    wanted = pack.labels[pack.labels != -100].tolist()
    assert wanted == [b, c, 1, d, 1, 1]
    assert pack.predicted == 6
    assert e not in wanted
    assert pack.tokens == 3 + 8 + 1 + 8 + 2 + 2 + 9


DOCUMENTS = [["one ", image(True), "a"], [image(seed=8), "two", video(2, True)], ["three"], [video(2), "b"]]


@pytest.mark.parametrize("neighbour", [0, 1, 2, 3])
def test_a_packed_neighbour_does_not_change_a_document_by_one_bit(neighbour):
    """Logits, generated patches and gradients of all other documents, whatever one of them holds."""
    model = make()
    pack = packer(model)(DOCUMENTS, seeds(4))
    assert pack.input_ids.shape[0] == 1

    def outcome(changed):
        model.zero_grad()
        mine = pack.document_ids == neighbour
        ids = torch.where(
            mine & (pack.input_ids != 259) & changed, pack.input_ids.bitwise_xor(1), pack.input_ids
        )
        inputs = pack.inputs() | {"input_ids": ids}
        places = mine[pack.input_ids == 259]
        inputs["patches"] = inputs["patches"] + 3.0 * (places & changed)[:, None]
        inputs["patches"].requires_grad_()
        out = model(**inputs)
        # a loss of the other documents alone, so that gradients are theirs
        (out.logits[~mine].square().sum() + out.patches[~places].square().sum()).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        reached = inputs["patches"].grad
        assert not reached[places].any()
        return out.logits[~mine], out.patches[~places], reached[~places], gradients, out.logits[mine]

    *before, mine = outcome(torch.tensor(False))
    *after, its = outcome(torch.tensor(True))
    assert all(torch.equal(a, b) for a, b in zip(before[:3], after[:3], strict=True))
    assert not torch.equal(mine, its)
    names = [name for name, _ in model.named_parameters()]
    for name, a, b in zip(names, before[3], after[3], strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("backend", ["eager", "flex_attention"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_packed_documents_give_the_same_outputs_on_every_backend_and_alone(backend, uncompiled):
    model = make()
    pack = packer(model)(DOCUMENTS, seeds(4))
    with torch.no_grad():
        plain = model(**pack.inputs())
        alone = [packer(model)([d], [s]) for d, s in zip(DOCUMENTS, seeds(4), strict=True)]
        outs = [model(**p.inputs()) for p in alone]
        model.set_attn_implementation(backend)
        other = model(**pack.inputs())
    torch.testing.assert_close(other.logits, plain.logits, **CLOSE)
    torch.testing.assert_close(other.patches, plain.patches, **CLOSE)
    torch.testing.assert_close(torch.cat([out.logits for out in outs], 1), plain.logits, **CLOSE)
    torch.testing.assert_close(
        torch.cat([o.patches for o in outs if o.patches is not None]), plain.patches, **CLOSE
    )


def test_a_critic_reads_the_documents_with_something_to_generate_and_their_patches():
    model = make()
    pack = packer(model, for_critic=True)(DOCUMENTS, seeds(4))
    batch = pack.for_critic
    assert batch.sequences.input_ids.shape[0] == 2  # the others generate nothing
    assert torch.equal(batch.real[batch.generated], pack.target)
    alone = build_batch([["one ", Image(2, 4), "a"]], TOKENIZER, model.config.scheme).input_ids
    assert torch.equal(batch.sequences.input_ids[0, : alone.shape[1]], alone[0])
    assert batch.valid.sum(1).tolist() == [8, 16]
    assert batch.generated.sum(1).tolist() == [8, 8]


def test_a_document_that_no_row_can_hold_is_refused():
    with pytest.raises(
        ValueError, match="a document of 13 tokens does not fit a row of 12; raise the length"
    ):
        packer(make(), length=12)([["four!", image(True)]], seeds(1))


def test_the_clean_copy_of_a_last_image_is_omitted_and_changes_no_other_output():
    model = make()
    ended = [["see ", image(seed=8), " go ", video(3, True)], [image(True)], ["a", image(True), "b"]]
    pack = packer(model)(ended, seeds(3))
    read = packer(model)([[*document, "x"] for document in ended], seeds(3))
    assert pack.tokens == (4 + 8 + 4 + 2 * 4 + 3 * 4) + 8 + (1 + 8 + 1 + 1 + 8)
    assert read.tokens == pack.tokens + 4 + 8 + 2 * 2 + 1  # a frame, an image, "x" and twice an end
    assert torch.equal(read.target, pack.target)
    with torch.no_grad():
        with_it, without = (model(**p.inputs()).patches[p.noisy] for p in (read, pack))
    torch.testing.assert_close(without, with_it, **CLOSE)


@pytest.mark.parametrize("copies", [1, 3])
def test_the_images_of_a_batch_are_counted_frame_by_frame_and_copy_by_copy(copies):
    model = make()
    pack = replace(packer(model), samples=copies)
    batch = pack(
        [["a", image(generate=True)], ["b", video(frames=3, generate=True)], ["c", image()]], seeds(3)
    )
    assert batch.images == 4 * copies
    assert pack([["only text"]], seeds(1)).images == 0


def test_a_prompt_that_is_only_read_has_no_labels_and_changes_no_output():
    model = make()
    documents = [["see ", image(True), " and"], ["a", image(), "b", image(True, seed=8)], ["text", image()]]
    with_all = packer(model)(documents, seeds(3))
    without = replace(packer(model), predict_prompts=False)(documents, seeds(3))
    (row,) = (labels[labels != -100].tolist() for labels in without.labels)
    assert row == [*TOKENIZER(" and").input_ids, *TOKENIZER("ext").input_ids[:-1]]  # ends in an image
    assert 0 < without.predicted < with_all.predicted
    for name, column in with_all.inputs().items():
        assert torch.equal(column, without.inputs()[name])
