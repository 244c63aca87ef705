"""A language model as one GGUF file for llama.cpp: the trained codes, never rounded again.

    ternary     TQ2_0, 2.0625 bits a weight, or TQ1_0, 1.6875: rows of a multiple of 256, a scale
                for 256 or more
    int4        Q4_0, 4.5 bits: rows of a multiple of 32, a scale for 32 or more
    int8        Q8_0, 8.5 bits: the same; and what a Quant's rest = "int8" stores
    matrices    that nothing rounds: float32 or float16, as asked
    vectors     float32

Scales are float16. A scale that more weights share is repeated in each of their blocks. llama.cpp
rounds activations itself, to int8 over blocks of 256 (ternary) or 32 inputs, whatever the student
was trained with: answers are alike, not equal. A model with sub_norm is llama.cpp's "bitnet", any
other its "llama". There rotary pairs are neighbours, so rows of q and k are in another order than
ours.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raykd.data import byte_bpe
from raykd.deploy.gguf import blocks as block_types
from raykd.deploy.gguf.blocks import blocks
from raykd.errors import RecipeError
from raykd.models.llama import Llama
from raykd.quant import other_parameters
from raykd.quant.embedding import QuantEmbedding
from raykd.quant.swap import quantised

NAMES = {  # our name: llama.cpp's
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "attn_sub_norm": "attn_sub_norm",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "ffn_sub_norm": "ffn_sub_norm",
}
TABLE = "token_embd.weight"
HEAD = "output.weight"

# A type, and the values or bytes that the file holds of a tensor.
TypedValues = tuple[str, NDArray[Any]]


def write(
    module: Llama,
    path: Path,
    *,
    ternary: Literal["TQ2_0", "TQ1_0"] = "TQ2_0",
    matrices: Literal["F32", "F16"] = "F16",
    tokenizer: Path | None = None,
    end: str = "<|endoftext|>",
) -> dict[str, int]:
    """Write a Llama, its layers rounded or not; the bytes of its tensors by type.

    The module is not changed. With a tokenizer.json of byte-level BPE, whose special token `end`
    ends a text, llama.cpp reads and gives text. Without one the file has no vocabulary: then
    llama.cpp's server does not answer, but its library does, with token ids. RecipeError if a Quant
    or a tokeniser has no GGUF form here, or gguf is missing.
    """
    gguf = gguf_library()
    tensors = _tensors(module, ternary, matrices)
    writer = gguf.GGUFWriter(None, "bitnet" if module.settings["sub_norm"] else "llama")
    _describe(writer, module)
    _vocabulary(writer, tokenizer, end, module.settings["classes"])
    sizes: dict[str, int] = {}
    for name, (kind, values) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType[kind])
        sizes[kind] = sizes.get(kind, 0) + values.nbytes
    staged = path.with_name(f".{path.name}.tmp")
    try:
        writer.write_header_to_file(staged)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    return sizes


def check(module: Llama) -> None:
    """RecipeError if a rounded Llama has no GGUF form, whatever its weights are: they are not read.

    Whether float16 holds its scales is known only when it is written.
    """
    kinds = {"ternary": "TQ2_0", "int4": "Q4_0", "int8": "Q8_0"}
    found: dict[str, str] = {}
    for name, layer in quantised(module):
        if layer.quant is None:
            continue
        is_table = isinstance(layer, QuantEmbedding)
        kind = kinds[layer.quant.embeddings if is_table else layer.quant.weights]
        width = layer.weight.shape[1]
        by_tensor = layer.quant.per == "tensor" and not is_table
        group = width if by_tensor else layer.quant.columns(width)
        block_types.check(kind, width, group, name)
        found[name_of(name)] = kind
    for name, value in other_parameters.plain(module.state_dict(keep_vars=True)).items():
        owner = name.rpartition(".")[0]
        if value.dim() > 1 and _is_stored(module, value):
            block_types.check("Q8_0", value.shape[1], value.shape[1], owner)
            found[name_of(owner)] = "Q8_0"
    is_tied = module.settings["tied"]
    if module.settings["sub_norm"] and not (is_tied and found.get(TABLE) == found.get(HEAD)):
        raise _two_tables()


def _is_stored(module: Llama, value: Tensor) -> bool:
    return any(
        value is stored and parametrisation.quant
        for stored, parametrisation in other_parameters.stored(module)
    )


def _two_tables() -> RecipeError:
    return RecipeError(
        "export: llama.cpp's bitnet multiplies with the embedding in the head's place, "
        "and here the two differ; build the student with tied = true, "
        "and round both or none of them"
    )


def gguf_library() -> Any:
    try:
        import gguf  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise RecipeError(
            "export: a GGUF file needs gguf; type: pip install 'raykd[gguf]'"
        ) from None
    return gguf


def _tensors(module: Llama, ternary: str, matrices: str) -> dict[str, TypedValues]:
    """What the file holds, by llama.cpp's names.

    A head that equals the table bit for bit is left out, as llama.cpp allows.
    """
    kinds = {"ternary": ternary, "int4": "Q4_0", "int8": "Q8_0"}
    tensors: dict[str, TypedValues] = {}
    for name, codes, scales, level in _rounded(module):
        kind = kinds[level]
        order = order_of(name, codes.shape[0], module.settings)
        packed = blocks(kind, codes.numpy()[order], scales.numpy()[order], name)
        tensors[name_of(name)] = (kind, packed)
    for name, value in other_parameters.plain(module.state_dict()).items():
        owner, _, parameter = name.rpartition(".")
        if parameter == "weight" and name_of(owner) not in tensors:
            values = value.detach().float().cpu().numpy()
            kind = "F32" if values.ndim == 1 else matrices
            values = values[order_of(owner, len(values), module.settings)]
            dtype = np.float16 if kind == "F16" else np.float32
            tensors[name_of(owner)] = (kind, values.astype(dtype))
    head_kind, head = tensors[HEAD]
    table_kind, table = tensors[TABLE]
    if head_kind == table_kind and np.array_equal(head, table):
        del tensors[HEAD]
    elif module.settings["sub_norm"]:
        raise RecipeError(
            "export: llama.cpp's bitnet multiplies with the embedding in the head's place, "
            "and here the two differ; build the student with tied = true, "
            "and round both or none of them"
        )
    return tensors


def _rounded(module: Llama) -> Iterator[tuple[str, Tensor, Tensor, str]]:
    """(name, codes (N, K), scales (N, G), one of LEVELS) of every matrix held as codes."""
    for name, layer in quantised(module):
        if layer.quant is not None:
            assert layer.blend == 1, f"{name} is still fading in"
            is_table = isinstance(layer, QuantEmbedding)
            level = layer.quant.embeddings if is_table else layer.quant.weights
            yield name, layer.codes().cpu(), layer.scales().cpu(), level
    stored = {
        id(value)
        for value, parametrisation in other_parameters.stored(module)
        if parametrisation.quant
    }
    for name, value in other_parameters.plain(module.state_dict(keep_vars=True)).items():
        if id(value) in stored:
            codes, scales = other_parameters.codes_and_scales(value)
            yield name.rpartition(".")[0], codes.cpu(), scales.cpu()[:, None], "int8"


def name_of(name: str) -> str:
    """The name of a layer's weight: "model.layers.3.mlp.up_proj" is "blk.3.ffn_up.weight"."""
    parts = name.split(".")
    block = f"blk.{parts[2]}." if parts[1:2] == ["layers"] else ""
    return f"{block}{NAMES[parts[-1]]}.weight"


def order_of(name: str, rows: int, settings: dict[str, Any]) -> NDArray[np.intp]:
    """(N,): our row that each row of llama.cpp's is.

    Of each head of q and k: i, i + D / 2, i + 1, ... for i from 0. Elsewhere the order is ours.
    """
    heads = {"q_proj": settings["heads"], "k_proj": settings["kv_heads"]}.get(
        name.rpartition(".")[2]
    )
    if heads is None or settings["sub_norm"]:  # its bitnet turns our pairs
        return np.arange(rows)
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _describe(writer: Any, module: Llama) -> None:
    settings = module.settings
    writer.add_context_length(settings["steps"])
    writer.add_embedding_length(settings["width"])
    writer.add_block_count(settings["layers"])
    writer.add_feed_forward_length(settings["inner"])
    writer.add_head_count(settings["heads"])
    writer.add_head_count_kv(settings["kv_heads"])
    writer.add_layer_norm_rms_eps(settings["norm_eps"])
    writer.add_rope_freq_base(settings["rope_theta"])
    writer.add_rope_dimension_count(settings["width"] // settings["heads"])
    writer.add_vocab_size(settings["classes"])


def _vocabulary(writer: Any, tokenizer: Path | None, end: str, classes: int) -> None:
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    bpe = byte_bpe.read(tokenizer)
    if len(bpe.tokens) != classes:
        raise RecipeError(
            f"tokenizer {tokenizer}: {len(bpe.tokens)} tokens, and the model has {classes} "
            "classes; name its own"
        )
    # Without an end llama.cpp would take token 11.
    if end not in bpe.tokens or bpe.tokens.index(end) not in bpe.special:
        raise RecipeError(
            f"tokenizer {tokenizer}: {end!r} is no special token; "
            "name the one that ends a text: end = ..."
        )
    types = gguf_library().TokenType
    end_id = bpe.tokens.index(end)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if bpe.digits else "gpt-2")
    writer.add_token_list(bpe.tokens)
    writer.add_token_types(
        [types.CONTROL if i in bpe.special else types.NORMAL for i in range(classes)]
    )
    writer.add_token_merges([" ".join(pair) for pair in bpe.merges])
    writer.add_bos_token_id(end_id)
    writer.add_eos_token_id(end_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
