import json

import pytest

from jaxrlhf.data.files import content_hash, find_files
from jaxrlhf.data.sources import SourceConfig, open_source


def jsonl(*rows) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


@pytest.fixture
def open_as(tmp_path):
    """Writes bytes to a file and opens them as a source."""

    def do(name: str, content: bytes, kind="demonstrations", skip_bad=False, **fields):
        path = tmp_path / name
        path.write_bytes(content)
        cfg = SourceConfig(path=str(path), **fields)
        return open_source(cfg, kind, cache_dir=str(tmp_path / "cache"), skip_bad=skip_bad, path_in_config="data.x")

    return do


def test_jsonl_keeps_order_types_and_extra_columns(open_as):
    rows = [{"prompt": f"p{i}", "n": i, "deep": {"a": [1, None, 2.5]}, "ok": True} for i in range(50)]
    source = open_as("a.jsonl", jsonl(*rows), kind="prompts")
    assert [source[i] for i in range(len(source))] == rows
    assert list(source) == rows  # a sequence: iteration ends by itself
    with pytest.raises(IndexError, match="record 50 of 50"):
        source[50]


def test_bom_blank_lines_and_crlf(open_as):
    source = open_as("a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two\xe2\x80\xa8lines"}')
    assert [record["text"] for record in source] == ["one", "two\u2028lines"]


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "a"', "is not JSON: Expecting ',' delimiter at column 13"),
        (b'["text"]', 'is not a JSON object: ["text"]'),
        (b'{"texts": "a"}', "no column 'text' (did you mean 'texts'?)"),
        (b'{"text": 4}', "text is a number, expected text"),
        (b'{"text": "a\x00"}', "holds a NUL byte"),
        (b'{"text": "a\\u0000"}', "text holds a NUL byte"),
        (b'{"text": "\\ud83d"}', "text is not valid UTF-8"),
        (b'{"text": "\xff"}', "is not UTF-8 (byte 10 of the line)"),
        (b'{"text": ""}', "text is empty"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_line_is_named_and_skippable(open_as, line, message):
    content = jsonl({"text": "fine"}, b"", line, {"text": "also fine"})
    with pytest.raises(ValueError) as error:
        open_as("a.jsonl", content)
    assert "a.jsonl:3: " in str(error.value) and message in str(error.value) and "\n" not in str(error.value)
    source = open_as("a.jsonl", content, skip_bad=True)
    assert [record["text"] for record in source] == ["fine", "also fine"] and source.skipped == 1


def test_utf16_is_refused(open_as):
    with pytest.raises(ValueError, match=r"a\.jsonl:1: (is not UTF-8|holds a NUL)"):
        open_as("a.jsonl", '{"text": "a"}\n'.encode("utf-16"))


def test_nothing_usable(open_as):
    with pytest.raises(ValueError, match=r"data\.x\.path: no records: the files hold no rows"):
        open_as("a.jsonl", b"\n")
    with pytest.raises(ValueError, match=r"no records: all 2 rows are bad; the first: .*b\.jsonl:1: is not JSON"):
        open_as("b.jsonl", b"x\ny\n", skip_bad=True)


def test_csv(open_as):
    content = b'\xef\xbb\xbfprompt,response,n\r\n"two\r\nlines","a ""quoted"" word",1\r\n,empty prompt,2\r\n\r\n'
    records = list(open_as("a.csv", content))
    assert records == [
        {"prompt": "two\r\nlines", "response": 'a "quoted" word', "n": "1"},
        {"prompt": "", "response": "empty prompt", "n": "2"},
    ]


def test_csv_cells_of_lists_and_numbers(open_as):
    messages = json.dumps([{"role": "user", "content": "hi"}]).replace('"', '""')
    prompts = open_as("m.csv", f'messages\n"{messages}"\n'.encode(), kind="prompts")
    assert prompts[0] == {"messages": [{"role": "user", "content": "hi"}]}
    pairs = list(open_as("p.csv", b"chosen,rejected,margin\na,b,0.5\nc,d,\n", kind="preferences"))
    assert [pair["margin"] for pair in pairs] == [0.5, None]
    with pytest.raises(ValueError, match=r"q\.csv:2: margin is 'lots', expected a number"):
        open_as("q.csv", b"chosen,rejected,margin\na,b,lots\n", kind="preferences")


@pytest.mark.parametrize(
    "content, message",
    [
        (b'text,n\n"a\nb",1\nc\n', "a.csv:4: has 1 cells, the header has 2"),
        (b'text,n\n"a",1\n"open,2\nc,3\n', "a.csv:3: is not CSV: unexpected end of data"),
        (b'text,n\n"a" b,1\n', "a.csv:2: is not CSV: ',' expected after '\"'"),
        (b"text,text\na,b\n", "a.csv:1: two columns are named 'text'"),
        (b"text\n\xff\n", "a.csv:2: text is not valid UTF-8"),
        (b"text\na\x00\n", "a.csv:2: text holds a NUL byte"),
        (b"", "no records: the files hold no rows"),
    ],
)
def test_bad_csv(open_as, content, message):
    with pytest.raises(ValueError) as error:
        open_as("a.csv", content)
    assert message in str(error.value)


def test_csv_with_long_cells(open_as):
    assert len(open_as("a.csv", b"text\n" + b"x" * 200_000 + b"\n")[0]["text"]) == 200_000


def test_parquet(tmp_path, open_as):
    import datetime
    import io

    import pyarrow
    import pyarrow.parquet

    day = datetime.date(2024, 5, 1)
    buffer = io.BytesIO()
    columns = {"chosen": ["a", "c"], "rejected": ["b", "d"], "margin": [1.5, None], "day": [day, day]}
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    records = list(open_as("a.parquet", buffer.getvalue(), kind="preferences"))
    assert records[0] == {"chosen": "a", "rejected": "b", "margin": 1.5, "day": "2024-05-01"}
    with pytest.raises(ValueError, match=r"b\.parquet: is not Parquet"):
        open_as("b.parquet", b"PAR1 nonsense")
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"chosen": ["a", None], "rejected": ["b", "d"]}), buffer)
    with pytest.raises(ValueError, match=r"c\.parquet:2: chosen is null"):
        open_as("c.parquet", buffer.getvalue(), kind="preferences")


def test_glob_reads_files_in_order_of_their_names(tmp_path):
    for name, text in (("b.jsonl", "two"), ("a.csv", "one"), ("c.ndjson", "three")):
        (tmp_path / name).write_text(f"text\n{text}\n" if name == "a.csv" else json.dumps({"text": text}))
    source = open_source(SourceConfig(path=f"{tmp_path}/*.*"), "demonstrations", cache_dir=str(tmp_path / "cache"))
    assert [record["text"] for record in source] == ["one", "two", "three"]


@pytest.mark.parametrize(
    "path, message",
    [
        ("{}/dat.jsonl", "does not exist (did you mean 'data.jsonl'?)"),
        ("{}", "is a folder: name its files"),
        ("{}/*.parquet", "no file matches"),
        ("{}/notes.txt", "ends with '.txt', expected one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet, or"),
    ],
)
def test_path_that_names_nothing(tmp_path, path, message):
    (tmp_path / "data.jsonl").write_text('{"text": "a"}')
    (tmp_path / "notes.txt").write_text("a")
    with pytest.raises(ValueError) as error:
        open_source(SourceConfig(path=path.format(tmp_path)), "prompts", cache_dir=str(tmp_path / "c"))
    assert str(error.value).startswith("data.prompts.path: ") and message in str(error.value)


# ---- damaged, and twofold -------------------------------------------------------------------------------------------

PAIR = '"prompt": "a", "response": "b"'


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (f'{{{PAIR}, "n": {"9" * 5000}}}', "an integer of more than 4,300 digits"),
        (f'{{{PAIR}, "response": "c"}}', "the key 'response' appears twice in an object"),
        (f'{{{PAIR}, "n": [{{"x": 1, "x": 1}}]}}', "the key 'x' appears twice in an object"),
    ],
    ids=["digits", "key", "inner key"],
)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_json_that_python_would_read_otherwise_is_refused(open_as, ending, line, why):
    if ending == "jsonl":
        with pytest.raises(ValueError, match=rf"a\.jsonl:2: is not usable JSON: {why}"):
            open_as("a.jsonl", f"{{{PAIR}}}\n{line}\n".encode())
        assert open_as("b.jsonl", f"{{{PAIR}}}\n{line}\n".encode(), skip_bad=True).skipped == 1
    else:
        with pytest.raises(ValueError, match=rf"a\.json: is not JSON: {why}"):
            open_as("a.json", f"[{line}]".encode())


def test_columns_of_one_name_are_refused(tmp_path, open_as):
    pyarrow = pytest.importorskip("pyarrow")
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 3, names=["prompt", "response", "response"]),
        tmp_path / "a.parquet",
    )
    with pytest.raises(ValueError, match=r"b\.parquet: two columns are named 'response'"):
        open_as("b.parquet", (tmp_path / "a.parquet").read_bytes())


def test_damaged_parquet_is_one_line(tmp_path, open_as):
    """Headers of pages give OSErrors, which a disk gives too."""
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"prompt": ["a b"] * 200, "response": ["b c d"] * 200})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    whole, refused = (tmp_path / "a.parquet").read_bytes(), 0
    for at in range(4, len(whole), 40):
        damaged = bytearray(whole)
        damaged[at] ^= 255
        try:
            open_as(f"b{at}.parquet", bytes(damaged))
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and f"b{at}.parquet" in str(error)
    assert refused > 10


def test_errors_of_paths_list_no_folder(tmp_path):
    (tmp_path / "secret_diary.txt").write_text("")
    (tmp_path / "secret.jsonl").write_text("")
    for name, words in {"zzz.jsonl": "does not exist", "secrets.jsonl": "did you mean 'secret.jsonl'"}.items():
        with pytest.raises(ValueError) as caught:
            find_files(str(tmp_path / name), "data.x")
        assert words in str(caught.value) and "diary" not in str(caught.value)
    with pytest.raises(ValueError, match=r"\*\* is not supported; expected \* for the files of a folder"):
        find_files(str(tmp_path / "**" / "*.jsonl"), "data.x")
    (tmp_path / "folder.jsonl").mkdir()
    assert [file.name for file in find_files(str(tmp_path / "*.jsonl"), "data.x")] == ["secret.jsonl"]


def test_a_file_that_may_not_be_read_is_told_with_its_section(tmp_path, monkeypatch):
    """The tests may run as root, who may read all."""
    (tmp_path / "a.jsonl").write_text("")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    (file,) = find_files(str(tmp_path / "a.jsonl"), "data.x")
    monkeypatch.setattr(type(file), "open", refuse)
    with pytest.raises(ValueError, match=r"^data\.x\.path: .*a\.jsonl: Permission denied; expected a file to read$"):
        content_hash([file], "data.x")
