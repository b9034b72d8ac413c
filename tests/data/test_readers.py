import gzip
import json

import pytest

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.data.readers import Source, read_source

RECORDS = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "d"}]


def rows(source):
    return [dict(row) for row in read_source(source).rows]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_records(tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    lines = "\n".join(json.dumps(record) for record in RECORDS)
    if suffix == "parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pa.parquet.write_table(pa.Table.from_pylist(RECORDS), path)
    else:
        path.write_bytes(
            {
                "jsonl": lines.encode(),
                "json": json.dumps(RECORDS).encode(),
                "jsonl.gz": gzip.compress(lines.encode()),
                "csv": b"prompt,answer\na,b\nc,d\n",
                "tsv": b"prompt\tanswer\na\tb\nc\td\n",
            }[suffix]
        )
    assert rows(Source(str(path))) == RECORDS


def test_bom_crlf_and_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    table = read_source(Source(str(path)))
    assert list(table.rows) == [{"text": "a"}, {"text": "b"}]
    assert table.place(1) == "a.jsonl, line 3"


def test_a_directory_without_what_is_kept_beside_records(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "dataset_infos.json").write_text('{"default": {"features": {}}}')
    (tmp_path / "._train.jsonl").write_bytes(b"\x00\x05\x16\x07")  # of a Mac
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "train.jsonl").write_text('{"text": "old"}\n')
    assert rows(Source(str(tmp_path))) == [{"text": "a"}]


def test_a_directory_by_split(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "README.md").write_text("no data")
    assert len(rows(Source(str(tmp_path)))) == 2
    assert rows(Source(str(tmp_path), split="test")) == [{"text": "b"}]
    with pytest.raises(UserError, match=r"no file of split 'val' among test.jsonl, train.jsonl"):
        read_source(Source(str(tmp_path), split="val"))


def test_a_folder_written_by_datasets(tmp_path):
    import datasets

    datasets.Dataset.from_list(RECORDS).save_to_disk(str(tmp_path / "saved"))
    assert rows(Source(str(tmp_path / "saved"), limit=1)) == RECORDS[:1]


def test_columns_are_renamed_and_limited(write):
    source = Source(write(RECORDS), columns={"completion": "answer"}, limit=1)
    assert rows(source) == [{"prompt": "a", "completion": "b"}]
    with pytest.raises(UserError, match=r"maps completion to 'anwser', which is not there \(did you mean answer\?\)"):
        read_source(Source(write(RECORDS), columns={"completion": "anwser"}))


def test_a_column_whose_name_is_given_to_another_gives_way(write):
    source = Source(write([{"prompt": "template", "question": "q"}]), columns={"prompt": "question"})
    assert rows(source) == [{"prompt": "q"}]


BROKEN = {
    b'{"text": "a"}\n{"text": "b"\n': r"bad.jsonl, line 2: broken JSON: Expecting ',' delimiter at column 13",
    b'{"text": "a"}\n\xff\xfe\n': r"bad.jsonl, line 2: not UTF-8 \(byte 0 of the line is 0xff\)",
    b'{"text": "a"}\n["b"]\n': r"bad.jsonl, line 2: a record is an object \{...\}, this is list",
    b'{"text": "a", "text": "b"}\n': r"bad.jsonl, line 1: the key 'text' appears twice",
    b'{"text": ' + b"[" * 100_000 + b"\n": r"bad.jsonl, line 1: nested too deeply",
    b"": r"bad.jsonl is empty \(0 bytes\)",
    b"\n\n": r"bad.jsonl holds no records",
}


@pytest.mark.parametrize(("content", "message"), BROKEN.items(), ids=range(len(BROKEN)))
def test_broken_jsonl_names_file_and_line(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_source(Source(str(path)))


def test_broken_lines_can_be_skipped_and_are_kept_count_of(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n{"text"\n')
    table = read_source(Source(str(path)), skip_bad=True)
    assert (len(table.rows), len(table.bad)) == (1, 1)
    assert "line 2" in table.bad[0]


def test_other_broken_files(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(UserError, match=r"a.json, line 2: broken JSON: Extra data at column 1; is it JSONL\?"):
        read_source(Source(str(tmp_path / "a.json")))
    (tmp_path / "b.json").write_text('[{"text": "a"}, 3]')
    with pytest.raises(UserError, match=r"b.json, record 1: a record is an object"):
        read_source(Source(str(tmp_path / "b.json")))
    (tmp_path / "c.parquet").write_text("not parquet")
    with pytest.raises(UserError, match=r"c.parquet: cannot be read as parquet"):
        read_source(Source(str(tmp_path / "c.parquet")))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:20])
    with pytest.raises(UserError, match=r"d.jsonl.gz is a damaged gzip file"):
        read_source(Source(str(tmp_path / "d.jsonl.gz")))
    (tmp_path / "e.txt").write_text("x")
    with pytest.raises(UserError, match="cannot tell its format by the suffix"):
        read_source(Source(str(tmp_path / "e.txt")))


def test_missing_files_and_folders(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"no such file or folder: .*trian.jsonl \(did you mean train.jsonl\?\)"):
        read_source(Source(str(tmp_path / "trian.jsonl")))
    with pytest.raises(UserError, match=r"no such file or folder: .*; the folder .*gone does not exist or is empty"):
        read_source(Source(str(tmp_path / "gone" / "a.jsonl")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"is a directory without .jsonl"):
        read_source(Source(str(tmp_path / "empty")))


def test_sources_out_of_range():
    with pytest.raises(UserError, match="weight=0 must be above 0"):
        RLHFDataModule(Source("a.jsonl", weight=0))
    with pytest.raises(UserError, match="limit=0 must be at least 1"):
        read_source(Source("a.jsonl", limit=0))
