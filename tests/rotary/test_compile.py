"""Rotation under torch.compile and torch.export: one graph for all positions and lengths, the same values."""

from copy import deepcopy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from rope_mm import SCHEMES, Image, Rotary, rotate
from rope_mm.models import RopeMMModel, build_batch, load_tokenizer, read_config
from rope_mm.rotary.dispatch import explain_dispatch

pytestmark = pytest.mark.compile
# equal sizes are taken for one, so there are never as many tokens as batch rows, heads, channels or pairs
SEQUENCES = ("text:3 image:2x4", "text:7", "text:2 image:3x4 text:7")
LONG = [{"rope_type": "dynamic", "factor": 4, "original_max_positions": 8}]


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()  # all of one code together may be eight


def heads(positions, dtype=torch.float32):
    """Queries and keys (5, s, 4 or 2, 24) for these positions, asking for gradients."""
    return tuple(torch.randn(5, len(positions), h, 24, dtype=dtype, requires_grad=True) for h in (4, 2))


def counting(f, backend="aot_eager", **options):
    counted = CompileCounterWithBackend(backend)
    return torch.compile(f, fullgraph=True, backend=counted, **options), counted


def values_and_gradients(f, q, k, where):
    out = f(q, k, where)
    return *out, *torch.autograd.grad(sum(x.sin().sum() for x in out), (q, k))


@pytest.mark.parametrize(
    ("scheme", "changes"),
    [
        ("rope-tv", {}),
        ("mixed", {}),
        ("allegro", {}),
        ("m-rope-qwen2-vl", {"channel_offset": "end", "fraction": 0.5}),
    ],
)
def test_one_graph_serves_all_positions_and_lengths(scheme, changes):
    rope = Rotary(24, scheme, heads=2 if SCHEMES[scheme].per_head else None, **changes)
    compiled, counted = counting(rope, dynamic=True)
    for segments in SEQUENCES:
        positions, _ = rope.place(segments)
        inputs = *heads(positions), positions
        torch.testing.assert_close(
            values_and_gradients(compiled, *inputs), values_and_gradients(rope, *inputs)
        )
    assert counted.frame_count == 1


@pytest.mark.slow
def test_the_compiler_of_cpus_makes_of_it_what_it_is():
    rope = Rotary(24)
    compiled = torch.compile(rope, fullgraph=True, dynamic=True)
    for dtype in (torch.float32, torch.bfloat16):
        positions, _ = rope.place(SEQUENCES[2])
        inputs = *heads(positions, dtype), positions
        torch.testing.assert_close(
            values_and_gradients(compiled, *inputs), values_and_gradients(rope, *inputs)
        )


def test_a_length_marked_as_dynamic_is_never_a_constant():
    rope = Rotary(24)
    compiled, counted = counting(rope, backend="eager")
    for segments in SEQUENCES:
        positions, _ = rope.place(segments)
        q, k = heads(positions)
        for x, dim in ((q, 1), (k, 1), (positions, 0)):
            torch._dynamo.mark_dynamic(x, dim)  # raises where the graph makes a constant of it
        torch.testing.assert_close(compiled(q, k, positions), rope(q, k, positions))
    assert counted.frame_count == 1


def test_a_length_that_omega_depends_on_is_read_outside_of_the_graph():
    rope = Rotary(24, "flat", extensions=LONG)
    compiled, counted = counting(rope, dynamic=True)
    for segments in SEQUENCES:
        positions, _ = rope.place(segments)
        inputs = *heads(positions), rope.angles(positions)
        torch.testing.assert_close(
            values_and_gradients(compiled, *inputs), values_and_gradients(rope, *inputs)
        )
    assert counted.frame_count == 1
    with pytest.raises(ValueError, match="pass the angles instead of positions"):
        torch.export.export(rope, (*inputs[:2], positions))
    # where the graph may break, it does, and positions are read between its parts
    parts = torch.compile(rope, backend="eager")
    torch.testing.assert_close(parts(*inputs[:2], positions), rope(*inputs[:2], positions))


def test_a_turn_back_and_keys_elsewhere_are_compiled():
    rope = Rotary(24)
    positions, _ = rope.place(SEQUENCES[0])
    q, k = heads(positions)

    def there_and_back(q, k, positions):
        angles = rope.angles(positions)
        return angles.inverse.rotate_one(angles.rotate_one(q)), rope(q, k, positions, positions + 0.5)[1]

    compiled, _ = counting(there_and_back, backend="eager")
    ours = compiled(q, k, positions)
    torch.testing.assert_close(ours, there_and_back(q, k, positions))
    torch.testing.assert_close(ours[0], q)


def test_a_module_with_a_rotary_can_be_exported_with_any_length():
    rope = Rotary(24, learnable=True)
    positions, _ = rope.place(SEQUENCES[0])
    s = torch.export.Dim("s", min=2, max=4096)
    shapes = ({1: s}, {1: s}, {0: s}, None)
    exported = torch.export.export(rope, (*heads(positions), positions, None), dynamic_shapes=shapes)
    positions, _ = rope.place(SEQUENCES[2])
    q, k = heads(positions)
    torch.testing.assert_close(exported.module()(q, k, positions, None), rope(q, k, positions))


def test_a_fixed_omega_is_no_part_of_the_state_and_is_neither_cast_nor_lost():
    rope = Rotary(24)
    wanted = rope.omega.clone()
    moved = deepcopy(rope).to(torch.bfloat16).to("meta").to_empty(device="cpu")
    assert torch.equal(moved.omega, wanted) and moved.omega.dtype == torch.float64
    assert not rope.state_dict()
    with torch.device("meta"):
        assert torch.equal(Rotary(24).omega, wanted)


def test_the_model_is_one_graph_for_all_stories():
    config = read_config(hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    model = RopeMMModel(config)
    compiled, counted = counting(model, backend="eager", dynamic=True)
    for segments in (["see ", Image(2, 3), "."], ["and ", Image(3, 5), " two"]):
        sequences = build_batch([segments] * 3, load_tokenizer(), config.scheme)
        patches = torch.randn(3, segments[1].tokens, config.patch_width)
        given = {**sequences.inputs(), "patches": patches}
        torch.testing.assert_close(compiled(**given), model(**given))
    assert counted.frame_count == 1
    with pytest.raises(RuntimeError, match="more or fewer patches"):
        compiled(**{**given, "patches": torch.randn(3, 14, config.patch_width)})


def test_a_graph_takes_the_definition_on_a_cpu_and_says_so():
    said = []

    def saying(q, k, positions, omega):
        said.append(explain_dispatch(q, k, positions, omega))
        return rotate(q, k, positions, omega)

    positions = torch.zeros(3, 2)
    counting(saying, backend="eager")[0](*heads(positions), positions, torch.ones(2, 12))
    assert said == [
        "the definition, for the compiler to fuse: Triton's kernel runs on CUDA devices, not on cpu"
    ]


def test_a_refusal_is_a_value_error_in_compiled_code_and_the_cause_of_torch_s_error_in_whole_graphs():
    rope, (q, k), sentence = Rotary(24), heads(range(7)), "give one position for each token"
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Observed exception") as caught:
        torch.compile(rope, backend="eager", fullgraph=True)(q, k, torch.zeros(6, 3))
    assert sentence in str(caught.value.__cause__)
    torch._dynamo.reset()
    with pytest.raises(ValueError, match=sentence):
        torch.compile(rope, backend="eager")(q, k, torch.zeros(6, 3))
