import pickle
import re
from collections import Counter
from io import BytesIO

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage

from rope_mm.data import MapDocuments, load_splits, make_generator
from rope_mm.data.documents import Unreadable, Visual
from rope_mm.data.streaming import StreamingDocuments
from rope_mm.data.templates import Column, find_tasks, read_template

TEMPLATES = ["{caption}: {image:generate}", "{image} what is it? {caption}", "{frames:generate}{caption}"]
CAPTION, IMAGE, DRAWN = Column("caption"), Column("image"), Column("image", True)


def grey(value):
    return PILImage.new("L", (4, 4), value)


def png(value):
    file = BytesIO()
    grey(value).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def sources():
    pictures = Dataset.from_dict(
        {"image": [grey(10 * i) for i in range(6)], "caption": [f"grey {i}" for i in range(6)]},
        features=Features(image=Image(), caption=Value("string")),
    )
    clips = Dataset.from_dict(
        {"frames": [[grey(i), grey(255)] for i in range(4)], "caption": [f"clip {i}" for i in range(4)]},
        features=Features(frames=List(Image()), caption=Value("string")),
    )
    return [pictures, clips]


def test_the_older_form_of_a_column_to_generate_is_refused_with_the_new_one():
    with pytest.raises(ValueError, match=r"\{image:draw\} is now \{image:generate\}"):
        read_template("{caption}{image:draw}")


def test_a_template_is_text_and_columns_in_braces():
    assert read_template("{caption}: {image:generate}") == (CAPTION, ": ", DRAWN)
    assert read_template("see {{it}}") == ("see {", "it}")
    for wrong in ("{caption", "{}", "{image:paint}", "{image!r}"):
        with pytest.raises(ValueError, match="template '"):
            read_template(wrong)


def test_rows_fill_the_templates_whose_columns_they_have(sources):
    documents = MapDocuments(sources, TEMPLATES, 4, 1)
    assert len(documents) == 10
    assert documents.kinds == {"caption": "text", "image": "image", "frames": "video"}
    told = [documents.document([2], make_generator(i)) for i in range(20)]
    forms = Counter(tuple(type(part).__name__ for part in document) for document in told)
    assert set(forms) == {("str", "str", "Visual"), ("Visual", "str", "str")}
    drawn = next(document for document in told if isinstance(document[0], str))
    assert drawn[:2] == ["grey 2", ": "]
    assert drawn[2].generate
    assert not next(document for document in told if isinstance(document[0], Visual))[0].generate
    assert torch.equal(drawn[2].pixels, torch.full((1, 4, 4), 20 / 127.5 - 1))
    frames, caption = documents.document([7], make_generator(0))
    assert caption == "clip 1"
    assert frames.pixels.shape == (2, 1, 4, 4)
    assert frames.pixels[:, 0, 0, 0].tolist() == [pytest.approx(1 / 127.5 - 1), 1.0]


def test_joined_rows_make_one_document(sources):
    documents = MapDocuments(sources, TEMPLATES, 4, 1, rows_per_document=2)
    (rows, *_) = documents.batch(0, 0, 5)
    assert len(rows) == 2
    one, two = (documents.document([row], make_generator("a")) for row in rows)
    both = documents.document(rows, make_generator("a"))
    assert len(both) == len(one) + len(two)


def test_a_batch_is_a_function_of_seed_and_step_and_an_epoch_has_every_row_once(sources):
    documents = MapDocuments(sources, TEMPLATES, 4, 1)
    epoch = [row for step in range(5) for (row,) in documents.batch(3, step, 2)]
    assert sorted(epoch) == list(range(10))
    assert documents.batch(3, 4, 2) == documents.batch(3, 4, 2)
    assert documents.batch(3, 5, 10) != documents.batch(4, 5, 10)


@pytest.mark.parametrize("template", ["{label}{image:generate}", "{image:generate}"])
def test_rows_are_grouped_by_the_text_of_a_column_also_over_sources_and_where_no_template_has_it(template):
    named = Features(image=Image(), label=ClassLabel(names=["cat", "dog"]))
    labels = [0, 1, 1, 0, 0, 1]
    one = Dataset.from_dict({"image": [grey(0)] * 6, "label": labels}, named)
    two = Dataset.from_dict({"image": [grey(0)] * 4, "label": ["dog", "cat", None, "bird"]})
    two = two.cast_column("image", Image())
    names = [("cat", "dog")[label] for label in labels] + ["dog", "cat", None, "bird"]
    documents = MapDocuments([one, two], [template], 4, 1, group_by="label", group_size=2)
    found = set()
    for step in range(40):
        rows = torch.tensor(documents.batch(3, step, 6)).view(2, 3).T.tolist()
        assert all(names[first] == names[second] for first, second in rows)
        found |= {row for group in rows for row in group}
    assert found == set(range(10)) - {8}  # which has no label
    assert documents.batch(3, 5, 6) == documents.batch(3, 5, 6) != documents.batch(4, 5, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_by": "label"}, r"grouped by column 'label', and a source has \['caption', 'image'\]"),
        ({"group_by": "image"}, "a column of texts or class labels, and 'image' holds Image"),
        ({"group_by": "caption", "rows_per_document": 2}, "rows_per_document is 2, and groups are of rows"),
    ],
)
def test_what_cannot_be_grouped_is_refused(sources, options, message):
    with pytest.raises(ValueError, match=message):
        MapDocuments(sources[:1], ["{caption}{image:generate}"], 4, 1, **options)


def test_tasks_are_read_off_the_templates():
    kinds = {"caption": "text", "image": "image", "frames": "video"}
    tasks = find_tasks([read_template(template) for template in TEMPLATES], kinds)
    assert set(tasks) == {"text2image", "image2text", "text2video", "video2text"}
    assert tasks["text2image"].before == (CAPTION, ": ")
    assert tasks["image2text"].before == (IMAGE, " what is it? ")
    assert (tasks["text2video"].before, tasks["text2video"].column) == ((), "frames")
    assert tasks["video2text"].before == (Column("frames", True),)


def test_what_is_asked_of_a_model_is_spread_over_the_source(sources):
    documents = MapDocuments(sources, TEMPLATES, 4, 1)
    tasks = find_tasks(documents.templates, documents.kinds)
    asked = documents.eval_prompts(tasks["image2text"], 3)
    assert [answer for _, answer in asked] == ["grey 0", "grey 2", "grey 4"]
    assert [before[1] for before, _ in asked] == [" what is it? "] * 3
    assert len(documents.eval_prompts(tasks["text2video"], 9)) == 4


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        (["{title}"], "fits no source; their columns are"),
        (["{caption}", "{caption} {image} {frames}"], "fits no source"),
        (["{image}"], "no template fits columns"),
    ],
)
def test_templates_that_do_not_fit_the_columns_of_a_source_are_refused(sources, templates, message):
    with pytest.raises(ValueError, match=message):
        MapDocuments(sources, templates, 4, 1)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_label_is_read_as_its_name(streamed):
    features = Features(image=Image(), label=ClassLabel(names=["cat", "dog"]))
    rows = Dataset.from_dict({"image": [grey(0)] * 4, "label": [1, 0, None, -1]}, features)
    documents = MapDocuments([rows], ["{label}{image:generate}"], 4, 1)
    assert documents.kinds["label"] == "text" and list(documents.texts()) == ["dog", "cat"]
    told = (
        StreamingDocuments([rows.to_iterable_dataset()], ["{label}{image:generate}"], 4, 1)
        if streamed
        else documents
    )
    order = [row for (row,) in told.batch(0, 0, 4)]
    for row in order:
        number = row[-1] if streamed else row
        if number < 2:
            assert told.document([row], make_generator(0))[0] == ("dog", "cat")[number]
        else:
            with pytest.raises(Unreadable, match=f"row {number}, column 'label' cannot be read"):
                told.document([row], make_generator(0))


def test_a_column_of_labels_in_one_source_and_of_texts_in_another_is_read_as_each_holds_it():
    features = Features(image=Image(), label=ClassLabel(names=["cat", "dog"]))
    one = Dataset.from_dict({"image": [grey(0)], "label": [1]}, features)
    two = Dataset.from_dict({"image": [grey(0)], "label": ["bird"]}).cast_column("image", Image())
    for sources, names in ([one, two], ["dog", "bird"]), ([two, one], ["bird", "dog"]):
        documents = MapDocuments(sources, ["{label}{image:generate}"], 4, 1)
        assert [documents.document([row], make_generator(0))[0] for row in (0, 1)] == names
        assert list(documents.texts()) == names


def test_a_column_that_holds_images_in_one_source_and_texts_in_another_is_refused(sources):
    other = Dataset.from_dict({"image": ["a text"], "caption": ["a caption"]})
    with pytest.raises(ValueError, match="column 'image' holds images in one source and texts in another"):
        MapDocuments([sources[0], other], ["{caption}{image:generate}"], 4, 1)


def test_text_is_generated_without_being_marked(sources):
    with pytest.raises(ValueError, match="column 'caption' holds text, which is always generated"):
        MapDocuments(sources, ["{caption:generate}{image}", "{frames}"], 4, 1)


def test_a_column_of_numbers_is_no_part_of_a_document():
    rows = Dataset.from_dict({"size": [1, 2]})
    with pytest.raises(ValueError, match=r"column 'size' holds .*, not lists of images"):
        MapDocuments([rows], ["{size}"], 4, 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"no picture", "cannot identify image file"), (png(4)[:50], "image file is truncated")],
)
def test_what_cannot_be_read_is_named_by_its_row_and_file(content, reason, tmp_path):
    (tmp_path / "torn.png").write_bytes(content)
    rows = Dataset.from_dict(
        {"image": [str(tmp_path / "torn.png")], "caption": [None]},
        features=Features(image=Image(), caption=Value("string")),
    )
    said = f"row 0, column 'image' cannot be read: {reason}: {tmp_path / 'torn.png'}"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        MapDocuments([rows], ["{image}"], 4, 1).document([0], make_generator(0))
    rows = Dataset.from_list([{"image": {"bytes": content, "path": None}, "caption": None}], rows.features)
    with pytest.raises(ValueError, match=f"row 0, column 'image' cannot be read: {reason}$"):
        MapDocuments([rows], ["{image}"], 4, 1).document([0], make_generator(0))
    with pytest.raises(
        ValueError, match="row 0, column 'caption' cannot be read: a text is expected, not None"
    ):
        MapDocuments([rows], ["{caption}"], 4, 1).document([0], make_generator(0))


@pytest.mark.parametrize("streamed", [False, True])
def test_documents_are_the_same_in_a_process_that_is_spawned(streamed, sources):
    if streamed:
        documents = StreamingDocuments([rows.to_iterable_dataset() for rows in sources], TEMPLATES, 4, 1)
    else:
        documents = MapDocuments(sources, TEMPLATES, 4, 1)
    sent = pickle.loads(pickle.dumps(documents))
    batch = documents.batch(0, 0, 10)
    assert len(batch) == 10
    assert sent.batch(0, 0, 10) == batch
    for rows in batch:
        for ours, theirs in zip(
            sent.document(rows, make_generator(0)), documents.document(rows, make_generator(0)), strict=True
        ):
            assert ours == theirs if isinstance(ours, str) else torch.equal(ours.pixels, theirs.pixels)


def test_digits_are_documents_as_well():
    splits = load_splits("digits")
    assert isinstance(splits, DatasetDict)
    documents = MapDocuments([splits["train"]], ["{caption}{image:generate}"], 8, 1)
    caption, shown = documents.document([0], make_generator(0))
    assert caption == splits["train"][0]["caption"]
    assert shown.pixels.shape == (1, 8, 8)
