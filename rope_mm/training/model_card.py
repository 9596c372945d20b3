"""The card of a run's model: what it is, how to use it, what it was trained on and what was measured."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from rope_mm.analysis import markdown
from rope_mm.files import write_text

TEXT = """---
{header}
---

# {name}

A small transformer of rope_mm for text, images and videos, with the rotary
scheme `{scheme}`.

```python
from rope_mm.models import RopeMMPipeline

pipeline = RopeMMPipeline.from_pretrained("{folder}")
```

## Results

Measured at the end of training, on data held out from it.

{results}

## Training

The configuration of the run, without the keys that change no result.

```yaml
{config}
```

Versions: {versions}.

## Limits

It was trained from scratch on the data named above and on nothing else. It is meant for comparing position
encodings and losses, not for use as a product.
"""


def model_card(
    name: str, folder: str, scheme: str, config: str, versions: Mapping[str, Any], result: Mapping[str, Any]
) -> ModelCard:
    """A card with the library, tags and license field that the hub reads, and the run in words.

    Args:
        name: of the model.
        folder: where it was saved.
        scheme: of its positions.
        config: of the run, as YAML.
        versions: package -> version.
        result: metric -> value.
    """
    header = ModelCardData(library_name="rope_mm", tags=["rope_mm", "rotary-position-encoding", scheme])
    rows = [(f"`{key}`", f"{value:.4g}") for key, value in result.items() if isinstance(value, int | float)]
    return ModelCard(
        TEXT.format(
            header=header.to_yaml(),
            name=name,
            folder=folder,
            scheme=scheme,
            results=markdown.table(("metric", "value"), rows) if rows else "No metric was measured.",
            config=config.strip(),
            versions=", ".join(f"{package} {version}" for package, version in versions.items()),
        )
    )


def write_model_card(output_dir: Path, result: Mapping[str, Any]) -> None:
    """Write OUTPUT_DIR/model/README.md of a run that is done.

    Args:
        output_dir: folder of the run, with its run.yaml, versions.json and model.
        result: metric -> value.
    """
    config = (output_dir / "run.yaml").read_text(encoding="utf-8")
    versions = json.loads((output_dir / "versions.json").read_text(encoding="utf-8"))
    model = json.loads((output_dir / "model" / "config.json").read_text(encoding="utf-8"))
    rope = model["rope_parameters"]
    scheme, folder = rope.get("scheme") or rope["layout"], (output_dir / "model").as_posix()
    card = model_card(output_dir.name, folder, scheme, config, versions, result)
    write_text(output_dir / "model" / "README.md", str(card))
