"""One spelling for one answer: folds Unicode, LaTeX and Markdown variants of the same string.

`fold` keeps the meaning and the units and throws away the dress: full-width digits, Unicode
minus, zero-width characters, maths delimiters, `\\text`, `\\dfrac`, thin spaces, thousands
separators, trailing zeros. It never evaluates anything (see `exact`) and never decides that
two answers agree (see `compare`). Every rule is one linear pass; `MAX_CHARS` bounds the input.
"""

from __future__ import annotations

import re
import unicodedata

MAX_CHARS = 2_048


def words(text: str) -> list[str]:
    """A word list written as one string."""
    return text.split()


_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ"
_SUPERSCRIPT_RUN = re.compile(f"[{_SUPERSCRIPTS}]+")
_SUPERSCRIPT_MAP = str.maketrans(_SUPERSCRIPTS, "0123456789+-n")
_SUBSCRIPT_RUN = re.compile("[₀-₉]+")
_SUBSCRIPT_MAP = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

# Applied before NFKC, which would turn a half into three characters and 2½ into 21/2.
_VULGAR = {"½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5)}
_VULGAR |= {"⅖": (2, 5), "⅗": (3, 5), "⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅛": (1, 8)}
_VULGAR |= {"⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8)}
_SYMBOLS = str.maketrans(
    {mark: rf"\frac{{{top}}}{{{bottom}}}" for mark, (top, bottom) in _VULGAR.items()}
    | dict.fromkeys("−–‐‑﹣－", "-")
    | dict.fromkeys("×·⋅∗＊∙", r"\cdot ")
    | {"、": ", "}
    | dict.fromkeys("‘’ʼ′", "'")
    | dict.fromkeys("“”", '"')
    | dict.fromkeys("÷⁄∕", "/")
    | dict.fromkeys("≤⩽", r"\le ")
    | dict.fromkeys("≥⩾", r"\ge ")
    | dict.fromkeys("º˚", "°")
    | {"∞": r"\infty ", "√": r"\sqrt ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap "}
    | {"∈": r"\in ", "∖": r"\setminus ", "±": r"\pm ", "ℝ": r"\mathbb{R}", "≈": r"\approx "}
    | {"≡": r"\equiv "}
    | {"∛": r"\sqrt[3]", "٫": ".", "٬": ","}
    | {"；": ";", "。": ".", "℃": "°C", "℉": "°F", "⟨": r"\langle ", "⟩": r"\rangle "}
)
_UNSEEN = dict.fromkeys([*range(9), *range(14, 32), *range(0xFE00, 0xFE10)])
_GREEK = dict(zip("αβγθλμφωπ", words("alpha beta gamma theta lambda mu phi omega pi"), strict=True))
# A Greek letter among others is a word, not a symbol.
_LONE_GREEK = re.compile(f"(?<![\u0370-\u03ff])[{''.join(_GREEK)}](?![\u0370-\u03ff])")

_ARRAY_DRESS = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])")
_STYLE = re.compile(
    r"\\(?:displaystyle|textstyle|limits|rm|bf|it|sf|mathstrut|hfill|large|Large|huge)(?![a-zA-Z])"
)
_SPACES = re.compile(r"\s{2,}")
_SPACE = re.compile(r"\\[,;:> ]|\\q?quad(?![a-z])|\\thinspace(?![a-z])|~|\s+")
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|sc|normal|up)?|math(?:rm|bf|it|sf|tt|up)|mbox|hbox|emph|"
    r"operatorname|underline|boldsymbol|bm|boxed|fbox|ce)\*?\s*\{([^{}]*)\}"
)
_SHORT_ARGUMENT = re.compile(r"(\\(?:frac|binom))\s*([0-9]|(?<=\s)[a-z])\s*([0-9a-z])")
_FIRST_ARGUMENT = re.compile(r"(\\(?:frac|binom))\s*([0-9a-zA-Z])\s*\{")
_LAST_ARGUMENT = re.compile(r"(\\(?:frac|binom)\s*\{[^{}]*\})\s*([0-9a-zA-Z])")
_ROOT = re.compile(r"\\sqrt\s*([0-9a-zA-Z])")
_PLAIN_ROOT = re.compile(r"(?<![a-zA-Z\\])sqrt\s*(?=[({])")
# 2^{3}5 is not 2^{35}: braces stay where a digit follows.
_SCRIPT = re.compile(r"([\^_])\s*\{\s*(\w)\s*\}(?!\s*\d)")
_DEGREE = re.compile(
    r"\s*(?:\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-z])|\\degree(?![a-z])|\^?\{?°\}?)"
)
_TEXT_EXPONENT = re.compile(r"(?<=\d)\s*\\(?:text|mathrm)\{[eE]([-+]?)\}\s*(?=[-+]?\d)")
_TEMPERATURE = re.compile(r"°\s+(?=[CF](?![a-zA-Z]))")
_DEGREES_OF = re.compile(r"\s*(?:°|\bdeg(?:rees?)?)\s*(C|F)(?:elsius|ahrenheit)\b", re.IGNORECASE)
_ORDINAL = re.compile(r"(?<=\d)\s*\^\s*\{?\s*(st|nd|rd|th)\s*\}?(?![a-z])")
_COLOR = re.compile(r"\\(?:text)?color\s*\{\w{1,20}\}")
_TIMES_X = re.compile(r"(?<=\d)\s?x\s?(?=10\s?\^)")
_ESCAPED_TWICE = re.compile(r"\\\\[a-zA-Z]{2}")
_COMMAND = re.compile(r"(?<!\\)\\[a-zA-Z]{2}")
_SQUARE = re.compile(r"\b(sq|cu)\.\s?")
_LONE_MARK = re.compile(r"(?<![a-zA-Z])\{([,.:])\}")
_COLON = re.compile(r"(?<=\d) ?: ?(?=\d)")
_CHOOSE = re.compile(r"\{?\s*(\w+)\s*\\choose\s*(\w+)\s*\}?")
_MODULUS = re.compile(
    r"\(\s*(?:\\?mod|\\bmod)(?![a-zA-Z])\s*([^()]{1,20})\)|\\p?b?mod(?![a-zA-Z])\s*(?:\{([^{}]*)\}|(\w+))"
)
_RULES = re.compile(r"\\hline|(?<=\x00)\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|mm|cm)\s*\]")
_BLOCK = re.compile(r"\\(begin|end)\{(?:cases|aligned|align|gathered|split)\*?\}")
_RENAMES = [
    (re.compile(rf"\\(?:{names})(?![a-zA-Z])"), new)
    for names, new in [
        ("[dtc]frac", r"\\frac"),
        ("[dt]binom", r"\\binom"),
        ("leqslant|leqq|leq", r"\\le"),
        ("geqslant|geqq|geq", r"\\ge"),
        ("neq", r"\\ne"),
        ("lt", "<"),
        ("gt", ">"),
        ("times|ast|cdotp", r"\\cdot"),
        ("div", "/"),
        ("emptyset|varnothing|O", "∅"),
        ("infin", r"\\infty"),
        ("langle", "("),
        ("rangle", ")"),
        ("lbrace", r"\\{"),
        ("rbrace", r"\\}"),
        ("lbrack", "["),
        ("rbrack", "]"),
        ("lvert|rvert|vert", "|"),
        ("colon", ":"),
        ("dots|ldots|cdots", "..."),
        ("backslash", r"\\setminus"),
        ("pounds", "£"),
        ("euro", "€"),
    ]
]
_RELATIONS = [("<=", r"\le "), (">=", r"\ge "), ("!=", r"\ne "), ("**", "^"), ("*", r"\cdot ")]
_VARIANTS = re.compile(r"\\(?:var)(?=epsilon|phi|theta|rho)")
_OVERLINE = re.compile(r"\\(?:bar|overline|dot)\s*\{?(\d+)\}?")

_COMMA_GROUPS = re.compile(r"(?<![\d.,])([1-9]\d{0,2})((?:,\d{3})+)(?![\d,])")
_INDIAN_GROUPS = re.compile(r"(?<![\d.,])(\d{1,2}(?:,\d{2})+,\d{3})(?![\d,])")
_SPACE_GROUPS = re.compile(r"(?<![\d.,/^_])([1-9]\d{0,2})((?:[ '_]\d{3})+)(?![\d/])")
_DOT_GROUPS = re.compile(r"(?<![\d.,])([1-9]\d{0,2}(?:\.\d{3}){2,})(?![\d.])(,\d+)?")
_DOT_COMMA = re.compile(r"(?<![\d.,])([1-9]\d{0,2}(?:\.\d{3})+),(\d+)(?![\d.,])")
_SPACE_COMMA = re.compile(r"(?<![\d.,])([1-9]\d{0,2}(?: \d{3})+),(\d+)(?![\d.,])")
_DECIMAL = re.compile(r"(?<![\d.])(\d+)\.(\d*)(?![\d.]|\\overline|\()")
_LEADING_POINT = re.compile(r"(?<![\d.])\.(?=\d)")
_COMMA_PAIR = r"-?\d+,\d+"
_AMBIGUOUS_COMMA = re.compile(
    rf"{_COMMA_PAIR}(?: ?[^\d\s,.;()][^\d,.;()]{{0,40}}(?:\^\d)?"
    rf"|(?:(?:; ?| (?:and|or|und|oder|et|ou|y|o|e|и) ){_COMMA_PAIR})+)?"
)
# A space means something between two word characters (2 2/3, 12 m); elsewhere it is dress.
_IDLE_SPACE = re.compile(r"(?<![\w}°%!)\],$€£;]) | (?![\w\\($€£-])|(?<![a-zA-Z]{2})(?<![,;]) (?=-)")
_COMMAND_GAP = re.compile(r"(\\[a-zA-Z]+) (?![a-zA-Z])")
_MACRO_GAP = re.compile(r"(?<![a-zA-Z]{2})(?<![,;]) (?=\\[a-zA-Z{}|])|(?<=[)\]}]) (?=[({\[])")


def fold(answer: str) -> str:
    """The answer in one spelling. Idempotent on its own results for ordinary answers."""
    text = _single_spaced(answer[:MAX_CHARS].translate(_UNSEEN))
    if not text.isascii():
        text = _single_spaced(_fold_unicode(text))
    text = _undress(text)
    text = _fold_latex(text)
    text = _fold_spaces(_undress(text))
    return _fold_commas(_fold_numbers(text)).strip()


def _single_spaced(text: str) -> str:
    """No two spaces side by side: the patterns below start anew at each space of a run, which makes
    a long one quadratic."""
    return _SPACES.sub(" ", text)


def _fold_unicode(text: str) -> str:
    text = _SUPERSCRIPT_RUN.sub(lambda m: "^{" + m[0].translate(_SUPERSCRIPT_MAP) + "}", text)
    text = _SUBSCRIPT_RUN.sub(lambda m: "_{" + m[0].translate(_SUBSCRIPT_MAP) + "}", text)
    text = unicodedata.normalize("NFKC", text.translate(_SYMBOLS)).translate(_SYMBOLS)
    text = _LONE_GREEK.sub(lambda m: rf"\{_GREEK[m[0]]} ", text)
    kept = (c for c in text if c.isascii() or unicodedata.category(c) not in ("Cf", "Cc", "Co"))
    return "".join(c if c.isascii() else str(unicodedata.decimal(c, c)) for c in kept)


def _undress(text: str) -> str:
    """Strip quotes, Markdown marks, maths delimiters and closing punctuation from both ends."""
    for _ in range(8):
        before = text
        text = text.strip().strip('`"').removeprefix("**").removesuffix("**").strip("_").strip()
        for opening, closing in (("$$", "$$"), (r"\(", r"\)"), (r"\[", r"\]")):
            if text.startswith(opening) and text.endswith(closing) and len(text) > 4:
                text = text[len(opening) : -len(closing)]
        if len(text) > 2 and text[0] == text[-1] == "$" and not text.endswith(r"\$"):
            text = text[1:-1]
        if text.endswith((".", ",", ";", ":", "\\")) and not text.endswith(("...", "a.m.", "p.m.")):
            text = text[:-1]
        if text == before:
            break
    return text


def _fold_latex(text: str) -> str:
    text = _LONE_MARK.sub(r"\1", text).replace("~", " ")
    if "begin{" not in text:
        text = text.replace("&=", "=")
    if "\\" in text:
        text = text.replace(r"\!", "").replace(r"\%", "%").replace(r"\&", "&")
        if _ESCAPED_TWICE.search(text) and not _COMMAND.search(text):
            text = text.replace("\\\\", "\\")
        text = re.sub(r"\\(?:\\|cr(?![a-zA-Z]))", "\x00", text)  # A row end is no escaped space.
        text = _RULES.sub("", text).replace("smallmatrix", "pmatrix")
        if _BLOCK.search(text) is not None or "\\begin{" not in text:
            # Lines of a system are members of a list.
            text = _BLOCK.sub("", text).replace("&", "").strip(" \x00").replace("\x00", ", ")
        text = _STYLE.sub(" ", _ARRAY_DRESS.sub("", text))
        text = _single_spaced(_SPACE.sub(" ", text))
        text = _TEXT_EXPONENT.sub(r"e\1", text.replace(r"\$", "＄"))
        for _ in range(4):
            text, count = _TEXT.subn(lambda m: f" {m[1]} ", text)
            if not count:
                break
        text = _single_spaced(text)
        for pattern, new in _RENAMES:
            text = pattern.sub(new, text)
        text = _OVERLINE.sub(r"\\overline{\1}", _VARIANTS.sub(r"\\", text))
        text = _SHORT_ARGUMENT.sub(r"\1{\2}{\3}", text)
        text = _LAST_ARGUMENT.sub(r"\1{\2}", _FIRST_ARGUMENT.sub(r"\1{\2}{", text))
        text = _COLOR.sub("", _CHOOSE.sub(r"\\binom{\1}{\2}", text))
        text = _ROOT.sub(r"\\sqrt{\1}", text).replace("\x00", r"\\")
    text = _MODULUS.sub(lambda m: f" mod {(m[1] or m[2] or m[3]).strip()}", text)
    text = _SQUARE.sub(r"\1 ", text)
    text = _COLON.sub(":", _TIMES_X.sub(r"\\cdot ", _ORDINAL.sub(r"\1", text)))
    text = _DEGREES_OF.sub(lambda m: "°" + m[1].upper(), text).replace(":=", "=")
    text = _TEMPERATURE.sub("°", _DEGREE.sub("°", text))
    for old, new in _RELATIONS:
        text = text.replace(old, new)
    return _fold_dollars(_PLAIN_ROOT.sub(r"\\sqrt", text))


def _fold_dollars(text: str) -> str:
    """A dollar sign before a figure is money when it has no partner; pairs only open maths."""
    if text.count("$") % 2 == 0 and not re.search(r"\$\d[\d,.]*\s*(?:and|or|,)\s*\$\d", text):
        text = text.replace("$", " ")
    return text.replace("＄", "$")


def _fold_spaces(text: str) -> str:
    text = re.sub(r" ?([,;]) ", r"\1 ", re.sub(r"\s+", " ", text).strip())
    text = _SCRIPT.sub(r"\1\2", text)
    text = _COMMAND_GAP.sub(r"\1", _IDLE_SPACE.sub("", text))
    return _MACRO_GAP.sub("", text)


def _fold_numbers(text: str) -> str:
    if not any(c.isdigit() for c in text):
        return text
    text = _SPACE_COMMA.sub(lambda m: m[1].replace(" ", "") + "." + m[2], text)
    text = _DOT_COMMA.sub(lambda m: m[1].replace(".", "") + "." + m[2], text)
    text = _DOT_GROUPS.sub(lambda m: m[1].replace(".", "") + (m[2] or "").replace(",", "."), text)
    text = _COMMA_GROUPS.sub(_join_group, _INDIAN_GROUPS.sub(_join_group, text))
    text = _SPACE_GROUPS.sub(lambda m: m[1] + re.sub(r"[ '_]", "", m[2]), text)
    text = _LEADING_POINT.sub("0.", text)
    return _DECIMAL.sub(lambda m: f"{m[1]}.{m[2].rstrip('0')}".removesuffix("."), text)


def _join_group(match: re.Match[str]) -> str:
    """1,000 is one number, but (100,200) is a pair: inside brackets a comma separates."""
    before = match.string[: match.start()]
    is_inside = any(before.count(left) > before.count(right) for left, right in ("()", "[]"))
    return match[0] if is_inside or r"\{" in before else match[0].replace(",", "")


def _fold_commas(text: str) -> str:
    """`,` inside brackets, `, ` between list members, and `3,5` kept: it has two readings."""
    if "," not in text or _AMBIGUOUS_COMMA.fullmatch(text):
        return text
    parts: list[str] = []
    depth = 0
    for index, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth <= 0:
            parts.append(", ")
        elif c != " " or text[index - 1] != ",":
            parts.append(c)
    return "".join(parts)
