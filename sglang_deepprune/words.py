"""The built-in reasoning words, by language. Data only; how they count: `truncation.WordCut`.

The paper names wait, thus and since, and gives no full list. The other English words are the same
kinds of step (a second thought, a reason, a conclusion); `so` and `but` are left out because they
are too frequent to mark a step. Every language counts in every trace: models mix them. A word that
two languages share therefore counts in both: German `also` makes English cuts about 5 % earlier.
"""

from __future__ import annotations

import re

WORDS_BY_LANGUAGE: dict[str, str] = {
    "en": "wait, thus, since, therefore, hence, because, however, alternatively, hmm, "
    "consequently, hold on",
    "de": "moment mal, warte, also, deshalb, daher, somit, folglich, weil, zuerst, zunächst, "
    "jedoch, demnach",
    "fr": "attends, attendez, donc, ainsi, puisque, parce que, cependant, d'abord, toutefois, "
    "par conséquent",
    "es": "espera, un momento, por lo tanto, por tanto, entonces, porque, puesto que, ya que, "
    "sin embargo, primero",
    "pt": "espere, portanto, então, já que, uma vez que, no entanto, primeiro",
    "it": "aspetta, un attimo, quindi, dunque, perciò, pertanto, poiché, perché, tuttavia, "
    "innanzitutto",
    "nl": "wacht, dus, daarom, omdat, aangezien, echter",
    "pl": "czekaj, zatem, więc, ponieważ, dlatego, jednak, najpierw",
    "tr": "bekle, dolayısıyla, çünkü, bu yüzden, ancak, öncelikle",
    "id": "tunggu, oleh karena itu, karena, sehingga, namun",
    "vi": "khoan đã, vì vậy, do đó, bởi vì, tuy nhiên, đầu tiên",
    "ru": "подожди, подождите, стоп, следовательно, поэтому, так как, потому что, поскольку, "
    "однако, сначала, значит, таким образом",
    "uk": "зачекай, отже, тому що, оскільки, однак, спочатку",
    "ar": "انتظر, لذلك, بما أن, لأن, إذن, أولا",
    "hi": "रुको, इसलिए, क्योंकि, चूंकि, अतः, पहले",
    "zh": "等等, 等一下, 首先, 因此, 所以, 因为, 因為, 由于, 由於, 然而, 不过, 不過, 于是, 於是, "
    "重新检查, 重新檢查",
    "ja": "待って, したがって, 従って, つまり, なぜなら, だから, ゆえに, まず, しかし",
    "ko": "잠깐, 잠시만, 따라서, 그러므로, 그래서, 왜냐하면, 그러나, 먼저, 우선",
    "th": "เดี๋ยวก่อน, ดังนั้น, เพราะ, เนื่องจาก, อย่างไรก็ตาม",
}


def parse_words(text: str) -> tuple[str, ...]:
    """The words of a comma-separated list (Chinese commas too)."""
    return tuple(word.strip() for word in re.split("[,，、]", text) if word.strip())


REASONING_WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(word for words in WORDS_BY_LANGUAGE.values() for word in parse_words(words))
)
