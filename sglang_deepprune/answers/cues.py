"""The sentences with which a trace states its answer, in the languages that models answer in.

Data only: three tiers of cues (an answer, a result or pick, a tentative remark), the words
that end a statement or make it a refusal, and the suffixes some languages put behind a value.
Beside a pattern of many words stand the words (`..._WORDS`, in lower case) of which each of its
matches holds one: to look for these first costs a tenth where there is none.
"""

from __future__ import annotations

import re

from sglang_deepprune.answers.folding import words

# Spaces and marks of emphasis. Counted, so that a cue before a long run of them costs no more than
# any other: two open-ended runs side by side are quadratic in its length.
_DRESS = r"\s{0,4}[*_`]{0,4}\s{0,4}"
_LINK = (
    rf"(?:'s\s|{_DRESS}(?:is|are|was|would\s+be|will\s+be|must\s+be|should\s+be|has\s+to\s+be|equals?"
    r"|comes\s+out\s+to(?:\s+be)?|turns\s+out\s+to\s+be|ist|sind|lautet|lauten|beträgt|est|sont"
    rf"|vaut|es|son|é|são|è|sono|luidt|jest|to|là|adalah|равен|равна|это|هو|هي|है)\b{_DRESS}"
    rf"[:：]?|{_DRESS}[:：=]|\s{{1,4}}[—–]\s)\s*"
)
_DETAIL = (
    r"(?:\s+(?:to|for|of|in|auf|der|des|de|du|à|della|para|на)\s[^.:=\n?]{1,50}?"
    r"|\s*\([^()\n]{1,30}\))?"
)
_KIND = r"(?:\s+(?:finale?|correcta?|correcte|corretta|correta|richtig|letter|key|choice|option))?"


def _cue(nouns: str) -> str:
    return rf"(?<![\w-])(?:{nouns}){_KIND}{_DETAIL}{_LINK}"


_CJK_ANSWER = (
    r"(?:最终|最後|正确|正確|最終的な)?(?:答案|答え|回答|解答|正解|答)(?:选项|選項)?\s*"
    r"(?:应该是|應該是|是|为|為|就是|は、?|選|选)?\s*[:：]?\s*"
)
_HANGUL_ANSWER = r"(?:최종\s*)?(?:정답|답|답변)\s*(?:은|는)?\s*[:：]?\s*"

ANSWER = re.compile(
    _cue(
        "answers?|ans|antwort(?:en)?|réponses?|respuestas?|respostas?|risposte?a?|risposta|antwoord"
        "|ответ|odpowiedź|cevap|yanıt|svar(?:et)?|vastaus|câu trả lời|đáp án|jawaban(?:nya)?"
        "|الجواب|الإجابة|उत्तर|απάντηση"
    )
    + rf"|{_CJK_ANSWER}(?<=[是为為はs:：选選\s])|{_HANGUL_ANSWER}(?<=[은는:：\s])"
    + r"|^\s{0,3}\#{4}\s*(?=\S)"
    # Somit ist die Antwort 0,5.
    + r"|\b(?:ist|lautet|lauten|sind)\s(?:die|das)\s"
    r"(?:(?:richtige|korrekte|endgültige|gesuchte)\s)?"
    r"(?:antwort|lösung|ergebnis|endergebnis)(?:en)?\s(?:also\s|daher\s|somit\s)?[:：]?\s*"
    + r"|^[ \t#*_>]*(?:the\s+)?(?:final\s+|correct\s+)?(?:answer|antwort|réponse|respuesta)"
    r"[ \t*_#:：]*\n\s*",
    re.IGNORECASE | re.MULTILINE,
)
ANSWER_WORDS = words(
    "answer ans antwort réponse respuesta resposta rispost antwoord ответ odpowiedź cevap yanit "
    "svar vastaus câu đáp jawaban الجواب الإجابة उत्तर απάντηση 答 正解 정답 답 #### lösung "
    "ergebnis endergebnis"
)
RESULT = re.compile(
    _cue(
        "results?|solutions?|roots?|(?:correct\\s+|right\\s+|best\\s+)?(?:options?|choices?)"
        "|my\\s+(?:pick|choice|guess|vote|selection)"
        "|lösung(?:en)?|(?:end)?ergebnis|résultat|solución|soluciones|resultado|solução"
        "|risultato|soluzione|oplossing|resultaat|результат|wynik|sonuç|kết quả|hasil"
    )
    + r"|\bI(?:'m|\s+am)\s+going\s+(?:with|for)\s+"
    + r"|\bI(?:\s+would|'d|'ll|\s+will)?\s+(?:pick|choose|select|go\s+with|vote\s+for|answer)"
    r"(?:\s+with)?\s*:?\s+|(?:最终|最後)?(?:结果|結果)(?:是|为|為|は|：|:)\s*|故?[选選](?:择|擇)?\s*[:：]?\s*(?=[A-J])",
    re.IGNORECASE | re.MULTILINE,
)
RESULT_WORDS = words(
    "result solu root option choice pick guess vote selection lösung ergebnis endergebnis résultat "
    "risultat oplossing результат wynik sonuç kết hasil going choose select go answer 结果 結果 选 "
    "選"
)
TENTATIVE = re.compile(
    r"(?<![\w-])(?:answer|result|solution|option|choice)\s+(?:seems|appears|might|may|could)"
    r"(?:\s+to)?(?:\s+be)?\s+",
    re.IGNORECASE,
)
TENTATIVE_WORDS = words("answer result solution option choice")
LABELS_FIRST = re.compile(
    r"(?<![\w'])([A-J](?:\s*,\s*[A-J]){0,8}\s*(?:,\s*and|,|and|&|und|et|y)\s*[A-J])(?![\w'])\s+"
    r"(?:are|sind|sont|son)\s+(?:the\s+)?(?:only\s+)?(?:correct|right|true|richtig)\b"
)
LABEL_FIRST = re.compile(
    r"(?:(?:option|choice|answer)\s+)?\(?(?<![\w'])([A-J])(?![\w'])\)?\s+"
    r"(?:is|must be|ist|est|es)\s+(?:the\s+|die\s+|la\s+)?(?:only\s+)?"
    r"(?:correct|right|best|richtig|correcte?a?|true)\b"
)
LABEL_FIRST_WORDS = words("correct right best richtig true")

# `Thus 4 is the answer.`
VALUE_FIRST = re.compile(
    r"(\$[^$\n]{1,120}\$|\\\(.{1,120}?\\\)|(?<![\w.,/^\\])-?[\d.,/]*\d%?|(?<![\w'])[A-J](?![\w']))"
    r"[*_]{0,3}\s+is\s+(?:(?:therefore|thus|indeed)\s+)?(?:the|our|my)\s+"
    r"(?:(?:final|correct|right)\s+)?(?:answer|solution)\b(?!\s+(?:to|of|for|if|when)\b)(?![^.\n]{0,60}\?)"
)
VALUE_FIRST_WORDS = words("answer solution")
WONDERED = re.compile(
    r"\b(?:maybe|perhaps|possible|chance|likely|might|could|doubt)\b", re.IGNORECASE
)
NOT_STATED = re.compile(
    r"(?:if|whether|suppose|assume|unless|saying|until|before|what|where|check(?:ing)?|when|once"
    r"|is|not|wrong|incorrect|previous)(?:\s+(?:the|that|my|our|an|this|final|correct|true))*\s*$",
    re.IGNORECASE,
)
REFUSAL = re.compile(
    r"\b(?:who\s+knows|hard\s+to\s+(?:say|tell)"
    r"|cannot|can't|can\s+not|could\s+not|couldn't|unable|don't\s+know|do\s+not\s+know|no\s+idea"
    r"|not\s+(?:enough|sure|known|clear|given|determin\w*|certain|possible\s+to)|insufficient"
    r"|impossible\s+to\s+(?:say|tell|determine|know|answer)|unknown|unclear|undetermined|unsure"
    r"|no\s+(?:final\s+)?answer|to\s+be\s+determined|keine\s+ahnung|weiß\s+(?:es\s+)?nicht|nicht\s+(?:bestimm|möglich|genug)\w*"
    r"|ne\s+(?:sais|peux)\s+pas|no\s+(?:lo\s+)?sé|no\s+puedo|não\s+sei|non\s+lo\s+so|не\s+знаю)"
    r"|不知道|无法|無法|分かりません|わかりません|不明|모르",
    re.IGNORECASE,
)
NO_SOLUTION = re.compile(
    r"\b(?:has|have|there\s+(?:is|are)|hat|haben|gibt)\s+((?:no|keine)\s+(?:real\s+|integer\s+|reelle\s+)?"
    r"(?:solutions?|roots?|lösung(?:en)?))\s*[.!]?\s*$",
    re.IGNORECASE,
)

CLAUSE = re.compile(
    r"\s+(?:because|since|due\s+to|which|whereas|weil|denn|parce\s+que|puisque|porque|perché|as\s+"
    r"(?:we|the|it|shown|required|desired|stated|i|expected)|after\s+all)\b"
    r"|\s+(?:and|und)\s+(?:we|the|it|that|this|so|das|es|wir)\b"
    r"|,\s*(?:because|since|as|which|who|so|not|but|where|hence|thus|therefore|with|weil|da|denn|car"
    r"|puisque|porque|perché|for|i\.e|right|and\s+(?:we|the|it|so|not|that|I)|that\s+is|rather)\b"
    r"|\s*\((?=\s*(?:not|because|since|i\.e|which|approx|see|as|option|the|rounded|and|nicht|pas|or)\b)"
    r"|\s+\(?(?:not|nicht|instead\s+of|rather\s+than|pas)\s"
    r"|\s+[-–—]{1,2}\s+(?=[^\W\d_]+\W+[^\W\d_]+)|;(?!\s*[-+]?\d[\d.,/]*(?:\s*[;.]|\s*$))|\s+\\blacksquare|\s*[□■∎]|,?\s+as\s*$",
    re.IGNORECASE,
)
# A stop ends the sentence unless it is part of a number or of a short title.
STOP = re.compile(
    r"[.?](?=[\s*_\"'”」)\]}<]|$)|(?<![\d)}])!(?=\s|$)|[。！？؟।]|\n|\*\*|<(?=[/|!a-zA-Z｜])|`"
)
TITLES = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Prof|Mt|vs|No|approx|ca|Nr|Sr|Jr|bzw)|\b[ap]\.m|U\.S)$"
)
FILLER = re.compile(
    r"(?:therefore|thus|then|simply|just|indeed|actually|clearly|exactly|equal\s+to|given\s+by|now"
    r"|options?|choices?|letters?|answer|either|definitely|probably|likely|approximately|about|hence|still"
    r"|most\s+(?:likely|probably)|(?:la|a|die|le)(?=\s\(?[A-J]\b)|(?:la|a|le)\s+(?:letra|opción|opção|lettre|alternativa"
    r"|lettera|opzione|réponse)|letra|opción|opção|lettre|alternativa|lettera|opzione|вариант"
    r"|the\s+(?:options?|choice|letter|number|value)|roughly|around|antwort|selon\s+moi|also|:|="
    r"|选项|選項|choose|obviously|certainly|again|once\s+more|alternative|Antwortmöglichkeit)(?:,|:|\s)\s*|[:：]\s*",
    re.IGNORECASE,
)
EMOJI = re.compile("[\\s\u2600-\u27bf\u2b50\ufe0f\U0001f300-\U0001faff]+$")
SUFFIX = re.compile(
    r"\s*(?:です|だ|である|となります|になります|でした|입니다|이다|이에요|है|dir|'dir|'tır)\s*$|\s+(?:here|now|too)$"
)
OPENING = re.compile(
    r"(?:it(?:'s|\s+is|\s+must)|(?:we\s+)?conclud(?:e|ing)"
    r"|so|thus|therefore|hence|then|finally|in\s+conclusion|consequently|overall|in\s+total|altogether"
    r"|daher|somit|also|folglich|insgesamt|donc|ainsi|finalement|por\s+lo\s+tanto|por\s+tanto|así|entonces"
    r"|portanto|logo|quindi|dunque|следовательно|значит|因此|所以|故|综上|よって|したがって|따라서|∴)"
    r"(?![a-z])(?!\s+far\b)",
    re.IGNORECASE,
)
# Without an opening word only a sentence about the whole counts as a conclusion.
OVERALL = re.compile(r"\b(?:total|final|overall|altogether|insgesamt)\b", re.IGNORECASE)
DISPLAYED = re.compile(
    r"(?:^|[\s.])(?:so|thus|therefore|hence|finally|daher|somit|donc|因此|所以)\b[^\n]{0,80}\n*\s*"
    r"(?:\\\[|\$\$)([^$\[\]]{1,200})(?:\\\]|\$\$)\s*$",
    re.IGNORECASE,
)
CONCLUDES = re.compile(
    r"(?:'s\s|\b(?:is|are|was|were|equals?|gives|be|get|have|has|obtain|makes?|takes?|needs?|costs?|earns?"
    r"|pays?|spends?|spent|contains?|ist|sind|ergibt|beträgt|est|vaut|es|son|é|è)\b|=|为|為|是|は)"
    r"\s*(?!.*(?:\b(?:is|are|equals?|ist|est)\b|=))(\S.{0,80})$",
    re.IGNORECASE,
)
STOPWORDS = frozenset(
    words(
        "i we you let let's so hmm wait ok okay sure sorry hello hi thanks the this that it there "
        "first next then now well maybe perhaps step proof done because and but if what how why "
        "continue stop error note to of for with be can could will would should my your not yet "
        "still thinking answer"
    )
)
EUROPEAN = re.compile(
    r"\b(?:der|die|das|ist|sind|und|insgesamt|ergibt|antwort|lautet|euro|beträgt|est|sont|la|le|les|donc"
    r"|réponse|es|el|los|respuesta|entonces|total|resposta|risposta|quindi|sono|il|é|het|een|antwoord"
    r"|ответ|равен)\b",
    re.IGNORECASE,
)
ENGLISH = re.compile(
    r"\b(?:the|is|are|so|therefore|answer|we|in|of|and|that|total|this)\b", re.IGNORECASE
)
