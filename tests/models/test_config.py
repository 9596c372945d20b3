"""Any scheme, with any extension, goes through a config and comes back."""

import pytest
import torch

from rope_mm import SCHEMES, Image
from rope_mm.models import (
    RopeMMConfig,
    RopeMMForConditionalGeneration,
    RopeMMProcessor,
    build_batch,
    configuration_rope_mm,
    load_tokenizer,
    read_config,
)
from rope_mm.schemes.extensions import EXTENSIONS, YaRN

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_positions": 64.0}
NUMBERS = {"factor": 2.0, "original_max_positions": 16.0, "short": (1.0,) * 4, "long": (2.0,) * 4}
TOY = {"hidden_size": 32, "intermediate_size": 48}


def back(config, folder):
    config.save_pretrained(folder)
    return RopeMMConfig.from_pretrained(folder)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_saved_and_loaded_by_a_config_as_a_name_and_as_fields(scheme, tmp_path):
    change = {"fraction": 0.5} if "theta" in SCHEMES[scheme].unused else {"theta": 77.0}
    changed = SCHEMES[scheme].replace(**change)
    named = read_config(**TOY, rope_parameters={"scheme": scheme, **change})
    written = read_config(**TOY, rope_parameters=changed)
    held = read_config(**TOY, rope_parameters={"scheme": SCHEMES[scheme], **change})
    for number, config in enumerate((named, written, held)):
        again = back(config, tmp_path / str(number))
        assert again.scheme == config.scheme == changed
        assert again.rope_parameters["rope_theta"] == changed.theta


@pytest.mark.parametrize("kind", EXTENSIONS)
def test_every_extension_is_saved_and_loaded_by_a_config(kind, tmp_path):
    taken = {name: NUMBERS[name] for name in EXTENSIONS[kind].__dataclass_fields__ if name in NUMBERS}
    entry = {"rope_type": kind, **taken}
    scheme = "flux" if kind == "riflex" else "rope-tv"  # where words do not walk along time
    as_dict = read_config(**TOY, rope_parameters={"scheme": scheme, "extensions": [entry]})
    as_object = read_config(
        **TOY, rope_parameters={"scheme": scheme, "extensions": [EXTENSIONS[kind](**taken)]}
    )
    again = back(as_dict, tmp_path)
    assert again.scheme == as_dict.scheme == as_object.scheme
    assert again.scheme.extensions == (EXTENSIONS[kind](**taken),)


def test_a_model_with_an_extension_is_saved_with_it_and_decodes_as_its_full_forward(tmp_path):
    rope = {"scheme": "rope-tv", "extensions": [YARN]}
    torch.manual_seed(0)
    model = RopeMMForConditionalGeneration(read_config(**TOY, rope_parameters=rope)).eval()
    plain = RopeMMForConditionalGeneration(read_config(**TOY)).eval()
    plain.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path)
    RopeMMProcessor.from_config(model.config, load_tokenizer()).save_pretrained(tmp_path)
    again = RopeMMForConditionalGeneration.from_pretrained(tmp_path).eval()
    processor = RopeMMProcessor.from_pretrained(tmp_path)
    assert processor.scheme.extensions == (YaRN(factor=4.0, original_max_positions=64.0),)
    inputs = processor(documents=[["abc", torch.rand(1, 4, 4), "de"]])
    logits = model(**inputs).logits
    torch.testing.assert_close(again(**inputs).logits, logits)
    assert not torch.allclose(plain(**inputs).logits, logits, atol=1e-3)
    settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    cached, whole = (
        model.generate(**inputs, **settings, use_cache=use, output_logits=True) for use in (True, False)
    )
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), atol=1e-5, rtol=1e-5)


def test_an_omega_that_depends_on_the_length_generates_without_a_cache():
    rope = {
        "scheme": "rope-tv",
        "extensions": [{"rope_type": "dynamic", "factor": 2.0, "original_max_positions": 8.0}],
    }
    model = RopeMMForConditionalGeneration(read_config(**TOY, rope_parameters=rope)).eval()
    inputs = build_batch([["abcdefgh", Image(1, 2)]], load_tokenizer(), model.config.scheme).inputs()
    inputs["patches"] = torch.randn(2, 4)
    generated = model.generate(**inputs, max_new_tokens=2, do_sample=False, use_cache=False)
    assert generated.shape == (1, 12)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "yarn", "factor": 4.0},
            "rope_type 'yarn' stands beside the scheme; write it into",
        ),
        ({"extensions": [{"rope_type": "yarm"}]}, "rope_type 'yarm' is unknown; did you mean 'yarn'"),
        ({"extensions": [{"rope_type": "yarn", "factr": 1}]}, "yarn takes axes, factor"),
        ({"factor": 4.0}, "a scheme has no field 'factor'"),
    ],
)
def test_unknown_rope_parameters_are_refused(rope, message):
    with pytest.raises(ValueError, match=message) as error:
        read_config(rope_parameters=rope)
    assert "\n" not in str(error.value)


def test_a_scheme_is_parsed_once_and_again_after_its_parameters_change(monkeypatch):
    config = read_config(**TOY, rope_parameters={"scheme": "m-rope", "extensions": [YARN]})
    first = config.scheme
    calls = []
    read = configuration_rope_mm.read_rope
    monkeypatch.setattr(configuration_rope_mm, "read_rope", lambda rope: calls.append(1) or read(rope))
    assert config.scheme is first and not calls
    config.rope_parameters["theta"] = 77.0
    assert config.scheme == first.replace(theta=77.0)
    config.rope_parameters = {"scheme": SCHEMES["flux2"]}
    assert config.scheme == SCHEMES["flux2"]
    config.rope_parameters = SCHEMES["rope-tv"]
    assert config.scheme == SCHEMES["rope-tv"]
