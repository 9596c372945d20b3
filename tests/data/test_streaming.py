"""Documents of streams: the same rows as those at hand, in an order that only the seed decides."""

import io
import json
import tarfile
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace

import fsspec
import pytest
import torch
from datasets import Array4D, Dataset, Features, Image, IterableDataset, List, Value, Video
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from rope_mm.data import MapDocuments, StreamingDocuments, load_documents, make_generator
from rope_mm.data.documents import Unreadable
from rope_mm.data.images import open_image
from rope_mm.training.packed_dataset import PackedDocumentDataset

TEMPLATES = ["{caption}{image:generate}", "{image} what is it? {caption}"]
FEATURES = Features(image=Image(), caption=Value("string"))
HOW = {"templates": TEMPLATES, "size": 4, "channels": 1}


@dataclass(frozen=True)
class Batch:
    """In a packed batch's place."""

    documents: list
    skipped: tuple = ()
    stream_state: object = None


@dataclass(frozen=True)
class Unpacked:
    """In a packer's place: documents stay what they are."""

    max_length: int = 1

    def encode(self, documents, generators):
        return [SimpleNamespace(length=1, document=document) for document in documents]

    def pack(self, encoded):
        return Batch([each.document for each in encoded])


def png(shade):
    file = io.BytesIO()
    PILImage.new("L", (4, 4), shade).save(file, format="PNG")
    return file.getvalue()


def rows(first, count):
    numbers = range(first, first + count)
    return [{"image": {"bytes": png(i), "path": None}, "caption": f"grey {i}"} for i in numbers]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three files of 5, 6 and 7 rows."""
    folder = tmp_path_factory.mktemp("shards")
    for shard, (first, count) in enumerate(((0, 5), (5, 6), (11, 7))):
        Dataset.from_list(rows(first, count), features=FEATURES).to_parquet(folder / f"{shard}.parquet")
    return str(folder / "*.parquet")


def numbered(count, shards=1):
    return Dataset.from_dict({"caption": [str(i) for i in range(count)]}).to_iterable_dataset(shards)


def words(stream, seed, step, batch):
    """The documents of a step, of words alone."""
    return ["".join(stream.document(rows, make_generator("a"))) for rows in stream.batch(seed, step, batch)]


def of_words(sources, **how):
    return StreamingDocuments(sources, ["{caption}"], 4, 1, **how)


def equal(one, two):
    return all(
        mine == its
        if isinstance(mine, str)
        else torch.equal(mine.pixels, its.pixels) and mine.generate == its.generate
        for mine, its in zip(one, two, strict=True)
    )


def test_unshuffled_a_stream_has_the_documents_of_the_same_rows_at_hand_in_their_order(shards):
    stream, held_out = load_documents([shards], streaming=True, held_out=2, **HOW)
    stored = [row for shard in ((0, 5), (5, 6), (11, 7)) for row in rows(*shard)]
    at_hand = MapDocuments([Dataset.from_list(stored, features=FEATURES)], **HOW)
    for step in range(8):  # three epochs of 16 rows, but the first two
        for number, document in enumerate(stream.batch(0, step, 6)):
            row = 2 + (6 * step + number) % 16
            one, two = (
                x.document(y, make_generator(step, number)) for x, y in ((stream, document), (at_hand, [row]))
            )
            assert equal(one, two)
    assert [held_out.find(row).values["caption"] for row in range(2)] == ["grey 0", "grey 1"]
    assert len(held_out) == 2


@settings(deadline=None, max_examples=15)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    shuffle=st.integers(0, 12),
    join=st.integers(1, 2),
    batch=st.integers(1, 9),
    seed=st.integers(0, 5),
)
def test_an_epoch_has_every_row_once_and_a_step_is_a_function_of_the_seed(sizes, shuffle, join, batch, seed):
    sources = [numbered(size, min(size, 3)) for size in sizes]
    stream = of_words(sources, shuffle=shuffle, rows_per_document=join)
    steps = [stream.batch(seed, step, batch) for step in range(12)]
    assert all(len(document) == join for step in steps for document in step)
    read = [row for step in steps for document in step for row in document]
    total = sum(sizes)
    for first in range(0, len(read) - total + 1, total):
        assert len(set(read[first : first + total])) == total
    other = of_words(sources, shuffle=shuffle, rows_per_document=join)
    assert [other.batch(seed, step, batch) for step in (7, 2, 2, 3, 11, 0)] == [
        steps[step] for step in (7, 2, 2, 3, 11, 0)
    ]


def test_epochs_and_seeds_have_orders_of_their_own():
    stream = of_words([numbered(40, 4)], shuffle=10)
    orders = [tuple(words(stream, 0, epoch, 40)) for epoch in range(3)] + [tuple(words(stream, 1, 0, 40))]
    assert len(set(orders)) == 4
    assert all(sorted(order, key=int) == [str(i) for i in range(40)] for order in orders)
    firsts = {tuple(sorted(order[:10])) for order in orders}
    assert len(firsts) == 4  # rows have other neighbours in every epoch


def test_from_a_stream_state_reading_resumes_without_the_shards_before_it():
    opened = []

    def read(shards):
        for shard in shards:
            opened.append(shard)
            yield from ({"caption": f"{shard}-{i}"} for i in range(10))

    def stream():
        rows = IterableDataset.from_generator(
            read, gen_kwargs={"shards": [*range(8)]}, features=Features(caption=Value("string"))
        )
        return of_words([rows], shuffle=7)

    whole = stream()
    expected = [words(whole, 3, step, 9) for step in range(30)]
    for step in (1, 8, 20):
        before, after = stream(), stream()
        before.batch(3, step, 9)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        opened.clear()
        assert [words(after, 3, later, 9) for later in (step + 1, step + 2)] == expected[step + 1 : step + 3]
        assert len(opened) < 6
        assert words(after, 3, 0, 9) == expected[0]  # what is before the state is read from the start


def test_sources_take_turns_until_each_is_read():
    stream = of_words([numbered(2), numbered(5)])
    sources = [source for ((source, _, _),) in stream.batch(0, 0, 14)]
    assert sources == [0, 1, 0, 1, 1, 1, 1] * 2
    mixed = of_words([numbered(50), numbered(50)], shuffle=20)
    assert 5 < Counter(source for ((source, _, _),) in mixed.batch(0, 0, 20))[0] < 15


def test_a_row_that_cannot_be_read_is_named_by_its_shard_and_source(tmp_path):
    for shard in range(2):
        stored = rows(0, 4)
        stored[2 + shard]["image"]["bytes"] = b"no picture"
        Dataset.from_list(stored, features=FEATURES).to_parquet(tmp_path / f"{shard}.parquet")
    one, _ = load_documents([str(tmp_path / "0.parquet")], streaming=True, held_out=1, **HOW)
    two, _ = load_documents([str(tmp_path / "*.parquet"), "digits"], streaming=True, held_out=1, **HOW)
    named = (one, (0, 0, 2), "row 2, column"), (two, (0, 1, 3), "row 3 of shard 1 of source 0, column")
    for stream, place, name in named:
        assert place in [row for document in stream.batch(0, 0, 14) for row in document]
        with pytest.raises(Unreadable, match=rf"^{name} .* cannot be read: cannot identify image"):
            stream.document([place], make_generator(0))


def test_a_stream_that_breaks_off_says_where():
    def read(shards):
        for shard in shards:
            yield {"caption": "a"}
            if shard:
                raise OSError("connection reset\nby peer")

    rows = IterableDataset.from_generator(
        read, gen_kwargs={"shards": [0, 1]}, features=Features(caption=Value("string"))
    )
    stream = of_words([rows])
    reason = "row 1 of shard 1 cannot be read, nor what follows: connection reset"
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^{reason}$"):
            stream.batch(0, 0, 4)


def test_streams_of_which_nothing_is_left_are_refused(tmp_path):
    path = tmp_path / "few.parquet"
    Dataset.from_list(rows(0, 4), features=FEATURES).to_parquet(path)
    with pytest.raises(ValueError, match=r"all 4 rows of .* are held out: hold out fewer, or give it a test"):
        load_documents([str(path)], streaming=True, held_out=4, **HOW)
    load_documents([str(path)], streaming=True, held_out=3, **HOW)
    with pytest.raises(ValueError, match="the streams have no rows"):
        of_words([numbered(3)], apart=[3]).batch(0, 0, 1)
    with pytest.raises(ValueError, match=r"`datasets` cannot load"):
        load_documents([str(tmp_path / "none.parquet")], streaming=True, **HOW)


def test_the_texts_of_a_stream_are_refused_as_a_vocabulary():
    with pytest.raises(ValueError, match=r"words of a stream are not known .* another tokenizer"):
        list(of_words([numbered(3)]).texts())


def folder(path):
    for split, count in (("train", 6), ("test", 3)):
        (path / split).mkdir()
        for i in range(count):
            (path / split / f"{i}.png").write_bytes(png(i))
        lines = [json.dumps({"file_name": f"{i}.png", "text": f"grey {i}"}) for i in range(count)]
        (path / split / "metadata.jsonl").write_text("\n".join(lines))
    return path, "{text}{image:generate}"


def lines(path):
    for split, count in (("train", 6), ("validation", 3)):
        told = [json.dumps({"text": f"grey {i}", "number": i}) for i in range(count)]
        (path / f"{split}.jsonl").write_text("\n".join(told))
    return path, "{text}"


def tars(path):
    for shard, count in enumerate((3, 6)):
        with tarfile.open(path / f"{shard}.tar", "w") as tar:
            for i in range(count):
                for ending, content in (("png", png(i)), ("txt", f"grey {i}".encode())):
                    member = tarfile.TarInfo(f"{i:03d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return path / "*.tar", "{txt}{png:generate}"


@pytest.mark.parametrize("source", [folder, lines, tars])
def test_documents_of_a_stream_are_those_of_the_same_files_loaded_whole(source, tmp_path):
    path, template = source(tmp_path)
    how = {"templates": [template], "size": 4, "channels": 1}
    stream, held_out = load_documents([str(path)], streaming=True, held_out=3, **how)
    assert len(held_out) == 3
    assert [held_out.document([row], make_generator(0))[0] for row in range(3)] == [
        f"grey {i}" for i in range(3)
    ]
    told = [stream.document(document, make_generator(0)) for document in stream.batch(0, 0, 6)]
    assert [document[0] for document in told] == [f"grey {i}" for i in range(6)]
    for i, document in enumerate(told):
        assert all(torch.equal(part.pixels, torch.full((1, 4, 4), i / 127.5 - 1)) for part in document[1:])


@pytest.mark.parametrize(
    ("feature", "column"),
    [
        (List(Image()), lambda frames: [PILImage.fromarray(frame[0].numpy()) for frame in frames]),
        (Array4D((3, 1, 4, 4), "uint8"), lambda frames: frames.tolist()),
        (Array4D((None, 1, 4, 4), "uint8"), lambda frames: frames.tolist()),
        (List(List(List(List(Value("uint8"))))), lambda frames: frames.tolist()),
        (Video(decode=False), None),
    ],
    ids=["pictures", "array", "any length", "lists", "videos"],
)
def test_videos_of_every_kind_of_column_are_documents_streamed_or_not(feature, column, request):
    if column is None:
        write = request.getfixturevalue("video_file")
        column = lambda frames: {"bytes": write(frames), "path": None}  # noqa: E731
    clips = torch.randint(256, (2, 3, 1, 4, 4), dtype=torch.uint8, generator=make_generator("clips"))
    stored = Dataset.from_dict({"clip": [column(clip) for clip in clips]}, Features(clip=feature))
    stream = StreamingDocuments([stored.to_iterable_dataset()], ["{clip:generate}"], 4, 1)
    at_hand = MapDocuments([stored], ["{clip:generate}"], 4, 1)
    batch = stream.batch(0, 0, 2)
    assert len(batch) == 2
    for number, rows in enumerate(batch):
        for documents, document in ((stream, rows), (at_hand, [number])):
            (shown,) = documents.document(document, make_generator(0))
            assert torch.equal(shown.pixels, clips[number] / 127.5 - 1)


def test_sources_carried_here_stream_as_well():
    how = {"templates": TEMPLATES, "size": 8, "channels": 1}
    stream, held_out = load_documents(["digits"], streaming=True, held_out=9, **how)
    at_hand, test = load_documents(["digits"], **how)
    assert (len(held_out), len(at_hand), len(test)) == (9, 1437, 360)
    for number, document in enumerate(stream.batch(0, 0, 3)):
        assert equal(
            stream.document(document, make_generator(0)), at_hand.document([number], make_generator(0))
        )


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_read_what_one_process_reads(shards, workers):
    def read_batches(workers, begun=0):
        stream, _ = load_documents([shards], streaming=True, shuffle=5, held_out=2, **HOW)
        feed = PackedDocumentDataset(stream, Unpacked(), seed=0, global_batch_size=4)
        return [*feed.make_loader(begun, 9, workers)], feed, stream

    alone, _, _ = read_batches(0)
    apart, feed, stream = read_batches(workers)
    assert [batch.stream_state for batch in apart] == [batch.stream_state for batch in alone]
    stream.stream_state = apart[5].stream_state
    for one, two in ((alone, apart), (alone[6:], [*feed.make_loader(6, 9, workers)])):
        for mine, its in zip(one, two, strict=True):
            assert all(equal(*documents) for documents in zip(mine.documents, its.documents, strict=True))


def test_a_file_that_is_open_is_not_shared_with_workers(tmp_path):
    (tmp_path / "letters").write_bytes(bytes(range(65, 91)))

    def read():
        with (tmp_path / "letters").open("rb", buffering=0) as file:
            while letter := file.read(1):
                yield {"caption": letter.decode()}

    stream = of_words([IterableDataset.from_generator(read, features=Features(caption=Value("string")))])
    feed = PackedDocumentDataset(stream, Unpacked(), seed=0, global_batch_size=2)
    assert feed[0].documents == [["A"], ["B"]]
    assert [batch.documents for batch in feed.make_loader(1, 5, 2)] == [
        [["C"], ["D"]], [["E"], ["F"]], [["G"], ["H"]], [["I"], ["J"]],
    ]  # fmt: skip


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_every_process_reads_its_documents_of_the_same_step(shards, rank):
    stream, _ = load_documents([shards], streaming=True, shuffle=5, held_out=2, **HOW)
    all_of_it = PackedDocumentDataset(stream, Unpacked(), seed=0, global_batch_size=7)
    mine = replace(all_of_it, world=3, rank=rank)
    for step in range(5):
        share = [document for number, document in enumerate(all_of_it[step].documents) if number % 3 == rank]
        assert all(equal(*documents) for documents in zip(mine[step].documents, share, strict=True))


def test_images_of_a_stream_are_opened_where_they_are():
    fsspec.filesystem("memory").pipe("/far.png", png(7))
    picture = open_image({"bytes": None, "path": "memory://far.png"})
    assert picture.getpixel((0, 0)) == 7
    with pytest.raises(FileNotFoundError, match="further"):
        open_image({"bytes": None, "path": "memory://further.png"})
