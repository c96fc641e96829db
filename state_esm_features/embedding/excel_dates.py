"""Dates that a spreadsheet made of gene symbols: what they look like, and what they may have been.

Nothing is guessed: MARCH1 and MARC1 have both become 1-Mar. How a gene is found is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache

from state_esm_features.embedding.gene_names import NAME_KINDS

MONTHS = (
    ("jan", "january", "januar", "janv", "janvier", "ene", "enero"),
    ("feb", "february", "februar", "févr", "février", "febrero"),
    ("mar", "march", "mrz", "mär", "märz", "mars", "marzo", "mrt", "maart"),
    ("apr", "april", "avr", "avril", "abr", "abril"),
    ("may", "mai", "mei", "mayo"),
    ("jun", "june", "juni", "juin", "junio"),
    ("jul", "july", "juli", "juil", "juillet", "julio"),
    ("aug", "august", "août", "ago", "agosto", "augustus"),
    ("sep", "sept", "september", "septembre", "septiembre"),
    ("oct", "october", "okt", "oktober", "octobre", "octubre"),
    ("nov", "november", "novembre", "noviembre"),
    ("dec", "december", "dez", "dezember", "déc", "décembre", "dic", "diciembre"),
)
"""Months from January, as English, German, French, Spanish and Dutch spreadsheets write them."""

NUMBER_OF_MONTH = {name: number for number, names in enumerate(MONTHS, 1) for name in names}

STEMS = {
    **{number: (names[0].upper(),) for number, names in enumerate(MONTHS, 1)},
    **{3: ("MARCH", "MARC", "MAR"), 9: ("SEPT", "SEP")},
}
"""{month: what stood before the number}, of which spreadsheets make dates (Ziemann et al. 2016,
doi:10.1186/s13059-016-1044-7; Bruford et al. 2020, doi:10.1038/s41588-020-0669-3)."""

DAY, YEAR, TIME = (
    r"(0?[1-9]|[12]\d|3[01])",
    r"(?:19|20)\d\d",
    r"(?:[ T]\d{1,2}:\d\d(?::\d\d[\d.]*)?)?",
)
NAME = f"({'|'.join(sorted(NUMBER_OF_MONTH, key=len, reverse=True))})"

DAY_AND_NAME = re.compile(rf"{DAY}(?:[-/ ]|\. ?){NAME}\.?(?:[-/ ](?:{YEAR}|\d\d))?{TIME}", re.I)
"""1-Mar, 01. Mrz, 1-Mar-23."""

NAME_AND_YEAR = re.compile(rf"{NAME}\.?[-. ](\d\d)", re.I)
"""Mar-01: a number taken for a year. In capitals it is a name of a gene, such as OCT-11."""

YEAR_FIRST = re.compile(rf"{YEAR}([-/.])(\d\d?)\1{DAY}{TIME}")
"""2023-03-01, 2023-03-01 00:00:00."""

YEAR_LAST = re.compile(rf"(\d\d?)(?:([-/.])(\d\d?)\2{YEAR}|/(\d\d?)/\d\d){TIME}")
"""3/1/2023, 01.03.2023, 3/1/23: whether the month or the day is first is not known. 14-3-3 is a
gene."""


@lru_cache(1 << 16)
def symbols_behind(text: str) -> tuple[str, ...]:
    """Symbols of which a spreadsheet makes this date, likeliest first; none if it is no date.

    >>> symbols_behind("1-Mar")
    ('MARCH1', 'MARC1', 'MAR1')
    """
    text = text.strip()
    readings: list[tuple[int, int]] = []
    if not any(map(str.isdecimal, text)):  # most names of genes are no dates at the first look
        return ()
    if match := DAY_AND_NAME.fullmatch(text):
        readings = [(NUMBER_OF_MONTH[match[2].lower()], int(match[1]))]
    elif (match := NAME_AND_YEAR.fullmatch(text)) and not match[1].isupper():
        readings = [(NUMBER_OF_MONTH[match[1].lower()], int(match[2]))]
    elif match := YEAR_FIRST.fullmatch(text):
        readings = [(int(match[2]), int(match[3]))]
    elif match := YEAR_LAST.fullmatch(text):
        first, second = int(match[1]), int(match[3] or match[4])
        readings = [(first, second), (second, first)]
    valid = [(month, day) for month, day in readings if month in STEMS and 1 <= day <= 31]
    return tuple(dict.fromkeys(f"{stem}{day}" for month, day in valid for stem in STEMS[month]))


def genes_behind(text: str, meanings: Callable[[str], Mapping[str, str]]) -> dict[str, str]:
    """{gene: the symbol that a spreadsheet turned into this date}.

    Parameters
    ----------
    meanings
        {gene: how} of a name, how being one of NAME_KINDS. The genes that have the firmest of them
        are taken: of 1-Mar those whose symbols MARCH1 and MARC1 were, not RTL1 with its alias MAR1.
    """
    ranked = [
        (NAME_KINDS.index(how), gene, symbol)
        for symbol in symbols_behind(text)
        for gene, how in meanings(symbol).items()
    ]
    firmest = min((rank for rank, *_ in ranked), default=0)
    genes: dict[str, str] = {}
    for rank, gene, symbol in ranked:
        if rank == firmest:
            genes.setdefault(gene, symbol)
    return genes
