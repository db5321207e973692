"""Names of modalities: those of the field, their aliases, and which file means which."""

import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

from data_pipelines.faults import DataError

T = TypeVar("T")

ALIASES: dict[str, tuple[str, ...]] = {
    "t2w": ("t2", "t2_tra", "t2_tse", "t2_weighted"),
    "adc": ("adc_map",),
    "hbv": ("dwi", "high_b", "highb", "high_b_value", "dwi_high_b"),
}
"""Other names under which a modality is accepted, in lower case with ``_`` for blanks and ``-``."""


def plain(name: str) -> str:
    """A name in lower case with ``_`` for blanks and hyphens."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def modality_of(name: str, wanted: Sequence[str]) -> str | None:
    """Which of the wanted modalities a name means: that of the same name, else by an alias."""
    name = plain(name)
    for modality in wanted:
        if name == plain(modality):
            return modality
    return next((m for m in wanted if name in ALIASES.get(plain(m), ())), None)


def by_modality(
    named: Iterable[tuple[str, T]], wanted: Sequence[str]
) -> tuple[dict[str, list[T]], list[T]]:
    """Things sorted by the modality that their names mean, and those that are left.

    Where something bears the very name of a modality, others that are called by an alias are left.
    """
    exact: dict[str, list[T]] = {}
    alias: dict[str, list[T]] = {}
    left = []
    for name, thing in named:
        modality = modality_of(name, wanted)
        if modality is None:
            left.append(thing)
        else:
            kind = exact if plain(name) == plain(modality) else alias
            kind.setdefault(modality, []).append(thing)
    for modality, things in alias.items():
        if modality in exact:
            left += things
        else:
            exact[modality] = things
    return exact, left


def standard_names(names: Sequence[str]) -> tuple[str, ...]:
    """Modalities as they are called here, from what was typed: ``T2W``, ``dwi``, ``t2w,adc``.

    An alias stands for the field's name, unless that is among the names too.

    Raises:
        DataError: none, or one twice.
    """
    typed = [word for name in names for word in re.split(r"[,;\s]+", name.strip()) if word]
    words = [plain(word) for word in typed]
    fields = {alias: field for field, aliases in ALIASES.items() for alias in aliases}
    found = tuple(
        fields[word] if fields.get(word, word) not in words and word in fields else word
        for word in words
    )
    if not found or len({*found}) < len(found):
        raise DataError(
            "there must be at least one modality, and each once; got "
            f"{', '.join(typed) or 'none'}. Write --data.modalities t2w adc hbv."
        )
    return found
