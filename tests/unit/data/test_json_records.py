"""JSON and JSONL with a comma too many."""

from __future__ import annotations

import pytest

from vft.common.errors import UserError
from vft.data.records.files import parse_json
from vft.data.records.record import RecordError

FIX = "a comma too many: take it out, or for commas between records put [ ] around all of them"


def test_commas_behind_the_lines_of_jsonl() -> None:
    good, bad = [one for _, one in parse_json(b'{"a": 1},\n{"a": 2}\n', "x.jsonl")][:2]
    assert good == {"a": 1} and isinstance(bad, RecordError) and FIX in str(bad)


@pytest.mark.parametrize("text", ['{"a": 1,}', '[{"a": 1}, ]', '[{"a": [1,\n]}]', '[{"a": 1},', ',{"a": 1}'])
def test_commas_elsewhere(text: str) -> None:
    with pytest.raises(UserError, match=r"x\.json:[12]: ") as caught:
        list(parse_json(text.encode(), "x.json"))
    assert FIX in str(caught.value)


@pytest.mark.parametrize("text", ['{"a": 1 "b": 2}', "{a}", '[{"a": 1}; 2]'])
def test_other_mistakes(text: str) -> None:
    with pytest.raises(UserError) as caught:
        list(parse_json(text.encode(), "x.json"))
    assert "comma too many" not in str(caught.value)
