"""Classify texts with this student:  python run.py texts.txt   (a text a line; one line each: its class, how likely)

texts.txt    UTF-8, a text a line; or - for standard input
texts.jsonl  a JSON object a line with its `text`, so that a text may have several lines
tokens.npz   an array of token ids for each text, with what the tokeniser puts around a text

With --logits FILE.npy the logits (texts, classes) are written, too. Each text is answered by itself, and cut at the
number of tokens that model.json names. It needs numpy and onnxruntime, for texts also tokenizers; where there is no
student.onnx, raykd and torch.
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def texts_in(path):
    """The texts of a file, or of standard input."""
    lines = (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode().split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    return [json.loads(line)["text"] if path.endswith(".jsonl") else line.rstrip("\r") for line in lines]


def tokens_in(path, longest):
    """The tokens of each text of a file."""
    if path.endswith(".npz"):
        held = np.load(path, allow_pickle=False)
        return [held[name] for name in held.files]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # a text that spells one is read as its letters
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest)
    return [np.array(found.ids, np.int64) for found in tokenizer.encode_batch(texts_in(path))]


def checked(number, ids, rows):
    """The tokens and their mask, filled up where this student takes one length. Ends the script if they are unfit."""
    longest = rows["longest"]
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not 1 <= len(ids) <= longest:
        sys.exit(f"text {number}: {ids.dtype} {ids.shape}; this student takes 1 to {longest} tokens")
    if ids.min() < 0 or ids.max() >= rows["tokens"]:
        sys.exit(f"text {number}: tokens outside the {rows['tokens']} of this student")
    missing = longest - len(ids) if rows["padding"] == "zeros" else 0
    return np.pad(ids.astype(np.int64), (0, missing)), np.pad(np.ones(len(ids), bool), (0, missing))


def onnx_student(path):
    """(tokens, mask) -> logits (classes,)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # sums in the order they were measured in
    options.add_session_config_entry("session.x64quantprecision", "1")  # else int8 overflows on x86 without VNNI
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    asked, given = ([v.name for v in values] for values in (session.get_inputs(), session.get_outputs()))
    output = "row_logits" if "row_logits" in given else "logits"

    def answer(ids, mask):
        feed = {"input_ids": ids[None], "attention_mask": mask[None].astype(np.int64)}
        return session.run([output], {name: feed[name] for name in asked})[0][0]  # type: ignore

    return answer


def torch_student():
    """The same of a student that ONNX cannot hold."""
    import torch

    from raykd.deploy import load_artefact

    torch.set_num_threads(1)
    student = load_artefact(HERE)

    def answer(ids, mask):
        with torch.inference_mode():
            signals = student(torch.from_numpy(ids)[None, :, None].int(), torch.from_numpy(mask)[None])
        return signals.sequence_logits()[0].numpy()

    return answer


if __name__ == "__main__":
    if len(sys.argv) not in (2, 4) or sys.argv[2:3] not in ([], ["--logits"]):
        sys.exit(__doc__)
    model = json.loads((HERE / "model.json").read_bytes())
    student = onnx_student(HERE / "student.onnx") if (HERE / "student.onnx").exists() else torch_student()
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore
    logits = []
    for number, ids in enumerate(tokens_in(sys.argv[1], model["rows"]["longest"])):
        z = student(*checked(number, ids, model["rows"])).astype(np.float32)
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        print(f"{model['classes'][int(z.argmax())]}\t{p.max():.3f}")
        logits.append(z)
    if sys.argv[2:]:
        with open(sys.argv[3], "wb") as file:
            np.save(file, np.array(logits, np.float32).reshape(-1, len(model["classes"])))
