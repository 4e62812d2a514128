"""One chat template is told from another by its files."""

from pathlib import Path

from appliance.engine.template import template_fingerprint


def test_another_template_has_another_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ a }}")
    first = template_fingerprint(tmp_path)
    assert first is not None
    assert template_fingerprint(tmp_path) == first
    (tmp_path / "chat_template.jinja").write_text("{{ b }}")
    assert template_fingerprint(tmp_path) != first


def test_where_there_is_none_nothing_is_known(tmp_path: Path) -> None:
    assert template_fingerprint(tmp_path) is None
    assert template_fingerprint("a/model-of-that-name") is None
