"""Corpora and their harvest, with the real model on a few hundred tokens."""

import gzip
import json
from itertools import count

import pytest
import torch

from guard.errors import InvalidInput
from guard.lab import labelled, shards, stages
from guard.lab.corpus import documents, sample_pieces
from guard.lab.harvest import by_length, harvest, harvest_texts
from guard.reader.model import TorchReader
from guard.reader.tokens import TextTokenizer
from guard.records import Message, Role
from tests.lab.given import labelled_row

POINT = "model.layers.1"


def test_documents_stand_between_three_line_ends(tmp_path):
    text = "one\nline two\n\nstill one\n\n\n  two \n\n\n\n\n\nthree 中文\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    expected = ["one\nline two\n\nstill one", "two", "three 中文"]
    assert documents(tmp_path / "a.txt") == expected
    assert documents(tmp_path / "a.txt.gz") == expected


def test_a_corpus_that_is_absent_is_named(tmp_path):
    with pytest.raises(InvalidInput) as caught:
        documents(tmp_path / "none.txt")
    assert str(caught.value) == f"corpus {tmp_path}/none.txt: found no such file"


def letters(text):
    return [ord(c) for c in text]


def write_corpus(folder, sizes, document=100):
    for name, size in sizes.items():
        (folder / f"{name}.txt").write_text("\n\n\n".join([name * document] * (size // document)))
    return [folder / f"{name}.txt" for name in sizes]


def shares(pieces):
    return {chr(piece[0]): sum(len(p) for p in pieces if p[0] == piece[0]) for piece in pieces}


def test_every_file_gives_an_equal_share(tmp_path):
    pieces = sample_pieces(write_corpus(tmp_path, {"a": 5000, "b": 2000, "c": 9000}), letters, tokens=3000, context=50, seed=0)  # fmt: skip
    assert shares(pieces) == {"a": 1000, "b": 1000, "c": 1000}
    assert {len(piece) for piece in pieces} == {50}


def test_others_make_up_for_a_file_that_is_too_small(tmp_path):
    pieces = sample_pieces(write_corpus(tmp_path, {"a": 5000, "b": 200, "c": 9000}), letters, tokens=3000, context=50, seed=0)  # fmt: skip
    assert shares(pieces) == {"a": 1400, "b": 200, "c": 1400}


def test_a_file_that_weighs_more_gives_more(tmp_path):
    files = write_corpus(tmp_path, {"a": 5000, "b": 2000, "c": 9000})
    pieces = sample_pieces(files, letters, tokens=3000, context=50, seed=0, shares={"c.txt": 4})
    assert shares(pieces) == {"a": 500, "b": 500, "c": 2000}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"z.txt": 2.0}, "share of z.txt: the corpus holds no such file"),
        ({"a.txt": 0.0}, "share of a.txt: found 0, expected a number above 0"),
    ],
)
def test_a_share_that_fits_no_file_is_refused(tmp_path, given, message):
    files = write_corpus(tmp_path, {"a": 500})
    with pytest.raises(InvalidInput) as caught:
        sample_pieces(files, letters, tokens=300, context=50, seed=0, shares=given)
    assert str(caught.value) == message


def test_pieces_too_short_to_learn_from_are_left_out(tmp_path):
    files = write_corpus(tmp_path, {"a": 1100}, document=110)
    pieces = sample_pieces(files, letters, tokens=10_000, context=50, seed=0, shortest=16)
    assert [len(p) for p in pieces] == [50] * 20  # of each 110 letters, 50 and 50, and 10 are left out


def test_the_seed_decides_what_is_taken(tmp_path):
    numbers = count()
    (tmp_path / "a.txt").write_text("\n\n\n".join(f"document {next(numbers)} of many" for _ in range(200)))

    def taken(seed):
        return sample_pieces([tmp_path / "a.txt"], letters, tokens=400, context=50, seed=seed)

    assert taken(0) == taken(0)
    assert taken(0) != taken(1)


def test_sequences_of_like_length_share_a_batch():
    lengths = [3, 50, 4, 48, 120]
    batches = by_length(lengths, batch_tokens=100)
    assert batches == [[4], [1, 3], [2, 0]]
    assert by_length([], 100) == []


# -- the harvest, with the real model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    subjects = ("harbour", "orchestra", "glacier", "bakery", "satellite", "library", "vineyard", "railway")
    texts = [
        f"The {a} and the {b} stood side by side for years, until one winter the {b} closed. "
        f"Nobody in town could say why; the {a} went on as before, a little quieter, with its lights on late."
        for a in subjects
        for b in subjects
        if a < b
    ]
    (folder / "towns.txt").write_text("\n\n\n".join(texts))
    return folder / "towns.txt"


def run(corpus, out, **other):
    options = {"tokens": 600, "context": 40, "shard_tokens": 200, "dtype": "float32", "seed": 0}
    return harvest(model="smollm2-135m-instruct", corpus=[corpus], hook_points=[POINT], out=out, **(options | other))


@pytest.fixture(scope="module")
def harvested(corpus, tmp_path_factory, model_folder):
    out = tmp_path_factory.mktemp("activations")
    return out, run(corpus, out)


def test_a_shard_set_says_what_it_was_made_from(harvested):
    out, made = harvested
    assert shards.described(out) == made
    assert (made.model, made.sources, made.hook_points) == ("smollm2-135m-instruct", ("towns.txt",), (POINT,))
    assert (made.d_model, made.dtype, made.context) == (576, "float32", 40)
    assert 600 <= made.tokens < 640
    assert made.shard_count == len(list(out.glob("shard-*.safetensors"))) == 3
    loaded = [shards.load(out, index) for index in range(made.shard_count)]
    assert sum(len(shard["piece"]) for shard in loaded) == made.tokens
    for shard in loaded:
        assert shard[POINT].dtype == torch.bfloat16
        assert shard[POINT].shape == (len(shard["piece"]), 576)
        assert torch.isfinite(shard[POINT]).all()


def test_what_is_stored_is_every_token_s_activation_and_not_the_sink_s(corpus, harvested, model_folder):
    out, made = harvested
    tokenizer = TextTokenizer(model_folder)
    pieces = sample_pieces([corpus], lambda text: tokenizer.text(text).ids, tokens=600, context=39, seed=0)
    reader = TorchReader(model_folder, [POINT])
    seen = [reader.read([[tokenizer.sink_id, *piece]])[0][POINT] for piece in pieces]
    stored = shards.load_many(out, range(made.shard_count), [POINT, "piece"])
    assert stored["piece"].tolist() == [i for i, piece in enumerate(pieces) for _ in piece]
    expected = torch.cat([x[1:] for x in seen])
    torch.testing.assert_close(stored[POINT].float(), expected, rtol=0.01, atol=0.01)  # bfloat16 on disk
    sink = seen[0][0]  # the same in front of every piece
    distances = torch.linalg.vector_norm(stored[POINT].float() - sink, dim=1)
    assert distances.min() > 0.2 * torch.linalg.vector_norm(sink)


def test_a_text_in_a_chat_is_read_as_a_check_of_that_chat_reads_it(tmp_path, model_folder):
    text = "Salt is cheap, and keeps."
    asked = Message(Role.USER, "Go on.")
    harvest_texts(
        model="smollm2-135m-instruct", texts=[text, text], before=[(), (asked,)], sources=("s",), hook_points=[POINT],
        out=tmp_path, dtype="float32",
    )  # fmt: skip
    stored = shards.load(tmp_path, 0)
    tokenizer, reader = TextTokenizer(model_folder), TorchReader(model_folder, [POINT])
    ids = tokenizer.text(text).ids
    opening, told, closing = tokenizer.chat([Message(Role.USER, text)], open_reply=True)
    before = [number for piece in tokenizer.chat([asked], open_reply=True) for number in piece.ids]
    as_prompt = reader.read([[*opening.ids, *told.ids, *closing.ids]])[0][POINT][len(opening.ids) :][: len(ids)]
    as_answer = reader.read([[*before, *ids]])[0][POINT][len(before) :]
    assert stored["token"].tolist() == [*ids, *ids]
    assert stored["piece"].tolist() == [0] * len(ids) + [1] * len(ids)
    torch.testing.assert_close(stored[POINT].float(), torch.cat([as_prompt, as_answer]), rtol=0.01, atol=0.01)
    assert (as_prompt - as_answer).abs().max() > 0.1  # where a text stands shows


def test_a_harvest_that_was_cut_off_writes_only_what_is_absent(corpus, harvested):
    out, made = harvested
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in sorted(out.glob("shard-*"))}
    lost = shards.path(out, 1)
    lost.unlink()
    with pytest.raises(InvalidInput) as caught:
        shards.load(out, 1)
    assert str(caught.value) == f"{lost}: absent; the harvest is not complete, run `guard lab harvest` again"
    told = []
    assert run(corpus, out, progress=lambda done, total: told.append((done, total))) == made
    after = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in sorted(out.glob("shard-*"))}
    assert [file.name for file in before if before[file][0] != after[file][0]] == [lost.name]
    assert {file: content for file, (_, content) in after.items()} == {f: c for f, (_, c) in before.items()}
    assert told[-1] == (made.tokens, made.tokens)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.parametrize("name", ["cut.txt.gz", "not-gzip.txt.gz", "latin.txt"])
def test_a_corpus_that_cannot_be_read_is_named(tmp_path, name):
    whole = gzip.compress("\n\n\n".join(f"Text {i} of a corpus." for i in range(2000)).encode())
    given = {"cut.txt.gz": whole[:900], "not-gzip.txt.gz": b"plain", "latin.txt": "Zürich".encode("latin-1")}
    (tmp_path / name).write_bytes(given[name])
    with pytest.raises(
        InvalidInput, match=rf"corpus .*{name}: .*; expected UTF-8 text, compressed where it ends in .gz"
    ):
        documents(tmp_path / name)


def test_shards_that_are_not_whole_or_not_finite_are_named(tmp_path):
    with pytest.raises(InvalidInput, match=r"shard-00000.safetensors: h: found activations that are not finite"):
        shards.write(tmp_path, 0, {"h": torch.tensor([1.0, float("nan")])})
    assert list(tmp_path.iterdir()) == []
    shards.write(tmp_path, 0, {"h": torch.ones(100)})
    file = shards.path(tmp_path, 0)
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(InvalidInput, match=r"shard-00000.safetensors: .*; remove it and run `guard lab harvest` again"):
        shards.load(tmp_path, 0)
    (tmp_path / "harvest.json").write_text('{"model": "smol')
    with pytest.raises(InvalidInput, match=r"harvest.json: "):
        shards.described(tmp_path)


def test_another_configuration_is_refused_and_nothing_is_touched(corpus, harvested, tmp_path):
    out, _ = harvested
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    with pytest.raises(InvalidInput) as caught:
        run(corpus, out, dtype="bfloat16")
    assert str(caught.value) == f"{out}/harvest.json: made with another dtype; choose another --out to start afresh"
    with pytest.raises(InvalidInput, match=r"made with another context, .*choose another --out to start afresh"):
        run(corpus, out, context=30)
    with pytest.raises(InvalidInput, match=r"made with another shard_tokens"):
        run(corpus, out, shard_tokens=201)
    (tmp_path / corpus.name).write_text(corpus.read_text(encoding="utf-8").replace("railway", "brewery"))
    with pytest.raises(InvalidInput, match=r"made with another (tokens, )?planned"):
        run(tmp_path / corpus.name, out)
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before


def test_a_labelled_harvest_that_is_refused_leaves_the_rows_of_the_other(tmp_path, harvested):
    _, made = harvested
    line = {"id": "1", "text": "a", "lang": "en", "source": "s", "label_domains": [], "scope": [], "kind": "benign"}
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "a.jsonl").write_text(json.dumps(line) + "\n")
    out = tmp_path / "out"
    shards.describe(out, made)
    (out / "rows.jsonl").write_text("the rows of another harvest")
    with pytest.raises(InvalidInput, match=r"harvest\.json: made with another .*sources"):
        stages.harvest_labelled(
            model="smollm2-135m-instruct",
            rows=labelled.all_rows(tmp_path / "given", cap=9, seed=0),
            hook_points=[POINT],
            out=out,
            seed=0,
        )
    assert (out / "rows.jsonl").read_text() == "the rows of another harvest"


def test_labelled_texts_are_read_as_far_as_the_context_that_is_asked_for(tmp_path):
    row = labelled_row("essays", 0).model_copy(
        update={"text": "one two three four five six seven eight nine ten " * 40}
    )
    read = {"model": "smollm2-135m-instruct", "rows": [row], "hook_points": [POINT], "seed": 0}
    assert stages.harvest_labelled(**read, out=tmp_path / "short", context=9).tokens == 8  # and the sink token
    assert stages.harvest_labelled(**read, out=tmp_path / "long", context=512).tokens > 400


def test_rows_that_the_shards_were_not_made_from_are_refused(tmp_path, harvested):
    _, made = harvested
    shards.describe(tmp_path, made)
    with pytest.raises(InvalidInput) as caught:
        stages.read_rows(tmp_path)
    assert str(caught.value) == f"{tmp_path}: holds no rows.jsonl; make one with `guard lab harvest --labelled`"
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(InvalidInput) as caught:
        stages.read_rows(tmp_path)
    assert str(caught.value) == f"{tmp_path}/rows.jsonl: not the rows that the shards beside it were made from"
