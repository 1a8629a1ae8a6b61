"""A setting as lines that can be copied: a command, and Python."""

import json
import shlex
from dataclasses import dataclass

from specdec import zoo
from specdec.evals.candidates import Setting

_PROMPT = "def quicksort(items):"


@dataclass(frozen=True, slots=True)
class Recipe:
    """The models that settings are for, as they were named."""

    target: str
    draft: str | None
    dtype: str = "auto"
    device: str | None = None
    temperature: float = 0.0
    own_tokenizer: bool = False  # of the draft

    def command(self, setting: Setting) -> str:
        """Continues a text with it."""
        words = ["specdec", "generate", "--target", self.target]
        if setting.uses_draft and self.draft is not None:
            words += ["--draft", self.draft]
        if self.dtype != "auto":
            words += ["--dtype", self.dtype]
        if self.device is not None:
            words += ["--device", self.device]
        if self.temperature:
            words += ["--temperature", str(self.temperature)]
        return shlex.join([*words, *flags(setting), _PROMPT])

    def python(self, setting: Setting) -> str:
        """Makes the models, and of them what generates with it."""
        classes = ["AutoModelForCausalLM"]
        lines = [self._model("target", self.target)]
        given = ["target"]
        options = [
            f"{name!r}: {value!r}"
            for name, value in setting.arguments.get("proposer_options", {}).items()
        ]
        if setting.uses_draft and self.draft is not None:
            lines.append(self._model("draft", self.draft))
            given.append("draft=draft")
            if self.own_tokenizer:
                classes.append("AutoTokenizer")
                lines += [
                    f"tokenizer = AutoTokenizer.from_pretrained({_place(self.target)})",
                    f"draft_tokenizer = AutoTokenizer.from_pretrained({_place(self.draft)})",
                ]
                both = ["'tokenizer': tokenizer", "'draft_tokenizer': draft_tokenizer"]
                options = [*both, *options]
        given += [f"{k}={v!r}" for k, v in setting.arguments.items() if k != "proposer_options"]
        if options:
            given.append(f"proposer_options={{{', '.join(options)}}}")
        imports = ["import specdec"]
        if any("zoo.path(" in line for line in lines):
            imports.append("from specdec import zoo")
        imports.append(f"from transformers import {', '.join(classes)}")
        return "\n".join([*imports, *lines, f"spec = specdec.wrap({', '.join(given)})"])

    def _model(self, role: str, name: str) -> str:
        moved = "" if self.device is None else f".to({self.device!r})"
        loaded = f"AutoModelForCausalLM.from_pretrained({_place(name)}, dtype={self.dtype!r})"
        return f"{role} = {loaded}{moved}"


def flags(setting: Setting) -> list[str]:
    """Those of generate that stand for the setting's arguments."""
    arguments = dict(setting.arguments)
    if not arguments:
        return ["--no-speculation"]
    proposer = arguments.pop("proposer")
    names = proposer if isinstance(proposer, list) else [proposer]
    words = ["--proposer", ",".join(names)]
    for name, value in arguments.pop("proposer_options", {}).items():
        words += ["--proposer-option", f"{name}={json.dumps(value, separators=(',', ':'))}"]
    for name, value in arguments.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def _place(name: str) -> str:
    return f"zoo.path({name!r})" if name in zoo.NAMES else repr(name)
