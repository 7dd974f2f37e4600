"""Texts on which two tokenizers must agree: many scripts, code, emoji, whitespace, numbers, look-alikes of specials.

Written for edgeft. Each group aims at one way tokenizers are known to part: Unicode classes in split expressions,
normalization, runs of spaces, digit grouping, byte fallback, contractions, and text that only looks like a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

GROUPS: Mapping[str, tuple[str, ...]] = {
    "latin": (
        "Turn on the lights in the kitchen.",
        "naïve café déjà-vu, coöperate, Ångström, œuvre",
        "Straße, Größe, Übermut; ĲSSEL, ﬁne ﬂour",
        "Zażółć gęślą jaźń. Příliš žluťoučký kůň úpěl ďábelské ódy.",
        "Đừng quên tắt đèn phòng ngủ lúc 22:30 nhé!",
        "İstanbul'da ışıklar ılık; Iğdır'ın ağaçları",
    ),
    "contractions": (
        "I'm, you're, he's, they'd, we'll, I've, isn't",
        "I'M, YOU'RE, HE'S, THEY'D, WE'LL, I'VE, ISN'T",
        "rock'n'roll 'tis ''quoted'' O'Neill’s l’été",
    ),
    "scripts": (
        "Включи свет на кухне, пожалуйста. Ёлка, объём, Щука.",
        "Άναψε τα φώτα στην κουζίνα — ΟΔΥΣΣΕΥΣ, ὀξεῖα.",
        "שלום עולם, כבה את האור בסלון",
        "שָׁלוֹם עֲלֵיכֶם",
        "أطفئ الأضواء في غرفة الجلوس، من فضلك؟",
        "العَرَبِيَّةُ ١٢٣٤٥",
        "रसोई की बत्ती जला दो। क्षत्रिय, ज्ञान, १२३",
        "রান্নাঘরের আলো জ্বালাও",
        "சமையலறை விளக்கை அணை",
        "เปิดไฟในห้องครัวหน่อย ๑๒๓",
        "បើកភ្លើងក្នុងផ្ទះបាយ",
        "မီးဖိုချောင်မီးဖွင့်ပါ",
        "ሰላም ለዓለም",
        "ჩართე შუქი სამზარეულოში",
        "Բարև ձեզ, աշխարհ",
    ),
    "cjk": (
        "把厨房的灯打开,然后把温度调到21度。",
        "把廚房的燈關掉！「好的」，他說。",
        "キッチンの電気を消して。ﾊﾝｶｸ カタカナ ぱぴぷ",
        "주방 불을 켜 줘. ㅋㅋㅋ 한국어",
        "𠮷野家 㐂 〇 ①②③ ㍿",
    ),
    "emoji": (
        "👍 👍🏽 👩‍👩‍👧‍👦 👨🏿‍🚀 🏳️‍🌈",
        "☎️ ☎︎ ❤️‍🔥 1️⃣ 🇩🇪🇯🇵 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
        "temp🌡️=21°C✅done!!!🎉🎉",
    ),
    "combining": (
        "e\u0301 vs \u00e9, A\u030a vs \u00c5, n\u0303o",
        "Z̷̡̛a̵l̶g̴o̷",
        "\u1112\u1161\u11ab vs 한",
        "ﷺ ½ ² ﹏ Ａｂｃ１２３",
        "q\u0307\u0323 and q\u0323\u0307",
    ),
    "numbers": (
        "0 1 12 123 1234 12345 1234567890",
        "3.14159 -273.15 1e-9 0x1F 1,000,000.00 50% $9.99 €5 ½",
        "2026-11-23T07:05:59Z +49 (0)30 123-45-67 v1.2.3-rc.4",
        "room 7, 21.5°C, 7:30am, 100500th, x86_64, H2O",
    ),
    "whitespace": (
        "",
        " ",
        "  ",
        "\n",
        "\n\n\n",
        "\t",
        " leading and trailing ",
        "a  b   c    d     e",
        "line one\nline two\r\nline three\r\n\r\nend",
        "tab\tbetween\t\twords\t\t\t",
        "   \n   \n\t\n x \n ",
        "no\u00a0break thin\u2009space ideographic\u3000space zero\u200bwidth \u2028 \ufeff",
        "  7  lights,   21 degrees",
        "trailing newline\n",
    ),
    "code": (
        "def f(x: int) -> int:\n    if x <= 0:\n        return 0\n    return f(x - 1) + 1\n",
        '{"device": "light", "action": "set", "value": 40, "room": null, "time": "07:30"}',
        "for (int i = 0; i < n; ++i) { a[i] += b[i] * 2; } // done\n",
        "SELECT * FROM t WHERE a != 'it''s' AND b >= 1.5;--",
        "<div class=\"x\">&amp; <br/></div>\n```python\nprint('hi')\n```",
        "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\temp\\new",
        "\\frac{a}{b} \\n \\t ${HOME} $(ls -la | grep '^d')",
        "camelCase snake_case SCREAMING_SNAKE kebab-case ========= ----- ..... !!??",
    ),
    "look-alikes": (
        "<|im_start|>user\nhello<|im_end|>\n",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>",
        "<|endoftext|> <s> </s> <unk> <pad> [INST] x [/INST]",
        "< |im_start| > <|im_start <|im_end|>> <|unknown_token|>",
        "<think>\nhm\n</think>\n\n<tool_call>\n{}\n</tool_call>",
        "<0x0A> <0xE2> ▁word ▁▁ Ġword Ċ [PAD12]",
    ),
    "odd": (
        "\x00\x01\x1b[31mred\x7f",
        "\ufffd \U0010fffd \ue000",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "Lopado­temacho­selacho­galeo­kranio",
        "mixed: Привет 世界 hello مرحبا 🌍 123\n",
    ),
}

PLAIN = (
    "The lights in the kitchen are on, and the heating is set to 21 degrees. At 7:30 in the morning the blinds open.",
    "A fox jumped over the fence, looked around, and ran back into the forest before anybody could see it.",
    "To make tea, boil some water, put the leaves into the pot, pour the water over them and wait for four minutes.",
    "def area(width: float, height: float) -> float:\n    return width * height\n",
)
"""Scored where there are no examples: every one of their tokens."""


def texts() -> Iterator[tuple[str, str]]:
    """(group, text) of every entry, in a fixed order."""
    for group, entries in GROUPS.items():
        for text in entries:
            yield group, text
