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
    none 1 unit units st nd rd th old
    length 1/1000000 μm um micrometer micrometers
    length 1/1000000000 nm nanometer nanometers
    time 1/1000 ms millisecond milliseconds
    time 1/1000000 μs us microsecond microseconds
    time 1/1000000000 ns nanosecond nanoseconds
    length 1 м метр метра метров 米
    length 1/100 см 厘米
    length 1/1000 мм 毫米
    length 1000 км 公里
    mass 1 г грамм граммов 克
    mass 1000 кг 公斤
    time 1 秒 секунд
    time 60 分钟 минут
    time 3600 小时 часов часа
    angle 1 度
    frequency 1 Hz hertz
    frequency 1000 kHz
    frequency 1000000 MHz
    frequency 1000000000 GHz
    force 1 N newton newtons
    force 1000 kN
    energy 1 J joule joules
    energy 1000 kJ
    energy 1000000 MJ
    electronvolt 1 eV
    electronvolt 1000 keV
    electronvolt 1000000 MeV
    electronvolt 1000000000 GeV
    calorie 1 cal calorie calories
    calorie 1000 kcal
    power 1 W watt watts
    power 1000 kW
    power 1000000 MW
    voltage 1 V volt volts
    voltage 1/1000 mV
    voltage 1000 kV
    current 1 A amp amps ampere amperes
    current 1/1000 mA
    resistance 1 \\Omega Ω ohm ohms
    resistance 1000 k\\Omega kΩ
    pressure 1 Pa pascal pascals
    pressure 1000 kPa
    pressure 1000000 MPa
    atmosphere 1 atm
    kelvin 1 K kelvin kelvins
    amount 1 mol mole moles
    amount 1/1000 mmol
    molar 1 M molar
    bytes 1 B byte bytes
    bytes 1000 kB KB
    bytes 1000000 MB
    bytes 1000000000 GB
    """
)
_UNITS |= {name: Unit((("length", 3),), Fraction(1, 1000)) for name in words(_LITRES)}
_UNITS |= {name: Unit((("length", 3),), Fraction(1, 10**6)) for name in words(_MILLILITRES)}
_UNITS["mph"] = Unit((("length", 1), ("time", -1)), Fraction(201168, 125 * 3600))
_UNITS["kph"] = Unit((("length", 1), ("time", -1)), Fraction(1000, 3600))
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(rf"(.*\d) ({'|'.join(_SCALES)})(?= |$)(.*)", re.DOTALL)
_ARC = re.compile(r"(\d+)° ?(\d+)'(?: ?(\d+)(?:''|\"))?")
_SYMBOLIC = frozenset("mgshdtlLNJWVAKMB")
_WORD = r"(?:[^\W\d_]+|k?\\Omega(?![a-zA-Z])|[$€£¥₹元円¢%]|°[CF]?)"
_UNIT_TEXT = rf"(?:{_WORD}\.?(?:\^\{{?-?\d\}}?)?)"
_TAIL = re.compile(rf"/?\s?{_UNIT_TEXT}(?:(?:\s*(?:/|\\cdot)\s*|\s+){_UNIT_TEXT}){{0,4}}")
_UNIT_PART = re.compile(rf"({_WORD})\.?(?:\^\{{?(-?\d)\}}?)?")
_PREFIX = re.compile(r"(-?)(\$|€|£|¥|₹|USD|EUR|GBP|US\$|Rs\.?)\s*(-?[\d.,]+(?:e\d+)?.{0,80})")
_FRACTION_UNIT = re.compile(r"\\frac\{\s*([a-zA-Z]+)\s*\}\{\s*([a-zA-Z]+)(\^\d)?\s*\}$")
_CLOCK = re.compile(
    r"(\d{1,2})[:h]([0-5]\d)(?::([0-5]\d))?\s*(?:Uhr|h|o'clock)?\s*(?:([ap])\.?\s*m\.?)?",
    re.IGNORECASE,
)
_HOUR = re.compile(r"(\d{1,2})\s*(?:([ap])\.?\s*m\.?|o'clock)", re.IGNORECASE)
_COMPOUND = re.compile(r"\d+(?:\.\d+)? ?[a-z]+(?:,? ?(?:and )?\d+(?:\.\d+)? ?[a-z]+)+")
_RATIO = re.compile(r"(\d{1,40}(?:\.\d{1,40})?):(\d{1,40}(?:\.\d{1,40})?)")
_BASED = re.compile(r"(?=[A-F]*\d)([0-9A-F]+)_\{?(\d{1,2})\}?")
_ZEROS = {"千": 3, "천": 3, "万": 4, "萬": 4, "만": 4, "億": 8, "亿": 8, "억": 8, "兆": 12}
_CJK_NUMBER = re.compile(rf"((?:\d+(?:\.\d+)?[{''.join(_ZEROS)}])+(?:\d+)?)(?=\D|$)(.*)", re.DOTALL)
_COUNTERS = frozenset("个個人名本只隻条條张張件次枚匹台つ개명번권회")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_COMMA_UNIT = re.compile(r"(-?\d+),(\d+)(?=[^\d,.])")
_PLAIN = re.compile(r"-?\d{1,40}(?:\.\d{1,40}|/[1-9]\d{0,40})?")
_FIGURE = re.compile(r"(?:[\d\s.,+\-*/^(){}!|]|\\(?:pi|frac|sqrt|cdot|overline)|\de-?\d)*")
_OF_PERCENT = frozenset(words("points off discount chance probability increase"))
_CONNECTIVES = frozenset(words("or and und oder et ou y o if is mod to pi sqrt i e x"))


def measure(text: str) -> Quantity:
    """The value and the unit of a folded answer; no unit when the tail is not plainly one."""
    if len(text) > _MAX_CHARS:
        return Quantity(text)
    if money := _PREFIX.fullmatch(text):
        unit = _UNITS[money[2].rstrip(".")]
        rest = measure(money[3])
        if rest.unit is not None and all(power < 0 for _, power in rest.unit.dimensions):
            factor = unit.factor * rest.unit.factor  # $12 per hour
            unit = Unit(tuple(sorted((*unit.dimensions, *rest.unit.dimensions))), factor)
            return Quantity(money[1] + rest.value, unit)
        is_same = rest.unit is None or rest.unit.dimensions == unit.dimensions
        return Quantity(money[1] + rest.value, unit) if is_same else Quantity(text)
    if (number := _CJK_NUMBER.match(text)) is not None:
        parts = re.findall(rf"(\d+(?:\.\d+)?)([{''.join(_ZEROS)}]?)", number[1])
        total = sum(Fraction(figure) * 10 ** _ZEROS.get(mark, 0) for figure, mark in parts)
        rest = measure(f"1{number[2]}")
        return Quantity(str(total), rest.unit) if rest.value == "1" else Quantity(text)
    if len(text) > 1 and text[-1] in _COUNTERS and text[-2] in "0123456789 ":
        return Quantity(text[:-1].strip(), Unit(((f"noun {text[-1]}", 1),)))
    if (scaled := _SCALED.fullmatch(text)) is not None:
        rest = measure(f"1{scaled[3]}")
        value = f"({scaled[1]})\\cdot10^{{{_SCALES[scaled[2]]}}}"
        return Quantity(value if rest.value == "1" else f"{value}\\cdot({rest.value})", rest.unit)
    if (arc := _ARC.fullmatch(text)) is not None:
        degrees = Fraction(int(arc[1]) * 3600 + int(arc[2]) * 60 + int(arc[3] or 0), 3600)
        return Quantity(str(degrees), _UNITS["°"])
    if _COMPOUND.fullmatch(text):
        return _compound(text) or Quantity(text)
    if text.endswith("°") and _TRIGONOMETRIC.search(text):
        return Quantity(text)  # the cosine of 60°, not so many degrees
    text = _FRACTION_UNIT.sub(r" \1/\2\3", text)
    for match in re.finditer(
        r"(?<=[\d)}\]!]) ?(?=[^\W\d]|k?\\Omega|[$€£¥₹元円¢%°/])|(?<=[a-z]) (?=\w)", text
    ):
        value, tail = text[: match.start()], text[match.end() :]
        is_figure = _FIGURE.fullmatch(value) is not None
        if _TAIL.fullmatch(tail) and (found := _unit(tail, match[0] == " ", is_figure)):
            is_none = all(name == "none" for name, _ in found.dimensions)
            return Quantity(value.strip(), None if is_none else found)
    return Quantity(text)


def _unit(tail: str, is_apart: bool, is_figure: bool) -> Unit | None:
    """`m`, `cm^2`, `km/h`, `square metres`; after a figure and a space any noun (`12 apples`)."""
    powers: dict[str, int] = {}
    factor, sign, bonus = Fraction(1), 1, 1
    nouns: list[str] = []
    for token in re.findall(rf"/|\\cdot|{_UNIT_TEXT}", tail):
        if token in ("/", "per", "pro"):
            sign = -1
        elif token == r"\cdot":
            continue
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
    if powers == {"percent": 1} and set(nouns) <= _OF_PERCENT:
        nouns = []
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
    parts = re.findall(r"(\d+(?:\.\d+)?) ?([a-z]+)", text)
    has_hours = any(name in ("h", "hr", "hrs") for _, name in parts)
    for figure, name in parts:
        name = "min" if has_hours and name == "m" else name
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
    ratios = _RATIO.fullmatch(a), _RATIO.fullmatch(b)
    if ratios[0] and ratios[1]:  # not both of them times of day
        left_top, left_bottom, right_top, right_bottom = map(
            Fraction, (*ratios[0].groups(), *ratios[1].groups())
        )
        return left_top * right_bottom == right_top * left_bottom
    based = _BASED.fullmatch(a), _BASED.fullmatch(b)
    if based[0] and based[1]:
        return _same_numeral(based[0], based[1])
    if based[0] or based[1]:
        numeral = based[0] or based[1]
        assert numeral is not None
        return numeral[1] == (b if based[0] else a)  # the base was left out
    left, right = measure(a), measure(b)
    if left.unit is None and right.unit is None:
        decision = values(left.value, right.value)
        if decision is not True and ("°" in a) != ("°" in b) and _is_bare_angle(a + b):
            return values(a.replace("°", ""), b.replace("°", ""))  # 90°-x and 90-x
        return decision
    if left.unit is None or right.unit is None:
        bare, dressed = (left, right) if left.unit is None else (right, left)
        assert dressed.unit is not None
        return _against_bare(dressed.value, dressed.unit, bare.value, values)
    return _against_unit(left, right, values)


def _same_numeral(left: re.Match[str], right: re.Match[str]) -> bool:
    """101_2 and 5_{10} are one number, 101_2 and 101_3 are two."""
    try:
        return int(left[1], int(left[2])) == int(right[1], int(right[2]))
    except ValueError:
        return left.groups() == right.groups()


def with_decimal_comma(text: str) -> str | None:
    """`12,5 cm` with the comma read as a point; None where that is no reading."""
    match = _COMMA_UNIT.match(text)
    if match is None:
        return None
    pointed = f"{match[1]}.{match[2]}{text[match.end() :]}"
    return pointed if measure(pointed).unit is not None else None


def _same_clock(left: tuple[int, bool], right: tuple[int, bool]) -> bool:
    half_day = 12 * 3600
    if left[1] != right[1] and (left if right[1] else right)[0] < half_day + 3600:
        # One sibling left out am or pm. 13:00 and later say it themselves.
        return left[0] % half_day == right[0] % half_day
    return left[0] == right[0]


def _is_bare_angle(text: str) -> bool:
    return _TRIGONOMETRIC.search(text) is None and r"\pi" not in text


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
