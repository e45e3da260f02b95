"""Base class of all settings: fields with help and panel, and validation errors that name what the user typed."""

import re
import reprlib
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from vitft.errors import UsageError, as_flag, nearest

_brief = reprlib.Repr()
_brief.maxlevel, _brief.maxstring = 2, 60  # keeps errors to one line


def setting(
    default: Any, panel: str, description: str, *, changeable: bool = False, path: bool = False, **bounds: Any
) -> Any:  # fmt: skip
    """A field of settings.

    `changeable`: it can change on resume, because it does not affect the result, but for rounding. `path`: it can be a
    local path.
    """
    extra: dict[str, Any] = {"panel": panel, "changeable": changeable, "path": path}
    return Field(default, description=description, json_schema_extra=extra, **bounds)


def unsets(value: Any, field: FieldInfo) -> bool:
    """Whether a typed value stands for none, where a setting may have none: it undoes a recipe's.

    The empty text does; where no text is a value, the word none too.
    """
    kinds = get_args(field.annotation)
    return NoneType in kinds and (value == "" or (value == "none" and str not in kinds))


class Settings(BaseModel):
    """Settings from flags and recipes: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    command: ClassVar[str]
    """The command that has these settings as flags."""

    if not TYPE_CHECKING:  # type checkers derive the signature from the fields

        def __init__(self, **values: Any) -> None:
            """Raise UsageError for an unknown name or an invalid value."""
            self._validate(values, type(self).__name__)

    @classmethod
    def parse(cls, values: dict[str, Any], origin: str = "settings") -> Self:
        """Validate a dictionary of settings. `origin` names their source in errors; "flags" spells keys as flags.

        Raises UsageError for an unknown key (and names the closest known one) or an invalid value.
        """
        settings = cls.__new__(cls)
        settings._validate(values, origin)
        return settings

    def _validate(self, values: dict[str, Any], origin: str) -> None:
        cls = type(self)
        try:  # as BaseModel.__init__ does
            self.__pydantic_validator__.validate_python(values, self_instance=self)
            return
        except ValidationError as error:
            first, *others = error.errors()
        key, value = str(first["loc"][0]) if first["loc"] else "", first["input"]
        if first["type"] == "extra_forbidden":
            hint = nearest(key, cls.model_fields) or f"; `{cls.command} --help` lists the settings"
            raise UsageError(f"{origin}: unknown setting {key!r}{hint}")
        message = first["msg"].removeprefix("Value error, ").removeprefix("Input ").partition(", unable")[0]
        is_flag = origin == "flags"
        if not key:  # settings that contradict each other
            message = re.sub(r"`(\w+)`", lambda name: as_flag(name[1]) if is_flag else name[1], message)
            raise UsageError(message if is_flag else f"{origin}: {message}")
        # Pydantic reports each member of a union separately.
        also = [
            error["msg"].removeprefix("Input should be ") for error in others if error["loc"][:1] == first["loc"][:1]
        ]
        message = " or ".join([message, *also])
        name = as_flag(key) if is_flag else f"{origin}: {key}"
        choices = get_args(cls.model_fields[key].annotation) if first["type"] == "literal_error" else ()
        hint = nearest(value, choices) if isinstance(value, str) else ""
        raise UsageError(f"{name} {message}, got {_brief.repr(value)}{hint}")
