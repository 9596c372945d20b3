import json

from huggingface_hub import ModelCard

from rope_mm.training.model_card import write_model_card


def write_run(folder):
    (folder / "model").mkdir(parents=True)
    (folder / "run.yaml").write_text("steps: 2\nrope: {scheme: rope-tv}\n")
    config = {"rope_parameters": {"scheme": "rope-tv"}}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    (folder / "versions.json").write_text(json.dumps({"torch": "2.13.0"}))


def test_the_card_of_a_run_is_read_by_the_hub_and_says_what_was_measured(tmp_path):
    write_run(tmp_path / "digits")
    write_model_card(tmp_path / "digits", {"accuracy": 0.99912, "note": "not a number"})
    card = ModelCard.load(tmp_path / "digits" / "model" / "README.md")
    assert card.data.library_name == "rope_mm"
    assert "rope-tv" in card.data.tags
    assert f'RopeMMPipeline.from_pretrained("{tmp_path}/digits/model")' in card.text
    assert "| `accuracy` | 0.9991 |" in card.text
    assert "note" not in card.text
    assert "rope: {scheme: rope-tv}" in card.text
    assert "torch 2.13.0" in card.text


def test_the_card_of_a_run_without_metrics_states_it(tmp_path):
    write_run(tmp_path / "run")
    write_model_card(tmp_path / "run", {})
    assert "No metric was measured." in (tmp_path / "run" / "model" / "README.md").read_text()
