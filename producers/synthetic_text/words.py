"""Words of our own for when no corpus is given: small lists and sentence patterns, English and Chinese.

Place in the flow: `sources/synthetic_text.py` takes titles, short phrases and paragraphs from here, or from a corpus
file. Small on purpose: it shows the layouts; text rendering is learnt from a real corpus.
"""

from __future__ import annotations

from random import Random
from typing import Final

from producers.synthetic_text.recipe import Language

_ADJECTIVES: Final = [
    "quiet",
    "bright",
    "early",
    "broad",
    "gentle",
    "simple",
    "modern",
    "golden",
    "distant",
    "fresh",
    "northern",
    "careful",
]
_NOUNS: Final = [
    "harbour",
    "garden",
    "market",
    "library",
    "river",
    "window",
    "morning",
    "letter",
    "bridge",
    "village",
    "orchard",
    "museum",
]
_PLURALS: Final = [
    "lanterns",
    "boats",
    "stories",
    "seasons",
    "roads",
    "mountains",
    "flowers",
    "neighbours",
    "songs",
    "travellers",
    "maps",
    "clouds",
]
_VERBS: Final = [
    "opens",
    "follows",
    "carries",
    "greets",
    "remembers",
    "gathers",
    "crosses",
    "welcomes",
    "measures",
    "paints",
]
_TOPICS: Final = [
    "Design",
    "Energy",
    "Travel",
    "Research",
    "Music",
    "Cooking",
    "Health",
    "Weather",
    "Science",
    "History",
    "Sport",
    "Finance",
]
_ACTIONS: Final = [
    "Plan",
    "Review",
    "Share",
    "Discover",
    "Improve",
    "Measure",
    "Explore",
    "Prepare",
    "Compare",
    "Deliver",
]
_THINGS: Final = ["results", "the next steps", "new ideas", "local partners", "the budget", "field notes", "open data"]
_LABELS: Final = [
    "Save",
    "Open",
    "Send",
    "Search",
    "Profile",
    "Settings",
    "Reports",
    "Messages",
    "Calendar",
    "Photos",
    "Billing",
    "Support",
]
_DISHES: Final = ["Tomato Soup", "Green Salad", "Apple Pie", "Lemon Tea", "Rice Bowl", "Fish Stew", "Black Coffee"]
_SIGNS: Final = ["OPEN DAILY", "Main Street", "Fresh Bread", "No Parking", "City Library", "Exit 24", "Slow Down"]

_ZH_PLACES: Final = ["山谷", "海边", "小镇", "花园", "图书馆", "车站", "古城", "森林", "河岸", "广场", "学校", "茶馆"]
_ZH_THINGS: Final = ["灯光", "故事", "春风", "雨水", "歌声", "书信", "花香", "月色", "脚步", "炊烟", "落叶", "晨雾"]
_ZH_VERBS: Final = ["穿过", "唤醒", "照亮", "记录", "连接", "守护", "温暖", "陪伴", "改变", "描绘"]
_ZH_PEOPLE: Final = ["孩子们", "旅人", "老师", "邻居", "农民", "画家", "船夫", "朋友", "游客", "工匠"]
_ZH_TOPICS: Final = ["设计", "能源", "旅行", "研究", "音乐", "烹饪", "健康", "天气", "科学", "历史", "运动", "金融"]
_ZH_ACTIONS: Final = ["规划", "回顾", "分享", "发现", "改进", "测量", "探索", "准备", "比较", "交付"]
_ZH_AIMS: Final = ["成果", "下一步工作", "新的想法", "合作伙伴", "年度预算", "调查笔记", "公开数据"]
_ZH_LABELS: Final = ["保存", "打开", "发送", "搜索", "个人资料", "设置", "报告", "消息", "日历", "相册", "账单", "帮助"]
_ZH_DISHES: Final = ["番茄汤", "青菜豆腐", "红烧鱼", "柠檬茶", "米饭", "炒面", "绿豆糕"]
_ZH_SIGNS: Final = ["欢迎光临", "中山路", "新鲜面包", "禁止停车", "市图书馆", "出口", "慢行", "请勿打扰"]


def title(random: Random, language: Language) -> str:
    """A heading of a few words."""
    if language == "zh":
        return f"{random.choice(_ZH_TOPICS)}与{random.choice(_ZH_PLACES)}"
    return f"{random.choice(_TOPICS)} {random.choice(['and', 'for', 'beyond'])} the {random.choice(_NOUNS).title()}"


def phrase(random: Random, language: Language) -> str:
    """A bullet point."""
    if language == "zh":
        return random.choice(_ZH_ACTIONS) + random.choice(_ZH_AIMS)
    pick = random.choice
    return f"{pick(_ACTIONS)} {pick(_THINGS)} with {pick(_ADJECTIVES)} {pick(_PLURALS)}"


def label(random: Random, language: Language) -> str:
    """One or two words on a button."""
    return random.choice(_ZH_LABELS if language == "zh" else _LABELS)


def labels(random: Random, language: Language, count: int) -> list[str]:
    """Different ones."""
    return random.sample(_ZH_LABELS if language == "zh" else _LABELS, count)


def dishes(random: Random, language: Language, count: int) -> list[str]:
    """Different lines of a menu."""
    return random.sample(_ZH_DISHES if language == "zh" else _DISHES, count)


def sign(random: Random, language: Language) -> str:
    """What stands on a sign."""
    return random.choice(_ZH_SIGNS if language == "zh" else _SIGNS)


def paragraph(random: Random, language: Language, longest: int) -> str:
    """One to four sentences; the second and further ones only up to `longest` characters."""
    glue = "" if language == "zh" else " "
    text = _sentence(random, language)
    for _ in range(random.randint(0, 3)):
        longer = text + glue + _sentence(random, language)
        text = longer if len(longer) <= longest else text
    return text


def _sentence(random: Random, language: Language) -> str:
    pick = random.choice
    if language == "zh":
        return pick(
            [
                f"{pick(_ZH_THINGS)}{pick(_ZH_VERBS)}{pick(_ZH_PLACES)}，{pick(_ZH_PEOPLE)}停下来听。",
                f"{pick(_ZH_PEOPLE)}在{pick(_ZH_PLACES)}{pick(_ZH_VERBS)}{pick(_ZH_THINGS)}。",
                f"清晨的{pick(_ZH_PLACES)}很安静，只有{pick(_ZH_THINGS)}和{pick(_ZH_THINGS)}。",
            ]
        )
    count = random.randint(2, 48)
    return pick(
        [
            f"The {pick(_ADJECTIVES)} {pick(_NOUNS)} {pick(_VERBS)} {count} {pick(_PLURALS)}.",
            f"Every {pick(_ADJECTIVES)} {pick(_NOUNS)} {pick(_VERBS)} the {pick(_NOUNS)} of {pick(_PLURALS)}.",
            f"Our {pick(_NOUNS)} {pick(_VERBS)} {pick(_PLURALS)}, and the {pick(_NOUNS)} stays {pick(_ADJECTIVES)}.",
        ]
    )
