"""The digest of a user's code is one, however Python was started."""

import sys

from raykd.recipe.digest import code_sha256


def test_code_of_the_current_directory_counts_when_that_is_not_on_the_path(tmp_path, monkeypatch):
    (tmp_path / "mine_counted.py").write_text("def build(): ...")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    alone = code_sha256("mine_counted:build")
    assert alone
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert code_sha256("mine_counted:build") == alone
