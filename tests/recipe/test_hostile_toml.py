"""Recipe files that are no files, or no sound ones, are refused at once."""

import os

import pytest

from raykd.errors import RecipeError
from raykd.recipe.toml import parse_set, read_toml

DEEP = 100_000


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "large", "deep", "digits"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, kind):
    path = tmp_path / "recipe.toml"
    made = {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "loop": lambda: path.symlink_to(path),
        "large": lambda: path.write_text("#" * (1 << 21)),
        "deep": lambda: path.write_text(f"a = {'[' * DEEP}{']' * DEEP}"),
        "digits": lambda: path.write_text(f"a = {'9' * 5000}"),
    }
    made[kind]()
    with pytest.raises(RecipeError, match=r"recipe\.toml"):
        read_toml(path)


@pytest.mark.parametrize("value", ["[" * DEEP + "]" * DEEP, "9" * 5000])
def test_a_value_too_deep_or_too_long_is_named_by_its_key(value):
    with pytest.raises(RecipeError, match=r"--set optim\.steps"):
        parse_set(f"optim.steps={value}")
