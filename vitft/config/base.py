"""What every set of settings is made of: a field with its help, and errors that name what was typed."""

import re
import reprlib
from typing import Any, ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vitft.errors import UsageError, as_flag, nearest

_brief = reprlib.Repr()
_brief.maxlevel, _brief.maxstring = 2, 60  # what was got, in an error of one line


def setting(default: Any, panel: str, description: str, *, steers: bool = False, **bounds: Any) -> Any:
    """A field of settings. `steers`: it may differ when a run is resumed: it is about how, not what."""
    extra: dict[str, Any] = {"panel": panel, "steers": steers}
    return Field(default, description=description, json_schema_extra=extra, **bounds)


class Settings(BaseModel):
    """What is read from flags and recipes: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    command: ClassVar[str]
    """The command that takes these settings as flags."""

    @classmethod
    def parse(cls, values: dict[str, Any], origin: str = "settings") -> Self:
        """Check a dictionary of settings; `origin` says in an error where they came from.

        Raises UsageError: an unknown key (with the nearest known one) or an unusable value.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first, *others = error.errors()
        key, got = str(first["loc"][0]) if first["loc"] else "", first["input"]
        if first["type"] == "extra_forbidden":
            hint = nearest(key, cls.model_fields) or f"; `{cls.command} --help` lists the settings"
            raise UsageError(f"{origin}: unknown setting {key!r}{hint}")
        message = first["msg"].removeprefix("Value error, ").removeprefix("Input ").partition(", unable")[0]
        also = [
            other["msg"].removeprefix("Input should be ") for other in others if other["loc"][:1] == first["loc"][:1]
        ]
        message = " or ".join([message, *also]) if key else message  # a number or a word: what each would be
        typed = origin == "flags"
        if not key:  # settings that do not agree with each other
            spelled = re.sub(r"`(\w+)`", lambda name: as_flag(name[1]) if typed else name[1], message)
            raise UsageError(spelled if typed else f"{origin}: {spelled}")
        name = as_flag(key) if typed else f"{origin}: {key}"
        choices = get_args(cls.model_fields[key].annotation) if first["type"] == "literal_error" else ()
        hint = nearest(got, choices) if isinstance(got, str) else ""
        raise UsageError(f"{name} {message}, got {_brief.repr(got)}{hint}")
