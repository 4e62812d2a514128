"""The page of the formats is what the code says."""

import json
from pathlib import Path

from appliance.audit.siem.page import formats_page

PAGE = Path(__file__).parents[3] / "docs" / "siem-formats.md"


def test_the_page_is_made_from_the_catalogue() -> None:
    remedy = "write it anew: python -c 'from appliance.audit.siem.page import formats_page as p; print(p(), end=\"\")'"
    assert PAGE.read_text(encoding="utf-8") == formats_page(), remedy


def test_the_mapping_on_the_page_is_json() -> None:
    text = formats_page()
    begin = text.index('{"index_patterns"')
    assert json.loads(text[begin : text.rindex("}") + 1])["data_stream"] == {}
