"""What is wrong with a request, said as a person would, with the option that it came from."""

import difflib
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails

    M = TypeVar("M", bound=BaseModel)

_LABEL_KEY = "letters, digits, '.', '_', '/' and '-', at most 63 of them"
_LABEL_VALUE = "letters, digits, '.', '_' and '-', at most 63 of them"
_SHORT_NAME = "letters, digits, '.', '_' and '-', at most 63 of them, beginning and ending with a letter or digit"
_VM_NAME = "lower-case letters, digits and '-', at most 63 of them, beginning with a letter and not ending with '-'"
_ID = "lower-case letters, digits and '-', at most 62 of them, beginning with a letter"


@dataclass(frozen=True, slots=True)
class Rule:
    """A field: the option that sets it, and what it may be, as the end of a sentence."""

    option: str
    rule: str


#: Fields by their path, in which `*` stands for one part; the first that fits. A test holds it against the documents.
RULES: dict[str, Rule] = {
    "name": Rule("NAME", f"a name is made of {_VM_NAME}"),
    "new_name": Rule("NEW", f"a name is made of {_VM_NAME}"),
    "project": Rule("PROJECT", f"a project's name is made of {_ID}"),
    "user": Rule("USER", f"a broker user's name is made of {_ID}, and does not begin with leveret"),
    "token_name": Rule("NAME", f"a token's name is made of {_SHORT_NAME}"),
    "vcpus": Rule("--vcpus", "a VM has from 1 to 256 of them"),
    "memory_mib": Rule("--memory", "a VM has from 64M to 4T of memory, in whole MiB"),
    "disk_gib": Rule("--disk", "a VM's disk has from 1G to 64T, in whole GiB"),
    "image": Rule("--image", "write {name: NAME} of a registered image, or {url: URL, sha256: SHA256}"),
    "image.name": Rule("--image", f"the name of an image is made of {_SHORT_NAME}"),
    "image.sha256": Rule("--sha256", "a sha256 has 64 digits from 0 to f"),
    "image.format": Rule("--image-format", "an image is qcow2 or raw"),
    "image.url": Rule("--image", "the url of an image has from 8 to 2048 characters"),
    "ssh_keys": Rule("--ssh-key", "give at most 64 OpenSSH public keys, each of at most 8 KiB"),
    "user_data": Rule("--user-data", "it may have up to 1 MiB"),
    "user_data_base64": Rule("--user-data", "it may have up to 1 MiB"),
    "network": Rule("--network", f"the name of a network is made of {_SHORT_NAME}"),
    "labels": Rule("--label", "a VM has at most 32 labels"),
    "labels.*": Rule("--label", f"the value of label {{key!r}} may have {_LABEL_VALUE}"),
    "labels.*.[key]": Rule("--label", f"{{key!r}} is no key of a label: it may have {_LABEL_KEY}"),
    "placement.zones": Rule("--zone", "give at most 32 zones"),
    "placement.zones.*": Rule("--zone", f"the name of a zone is made of {_SHORT_NAME}"),
    "placement.strategy": Rule("--strategy", "it is spread or pack"),
    "placement.require_labels": Rule("--require-label", "give at most 32 labels"),
    "placement.require_labels.*": Rule("--require-label", f"the value of label {{key!r}} may have {_LABEL_VALUE}"),
    "placement.require_labels.*.[key]": Rule("--require-label", f"{{key!r}} is no key: it may have {_LABEL_KEY}"),
    "placement.forbid_labels": Rule("--forbid-label", "give at most 32 labels"),
    "placement.forbid_labels.*": Rule("--forbid-label", f"the value of label {{key!r}} may have {_LABEL_VALUE}"),
    "placement.forbid_labels.*.[key]": Rule("--forbid-label", f"{{key!r}} is no key: it may have {_LABEL_KEY}"),
    "placement.tolerate": Rule("--tolerate", "give at most 32 taints"),
    "placement.tolerate.*": Rule("--tolerate", f"the value of taint {{key!r}} may have {_LABEL_VALUE}"),
    "placement.tolerate.*.[key]": Rule("--tolerate", f"{{key!r}} is no key: it may have {_LABEL_KEY}"),
    "placement.hosts": Rule("--on-host", "give at most 32 hosts"),
    "placement.hosts.*": Rule("--on-host", f"the name of a host is made of {_SHORT_NAME}"),
    "placement.group": Rule("--group", f"the name of a group is made of {_VM_NAME}"),
    "group_name": Rule("GROUP", f"the name of a group is made of {_VM_NAME}"),
    "count": Rule("--count", "one request may ask for 1 to 100 VMs"),
    "wait_for_capacity": Rule("--wait-for-capacity", "it is true or false"),
    "on_host_failure": Rule("--on-host-failure", "it is none or restart"),
    "reason": Rule("--reason", "say it in one line of 4 to 512 characters"),
    "proof": Rule("--proof", "say in one line of 4 to 512 characters how it was made sure that the host is off"),
    "vms": Rule("--vms", "give a number that is not negative, or none"),
    "requests_per_s": Rule("--requests-per-s", "give from 1 to 1000000"),
    "request_burst": Rule("--request-burst", "give from 1 to 1000000"),
    "expires_at": Rule("--expires", "give a time such as 30d, or a date such as 2027-01-31"),
}

#: What is said whatever the field is. The rest is told by the field's rule.
_BY_TYPE: dict[str, Callable[[dict[str, Any]], str]] = {
    "missing": lambda _: "is missing",
    "int_type": lambda _: "must be a whole number",
    "int_from_float": lambda _: "must be a whole number",
    "string_type": lambda _: "must be a text; put it in quotes",
    "bool_type": lambda _: "must be true or false",
    "model_type": lambda _: "must be a mapping, with `key: value` lines",
    "dict_type": lambda _: "must be a mapping, with `key: value` lines",
    "tuple_type": lambda _: "must be a list",
    "list_type": lambda _: "must be a list",
    "value_error": lambda context: str(context["error"]),
}


#: What pydantic puts into the path for the branch of a schema that it was in.
_BRANCHES = frozenset({"ImageByName", "ImageByUrl", "constrained-str"})


@dataclass(frozen=True, slots=True)
class Fault:
    """`field` is the path in the document; `option` is None when no option sets it."""

    field: str
    option: str | None
    message: str


def checked(model: "type[M]", asked: Mapping[str, Any], *, rename: Mapping[str, str] | None = None) -> "M":
    """The document, or a usage error that names the option. `rename` says what a field is called in RULES."""
    from pydantic import ValidationError

    try:
        return model.model_validate(dict(asked))
    except ValidationError as error:
        found = faults(error, asked, model, rename=rename)
    if len(found) == 1:
        one = found[0]
        raise typer.BadParameter(f"{one.message}.", param_hint=one.option or one.field)
    raise typer.BadParameter("; ".join(f"{one.option or one.field}: {one.message}" for one in found) + ".")


def checked_word(kind: Any, word: str, field: str) -> None:
    """Raises a usage error for a word that is none of this annotated type; `field` is its name in RULES."""
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(kind).validate_python(word)
    except ValidationError:
        raise typer.BadParameter(f"{RULES[field].rule}.", param_hint=RULES[field].option) from None


def faults(
    error: "ValidationError",
    asked: Mapping[str, Any],
    model: "type[BaseModel]",
    *,
    rename: Mapping[str, str] | None = None,
) -> list[Fault]:
    """Every fault once. A value is never told: it may be a secret."""
    told: dict[Fault, None] = {}
    for detail in error.errors(include_url=False, include_input=False):
        # What may be left out has a branch of the schema in which it is none: nobody means that.
        if detail["type"] != "none_required" and not _of_the_other_image(detail, asked):
            told[_fault(detail, model, rename or {})] = None
    return list(told)


def _of_the_other_image(detail: "ErrorDetails", asked: Mapping[str, Any]) -> bool:
    """An image has two forms, and what is wrong with the one that was not meant is of no interest."""
    image = asked.get("image")
    meant = "ImageByUrl" if isinstance(image, Mapping) and {"url", "sha256"} & image.keys() else "ImageByName"
    return any(part in {"ImageByName", "ImageByUrl"} and part != meant for part in detail["loc"])


def _fault(detail: "ErrorDetails", model: "type[BaseModel]", rename: Mapping[str, str]) -> Fault:
    path = [str(part) for part in detail["loc"] if part not in _BRANCHES]
    field = ".".join(part for part in path if part != "[key]") or "the document"
    if path and path[0] in rename:
        path[0] = rename[path[0]]
    rule = _rule(path)
    option = rule.option if rule else None
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], list(model.model_fields), 1) if len(path) == 1 else []
        return Fault(field, None, "there is no such field" + (f": is `{near[0]}` meant?" if near else ""))
    if kind in _BY_TYPE and (kind == "missing" or path != ["image"]):
        return Fault(field, option, _BY_TYPE[kind](context))
    if rule is None:
        return Fault(field, None, re.sub(r"^(Value|Input) .*?, ", "", detail["msg"]))
    key = next((own for above, own in itertools.pairwise(path) if above.endswith(("labels", "tolerate"))), "")
    return Fault(field, option, rule.rule.replace("{key!r}", repr(key)))


def _rule(path: list[str]) -> Rule | None:
    for pattern, rule in RULES.items():
        parts = pattern.split(".")
        if len(parts) == len(path) and all(part in {"*", own} for part, own in zip(parts, path, strict=True)):
            return rule
    return RULES.get(".".join(path[:-1])) if len(path) > 1 and path[-1].isdigit() else None
