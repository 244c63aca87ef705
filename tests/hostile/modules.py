"""A user's own modules that are no students: of wrong shape, type or gradient, or rude."""

from functools import partial
from typing import Any

from hostile.harness import Asked, Home, add, hostile

HEAD = """
import os, sys
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.inner = nn.Linear(channels, 4)
        self.head = nn.Linear(4, classes)
    def logits(self, inputs):
        return self.head(torch.tanh(self.inner(inputs)))
    def forward(self, inputs):
        return self.logits(inputs)
"""
FORWARDS: dict[str, str] = {  # the body of forward, which answers 2 classes of (B, 8, 2)
    "gives nothing": "return None",
    "gives a dict without logits": "return {'answer': self.logits(inputs)}",
    "gives integers as logits": "return self.logits(inputs).long()",
    "gives five outputs for two classes": "return self.logits(inputs)[..., :1].expand(-1, -1, 5)",
    "gives twice as many steps": "return self.logits(inputs).repeat(1, 2, 1)",
    "gives what has no gradient": "return self.logits(inputs).detach()",
    "gives complex numbers": "return self.logits(inputs).to(torch.complex64)",
    "gives what is not a number": "return self.logits(inputs) * float('nan')",
    "gives a tensor on no device": "return self.logits(inputs).to('meta')",
    "gives a valence of another shape": (
        "return {'logits': self.logits(inputs), 'valence': torch.ones(3)}"
    ),
    "raises what is no Exception": "raise BaseException('no luck')",
    "exits": "sys.exit(0)",
    "recurses": "return self(inputs)",
    "wants more memory than there is": "return torch.empty(10**14)",
    "takes two batches": "raise TypeError('forward() takes 3 positional arguments')",
}
FACTORIES: dict[str, str] = {  # the body of build(*, channels, classes)
    "is None": "return None",
    "is the class": "return Net",
    "is frozen": "return Net(channels, classes).requires_grad_(False)",
    "is of bfloat16": "return Net(channels, classes).bfloat16()",
    "is on no device": "return Net(channels, classes).to('meta')",
    "was not made ready": "net = Net.__new__(Net)\n    return net",
    "is lazy": "return nn.LazyLinear(classes)",
    "is for other channels": "return Net(channels + 1, classes)",
    "raises what is no Exception": "raise BaseException('no luck')",
    "exits": "sys.exit(0)",
    "wants more memory than there is": "return nn.Linear(10**7, 10**7)",
    "recurses": "return build(channels=channels, classes=classes)",
}


def own(home: Home, body: str, words: str = "student") -> Asked:
    """A student of the user's own; own.toml has settings for another."""
    home.write("rude.py", f"{HEAD}\n{body}\n")
    text = (home.here / "own.toml").read_text()
    text = text.replace("[student.settings]\nwidth = 4", '[student]\nmodel = "rude:build"')
    return home.asked("check", home.write("rude.toml", text), code=(2, 3), words=words)


def with_forward(body: str, home: Home) -> Asked:
    net = f"class Rude(Net):\n    def forward(self, inputs):\n        {body}\n"
    return own(
        home,
        f"{net}\ndef build(*, channels, classes):\n    return Rude(channels, classes)",
        "student.model",
    )


def with_factory(body: str, home: Home) -> Asked:
    return own(home, f"def build(*, channels, classes):\n    {body}")


for _name, _body in FORWARDS.items():
    add("module", f"answers: {_name}", partial(with_forward, _body))
for _name, _body in FACTORIES.items():
    add("module", f"built: {_name}", partial(with_factory, _body))


@hostile("module")
def a_factory_that_takes_nothing(home: Home) -> Asked:
    return own(home, "def build():\n    return Net(2, 2)")


@hostile("module")
def a_factory_with_an_escape_sequence(home: Home) -> Asked:
    return own(
        home, "def build(*, channels, classes):\n    raise ValueError('\\x1b[2J' + 'x' * 100000)"
    )


@hostile("module")
def a_factory_that_prints(home: Home) -> Asked:
    home.write(
        "rude.py",
        f"{HEAD}\ndef build(*, channels, classes):\n    print('noise')\n"
        "    os.write(1, b'noise')\n    return Net(channels, classes)\n",
    )
    text = (home.here / "own.toml").read_text()
    text = text.replace("[student.settings]\nwidth = 4", '[student]\nmodel = "rude:build"')

    def check(_home: Home, done: Any) -> list[str]:
        return ["noise on stdout"] if "noise" in done.out else []

    return home.asked(
        "check", home.write("rude.toml", text), code=0, options=("--json",), check=check
    )


def teacher(body: str, words: str, home: Home) -> Asked:
    net = f"class Rude(Net):\n    def forward(self, inputs):\n        {body}\n"
    home.write(
        "rude.py",
        f"{HEAD}\n{net}\n"
        "def build(*, channels, classes, width=4):\n    return Rude(channels, classes)\n",
    )
    text = (home.here / "done.toml").read_text().replace('"mine:teacher"', '"rude:build"')
    return home.asked("check", home.write("rude.toml", text), code=(2, 3), words=words)


for _name in (
    "gives nothing",
    "gives five outputs for two classes",
    "gives twice as many steps",
    "exits",
):
    add("module", f"teaches: {_name}", partial(teacher, FORWARDS[_name], "teacher.model"))


@hostile("sound")
def a_module_of_ones_own(home: Home) -> Asked:
    asked = own(home, "def build(*, channels, classes):\n    return Net(channels, classes)")
    return Asked(asked.argv, 0)
