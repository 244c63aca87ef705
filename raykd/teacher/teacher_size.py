"""How large a teacher is, without its weights in memory."""

from pathlib import Path
from typing import Any

from safetensors import safe_open

from raykd.models.build import count_parameters
from raykd.recipe.tables import ModelRef
from raykd.recipe.weight_files import tensor_files


def told(ref: ModelRef, shape: dict[str, int]) -> dict[str, Any]:
    """A teacher's parameters, and bytes and dtypes of the safetensors files that are read of it,
    from their headers.
    """
    size = 0
    dtypes = set()
    for each in tensor_files(Path(str(ref.weights))):
        with safe_open(each, framework="np") as file:
            names = file.keys()
            dtypes |= {str(file.get_slice(name).get_dtype()) for name in names}
        size += each.stat().st_size
    params = count_parameters(ref, **shape, key="teacher")
    return {"params": params, "bytes": size, "dtype": ", ".join(sorted(dtypes))}
