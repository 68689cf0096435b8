"""What the metrics share: words of a text, predictions and references that fit together, packages that are missing."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Literal

import regex

from vft.common.errors import UserError

Japanese = Literal["char", "ja-mecab"]
"""How Japanese is cut: by characters, or into words by MeCab; the names are sacrebleu's."""

_LETTER = r"\p{L}\p{N}\p{M}"
_JAPANESE = r"\p{Hiragana}\p{Katakana}\u30fc"
_UNSPACED = rf"{_JAPANESE}\p{{Han}}\p{{Thai}}\p{{Lao}}\p{{Khmer}}\p{{Myanmar}}\p{{Tai_Le}}\p{{Tai_Tham}}\p{{Tai_Viet}}"
"""Letters, within a character class, of scripts that are written without spaces between words."""
_SPACED = rf"[[{_LETTER}]--[{_UNSPACED}]]"

# Unicode's emoji sequences (UTS 51, "possible emoji"): keycaps, flags, pictures with their skin tone, joined or not.
# Of the signs that are text unless a selector says otherwise, those count alone that are hardly used in writing.
_PICTURE = r"[\p{Emoji}--\p{ASCII}]"
_PART = rf"{_PICTURE}(?:[\ufe0e\ufe0f]|\p{{Emoji_Modifier}}|[\U000e0020-\U000e007e]+\U000e007f)?"
_EMOJI = (
    r"(?:[0-9#*]\ufe0f?\u20e3|\p{RI}\p{RI}"
    rf"|{_PART}(?:\u200d{_PART})+|{_PICTURE}(?:\ufe0f|\p{{Emoji_Modifier}}|[\U000e0020-\U000e007e]+\U000e007f)"
    r"|[\p{Emoji_Presentation}[\p{Emoji}&&[\u2600-\u27bf\U0001f000-\U0001ffff]]]\ufe0e?)"
)

# A sign belongs to a number unless it stands behind a word, or what ends one (`2010-2012`, `5%-10%`). In scripts
# without spaces it hardly ever follows anything but a letter: there it is a sign, but behind a number's own word
# (`3月-5月`).
_SIGN = rf"(?<![%°)\]}}]|{_SPACED}|\d[{_UNSPACED}]{{1,2}})[-+](?=\p{{Sc}}?\.?\d)"
_COMPARISON = r"(?<!-)(?:!?=+|[<>]=?)|[≈≠≡≢≤≥≦≧≪≫≮≯≰≱≲≳]"
_MEANING = (
    rf"{_EMOJI}|(?<!{_SPACED})(?:c(?:\+\+|\#){_SPACED}*|\p{{L}}\#(?!{_SPACED}|\#))"
    rf"|{_SPACED}+\+\+(?!{_SPACED}|\+)|{_SIGN}{_SPACED}*|\p{{Sc}}|{_COMPARISON}"
)
"""What is no letter or digit and yet tells answers apart: emoji, `C++`, `C#`, -5, currencies, comparisons."""

_V1 = regex.VERSION1
_WORD = regex.compile(rf"{_MEANING}|[{_UNSPACED}][{_UNSPACED}\p{{M}}]*|{_SPACED}+", _V1)
_MEANING_OR_PUNCTUATION = regex.compile(rf"({_MEANING})|([!-/:-@\[-`{{-~])|\p{{P}}", _V1)
_EMOJI_OR_IGNORED = regex.compile(rf"({_EMOJI})|(\u200b)|\p{{Default_Ignorable_Code_Point}}", _V1)
_FULL_WIDTH = regex.compile(r"[\uff00-\uffef]+")
_SELECTORS = regex.compile(rf"({_PICTURE})[\ufe0e\ufe0f]?(?!\p{{Emoji_Modifier}})", _V1)
_SPLIT = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|[^{_UNSPACED}]+", _V1)
_IS_UNSPACED = regex.compile(rf"[{_UNSPACED}]", _V1)
_IS_JAPANESE = regex.compile(rf"[{_JAPANESE}]", _V1)
_IS_JAPANESE_OR_HAN = regex.compile(rf"[{_JAPANESE}\p{{Han}}]", _V1)
_IS_TIBETAN = regex.compile(r"\p{Tibetan}", _V1)
_IS_HAN_ALONE = regex.compile(rf"[\p{{Han}}--{_JAPANESE}]", _V1)
_ENGLISH = regex.compile(rf"{_MEANING}|[a-z0-9]+", _V1)
_OTHER_SCRIPT = regex.compile(r"[\p{L}--\p{Latin}]", _V1)
_CHARACTERS = regex.compile(
    rf"{_EMOJI}|[{_UNSPACED}]\p{{M}}*"
    rf"|{_SPACED}+(?:(?:['’-]|(?<=\d)[.,](?=\d)){_SPACED}+)*|\S\p{{M}}*",
    _V1,
)


def normalize(text: str) -> str:
    """`text` in the form in which texts are compared: composed (NFC), lower case, full-width and half-width forms as
    their usual ones, minus signs as `-`, without characters that nobody sees (joiners, soft hyphens, marks of
    direction) but for those within an emoji, which has the selector that Unicode recommends."""
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFC", text)
    text = _FULL_WIDTH.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    # The Turkish capital would be lowered to two characters. A dash before a digit is a minus where a sign may stand.
    text = unicodedata.normalize("NFC", text.replace("İ", "i").lower())
    text = regex.sub(r"[−﹣–](?=\p{Sc}?\.?\d)", "-", text)
    text = _EMOJI_OR_IGNORED.sub(lambda found: _qualified(found[1]) if found[1] else " " * bool(found[2]), text)
    return unicodedata.normalize("NFC", text)  # marks may have had a joiner between them


def _qualified(emoji: str) -> str:
    """An emoji with a selector behind each part that is text by default, and behind no other (UTS 51, ED-18)."""
    if emoji[-1] == "\u20e3":
        return f"{emoji[0]}\ufe0f\u20e3"
    return str(
        _SELECTORS.sub(
            lambda found: found[1] + "\ufe0f" * (not regex.match(r"\p{Emoji_Presentation}", found[1], _V1)), emoji
        )
    )


def tokenize(text: str) -> list[str]:
    """Words of `text`: lower case, apostrophes dropped (`it's` -> `its`), other punctuation a space, then split.

    Marks stay with their letters, in any script and whether they are composed or not. Currency and comparison signs,
    emoji, `C++`, `C#` and the sign of a number that doesn't follow a letter or digit stay too: what differs in them
    differs. No PTB tokenizer. Scripts that write no spaces come out as one word a clause, apart from other scripts.
    """
    return [_COMPARED.get(word, word) for word in _WORD.findall(regex.sub(r"['’]", "", normalize(text)))]


_COMPARED = {"<=": "≤", ">=": "≥", "!=": "≠", "==": "="}


def squad_text(text: str) -> str:
    """`text` as SQuAD compares it: lower case, ASCII punctuation dropped without leaving a space.

    What `tokenize` keeps stays here too; scripts other than Latin lose their own punctuation (as in MLQA's evaluation).
    """
    text = normalize(text)
    has_others = not text.isascii() and _OTHER_SCRIPT.search(text)

    def replace(found: regex.Match[str]) -> str:
        kept, ascii_punctuation = found.groups()
        if kept:  # a sign or an emoji is a word by itself; -5 and C++ belong to what stands around them
            return kept if kept[-1].isalnum() or kept[-1] in "+-#" else f" {_COMPARED.get(kept, kept)} "
        return "" if ascii_punctuation else " " if has_others else found[0]

    return str(_MEANING_OR_PUNCTUATION.sub(replace, text))


def script_words(text: str, japanese: Japanese = "char") -> list[str]:
    """Words of `text` in any script: as `tokenize` has them, but those of scripts without spaces by characters, each
    with its marks (Latin words among them whole), or for `ja-mecab` as MeCab cuts Japanese."""
    return [part for word in tokenize(text) for part in split_word(word, japanese)]


def split_word(word: str, japanese: Japanese = "char") -> list[str]:
    """The parts of a word of `tokenize` in a script without spaces; of another the word itself."""
    if japanese == "ja-mecab" and _IS_JAPANESE_OR_HAN.search(word):
        return mecab()(word).split()
    return list(_SPLIT.findall(word)) if is_unspaced(word) else [word]


def characters(text: str) -> list[str]:
    """Characters of `text` as sacrebleu's `char` has them, but with their marks, and words of other scripts whole."""
    return list(_CHARACTERS.findall(text))


def is_unspaced(text: str) -> bool:
    """Whether there is a letter of a script that is written without spaces between words."""
    return not text.isascii() and _IS_UNSPACED.search(text) is not None


def bleu_tokenizer(references: Iterable[str], japanese: Japanese = "char") -> str:
    """sacrebleu's name of the tokenizer for texts like these: `13a`, `zh`, `char` or `ja-mecab`.

    Han characters without any kana are Chinese, unless `ja-mecab` says that they are Japanese. Tibetan is `char`: its
    syllables stay whole, but `13a` would take a clause for a word.
    """
    text = " ".join(references)
    if _IS_JAPANESE.search(text) or (japanese == "ja-mecab" and _IS_JAPANESE_OR_HAN.search(text)):
        return japanese
    if not is_unspaced(text):
        return "char" if _IS_TIBETAN.search(text) else "13a"
    return "char" if _IS_UNSPACED.search(_IS_HAN_ALONE.sub("", text)) else "zh"


def word_tokenizer(references: Iterable[str], japanese: Japanese = "char") -> str:
    """How `script_words` cuts texts like these: `words`, `characters` or `ja-mecab`."""
    text = " ".join(references)
    if japanese == "ja-mecab" and _IS_JAPANESE_OR_HAN.search(text):
        return japanese
    return "characters" if is_unspaced(text) else "words"


def has_english_words(text: str) -> bool:
    """Whether rouge-score's own words, runs of a-z and digits, fit `text`: it has letters or digits, and more than nine
    in ten of its letters are a-z (English borrows a few others)."""
    if text.isascii():
        return any(map(str.isalnum, text))
    letters = [letter for letter in unicodedata.normalize("NFC", text) if letter.isalpha()]
    return sum(map(str.isascii, letters)) * 10 > len(letters) * 9


def rouge_l_scorer() -> Callable[[str, str], Any]:
    """A function of a reference and a prediction: ROUGE-L of rouge-score without stemming, as precision, recall and
    fmeasure, each 0 to 1.

    Where the reference is English, with rouge-score's own words, and what `tokenize` keeps of signs (-5 is not 5); else
    with `script_words`. Each pair of texts is decided by itself. Raises UserError without the extra `eval`.
    """
    module = optional_module("rouge_score.rouge_scorer", "ROUGE-L", "rouge-score")
    other, english = (
        module.RougeScorer(["rougeL"], use_stemmer=False, tokenizer=SimpleNamespace(tokenize=cut))
        for cut in (script_words, _english_words)
    )
    return lambda reference, text: (english if has_english_words(reference) else other).score(reference, text)["rougeL"]


def rouge_l_tokenizer(references: Iterable[str]) -> str:
    """How `rouge_l_scorer` cuts texts like these: `rouge-score`, `words` or `characters`."""
    text = " ".join(references)
    return "rouge-score" if has_english_words(text) else word_tokenizer([text])


def _english_words(text: str) -> list[str]:
    """rouge-score's own words, runs of a-z and digits, and signs that tell answers apart."""
    return [_COMPARED.get(word, word) for word in _ENGLISH.findall(normalize(text))]


@cache
def mecab() -> Callable[[str], str]:
    """sacrebleu's `ja-mecab`: a text with spaces between its words. UserError without the extra `ja`."""
    try:
        from sacrebleu import BLEU

        return BLEU(tokenize="ja-mecab").tokenizer
    except (ImportError, RuntimeError) as error:  # sacrebleu's own words for a MeCab that isn't there
        raise UserError(
            "eval.japanese = 'ja-mecab' needs MeCab and its dictionary, which are not installed: pip install 'vft[ja]'"
        ) from error


def checked_pairs(
    predictions: Sequence[str], references: Sequence[Sequence[str]], name: str = "references"
) -> list[tuple[str, Sequence[str]]]:
    """Each prediction with its references. ValueError, with both numbers, unless there are predictions and each has one
    reference or more.

    `name` is what messages call the references.
    """
    if not predictions:
        raise ValueError("no predictions to score")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions, but {name} for {len(references)}")
    for i, refs in enumerate(references):
        if isinstance(refs, str):  # A string is a sequence too, of letters.
            raise ValueError(f"{name} of prediction {i}: a list of texts is needed, not one text")
        if not refs:
            raise ValueError(f"prediction {i} has 0 {name}, needs at least 1")
    return list(zip(predictions, references, strict=True))


def optional_module(name: str, metric: str, package: str, extra: str = "eval") -> Any:
    """A module of an optional extra. UserError if it cannot be imported: `metric` needs `package`."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"{metric} needs {package}, which is not installed: pip install 'vft[{extra}]'") from error
