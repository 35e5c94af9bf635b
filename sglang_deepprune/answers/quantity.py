"""Figures with a unit: money, percent, lengths, times, angles, counted nouns, clock times.

`measure` splits a folded answer into a value string and a unit; `agree` compares two such
quantities with a caller's comparer for the bare values. A unit missing on one side is a
sibling that dropped it (same answer); two different units are converted exactly, and units of
different dimensions differ. Percent against a bare number means the ratio, except that a bare
number above 1 is read as the same percentage with its sign dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from sglang_deepprune.answers.folding import words

Decision = bool | None
Comparer = Callable[[str, str], Decision]

_MAX_CHARS = 240


@dataclass(frozen=True, slots=True)
class Unit:
    """Dimensions as (name, power) pairs, and the factor that leads to the base unit."""

    dimensions: tuple[tuple[str, int], ...]
    factor: Fraction = Fraction(1)


@dataclass(frozen=True, slots=True)
class Quantity:
    value: str
    unit: Unit | None = None


def _table(rows: str) -> dict[str, Unit]:
    units: dict[str, Unit] = {}
    for row in filter(None, map(str.strip, rows.splitlines())):
        dimension, factor, *names = row.split()
        for name in names:
            units[name] = Unit(((dimension, 1),), Fraction(factor))
    return units


_LITRES = "L l liter liters litre litres Liter"
_MILLILITRES = "mL ml milliliter milliliters millilitre millilitres cc"
_UNITS = _table(
    """
    length 1 m meter meters metre metres Meter Metern mètre mètres metro metros
    length 1/100 cm centimeter centimeters centimetre centimetres Zentimeter
    length 1/1000 mm millimeter millimeters millimetre millimetres
    length 1000 km kilometer kilometers kilometre kilometres Kilometer kilómetros
    length 127/5000 in inch inches
    length 381/1250 ft foot feet
    length 1143/1250 yd yard yards
    length 201168/125 mi mile miles
    mass 1 g gram grams Gramm gramme grammes
    mass 1000 kg kilogram kilograms kilo kilos Kilogramm
    mass 1/1000 mg milligram milligrams
    mass 45359237/100000 lb lbs pound-mass
    mass 1000000 t tonne tonnes
    time 1 s sec secs second seconds Sekunde Sekunden
    time 60 min mins minute minutes Minute Minuten
    time 3600 h hr hrs hour hours Stunde Stunden heure heures hora horas
    time 86400 d day days Tag Tage jour jours día días
    time 604800 week weeks Woche Wochen
    years 1 year years yr yrs Jahr Jahre an ans año años
    years 1/12 month months Monat Monate
    angle 1 ° deg degree degrees Grad
    radian 1 rad radian radians
    celsius 1 °C
    fahrenheit 1 °F
    dollar 1 $ dollar dollars USD US$ Dollar buck bucks
    euro 1 € euro euros EUR Euro
    sterling 1 £ GBP pounds quid
    yen 1 ¥ yen JPY 円
    rupee 1 ₹ rupee rupees INR Rs
    yuan 1 元 CNY RMB yuan
    cent 1 cent cents ¢
    percent 1/100 % percent Prozent percentage
    square 1 square
    cubic 1 cubic sq cu
    none 1 unit units st nd rd th
    """
)
_UNITS |= {name: Unit((("length", 3),), Fraction(1, 1000)) for name in words(_LITRES)}
_UNITS |= {name: Unit((("length", 3),), Fraction(1, 10**6)) for name in words(_MILLILITRES)}
_UNITS["mph"] = Unit((("length", 1), ("time", -1)), Fraction(201168, 125 * 3600))
_UNITS["kph"] = Unit((("length", 1), ("time", -1)), Fraction(1000, 3600))
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(rf"(.*\d) ({'|'.join(_SCALES)})(?= |$)(.*)", re.DOTALL)
_ARC = re.compile(r"(\d+)° ?(\d+)'(?: ?(\d+)(?:''|\"))?")
_SYMBOLIC = frozenset("mgshdtlL")
_WORD = r"(?:[^\W\d_]+|[$€£¥₹元円¢%]|°[CF]?)"
_UNIT_TEXT = rf"(?:{_WORD}\.?(?:\^\{{?-?\d\}}?)?)"
_TAIL = re.compile(rf"{_UNIT_TEXT}(?:(?:\s*(?:/|\\cdot)\s*|\s+){_UNIT_TEXT}){{0,4}}")
_UNIT_PART = re.compile(rf"({_WORD})\.?(?:\^\{{?(-?\d)\}}?)?")
_PREFIX = re.compile(r"(-?)(\$|€|£|¥|₹|USD|EUR|GBP|US\$|Rs\.?)\s*(-?[\d.,]+(?:e\d+)?.{0,80})")
_FRACTION_UNIT = re.compile(r"\\frac\{\s*([a-zA-Z]+)\s*\}\{\s*([a-zA-Z]+)(\^\d)?\s*\}$")
_CLOCK = re.compile(
    r"(\d{1,2}):([0-5]\d)(?::([0-5]\d))?\s*(?:Uhr|h|o'clock)?\s*(?:([ap])\.?\s*m\.?)?",
    re.IGNORECASE,
)
_HOUR = re.compile(r"(\d{1,2})\s*([ap])\.?\s*m\.?", re.IGNORECASE)
_COMPOUND = re.compile(r"\d+(?:\.\d+)? ?[a-z]+(?: (?:and )?\d+(?:\.\d+)? ?[a-z]+)+")
_PLAIN = re.compile(r"-?\d{1,40}(?:\.\d{1,40}|/[1-9]\d{0,40})?")
_FIGURE = re.compile(r"(?:[\d\s.,+\-*/^(){}!|]|\\(?:pi|frac|sqrt|cdot|overline)|\de\d)*")
_CONNECTIVES = frozenset(words("or and und oder et ou y o if is mod to pi sqrt i e x"))


def measure(text: str) -> Quantity:
    """The value and the unit of a folded answer; no unit when the tail is not plainly one."""
    if len(text) > _MAX_CHARS:
        return Quantity(text)
    if money := _PREFIX.fullmatch(text):
        unit = _UNITS[money[2].rstrip(".")]
        rest = measure(money[3])
        is_same = rest.unit is None or rest.unit.dimensions == unit.dimensions
        return Quantity(money[1] + rest.value, unit) if is_same else Quantity(text)
    if (scaled := _SCALED.fullmatch(text)) is not None:
        rest = measure(f"1{scaled[3]}")
        value = f"({scaled[1]})\\cdot10^{{{_SCALES[scaled[2]]}}}"
        return Quantity(value if rest.value == "1" else f"{value}\\cdot({rest.value})", rest.unit)
    if (arc := _ARC.fullmatch(text)) is not None:
        degrees = Fraction(int(arc[1]) * 3600 + int(arc[2]) * 60 + int(arc[3] or 0), 3600)
        return Quantity(str(degrees), _UNITS["°"])
    if _COMPOUND.fullmatch(text):
        return _compound(text) or Quantity(text)
    text = _FRACTION_UNIT.sub(r" \1/\2\3", text)
    for match in re.finditer(r"(?<=[\d)}\]!]) ?(?=[^\W\d]|[$€£¥₹元円¢%°])|(?<=[a-z]) (?=\w)", text):
        value, tail = text[: match.start()], text[match.end() :]
        is_figure = _FIGURE.fullmatch(value) is not None
        if _TAIL.fullmatch(tail) and (found := _unit(tail, match[0] == " ", is_figure)):
            return Quantity(value.strip(), None if found.dimensions == (("none", 1),) else found)
    return Quantity(text)


def _unit(tail: str, is_apart: bool, is_figure: bool) -> Unit | None:
    """`m`, `cm^2`, `km/h`, `square metres`; after a figure and a space any noun (`12 apples`)."""
    powers: dict[str, int] = {}
    factor, sign, bonus = Fraction(1), 1, 1
    nouns: list[str] = []
    for token in re.findall(rf"/|\\cdot|{_UNIT_TEXT}", tail):
        if token in ("/", "per", "pro"):
            sign = -1
        elif (part := _UNIT_PART.fullmatch(token)) is None or part[1] in _CONNECTIVES:
            return None
        elif part[1] in ("square", "sq", "cubic", "cu"):
            bonus = 2 if part[1] in ("square", "sq") else 3
        elif part[1] not in _UNITS:
            nouns.append(token)
        elif part[1] in _SYMBOLIC and not (is_apart and is_figure):
            return None  # 12m and \\pi r^2 h are products.
        else:
            unit = _UNITS[part[1]]
            power = sign * int(part[2] or 1) * bonus
            for name, own in unit.dimensions:
                powers[name] = powers.get(name, 0) + own * power
            factor, sign, bonus = factor * unit.factor**power, 1, 1
    if nouns:
        return _noun(nouns) if is_apart and is_figure and not powers else None
    return Unit(tuple(sorted(powers.items())), factor) if powers else None


def _noun(nouns: list[str]) -> Unit | None:
    if not all(len(word) > 2 and word.isalpha() for word in nouns):
        return None
    stems = sorted({word.casefold().removesuffix("s") for word in nouns})
    return Unit(tuple((f"noun {stem}", 1) for stem in stems))


def is_compound(text: str) -> bool:
    """`2 hours and 15 minutes` is one quantity, not a list."""
    return bool(_COMPOUND.fullmatch(text)) and _compound(text) is not None


def _compound(text: str) -> Quantity | None:
    """`1 hour 30 minutes`, `5 ft 3 in`: one value in the base unit."""
    total, dimensions = Fraction(0), set()
    for figure, name in re.findall(r"(\d+(?:\.\d+)?) ?([a-z]+)", text):
        if (unit := _UNITS.get(name)) is None:
            return None
        total += Fraction(figure) * unit.factor
        dimensions.add(unit.dimensions)
    return Quantity(str(total), Unit(dimensions.pop())) if len(dimensions) == 1 else None


def clock(text: str) -> tuple[int, bool] | None:
    """Seconds after midnight, and whether am or pm was written."""
    match = _CLOCK.fullmatch(text)
    hour_only = None if match else _HOUR.fullmatch(text)
    if match is not None:
        hour, minute, second = int(match[1]), int(match[2]), int(match[3] or 0)
        half = match[4]
    elif hour_only is not None:
        hour, minute, second, half = int(hour_only[1]), 0, 0, hour_only[2]
    else:
        return None
    if half is not None and 1 <= hour <= 12:
        hour = hour % 12 + (12 if half.lower() == "p" else 0)
    return hour * 3600 + minute * 60 + second, half is not None


def agree(a: str, b: str, values: Comparer) -> Decision:
    """Whether two folded answers are the same quantity."""
    clocks = clock(a), clock(b)
    if clocks[0] is not None and clocks[1] is not None:
        return _same_clock(clocks[0], clocks[1])
    left, right = measure(a), measure(b)
    if left.unit is None and right.unit is None:
        return values(left.value, right.value)
    if left.unit is None or right.unit is None:
        bare, dressed = (left, right) if left.unit is None else (right, left)
        assert dressed.unit is not None
        return _against_bare(dressed.value, dressed.unit, bare.value, values)
    return _against_unit(left, right, values)


def _same_clock(left: tuple[int, bool], right: tuple[int, bool]) -> bool:
    half_day = 12 * 3600
    if left[1] != right[1] and (left if right[1] else right)[0] < half_day + 3600:
        # One sibling left out am or pm. 13:00 and later say it themselves.
        return left[0] % half_day == right[0] % half_day
    return left[0] == right[0]


def _against_bare(value: str, unit: Unit, bare: str, values: Comparer) -> Decision:
    if unit.dimensions == (("percent", 1),):
        ratio = values(f"({value})/100", bare)
        if ratio is not False:
            return ratio
        # `40` next to `40%` is a dropped sign; `0.5` next to `0.5%` is a factor of 100.
        is_above_one = bool(_PLAIN.fullmatch(bare)) and abs(Fraction(bare)) > 1
        return values(value, bare) if is_above_one else False
    if unit.dimensions == (("angle", 1),) and r"\pi" in bare:
        return values(f"({value})\\cdot\\pi/180", bare)
    return values(value, bare)


def _against_unit(left: Quantity, right: Quantity, values: Comparer) -> Decision:
    assert left.unit is not None and right.unit is not None
    sides = {left.unit.dimensions: left, right.unit.dimensions: right}
    if len(sides) == 1:
        if left.unit.factor == right.unit.factor:
            return values(left.value, right.value)
        return values(*(f"({q.value})\\cdot({q.unit.factor})" for q in (left, right) if q.unit))
    names = {dimensions[0][0] for dimensions in sides if len(dimensions) == 1}
    if names == {"angle", "radian"}:
        degrees, radians = sides[(("angle", 1),)], sides[(("radian", 1),)]
        return values(f"({degrees.value})\\cdot\\pi/180", radians.value)
    if "cent" in names and names & {"dollar", "euro"}:
        cents = sides.pop((("cent", 1),))
        (whole,) = sides.values()
        return values(f"({cents.value})/100", whole.value)
    names_of = [{name for name, _ in unit.dimensions} for unit in (left.unit, right.unit)]
    if all(name.startswith("noun ") for name in names_of[0] | names_of[1]) and (
        names_of[0] <= names_of[1] or names_of[1] <= names_of[0]
    ):
        return values(left.value, right.value)
    return False
