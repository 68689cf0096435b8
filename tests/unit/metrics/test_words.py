"""Words of texts in many scripts: what differs differs, what is the same is the same, and English stays as it was.

BLEU is compared with sacrebleu's own tokenizers, the rest with values worked out by hand.
"""

from __future__ import annotations

import random
import re
import string
import sys
import unicodedata
from collections import Counter

import pytest
import sacrebleu
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from vft.common.errors import UserError
from vft.common.task import Answer, Question
from vft.common.types import Conversation, Turn
from vft.metrics import (
    anls_scores,
    bleu4_interval,
    cider_d_scores,
    distinct_n,
    exact_match_scores,
    rouge_l_scores,
    rouge_l_tokenizer,
    segment_coverage_scores,
    token_f1_scores,
    word_tokenizer,
)
from vft.metrics import words as cutting
from vft.metrics.words import Japanese, bleu_tokenizer, script_words, tokenize
from vft.recipes.caption import Caption
from vft.recipes.qa import QuestionAnswering
from vft.recipes.story import Story


def bleu4(predictions: list[str], references: list[list[str]], japanese: Japanese = "char") -> float:
    return bleu4_interval(predictions, references, japanese=japanese).value


DIFFERENT = [
    ("दिन", "दान"),  # Hindi: day, donation
    ("मिल", "मेल"),
    ("দিন", "দান"),  # Bengali
    ("புலி", "புளி"),  # Tamil: tiger, tamarind
    ("ข้าว", "ข่าว"),  # Thai: rice, news
    ("ใกล้", "ไกล"),  # near, far
    ("ເຂົ້າ", "ເຂົາ"),  # Lao
    ("ကို", "ကူ"),  # Burmese
    ("កី", "កិ"),  # Khmer
    ("كَتَبَ", "كُتُب"),  # Arabic: he wrote, books
    ("שִׁיר", "שֵׁיר"),  # Hebrew
    ("má", "mà"),  # Vietnamese
    *(("résumé", "resume"), ("-5", "5"), ("−5 °C", "5 °C"), ("x = -5", "x = 5"), ("-5 C", "5 C")),
    *(("it is -5 degrees", "it is 5 degrees"), ("气温是-5度", "气温是5度"), ("気温は−5度です", "気温は5度です")),
    *(("อุณหภูมิ-5องศา", "อุณหภูมิ5องศา"), ("costs $5", "costs 5"), ("written in C++", "written in C")),
    *(("(-0.5)", "(0.5)"), ("+3", "3"), ("+3", "-3"), ("$5", "€5"), ("5 €", "5"), ("-$5", "$5"), ("₹100", "100")),
    *(("< 5", "> 5"), ("a = b", "a b"), ("≤ 5", "≥ 5"), ("x != 5", "x = 5"), ("C++", "C"), ("C#", "C++")),
    *(("C++17", "C 17"), ("😀", "😢"), ("yes 👍", "yes 👎"), ("👍🏽", "👍🏿"), ("👨‍👩‍👧", "👨‍👩‍👦")),
    *(("🇩🇪", "🇫🇷"), ("1️⃣", "2️⃣")),
    ("🏴󠁧󠁢󠁥󠁮󠁧󠁿", "🏴󠁧󠁢󠁳󠁣󠁴󠁿"),  # England, Scotland
]

SAME = [
    ("un café noir", unicodedata.normalize("NFD", "un café noir")),
    ("một con mèo", unicodedata.normalize("NFD", "một con mèo")),
    ("강아지가 뛴다", unicodedata.normalize("NFD", "강아지가 뛴다")),
    *(("ガラス", unicodedata.normalize("NFD", "ガラス")), ("क़लम", unicodedata.normalize("NFD", "क़लम"))),
    *(("İstanbul", "istanbul"), ("İSTANBUL", unicodedata.normalize("NFD", "İstanbul")), ("-5", "−5"), ("-5", "－５")),
    *(("<= 5", "≤ 5"), ("$5", "＄ 5"), ("Ａｂ１", "ab1"), ("ﾊﾞﾅﾅ", "バナナ"), ("❤️ it", "❤ it"), ("❤️‍🔥", "❤‍🔥")),
    ("1️⃣", "1⃣"),
    ("می‌روم", "میروم"),  # a joiner that nobody sees
    ("hy\u00adphen", "hyphen"),
    ("\u05e9\u05c1\u034f\u05b8", "\u05e9\u05b8\u05c1"),  # a joiner that keeps two points of Hebrew in their order
    *(("cafe\u00ad\u0301", "café"), ("well-known", "well known"), ("2010-2012", "2010 2012"), ("5%-10%", "5 10")),
    *(("3月-5月", "3月5月"), ("3–5人", "3-5人"), ("A -> B", "a b"), ("3 只狗", "3只狗")),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_words_differ(one: str, other: str) -> None:
    for form in ("NFC", "NFD"):
        prediction, right = (unicodedata.normalize(form, text) for text in (one, other))
        assert exact_match_scores([prediction], [[right]]) == [0]
        assert token_f1_scores([prediction], [[right]])[0] < 1
        cider_d, best = (cider_d_scores([text, "x"], [[right], ["x"]])[0] for text in (prediction, right))
        assert cider_d < best and rouge_l_scores([prediction], [[right]])[0] < 1


@pytest.mark.parametrize(("one", "other"), SAME)
def test_equal_texts_are_equal(one: str, other: str) -> None:
    assert exact_match_scores([one], [[other]]) == [1] and script_words(one) == script_words(other)
    composed = unicodedata.normalize("NFC", one)
    for metric in (anls_scores, token_f1_scores, rouge_l_scores):
        assert metric([composed], [[unicodedata.normalize("NFD", one)]]) == [1]
    assert bleu4([composed], [[unicodedata.normalize("NFD", one)]]) == bleu4([composed], [[composed]])


@pytest.mark.parametrize("text", ["हिन्दी।", "क्या?", "ما هذا؟", "כֵּן, לֹא", "«Да», нет", "—Да…"])
def test_punctuation_of_other_scripts_is_no_word(text: str) -> None:
    """As MLQA's evaluation drops it."""
    plain = "".join(char for char in text if not unicodedata.category(char).startswith("P"))
    assert token_f1_scores([text], [[plain]]) == [1] and exact_match_scores([text], [[plain]]) == [1]


def test_symbols_without_words_equal_themselves() -> None:
    texts, right = ["→", "→.", "→", "✓", "■", "", "…", "+"], [["→"], ["→"], ["←"], ["✗"], [""], ["■"], [""], ["-"]]
    assert exact_match_scores(texts, right) == [1, 1, 0, 0, 0, 0, 1, 1]  # ASCII as ever: nothing is left of it


def test_tibetan_is_cut_into_syllables() -> None:
    """By hand: of nine syllables and marks one differs, so no clause is lost as a whole."""
    right, text = "ཁྱི་ནག་པོ་རྒྱུག", "ཁྱི་དཀར་པོ་རྒྱུག"
    assert bleu_tokenizer([right]) == "char" and bleu4([right], [[right]]) == pytest.approx(100)
    words = right.replace("་", " ་ "), text.replace("་", " ་ ")
    expected = sacrebleu.corpus_bleu([words[1]], [[words[0]]], tokenize="none").score
    assert bleu4([text], [[right]]) == pytest.approx(expected) and expected > 20


def test_an_emoji_is_one_word() -> None:
    wholes = ["👩‍👩‍👧", "👍🏽", "🇩🇪", "🇫🇷", "1️⃣", "❤️‍🔥", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "😀"]
    assert tokenize("".join(wholes)) == wholes and tokenize(" x ".join(wholes))[::2] == wholes
    assert tokenize("© a™ ②—…✓") == ["a", "②"]  # text, as before


def test_every_letter_and_mark_is_kept() -> None:
    """Of every character that Python takes for part of a word, and of every combining mark, if it is seen at all."""
    ignorable = re.compile(
        "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\uffa0\ufe00-\ufe0f\U000e0100-\U000e01ef]"
    )
    for code in range(0x80, sys.maxunicode + 1):
        char = chr(code)
        kind = unicodedata.category(char)
        few = kind[0] == "M" or code < 0x3000 or code % 97 == 0  # most others are ideographs
        if kind[0] in "LNM" and few and not ignorable.match(char):
            assert tokenize(f"a {char} b")[1:-1], hex(code)


# ------------------------------------------------------------------------------------------------- English as it was


def old_tokenize(text: str) -> list[str]:
    """What `tokenize` was before it knew other scripts."""
    return re.sub(r"[^\w\s]|_", " ", re.sub(r"['’]", "", text.lower())).split()


def old_squad_words(text: str) -> Counter[str]:
    dropped = text.lower().translate(str.maketrans("", "", string.punctuation))
    return Counter(re.sub(r"\b(a|an|the)\b", " ", dropped).split())


def old_token_f1(text: str, right: str) -> float:
    one, other = old_squad_words(text), old_squad_words(right)
    return 2 * (one & other).total() / (one.total() + other.total()) if one and other else float(one == other)


WORDS = ["a", "the", "dog", "dogs", "A", "man's", "it's", "well-known", "2010-2012", "3.5", "1,000", "U.S.A.", "50%"]
PUNCTUATION = ["", "", "", " -", " – ", "...", "!?", *".,!?;:'\"’“”)(/"]
ENGLISH = st.lists(
    st.tuples(st.sampled_from(WORDS) | st.text(string.ascii_letters, min_size=1), st.sampled_from(PUNCTUATION))
)
SENTENCE = ENGLISH.map(lambda pairs: " ".join(word + mark for word, mark in pairs))
ANY_ASCII = st.text("".join(set(map(chr, range(9, 127))) - set("$<=>+#-")))
"""All but what tells answers apart now."""


@settings(max_examples=60, deadline=None)
@example([("", ""), ("man's 2010-2012", "2010-2012")])  # a reference of digits alone
@given(st.lists(st.tuples(SENTENCE | ANY_ASCII, SENTENCE | ANY_ASCII), min_size=2, max_size=4))
def test_english_scores_are_what_they_were(pairs: list[tuple[str, str]]) -> None:
    """To the last digit."""
    texts, right = [one for one, _ in pairs], [[other] for _, other in pairs]
    for text in [*texts, *(refs[0] for refs in right)]:
        assert tokenize(text) == script_words(text) == old_tokenize(text)
    assert exact_match_scores(texts, right) == [float(old_tokenize(a) == old_tokenize(b)) for a, b in pairs]
    assert token_f1_scores(texts, right) == [old_token_f1(a, b) for a, b in pairs]
    assert bleu4(texts, right) == sacrebleu.corpus_bleu(texts, [[refs[0] for refs in right]]).score
    scorer = RougeScorer(["rougeL"])
    assert rouge_l_scores(texts, right) == [float(scorer.score(b, a)["rougeL"].fmeasure) for a, b in pairs]


# --------------------------------------------------------------------------------------------- scripts without spaces

ZH = [
    ("一只棕色的狗在草地上奔跑。", "一只棕色的狗在草地上快速奔跑。"),
    ("一个女人在厨房里切胡萝卜,共3.5公斤。", "一个女人正在厨房里切胡萝卜，共 3.5 公斤。"),
    ("两个孩子在看CNN的“新闻”。", "两个小孩在看 CNN 的“新闻”——在公园里。"),
]
JA = [
    ("犬が草の上を走っている。", "茶色い犬が草の上を走っている。"),
    ("女性が台所で人参を切る。", "女性が台所で、人参を切っている。"),
    ("東京タワー", "東京タワーの前で子供たちが「サッカー」をする！"),
]
TH = [("ผู้หญิงกำลังหั่นแครอท", "ผู้หญิงคนหนึ่งกำลังหั่นแครอทในครัว"), ("สุนัขวิ่ง", "สุนัขสีน้ำตาลวิ่งบนหญ้า")]


def columns(pairs: list[tuple[str, str]]) -> tuple[list[str], list[list[str]]]:
    return [text for text, _ in pairs], [[right] for _, right in pairs]


def marks_joined(text: str) -> str:
    """Characters with their marks, with spaces between, by categories of Unicode."""
    found: list[str] = []
    for char in text:
        if unicodedata.combining(char) or unicodedata.category(char) == "Mn":
            found[-1] += char
        else:
            found.append(char)
    return " ".join(found)


@pytest.mark.parametrize(("pairs", "name"), [(ZH, "zh"), (JA, "char")])
def test_texts_are_cut_as_by_sacrebleu(pairs: list[tuple[str, str]], name: str) -> None:
    texts, right = columns(pairs)
    expected = sacrebleu.corpus_bleu(texts, [[refs[0] for refs in right]], tokenize=name).score
    assert bleu4(texts, right) == pytest.approx(expected, rel=1e-12) and 30 < expected < 90


def test_thai_is_cut_by_characters_with_their_marks() -> None:
    texts, right = columns(TH)
    cut = [marks_joined(text) for text in texts], [[marks_joined(refs[0]) for refs in right]]
    expected = sacrebleu.corpus_bleu(*cut, tokenize="none").score
    assert bleu4(texts, right) == pytest.approx(expected, rel=1e-12) and 20 < expected < 90
    assert script_words("ผู้หญิง 2 คน") == ["ผู้", "ห", "ญิ", "ง", "2", "ค", "น"]


def test_latin_words_stay_whole_among_characters() -> None:
    """So `char` of a text in which each of them is one character."""
    texts, right = ["GPUでPythonを動かす"], [["GPUでPythonを速く動かす"]]
    expected = sacrebleu.corpus_bleu(["XでYを動かす"], [["XでYを速く動かす"]], tokenize="char").score
    assert bleu4(texts, right) == pytest.approx(expected, rel=1e-12)
    assert script_words("GPUでC++を") == ["gpu", "で", "c++", "を"]


def test_random_chinese_equals_sacrebleu() -> None:
    generator = random.Random(0)
    alphabet = "的一是在不了有和人这中大为上个国我以要他，。！？《》“”、 ,.3.5ab-Cd%（）"
    texts, right = (
        ["狗" + "".join(generator.choices(alphabet, k=generator.randrange(3, 30))) for _ in range(200)]
        for _ in range(2)
    )
    expected = sacrebleu.corpus_bleu(texts, [right], tokenize="zh").score
    assert bleu4(texts, [[one] for one in right]) == pytest.approx(expected, rel=1e-12) and expected > 0


def test_a_mixed_set_is_cut_text_by_text() -> None:
    """Its counts are the sums of those of its parts, each cut in its own way."""
    english = [("A brown dog runs on the grass.", "A brown dog runs quickly on the grass.")]
    pairs = [*english, *ZH, *JA, *TH]
    texts, right = columns(pairs)
    metric, parts = sacrebleu.BLEU(tokenize="none", force=True), []
    for name, some in (("13a", english), ("zh", ZH), ("char", JA)):
        parts.append(sacrebleu.BLEU(tokenize=name).corpus_score([a for a, _ in some], [[b for _, b in some]]))
    parts.append(metric.corpus_score([marks_joined(a) for a, _ in TH], [[marks_joined(b) for _, b in TH]]))
    counts, totals = (
        [sum(column) for column in zip(*rows, strict=True)]
        for rows in ([p.counts for p in parts], [p.totals for p in parts])
    )
    lengths = sum(p.sys_len for p in parts), sum(p.ref_len for p in parts)
    expected = sacrebleu.BLEU.compute_bleu(counts, totals, *lengths, smooth_method="exp").score
    interval = bleu4_interval(texts, right)
    assert interval.low < interval.value < interval.high and interval.value == pytest.approx(expected, rel=1e-12)


def test_near_right_answers_score_alike_in_all_scripts() -> None:
    for pairs in (ZH, JA, TH):
        texts, right = columns(pairs)
        perfect = [refs[0] for refs in right]
        for metric in (token_f1_scores, cider_d_scores, rouge_l_scores):
            near, best = sum(metric(texts, right)), sum(metric(perfect, right))
            assert 0.1 * best < near < best
    # By hand: six characters and seven, six of them shared; marks hold.
    assert token_f1_scores(["狗在草地上跑。"], [["狗在草地上奔跑"]]) == pytest.approx([12 / 13])
    assert token_f1_scores(["ข้าว"], [["ข่าว"]]) == pytest.approx([2 / 3])
    assert distinct_n(["狗狗狗猫"], 2) == pytest.approx(2 / 3)
    assert segment_coverage_scores(["狗跑了。猫睡了。"], [["狗跑", "狗睡"]], threshold=0.9) == [0.5]  # two sentences


def test_rouge_l_decides_for_each_text() -> None:
    """A perfect Chinese answer among English ones is perfect, and changes nothing for them."""
    texts = ["a dog runs", "狗在草地上跑", "un été à Besançon", "the naïve dog ran by the river bank"]
    scorer = RougeScorer(["rougeL"])
    english = scorer.score("the dog runs fast", texts[0])["rougeL"].fmeasure
    loan = scorer.score("the naïve dog ran by the river", texts[3])["rougeL"].fmeasure
    references = [["the dog runs fast"], [texts[1]], [texts[2]], ["the naïve dog ran by the river"]]
    assert rouge_l_scores(texts, references) == pytest.approx([english, 1, 1, loan])
    assert rouge_l_scores(["犬", "5", "😀"], [["a dog", "犬"], ["-5"], ["😀"]]) == [1, 0, 1]


# ------------------------------------------------------------------------------------------------------------ MeCab


def test_japanese_by_mecab() -> None:
    pytest.importorskip("MeCab", reason="MeCab is not installed: pip install 'vft[ja]'")
    texts, right = columns(JA)
    expected = sacrebleu.corpus_bleu(texts, [[refs[0] for refs in right]], tokenize="ja-mecab").score
    assert bleu4(texts, right, "ja-mecab") == pytest.approx(expected, rel=1e-12)
    assert script_words("東京に行く。GPUで", "ja-mecab") == ["東京", "に", "行く", "gpu", "で"]
    assert token_f1_scores(["東京に行く"], [["東京へ行く"]], "ja-mecab") == pytest.approx([2 / 3])
    assert cider_d_scores(texts, right, "ja-mecab") != cider_d_scores(texts, right)
    assert script_words("a dog", "ja-mecab") == ["a", "dog"] and bleu_tokenizer(["a dog"], "ja-mecab") == "13a"


def test_mecab_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_ja_mecab.MeCab", None)
    cutting.mecab.cache_clear()
    for metric in (bleu4, cider_d_scores, token_f1_scores):
        with pytest.raises(UserError, match=r"^eval\.japanese = 'ja-mecab' needs MeCab .*pip install 'vft\[ja\]'$"):
            metric(["犬が", "犬"], [["犬が"], ["犬"]], "ja-mecab")
    assert bleu4(["a dog runs by"], [["a dog runs by"]], "ja-mecab") == pytest.approx(100)  # nothing to cut


# ------------------------------------------------------------------------------------------------ named beside scores


def answers(pairs: list[tuple[str, str]]) -> list[Answer]:
    turn = (Turn("user", ("?",)),)
    return [Answer(Question(str(i), Conversation(str(i), turn, "x"), (b,)), a) for i, (a, b) in enumerate(pairs)]


def test_the_tokenization_stands_beside_each_score() -> None:
    english = [("A dog.", "A brown dog."), ("A cat.", "A cat."), ("No.", "Not at all.")]
    found = {name: one.tokenization for name, one in Caption().score(answers([*english, *ZH[:2], JA[0]])).items()}
    assert found == {
        "cider_d": "words+characters",
        "bleu4": "13a+zh+char",
        "rouge_l": "rouge-score+characters",
    }
    assert {one.tokenization for one in Story().score(answers(ZH)).values()} == {"zh", "characters"}
    scores = QuestionAnswering().score(answers(english))
    assert scores["open_token_f1"].tokenization == "words" and scores["accuracy"].tokenization == ""
    assert word_tokenizer(["犬が"], "ja-mecab") == bleu_tokenizer(["犬"], "ja-mecab") == "ja-mecab"
    assert rouge_l_tokenizer(["été"]) == "words" and bleu_tokenizer(["ไป", "狗"]) == "char"
