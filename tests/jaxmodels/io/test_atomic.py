"""Atomic files. Atomic folders are tested with saved models, in `tests/jaxmodels/test_models.py`."""

import pytest

from jaxmodels.io.atomic import atomic_file


def test_a_file_is_complete_whichever_process_writes_it(tmp_path):
    file = tmp_path / "about.json"
    with atomic_file(file) as one, atomic_file(file) as other:
        one.write_text("one")
        other.write_text("other")
    assert file.read_text() == "one"  # the last that was complete

    def interrupted():
        with atomic_file(file) as half:
            half.write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["about.json"]
    assert file.read_text() == "one"
