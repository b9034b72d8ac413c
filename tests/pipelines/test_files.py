import pytest

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.pipelines.files import read_jsonl, write_folder, write_jsonl


def test_what_is_written_is_read(tmp_path):
    records = [{"text": "naïve\u2028line"}, {"text": "two", "n": 1}]
    assert read_jsonl(write_jsonl(tmp_path / "new" / "a.jsonl", records)) == records


def test_a_write_that_breaks_off_leaves_what_was_there(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"n": 1}])

    def broken():
        yield {"n": 2}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_jsonl(path, broken())
    assert read_jsonl(path) == [{"n": 1}]

    def fill(folder):
        write_jsonl(f"{folder}/new.jsonl", [{"n": 3}])
        raise RuntimeError

    kept = tmp_path / "folder"
    write_folder(kept, lambda folder: write_jsonl(f"{folder}/old.jsonl", [{"n": 2}]))
    with pytest.raises(RuntimeError):
        write_folder(kept, fill)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == [
        "a.jsonl",
        "folder",
        "folder/old.jsonl",
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [('{"a": 1}\n{"a": \n', "line 2: not JSON"), ("[1]\n", "line 1: a record must be"), ("\n\n", "holds no records")],
)
def test_bad_files_are_named_with_the_line(tmp_path, content, says):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=says) as error:
        read_jsonl(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        read_jsonl(tmp_path / "none.jsonl")
