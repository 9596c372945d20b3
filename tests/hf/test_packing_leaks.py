"""Several documents in one row: their position_ids, and rows whose documents would see each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

from rope_mm import SCHEMES, Image, Text, Video, pack, place_rows
from rope_mm.hf import position_ids_of, positions_for, set_rope
from rope_mm.hf.packing.leaks import restarts_are_visible

DOCUMENTS = ["text:2 image:2x2 text:3", "text:4", "text:1 video:2x1x2 text:2"]
SIZES = st.integers(1, 5)
SEGMENTS = st.one_of(
    st.builds(Text, SIZES), st.builds(Image, SIZES, SIZES), st.builds(Video, SIZES, SIZES, SIZES)
)
TOKEN_SCHEMES = [
    name for name, x in SCHEMES.items() if x.text_line == ([0.0] * len(x.axes), [1.0] * len(x.axes))
]
VISIBLE = [x for x in TOKEN_SCHEMES if restarts_are_visible(SCHEMES[x].layout, SCHEMES[x].options)]


@pytest.fixture
def llama(tiny):
    model = tiny("llama", vocab_size=97)
    for p in model.parameters():
        p.data.mul_(4 if p.dim() > 1 else 1)
    set_rope(model, "rope-tv")
    return model


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def random_ids(n, seed=0):
    return torch.randint(3, 97, (1, n), generator=torch.Generator().manual_seed(seed))


def test_a_row_of_documents_has_the_positions_of_each_alone(llama):
    alone = [positions_for(llama, [document]) for document in DOCUMENTS]
    packed = positions_for(llama, [DOCUMENTS])
    assert torch.equal(packed, torch.cat(alone, -1))
    assert packed[0, 0].tolist() == [*range(9), *range(4), *range(7)]
    rows = positions_for(llama, [[DOCUMENTS[1], DOCUMENTS[0]], DOCUMENTS[2]], padding_side="left")
    assert torch.equal(rows[:, 1:, 6:], alone[2])
    assert torch.equal(rows[:, :1], torch.cat((alone[1], alone[0]), -1))
    parsed = [[Text(4)], [Text(1), Video(2, 1, 2), Text(2)]]
    assert torch.equal(positions_for(llama, [parsed]), torch.cat(alone[1:], -1))


def test_packed_documents_answer_as_each_alone(llama):
    ids, p = random_ids(20), positions_for(llama, [DOCUMENTS])
    packed = logits(llama, input_ids=ids, position_ids=p)
    start = 0
    for document, tokens in zip(DOCUMENTS, (9, 4, 7), strict=True):
        part = slice(start, start + tokens)
        alone = logits(llama, input_ids=ids[:, part], position_ids=positions_for(llama, [document]))
        assert (packed[:, part] - alone).abs().max() < 1e-5 * alone.abs().max()
        start += tokens


def test_positions_placed_without_a_model_are_those_of_the_model(llama):
    assert torch.equal(position_ids_of(*pack(DOCUMENTS)), positions_for(llama, [DOCUMENTS]))
    batch = place_rows(DOCUMENTS, padding_side="left")
    assert torch.equal(position_ids_of(batch), positions_for(llama, DOCUMENTS, padding_side="left"))
    with pytest.raises(ValueError, match=r"document_ids \(3,\) do not fit positions of 1 rows of 20 tokens"):
        position_ids_of(pack(DOCUMENTS)[0], torch.arange(3))


def test_token_numbers_that_go_on_over_documents_are_refused(llama):
    ids, right = random_ids(20), positions_for(llama, [DOCUMENTS])
    wrong = torch.cat((torch.arange(20.0)[None, None], right[1:]))
    with pytest.raises(ValueError, match="positions start again at token 9 of a row, but row 0"):
        logits(llama, input_ids=ids, position_ids=wrong)
    right_mask = torch.block_diag(*[torch.ones(n, n).tril() for n in (9, 4, 7)]).bool()[None, None]
    own = logits(llama, input_ids=ids, position_ids=wrong, attention_mask=right_mask)
    assert (own - logits(llama, input_ids=ids, position_ids=right)).abs().max() < 1e-5 * own.abs().max()


def test_flash_attention_is_refused_packed_documents_in_several_rows(llama):
    llama.config._attn_implementation_internal = "flash_attention_2"
    p = positions_for(llama, [DOCUMENTS, DOCUMENTS])
    with pytest.raises(ValueError, match="reads in a batch of one row alone, not of 2; put all in one row"):
        logits(llama, input_ids=random_ids(20).expand(2, -1), position_ids=p)


@pytest.mark.parametrize("scheme", VISIBLE)
def test_one_document_never_looks_like_two(scheme):
    @settings(max_examples=20)
    @given(st.lists(SEGMENTS, min_size=1, max_size=5))
    def check(document):
        try:
            positions, _ = SCHEMES[scheme].place(document)
        except ValueError:  # grids that do not divide into a tower's blocks
            return
        assert not ((positions[1:-1] == 0).all(-1) & (positions[2:] == 1).all(-1)).any()

    check()


def test_the_schemes_whose_documents_are_visible_are_those_of_text_and_images():
    assert {"rope-tv", "m-rope", "m-rope-i", "videorope", "rope-tie", "flat", "v2pe", "circle"} <= {*VISIBLE}
    assert not {"grid", "rope-2d", "shared-id"} & {*VISIBLE}


@pytest.mark.parametrize("ends", [True, False])
def test_a_flattened_batch_gets_positions_by_its_lengths_or_its_token_numbers(llama, ends):
    parts = [random_ids(n, n)[0] for n in (5, 3, 6)]
    examples = [{"input_ids": part, "labels": part} for part in parts]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=ends, return_position_ids=not ends)(examples)
    p = positions_for(llama, batch)
    assert torch.equal(p, torch.cat([positions_for(llama, [f"text:{n}"]) for n in (5, 3, 6)], -1))


@pytest.mark.parametrize("ends", [[0, 4, 9], [0, 4, 10, 20], [0, 12, 20]])
def test_lengths_that_do_not_fit_the_rows_are_refused(llama, ends):
    ids, cu = random_ids(10).expand(2, -1), torch.tensor(ends)
    if ends[-2] == 10:
        p = positions_for(llama, {"input_ids": ids, "cu_seq_lens_q": cu})
        assert p[0].tolist() == [[*range(4), *range(6)], [*range(10)]]
        return
    with pytest.raises(ValueError, match=r"must count all 2 x 10 tokens, row after row"):
        positions_for(llama, {"input_ids": ids, "cu_seq_lens_q": cu})
