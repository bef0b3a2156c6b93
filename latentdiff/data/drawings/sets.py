"""The sets of drawings: their styles in words of five languages, their authors and licences."""

from collections.abc import Mapping
from typing import NamedTuple


class Style(NamedTuple):
    """A style in one language: the word ("3D") and the phrase that follows a name ("3D style")."""

    word: str
    phrase: str


class DrawingSet(NamedTuple):
    """A set of drawings: its styles by language, and whose work it is."""

    styles: Mapping[str, Style]
    title: str
    author: str
    license: str
    link: str


_NOTO = "https://github.com/googlefonts/noto-emoji"
_STREAMLINE = "https://github.com/webalys-hq/streamline-vectors"
_FLUENT = "https://github.com/microsoft/fluentui-emoji"

# The key is that of the set's package. In a language that is not here a style has its English name.
SETS: Mapping[str, DrawingSet] = {
    "noto": DrawingSet(
        {
            "en": Style("shaded", "shaded style"),
            "zh": Style("渐变", "渐变风格"),
            "es": Style("sombreado", "estilo sombreado"),
            "fr": Style("ombré", "style ombré"),
            "de": Style("schattiert", "schattierter Stil"),
        },
        *("Noto Emoji", "Google Inc", "Apache-2.0", _NOTO),
    ),
    "noto-v1": DrawingSet(
        {
            "en": Style("blob", "blob style"),
            "zh": Style("圆润", "圆润风格"),
            "es": Style("redondeado", "estilo redondeado"),
            "fr": Style("arrondi", "style arrondi"),
            "de": Style("rundlich", "rundlicher Stil"),
        },
        *("Noto Emoji, version 1", "Google Inc", "Apache-2.0", _NOTO),
    ),
    "twemoji": DrawingSet(
        {
            "en": Style("flat", "flat style"),
            "zh": Style("扁平", "扁平风格"),
            "es": Style("plano", "estilo plano"),
            "fr": Style("plat", "style plat"),
            "de": Style("flach", "flacher Stil"),
        },
        *("Twitter Emoji", "Twitter", "CC-BY-4.0", "https://github.com/jdecked/twemoji"),
    ),
    "fluent-emoji-flat": DrawingSet(
        {
            "en": Style("bold", "bold style"),
            "zh": Style("鲜艳", "鲜艳风格"),
            "es": Style("llamativo", "estilo llamativo"),
            "fr": Style("vif", "style vif"),
            "de": Style("kräftig", "kräftiger Stil"),
        },
        *("Fluent Emoji Flat", "Microsoft Corporation", "MIT", _FLUENT),
    ),
    "fluent-emoji-3d": DrawingSet(
        {
            "en": Style("3D", "3D style"),
            "zh": Style("立体", "立体风格"),
            "es": Style("3D", "estilo 3D"),
            "fr": Style("3D", "style 3D"),
            "de": Style("3D", "3D-Stil"),
        },
        *("Fluent Emoji 3D", "Microsoft Corporation", "MIT", _FLUENT),
    ),
    "fluent-emoji-high-contrast": DrawingSet(
        {
            "en": Style("black and white", "black and white"),
            "zh": Style("黑白", "黑白"),
            "es": Style("blanco y negro", "en blanco y negro"),
            "fr": Style("noir et blanc", "en noir et blanc"),
            "de": Style("schwarz-weiß", "schwarz-weiß"),
        },
        *("Fluent Emoji High Contrast", "Microsoft Corporation", "MIT", _FLUENT),
    ),
    "emojione": DrawingSet(
        {
            "en": Style("detailed", "detailed style"),
            "zh": Style("细致", "细致风格"),
            "es": Style("detallado", "estilo detallado"),
            "fr": Style("détaillé", "style détaillé"),
            "de": Style("detailliert", "detaillierter Stil"),
        },
        *("Emoji One", "Emoji One", "CC-BY-4.0", "https://github.com/EmojiTwo/emojitwo"),
    ),
    "fxemoji": DrawingSet(
        {
            "en": Style("Firefox", "Firefox style"),
            "zh": Style("火狐", "火狐风格"),
            "es": Style("Firefox", "estilo Firefox"),
            "fr": Style("Firefox", "style Firefox"),
            "de": Style("Firefox", "Firefox-Stil"),
        },
        *("Firefox OS Emoji", "Mozilla", "Apache-2.0", "https://github.com/mozilla/fxemoji"),
    ),
    "streamline-emojis": DrawingSet(
        {
            "en": Style("outlined", "outlined style"),
            "zh": Style("描边", "描边风格"),
            "es": Style("contorneado", "estilo contorneado"),
            "fr": Style("cerné", "style cerné"),
            "de": Style("umrandet", "umrandeter Stil"),
        },
        *("Streamline Emojis", "Streamline", "CC-BY-4.0", _STREAMLINE),
    ),
}

SIX = tuple(SETS)[:6]
"""The sets that are drawn unless others are named."""
