"""Options that belong together reach a command as one value; the command line sees each option by itself."""

from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_args, get_origin, get_type_hints


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces each parameter that is a dataclass with the options that its fields declare.

    Args:
        command: A command for typer. Its parameters are options declared with ``Annotated``, or dataclasses whose
            fields are such options; no two of them may have the same name.

    Returns:
        The same command, for typer to read: keyword-only parameters, no groups.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters: list[Parameter] = []
    for name, parameter in signature(command).parameters.items():
        if name in groups:
            parameters += _options(groups[name])
        else:
            parameters.append(_option(name, hints[name], parameter.default))

    @wraps(command)
    def flat(**given: Any) -> None:
        values = {
            name: kind(**{field.name: given.pop(field.name) for field in fields(kind)}) for name, kind in groups.items()
        }
        command(**given, **values)

    flat.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def _options(group: Any) -> Iterator[Parameter]:
    """The options that the fields of a dataclass declare."""
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        yield _option(field.name, hints[field.name], Parameter.empty if field.default is MISSING else field.default)


def _option(name: str, annotation: Any, default: Any) -> Parameter:
    """A parameter that typer can read."""
    kind, info = get_args(annotation)
    # Typer knows few types, but a parser may return any: to typer, its option is a word, or a list of them.
    words: Any = list[str] if any(get_origin(part) is list for part in (kind, *get_args(kind))) else str
    readable: Any = annotation if info.parser is None else Annotated[words, info]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=readable)
