"""The docstrings of the library, in the words that the site's reader of them knows."""

import inspect
import re
from typing import Any

import griffe

_PAGE = re.compile(r"`?docs/(\w+)\.md`?")
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")


class Sections(griffe.Extension):
    """Makes sections of "Example", of "References", and of the "Args" of named tuples; and links."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Write the docstring of one object anew."""
        if obj.docstring is None:
            return
        renamed = {"Example:": "Examples:"}
        if isinstance(obj, griffe.Class) and any(str(base) == "NamedTuple" for base in obj.bases):
            renamed["Args:"] = "Attributes:"
        lines = inspect.cleandoc(obj.docstring.value).splitlines()
        text = "\n".join(renamed.get(line, line) for line in lines)
        text = _ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
        # The pages of the reference have a folder of their own.
        text = _PAGE.sub(lambda page: f"[{page[1].capitalize()}](../{page[1]}.md)", text)
        before, references, rest = text.partition("\nReferences:\n")
        if references:
            text = f"{before}\n**References:** {inspect.cleandoc(rest)}"
        obj.docstring.value = text
