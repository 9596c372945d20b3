import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Picture


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Bars in a picture of 4 x 4 pixels, and clips of them as they move."""
    folder = tmp_path_factory.mktemp("bars")
    bars = [Picture.new("L", (4, 4)) for _ in range(4)]
    for column, bar in enumerate(bars):
        bar.paste(255, (column, 0, column + 1, 4))
    rows = [
        {"image": bars[i % 4], "frames": [bars[(i + t) % 4] for t in range(3)], "caption": "abcd"[i % 4]}
        for i in range(16)
    ]
    features = Features(image=Image(), frames=List(Image()), caption=Value("string"))
    bars = Dataset.from_list(rows, features=features)
    bars.to_parquet(folder / "bars.parquet")
    return folder / "bars.parquet"
