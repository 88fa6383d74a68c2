"""English words as the guard of similar questions sees them: which deny, which count, which carry no meaning."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _table(text: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in text.split())


NEGATIONS = _words("""
    not no never none nobody nothing nowhere neither nor without cannot hardly except unless instead avoid lack
""")
# What a question may gain or lose. Whatever turns it round is not here: time (was, will), duty (should, must), whom
# (me, him), and how things hang together (by, for, with, or, before, from).
FUNCTION_WORDS = _words("""
    a an the is are am be been being do does has have can could i you we one there of any some please kindly really very
    actually exactly also hello hi hey thanks thank ok tell explain know way
""")
NUMBERS = _table("""
    zero=0 two=2 three=3 four=4 five=5 six=6 seven=7 eight=8 nine=9 ten=10 eleven=11 twelve=12 thirteen=13 fourteen=14
    fifteen=15 sixteen=16 seventeen=17 eighteen=18 nineteen=19 twenty=20 thirty=30 forty=40 fifty=50 sixty=60 seventy=70
    eighty=80 ninety=90 hundred=100 thousand=1000 million=1000000 billion=1000000000 first=1st second=2nd third=3rd
    half=1/2 twice=2x double=2x once=1x both=2
""")
OPPOSITES = frozenset(
    frozenset(pair.split("/"))
    for pair in _words("""
    increase/decrease raise/lower raise/reduce gain/lose more/less more/fewer most/least best/worst better/worse
    good/bad buy/sell start/stop begin/end open/close enable/disable on/off up/down left/right before/after with/without
    above/below over/under in/out inside/outside high/low higher/lower hot/cold fast/slow early/late old/new first/last
    male/female man/woman men/women boy/girl he/she his/her father/mother husband/wife import/export install/uninstall
    add/remove allow/deny allow/forbid accept/reject win/lose love/hate always/never all/none everyone/nobody
    minimum/maximum min/max north/south east/west push/pull encrypt/decrypt upload/download from/to send/receive
    teach/learn lend/borrow true/false yes/no can/cannot advantage/disadvantage pros/cons pro/con benefit/drawback
    safe/dangerous cheap/expensive easy/hard possible/impossible legal/illegal public/private positive/negative thin/fat
    weight/height morning/evening day/night dead/alive
""")
)
PREFIXES = ("un", "in", "im", "il", "ir", "dis", "non", "mis", "anti", "de", "under", "over", "pre", "post")
OF_THE_MOMENT = _words("""
    today tonight now currently current yesterday tomorrow latest newest recent recently still yet nowadays
    weather news price stock score
""")
