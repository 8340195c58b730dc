"""What the chapter on data cannot show: a download that is interrupted, and a folder that must stay as it was."""
import pytest

pytest.importorskip("pooch")
from gatednb import data

source = data.Source("some/file.txt", "0" * 32, ("http://127.0.0.1:9/file.txt",))


@pytest.mark.parametrize("end", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_download_leaves_no_file(tmp_path, monkeypatch, end):
    def half(url, target, pooch):
        with open(target, "wb") as file: file.write(b"half of")
        assert any(path.is_file() for path in tmp_path.rglob("*"))    # it is there while the download runs
        raise end
    monkeypatch.setattr(data, "_http", half)
    with pytest.raises(end): data.download(source, tmp_path)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_the_readers_folder_is_never_written_to(tmp_path, monkeypatch):
    (tmp_path / "some").mkdir()
    (tmp_path / source.path).write_bytes(b"not what was asked for")
    before = {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}
    monkeypatch.setenv("GATEDNB_DATA", str(tmp_path))
    with pytest.raises(data.ChecksumError, match="file.txt"): data.fetch(source)
    with pytest.raises(data.DataUnavailable, match="GATEDNB_DATA"): data.load_mnist()
    assert {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]} == before
