"""The digest of a recipe, by which tests compare two."""

from raykd.files.digests import digest_of
from raykd.recipe.digest import recipe_identity
from raykd.recipe.recipe import Recipe


def recipe_digest(recipe: Recipe) -> str:
    """Hex sha256 of the recipe's identity."""
    return digest_of(recipe_identity(recipe))
