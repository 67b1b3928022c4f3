"""Which language a text is in, by its script and the commonest words: a small rule for checks of instructions.

A script that one language uses decides alone. Languages that share a script are told apart by letters that only one of
them has, by their function words, or by both. The rule knows the languages of IFEval and their neighbours; another
language in the Latin script is taken for the nearest known one or for none, and a text of a few words may name none.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

_ALONE = {
    "GURMUKHI": "pa", "BENGALI": "bn", "GUJARATI": "gu", "TAMIL": "ta", "TELUGU": "te", "KANNADA": "kn",
    "MALAYALAM": "ml", "THAI": "th", "HANGUL": "ko", "HIRAGANA": "ja", "KATAKANA": "ja", "HEBREW": "he", "GREEK": "el",
}  # fmt: skip
_LETTERS = {
    "uk": "іїєґ", "bg": "ъ", "ru": "ыэё", "ur": "ٹڈڑںےہھ", "fa": "پچژگکی", "ar": "ةىيكإأ",
    "vi": "ăđơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ",
}  # fmt: skip
_WORDS = {
    "en": "the of and to in is that it for you with as on are this be was not have or by from at your an i my we they "
    "their can will would which he she his her but if there all what so when who do does has had about more than them",
    "de": "der die das und ist nicht ein eine zu mit den von auf für im sich dem es ich sie auch als wie bei oder wir "
    "sind haben wird war aber dass nach werden kann durch einen einer über um aus",
    "fr": "le la les et est des un une du que pour dans qui pas en ce il elle sur au avec vous nous je sont ne se par "
    "plus cette mais ou être aux leur",
    "es": "el la los las y es de que en un una por con para no se su como más del lo al pero sus le ya o este sí está "
    "son muy también",
    "pt": "o a os as e é de que em um uma por com para não se do da dos das no na mais como mas ao ou seu sua são você "
    "também muito foi pelo pela",
    "it": "il la le e è di che un una per con non si del della dei i lo gli in da sono come più ma anche al nel alla "
    "questo ha delle",
    "nl": "de het een en van is dat in te niet op met voor zijn aan er ook maar als bij naar wordt deze door om hij",
    "pl": "i w nie na się z do to jest że jak o ale po co tak za od przez są dla oraz lub ich jego było może czy",
    "fi": "ja on ei se että oli hän ovat mutta kun niin kuin tai myös joka sen ne voi olla hänen mitä kanssa sitä jos",
    "sw": "na ya wa ni kwa za katika la kuwa hii cha yake hiyo kama au ili lakini pia watu sana mimi wewe huo kila",
    "vi": "và là của có cho không được với các trong một những này để người khi đã từ",
    "hi": "है हैं और में के का की को से यह पर नहीं एक कि भी हो था थी लिए मैं आप",
    "mr": "आहे आहेत आणि मध्ये हे हा ही या त्या नाही एक च्या तर होते होता करण्यासाठी मी तुम्ही साठी असे",
    "ru": "и в не на что это с как он она но по мы вы я из у за так к от бы если уже его её их или был была было для "
    "есть очень можно все когда только",
    "uk": "і в не на що це з як він вона але по ми ви я із у за так та до від якщо вже його її їх або був була було "
    "для є дуже можна все коли тільки звичайно ні чи ще",
    "bg": "и в не на че това с като той тя но по ние вие аз от у за така да се са е го ги ще или беше има много ако "
    "само вече си съм как ми му",
    "ne": "छ छन् र हो को मा ले यो त्यो पनि लागि गर्न हुन्छ छैन एक भने तपाईं थियो गर्ने मेरो",
}
_SHARE = {"CYRILLIC": ("ru", "uk", "bg"), "ARABIC": ("ar", "fa", "ur"), "DEVANAGARI": ("hi", "mr", "ne")}
_LATIN = ("en", "de", "fr", "es", "pt", "it", "nl", "pl", "fi", "sw", "vi")
_SCRIPT_OF = {language: script for script, languages in _SHARE.items() for language in languages} | {
    language: script for script, language in _ALONE.items()
}
LANGUAGES = frozenset(_SCRIPT_OF) | frozenset(_LATIN) | {"zh"}
"""The codes of the languages that can be told."""
MANY_WORDS = 8
"""So many words of a known language nearly always have one of its function words among them."""
LEAST_URDU = 0.02
"""The share of letters that Urdu alone has, above which a text in Arabic letters is Urdu."""
_FUNCTION_WORDS = {language: frozenset(text.split()) for language, text in _WORDS.items()}
_WORD = re.compile(r"[^\W\d_]+(?:[\u0900-\u0963\u200d]+[^\W\d_]*)*")


def may_be_in(text: str, language: str) -> bool:
    """Whether a text is in a language, as far as can be told.

    If its language cannot be told, its script decides, unless it has many words and none of them is a function word of
    the language. A text without letters may be in any.
    """
    found = language_of(text)
    if found is not None:
        return found == language
    words = _WORD.findall(text.lower())
    if len(words) >= MANY_WORDS and language in _FUNCTION_WORDS and not _counts(words, (language,))[language]:
        return False
    scripts = Counter(_script(letter) for letter in text if letter.isalpha())
    return not scripts or scripts.most_common(1)[0][0] == _SCRIPT_OF.get(language, "LATIN")


def language_of(text: str) -> str | None:
    """The code of the text's language, such as "en", or None if it cannot be told."""
    scripts = Counter(_script(letter) for letter in text if letter.isalpha())
    if not scripts:
        return None
    if scripts["HIRAGANA"] + scripts["KATAKANA"] > 0.1 * scripts.total():
        return "ja"
    script = scripts.most_common(1)[0][0]
    if script in _ALONE:
        return _ALONE[script]
    if script == "CJK":
        return "zh"
    lowered = text.lower()
    if script == "DEVANAGARI":
        return _by_words(lowered, _SHARE[script])
    if script in _SHARE:
        counts = Counter({language: sum(map(lowered.count, _LETTERS[language])) for language in _SHARE[script]})
        if script == "CYRILLIC":
            counts.update(_counts(_WORD.findall(lowered), _SHARE[script]))
        if counts["ur"] > LEAST_URDU * scripts.total():  # Urdu has nearly all letters of Persian too
            return "ur"
        first = _SHARE[script][0]
        best = max(counts, key=lambda language: counts[language])
        # Serbian, say, has none of these letters, and an Arabic text may have none either: the commonest language then
        return best if counts[best] else first
    if script != "LATIN":
        return None
    if sum(map(lowered.count, _LETTERS["vi"])) > 0.05 * scripts.total():
        return "vi"
    return _by_words(lowered, _LATIN)


def _by_words(text: str, languages: tuple[str, ...]) -> str | None:
    """The language with most function words in the text; None if there is none, or two have as many."""
    (best, most), (_, second) = _counts(_WORD.findall(text), languages).most_common(2)
    return best if most > second else None


def _counts(words: Sequence[str], languages: tuple[str, ...]) -> Counter[str]:
    """The function words of each language among the words."""
    return Counter({language: sum(word in _FUNCTION_WORDS[language] for word in words) for language in languages})


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]
